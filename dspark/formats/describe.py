"""What a drafter's folder holds, read from its config.json and the headers of its weights alone."""

from __future__ import annotations

from pathlib import Path

from dspark.formats import read
from dspark.formats.checkpoint import read_folder


def describe(folder: Path) -> dict[str, str]:
    """Lines to print, by name. Raises ValueError for a folder without a readable drafter."""
    config, tensors = read_folder(folder)
    count = sum(tensor.numel() for tensor in tensors.values())
    about = {"format": " ".join(map(str, config.get("architectures") or ())), "size": f"{count} numbers in {len(tensors)} tensors"}
    try:
        read(config, tensors)
    except ValueError as error:
        about["refused"] = str(error)
    return about
