"""Drafters on disk: folders that are written whole or not at all, and read with suspicion. Safetensors only, never unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.files import data_dir
from dspark.formats.native import (
    CONFIG,
    NATIVE,
    assemble,
    check_copies,
    check_finite,
    check_sizes,
    class_of,
    d2t_of,
    native_config,
    reference_config,
    shape_of,
    some,
    values_of,
)
from dspark.target.target import Target

log = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def save_drafter(drafter: Drafter, target: Target, folder: str | Path, *, training: dict | None = None) -> None:
    """Write the native format: bf16 weights without the target's embedding and head, whole or not at all.

    training: a JSON-able summary (steps, losses, …) kept in config.json. Raises ValueError for weights that are not finite and
    if the folder cannot be written; what it held before is kept then.
    """
    config = drafter.config
    tensors = _weights(drafter)
    if config.draft_vocab_size < config.vocab_size:
        tensors["d2t"] = drafter.d2t.to("cpu", torch.int32)
    _write(Path(folder), tensors, native_config(drafter, target) | {"training": training or {}})


def export_reference(drafter: Drafter, target: Target, folder: str | Path) -> None:
    """Write the reference layout (DeepSpec): the same weights with copies of the target's embedding and head.

    Raises ValueError for a reduced draft vocabulary or a baseline, which that layout cannot hold, and where :func:`save_drafter` does.
    """
    about = reference_config(drafter, target)
    copies = {"embed_tokens.weight": target.embedding.weight, "lm_head.weight": target.head_weight}
    tensors = _weights(drafter) | {name: weight.detach().to("cpu", torch.bfloat16, copy=True) for name, weight in copies.items()}
    _write(Path(folder), tensors, about)


def _weights(drafter: Drafter) -> dict[str, Tensor]:
    tensors = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in drafter.named_parameters()}
    check_finite(tensors, "the drafter in memory")
    return tensors


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    """Replacing the weights is the one step that commits a save: their header carries the config a second time, and config.json names
    the digest of the weights it belongs to. A kill or a full disk at any moment leaves the old drafter or the new one, never a mixture.
    """
    text = json.dumps(config | {"weights_digest": _digest(tensors)}, indent=1, ensure_ascii=False)
    contents = {WEIGHTS: save(tensors, {"format": "pt", "config": text}), CONFIG: text.encode() + b"\n"}
    scratch = {name: folder / f".{name}.{os.getpid()}.part" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            scratch[name].write_bytes(content)
        for name in contents:  # the weights first: they commit
            scratch[name].replace(folder / name)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {_line(error)}. Make room or choose another folder; what it held is kept") from error
    finally:
        for part in scratch.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _digest(tensors: dict[str, Tensor]) -> str:
    """16 hex digits: SHA-256 over names, types, shapes and all bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def load_drafter(name: str | Path, target: Target) -> Drafter:
    """Load a drafter, attached to its target in the target's dtype, layout and on its device, ready to draft.

    name: ``"default"`` (shipped in the data folder, for the default target), a folder, or a hub id. The format is told from
    config.json: native (DSpark, DFlash and the baselines), DeepSpec's Qwen3 layout (DSpark and DFlash), or speculators' ``dspark``.
    Raises ValueError, naming the value and the remedy, for anything missing, damaged, pickled, not finite, of the wrong shape,
    or made for another target.
    """
    folder = _folder(name)
    config, tensors = _read(folder)
    try:
        layout, values = values_of(config, folder)
        shape = shape_of(values, folder)
        check_sizes(shape, target, folder)
        d2t = d2t_of(shape, layout, tensors, folder)
        copies = {n: tensors.pop(n) for n in ("embed_tokens.weight", "lm_head.weight") if layout not in NATIVE and n in tensors}
        drafter = assemble(class_of(layout), shape, tensors, d2t, target.dtype, folder)
    except (TypeError, AttributeError, KeyError, RuntimeError) as error:  # a number where a dict belongs, sizes beyond any memory, …
        raise ValueError(f"{folder / CONFIG} is malformed: {_line(error)}. Restore it from where the drafter came from") from error
    drafter.sts_temperatures = tuple(map(float, values.get("sts_temperatures") or ()))
    drafter.attach(target)
    check_copies(copies, target, d2t, folder)
    if layout in NATIVE and target.dtype == torch.float16:
        log.warning("%s: not checked against the target's digest, since float16 does not hold every bfloat16 weight", folder)
    elif layout in NATIVE and config.get("target_digest") != target.digest:
        made_for = f"{config.get('target')!r} (weights {config.get('target_digest')!r})"
        found = f"{target.name} (weights {target.digest})"
        raise ValueError(f"the drafter in {folder} was made for {made_for}, not for {found}: load that target, or train a drafter for this")
    return drafter


def default_drafter() -> Path:
    """The folder of the drafter that is shipped for the default target."""
    return data_dir() / "drafters" / "smollm2-135m-instruct"


def _folder(name: str | Path) -> Path:
    path = default_drafter() if str(name) == "default" else Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1:
        raise ValueError(f"no drafter folder at {path}: pass 'default', a folder with {CONFIG}, a hub id, or make one with dspark.train")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, "*.safetensors", INDEX]))
    except (OSError, ValueError) as error:
        raise ValueError(f"no folder {name}, and the hub does not give it ({_line(error)}): connect, or pass a folder") from error


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors that belong together."""
    config, header, tensors = _read_json(folder / CONFIG), {}, {}
    if (folder / WEIGHTS).is_file():
        tensors, header = _read_weights(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        placed = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict):
            raise ValueError(f"{folder / INDEX} has weight_map {placed!r}, not an object: fetch the drafter again")
        for shard in sorted(set(map(str, placed.values()))):
            if Path(shard).name != shard or not shard.endswith(".safetensors") or not shard.isprintable():
                raise ValueError(f"{folder / INDEX} names {shard!r}: a shard must be a plain *.safetensors file name inside the folder")
            tensors |= _read_weights(folder / shard)[0]
        if different := sorted(tensors.keys() ^ placed.keys()):
            raise ValueError(f"the shards in {folder} and {INDEX} differ in {some(different)}: fetch the drafter again")
    else:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        found = f"only pickled weights ({some(pickled)}), which can run code when loaded" if pickled else f"no {WEIGHTS}"
        raise ValueError(f"{folder} has {found}: pass a drafter stored as safetensors")
    if "weights_digest" in config and config["weights_digest"] != (digest := _digest(tensors)):
        with contextlib.suppress(ValueError):
            config = _parse(header.get("config", "{}"))  # of a save that was killed before config.json followed its weights
        if config.get("weights_digest") != digest:
            raise ValueError(f"{folder / WEIGHTS} is damaged: its digest {digest} is not the one it was written with. Restore it")
    return config, tensors


def _read_json(path: Path) -> dict:
    try:
        _check_file(path)
        return _parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {_line(error)}. Pass a folder with {CONFIG} and safetensors weights") from None


def _parse(text: str) -> dict:
    """A JSON object. Raises ValueError for anything else."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def _check_file(path: Path) -> None:
    """Raises OSError for what is no file: opening a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        _check_file(path)
        with path.open("rb") as file:
            start = file.read(9)
        if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:] != b"{"):
            raise ValueError(f"{path} is a pickled file under another name, which can run code when loaded: pass real safetensors")
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged: {_line(error)}. Fetch or train the drafter again") from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
