"""The small worlds whose law is enumerated: real models of 2 to 5 tokens, every policy, every source of drafts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from itertools import cycle

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dspark.decode import DraftSource
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.proof.branches import ExactSampling
from dspark.rewind import RewindCache
from dspark.schedule import MTP1, AdaptiveWindow, Autoregressive, ConfidenceThreshold, FixedWindow, Policy, PrefixScheduler
from dspark.target.target import Target
from dspark.train.start import drafter_for

PROMPT = [0, 1, 0]
SEED = 1500


@dataclass(frozen=True)
class StepsPerSecond:
    """A made-up curve SPS(B), B from 1; behind its end it stays as it is."""

    curve: tuple[float, ...]

    def __call__(self, tokens: int) -> float:
        return self.curve[min(tokens, len(self.curve)) - 1]


SMOOTH = StepsPerSecond((1.0, 0.7, 0.58, 0.5, 0.44))
JAGGED = StepsPerSecond((1.0, 0.62, 0.62, 0.53, 0.57))
LEVEL = StepsPerSecond((1.0, 0.69, 0.67, 0.65, 0.6))
POLICIES: dict[str, Policy] = {
    "autoregressive": Autoregressive(),
    "mtp1": MTP1(),
    **{f"fixed:{n}": FixedWindow(n) for n in range(1, 5)},
    "adaptive": AdaptiveWindow(widen_threshold=0.6, narrow_threshold=0.5, fallback_threshold=0.3),
    "confidence": ConfidenceThreshold(0.3),
    "conditional": ConfidenceThreshold(0.5, on="conditional"),
    "prefix-smooth": PrefixScheduler(SMOOTH),
    "prefix-jagged": PrefixScheduler(JAGGED),
    "siblings": PrefixScheduler(LEVEL, sibling_rates=(0.6, 0.4)),
}
SCHEDULED = ("confidence", "conditional", "prefix-smooth", "prefix-jagged", "siblings")  # ℓ follows the confidences
HEADS = ("none", "vanilla", "gated", "rnn")
COPIES = {"copying": 2, "hearing": 1}  # tokens that must repeat; after one of them the drafter often hears what followed its drafts
SOURCES = (*HEADS, "reduced", *COPIES)
PLAIN = ExactSampling(1.0)
TOP_TWO = ExactSampling(1.0, top_k=2)
SAMPLINGS = (
    ExactSampling(0.0),
    ExactSampling(0.5),
    ExactSampling(2.0),
    TOP_TWO,
    ExactSampling(1.0, top_p=0.8),
    ExactSampling(2.0, top_k=2, top_p=0.7),
)


class RoundedTarget(Target):
    """A target whose logits are multiples of ⅛.

    Passes over a block and over one token differ in the last digits, so without this the target would have two laws. A stale
    cache, a wrong position or a wrong row changes logits by far more than a step.
    """

    cache: RewindCache | None = None  # of the latest request

    def new_cache(self) -> RewindCache:
        self.cache = super().new_cache()
        return self.cache

    @torch.inference_mode()
    def forward(self, *arguments: object, **options: object) -> tuple[Tensor, Tensor | None]:
        logits, taps = super().forward(*arguments, **options)
        eighths = 8 * logits
        assert ((eighths - eighths.floor() - 0.5).abs() > 1e-6).all(), "a logit lies between two multiples: choose another seed"
        return eighths.round() / 8, taps


@dataclass(frozen=True)
class Case:
    """One small world. policy: key of POLICIES · source: a sequential head; "reduced", vanilla with a draft vocabulary of two
    tokens; or a key of COPIES, ContextLookup around vanilla · tokens: the length limit · eos: does the last token end the text?"""

    policy: str = "fixed:3"
    source: str = "vanilla"
    sampling: ExactSampling = PLAIN
    vocab: int = 2
    block_size: int = 3
    tokens: int = 5
    eos: bool = False

    @property
    def name(self) -> str:
        s = self.sampling
        kept = "".join([f" k{s.top_k}" * (s.top_k > 0), f" p{s.top_p:g}" * (s.top_p < 1)])
        shape = f"vocab{self.vocab} block{self.block_size} tokens{self.tokens}{' eos' * self.eos}"
        return f"{self.policy} {self.source} T{s.temperature:g}{kept} {shape}"

    def columns(self) -> dict[str, object]:
        """Its fields, flat."""
        fields = asdict(self)
        return {"case": self.name, "requests": 1} | fields.pop("sampling") | fields

    def models(self) -> tuple[Target, DraftSource]:
        """Raises ValueError if the source cannot serve the policy."""
        target = small_target(self.vocab, self.eos)
        head = self.source if self.source in HEADS else "vanilla"
        source: DraftSource = small_drafter(target, head, self.block_size, self.source == "reduced")
        if self.source in COPIES:
            source = ContextLookup(source, COPIES[self.source], max_copy=self.block_size)
        POLICIES[self.policy].check(source.block_size, source.has_confidence)
        return target, source


@cache
def small_target(vocab: int, eos: bool) -> RoundedTarget:
    """A random Llama of two layers; float64, so that nothing comes near the border between two roundings."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=vocab - 1 if eos else None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + vocab)
        model = LlamaForCausalLM(config).double()
    model.lm_head.weight.data *= 0.5  # even laws: every token likely, and drafts that are neither always nor never accepted
    return RoundedTarget(model, None, "small random Llama")


@cache
def small_drafter(target: Target, head: str, block_size: int, reduced: bool) -> Drafter:
    """A random drafter of one layer, but for its confidence, which is made to differ from branch to branch."""
    drafter = drafter_for(
        target,
        d2t=torch.tensor([0, target.vocab_size - 1]) if reduced else None,
        num_hidden_layers=1,
        block_size=block_size,
        target_layer_ids=(0,),
        mask_token_id=1,
        markov_rank=0 if head == "none" else 4,
        markov_head_type="vanilla" if head == "none" else head,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + 10 * target.vocab_size + block_size)
        for weight in drafter.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.5)
        hidden, embedding = drafter.confidence_head.proj.weight.data.split([target.hidden_size, drafter.config.markov_rank], -1)
        torch.nn.init.normal_(hidden, std=0.1 if drafter.markov_head else 0.4)
        torch.nn.init.zeros_(drafter.confidence_head.proj.bias)
        if drafter.markov_head:  # about .8 behind the first token, .4 behind the last
            wanted = torch.linspace(1.5, -0.5, target.vocab_size)
            embedding[0] = torch.linalg.pinv(drafter.markov_head.markov_w1.weight.data) @ wanted
    return drafter.to(target.dtype).attach(target).eval().requires_grad_(False)


def every_case() -> list[Case]:
    """Every policy with every source and every sampling, with and without an end of the text; block sizes 1 to 4, 2 to 5 tokens."""
    by_source = [Case(policy, source, tokens=4) for policy in served(3) for source in SOURCES]
    by_sampling = [
        Case(policy, "gated", sampling, vocab=3, block_size=2, tokens=4, eos=True) for policy in served(2) for sampling in SAMPLINGS
    ]
    deep = [Case(policy, head, TOP_TWO, vocab=3, eos=True) for policy in served(3) for head in HEADS]
    longest = [Case(policy, block_size=4, tokens=6, eos=True) for policy in served(4)]
    shapes = [
        Case(f"fixed:{block_size}", "rnn", TOP_TWO, vocab, block_size, tokens=block_size + 2, eos=block_size == 4)
        for vocab in range(2, 6)
        for block_size in range(1, 5)
        if vocab < 5 or block_size < 4  # see large_cases
    ]
    return list(dict.fromkeys(by_source + by_sampling + deep + longest + shapes + few_cases()))


def large_cases() -> list[Case]:
    """Every policy on trees of so many branches that those in the same state must go on as one."""
    top_two = [Case(policy, "rnn", TOP_TWO, vocab=5, block_size=4, tokens=6, eos=True) for policy in served(4)]
    return top_two + [Case(policy, "vanilla", vocab=3, block_size=4) for policy in served(4)]


def few_cases() -> list[Case]:
    """Every policy, source, sampling, vocabulary and block size at least once, with small trees."""
    sources, samplings = cycle((*HEADS, "reduced", "copying")), cycle(SAMPLINGS)  # with two tokens, "hearing" always copies
    by_source = [Case(policy, next(sources), tokens=4) for policy in served(3)]
    by_sampling = [Case(policy, "gated", next(samplings), vocab=3, block_size=2, tokens=4, eos=True) for policy in served(2)]
    deep = [Case("confidence", "vanilla", TOP_TWO, vocab=3, eos=True), Case("prefix-jagged", "vanilla", TOP_TWO, vocab=3, eos=True)]
    deep.append(Case("siblings", "vanilla", vocab=3, block_size=2, tokens=4))
    shapes = [
        Case("fixed:4", "copying", block_size=4, tokens=6, eos=True),
        Case("fixed:2", "hearing", vocab=3, block_size=2, tokens=4),
        Case("adaptive", block_size=4, tokens=7, eos=True),
        Case("mtp1", vocab=4, block_size=1, tokens=3),
        Case("fixed:2", "reduced", TOP_TWO, vocab=5, block_size=2, tokens=4),
    ]
    return by_source + by_sampling + deep + shapes


def served(block_size: int) -> list[str]:
    """The policies that a drafter with such blocks can serve."""
    return [name for name, policy in POLICIES.items() if not isinstance(policy, FixedWindow) or policy.n <= block_size]
