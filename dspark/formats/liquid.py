"""Liquid's drafters for LFM2: as SpecForge's, but the anchor's slot predicts, and rotary embeddings turn neighbouring pairs."""

from __future__ import annotations

from torch import Tensor

from dspark.formats.build import Stored
from dspark.formats.layers import Refusal, halves
from dspark.formats.specforge import flat, stored


def read(config: dict, tensors: dict[str, Tensor]) -> Stored:
    config = flat(config)
    style = config.pop("rope_is_neox_style", None)
    if type(style) is not bool:
        raise Refusal("rope_is_neox_style", f"rope_is_neox_style is {style!r}, not true or false: say which pairs are rotated")
    found = stored("Liquid", config, tensors, {"sample_from_anchor": config.get("sample_from_anchor", True)})
    if not style:
        found.tensors = halves(found.tensors, found.values["head_dim"])
    return found
