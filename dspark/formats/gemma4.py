"""DeepSpec's drafters for Gemma 4: the layers of that model's full attention, a scaled embedding, capped logits."""

from __future__ import annotations

from torch import Tensor, ones

from dspark.formats.build import Stored
from dspark.formats.deepspec import OF_TARGETS, PLAIN_HERE, refuse_windows
from dspark.formats.layers import HARMLESS, HEADS, LAYERS, read_layers, refuse_unknown, take_tables

PLAIN = {name: value for name, value in PLAIN_HERE.items() if name != "final_logit_softcapping"} | {
    "enable_moe_block": False,
    "hidden_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
}
ITS_OWN = {"global_head_dim", "num_global_key_value_heads", "attention_k_eq_v", "final_logit_softcapping"}
OF_TARGET = {"num_kv_shared_layers", "top_k_experts", "vocab_size_per_layer_input", "per_layer_config"}


def read(config: dict, tensors: dict[str, Tensor]) -> Stored:
    refuse_unknown(config, {*LAYERS, *HEADS, *HARMLESS, *PLAIN, *ITS_OWN, *OF_TARGETS, *OF_TARGET})
    refuse_windows(config)
    shared = bool(config.get("attention_k_eq_v"))
    values = {name: config.get(name) for name in HEADS} | read_layers(config, plain=PLAIN)
    values |= {
        "layer_type": "gemma4",
        "head_dim": config.get("global_head_dim"),
        "num_key_value_heads": config.get("num_global_key_value_heads" if shared else "num_key_value_heads"),
        "attention_k_eq_v": shared,
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }
    tables = take_tables(config, tensors)
    for name in [name for name in tensors if name.endswith(".input_layernorm.weight")]:
        tensors.setdefault(name.replace("input_layernorm.weight", "layer_scalar"), ones(1))
    return Stored("DeepSpec", values, tensors, copies=tables, frozen=True, own_scale=float(config["hidden_size"]) ** 0.5)
