"""What a GGUF file says about a target that transformers does not read: scaled rotary positions, all ends of a text, its number format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import gguf
import torch

ENDS = ("eos", "eot", "eom")  # of the text, of a turn, of a message before a tool answers
FULL = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)  # matrices with more digits than bfloat16 holds
KNOWN = {"type", "factor", "original_context_length", "attn_factor", "finetuned"}
KNOWN |= {f"yarn_{name}" for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow", "log_multiplier")}
NEUTRAL = {"yarn_ext_factor": (None, 1.0, -1.0), "yarn_log_multiplier": (None, 0.0)}  # values that change nothing


class Header(NamedTuple):
    """What one GGUF file says."""

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
