"""Drafters on disk: our own format, the reference's (DeepSpec) and speculators'. Safetensors only; nothing is ever unpickled.

A folder holds config.json and the weights. What we write carries its config a second time, in the header of the weights, and
config.json names the digest of the weights it belongs to. So replacing the weights is the one step that commits a save: a kill
or a full disk at any moment leaves the old drafter or the new one, never a mixture.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import math
import os
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dspark.backbone import DrafterConfig
from dspark.draft import Drafter
from dspark.packed import PackedLinear
from dspark.phrases import FILE, load_phrases
from dspark.target import Target

log = logging.getLogger(__name__)

NATIVE = {  # architecture → where its class lies: ours is at hand, a baseline is imported when one is read
    "DSparkDrafter": "dspark.draft:Drafter",
    "EagleDrafter": "dspark.baselines.eagle:EagleDrafter",
}
REFERENCE, SPECULATORS = "Qwen3DSparkModel", "dspark"
FORMAT_VERSION = 1
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OPTIONAL = ("markov_head_type", "confidence_head_with_markov", "draft_vocab_size")  # the reference leaves out what it does not use
VALID = {  # by the annotation of DrafterConfig's fields
    "int": lambda v: type(v) is int and 0 < v < 1 << 31,
    "int | None": lambda v: type(v) is int and 0 < v < 1 << 31,
    "float": lambda v: type(v) in (int, float) and 1e-30 < v < 1e30,  # float32 computes with it
    "bool": lambda v: type(v) is bool,
    "str": lambda v: type(v) is str,
    "tuple[int, ...]": lambda v: type(v) is list and all(type(i) is int for i in v),
}
FOREIGN_COPY = 0.2  # relative difference: 4-bit quantisation of the target stays below 0.1, unrelated weights give 1.4


def data_dir() -> Path:
    """The data folder: the environment's DSPARK_DATA, else ``data`` beside the package (an editable install or a clone).

    Raises ValueError if there is no such folder.
    """
    chosen = os.environ.get("DSPARK_DATA")
    folder = Path(chosen).expanduser() if chosen else Path(__file__).resolve().parents[1] / "data"
    if not folder.is_dir():
        raise ValueError(f"no data folder at {folder}: set DSPARK_DATA to the repository's data folder, or install with pip install -e")
    return folder


def save_drafter(drafter: Drafter, target: Target, folder: str | Path, *, training: dict | None = None) -> None:
    """Write the native format: bf16 weights without the target's embedding and head, whole or not at all.

    training: a JSON-able summary (steps, losses, …) kept in config.json. Raises ValueError for weights that are not finite and
    if the folder cannot be written; what it held before is kept then.
    """
    config = drafter.config
    tensors = _weights(drafter)
    if config.draft_vocab_size < config.vocab_size:
        tensors["d2t"] = drafter.d2t.to("cpu", torch.int32)
    about = {"architectures": [drafter.architecture], "format_version": FORMAT_VERSION}
    about |= {"target": target.name, "target_digest": target.digest}
    about |= config.to_dict() | {"sts_temperatures": list(drafter.sts_temperatures), "training": training or {}}
    _write(Path(folder), tensors, about)


def export_reference(drafter: Drafter, target: Target, folder: str | Path) -> None:
    """Write the reference layout (DeepSpec): the same weights with copies of the target's embedding and head.

    Raises ValueError for a reduced draft vocabulary or a baseline, which that layout cannot hold, and where :func:`save_drafter` does.
    """
    config = drafter.config
    if drafter.architecture != Drafter.architecture:
        raise ValueError(f"the reference layout holds a {Drafter.architecture}, not a {drafter.architecture}: use save_drafter")
    if config.draft_vocab_size < config.vocab_size:
        found = f"the drafter proposes {config.draft_vocab_size} of {config.vocab_size} tokens"
        raise ValueError(f"{found}, which the reference layout cannot hold: use save_drafter, or train one for the whole vocabulary")
    copies = {"embed_tokens.weight": target.embedding.weight, "lm_head.weight": target.head_weight}
    tensors = _weights(drafter) | {name: weight.detach().to("cpu", torch.bfloat16, copy=True) for name, weight in copies.items()}
    about = json.loads(target.config.to_json_string()) | config.to_dict()
    about |= {
        "architectures": [REFERENCE],
        "confidence_head_with_markov": config.confidence_head_with_markov and config.markov_rank > 0,
        "num_target_layers": target.num_layers,
        "num_anchors": 512,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "sts_temperatures": list(drafter.sts_temperatures),
    }
    _write(Path(folder), tensors, {name: about[name] for name in about if name not in ("draft_vocab_size", "rope_scaling")})


def _weights(drafter: Drafter) -> dict[str, Tensor]:
    tensors = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in drafter.named_parameters()}
    _check_finite(tensors, "the drafter in memory")
    return tensors


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> None:
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
        layout, values = _values(config, folder)
        shape = _shape(values, folder)
        _check_sizes(shape, target, folder)
        d2t = _d2t(shape, layout, tensors, folder)
        copies = {n: tensors.pop(n) for n in ("embed_tokens.weight", "lm_head.weight") if layout not in NATIVE and n in tensors}
        drafter = _assemble(_class_of(layout), shape, tensors, d2t, target.dtype, folder)
    except (TypeError, AttributeError, KeyError, RuntimeError) as error:  # a number where a dict belongs, sizes beyond any memory, …
        raise ValueError(f"{folder / CONFIG} is malformed: {_line(error)}. Restore it from where the drafter came from") from error
    drafter.sts_temperatures = tuple(map(float, values.get("sts_temperatures") or ()))
    drafter.attach(target)
    if (path := folder / FILE).exists():
        drafter.phrases = load_phrases(path, None if target.dtype == torch.float16 else target.digest, target.vocab_size)
    _check_copies(copies, target, d2t, folder)
    if layout in NATIVE and target.dtype == torch.float16:
        log.warning("%s: not checked against the target's digest, since float16 does not hold every bfloat16 weight", folder)
    elif layout in NATIVE and config.get("target_digest") != target.digest:
        made_for = f"{config.get('target')!r} (weights {config.get('target_digest')!r})"
        found = f"{target.name} (weights {target.digest})"
        raise ValueError(f"the drafter in {folder} was made for {made_for}, not for {found}: load that target, or train a drafter for this")
    drafter.eval().requires_grad_(False)
    return drafter.pack() if isinstance(target.head, PackedLinear) else drafter


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
            raise ValueError(f"the shards in {folder} and {INDEX} differ in {_some(different)}: fetch the drafter again")
    else:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        found = f"only pickled weights ({_some(pickled)}), which can run code when loaded" if pickled else f"no {WEIGHTS}"
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


def _values(config: dict, folder: Path) -> tuple[str, dict]:
    """The layout, and the values of DrafterConfig under its own names."""
    known = {"architectures": config.get("architectures")}
    if "speculators_model_type" in config:
        known = {name: config.get(name) for name in ("speculators_model_type", "sample_from_anchor")}
        if known == {"speculators_model_type": SPECULATORS, "sample_from_anchor": True} and not config.get("topk_context"):
            taps = [i - 1 for i in config["aux_hidden_state_layer_ids"]]  # theirs count the embedding as 0
            return SPECULATORS, config | _backbone(config["transformer_layer_config"], folder) | {"target_layer_ids": taps}
    elif config.get("architectures") == [REFERENCE]:
        return REFERENCE, config | _backbone(config, folder) | {"draft_vocab_size": None}
    elif config.get("architectures") in [[name] for name in NATIVE]:
        known["format_version"] = config.get("format_version")
        if known["format_version"] == FORMAT_VERSION:
            return config["architectures"][0], config
    readable = f"{' and '.join(NATIVE)} {FORMAT_VERSION}, {REFERENCE}, and speculators' {SPECULATORS} with sample_from_anchor true"
    raise ValueError(f"{folder / CONFIG} describes no drafter that can be read: {known}. Readable are {readable}")


def _backbone(config: dict, folder: Path) -> dict:
    """What a transformers config says about the layers. Raises ValueError for layers that a Drafter does not have."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    unlike = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (config.get("attention_bias") or False, False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        **{f"layer_types[{i}]": (kind, "full_attention") for i, kind in enumerate(config.get("layer_types") or ())},
    }
    for name, (value, known) in unlike.items():
        if value != known:
            raise ValueError(f"{folder / CONFIG}: {name} {value!r} is not supported, only {known!r}: use another drafter or train one")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    found = {name: config.get(name) for name in (*names, "rms_norm_eps", "head_dim")}
    return found | {"rope_theta": config.get("rope_theta", rope.get("rope_theta"))}


def _shape(values: dict, folder: Path) -> DrafterConfig:
    """A DrafterConfig, every value of the right type and in range."""
    present = {f: values.get(f.name) for f in fields(DrafterConfig) if f.name not in OPTIONAL or values.get(f.name) is not None}
    for field, value in present.items():
        zero_is_fine = field.name in ("markov_rank", "mask_token_id") and type(value) is int and value == 0
        if not zero_is_fine and not VALID[field.type](value):
            raise ValueError(f"{folder / CONFIG}: {field.name} is {value!r}, not a {field.type} in range: restore the file")
    shape = DrafterConfig(**{field.name: value for field, value in present.items()})
    heads, pairs, odd = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim % 2
    temperatures = values.get("sts_temperatures") or []
    for name, value, fits in (
        ("mask_token_id", shape.mask_token_id, shape.mask_token_id < shape.vocab_size),
        ("num_key_value_heads", pairs, heads % pairs == 0),
        ("head_dim", shape.head_dim, not odd),
        ("sts_temperatures", temperatures, len(temperatures) in (0, shape.block_size) and all(map(VALID["float"], temperatures))),
    ):
        if not fits:
            raise ValueError(f"{folder / CONFIG}: {name} {value!r} does not fit the other values there: restore the file")
    return shape


def _check_sizes(shape: DrafterConfig, target: Target, folder: Path) -> None:
    """Sizes that no weight bears witness to, before anything is allocated by them."""
    for name, value, most in (("vocab_size", shape.vocab_size, target.vocab_size), ("block_size", shape.block_size, target.max_context)):
        if value > most:
            raise ValueError(f"{folder / CONFIG}: {name} is {value}, but {target.name} has {most}: load the target it was made for")


def _d2t(shape: DrafterConfig, layout: str, tensors: dict[str, Tensor], folder: Path) -> Tensor:
    """The draft vocabulary as ids of the target's, [draft_vocab] int64; takes its tensors out of ``tensors``."""
    count = shape.draft_vocab_size
    if count == shape.vocab_size:
        return torch.arange(count)
    stored = tensors.pop("d2t", torch.empty(0))
    d2t = stored.long()
    if layout == SPECULATORS and d2t.shape == (count,):  # they store how far each id lies behind its place
        d2t = d2t + torch.arange(count)
        tensors.pop("t2d", None)  # the same set once more, as a mask
    whole = not (stored.is_floating_point() or stored.is_complex())
    if d2t.shape != (count,) or not whole or (d2t.diff() <= 0).any() or d2t[0] < 0 or d2t[-1] >= shape.vocab_size:
        found = f"{stored.dtype} {list(d2t.shape)} from {int(d2t.min())} to {int(d2t.max())}" if d2t.numel() else "none"
        raise ValueError(f"{folder} needs d2t, {count} ids rising strictly within 0..{shape.vocab_size - 1}, and has {found}: restore it")
    return d2t


def _class_of(layout: str) -> type[Drafter]:
    """Drafter, or a baseline's class."""
    module, name = NATIVE.get(layout, NATIVE[Drafter.architecture]).split(":")
    return getattr(importlib.import_module(module), name)


def _assemble(
    kind: type[Drafter], shape: DrafterConfig, tensors: dict[str, Tensor], d2t: Tensor, dtype: torch.dtype, folder: Path
) -> Drafter:
    layers = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    if layers != shape.num_hidden_layers:
        raise ValueError(f"the weights in {folder} have {layers} layers, but num_hidden_layers is {shape.num_hidden_layers}: restore them")
    try:
        with torch.device("meta"):  # shapes without memory: the weights that were read become the parameters
            drafter = kind(shape)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    expected = dict(drafter.named_parameters())
    for problem, names in (("lack", expected.keys() - tensors.keys()), ("have unexpected", tensors.keys() - expected.keys())):
        if names:
            raise ValueError(f"the weights in {folder} {problem} {_some(sorted(names))}: they do not fit the {CONFIG} beside them")
    for name, tensor in tensors.items():
        found, asked = f"{tensor.dtype} {list(tensor.shape)}", list(expected[name].shape)
        if not tensor.is_floating_point() or tensor.element_size() == 1 or tensor.shape != expected[name].shape:
            raise ValueError(f"{name} in {folder} is {found}, but {CONFIG} asks for {asked} of 16 bits or more, not quantised")
    weights = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    _check_finite(weights, folder)
    drafter.load_state_dict(weights | {"d2t": d2t}, assign=True)
    drafter.head_weight = torch.empty(0)
    return drafter


def _check_finite(tensors: dict[str, Tensor], where: object) -> None:
    for name, tensor in tensors.items():
        if wrong := int((~torch.isfinite(tensor)).sum()):
            raise ValueError(f"{name} in {where} has {wrong} NaN or infinite values as {tensor.dtype}: go back to an earlier checkpoint")


def _check_copies(copies: dict[str, Tensor], target: Target, d2t: Tensor, folder: Path) -> None:
    """The copies of the target's embedding and head are not used; they only show whether this is the drafter's target."""
    owned = {"embed_tokens.weight": target.embedding.weight, "lm_head.weight": target.head_weight}
    for name, copy in copies.items():
        mine = owned[name][d2t] if name == "lm_head.weight" and len(d2t) < target.vocab_size else owned[name]
        difference = math.inf
        if copy.shape == mine.shape:
            theirs, ours = (weight[:: max(1, len(mine) // 1024)].to("cpu", torch.float32) for weight in (copy, mine))
            difference = float((theirs - ours).norm() / ours.norm())
        if not difference < FOREIGN_COPY:
            found = f"{list(copy.shape)} against {list(mine.shape)}, {difference:.0%} apart"
            raise ValueError(f"{name} in {folder} is not {target.name}'s ({found}): load the target that the drafter was made for")


def _some(names: list[str]) -> str:
    shown = [name if name.isprintable() else repr(name) for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
