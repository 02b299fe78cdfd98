"""The reference's format (DeepSpec): the target's config with the drafter's fields, copies of the target's embedding and head.

Its drafters for Gemma 4 have the layers of that model's full attention, a scaled embedding and capped logits.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.formats.build import Stored, refuse_unwritten, weights_of, written_layers
from dspark.formats.checkpoint import write_folder
from dspark.formats.layers import FULL, HARMLESS, HEADS, LAYERS, PLAIN, TABLES, read_layers, refuse_unknown, refuse_unlike, take_tables
from dspark.target.target import Target

ARCHITECTURE = "Qwen3DSparkModel"
# The reference builds the layers of Qwen3 and reads nothing else. Its rotary embedding, without scaling, turns whole heads, so the
# partial factor that a config takes over from its target is not the drafter's.
PLAIN_HERE = PLAIN | {"is_causal": False, "dflash_query_causal": False, "sample_from_anchor": True}
OF_TARGETS = {  # fields of the target's layers, which the copied config still has
    *"target_hidden_size target_model_type target_text_model_type pretraining_tp attn_output_gate output_gate_type".split(),
    *"full_attention_interval linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads".split(),
    *"linear_value_head_dim mamba_ssm_dtype mtp_num_hidden_layers mtp_use_dedicated_embeddings mlp_only_layers".split(),
    *"decoder_sparse_step moe_intermediate_size norm_topk_prob num_experts num_experts_per_tok num_local_experts".split(),
    *"output_router_logits router_aux_loss_coef shared_expert_intermediate_size query_pre_attn_scalar".split(),
    *"attn_logit_softcapping use_bidirectional_attention _sliding_window_pattern sliding_window_pattern chunk_size_feed_forward".split(),
    *"output_attentions output_hidden_states return_dict problem_type id2label label2id no_rope_layer_interval no_rope_layers".split(),
    *"embedding_multiplier logits_scaling residual_multiplier attention_multiplier embd_pdrop resid_pdrop".split(),
    "original_max_position_embeddings",
}
PLAIN_GEMMA4 = {name: value for name, value in PLAIN_HERE.items() if name != "final_logit_softcapping"} | {
    "enable_moe_block": False,
    "hidden_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
}
OF_GEMMA4 = {
    *"global_head_dim num_global_key_value_heads attention_k_eq_v final_logit_softcapping".split(),
    *"num_kv_shared_layers top_k_experts vocab_size_per_layer_input per_layer_config".split(),
}


def export_deepspec(drafter: Drafter, target: Target, folder: str | Path) -> None:
    """Write a drafter for other tools that read this format, whole or not at all.
    Raises ValueError for a reduced draft vocabulary or a baseline, which the format cannot hold, and where ``save_drafter`` does."""
    shape = drafter.config
    refuse_unwritten(drafter, "DeepSpec's layout")
    if shape.draft_vocab_size < shape.vocab_size:
        found = f"one that proposes {shape.draft_vocab_size} of {shape.vocab_size}"
        raise ValueError(f"DeepSpec's layout holds drafters of all tokens, not {found}: use save_drafter or speculators' layout")
    known = {*HARMLESS, *OF_TARGETS, "max_position_embeddings"}
    config = {name: value for name, value in json.loads(target.config.to_json_string()).items() if name in known}
    config |= shape.to_dict() | written_layers(shape)
    config |= {
        "architectures": [ARCHITECTURE],
        "confidence_head_with_markov": shape.confidence_head_with_markov and shape.markov_rank > 0,
        "num_target_layers": target.num_layers,
        "num_anchors": 512,
        "dtype": "bfloat16",
        "sts_temperatures": list(drafter.sts_temperatures),
    }
    del config["draft_vocab_size"]
    copies = (target.embedding.weight, target.head_weight)
    tensors = {name: weight.detach().to("cpu", torch.bfloat16, copy=True) for name, weight in zip(TABLES, copies, strict=True)}
    write_folder(Path(folder), weights_of(drafter) | tensors, config)


def read(config: dict, tensors: dict[str, Tensor]) -> Stored:
    refuse_unknown(config, {*LAYERS, *HEADS, *HARMLESS, *PLAIN_HERE, *OF_TARGETS, "sts_temperatures"})
    refuse_windows(config)
    values = {name: config.get(name) for name in (*HEADS, "sts_temperatures")} | read_layers(config, plain=PLAIN_HERE, rotates_all=True)
    return Stored("DeepSpec", values, tensors, copies=take_tables(config, tensors), frozen=True)


def read_gemma4(config: dict, tensors: dict[str, Tensor]) -> Stored:
    refuse_unknown(config, {*LAYERS, *HEADS, *HARMLESS, *PLAIN_GEMMA4, *OF_TARGETS, *OF_GEMMA4})
    refuse_windows(config)
    shared = bool(config.get("attention_k_eq_v"))
    values = {name: config.get(name) for name in HEADS} | read_layers(config, plain=PLAIN_GEMMA4)
    values |= {
        "layer_type": "gemma4",
        "head_dim": config.get("global_head_dim"),
        "num_key_value_heads": config.get("num_global_key_value_heads" if shared else "num_key_value_heads"),
        "attention_k_eq_v": shared,
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }
    tables = take_tables(config, tensors)
    for name in [name for name in tensors if name.endswith(".input_layernorm.weight")]:
        tensors.setdefault(name.replace("input_layernorm.weight", "layer_scalar"), torch.ones(1))
    return Stored("DeepSpec", values, tensors, copies=tables, frozen=True, own_scale=float(config["hidden_size"]) ** 0.5)


def refuse_windows(config: dict) -> None:
    """The reference drafts with full attention, whatever a config says."""
    kinds = config.get("layer_types") or []
    refuse_unlike([(f"layer_types[{i}]", kind, FULL) for i, kind in enumerate(kinds)])
    refuse_unlike([] if kinds else [("use_sliding_window", config.get("use_sliding_window"), False)])
