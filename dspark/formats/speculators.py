"""The format of the package ``speculators``, which vLLM serves: the layers in a nested config, a draft vocabulary as offsets."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.formats.build import Stored, refuse_unwritten, weights_of
from dspark.formats.checkpoint import write_folder
from dspark.formats.deepspec import COPIES
from dspark.formats.layers import SIZES, read_layers, refuse_unlike
from dspark.target.target import Target

KIND = "dspark"
SHARED = "block_size mask_token_id draft_vocab_size markov_rank markov_head_type enable_confidence_head".split()  # named alike there


def export_speculators(drafter: Drafter, target: Target, folder: str | Path) -> None:
    """Write a drafter as the package ``speculators`` saves it, whole or not at all.

    Its own head goes along only for a reduced draft vocabulary, its embedding never: readers take the target's.
    Calibration is left out. Raises ValueError for a baseline, and where ``save_drafter`` does.
    """
    refuse_unwritten(drafter, "speculators' layout")
    shape, tensors = drafter.config, weights_of(drafter)
    if shape.draft_vocab_size < shape.vocab_size:
        d2t = drafter.d2t.cpu()
        tensors |= {"d2t": d2t - torch.arange(len(d2t)), "t2d": torch.zeros(shape.vocab_size, dtype=torch.bool).index_fill(0, d2t, True)}
        tensors["lm_head.weight"] = drafter.head_weight.to("cpu", torch.bfloat16, copy=True)
    layers = {name: getattr(shape, name) for name in (*SIZES, "head_dim", "rms_norm_eps")} | {
        "model_type": "qwen3",  # its layers are ours: queries and keys normed per head
        "layer_types": ["full_attention"] * shape.num_hidden_layers,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": target.max_context,
        "tie_word_embeddings": False,
    }
    proposal = {"proposal_type": "greedy", "speculative_tokens": shape.block_size}
    verifier = {"name_or_path": target.name, "architectures": target.config.architectures or [type(target.model).__name__]}
    config = {name: getattr(shape, name) for name in SHARED} | {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": KIND,
        "speculators_config": {
            "algorithm": KIND,
            "proposal_methods": [proposal],
            "default_proposal_method": proposal["proposal_type"],
            "verifier": verifier,
        },
        "transformer_layer_config": layers,
        "aux_hidden_state_layer_ids": [i + 1 for i in shape.target_layer_ids],
        "sample_from_anchor": True,  # a reader that misses it may take it for false: another block convention
        "sliding_window_non_causal": False,
        "confidence_head_with_markov": shape.confidence_head_with_markov and shape.markov_rank > 0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    write_folder(Path(folder), tensors, config)


def read(config: dict, tensors: dict[str, Tensor]) -> Stored | None:
    if "speculators_model_type" not in config:
        return None
    refuse_unlike(
        [
            ("speculators_model_type", str(config["speculators_model_type"]), KIND),
            ("sample_from_anchor", config.get("sample_from_anchor") or False, True),  # here a missing flag means False
            ("topk_context", config.get("topk_context") or None, None),
        ]
    )
    taps = [i - 1 for i in config["aux_hidden_state_layer_ids"]]  # here the embedding counts as 0
    values = config | read_layers(config["transformer_layer_config"]) | {"target_layer_ids": taps}
    copies = {name: tensors.pop(name) for name in COPIES if name in tensors}
    tensors.pop("t2d", None)  # the draft vocabulary once more, as a mask
    d2t = tensors.pop("d2t", None)
    if d2t is not None and d2t.dim() == 1 and not (d2t.is_floating_point() or d2t.is_complex()):
        d2t = d2t.long() + torch.arange(len(d2t))  # stored as the distance of each target id from its draft id
    return Stored(values, tensors, d2t=d2t, copies=copies)
