"""Drafters on disk, one module per format. Each has ``read(config, tensors)``: what is stored, or None for another format's folder.

Adding a format is one module and its entry in :data:`FORMATS`.
"""

from __future__ import annotations

from torch import Tensor

from dspark.formats import deepspec, native, speculators
from dspark.formats.build import Stored

FORMATS = (native, deepspec, speculators)


def read(config: dict, tensors: dict[str, Tensor]) -> Stored:
    """What a folder's config.json and tensors describe, in the first format that knows it. Raises ValueError if none does."""
    for module in FORMATS:
        if stored := module.read(config, tensors):
            return stored
    readable = f"{', '.join(native.KINDS)}, {deepspec.ARCHITECTURE} and speculators' {speculators.KIND}"
    raise ValueError(f"architectures {config.get('architectures')!r} is no drafter that can be read: pass one of {readable}")
