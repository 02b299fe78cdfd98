"""A drafter's folder: written whole or not at all, and validated when read. Safetensors only, never unpickled."""

import contextlib
import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from dspark.files import digest, one_line, read_tensors, write_atomically

AGAIN = "fetch or train the drafter again"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    """Write weights and config.json. Raises ValueError if one of them cannot be written.

    A save is complete once the weights are replaced: their header also holds the config, and config.json holds the digest of its
    weights. So a kill or a full disk at any moment leaves the old drafter or the new one, never a mixture.
    """
    text = json.dumps(config | {"weights_digest": _digest(tensors)}, indent=1, ensure_ascii=False)
    write_atomically(folder / WEIGHTS, save(tensors, {"format": "pt", "config": text}))
    write_atomically(folder / CONFIG, text.encode() + b"\n")


def read_folder(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors that belong together. Raises ValueError for files that are missing, damaged, or pickled."""
    config, header = read_config(folder / CONFIG), {}
    if (folder / WEIGHTS).is_file():
        tensors, header = read_tensors(folder / WEIGHTS, AGAIN)
    elif (folder / INDEX).is_file():
        placed, tensors = placed_weights(folder), {}
        for shard in sorted(set(placed.values())):
            tensors |= read_tensors(folder / shard, AGAIN)[0]
        if different := sorted(tensors.keys() ^ placed.keys()):
            raise ValueError(f"the shards in {folder} and {INDEX} differ in {some(different)}: fetch the drafter again")
    else:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        found = f"only pickled weights ({some(pickled)}), which can run code when loaded" if pickled else f"no {WEIGHTS}"
        raise ValueError(f"{folder} has {found}: pass a drafter stored as safetensors")
    if "weights_digest" in config and config["weights_digest"] != (found := _digest(tensors)):
        with contextlib.suppress(ValueError):
            config = _parse(header.get("config", "{}"))  # of a save that was killed between the weights and config.json
        if config.get("weights_digest") != found:
            raise ValueError(f"{folder / WEIGHTS} is damaged: its digest {found} is not the one it was written with. Restore it")
    return config, tensors


def some(names: list[str]) -> str:
    """At most three names, and how many more there are."""
    shown = [name if name.isprintable() else repr(name) for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _digest(tensors: dict[str, Tensor]) -> str:
    """16 hex digits of names, types, shapes and all bytes."""
    parts: list[str | memoryview] = []
    for name, tensor in sorted(tensors.items()):
        parts += f"{name} {tensor.dtype} {tuple(tensor.shape)}", tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return digest(*parts)


def placed_weights(folder: Path) -> dict[str, str]:
    """The index of a folder: name of each tensor → file that holds it. Raises ValueError for anything but files of that folder."""
    placed = read_config(folder / INDEX).get("weight_map")
    for shard in placed.values() if isinstance(placed, dict) else [None]:
        name = str(shard)
        if Path(name).name != shard or not name.endswith(".safetensors") or not name.isprintable():
            raise ValueError(f"{folder / INDEX} names {shard!r}: a shard must be a plain *.safetensors file name inside the folder")
    return placed


def read_config(path: Path) -> dict:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise OSError("it is not a file")
        return _parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {one_line(error)}. Pass a folder with {CONFIG} and safetensors weights") from None


def _parse(text: str) -> dict:
    """A JSON object. Raises ValueError for anything else."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content
