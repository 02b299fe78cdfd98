"""The law of the shipped model, by draws: the first new tokens, drawn by the product's loop under every policy, against the target's law.

The expected law is exact: products of the target's own processed rows along a tree of prefixes. Most draws take what depends on
the text alone from memory (:mod:`dspark.proof.remembered`); a share of them runs every block through the target and its real cache.
These are too few to show a small bias by their number. But every row that they compute is compared with the one in memory: both
come from the same text, so they may differ by float32 rounding only, far less than any bias that is detectable.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from dspark.bench.prompts import load_prompts
from dspark.bench.provenance import cores, drafter_columns, environment
from dspark.bench.results import Ledger, Row
from dspark.decode import DraftSource, rounds
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.load import load_drafter, load_target
from dspark.proof.cases import StepsPerSecond
from dspark.proof.inputs import digest, shipped_files
from dspark.proof.remembered import RememberedSampling, RememberedTarget, RememberingDrafter, Text, Tree, WatchedTarget, grow
from dspark.proof.statistics import Comparison, compare, detectable_tv, holm, together
from dspark.proof.workers import side_by_side
from dspark.schedule import MTP1, AdaptiveWindow, Autoregressive, ConfidenceThreshold, FixedWindow, Policy, PrefixScheduler
from dspark.target.target import Target
from dspark.verify.sampling import Chance, Sampling

TOKENS = 3  # the joint law of so many new tokens
LIMIT = 64  # new tokens at most: far away, so that no window is shortened
LEAST = 5.0  # a cell is expected at least so often
SIGNIFICANCE, POWER = 0.01, 0.9
SEED = 1  # of all draws

JAGGED = StepsPerSecond((1.0, 0.9, 0.75, 0.74, 0.5, 0.6))
LEVEL = StepsPerSecond((1.0, 0.97, 0.95, 0.93, 0.91, 0.6))
COPYING = "fixed:5+copy:1"
POLICIES: dict[str, Policy] = {
    "plain": Autoregressive(),
    "fixed:5": FixedWindow(5),
    "mtp1": MTP1(),
    # At most 3, so the first window is 1: see RememberedTarget.
    "adaptive": AdaptiveWindow(max_window=3),
    # Thresholds and curve are low enough that each of them cuts some drafts short and lets others through on every prompt.
    "confidence:0.15": ConfidenceThreshold(0.15),
    "conditional:0.25": ConfidenceThreshold(0.25, on="conditional"),
    "prefix, jagged": PrefixScheduler(JAGGED),
    "prefix, siblings": PrefixScheduler(LEVEL, sibling_rates=(0.3, 0.2)),
    COPYING: FixedWindow(5),
}
SETTINGS = (Sampling(1.0), Sampling(0.7, top_p=0.9))
EVERY_BLOCK = ", every block run"  # behind the policy's name
ALL_PROMPTS = "all"


@dataclass(frozen=True)
class Extent:
    """How much is drawn. prompts: ids in the dev split · draws: per prompt, setting and policy · blocks_run: policy → draws per
    setting, on the first prompt, that run every block through the target."""

    prompts: tuple[str, ...]
    draws: int
    blocks_run: tuple[tuple[str, int], ...]


FULL = Extent(("math/112", "chat/065", "code/143"), 34_000, tuple((name, 100) for name in POLICIES))
SMOKE = Extent(("chat/065",), 100, (("fixed:5", 24),))


@dataclass(frozen=True)
class World:
    """All that draws from one law share."""

    target: Target | RememberedTarget
    drafter: Drafter
    sampling: Sampling
    tree: Tree

    @classmethod
    def remembered(cls, target: Target, drafter: Drafter, tree: Tree, sampling: Sampling) -> World:
        quick = RememberedSampling(sampling.temperature, sampling.top_k, sampling.top_p)
        quick.learn(tree)
        return cls(RememberedTarget(tree, target), RememberingDrafter(drafter), quick, tree)

    @classmethod
    def running(cls, target: Target, drafter: Drafter, tree: Tree, sampling: Sampling) -> World:
        return cls(WatchedTarget(target, tree, drafter.target_layer_ids, sampling), drafter, sampling, tree)

    def source(self, name: str) -> DraftSource:
        """Who drafts under the policy of that name."""
        return ContextLookup(self.drafter, min_match=1) if name == COPYING else self.drafter

    def sample(self, name: str, n: int, seed: int) -> Counter[Text]:
        """n draws under the policy of that name → how often each text came."""
        source, chance, drawn = self.source(name), Chance(torch.Generator().manual_seed(seed)), Counter()
        for _ in range(n):
            drawn[self.draw(POLICIES[name], source, chance)] += 1
        return drawn

    @torch.inference_mode()
    def draw(self, policy: Policy, source: DraftSource, chance: Chance) -> Text:
        """The first tokens by the product's loop, until they are complete or have left the tree: until their cell is decided."""
        text: Text = ()
        for r in rounds(self.target, source, self.tree.prompt, LIMIT, policy, self.sampling, chance):
            text += r.committed
            if text not in self.tree.logits:
                break
        return text[:TOKENS]


def run(out: Path, smoke: bool = False) -> pd.DataFrame:
    """One row per prompt, setting and policy, and one for all prompts together, in ``out`` and returned. Resumable, piece by piece.

    n … tv_expected: see :class:`dspark.proof.statistics.Comparison` · p_adjusted: Holm's, over all rows · detectable_tv: the
    bias that n draws catch with power 0.9 at the level of one among so many tests; detectable_tv_100k: that 10⁵ would ·
    rows_compared, largest_row_difference: where every block was run, see :class:`dspark.proof.remembered.WatchedTarget`; else 0.
    """
    extent = SMOKE if smoke else FULL
    origin = {"inputs": inputs()}
    ledger = Ledger(out, {"mode": "sampled", "policies": repr(POLICIES), "settings": repr(SETTINGS)} | asdict(extent) | origin)
    if ledger.complete:
        return ledger.finish()
    laws = [Unit(prompt, sampling, extent) for prompt in extent.prompts for sampling in SETTINGS]
    pieces = [Piece(law, name, n) for law in laws for name, n in law.samples.items()]
    todo = [piece for piece in pieces if piece.key not in ledger.done]
    with tqdm(total=sum(piece.n for piece in pieces), desc="laws", unit="draw") as bar:
        bar.update(bar.total - sum(piece.n for piece in todo))
        for piece, row in side_by_side(Piece.drawn, todo, 1 if smoke else cores()):
            ledger.add(piece.key, [row | origin])
            bar.update(piece.n)
    rows = [row for piece in pieces for row in ledger.done[piece.key]]
    ledger.done = {"judged": judged([*rows, *over_prompts(rows)])}
    return ledger.finish()


def inputs() -> str:
    return digest([__name__], shipped_files())


@dataclass(frozen=True)
class Unit:
    """One prompt in one setting: all policies are compared with the same law."""

    prompt: str
    sampling: Sampling
    extent: Extent

    @property
    def samples(self) -> dict[str, int]:
        """Policy → draws, those that run every block included."""
        blocks_run = self.extent.blocks_run if self.prompt == self.extent.prompts[0] else ()
        return dict.fromkeys(POLICIES, self.extent.draws) | {name + EVERY_BLOCK: n for name, n in blocks_run}

    def tree(self) -> Tree:
        """A text that is expected five times has no prefix that is expected less often: the tree holds every cell."""
        target, drafter = _models()
        (item,) = (item for item in load_prompts(self.prompt.split("/")[0], "dev") if item.id == self.prompt)
        cut = LEAST / self.extent.draws
        return grow(target, target.encode(item.messages), drafter.target_layer_ids, self.sampling, TOKENS, cut)


@dataclass(frozen=True)
class Piece:
    """n draws under one policy. name: the policy's, EVERY_BLOCK behind it where every block runs."""

    unit: Unit
    name: str
    n: int

    @property
    def key(self) -> str:
        return f"{self.unit.prompt}/T{self.unit.sampling.temperature:g}/p{self.unit.sampling.top_p:g}/{self.name}"

    def drawn(self) -> Row:
        target, drafter = _models()
        tree, remembered = _law(self.unit)
        every_block = self.name.endswith(EVERY_BLOCK)
        world = World.running(target, drafter, tree, self.unit.sampling) if every_block else remembered
        seed = zlib.crc32(f"{SEED}/{self.key}".encode())
        found = compare(world.sample(self.name.removesuffix(EVERY_BLOCK), self.n, seed), tree.law, LEAST)
        watched = (world.target.compared, world.target.largest) if every_block else (0, 0.0)
        return (
            {"prompt": self.unit.prompt, "temperature": self.unit.sampling.temperature, "top_p": self.unit.sampling.top_p}
            | {"policy": self.name, "every_block_run": every_block, "seed": seed}
            | asdict(found)
            | dict(zip(("rows_compared", "largest_row_difference"), watched, strict=True))
            | {"drafter": "default", "tokens": TOKENS}
            | environment(target)
            | drafter_columns(drafter)
        )


@lru_cache(maxsize=1)
def _law(unit: Unit) -> tuple[Tree, World]:
    """The last one that this process drew from: the pieces of a unit follow one another."""
    tree = unit.tree()
    return tree, World.remembered(*_models(), tree, unit.sampling)


@cache
def _models() -> tuple[Target, Drafter]:
    target = load_target("default", dtype="float32")
    return target, load_drafter("default", target)


def over_prompts(rows: list[Row]) -> list[Row]:
    """What the prompts say together, for each setting and policy that saw several: one test with all their draws."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["temperature"], row["top_p"], row["policy"]), []).append(row)
    several = [group for group in groups.values() if len(group) > 1]
    return [group[0] | {"prompt": ALL_PROMPTS, "seed": None} | asdict(together([_comparison(row) for row in group])) for group in several]


def judged(rows: list[Row]) -> list[Row]:
    """The rows with what depends on how many tests there are."""
    level = SIGNIFICANCE / len(rows)  # Holm's first step, the hardest
    result = []
    for row, p_adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        detectable = {
            "detectable_tv": detectable_tv(row["n"], row["dof"], level, POWER),
            "detectable_tv_100k": detectable_tv(100_000, row["dof"], level, POWER),
        }
        result.append(row | {"p_adjusted": p_adjusted, "tests": len(rows)} | detectable)
    return result


def _comparison(row: Row) -> Comparison:
    return Comparison(**{field.name: row[field.name] for field in fields(Comparison)})


def table(frame: pd.DataFrame) -> str:
    """One line per setting and policy: all prompts together where there are several, and the smallest adjusted p of any of its rows."""
    first = frame.iloc[0]
    lines = []
    for (temperature, top_p, policy), rows in frame.groupby(["temperature", "top_p", "policy"], sort=False):
        widest = rows.loc[rows["n"].idxmax()]
        lines.append(
            {
                "T": f"{temperature:g}",
                "top-p": f"{top_p:g}",
                "policy": policy,
                "n": widest["n"],
                "cells": widest["cells"],
                "χ²": f"{widest['chi2']:.1f}",
                "p": f"{widest['p_value']:.3f}",
                "smallest adjusted p": f"{rows['p_adjusted'].min():.3f}",
                "TV": f"{widest['tv']:.4f}",
                "by chance": f"{widest['tv_expected']:.4f}",
                "caught": f"{widest['detectable_tv']:.4f}",
                "by 10⁵ draws": f"{widest['detectable_tv_100k']:.4f}",
            }
        )
    return (
        f"{first['target']} {first['dtype']} + {first['drafter']} drafter · joint law of the first {first['tokens']} tokens · "
        f"{frame.loc[frame['prompt'] != ALL_PROMPTS, 'prompt'].nunique()} prompts · {len(frame)} tests, Holm's correction\n"
        f"{pd.DataFrame(lines).to_string(index=False)}\n"
        "TV: total variation between the sample and the law, and what chance alone makes it. caught: any bias of this total variation\n"
        f"is found with power {POWER:g} at {SIGNIFICANCE:g} divided by the number of tests; behind it, what 10⁵ draws find in these.\n"
        f"{frame['rows_compared'].sum()} rows of blocks that ran through the target differ from those in memory by at most "
        f"{frame['largest_row_difference'].max():.1e}"
    )
