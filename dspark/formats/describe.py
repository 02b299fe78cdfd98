"""What a drafter's folder holds, read from its config.json and the headers of its weights alone."""

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dspark.draft.backbone import DrafterConfig
from dspark.files import one_line
from dspark.formats import read
from dspark.formats.build import Stored, shape_of
from dspark.formats.checkpoint import CONFIG, read_config
from dspark.formats.layers import TABLES, Refusal

MOST = 20  # refused fields that are looked for


def describe(folder: Path, ignore_fields: Collection[str] = ()) -> dict[str, str]:
    """Lines to print, by name; those that begin with "refused" say why it would not load.
    ignore_fields: as for :func:`dspark.load_drafter`. Raises ValueError for a folder without a readable config.json or weights."""
    config, tensors = read_config(folder / CONFIG), read_shapes(folder)
    size = f"{sum(t.numel() * t.element_size() for t in tensors.values()):,} bytes in {len(tensors)} tensors" if tensors else "no weights"
    stored, refusals = try_to_read(config, tensors, ignore_fields)
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    named = verifier.get("name_or_path") or " ".join(verifier.get("architectures") or ())
    layers = config.get("num_target_layers") or (config.get("dflash_config") or {}).get("num_target_layers") or "unknown number of"
    target = stored.made_for[0] if stored and stored.made_for else named
    lines = {"format": stored.name if stored else "unknown", "target": str(target or f"not named; {layers} layers")}
    if stored:
        try:
            lines |= _shape(shape_of(stored), sorted(TABLES & tensors.keys()), stored.values.get("sts_temperatures"))
        except (ValueError, TypeError) as error:
            refusals.append(one_line(error))
    return lines | {"size": size} | {"refused" + f" {i}" * (i > 1): text for i, text in enumerate(refusals, 1)}


def read_shapes(folder: Path) -> dict[str, Tensor]:
    """Tensors of a folder's files without their values, on the meta device."""
    tensors = {}
    for path in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    shape = file.get_slice(name).get_shape()
                    dtype = (file.get_slice(name)[:0] if shape else file.get_tensor(name)).dtype
                    tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({one_line(error)}): fetch the drafter again") from None
    return tensors


def try_to_read(config: dict, tensors: dict[str, Tensor], ignore_fields: Collection[str]) -> tuple[Stored | None, list[str]]:
    """What is stored, and every reason to refuse it: each refused field is ignored to find the next."""
    refusals, ignored = [], list(ignore_fields)
    for _ in range(MOST):
        try:
            return read(config, dict(tensors), ignored), refusals
        except Refusal as refusal:
            refusals.append(str(refusal))
            if refusal.field in ("architectures", "speculators_model_type", *ignored):
                break
            ignored.append(refusal.field)
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError) as error:
            refusals.append(f"config.json is malformed: {one_line(error)}")
            break
    return None, refusals


def _shape(shape: DrafterConfig, tables: list[str], temperatures: object) -> dict[str, str]:
    drafts = f"{shape.block_size} slots, {shape.num_drafts} drafts"
    sees = ["the whole context" if not window else f"{window} tokens" for window in shape.sliding_windows or [0]]
    order = ["causal" if causal else "bidirectional" for causal in shape.causal_layers or [False]]
    rope = shape.rope_scaling or {"rope_type": "default"}
    head = f"{shape.markov_head_type} of rank {shape.markov_rank}" if shape.markov_rank else "none (purely parallel)"
    head += f" among {shape.num_candidates} candidates" if shape.num_candidates else ""
    convolutions = f", convolutions over {shape.convolution_kernel} slots" if shape.convolution_kernel else ""
    sure = "with" if shape.enable_confidence_head else "without"
    return {
        "taps": f"after target layers {', '.join(map(str, shape.target_layer_ids))}",
        "block": f"{drafts}: the anchor's slot " + ("predicts, too" if shape.sample_from_anchor else "predicts nothing (1+N)"),
        "layers": f"{shape.num_hidden_layers} of {shape.layer_type}, hidden {shape.hidden_size}, {shape.num_attention_heads} heads, "
        f"{shape.num_key_value_heads} for keys, of {shape.head_dim}{convolutions}",
        "context": ", ".join(dict.fromkeys(sees)) + (" (each layer: " + ", ".join(sees) + ")" if len(set(sees)) > 1 else ""),
        "in a block": ", ".join(dict.fromkeys(order)) + (" (each layer: " + ", ".join(order) + ")" if len(set(order)) > 1 else ""),
        "rotary": f"theta {shape.rope_theta:g}, " + ", ".join(f"{name} {value}" for name, value in rope.items()),
        "heads": f"Markov head: {head}; {sure} confidence" + (", calibrated" if temperatures else ""),
        "vocabulary": f"{shape.draft_vocab_size} of {shape.vocab_size} tokens, mask token {shape.mask_token_id}",
        "tables": f"in the file: {', '.join(tables)}" if tables else "the target's embedding and head",
    }
