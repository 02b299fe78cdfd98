"""The output distribution of small models by enumeration: the product's own loop runs over every branch, in fractions.

Replaced are only the source of randomness, which takes every branch (:mod:`dspark.lab.branches`), and the arithmetic on probabilities,
which is exact. Drafting, scheduling, cache, rewinding and acceptance are the product's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from itertools import cycle

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dspark.decode import rounds
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import Draft, DraftSource
from dspark.lab.branches import Branch, Distribution, every_branch, exact
from dspark.round import Round
from dspark.schedule import POLICIES as REGISTRY
from dspark.schedule import FixedWindow, Policy, PrefixScheduler, make_policy, parse_policy
from dspark.target.target import Target
from dspark.train.start import drafter_for
from dspark.verify.sampling import Sampling

PROMPT = [0, 1, 0]
SEED = 1500


@dataclass(frozen=True)
class ExactSampling(Sampling):
    """The product's own probabilities, temperature, top-k and top-p included, as fractions whose rows sum to exactly 1."""

    def probs(self, logits: Tensor) -> np.ndarray:
        return exact(super().probs(logits))


class ExactSource:
    """A source of drafts that runs as in the product and reports its distributions as fractions.

    :meth:`Branch.choose` makes fractions of a float32 row by the same function, so p_draft is exactly what the draft was drawn from if
    the source reports the row that it drew from; if it reports another row, the output distribution shows it.
    """

    def __init__(self, source: DraftSource) -> None:
        self.source, self.new_state, self.extend = source, source.new_state, source.extend
        self.block_size, self.target_layer_ids, self.has_confidence = source.block_size, source.target_layer_ids, source.has_confidence

    def draft(self, state: object, anchor: int, window: int, sampling: ExactSampling, rng: Branch) -> Draft:
        floats = Sampling(sampling.temperature, sampling.top_k, sampling.top_p)
        draft = self.source.draft(state, anchor, window, floats, rng)
        return replace(draft, probs=exact(draft.probs)) if draft.tokens else draft


class RoundedTarget(Target):
    """A target whose logits are multiples of ⅛.

    A pass over a block and one over a single token differ in the last digits, so without this the target would have two distributions.
    A stale cache, a wrong position or a wrong row changes logits by far more than one step.
    """

    @torch.inference_mode()
    def forward(self, *arguments: object, **options: object) -> tuple[Tensor, Tensor | None]:
        logits, taps = super().forward(*arguments, **options)
        eighths = 8 * logits
        assert ((eighths - eighths.floor() - 0.5).abs() > 1e-6).all(), "a logit lies between two multiples: choose another seed"
        return eighths.round() / 8, taps


@dataclass(frozen=True)
class StepsPerSecond:
    """A made-up curve SPS(B), B from 1; constant after its end."""

    curve: tuple[float, ...]

    def __call__(self, tokens: int) -> float:
        return self.curve[min(tokens, len(self.curve)) - 1]


SMOOTH = StepsPerSecond((1.0, 0.7, 0.58, 0.5, 0.44))
JAGGED = StepsPerSecond((1.0, 0.62, 0.62, 0.53, 0.57))
SPECS = ("plain", "mtp1", "fixed:1", "fixed:2", "fixed:3", "fixed:4", "adaptive:0.6,0.5,0.3", "confidence:0.3", "conditional:0.5", "prefix")
POLICIES: dict[str, Policy] = {spec.split(",")[0]: parse_policy(spec, lambda: JAGGED) for spec in SPECS}
POLICIES |= {name: make_policy(name, {}, lambda: SMOOTH) for name in REGISTRY if name not in {spec.split(":")[0] for spec in SPECS}}
POLICIES["prefix smooth"] = PrefixScheduler(SMOOTH)
HEADS = ("none", "vanilla", "gated", "rnn")
SOURCES = (*HEADS, "reduced", "copying")  # "reduced": vanilla with a draft vocabulary of two tokens; "copying": ContextLookup(vanilla)
TOP_TWO = ExactSampling(1.0, top_k=2)
SAMPLINGS = (ExactSampling(0.5), ExactSampling(2.0), ExactSampling(0.0), TOP_TWO, ExactSampling(1.0, top_p=0.8), ExactSampling(2.0, 2, 0.7))


@dataclass(frozen=True)
class Case:
    """One small world. policy: key of POLICIES. source: of SOURCES. tokens: the length limit. eos: whether the last id ends the text."""

    policy: str = "fixed:3"
    source: str = "vanilla"
    sampling: ExactSampling = ExactSampling(1.0)
    vocab: int = 2
    block_size: int = 3
    tokens: int = 5
    eos: bool = False

    def __str__(self) -> str:
        s = self.sampling
        kept = f"T{s.temperature:g}{f' k{s.top_k}' * (s.top_k > 0)}{f' p{s.top_p:g}' * (s.top_p < 1)}"
        return f"{self.policy} {self.source} {kept} vocab{self.vocab} block{self.block_size} tokens{self.tokens}{' eos' * self.eos}"

    def models(self) -> tuple[Target, DraftSource]:
        target = small_target(self.vocab, self.eos)
        head = self.source if self.source in HEADS else "vanilla"
        drafter = small_drafter(target, head, self.block_size, self.source == "reduced")
        return target, ContextLookup(drafter, 2, max_copy=self.block_size) if self.source == "copying" else drafter


@cache
def small_target(vocab: int, eos: bool) -> RoundedTarget:
    """A random Llama of two layers, in float64 so that no logit comes near the border between two roundings."""
    shape = {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": vocab - 1 if eos else None, "pad_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + vocab)
        config = LlamaConfig(**shape, **ends, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4)
        model = LlamaForCausalLM(config).double()
    model.lm_head.weight.data *= 0.5  # even distributions: every token likely, drafts sometimes accepted
    return RoundedTarget(model, None, "small random Llama")


@cache
def small_drafter(target: Target, head: str, block_size: int, reduced: bool) -> Drafter:
    """A random drafter of one layer whose confidence differs from branch to branch."""
    shape = {"num_hidden_layers": 1, "block_size": block_size, "target_layer_ids": (0,), "mask_token_id": 1}
    markov = {"markov_rank": 0} if head == "none" else {"markov_rank": 4, "markov_head_type": head}
    drafter = drafter_for(target, d2t=torch.tensor([0, target.vocab_size - 1]) if reduced else None, **shape, **markov)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + 10 * target.vocab_size + block_size)
        for weight in drafter.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.5)
        hidden, embedding = drafter.confidence_head.proj.weight.data.split([target.hidden_size, drafter.config.markov_rank], -1)
        torch.nn.init.normal_(hidden, std=0.1 if drafter.markov_head else 0.4)
        torch.nn.init.zeros_(drafter.confidence_head.proj.bias)
        if drafter.markov_head:  # about .8 after the first token, .4 after the last
            wanted = torch.linspace(1.5, -0.5, target.vocab_size)
            embedding[0] = torch.linalg.pinv(drafter.markov_head.markov_w1.weight.data) @ wanted
    return drafter.to(target.dtype).attach(target).eval().requires_grad_(False)


def served(block_size: int) -> list[str]:
    """The policies that a drafter with such blocks can serve."""
    return [name for name, policy in POLICIES.items() if not isinstance(policy, FixedWindow) or (policy.n or 1) <= block_size]


def few_cases() -> list[Case]:
    """Every policy, source, sampling, vocabulary and block size at least once, with small trees."""
    by_source = [Case(policy, source, tokens=4) for policy, source in zip(served(3), cycle(SOURCES), strict=False)]
    by_sampling = [
        Case(policy, "gated", s, vocab=3, block_size=2, tokens=4, eos=True) for policy, s in zip(served(2), SAMPLINGS, strict=False)
    ]
    shapes = [
        Case(),
        Case("prefix", "gated", TOP_TWO, vocab=3, block_size=2, tokens=4, eos=True),
        Case("adaptive:0.6", block_size=4, tokens=6, eos=True),
        Case("mtp1", vocab=4, block_size=1, tokens=3),
        Case("fixed:2", "reduced", TOP_TWO, vocab=5, block_size=2, tokens=3),
        Case("fixed:4", "copying", block_size=4, tokens=6, eos=True),
    ]
    return list(dict.fromkeys(by_source + by_sampling + shapes))


def every_case() -> list[Case]:
    """Every policy with every source and every sampling, with and without an end of the text; block sizes 1 to 4, 2 to 5 tokens."""
    by_source = [Case(policy, source, tokens=4) for policy in served(3) for source in SOURCES]
    by_sampling = [Case(policy, "gated", s, vocab=3, block_size=2, tokens=4, eos=True) for policy in served(2) for s in SAMPLINGS]
    deep = [Case(policy, head, TOP_TWO, vocab=3, eos=True) for policy in served(3) for head in HEADS]
    longest = [Case(policy, block_size=4, tokens=6, eos=True) for policy in served(4)]
    return list(dict.fromkeys(few_cases() + by_source + by_sampling + deep + longest))


@dataclass(frozen=True)
class Proof:
    """distribution: of the whole output. expected: the target's own. branches: of the tree. trips: rounds met, with how often."""

    distribution: Distribution
    expected: Distribution
    branches: int
    trips: Counter[Round] = field(default_factory=Counter)

    @property
    def difference(self) -> float:
        """The largest difference in the probability of one text; 0.0 only if every fraction is equal."""
        texts = {**self.distribution, **self.expected}
        largest = max(abs(self.distribution.get(text, Fraction(0)) - self.expected.get(text, Fraction(0))) for text in texts)
        return max(float(largest), sys.float_info.min) if largest else 0.0


def prove(case: Case, policy: Policy | None = None) -> Proof:
    """Enumerate one case. policy: another one than the case names, to see what a wrong one does."""
    target, source = case.models()
    policy = policy or POLICIES[case.policy]
    policy.check(source.block_size, source.has_confidence)
    trips: Counter[Round] = Counter()

    def run(branch: Branch) -> Sequence[int]:
        stream = list(rounds(target, ExactSource(source), PROMPT, case.tokens, policy, case.sampling, branch))
        trips.update(replace(r, index=0, draft_seconds=0, verify_seconds=0, seconds=0) for r in stream[1:])
        return [token for r in stream for token in r.committed]

    distribution, branches = every_branch(run)
    return Proof(distribution, target_distribution(target, case.tokens, case.sampling), branches, trips)


@cache
def target_distribution(target: Target, limit: int, sampling: ExactSampling) -> Distribution:
    """Of the target's own text after PROMPT: one fresh pass per prefix, no cache. A text ends after eos or ``limit`` tokens."""
    ended: Distribution = {}
    growing: Distribution = {(): Fraction(1)}
    for _ in range(limit):
        grown: Distribution = {}
        for text, mass in growing.items():
            logits, _ = target.forward(torch.tensor([[*PROMPT, *text]]), None)
            for token, p in enumerate(sampling.probs(logits[0, -1])):
                if p:
                    (ended if token in target.eos_token_ids else grown)[(*text, token)] = mass * p
        growing = grown
    return ended | growing
