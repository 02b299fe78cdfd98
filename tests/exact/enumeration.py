"""The output distribution of small models by enumeration: the product's own engine runs over every branch, in fractions.

Replaced are only the source of randomness, which takes every branch (:mod:`exact.branches`), and the arithmetic on probabilities,
which is exact. Drafting, scheduling, cache, rewinding and acceptance are the product's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import cycle, product
from math import prod

import numpy as np
import torch
from tiny import dense, tiny_drafter, tiny_target
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import Ask, Draft, DraftSource, propose
from dspark.engine import Engine
from dspark.request import Request
from dspark.round import Round
from dspark.schedule import POLICIES as REGISTRY
from dspark.schedule import SPS, FixedWindow, Policy, PrefixScheduler, make_policy, parse_policy
from dspark.target.target import Target
from dspark.verify.lean import lean_pass
from dspark.verify.processors import Process, Processors
from dspark.verify.sampling import OneHot, Sampling
from exact.branches import Branch, Distribution, every_branch, exact

NextToken = Callable[[Sequence[int]], Sequence[Fraction]]  # prompt and text so far → the distribution [vocab] of the next token
PROMPTS = ([0, 1, 0], [1, 1])
SEED = 1500


def eighths(logits: Tensor) -> Tensor:
    """Logits as multiples of ⅛.

    A pass over a block and one over a single token differ in the last digits, so without this the target would have two distributions.
    A stale cache, a wrong position or a wrong row changes logits by far more than one step.
    """
    steps = 8 * logits
    assert not ((steps - steps.floor() - 0.5).abs() <= 1e-6).any(), "a logit lies between two multiples: choose another seed"
    return steps.round() / 8


@dataclass(frozen=True)
class ExactSampling(Sampling):
    """The product's own probabilities of the target's logits, temperature, top-k and top-p included, as fractions that sum to exactly 1."""

    def probs(self, logits: Tensor) -> np.ndarray:
        return exact(super().probs(eighths(logits)))

    def row(self, logits: Tensor) -> np.ndarray | OneHot:
        return super().row(logits if self.temperature else eighths(logits))


class ExactSource:
    """A source of drafts that runs as in the product and reports its distributions as fractions.

    :meth:`Branch.choose` makes fractions of a float32 row by the same function, so p_draft is exactly what the draft was drawn from if
    the source reports the row that it drew from; if it reports another row, the output distribution shows it.
    """

    def __init__(self, source: DraftSource) -> None:
        self.source = source

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        floats = [ask._replace(sampling=Sampling(ask.sampling.temperature, ask.sampling.top_k, ask.sampling.top_p)) for ask in asks]
        drafts = propose(self.source, floats)
        return [d if OneHot in map(type, d.probs) else replace(d, probs=exact(dense(d))) for d in drafts]


def steps_per_second(*curve: float) -> SPS:
    """A made-up curve SPS(B), B from 1; constant after its end."""
    return lambda tokens: curve[min(tokens, len(curve)) - 1]


SMOOTH = steps_per_second(1.0, 0.7, 0.58, 0.5, 0.44)
JAGGED = steps_per_second(1.0, 0.62, 0.62, 0.53, 0.57)
SPECS = "plain mtp1 fixed:1 fixed:2 fixed:3 fixed:4 adaptive:0.6,0.5,0.3 confidence:0.3 conditional:0.5 prefix async".split()
POLICIES: dict[str, Policy] = {spec.split(",")[0]: parse_policy(spec, lambda: JAGGED) for spec in SPECS}
POLICIES |= {name: make_policy(name, {}, lambda: SMOOTH) for name in REGISTRY if name not in {spec.split(":")[0] for spec in SPECS}}
POLICIES["prefix smooth"] = PrefixScheduler(SMOOTH)
HEADS = ("vanilla", "none", "gated", "rnn", "selector")
SOURCES = (*HEADS, "reduced", "copying")  # "reduced": vanilla with a draft vocabulary of two tokens; "copying": ContextLookup(vanilla)
TOP_TWO = ExactSampling(1.0, top_k=2)
SAMPLINGS = (ExactSampling(0.5), ExactSampling(2.0), ExactSampling(0.0), TOP_TWO, ExactSampling(1.0, top_p=0.8), ExactSampling(2.0, 2, 0.7))


@dataclass(frozen=True)
class Case:
    """One small world.

    policy: key of POLICIES.
    source: one of SOURCES.
    tokens: the length limit of each request; several requests are decoded together, by the lean pass.
    eos: whether the last token id ends the text.
    """

    policy: str = "fixed:3"
    source: str = "vanilla"
    sampling: ExactSampling = ExactSampling(1.0)
    vocab: int = 2
    block_size: int = 3
    tokens: tuple[int, ...] = (4,)
    eos: bool = False

    def __str__(self) -> str:
        s = self.sampling
        kept = f"T{s.temperature:g}{f' k{s.top_k}' * (s.top_k > 0)}{f' p{s.top_p:g}' * (s.top_p < 1)}"
        tokens = "+".join(map(str, self.tokens))
        return f"{self.policy} {self.source} {kept} vocab{self.vocab} block{self.block_size} tokens{tokens}{' eos' * self.eos}"


def served(block_size: int) -> list[str]:
    """The policies that a drafter with such blocks can serve."""
    return [name for name, policy in POLICIES.items() if not isinstance(policy, FixedWindow) or (policy.n or 1) <= block_size]


def few_cases() -> list[Case]:
    """Every policy, source, sampling, vocabulary and block size at least once, with small trees."""
    by_source = [Case(policy, source) for policy, source in zip(served(3), cycle(SOURCES), strict=False)]
    by_sampling = [Case(policy, "gated", s, 3, 2, eos=True) for policy, s in zip(served(2), SAMPLINGS, strict=False)]
    shapes = [
        Case("prefix", "selector", vocab=3, block_size=2, eos=True),
        Case("adaptive:0.6", block_size=4, tokens=(6,), eos=True),
        Case("mtp1", vocab=4, block_size=1, tokens=(3,)),
        Case("fixed:2", "reduced", TOP_TWO, 5, 2, tokens=(3,)),
        Case("fixed:4", "copying", block_size=4, tokens=(6,), eos=True),
        Case("fixed:2", "rnn", block_size=2, tokens=(3, 3)),
        Case("prefix", "gated", tokens=(3, 2)),
        Case("async", "gated", block_size=2, tokens=(5,)),
    ]
    return list(dict.fromkeys(by_source + by_sampling + shapes))


def every_case() -> list[Case]:
    """Every policy with every source and every sampling, with and without an end of the text; block sizes 1 to 4, 2 to 6 tokens."""
    by_source = [Case(policy, source) for policy in served(3) for source in SOURCES]
    by_sampling = [Case(policy, "gated", s, 3, 2, eos=True) for policy in served(2) for s in SAMPLINGS]
    deep = [Case(policy, head, TOP_TWO, 3, tokens=(5,), eos=True) for policy in served(3) for head in HEADS]
    longest = [Case(policy, block_size=4, tokens=(6,), eos=True) for policy in served(4)]
    together = [Case(policy, "rnn", tokens=(4, 3)) for policy in served(3)]
    together += [Case("async", "gated", block_size=1, tokens=(5, 5))]  # long enough for a round whose budget is two rounds old
    return list(dict.fromkeys(few_cases() + by_source + by_sampling + deep + longest + together))


@cache
def small_target(vocab: int, eos: bool, lean: bool = False) -> Target:
    """A random Llama of two layers, in float64 so that no logit comes near the border between two roundings."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    ends = {"bos_token_id": None, "eos_token_id": vocab - 1 if eos else None, "pad_token_id": None}
    target = tiny_target(SEED + vocab, torch.float64, vocab_size=vocab, **shape, **ends)
    target.model.lm_head.weight.data *= 0.5  # even distributions: every token likely, drafts sometimes accepted
    target.verifier = lean_pass(target) if lean else None
    return target


@cache
def small_drafter(target: Target, source: str, block_size: int) -> Drafter:
    """A random drafter of one layer whose confidence differs from branch to branch."""
    head, last = source if source in HEADS else "vanilla", target.vocab_size - 1
    markov = {"markov_rank": 0} if head == "none" else {"markov_rank": 4, "markov_head_type": head}
    kept = {"reduced": {"d2t": torch.tensor([0, last])}, "selector": {"num_candidates": last}}.get(source, {})
    shape = {"num_hidden_layers": 1, "block_size": block_size, "target_layer_ids": (0,), "mask_token_id": 1}
    drafter = tiny_drafter(target, seed=SEED + 10 * target.vocab_size + block_size, std=0.5, **shape, **markov, **kept)
    hidden, embedding = drafter.confidence_head.proj.weight.data.split([target.hidden_size, drafter.config.markov_rank], -1)
    hidden *= 0.2 if drafter.markov_head else -2.0
    drafter.confidence_head.proj.bias.data.zero_()
    if drafter.markov_head:  # about .8 after the first token, .4 after the last
        wanted = torch.linspace(1.5, -0.5, target.vocab_size).to(target.dtype)
        embedding[0] = torch.linalg.pinv(drafter.markov_head.markov_w1.weight.data) @ wanted
    return drafter


@dataclass(frozen=True)
class Proof:
    """distribution: of the texts of all requests. expected: the target's own. branches: of the tree. met: rounds, with how often."""

    distribution: Distribution
    expected: Distribution
    branches: int
    met: Counter[Round]

    @property
    def difference(self) -> Fraction:
        """The largest difference in the probability of one outcome."""
        found, expected = self.distribution, self.expected
        return max(abs(found.get(texts, Fraction(0)) - expected.get(texts, Fraction(0))) for texts in found | expected)


def prove(case: Case) -> Proof:
    """Enumerate one case."""
    target = small_target(case.vocab, case.eos, lean=len(case.tokens) > 1)
    source: DraftSource = small_drafter(target, case.source, case.block_size)
    if case.source == "copying":
        source = ContextLookup(source, 2, max_copy=case.block_size)
    return compared(target, source, POLICIES[case.policy], case.sampling, case.tokens)


def compared(
    target: Target, source: DraftSource, policy: Policy, sampling: ExactSampling, limits: Sequence[int], processor: Process | None = None
) -> Proof:
    """The texts after PROMPTS, decoded together, against the target's: one fresh pass per prefix, no cache."""

    def row(text: Sequence[int]) -> np.ndarray:
        ids = torch.tensor([text])
        logits = target.forward(ids, None)[0][0, -1]
        return sampling.probs(processor(ids, logits.float()[None])[0] if processor else logits)

    asked, around = list(zip(PROMPTS, limits, strict=False)), Processors([processor]) if processor else None
    return enumerated(target, ExactSource(source), policy, sampling, asked, row, around)


def enumerated(
    target: Target,
    source: DraftSource,
    policy: Policy,
    sampling: Sampling,
    asked: Sequence[tuple[list[int], int]],
    row: NextToken,
    processors: Processors | None = None,
) -> Proof:
    """Every branch of an engine with these requests. asked: (prompt, length limit) of each."""
    met: Counter[Round] = Counter()

    def run(branch: Branch) -> list[tuple[int, ...]]:
        engine, ends = Engine(target, source, policy, max_requests=len(asked)), target.eos_token_ids
        common = {"sampling": sampling, "rng": branch, "end_ids": ends, "processors": processors}
        requests = [engine.enqueue(Request(id=None, prompt=prompt, limit=limit, **common)) for prompt, limit in asked]
        met.update(replace(r, draft_seconds=0, verify_seconds=0, seconds=0) for _, r in engine.run() if r.index)
        for error in (request.error for request in requests if request.error):
            raise error
        return [tuple(request.token_ids) for request in requests]

    distribution, branches = every_branch(run)
    texts = product(*(text_distribution(row, prompt, limit, target.eos_token_ids).items() for prompt, limit in asked))
    return Proof(distribution, {tuple(text for text, _ in each): prod(p for _, p in each) for each in texts}, branches, met)


def text_distribution(row: NextToken, prompt: list[int], limit: int, ends: frozenset[int], cut: float = 0) -> Distribution:
    """Of one text, token by token; it ends after a token of ``ends`` or ``limit`` tokens. Texts no likelier than ``cut`` are left out."""
    ended: Distribution = {}
    growing: Distribution = {(): 1}
    for _ in range(limit):
        grown: Distribution = {}
        for text, mass in growing.items():
            for token, p in enumerate(row([*prompt, *text])):
                if mass * p > cut:
                    (ended if token in ends else grown)[(*text, token)] = mass * p
        growing = grown
    return ended | growing
