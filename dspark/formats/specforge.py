"""The format of SpecForge, TorchSpec and z-lab's DFlash: a Qwen3 config, with the drafter's fields in ``dflash_config`` or beside it."""

from __future__ import annotations

from torch import Tensor

from dspark.formats.build import Stored
from dspark.formats.layers import HARMLESS, HEADS, LAYERS, PLAIN, Refusal, read_layers, refuse_unknown, refuse_unlike, take_shared

PLAIN_HERE = {name: value for name, value in PLAIN.items() if name != "final_logit_softcapping"}
PLAIN_HERE |= {"output_multiplier": 1.0, "shift_label": False, "pure_draft_prefix_len": 0}
FIELDS = {  # beside those of the heads and layers
    *"is_causal dflash_query_causal sample_from_anchor final_logit_softcapping input_embedding_scale draft_vocab_size".split(),
    *"projector_type attention_mode target_hidden_size".split(),
}
BLOCK_SIZE = {"dflash": 16}  # model_type → what TorchSpec and z-lab train with where the file does not say
RENAMED = {"logit_head.": "", "context_proj.": "fc.", "context_norm.": "hidden_norm.", "final_norm.": "norm."}  # early files → here


def read(config: dict, tensors: dict[str, Tensor]) -> Stored:
    config = flat(config)
    name = "SpecForge" if config.get("model_type") != "dflash" else "TorchSpec" if "target_num_hidden_layers" in config else "z-lab DFlash"
    return stored(name, config, tensors, {})


def flat(config: dict) -> dict:
    """The config with ``dflash_config`` unpacked. Raises Refusal for a field that has two values."""
    inner = config.get("dflash_config") or {}
    for name, value in inner.items():
        if config.get(name) not in (None, value):
            raise Refusal(name, f"{name} is {config[name]!r}, and {value!r} in dflash_config: which one is meant?")
    return {name: value for name, value in config.items() if name != "dflash_config"} | inner


def stored(name: str, config: dict, tensors: dict[str, Tensor], more: dict[str, object]) -> Stored:
    """What a flat config and its tensors describe. more: fields of DrafterConfig that its format has otherwise than SpecForge."""
    refuse_unknown(config, {*FIELDS, *LAYERS, *HEADS, *HARMLESS, *PLAIN_HERE})
    one_each = config.get("num_attention_heads") == config.get("num_key_value_heads")
    projector = "dflash" if config.get("projector_type") == "dflash" else "dspark"
    only = {"projector_type": projector, "attention_mode": "mha" if one_each else "gqa", "target_hidden_size": config.get("hidden_size")}
    refuse_unlike([(name, config.get(name), value) for name, value in only.items()])
    for old, new in RENAMED.items():
        for found in [key for key in tensors if key.startswith(old)]:
            tensors[new + found.removeprefix(old)] = tensors.pop(found)
    values = {key: config.get(key) for key in HEADS} | read_layers(config, plain=PLAIN_HERE)
    values |= {
        "block_size": config.get("block_size", BLOCK_SIZE.get(config.get("model_type"))),
        "markov_rank": config.get("markov_rank", 0),
        "enable_confidence_head": config.get("enable_confidence_head", bool(config.get("confidence_head_alpha"))),
        "sample_from_anchor": config.get("sample_from_anchor", False),
        "windows_move": any(values["sliding_windows"]),
        "embedding_scale": config.get("input_embedding_scale"),
        "final_logit_softcapping": config.get("final_logit_softcapping") or None,
        "draft_vocab_size": config.get("draft_vocab_size"),
        **more,
    }
    reads = tensors.get("confidence_head.proj.weight")
    if values["confidence_head_with_markov"] is None and reads is not None:
        values["confidence_head_with_markov"] = reads.shape[-1] > config["hidden_size"]
    return Stored(name, values, tensors, **take_shared(config, tensors))
