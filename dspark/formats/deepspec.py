"""The reference's format (DeepSpec): the target's config with the drafter's fields, copies of the target's embedding and head."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.formats.build import Stored, refuse_unwritten, weights_of
from dspark.formats.checkpoint import write_folder
from dspark.formats.layers import PLAIN, read_layers
from dspark.target.target import Target

ARCHITECTURE = "Qwen3DSparkModel"
COPIES = ("embed_tokens.weight", "lm_head.weight")


def export_deepspec(drafter: Drafter, target: Target, folder: str | Path) -> None:
    """Write a drafter for other tools that read this format, whole or not at all.

    Raises ValueError for a reduced draft vocabulary or a baseline, which the format cannot hold, and where ``save_drafter`` does.
    """
    shape = drafter.config
    refuse_unwritten(drafter, "DeepSpec's layout")
    if shape.draft_vocab_size < shape.vocab_size:
        found = f"one that proposes {shape.draft_vocab_size} of {shape.vocab_size}"
        raise ValueError(
            f"DeepSpec's layout holds a drafter that proposes all tokens, not {found}: use save_drafter or speculators' layout"
        )
    config = {name: value for name, value in json.loads(target.config.to_json_string()).items() if name not in PLAIN}
    config |= shape.to_dict() | {
        "architectures": [ARCHITECTURE],
        "confidence_head_with_markov": shape.confidence_head_with_markov and shape.markov_rank > 0,
        "num_target_layers": target.num_layers,
        "num_anchors": 512,
        "layer_types": ["full_attention"] * shape.num_hidden_layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "sts_temperatures": list(drafter.sts_temperatures),
    }
    del config["draft_vocab_size"]
    copies = (target.embedding.weight, target.head_weight)
    tensors = {name: weight.detach().to("cpu", torch.bfloat16, copy=True) for name, weight in zip(COPIES, copies, strict=True)}
    write_folder(Path(folder), weights_of(drafter) | tensors, config)


def read(config: dict, tensors: dict[str, Tensor]) -> Stored | None:
    if config.get("architectures") != [ARCHITECTURE]:
        return None
    values = config | read_layers(config) | {"draft_vocab_size": None}
    return Stored(values, tensors, copies={name: tensors.pop(name) for name in COPIES if name in tensors})
