"""From what a format has read to a Drafter: every value, shape and number is checked before it is used."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from dspark.draft.backbone import DrafterConfig
from dspark.draft.drafter import Drafter
from dspark.formats.checkpoint import some
from dspark.target.target import Target

OPTIONAL = ("markov_head_type", "confidence_head_with_markov", "draft_vocab_size")  # the reference omits what it does not use
MAY_BE_ZERO = ("markov_rank", "mask_token_id")
VALID = {  # annotation of a field of DrafterConfig → which values it takes
    "int": lambda v: type(v) is int and 0 < v < 1 << 31,
    "int | None": lambda v: type(v) is int and 0 < v < 1 << 31,
    "float": lambda v: type(v) in (int, float) and 1e-30 < v < 1e30,  # well inside float32
    "bool": lambda v: type(v) is bool,
    "str": lambda v: type(v) is str,
    "tuple[int, ...]": lambda v: type(v) is list and all(type(i) is int for i in v),
}
EXPORTED = frozenset(  # what every layout can say
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim target_layer_ids "
    "mask_token_id block_size markov_rank markov_head_type enable_confidence_head confidence_head_with_markov draft_vocab_size "
    "rms_norm_eps rope_theta".split()
)
FOREIGN_COPY = 0.2  # relative difference: 4-bit quantisation of the target stays below 0.1, unrelated weights are 1.4 apart


@dataclass
class Stored:
    """A drafter as a format describes it; nothing is checked yet."""

    values: dict  # DrafterConfig's fields by name, and sts_temperatures; other entries are ignored
    tensors: dict[str, Tensor]  # the weights, by the names of Drafter's parameters
    kind: type[Drafter] = Drafter
    d2t: Tensor | None = None  # [draft_vocab] target id of each draft id; None: the whole vocabulary
    copies: dict[str, Tensor] = field(default_factory=dict)  # of the target's embedding and head, by their names there
    made_for: tuple[str, str] | None = None  # name and weight digest of its target, if known


def build(stored: Stored, target: Target) -> Drafter:
    """The drafter, attached to its target. Raises ValueError, naming the value, for anything wrong or made for another target."""
    shape, temperatures = _shape(stored.values), stored.values.get("sts_temperatures") or []
    layers = {name.split(".")[1] for name in stored.tensors if name.startswith("layers.")}
    for name, value, fits in (  # checked before anything is allocated by such a size
        ("vocab_size", shape.vocab_size, shape.vocab_size <= target.vocab_size),
        ("block_size", shape.block_size, shape.block_size <= target.max_context),
        ("num_hidden_layers", shape.num_hidden_layers, shape.num_hidden_layers == len(layers)),
        ("num_key_value_heads", shape.num_key_value_heads, shape.num_attention_heads % shape.num_key_value_heads == 0),
        ("head_dim", shape.head_dim, shape.head_dim % 2 == 0),
        ("sts_temperatures", temperatures, len(temperatures) in (0, shape.block_size) and all(map(VALID["float"], temperatures))),
    ):
        if not fits:
            raise ValueError(f"{name} {value!r} does not fit {target.name}, the weights or the other values: restore config.json")
    d2t = _draft_vocabulary(stored.d2t, shape)
    with torch.device("meta"):  # shapes without memory: the weights that were read become the parameters
        drafter = stored.kind(shape)
    _check_shapes(drafter, stored.tensors)
    weights = {name: tensor.to(target.dtype) for name, tensor in stored.tensors.items()}
    check_finite(weights)
    drafter.load_state_dict(weights | {"d2t": d2t}, assign=True)
    drafter.head_weight = torch.empty(0)
    drafter.sts_temperatures = tuple(map(float, temperatures))
    drafter.attach(target)
    _check_copies(stored.copies, target, d2t)
    _check_target(stored.made_for, target)
    return drafter


def weights_of(drafter: Drafter) -> dict[str, Tensor]:
    """A drafter's own weights in bfloat16 on the CPU, to be written. Raises ValueError if one is not finite."""
    tensors = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in drafter.named_parameters()}
    check_finite(tensors)
    return tensors


def refuse_unwritten(drafter: Drafter, layout: str, **only: object) -> None:
    """Raises ValueError, naming the field, for a drafter that another program's layout cannot hold.

    only: fields for which that layout has no other value. A field that came after :data:`EXPORTED` must have its default.
    """
    if type(drafter) is not Drafter:
        raise ValueError(f"{layout} holds a {Drafter.architecture}, not a {drafter.architecture}: use save_drafter")
    for f in fields(drafter.config):
        value = getattr(drafter.config, f.name)
        if value != (expected := only.get(f.name, value if f.name in EXPORTED else f.default)):
            raise ValueError(f"{f.name} is {value!r}, and {layout} holds only {expected!r}: use save_drafter")


def check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if wrong := int((~torch.isfinite(tensor)).sum()):
            raise ValueError(f"{name} has {wrong} NaN or infinite values as {tensor.dtype}: go back to an earlier checkpoint")


def _shape(values: dict) -> DrafterConfig:
    found = {f: values.get(f.name) for f in fields(DrafterConfig) if f.name not in OPTIONAL or values.get(f.name) is not None}
    for f, value in found.items():
        zero = f.name in MAY_BE_ZERO and type(value) is int and value == 0
        if not zero and not VALID[f.type](value):
            raise ValueError(f"{f.name} is {value!r}, not a {f.type} in range: restore config.json")
    return DrafterConfig(**{f.name: value for f, value in found.items()})


def _draft_vocabulary(stored: Tensor | None, shape: DrafterConfig) -> Tensor:
    """[draft_vocab] int64, ids of the target's vocabulary, rising."""
    count = shape.draft_vocab_size
    if stored is None and count == shape.vocab_size:
        return torch.arange(count)
    ids = torch.empty(0).long() if stored is None or stored.is_floating_point() or stored.is_complex() else stored.long()
    if ids.shape != (count,) or (ids.diff() <= 0).any() or ids[0] < 0 or ids[-1] >= shape.vocab_size:
        found = "none" if stored is None else f"{stored.dtype} {list(stored.shape)}"
        found += f" from {int(ids.min())} to {int(ids.max())}" if ids.numel() else ""
        raise ValueError(f"it needs d2t, {count} ids rising strictly within 0..{shape.vocab_size - 1}, and has {found}: restore it")
    return ids


def _check_shapes(drafter: Drafter, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless there is exactly one tensor of the right shape, 16 bits or wider, for each parameter."""
    expected = dict(drafter.named_parameters())
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"the weights do not fit config.json: {some(odd)} missing or unexpected")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() == 1 or tensor.shape != expected[name].shape:
            found, asked = f"{tensor.dtype} {list(tensor.shape)}", list(expected[name].shape)
            raise ValueError(f"{name} is {found}, but config.json asks for {asked} of 16 bits or more, not quantised")


def _check_copies(copies: dict[str, Tensor], target: Target, d2t: Tensor) -> None:
    """The copies are not used: the target has the originals. They only show whether this is the drafter's target."""
    originals = {"embed_tokens.weight": target.embedding.weight, "lm_head.weight": target.head_weight}
    for name, copy in copies.items():
        mine = originals[name][d2t] if name == "lm_head.weight" and len(d2t) < target.vocab_size else originals[name]
        theirs, ours = (weight[:: max(1, len(mine) // 1024)].to("cpu", torch.float32) for weight in (copy, mine))
        if copy.shape != mine.shape or not (theirs - ours).norm() < FOREIGN_COPY * ours.norm():
            found = f"{list(copy.shape)}, is not {target.name}'s, {list(mine.shape)}"
            raise ValueError(f"{name}, {found}: load the target that the drafter was made for")


def _check_target(made_for: tuple[str, str] | None, target: Target) -> None:
    if made_for is None or made_for[1] == target.digest or target.dtype == torch.float16:  # which cannot hold every bfloat16 weight
        return
    theirs, ours = (f"{name!r} (weights {digest!r})" for name, digest in (made_for, (target.name, target.digest)))
    raise ValueError(f"the drafter was made for {theirs}, not for {ours}: load that target, or train a drafter for this one")
