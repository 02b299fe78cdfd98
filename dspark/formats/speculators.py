"""The format of the package ``speculators``, which vLLM serves: the layers in a nested config, a draft vocabulary as offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark.formats.build import Stored
from dspark.formats.deepspec import COPIES
from dspark.formats.layers import read_layers, refuse_unlike

KIND = "dspark"


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
