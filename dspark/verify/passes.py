"""One protocol for a target pass: new tokens of R requests in, logits and taps out. :class:`TransformersPass` runs any model;
faster passes (:mod:`dspark.verify.lean`) give the same numbers for some."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dspark.rewind import Slot

if TYPE_CHECKING:
    from dspark.target.target import Target


class TargetPass(Protocol):
    """One way to run the target.

    name: what ``target.pass_name`` shows.
    bytes_per_token: of keys and values, all layers together. A pass may also have ``bytes_per_request``, of states.
    new_cache: a cache for many requests, with ``open() → slot`` for a new one and ``close(slot)`` after its end. A slot is anything
        with ``length`` and ``rewind(length)``, as :class:`~dspark.rewind.Slot` has them.
    """

    name: str
    bytes_per_token: int

    def new_cache(self) -> Any: ...

    def __call__(
        self, tokens: Sequence[Sequence[int]], slots: Sequence[Slot], cache: Any, taps: Sequence[int] = (), *, last_only: bool = False
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Run each request's new tokens after those its slot holds; the slots then hold them too.

        tokens: R lists of n_r ≥ 1 token ids.
        slots: R slots of ``cache``.
        taps: m layer ids whose output is wanted; −1 is the embedding.
        last_only: return the logits of each request's last token only.
        Returns per request logits [n_r (or 1), vocab] in the pass's dtype and taps [1, n_r, m·hidden] (None if none are asked for).
        """


class TransformersPass:
    """The model's own modules, one request after another: exact for every architecture, without sharing work between requests."""

    name = "transformers"

    def __init__(self, target: Target) -> None:
        self.target = target

    @property
    def bytes_per_token(self) -> int:
        return self.target.cache_bytes[0]

    @property
    def bytes_per_request(self) -> int:
        return 2 * self.target.cache_bytes[1]  # the copies too

    def new_cache(self) -> SimpleNamespace:
        """A cache of transformers for each request, which is also its slot; the request holds the only reference to it."""
        return SimpleNamespace(open=self.target.new_cache, close=lambda slot: None)

    def __call__(
        self, tokens: Sequence[Sequence[int]], slots: Sequence[Slot], cache: Any, taps: Sequence[int] = (), *, last_only: bool = False
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """See :class:`TargetPass`."""
        rows = [torch.tensor([list(ids)], device=self.target.device) for ids in tokens]
        out = [self.target.forward(row, slot, taps, logits_to_keep=int(last_only)) for row, slot in zip(rows, slots, strict=True)]
        return [logits[0] for logits, _ in out], [tapped for _, tapped in out]


def pass_of(target: Target) -> TargetPass:
    """The pass that decoding with this target uses: a faster one if it was given one, else its own modules.

    Raises ValueError if the model's weights have changed since the faster one was made, which may hold them in another layout.
    """
    made_of = getattr(target.verifier, "made_of", None)
    if made_of is not None and made_of != weights_now(target.model):
        raise ValueError(f"the weights of {target.name} changed after its {target.pass_name} pass was made: pack_target(target) again")
    return target.verifier or TransformersPass(target)


def weights_now(model: nn.Module) -> list[tuple[object, ...]]:
    """Something that changes with the weights: where they lie, their dtypes, and how often they were written."""
    return [(w.data_ptr(), w.dtype, None if w.is_inference() else w._version) for w in model.parameters()]
