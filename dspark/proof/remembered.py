"""Models that answer from memory, so that a law can be sampled a hundred thousand times: rows by prefix, backbone passes by prefix.

A row of the target, and a hidden state of the drafter's backbone, are functions of the text before them. Looking them up instead of
computing them again changes no distribution, as long as everything that is random, and everything that decides, still runs for every
draw: the sequential head, the draws, the confidence, the policy, acceptance, residual and bonus are the product's own.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dspark.draft.backbone import Context
from dspark.draft.drafter import Drafter
from dspark.rewind import GrowingKV, RewindCache
from dspark.target.target import Target
from dspark.verify.sampling import Sampling

Text = tuple[int, ...]  # new tokens, behind the prompt
BATCH = 16  # prefixes in one pass; a batch costs little more than a single row
MOST_ROWS = 20_000  # of the drafter, 32 kB each


@dataclass(frozen=True)
class Tree:
    """The target's law of its next tokens behind one prompt, as far as texts are likely.

    logits: prefix → row [vocab] · taps: prefix → [1, 1, m·hidden] of its last token, for () [1, tokens, m·hidden] of the prompt ·
    law: whole text → probability, float64 products of the processed rows; texts below the cut are left out, and so is whatever
    continues them: their mass is what the law lacks to 1. A text is whole at the tree's depth, or at an end-of-text token.
    """

    prompt: list[int]
    logits: dict[Text, Tensor] = field(default_factory=dict)
    taps: dict[Text, Tensor] = field(default_factory=dict)
    law: dict[Text, float] = field(default_factory=dict)


@torch.inference_mode()
def grow(target: Target, prompt: list[int], layer_ids: Sequence[int], sampling: Sampling, tokens: int, cut: float) -> Tree:
    """Enumerate the texts of ``tokens`` new tokens with a probability of at least ``cut`` (and above 0)."""
    tree, cache = Tree(prompt), target.new_cache()
    logits, taps = target.forward(torch.tensor([prompt], device=target.device), cache, layer_ids, logits_to_keep=1)
    tree.logits[()], tree.taps[()] = logits[0, -1], taps
    for layer in cache.layers:  # the prompt runs once, whatever the size of the batch
        layer.kv.keys, layer.kv.values = (side.repeat(BATCH, 1, 1, 1) for side in (layer.kv.keys, layer.kv.values))
    likely = {(): 1.0}
    for depth in range(1, tokens + 1):
        longer = {}
        for text, probability in likely.items():
            row = sampling.probs(tree.logits[text]).double()
            row *= probability / row.sum()
            kept = ((row >= cut) & (row > 0)).nonzero().flatten()
            for token, p in zip(kept.tolist(), row[kept].tolist(), strict=True):
                whole = depth == tokens or token in target.eos_token_ids
                (tree.law if whole else longer)[(*text, token)] = p
        likely = longer
        _add_rows(tree, target, cache, layer_ids, list(likely))
    return tree


def _add_rows(tree: Tree, target: Target, cache: RewindCache, layer_ids: Sequence[int], texts: list[Text]) -> None:
    """texts: prefixes of one length. cache: holds the prompt, BATCH times."""
    for first in range(0, len(texts), BATCH):
        some = texts[first : first + BATCH]
        filled = some + some[-1:] * (BATCH - len(some))
        logits, taps = target.forward(torch.tensor(filled, device=target.device), cache, layer_ids, logits_to_keep=1)
        cache.rewind(len(tree.prompt))
        for i, text in enumerate(some):
            tree.logits[text], tree.taps[text] = logits[i, -1], taps[i : i + 1, -1:]


class TokenCache:
    """Stands for the target's KV cache: of the text, only the tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def rewind(self, length: int) -> None:
        assert 0 <= length <= len(self.tokens)
        del self.tokens[length:]

    def keep(self, length: int, position: int) -> None:
        self.tokens[length] = self.tokens[position]
        self.rewind(length + 1)


def prefixes(text: Sequence[int], tokens: Sequence[int], siblings: Sequence[int]) -> list[Text]:
    """What each row of a pass stands behind, its own token included. siblings: places of the last tokens among the others."""
    chain = len(tokens) - len(siblings)
    places = [*range(chain), *siblings]
    return [(*text, *tokens[:place], token) for place, token in zip(places, tokens, strict=True)]


class RememberedTarget:
    """Answers the loop's passes behind one prompt from a tree.

    A prefix outside the tree gets the prompt's row and no taps. That bends nothing: a text that has left the tree cannot come
    back, so it is in the pooled cell whatever follows; and a whole text is not touched by what stands behind it. The one reader
    of rows behind a rejection, a policy that looks at the target's view of the last drafts, must look at one draft only.
    """

    def __init__(self, tree: Tree, target: Target) -> None:
        self.tree, self.device, self.eos_token_ids = tree, target.device, target.eos_token_ids
        self.no_taps = torch.zeros_like(tree.taps[()][:, :1])

    def new_cache(self) -> TokenCache:
        return TokenCache()

    def forward(
        self, token_ids: Tensor, cache: TokenCache, taps: Sequence[int] = (), *, logits_to_keep: int = 0, siblings: Sequence[int] = ()
    ) -> tuple[dict[int | tuple[int, int], list[Tensor] | Tensor], Tensor | None]:
        """As :meth:`dspark.target.target.Target.forward`; of the logits [1, n, vocab] there are [0] and [0, -1], which the loop reads."""
        first, tokens = cache.length, token_ids[0].tolist()
        cache.tokens += tokens
        if first == 0:
            assert cache.tokens == self.tree.prompt and logits_to_keep == 1
            return {(0, -1): self.tree.logits[()]}, self.tree.taps[()]
        behind = prefixes(cache.tokens[len(self.tree.prompt) : first], tokens, siblings)
        rows = [self.tree.logits.get(prefix, self.tree.logits[()]) for prefix in behind]
        return {0: rows}, torch.cat([self.tree.taps.get(prefix, self.no_taps) for prefix in behind], 1) if taps else None


@dataclass(frozen=True)
class RememberedSampling(Sampling):
    """The product's probabilities, computed once for every row of a tree, and with top-p, whose sorting is dear, for equal logits."""

    by_row: dict[int, Tensor] = field(default_factory=dict, repr=False)  # identity of the logits: the tree keeps them alive
    by_content: dict[bytes, Tensor] = field(default_factory=dict, repr=False)

    def learn(self, tree: Tree) -> None:
        process = super().probs
        self.by_row.update((id(logits), process(logits)) for logits in tree.logits.values())

    def probs(self, logits: Tensor) -> Tensor:
        if id(logits) in self.by_row:
            return self.by_row[id(logits)]
        if self.top_p == 1:
            return super().probs(logits)
        digest = hashlib.blake2b(logits.contiguous().numpy().data, digest_size=16).digest()
        if digest not in self.by_content:
            if len(self.by_content) >= MOST_ROWS:
                self.by_content.clear()
            self.by_content[digest] = super().probs(logits)
        return self.by_content[digest]


@dataclass
class Told:
    """Stands for a drafter's state and for its layers' caches: what was said, to be worked on when it is first needed."""

    tokens: list[int] = field(default_factory=list)
    taps: list[Tensor] = field(default_factory=list)

    @property
    def layers(self) -> list[Told]:
        return [self]

    @property
    def length(self) -> int:
        return len(self.tokens)

    def rewind(self, length: int) -> None:
        assert length == self.length, "only the block is forgotten, and it was never stored"


class RememberedStep(nn.Module):
    """The sequential head's W2. Where its input is a row of W1 and nothing else, it runs once per row."""

    def __init__(self, markov_w1: nn.Embedding, markov_w2: nn.Module) -> None:
        super().__init__()
        self.original, self.products = markov_w2, {}
        weight = markov_w1.weight
        self.rows = range(weight.data_ptr(), weight.data_ptr() + weight.numel() * weight.element_size())

    def forward(self, latent: Tensor) -> Tensor:
        if (key := latent.data_ptr()) not in self.rows:
            return self.original(latent)
        if key not in self.products:
            if len(self.products) >= MOST_ROWS:
                self.products.clear()
            self.products[key] = self.original(latent)
        return self.products[key]


class RememberingDrafter(Drafter):
    """A drafter, its weights and its own ``draft``, whose backbone and LM head run once per context and anchor, behind one prompt."""

    def __init__(self, drafter: Drafter) -> None:
        self.__dict__.update(drafter.__dict__)
        self.hidden: dict[Text, Tensor] = {}  # context and anchor → [1, γ, hidden]
        self.base: dict[tuple[int, int], Tensor] = {}  # where the hidden states lie and how many → [w, draft_vocab]
        object.__setattr__(self, "head", self._head)
        object.__setattr__(self, "original", drafter)  # not a submodule
        self.fused = None  # so that this backbone is asked
        if drafter.markov_head is not None:
            head = copy.copy(drafter.markov_head)  # shares its weights
            head._modules = drafter.markov_head._modules | {
                "markov_w2": RememberedStep(drafter.markov_head.markov_w1, drafter.markov_head.markov_w2)
            }
            self._modules = drafter._modules | {"markov_head": head}

    def new_state(self, prompt: Sequence[int] = ()) -> Told:
        return Told()

    def extend(self, state: Told, token_ids: Sequence[int], taps: Tensor) -> None:
        state.tokens += token_ids
        state.taps.append(taps)

    def _absorb(self, state: Told) -> None:
        assert state.length == sum(taps.shape[1] for taps in state.taps)

    def backbone(self, tokens: Tensor, positions: Tensor, contexts: Sequence[GrowingKV | Context | Told], mask: None = None) -> Tensor:
        (told,) = contexts
        text = (*told.tokens, int(tokens[0, 0]))
        if text not in self.hidden:
            state = self.original.new_state(told.tokens)
            self.original.extend(state, told.tokens, torch.cat(told.taps, 1))
            self.original._absorb(state)
            self.hidden[text] = (self.original.fused or self.original).backbone(tokens, positions, state.layers)
        return self.hidden[text]

    def _head(self, hidden: Tensor) -> Tensor:
        key = hidden.data_ptr(), len(hidden)
        if key not in self.base:
            self.base[key] = self.original.head(hidden)
        return self.base[key]


class PrefilledTarget(Target):
    """The target itself, every block through the model and its real cache; only the prompt, the same for all draws, runs once.

    All requests share one cache, rewound to the prompt between them.
    """

    def __init__(self, target: Target, prompt: list[int], layer_ids: Sequence[int]) -> None:
        self.__dict__.update(target.__dict__)
        self.prompt, self.cache = prompt, target.new_cache()
        self.prefill = target.forward(torch.tensor([prompt], device=target.device), self.cache, layer_ids, logits_to_keep=1)

    def new_cache(self) -> RewindCache:
        self.cache.rewind(len(self.prompt))
        return self.cache

    def forward(
        self, token_ids: Tensor, cache: RewindCache, taps: Sequence[int] = (), *, logits_to_keep: int = 0, siblings: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        if logits_to_keep:  # the loop asks for less than all rows of its first pass only
            assert token_ids[0].tolist() == self.prompt
            return self.prefill
        return super().forward(token_ids, cache, taps, siblings=siblings)


class WatchedTarget(PrefilledTarget):
    """And it compares every row that it computes with the tree's row of the same prefix.

    largest: the largest total variation between two such rows · compared: how many. If it is 0, a draw that runs every block and
    one from memory decide alike from the same coins; so it bounds, row by row, how far the two laws can be apart.
    """

    def __init__(self, target: Target, tree: Tree, layer_ids: Sequence[int], sampling: Sampling) -> None:
        super().__init__(target, tree.prompt, layer_ids)
        self.tree, self.sampling = tree, sampling
        self.text: list[int] = []
        self.largest, self.compared = 0.0, 0
        keep = self.cache.keep

        def kept(length: int, position: int) -> None:
            self.text[length - len(self.prompt)] = self.text[position - len(self.prompt)]
            keep(length, position)

        self.cache.keep = kept

    def forward(
        self, token_ids: Tensor, cache: RewindCache, taps: Sequence[int] = (), *, logits_to_keep: int = 0, siblings: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        before, tokens = cache.length - len(self.prompt), token_ids[0].tolist()
        logits, hidden = super().forward(token_ids, cache, taps, logits_to_keep=logits_to_keep, siblings=siblings)
        if not logits_to_keep:
            behind = prefixes(self.text[:before], tokens, siblings)
            self.text = [*self.text[:before], *tokens]
            for prefix, row in zip(behind, logits[0], strict=True):
                if prefix in self.tree.logits:
                    ours, theirs = (self.sampling.probs(each) for each in (row, self.tree.logits[prefix]))
                    self.largest = max(self.largest, float((ours - theirs).abs().sum() / 2))
                    self.compared += 1
        return logits, hidden
