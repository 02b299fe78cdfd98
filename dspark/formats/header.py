"""What a GGUF file says about a target that transformers does not read: scaled rotary positions, all ends of a text, its number format."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

ENDS = ("eos", "eot", "eom")  # of the text, of a turn, of a message before a tool answers
FULL = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)  # matrices with more digits than bfloat16 holds
KNOWN = {"type", "factor", "original_context_length", "attn_factor", "finetuned"}
KNOWN |= {f"yarn_{name}" for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow", "log_multiplier")}
NEUTRAL = {"yarn_ext_factor": (None, 1.0, -1.0), "yarn_log_multiplier": (None, 0.0)}  # values that change nothing


class Header:
    """The metadata of one GGUF file, and its tensors by name."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields, self.tensors = reader.fields, {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self.value("general.architecture")

    def value(self, name: str) -> object:
        """None if the file does not have it."""
        return self.fields[name].contents() if name in self.fields else None

    @property
    def end_ids(self) -> list[int]:
        """Every token that ends a text or a turn."""
        found = (self.value(f"tokenizer.ggml.{name}_token_id") for name in ENDS)
        return sorted({token for token in found if token is not None})

    @property
    def dtype(self) -> torch.dtype:
        """float32 where rounding to bfloat16 would change what the file holds, bfloat16 for quantised weights."""
        full = any(tensor.tensor_type in FULL and len(tensor.shape) > 1 for tensor in self.tensors.values())
        return torch.float32 if full else torch.bfloat16

    @property
    def rotary(self) -> dict[str, object]:
        """The scaling of rotary positions as transformers' ``rope_parameters``; {} if they are plain.

        Raises ValueError, naming the entry, for a scaling that would be computed as another one.
        """
        prefix = f"{self.architecture}.rope.scaling."
        said = {name.removeprefix(prefix): self.value(name) for name in self.fields if name.startswith(prefix)}
        wrong = [name for name in said if name not in KNOWN] + [n for n, usual in NEUTRAL.items() if said.get(n) not in usual]
        if wrong:
            raise ValueError(f"{prefix}{wrong[0]} is {said[wrong[0]]!r}, a scaling of rotary positions that is not supported")
        factor = said.get("factor") or self.value(f"{self.architecture}.rope.scale_linear") or 1.0
        kind = said.get("type") or "linear"
        context = self.value(f"{self.architecture}.context_length")
        original = said.get("original_context_length") or context
        attention = said.get("attn_factor") or said.get("yarn_attn_factor") or 1.0
        short, long, both = (self._vector(name) for name in ("rope_factors_short", "rope_factors_long", "rope_freqs"))
        if both is not None and kind != "none" and factor != 1.0:
            raise ValueError(f"rope_freqs.weight and {prefix}type {kind!r} scale rotary positions together, which is not supported")
        if both is not None:  # the same factors at every length
            short = long = both
        if short is not None and long is not None:
            scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention}
            return scaling | {"original_max_position_embeddings": original, "factor": factor}
        if kind == "linear" and factor != 1.0:
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            ramp = {name: said[f"yarn_{name}"] for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in said}
            whole = attention * (0.1 * torch.tensor(factor).log().item() + 1.0)
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, "attention_factor": whole} | ramp
        if kind not in ("none", "linear"):
            raise ValueError(f"{prefix}type is {kind!r}, and its factors are missing: rotary positions would be those of another model")
        return {}

    def _vector(self, name: str) -> list[float] | None:
        tensor = self.tensors.get(f"{name}.weight")
        return None if tensor is None else torch.tensor(tensor.data).flatten().tolist()
