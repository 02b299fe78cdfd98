"""Drafters on disk, one module per format. Each has ``read(config, tensors)``: what is stored, or None for another format's folder.

Adding a format is one module and its entry in :data:`FORMATS`. A module names every field that it understands and those that are
known to be harmless; any other field is refused.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from dspark.formats import deepspec, gemma4, liquid, native, refused, specforge, speculators
from dspark.formats.build import Stored
from dspark.formats.layers import Refusal, without

FORMATS = (native, refused, speculators, deepspec, gemma4, specforge, liquid)
READABLE = (*native.KINDS, deepspec.ARCHITECTURE, gemma4.ARCHITECTURE, "speculators' dspark and dflash", "DSparkDraftModel")
READABLE += ("DFlashDraftModel", liquid.ARCHITECTURE)


def read(config: dict, tensors: dict[str, Tensor], ignore_fields: Collection[str] = ()) -> Stored:
    """What a folder's config.json and tensors describe, in the first format that knows it.

    tensors: by their names in the file; those that are understood may be taken out.
    ignore_fields: names of fields to read as if they were absent, at any depth, or with dots at one place.
    Raises ValueError if no format knows it, and for a field whose name or value is not understood.
    """
    for name in ignore_fields:
        if without(config, [name]) == config:
            raise ValueError(f"ignore_fields names {name!r}, which config.json does not have: leave it out")
    config = without(config, ignore_fields)
    for module in FORMATS:
        if stored := module.read(config, tensors):
            return stored
    found = f"architectures {config.get('architectures')!r} is no drafter that can be read"
    raise Refusal("architectures", f"{found}: pass one of {', '.join(READABLE)}")
