"""A cache for layers that keep a state, of a recurrence or a convolution, which cannot forget a token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionAndFullAttentionLayer

from dspark.rewind import GrowingKV, RewindCache, RewindLayer


class _BothLayer(RewindLayer, LinearAttentionAndFullAttentionLayer):
    """One layer with a state besides its keys and values."""


class StateCache(RewindCache):
    """As :class:`~dspark.rewind.RewindCache`.

    The states are copied before a pass, and a rewind goes back to the copies. Tokens after them that stay are run again at the front
    of the next pass; if there are more than ``most_replayed``, in a pass of their own before it.

    length: tokens held.
    reached: those of them that are in the layers; the others are run again.
    tokens: [batch, ≥ length] int64, the text.
    saved: at which length the states were copied, and the copies.
    """

    most_replayed = 16  # tokens beside new ones; so far a pass takes hardly longer
    length = reached = 0
    tokens: Tensor

    def __init__(self, config: PretrainedConfig) -> None:
        layers = DynamicCache(config=config).layers
        for i, layer in enumerate(layers):
            if isinstance(layer, CacheLayerMixin):  # the others keep a state alone, or nothing
                states = getattr(layer, "number_of_states", 0)
                layers[i] = _BothLayer(number_of_states=states) if states else RewindLayer()
        Cache.__init__(self, layers=layers)
        self.saved = self.empty = 0, [_copied(vars(layer)) for layer in layers]

    def advance(self, token_ids: Tensor) -> Tensor:
        """What a pass must run so that the layers hold ``token_ids`` [batch, n ≥ 0] too."""
        if self.reached == self.length:
            self.saved = self.reached, [_copied(vars(layer)) for layer in self.layers]
        start, self.tokens = self.reached, torch.cat([self.tokens[:, : self.length], token_ids], 1) if self.length else token_ids
        self.reached = self.length = self.tokens.shape[1]  # before the pass: after an interrupted one a rewind goes back to the copies
        return self.tokens[:, start:]

    @torch.inference_mode()
    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens. Raises ValueError if fewer are held."""
        GrowingKV.rewind(self, length)
        if length < self.reached:
            if length < self.saved[0]:
                self.saved = self.empty
            held, copies = self.saved
            for layer, states in zip(self.layers, copies, strict=True):
                vars(layer).update(_copied(states))
                if isinstance(layer, GrowingKV):
                    layer.rewind(held)
            self.reached = held


def _copied(attributes: dict[str, object]) -> dict[str, dict]:
    """The states of a layer, which transformers keeps in dictionaries; their tensors are cloned, because a pass writes in place."""
    states = {name: value for name, value in attributes.items() if isinstance(value, dict)}
    return {name: {i: x.clone() if isinstance(x, Tensor) else x for i, x in kept.items()} for name, kept in states.items()}
