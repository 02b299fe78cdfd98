"""Which models can be a target: decided from their modules and their config, before anything runs."""

from __future__ import annotations

import inspect

from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

STATES = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}  # layers with a state in the cache, which is copied to go back to it
REWINDABLE = {"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"} | STATES  # the others keep keys, values or nothing
LENGTH_DEPENDENT = {"longrope", "dynamic"}  # rotary embeddings that depend on the length of the text
NO_LIMIT = 1 << 30  # tokens


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model inside torch.compile, DataParallel and the like. Raises ValueError for what is no model of transformers."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and not (name == "module" and isinstance(model, PreTrainedModel)):
            return unwrapped(inner)
    if isinstance(model, PreTrainedModel):
        return model
    remedy = "merge its adapters first, model.merge_and_unload()" if hasattr(model, "merge_and_unload") else "see dspark.load_target"
    raise ValueError(f"{type(model).__name__} is no causal LM of transformers: {remedy}")


def decoder_of(model: nn.Module) -> nn.Module:
    """The part below the head, which holds the layers."""
    part = model.get_decoder()
    if getattr(part, "get_output_embeddings", lambda: None)() is not None:  # the model itself, or a causal LM inside a multimodal one
        part = getattr(part, "model", part)
    return part if _stacks(part) else model.base_model


def checked_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers.

    Raises ValueError unless the model is causal, reads token ids alone, and keeps nothing but keys and values of tokens and states that
    can be copied, so that its earlier state can be restored; the message says which of these does not hold.
    """
    for reason, applies in REFUSALS.items():
        if applies(model, model.config.get_text_config()):
            raise ValueError(f"{type(model).__name__} {reason}")
    return _layer_stacks(model)[0]


def keeps_states(config: PretrainedConfig) -> bool:
    """Whether layers keep a state of a recurrence or a convolution."""
    return not STATES.isdisjoint(getattr(config, "layer_types", None) or ())


def cache_argument(model: nn.Module) -> str | None:
    """Under which name the model takes a cache of transformers; None if it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in parameters), None)


def steady_context(config: PretrainedConfig) -> int:
    """Longest context in tokens for which a position has the same embedding in every pass.

    LongRoPE and dynamic scaling choose the embedding of a whole pass by its last position, so beyond this length the keys of a
    block would differ from those of the same tokens one at a time. LongRoPE with the same factors for short and long does not.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [part for part in (rope, *rope.values()) if isinstance(part, dict) and part.get("rope_type") in LENGTH_DEPENDENT]
    ropes = [part for part in ropes if part.get("short_factor", 0) != part.get("long_factor", 1)]
    usual = getattr(config, "original_max_position_embeddings", None) or getattr(config, "max_position_embeddings", None)
    return min((int(part.get("original_max_position_embeddings") or usual or NO_LIMIT) for part in ropes), default=NO_LIMIT)


def _stacks(part: nn.Module) -> list[nn.ModuleList]:
    """The lists of modules that are direct children."""
    return [child for child in part.children() if isinstance(child, nn.ModuleList) and len(child)]


def _layer_stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of modules that can be the decoder's layers: exactly one in a plain decoder."""
    stacks = _stacks(decoder_of(model))
    if len(stacks) > 1:
        count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        stacks = [stack for stack in stacks if len(stack) == count]
    return stacks


def _is_offloaded(model: nn.Module, _: PretrainedConfig) -> bool:
    return any(weight.is_meta for part in (model.base_model, model.get_output_embeddings()) for weight in part.parameters())


def _reads_both_ways(model: nn.Module, config: PretrainedConfig) -> bool:
    both_ways = any(getattr(c, "use_bidirectional_attention", None) in (True, "all") for c in (model.config, config))
    return both_ways or getattr(config, "is_causal", True) is False or not isinstance(model, GenerationMixin)


def _reads_more_than_tokens(model: nn.Module, config: PretrainedConfig) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "input_ids"]
    return bool(needed or getattr(config, "cross_attention_layers", None))


def _cannot_rewind(model: nn.Module, config: PretrainedConfig) -> bool:
    others = not REWINDABLE.issuperset(getattr(config, "layer_types", None) or ())
    if others or cache_argument(model) is None or len(stacks := _layer_stacks(model)) != 1:
        return True
    if not keeps_states(config):
        return getattr(model, "_is_stateful", False)
    # RecurrentGemma keeps them in its modules, MiniMax in a cache of its own.
    return "update_conv_state" not in inspect.getsource(inspect.getmodule(type(stacks[0][0])))


REFUSALS = {  # why a model is refused → whether that holds, given the model and its text config; checked in this order
    "has an encoder: dspark decodes causal LMs": lambda model, _: model.config.is_encoder_decoder,
    "has no head that predicts the next token: load it with AutoModelForCausalLM": lambda model, _: model.get_output_embeddings() is None,
    "has weights that are not in memory (on disk, or offloaded by a device_map): load it whole": _is_offloaded,
    "does not read from left to right: dspark decodes causal LMs": _reads_both_ways,
    "reads more than tokens: dspark decodes from token ids alone": _reads_more_than_tokens,
    "is no plain stack of layers that keep all they remember in a cache of transformers: dspark cannot rewind it": _cannot_rewind,
    "scans from a zero state in every pass over several tokens, as Mamba-1 does: dspark cannot verify drafts with it": lambda model, _: any(
        isinstance(part.A_log, Tensor) and part.A_log.dim() == 2 for part in model.modules() if hasattr(part, "A_log")
    ),
    "clamps time steps in a pass over several tokens and not over one: set time_step_limit of its mixers to (0.0, inf)": lambda model, _: (
        any((part.time_step_limit or (0.0,))[0] > 0 for part in model.modules() if hasattr(part, "time_step_limit"))
    ),
}
