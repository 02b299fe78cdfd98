"""Greedy texts of the shipped models, token for token: in float32 every way to decode gives ``model.generate``'s text; in bfloat16
every divergence is weighed against the rounding measured at that point (:mod:`dspark.bench.identity`).

Nothing is tuned here, so the prompts of both splits are read. Every prompt runs plainly and in a share of the other ways, which
take turns, so that each of them meets every domain about equally often.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from dspark.bench.arms import Models, parse_arm
from dspark.bench.identity import compare
from dspark.bench.measure import Decoder
from dspark.bench.plan import Plan, rotated
from dspark.bench.provenance import drafter_columns, revision
from dspark.bench.results import Ledger, Row
from dspark.bench.speed import constant_columns
from dspark.bench.table import identity_table
from dspark.draft import Drafter

PLAIN = "plain"
WINDOWS = {f"fixed:{n}": n for n in range(1, 9)} | {"mtp1": 1}
OTHERS = (*WINDOWS, "adaptive", "confidence:0.4", "conditional:0.4", "prefix", "fixed+copy")


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
    "float32": Extent(Plan.domains, {"dev": 13, "test": 12}, tokens=24, share=6),
    "bfloat16": Extent(Plan.domains, {"dev": 6, "test": 6}, tokens=24, share=6),
}
SMOKE = dict.fromkeys(FULL, Extent("code", {"dev": 1, "test": 1}, tokens=4, share=4))


def run(out: Path, smoke: bool = False) -> pd.DataFrame:
    """One row per dtype, prompt and way to decode (``arm``), in ``out`` and returned. Goes on where a killed run stopped.

    block_size: tokens that a round drafts at most · drafter_block_size: the drafter's own, raised for windows beyond it ·
    tokens, equal, first_divergence, margin, noise: see :func:`dspark.bench.identity.compare`.
    """
    extents = SMOKE if smoke else FULL
    first = next(iter(extents))
    models = extents[first].plans(first)[0].load(stock=True)
    made_with = {"target_digest": models.target.digest} | drafter_columns(models.drafter) | {"revision": revision()}
    ledger = Ledger(out, {"mode": "texts", "extents": {dtype: asdict(extent) for dtype, extent in extents.items()}} | made_with)
    if ledger.complete:
        return ledger.finish()
    for dtype, extent in extents.items():
        plans = extent.plans(dtype)
        units = list(enumerate(unit for plan in plans for unit in plan.units))
        todo = [(turn, unit) for turn, unit in units if f"{dtype}/{unit.key}" not in ledger.done]
        if not todo:
            continue
        if dtype != first:
            models = plans[0].load(stock=True)
        needed = dict.fromkeys(name for turn, _ in todo for name in extent.ways(turn))
        ways = {name: Way.of(name, models, plans[0]) for name in needed}
        for turn, unit in tqdm(todo, desc=dtype, unit="prompt", initial=len(units) - len(todo), total=len(units)):
            decoders = {name: ways[name].decoder for name in extent.ways(turn)}
            rows = compare(models, decoders, models.target.encode(unit.item.messages), plans[0].settings)
            about = {"prompt": unit.item.id, "domain": unit.item.domain}
            ledger.add(f"{dtype}/{unit.key}", [about | row | ways[row["arm"]].columns | extent.columns for row in rows])
    return ledger.finish()


@dataclass(frozen=True)
class Way:
    """A way to decode, ready to run. columns: what all its rows say alike."""

    decoder: Decoder
    columns: Row

    @classmethod
    def of(cls, name: str, models: Models, plan: Plan) -> Way:
        arm, columns = parse_arm(name), constant_columns(plan, models)[name]
        if not arm.drafts:
            return cls(models.decoder(arm, plan.settings), columns | {"block_size": 0})
        drafter = raised(models.drafter, WINDOWS.get(name, 1))
        block_size = WINDOWS.get(name, arm.source(drafter).block_size)
        decoder = replace(models, drafter=drafter).decoder(arm, plan.settings)
        return cls(decoder, columns | drafter_columns(drafter) | {"block_size": block_size})


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
    return f"{frame['prompt'].nunique()} prompts; each ran plainly and in {each} of the {others} other ways in turn"
