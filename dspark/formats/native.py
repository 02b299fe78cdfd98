"""Our own format: bfloat16 weights under the drafter's own names, without the target's embedding and head."""

from pathlib import Path

import torch
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.draft.eagle import EagleDrafter
from dspark.formats.build import Stored, weights_of
from dspark.formats.checkpoint import write_folder
from dspark.target.target import Target

KINDS = {kind.architecture: kind for kind in (Drafter, EagleDrafter)}  # the architecture in config.json → its class
FORMAT_VERSION = 1


def save_drafter(drafter: Drafter, target: Target, folder: str | Path, *, training: dict | None = None) -> None:
    """Write a drafter for ``load_drafter``, whole or not at all. training: a JSON-able summary (steps, losses, …) kept in config.json.
    Raises ValueError for weights that are not finite and if the folder cannot be written; what it held before is kept then."""
    tensors = weights_of(drafter)
    if drafter.config.draft_vocab_size < drafter.config.vocab_size:
        tensors["d2t"] = drafter.d2t.to("cpu", torch.int32)
    config = {"architectures": [drafter.architecture], "format_version": FORMAT_VERSION}
    config |= {"target": target.name, "target_digest": target.digest}
    config |= drafter.config.to_dict() | {"sts_temperatures": list(drafter.sts_temperatures), "training": training or {}}
    write_folder(Path(folder), tensors, config)


def read(config: dict, tensors: dict[str, Tensor]) -> Stored:
    if (version := config.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"format_version is {version!r}, not {FORMAT_VERSION}: load it with the dspark that wrote it")
    made_for = (config.get("target"), config.get("target_digest"))
    return Stored("dspark", config, tensors, kind=KINDS[config["architectures"][0]], d2t=tensors.pop("d2t", None), made_for=made_for)
