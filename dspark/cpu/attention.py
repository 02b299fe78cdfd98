"""Attention over shared keys and values without copies of them, for packed targets.

Where several heads share keys and values (grouped heads), transformers copies these for every head as soon as there is a mask, as
other devices' kernels need it. A single token has no mask; a block has one. The CPU's kernel also reads shared keys and values under a
mask, with the same result.

In a batch of single tokens (self-play) the heads of a group are folded into the query dimension: the kernel then reads their keys
once instead of once a head, with the same result up to rounding. A single stream attends as transformers does, since that is what
drafting is compared with.
"""

from __future__ import annotations

import inspect
import sys

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_shared"  # what the model's config calls it


def sdpa_shared(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa``, except where heads share keys: for a masked block, and for a batch of single tokens.

    query: [batch, heads, tokens, head_dim]. key, value: [batch, kv_heads, context, head_dim]. Returns [batch, tokens, heads, head_dim].
    """
    usual = query.shape[1] == key.shape[1] or any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if not usual and attention_mask is None and query.shape[2] == 1 < len(query):
        folded = query.reshape(*key.shape[:2], -1, query.shape[-1])  # [batch, kv_heads, heads / kv_heads, head_dim]
        mixed = F.scaled_dot_product_attention(folded, key, value, None, dropout, scale=scaling)
        return mixed.reshape(*query.shape[:3], -1).transpose(1, 2), None
    if usual or attention_mask is None or query.shape[2] == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    mixed = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True)
    return mixed.transpose(1, 2).contiguous(), None


def share_keys(decoder: nn.Module) -> None:
    """Let a decoder that uses transformers' ``sdpa`` use :func:`sdpa_shared`. One whose code asks for ``sdpa`` by name stays as it is."""
    if decoder.config._attn_implementation == "sdpa" and not _asks_by_name(decoder):
        AttentionInterface.register(NAME, sdpa_shared)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        decoder.set_attn_implementation(NAME)


def _asks_by_name(decoder: nn.Module) -> bool:
    try:
        return '"sdpa"' in inspect.getsource(sys.modules[type(decoder).__module__])
    except (OSError, TypeError, KeyError):  # code without a source may do anything
        return True
