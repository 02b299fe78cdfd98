"""Files that are written whole or not at all, digests of what they hold, and the folders that dspark keeps things in."""

import contextlib
import difflib
import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def write_atomically(path: str | Path, content: bytes | Callable[[Path], object]) -> None:
    """Write one file whole or not at all: its bytes, or a function that writes the file at the path it is given.

    Missing folders are made. After an error or a kill the old file is still there. Raises ValueError if it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    write = content if callable(content) else (lambda scratch: scratch.write_bytes(content))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise ValueError(f"cannot write {path}: {one_line(error)}. Make room or choose another place; what it held is kept") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the text entries of its header. Raises ValueError, with the remedy, for anything else."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise OSError("it is not a file")
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged ({one_line(error)}): {remedy}") from None


def digest(*parts: str | bytes | memoryview) -> str:
    """16 hex digits: the start of the SHA-256 over all parts, one after another."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
    return sha.hexdigest()[:16]


def weights_digest(module: nn.Module, *more: str) -> str:
    """16 hex digits that change with any training: SHA-256 over ``more`` and strided samples of every weight, in bfloat16."""
    parts: list[str | bytes] = [*more]
    for name, weight in sorted(module.named_parameters()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.bfloat16)
        parts += [name, sample.contiguous().view(torch.uint8).numpy().tobytes()]
    return digest(*parts)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def closest(name: str, choices: Iterable[str]) -> str:
    """``, did you mean 'plain'`` for a misspelt name; "" if no choice is like it."""
    folded = {choice.casefold(): choice for choice in choices}
    near = difflib.get_close_matches(name.casefold(), folded, 1)
    return f", did you mean {folded[near[0]]!r}" if near else ""


def is_hub_id(name: str | Path) -> bool:
    """Whether the name can only be that of a repository on the model hub: "org/name", and no path."""
    return str(name).count("/") == 1 and not Path(name).is_absolute() and not str(name).startswith((".", "~"))


def cache_dir() -> Path:
    """Where downloads, converted models and profiles are kept: ``$DSPARK_CACHE``, else the user's cache folder."""
    if chosen := os.environ.get("DSPARK_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark"


def data_dir() -> Path:
    """The data folder: ``$DSPARK_DATA``, else ``data`` beside the package (an editable install or a clone).

    Raises ValueError if there is no such folder.
    """
    chosen = os.environ.get("DSPARK_DATA")
    folder = Path(chosen).expanduser() if chosen else Path(__file__).resolve().parents[1] / "data"
    if not folder.is_dir():
        raise ValueError(f"no data folder at {folder}: set DSPARK_DATA to the repository's data folder, or install with pip install -e")
    return folder
