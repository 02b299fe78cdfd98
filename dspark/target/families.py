"""Which models can be a target, and what they allow: read off their modules and their config, before anything runs."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import GenerationMixin, PretrainedConfig

from dspark.cpu.attention import NAME as SDPA_SHARED

SWITCHING = {"longrope", "dynamic"}  # kinds of rotary embedding that depend on how long the text is
REWINDABLE = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that keep keys and values of tokens, and nothing else


def decoder_of(model: nn.Module) -> nn.Module:
    """The part below the head, which holds the layers; some models name another part when they are asked."""
    part = model.get_decoder()
    if getattr(part, "get_output_embeddings", lambda: None)() is not None:  # itself, or a causal LM inside a model that also sees
        part = getattr(part, "model", part)
    return part if _stacks(part) else model.base_model


def _stacks(part: nn.Module) -> list[nn.ModuleList]:
    return [child for child in part.children() if isinstance(child, nn.ModuleList) and len(child)]


def attention_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers. Raises ValueError unless the model reads from left to right and forgetting keys and values undoes all
    that it remembers."""
    kind, forward = type(model).__name__, inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder:
        raise ValueError(f"{kind} has an encoder: dspark decodes causal LMs")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{kind} has no head that tells the next token: load it with AutoModelForCausalLM")
    config = model.config.get_text_config()
    both_ways = (getattr(c, "use_bidirectional_attention", None) in (True, "all") for c in (model.config, config))
    if getattr(config, "is_causal", True) is False or any(both_ways) or not isinstance(model, GenerationMixin):
        raise ValueError(f"{kind} does not read from left to right: dspark decodes causal LMs")
    needed = [p.name for p in forward.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "input_ids"]
    if needed or getattr(config, "cross_attention_layers", None):
        raise ValueError(f"{kind} reads more than tokens: dspark decodes from token ids alone")
    stacks = _stacks(decoder_of(model))
    if len(stacks) > 1:
        stacks = [stack for stack in stacks if len(stack) == getattr(config, "num_hidden_layers", None)]
    recurrent = getattr(model, "_is_stateful", False) or not REWINDABLE.issuperset(getattr(config, "layer_types", None) or ())
    if recurrent or len(stacks) != 1 or "past_key_values" not in forward:
        raise ValueError(f"{kind} is no plain stack of attention layers: dspark cannot rewind its cache")
    return stacks[0]


def num_shared_layers(config: PretrainedConfig) -> int:
    """Last layers that keep nothing, as they read the keys and values of earlier ones (Gemma 3n and 4)."""
    return getattr(config, "num_kv_shared_layers", None) or 0


def can_branch(model: nn.Module) -> bool:
    """Whether tokens can stand beside each other in one pass: every layer sees all that its mask shows, and knows a token's place
    from its rotary embedding alone."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    plain = full and not windowed and not num_shared_layers(config) and not getattr(config, "alibi", False)
    turned = hasattr(decoder_of(model), "rotary_emb") and "mrope_section" not in rope
    return plain and turned and config._attn_implementation in ("sdpa", SDPA_SHARED, "eager")


def steady_context(config: PretrainedConfig) -> int:
    """Tokens up to which a position's embedding is the same in every pass. LongRoPE and dynamic scaling choose it for a whole pass
    by its last position, so beyond this a block gives its first tokens other keys than one token alone would."""
    rope = getattr(config, "rope_parameters", None) or {}
    switching = [part for part in (rope, *rope.values()) if isinstance(part, dict) and part.get("rope_type") in SWITCHING]
    usual = getattr(config, "original_max_position_embeddings", None) or getattr(config, "max_position_embeddings", None)
    return min((int(part.get("original_max_position_embeddings") or usual or 1 << 30) for part in switching), default=1 << 30)
