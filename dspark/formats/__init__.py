"""Drafters on disk, one module per format. Each has ``read(config, tensors)``: what is stored.

Adding a format is one module and its entry in :data:`FORMATS`. A module names every field that it understands and those that are
known to be harmless; any other field is refused.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from dspark.formats import deepspec, gemma4, liquid, native, specforge, speculators
from dspark.formats.build import Stored
from dspark.formats.layers import Refusal, without
from dspark.formats.refused import refuse

FORMATS = {  # the architecture in config.json → its module; speculators' files are known by a field of their own
    **dict.fromkeys(native.KINDS, native),
    deepspec.ARCHITECTURE: deepspec,
    "Gemma4DSparkModel": gemma4,
    "DSparkDraftModel": specforge,
    "DFlashDraftModel": specforge,
    "Lfm2DSparkDraftModel": liquid,
}


def read(config: dict, tensors: dict[str, Tensor], ignore_fields: Collection[str] = ()) -> Stored:
    """What a folder's config.json and tensors describe.

    tensors: by their names in the file; those that are understood may be taken out.
    ignore_fields: names of fields to read as if they were absent, at any depth, or with dots at one place.
    Raises ValueError if no format knows it, and for a field whose name or value is not understood.
    """
    for name in ignore_fields:
        if without(config, [name]) == config:
            raise ValueError(f"ignore_fields names {name!r}, which config.json does not have: leave it out")
    config = without(config, ignore_fields)
    refuse(config)
    names = config.get("architectures")
    module = speculators if "speculators_model_type" in config else next((FORMATS[name] for name in FORMATS if names == [name]), None)
    if module is None:
        known = f"{', '.join(FORMATS)}, speculators' {' and '.join(speculators.KINDS)}"
        raise Refusal("architectures", f"architectures {names!r} is no drafter that can be read: pass one of {known}")
    if module is deepspec and "dflash_config" in config:  # only SpecForge writes that
        module = specforge
    stored = module.read(config, tensors)
    stored.target_layers = config.get("num_target_layers") or (config.get("dflash_config") or {}).get("num_target_layers")
    return stored
