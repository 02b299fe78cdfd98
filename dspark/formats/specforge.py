"""The format of SpecForge, TorchSpec, z-lab's DFlash and Liquid: Qwen3's config, the drafter's fields in ``dflash_config`` or beside it."""

import torch
from torch import Tensor

from dspark.formats.build import Stored
from dspark.formats.layers import HARMLESS, HEADS, LAYERS, PLAIN, Refusal, read_layers, refuse_unknown, refuse_unlike, take_shared

LIQUID = "Lfm2DSparkDraftModel"  # its anchor's slot predicts, and it says which pairs its rotary embeddings turn
PLAIN_HERE = {name: value for name, value in PLAIN.items() if name != "final_logit_softcapping"}
PLAIN_HERE |= {"output_multiplier": 1.0, "shift_label": False, "pure_draft_prefix_len": 0}
FIELDS = {  # beside those of the heads and layers
    *"is_causal dflash_query_causal sample_from_anchor final_logit_softcapping input_embedding_scale draft_vocab_size".split(),
    *"projector_type attention_mode target_hidden_size".split(),
}
BLOCK_SIZE = {"dflash": 16}  # model_type → what TorchSpec and z-lab train with where the file does not say
RENAMED = {"logit_head.": "", "context_proj.": "fc.", "context_norm.": "hidden_norm.", "final_norm.": "norm."}  # early files → here
ROTATED = ("q_proj", "k_proj", "q_norm", "k_norm")


def read(config: dict, tensors: dict[str, Tensor]) -> Stored:
    inner = config.get("dflash_config") or {}
    for field, value in inner.items():
        if config.get(field) not in (None, value):
            raise Refusal(field, f"{field} is {config[field]!r}, and {value!r} in dflash_config: which one is meant?")
    config = {field: value for field, value in config.items() if field != "dflash_config"} | inner
    name = "SpecForge" if config.get("model_type") != "dflash" else "TorchSpec" if "target_num_hidden_layers" in config else "z-lab DFlash"
    halves = True  # whether rotary embeddings turn pairs (i, i + head_dim/2), as ours do
    if liquid := config.get("architectures") == [LIQUID]:
        name, halves = "Liquid", config.pop("rope_is_neox_style", None)
        if type(halves) is not bool:
            raise Refusal("rope_is_neox_style", f"rope_is_neox_style is {halves!r}, not true or false: say which pairs are rotated")
    refuse_unknown(config, {*FIELDS, *LAYERS, *HEADS, *HARMLESS, *PLAIN_HERE})
    one_each = config.get("num_attention_heads") == config.get("num_key_value_heads")
    projector = "dflash" if config.get("projector_type") == "dflash" else "dspark"
    only = {"projector_type": projector, "attention_mode": "mha" if one_each else "gqa", "target_hidden_size": config.get("hidden_size")}
    refuse_unlike([(field, config.get(field), value) for field, value in only.items()])
    for old, new in RENAMED.items():
        for found in [key for key in tensors if key.startswith(old)]:
            tensors[new + found.removeprefix(old)] = tensors.pop(found)
    values = {key: config.get(key) for key in HEADS} | read_layers(config, plain=PLAIN_HERE)
    values |= {
        "block_size": config.get("block_size", BLOCK_SIZE.get(config.get("model_type"))),
        "markov_rank": config.get("markov_rank", 0),
        "enable_confidence_head": config.get("enable_confidence_head", bool(config.get("confidence_head_alpha"))),
        "sample_from_anchor": config.get("sample_from_anchor", liquid),
        "windows_move": any(values["sliding_windows"]),
        "embedding_scale": config.get("input_embedding_scale"),
        "final_logit_softcapping": config.get("final_logit_softcapping") or None,
        "draft_vocab_size": config.get("draft_vocab_size"),
    }
    reads = tensors.get("confidence_head.proj.weight")
    if values["confidence_head_with_markov"] is None and reads is not None:
        values["confidence_head_with_markov"] = reads.shape[-1] > config["hidden_size"]
    shared, size = take_shared(config, tensors), values["head_dim"]
    if not halves:  # pairs (2i, 2i + 1) of queries and keys change places, which leaves their products
        order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
        for key in [key for key in tensors if key.split(".")[-2] in ROTATED]:
            tensors[key] = tensors[key].unflatten(0, (-1, size))[:, order].flatten(0, 1)
    return Stored(name, values, tensors, **shared)
