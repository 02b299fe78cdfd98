"""The law of small models by enumeration: the product's loop runs over every branch, in fractions, and its law must be the target's.

Nothing is replaced but the source of randomness, which answers every question in every way, and the arithmetic behind the
models, which is exact (:mod:`dspark.proof.branches`). Drafting, scheduling, cache, rewinding and acceptance are the product's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dspark.bench.provenance import cores, environment
from dspark.bench.results import Ledger, Row
from dspark.decode import Round, rounds
from dspark.proof import tables
from dspark.proof.branches import ExactSampling, ExactSource, Law, difference, enumerate_joined, enumerate_law
from dspark.proof.cases import POLICIES, PROMPT, Case, every_case, few_cases, large_cases, small_target
from dspark.proof.inputs import digest
from dspark.proof.tables import PAIR, PAIR_POLICIES
from dspark.proof.workers import side_by_side
from dspark.rewind import GrowingKV, RewindCache
from dspark.schedule import Policy
from dspark.target.target import Target
from dspark.verify.sampling import Chance


class Trip(NamedTuple):
    """What a round did, in numbers."""

    window: int
    drafted: int
    verify_length: int
    accepted: int
    committed: int
    source: str
    siblings: tuple[int, ...] = ()  # their positions
    kept_sibling: bool = False

    @classmethod
    def of(cls, r: Round) -> Trip:
        beside = tuple(position for position, _ in r.siblings), r.sibling is not None
        return cls(r.window, len(r.draft_tokens), r.verify_length, r.accepted, len(r.committed), r.source, *beside)

    @property
    def rewound(self) -> int:
        """Tokens that the cache had to forget."""
        return self.verify_length - self.accepted

    @property
    def ended_inside(self) -> bool:
        """An end-of-text token stood among the accepted drafts, and tokens behind it were thrown away."""
        return self.committed <= self.accepted


@dataclass(frozen=True)
class Proof:
    """law: of the whole output, the joint law of its tokens · expected: the target's · branches: leaves of the tree ·
    trips: rounds that happened on the way, with how often."""

    law: Law
    expected: Law
    branches: int
    trips: Counter[Trip] = field(default_factory=Counter)

    @property
    def difference(self) -> float:
        """The largest difference in the probability of one text; 0.0 means equal, to the last digit of every fraction."""
        exact = difference(self.law, self.expected)
        return max(float(exact), sys.float_info.min) if exact else 0.0

    @property
    def columns(self) -> dict[str, object]:
        return {"branches": self.branches, "texts": len(self.expected), "difference": self.difference}


def prove(case: Case, policy: Policy | None = None) -> Proof:
    """Enumerate one case. policy: another one than the case names, to see what a wrong one does."""
    target, source = case.models()
    policy = policy or POLICIES[case.policy]
    trips: Counter[Trip] = Counter()

    def run(chance: Chance) -> Sequence[int]:
        stream = list(rounds(target, ExactSource(source), PROMPT, case.tokens, policy, case.sampling, chance))
        trips.update(Trip.of(r) for r in stream[1:])
        return [token for r in stream for token in r.committed]

    law, branches = enumerate_law(run)
    return Proof(law, target_law(target, case.tokens, case.sampling), branches, trips)


def prove_joined(case: Case) -> Proof:
    """As :func:`prove`, for trees that are too large to walk branch by branch: branches whose state is the same to the last bit
    go on as one. ``trips`` are those that were walked."""
    target, source = case.models()
    policy, exact_source = POLICIES[case.policy], ExactSource(source)
    trips: Counter[Trip] = Counter()

    def run(chance: Chance) -> Iterator[tuple[Sequence[int], Hashable]]:
        text: list[int] = []
        for r in rounds(target, exact_source, PROMPT, case.tokens, policy, case.sampling, chance):
            text += r.committed
            # The loop's own state: cache and drafter, the text, and of the last round what the policy makes of it.
            window = policy.window(r if r.index else None, case.block_size)
            yield text, (tuple(text), window, *contents(target.cache), *contents(exact_source.state))
            trips.update([Trip.of(r)] if r.index else [])

    law, branches = enumerate_joined(run)
    return Proof(law, target_law(target, case.tokens, case.sampling), branches, trips)


def contents(held: object) -> Iterator[Hashable]:
    """All that an object holds, piece by piece, tensors as their bytes. Raises TypeError for what it cannot look into."""
    if isinstance(held, Tensor):
        yield held.shape
        yield held.contiguous().numpy().tobytes()
    elif isinstance(held, RewindCache):
        yield from (piece for layer in held.layers for piece in contents(layer.kv))
    elif isinstance(held, GrowingKV):
        yield held.length
        yield from (piece for side in (held.view() if held.length else ()) for piece in contents(side))
    elif is_dataclass(held):
        yield from (piece for each in fields(held) for piece in contents(getattr(held, each.name)))
    elif isinstance(held, (list, tuple)):
        yield len(held)
        yield from (piece for each in held for piece in contents(each))
    elif isinstance(held, dict):
        yield from contents(list(held.items()))
    elif held is None or isinstance(held, (int, float, str)):
        yield held
    else:
        raise TypeError(f"a state that holds a {type(held).__name__} cannot be compared")


@cache
def target_law(target: Target, limit: int, sampling: ExactSampling) -> Law:
    """The law of the target's own text behind PROMPT: one fresh pass per prefix, and no cache. A text ends behind an
    end-of-text token or after ``limit`` tokens."""
    ended: Law = {}
    growing: Law = {(): Fraction(1)}
    for _ in range(limit):
        grown: Law = {}
        for text, mass in growing.items():
            logits, _ = target.forward(torch.tensor([[*PROMPT, *text]]), None)
            for token, p in enumerate(sampling.probs(logits[0, -1])):
                if p:
                    (ended if token in target.eos_token_ids else grown)[(*text, token)] = mass * p
        growing = grown
    return ended | growing


def run(out: Path, smoke: bool = False) -> pd.DataFrame:
    """One row per case, in ``out`` and returned. Goes on where a killed run stopped. smoke: a few of the small cases.

    branches: leaves of the tree · joined: whether branches in the same state went on as one · texts: outcomes with a probability ·
    difference: see :class:`Proof`; anything but 0.0 disproves exactness. The last rows are two requests scheduled together, with
    tables in place of models.
    """
    cases = few_cases()[:6] if smoke else [*large_cases(), *every_case()]  # the longest first
    origin = {"inputs": inputs()}
    ledger = Ledger(out, {"part": "enumeration", "cases": [*(case.name for case in cases), *PAIR_POLICIES]} | origin)
    if not ledger.complete:
        todo = [case for case in cases if case.name not in ledger.done]
        done = side_by_side(_row, todo, 1 if smoke else cores())
        for case, row in tqdm(done, desc="enumeration", unit="case", initial=len(cases) - len(todo), total=len(cases)):
            ledger.add(case.name, [row | origin])
        ledger.done = {case.name: ledger.done[case.name] for case in cases}  # in order, whoever was done first
        place = environment(small_target(2, False)) | {"target": "tables", "target_digest": "", "dtype": "fractions"}
        for name in PAIR_POLICIES:
            ledger.add(name, [_pair_columns(name) | prove_pair(name).columns | place | origin])
    return ledger.finish()


def inputs() -> str:
    return digest([__name__])


def _row(case: Case) -> Row:
    joined = case in large_cases()
    proof = prove_joined(case) if joined else prove(case)
    return case.columns() | {"joined": joined} | proof.columns | environment(small_target(case.vocab, case.eos))


def prove_pair(policy: str) -> Proof:
    """Two requests in one round, scheduled together: key of PAIR_POLICIES."""
    law, branches = tables.joint_law(PAIR, PAIR_POLICIES[policy])
    return Proof(law, tables.target_law(PAIR), branches)


def _pair_columns(policy: str) -> dict[str, object]:
    case = Case(policy, "tables", block_size=tables.BLOCK_SIZE, tokens=tables.BLOCK_SIZE + 1)
    return case.columns() | {"case": f"{policy} two requests", "requests": len(PAIR), "joined": False}


def table(frame: pd.DataFrame) -> str:
    """Policies: cases, sources, branches and the largest difference."""
    by = frame.groupby("policy", sort=False)
    shown = by.agg(cases=("case", "size"), sources=("source", "nunique"), branches=("branches", "sum"), difference=("difference", "max"))
    return shown.reset_index().to_string(index=False)
