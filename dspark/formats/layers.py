"""What a transformers config says about the layers of a drafter. Whatever would make them compute something else is refused."""

from __future__ import annotations

from collections.abc import Iterable

# Fields that change the computation → the value that our layers have. An absent or empty field means that value.
PLAIN = {
    "hidden_act": "silu",
    "hidden_activation": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "is_causal": False,
    "dflash_query_causal": False,
    "sample_from_anchor": True,
    "rope_is_neox_style": True,
    "partial_rotary_factor": 1.0,
    "final_logit_softcapping": None,
    "quantization_config": None,
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def read_layers(config: dict) -> dict[str, object]:
    """The layers' sizes and numbers under DrafterConfig's names. Raises ValueError, naming the field, for layers of another kind."""
    ropes = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    kinds = config.get("layer_types") or []
    found = [(name, config.get(name), plain) for name, plain in PLAIN.items() if not (kinds and name == "use_sliding_window")]
    found += [("rope_type", rope.get("rope_type", rope.get("type")), "default") for rope in ropes]
    found += [("partial_rotary_factor", rope.get("partial_rotary_factor"), 1.0) for rope in ropes]
    found += [(f"layer_types[{i}]", kind, "full_attention") for i, kind in enumerate(kinds)]
    refuse_unlike(found)
    theta = config.get("rope_theta", ropes[0].get("rope_theta", ropes[1].get("rope_theta")))
    return {name: config.get(name) for name in (*SIZES, "head_dim", "rms_norm_eps")} | {"rope_theta": theta}


def refuse_unlike(found: Iterable[tuple[str, object, object]]) -> None:
    """Raises ValueError for the first (field, value, supported value) whose value is another one. None means the supported one."""
    for name, value, plain in found:
        if value is not None and value != plain:
            raise ValueError(f"{name} is {value!r}, and only {plain!r} is supported: pass another drafter or train one")
