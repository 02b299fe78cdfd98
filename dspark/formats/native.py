"""What config.json and the weights beside it mean in each layout: our own, the reference's (DeepSpec) and speculators'."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from dspark.draft.backbone import DrafterConfig
from dspark.draft.drafter import Drafter
from dspark.target.target import Target

NATIVE = {  # architecture → where its class lies: ours is at hand, a baseline is imported when one is read
    "DSparkDrafter": "dspark.draft.drafter:Drafter",
    "EagleDrafter": "dspark.draft.eagle:EagleDrafter",
}
REFERENCE, SPECULATORS = "Qwen3DSparkModel", "dspark"
FORMAT_VERSION = 1
CONFIG = "config.json"
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


def native_config(drafter: Drafter, target: Target) -> dict[str, object]:
    """What config.json says of a drafter in the native layout."""
    about = {"architectures": [drafter.architecture], "format_version": FORMAT_VERSION}
    about |= {"target": target.name, "target_digest": target.digest}
    return about | drafter.config.to_dict() | {"sts_temperatures": list(drafter.sts_temperatures)}


def reference_config(drafter: Drafter, target: Target) -> dict[str, object]:
    """What config.json says of a drafter in the reference layout. Raises ValueError for one which that layout cannot hold."""
    config = drafter.config
    if drafter.architecture != Drafter.architecture:
        raise ValueError(f"the reference layout holds a {Drafter.architecture}, not a {drafter.architecture}: use save_drafter")
    if config.draft_vocab_size < config.vocab_size:
        found = f"the drafter proposes {config.draft_vocab_size} of {config.vocab_size} tokens"
        raise ValueError(f"{found}, which the reference layout cannot hold: use save_drafter, or train one for the whole vocabulary")
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
    return {name: about[name] for name in about if name not in ("draft_vocab_size", "rope_scaling")}


def values_of(config: dict, folder: Path) -> tuple[str, dict]:
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


def shape_of(values: dict, folder: Path) -> DrafterConfig:
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


def check_sizes(shape: DrafterConfig, target: Target, folder: Path) -> None:
    """Sizes that no weight bears witness to, before anything is allocated by them."""
    for name, value, most in (("vocab_size", shape.vocab_size, target.vocab_size), ("block_size", shape.block_size, target.max_context)):
        if value > most:
            raise ValueError(f"{folder / CONFIG}: {name} is {value}, but {target.name} has {most}: load the target it was made for")


def d2t_of(shape: DrafterConfig, layout: str, tensors: dict[str, Tensor], folder: Path) -> Tensor:
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


def class_of(layout: str) -> type[Drafter]:
    """Drafter, or a baseline's class."""
    module, name = NATIVE.get(layout, NATIVE[Drafter.architecture]).split(":")
    return getattr(importlib.import_module(module), name)


def assemble(
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
            raise ValueError(f"the weights in {folder} {problem} {some(sorted(names))}: they do not fit the {CONFIG} beside them")
    for name, tensor in tensors.items():
        found, asked = f"{tensor.dtype} {list(tensor.shape)}", list(expected[name].shape)
        if not tensor.is_floating_point() or tensor.element_size() == 1 or tensor.shape != expected[name].shape:
            raise ValueError(f"{name} in {folder} is {found}, but {CONFIG} asks for {asked} of 16 bits or more, not quantised")
    weights = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    check_finite(weights, folder)
    drafter.load_state_dict(weights | {"d2t": d2t}, assign=True)
    drafter.head_weight = torch.empty(0)
    return drafter


def check_finite(tensors: dict[str, Tensor], where: object) -> None:
    for name, tensor in tensors.items():
        if wrong := int((~torch.isfinite(tensor)).sum()):
            raise ValueError(f"{name} in {where} has {wrong} NaN or infinite values as {tensor.dtype}: go back to an earlier checkpoint")


def check_copies(copies: dict[str, Tensor], target: Target, d2t: Tensor, folder: Path) -> None:
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


def some(names: list[str]) -> str:
    shown = [name if name.isprintable() else repr(name) for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
