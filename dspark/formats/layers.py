"""What a transformers config says about the layers of a drafter, as fields of DrafterConfig. What those cannot express is refused."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
FULL, SLIDING = "full_attention", "sliding_attention"
MOST_LAYERS, EPS = 1000, 1e-6  # Qwen3's rms_norm_eps, which a config may leave out
TABLES = ("embed_tokens.weight", "lm_head.weight")
# Fields that change the computation → the one value that is read. An absent field means that value.
PLAIN = {"mlp_bias": False, "quantization_config": None, "final_logit_softcapping": None, "rope_is_neox_style": True}
LAYERS = {  # fields that read_layers understands
    *SIZES,
    *PLAIN,
    *"head_dim rms_norm_eps hidden_act hidden_activation attention_bias layer_types sliding_window use_sliding_window".split(),
    *"max_window_layers rope_theta rope_parameters rope_scaling partial_rotary_factor max_position_embeddings".split(),
}
HEADS = {  # fields under the same name in DrafterConfig
    *"block_size mask_token_id target_layer_ids markov_rank markov_head_type enable_confidence_head confidence_head_with_markov".split(),
}
HARMLESS = {  # fields that no drafter's block depends on: origin, training, generation
    *"architectures model_type auto_map name_or_path _name_or_path dtype torch_dtype transformers_version use_cache".split(),
    *"attention_dropout initializer_range bos_token_id eos_token_id pad_token_id tie_word_embeddings is_encoder_decoder".split(),
    *"num_target_layers target_num_hidden_layers num_anchors max_anchors confidence_head_alpha weights_digest".split(),
}
ROPE = {  # rope_type → the numbers it takes besides theta
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "proportional": {"factor", "partial_rotary_factor"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    | {"truncate"},
}
SECTIONS = {"mrope_section", "mrope_interleaved"}  # the same rotation for text


class Refusal(ValueError):
    """A field that keeps a drafter from being read. field: its name, with those of the objects around it before dots."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def refuse_unknown(config: Mapping, understood: Collection[str], where: str = "") -> None:
    """Raises Refusal for the first field with a value that the format's lists do not name."""
    for name, value in config.items():
        if value is not None and name not in understood:
            remedy = f"if it does not change what a block computes, insist with ignore_fields=[{where + name!r}] or --ignore-field"
            raise Refusal(where + name, f"{where}{name} is {value!r}, a field that is not known: {remedy}")


def refuse_unlike(found: Iterable[tuple[str, object, object]]) -> None:
    """Raises Refusal for the first (field, value, supported value) whose value is another one. None means the supported one."""
    for name, value, plain in found:
        if value is not None and value != plain:
            if name == "quantization_config" and isinstance(value, dict):
                value = value.get("quant_method", value)
            raise Refusal(name, f"{name} is {value!r}, and only {plain!r} is supported: pass another drafter or train one")


def without(config: dict, ignored: Collection[str], where: str = "") -> dict:
    """The config without the ignored fields. A name is a field's at any depth; before a dot stands the name of the object around it."""
    kept = {name: value for name, value in config.items() if not any(f".{where}{name}".endswith(f".{each}") for each in ignored)}
    return {name: without(value, ignored, f"{where}{name}.") if isinstance(value, dict) else value for name, value in kept.items()}


def read_layers(
    config: dict, *, plain: dict[str, object] = PLAIN, rotates_all: bool = False, non_causal: bool = False
) -> dict[str, object]:
    """The layers under DrafterConfig's names. Raises Refusal for layers of another kind.

    plain: the fields that may have one value only. rotates_all: a partial factor of default rotary embeddings is the target's.
    non_causal: a block is bidirectional in sliding layers too.
    """
    refuse_unlike([(name, config.get(name), value) for name, value in plain.items()])
    acts = {name: config[name] for name in ("hidden_act", "hidden_activation") if config.get(name) is not None}
    if len(set(acts.values())) > 1:
        raise Refusal("hidden_activation", f"hidden_act and hidden_activation differ ({acts}): which one is meant?")
    values = {"rms_norm_eps": EPS} | {name: config.get(name) for name in (*SIZES, "head_dim", "attention_bias")}
    values |= {name: config[name] for name in values if name in config}
    if values["head_dim"] is None and values["num_attention_heads"]:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    values["hidden_act"] = next(iter(acts.values()), None)
    kinds, window, causal = _kinds(config), config.get("sliding_window"), config.get("is_causal")
    if SLIDING in kinds and not (type(window) is int and window > 0):
        raise Refusal("sliding_window", f"sliding_window is {window!r}, not a number of tokens, and layer_types has {SLIDING}")
    causal = config.get("dflash_query_causal") if causal is None else causal
    if causal is not None and type(causal) is not bool:
        raise Refusal("is_causal", f"is_causal is {causal!r}, not true or false")
    causal_layers = [kind == SLIDING and not non_causal if causal is None else causal for kind in kinds]
    values["causal_layers"] = causal_layers if any(causal_layers) else []
    values["sliding_windows"] = [window if kind == SLIDING else 0 for kind in kinds] if SLIDING in kinds else []
    return values | read_rope(config, kinds, rotates_all)


def _kinds(config: dict) -> list[str]:
    """Full or sliding attention, for each layer."""
    kinds, count = config.get("layer_types"), config.get("num_hidden_layers")
    uses, first, window = (config.get(name) for name in ("use_sliding_window", "max_window_layers", "sliding_window"))
    if not kinds:
        if uses and first:
            found = f"max_window_layers is {first!r} with use_sliding_window and no layer_types"
            raise Refusal("max_window_layers", f"{found}: name the layers")
        if window is not None and uses is None:
            raise Refusal("sliding_window", f"sliding_window is {window!r} without use_sliding_window or layer_types: name the layers")
        return [SLIDING if uses else FULL] * (count if type(count) is int and 0 < count < MOST_LAYERS else 1)
    for i, kind in enumerate(kinds):
        if kind not in (FULL, SLIDING):
            raise Refusal("layer_types", f"layer_types[{i}] is {kind!r}, and only {FULL} and {SLIDING} are supported")
    if len(kinds) != count:
        raise Refusal("layer_types", f"layer_types names {len(kinds)} layers, and num_hidden_layers is {count!r}")
    if SLIDING in kinds and uses is False:
        raise Refusal("use_sliding_window", f"use_sliding_window is False, and layer_types has {SLIDING}: which one is meant?")
    return kinds


def read_rope(config: dict, kinds: Collection[str], rotates_all: bool) -> dict[str, object]:
    """rope_theta and rope_scaling. Numbers may stand in rope_parameters, there for each kind of attention, in rope_scaling, or flat."""
    rope, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if nested := [rope[kind] for kind in sorted(set(kinds)) if rope.get(kind)]:
        if len(nested) < len(set(kinds)) or any(other != nested[0] for other in nested):
            found = f"rope_parameters differ between kinds of attention ({rope})"
            raise Refusal("rope_parameters", f"{found}, and only one rotation is supported")
        rope = nested[0]
    types = [part.get("rope_type", part.get("type")) for part in (rope, scaling) if part.get("rope_type", part.get("type"))]
    if len(set(types)) > 1:
        raise Refusal("rope_scaling", f"rope_type is {types[0]!r} in rope_parameters and {types[1]!r} in rope_scaling: which one is meant?")
    kind, rope = types[0] if types else "default", scaling | rope
    thetas = {value for value in (config.get("rope_theta"), rope.get("rope_theta")) if value is not None}
    if len(thetas) > 1:
        raise Refusal("rope_theta", f"rope_theta is both {' and '.join(map(repr, thetas))}: which one is meant?")
    values = {"rope_theta": next(iter(thetas), None), "rope_scaling": {}}
    if kind not in ("default", *ROPE):
        raise Refusal("rope_type", f"rope_type is {kind!r}, and only default, {', '.join(ROPE)} are supported: pass another drafter")
    if not (kind == "proportional" or (kind == "default" and rotates_all)):
        partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        refuse_unlike([("partial_rotary_factor", partial, 1.0)])
    others = {"rope_type", "type", "rope_theta", *SECTIONS}
    numbers = {name: value for name, value in rope.items() if value is not None and name not in others}
    refuse_unknown(numbers, ROPE.get(kind, {FULL, SLIDING}) | {"partial_rotary_factor"}, "rope_parameters.")
    if kind == "default":
        return values
    if kind == "yarn" and "original_max_position_embeddings" not in numbers:
        numbers["original_max_position_embeddings"] = config.get("max_position_embeddings")
    return values | {"rope_scaling": {"rope_type": kind} | numbers}


def take_tables(config: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the embedding and the head from the tensors and return them. Raises Refusal where one table stands for both."""
    tables = {name: tensors.pop(name) for name in TABLES if name in tensors}
    if config.get("tie_word_embeddings") and list(tables) == [TABLES[0]]:
        raise Refusal("tie_word_embeddings", f"tie_word_embeddings is True, and the file has {TABLES[0]} alone: store the head as well")
    return tables


def take_shared(config: dict, tensors: dict[str, Tensor]) -> dict[str, object]:
    """Remove what is the target's, as fields of Stored: copies of its tables, and the draft vocabulary [draft_vocab].
    In the file d2t holds the distance of each target id from its draft id, and t2d is a mask. Raises Refusal if that names other tokens."""
    d2t, mask = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if d2t is not None and not (d2t.is_meta or d2t.dim() != 1 or d2t.is_floating_point() or d2t.is_complex()):
        d2t = d2t.long() + torch.arange(len(d2t))
        if mask is not None and mask.dtype == torch.bool and mask.dim() == 1 and not torch.equal(mask.nonzero()[:, 0], d2t):
            raise Refusal("t2d", f"t2d marks {int(mask.sum())} tokens, which are not the {len(d2t)} of d2t: fetch the drafter again")
    return {"copies": take_tables(config, tensors), "d2t": d2t}
