"""Rotary embeddings with scaling, as transformers computes them."""

from __future__ import annotations

import json
from functools import lru_cache

import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def scaled_frequencies(head_dim: int, theta: float, scaling: dict[str, object], device: torch.device) -> tuple[Tensor, float]:
    """Angles per position [head_dim/2], and the factor of their cosines and sines. scaling: rope_parameters without theta."""
    frequencies, factor = _computed(head_dim, json.dumps(scaling | {"rope_theta": theta}))
    return frequencies.to(device), factor


@lru_cache
def _computed(head_dim: int, parameters: str) -> tuple[Tensor, float]:
    rope = json.loads(parameters)
    longest = int(rope.get("factor", 1) * rope.get("original_max_position_embeddings", 1))  # another length makes transformers warn
    shape = Qwen3Config(head_dim=head_dim, max_position_embeddings=longest, rope_parameters=rope)
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](shape)
