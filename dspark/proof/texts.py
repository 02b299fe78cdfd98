"""Greedy texts of the shipped models, token for token: in float32 every way to decode gives ``model.generate``'s text; in bfloat16
every divergence is weighed against the rounding measured at that point (:mod:`dspark.bench.identity`).

Nothing is tuned here, so the prompts of both splits are read. Every prompt runs plainly and in a share of the other ways (in float32
in all of them), which take turns, so that each of them meets every domain about equally often. A prompt's prefill runs once: all
ways go on from the same cache, rewound between them.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from dspark.bench.arms import Models, parse_arm
from dspark.bench.identity import compare
from dspark.bench.measure import Decoder, Settings, by_dspark
from dspark.bench.plan import Plan, Unit, rotated
from dspark.bench.provenance import cores, drafter_columns
from dspark.bench.results import Ledger, Row
from dspark.bench.speed import constant_columns
from dspark.bench.table import identity_table
from dspark.decode import DraftSource
from dspark.draft.drafter import Drafter
from dspark.proof.inputs import digest, shipped_files
from dspark.proof.remembered import PrefilledTarget
from dspark.proof.workers import side_by_side
from dspark.schedule import Policy
from dspark.target.target import Target

PLAIN = "plain"
WINDOWS = {f"fixed:{n}": n for n in range(1, 9)} | {"mtp1": 1}
OTHERS = (*WINDOWS, "adaptive", "confidence:0.4", "conditional:0.4", "prefix", "fixed+copy", "fixed+phrases", "prefix+phrases")
OTHERS += ("prefix+siblings", "prefix+phrases+siblings")


@dataclass(frozen=True)
class Extent:
    """How much is decoded. prompts: of each domain, by split · tokens: new ones at most · share: of the other ways, per prompt."""

    domains: str
    prompts: dict[str, int]
    tokens: int
    share: int

    def plans(self, dtype: str) -> list[Plan]:
        """One per split; they differ in nothing else."""
        arms = ",".join([PLAIN, *OTHERS])
        return [Plan(arms, domains=self.domains, split=s, prompts=n, tokens=self.tokens, dtype=dtype) for s, n in self.prompts.items()]

    def ways(self, turn: int) -> list[str]:
        """What the prompt number ``turn`` runs."""
        return [PLAIN, *rotated(OTHERS, turn * self.share)[: self.share]]

    @property
    def columns(self) -> Row:
        return {"n": sum(self.prompts.values()), "split": "+".join(self.prompts), "ways_per_prompt": 1 + self.share}


FULL = {
    "float32": Extent(Plan.domains, {"dev": 13, "test": 12}, tokens=12, share=len(OTHERS)),
    "bfloat16": Extent(Plan.domains, {"dev": 6, "test": 6}, tokens=24, share=6),
}
SMOKE = dict.fromkeys(FULL, Extent("code", {"dev": 1, "test": 1}, tokens=4, share=4))


def run(out: Path, smoke: bool = False) -> pd.DataFrame:
    """One row per dtype, prompt and way to decode (``arm``), in ``out`` and returned. Goes on where a killed run stopped.

    block_size: tokens that a round drafts at most · drafter_block_size: the drafter's own, raised for windows beyond it ·
    tokens, equal, first_divergence, margin, noise: see :func:`dspark.bench.identity.compare`.
    """
    extents = SMOKE if smoke else FULL
    origin = {"inputs": inputs()}
    ledger = Ledger(out, {"mode": "texts", "extents": {dtype: asdict(extent) for dtype, extent in extents.items()}} | origin)
    if ledger.complete:
        return ledger.finish()
    pieces = [
        Piece(dtype, turn, unit, smoke)
        for dtype, extent in extents.items()
        for turn, unit in enumerate(unit for plan in extent.plans(dtype) for unit in plan.units)
    ]
    todo = [piece for piece in pieces if piece.key not in ledger.done]
    _bench.cache_clear()
    done = side_by_side(Piece.compared, todo, 1 if smoke else cores())
    for piece, rows in tqdm(done, desc="texts", unit="prompt", initial=len(pieces) - len(todo), total=len(pieces)):
        ledger.add(piece.key, [row | origin for row in rows])
    ledger.done = {piece.key: ledger.done[piece.key] for piece in pieces}  # in order, whoever was done first
    return ledger.finish()


def inputs() -> str:
    return digest([__name__], shipped_files())


@dataclass(frozen=True)
class Piece:
    """One prompt in one dtype, in all the ways that it runs."""

    dtype: str
    turn: int
    unit: Unit
    smoke: bool

    @property
    def key(self) -> str:
        return f"{self.dtype}/{self.unit.key}"

    def compared(self) -> list[Row]:
        extent, bench = (SMOKE if self.smoke else FULL)[self.dtype], _bench(self.dtype, self.smoke)
        prompt = bench.models.target.encode(self.unit.item.messages)
        target = PrefilledTarget(bench.models.target, prompt, bench.models.drafter.target_layer_ids)
        ways = {name: bench.way(name) for name in extent.ways(self.turn)}
        decoders = {name: way.decoder(target, bench.plan.settings) for name, way in ways.items()}
        about = {"prompt": self.unit.item.id, "domain": self.unit.item.domain} | extent.columns
        return [about | row | ways[row["arm"]].columns for row in compare(bench.models, decoders, prompt, bench.plan.settings)]


@dataclass(frozen=True)
class Way:
    """A way to decode. source, policy: None for plain decoding · columns: what all its rows say alike."""

    source: DraftSource | None
    policy: Policy | None
    columns: Row

    def decoder(self, target: Target, settings: Settings) -> Decoder:
        return by_dspark(target, self.source, self.policy, settings)


@dataclass(frozen=True)
class Bench:
    """The models of one dtype, and every way to decode with them."""

    plan: Plan
    models: Models
    ways: dict[str, Way] = field(default_factory=dict)

    def way(self, name: str) -> Way:
        if name not in self.ways:
            self.ways[name] = self._made(name)
        return self.ways[name]

    def _made(self, name: str) -> Way:
        arm, columns = parse_arm(name), constant_columns(self.plan, self.models)[name]
        if not arm.drafts:
            return Way(None, None, columns | {"block_size": 0})
        drafter = raised(self.models.drafter, WINDOWS.get(name, 1))
        source, policy = arm.source(drafter), arm.policy(self.models.target)
        policy.check(source.block_size, source.has_confidence)
        return Way(source, policy, columns | drafter_columns(drafter) | {"block_size": WINDOWS.get(name, source.block_size)})


@lru_cache(maxsize=1)
def _bench(dtype: str, smoke: bool) -> Bench:
    """Loaded once for all the prompts that a process takes on; the other dtype's models are let go."""
    plan = (SMOKE if smoke else FULL)[dtype].plans(dtype)[0]
    return Bench(plan, plan.load(stock=True))


def raised(drafter: Drafter, block_size: int) -> Drafter:
    """The drafter with blocks of at least ``block_size`` tokens and the same weights. It may draft badly there: the text must not care."""
    if drafter.block_size >= block_size:
        return drafter
    longer = copy.copy(drafter)
    longer.config = replace(drafter.config, block_size=block_size)
    longer.sts_temperatures = ()  # calibrated position by position, for the shorter block
    return longer


def table(frame: pd.DataFrame) -> str:
    """One table per dtype, and how its prompts were shared out."""
    return "\n\n".join(f"{identity_table(part)}\n{_shared(part)}" for _, part in frame.groupby("dtype", sort=False))


def _shared(frame: pd.DataFrame) -> str:
    others, each = frame["arm"].nunique() - 1, frame.iloc[0]["ways_per_prompt"] - 1
    share = f"all {others} other ways" if each == others else f"{each} of the {others} other ways in turn"
    return f"{frame['prompt'].nunique()} prompts; each ran plainly and in {share}"
