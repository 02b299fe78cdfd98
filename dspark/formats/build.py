"""From what a format has read to a Drafter: every value, shape and number is checked before it is used."""

import math
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn

from dspark.draft.backbone import UNUSUAL, DrafterConfig, Rope
from dspark.draft.drafter import Drafter
from dspark.formats.checkpoint import some
from dspark.formats.layers import ROPE
from dspark.target.target import Target

OPTIONAL = {"markov_head_type", "confidence_head_with_markov", "draft_vocab_size", *UNUSUAL}
MAY_BE_ZERO = ("markov_rank", "mask_token_id")
VALID = {  # annotation of a field of DrafterConfig → which values it takes
    **dict.fromkeys(("int", "int | None"), lambda v: type(v) is int and 0 < v < 1 << 31),
    "float": lambda v: type(v) in (int, float) and 1e-30 < v < 1e30,  # well inside float32
    "bool": lambda v: type(v) is bool,
    "str": lambda v: type(v) is str,
    "tuple[int, ...]": lambda v: type(v) is list and all(type(i) is int for i in v),
    "tuple[bool, ...]": lambda v: type(v) is list and all(type(i) is bool for i in v),
    "tuple[str, ...]": lambda v: type(v) is list and set(v) <= {"embed_tokens", "lm_head"},
    "dict[str, object]": lambda v: type(v) is dict and all(type(x) in (str, bool) or VALID["float"](x) for x in v.values()),
}
VALID["float | None"] = VALID["float"]
FOREIGN_COPY = 0.2  # relative difference: 4-bit quantisation of the target stays below 0.1, unrelated weights are 1.4 apart
SAME = {"rtol": 2**-8, "atol": 1e-6}  # as far as bfloat16 and float16 round
ROWS = 8192  # of a table that are compared at a time


@dataclass
class Stored:
    """A drafter as a format describes it; nothing is checked yet."""

    name: str  # of the format, to be printed
    values: dict  # DrafterConfig's fields by name, and sts_temperatures; other entries are ignored
    tensors: dict[str, Tensor]  # the weights, by the names of Drafter's parameters
    kind: type[Drafter] = Drafter
    d2t: Tensor | None = None  # [draft_vocab] target id of each draft id; None: the whole vocabulary
    copies: dict[str, Tensor] = field(default_factory=dict)  # embedding and head in the file, by their names in the target
    frozen: bool = False  # whether those can only be copies of the target's
    own_scale: float | None = None  # factor of the file's embedding table if that is used
    made_for: tuple[str, str] | None = None  # name and weight digest of its target, if known
    target_layers: object = None  # of its target, if known; some files give the number of taps under that name


def build(stored: Stored, target: Target) -> Drafter:
    """The drafter, attached to its target. Raises ValueError, naming the value, for anything wrong or made for another target."""
    shape, temperatures = shape_of(stored), stored.values.get("sts_temperatures") or []
    layers = {name.split(".")[1] for name in stored.tensors if name.startswith("layers.")}
    if shape.vocab_size > target.vocab_size:
        raise ValueError(f"the drafter has {shape.vocab_size} tokens, {target.name} {target.vocab_size}: it was made for another target")
    for name, value, fits in (  # checked before anything is allocated by such a size
        ("block_size", shape.block_size, shape.block_size <= target.max_context),
        ("mask_token_id", shape.mask_token_id, shape.mask_token_id < target.embedding.weight.shape[0]),
        ("num_target_layers", stored.target_layers, stored.target_layers in (None, target.num_layers, len(shape.target_layer_ids))),
        ("num_hidden_layers", shape.num_hidden_layers, shape.num_hidden_layers == len(layers)),
        ("num_key_value_heads", shape.num_key_value_heads, shape.num_attention_heads % shape.num_key_value_heads == 0),
        ("head_dim", shape.head_dim, shape.head_dim % 2 == 0),
        ("sliding_windows", shape.sliding_windows, min(shape.sliding_windows, default=0) >= 0),
        ("sts_temperatures", temperatures, len(temperatures) in (0, shape.num_drafts) and all(map(VALID["float"], temperatures))),
    ):
        if not fits:
            raise ValueError(f"{name} {value!r} does not fit {target.name}, the weights or the other values: restore config.json")
    d2t = _draft_vocabulary(stored.d2t, shape)
    shape = _with_tables(shape, stored, target, d2t)
    tensors = stored.tensors | {name: stored.copies[name] for name in stored.copies if name.split(".")[0] in shape.own_tables}
    with torch.device("meta"):  # shapes without memory: the weights that were read become the parameters
        drafter = stored.kind(shape)
    expected = dict(drafter.named_parameters())
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"the weights do not fit config.json: {some(odd)} missing or unexpected")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() == 1 or tensor.shape != expected[name].shape:
            found, asked = f"{tensor.dtype} {list(tensor.shape)}", list(expected[name].shape)
            raise ValueError(f"{name} is {found}, but config.json asks for {asked} of 16 bits or more, not quantised")
    weights = {name: tensor.to(target.dtype) for name, tensor in tensors.items()}
    check_finite(weights)
    drafter.load_state_dict(weights | {"d2t": d2t}, assign=True)
    drafter.head_weight = torch.empty(0)
    drafter.sts_temperatures = tuple(map(float, temperatures))
    drafter.attach(target)
    # float16 cannot hold every bfloat16 weight, so its digest is another one.
    if stored.made_for and stored.made_for[1] not in (None, target.digest) and target.dtype != torch.float16:
        theirs, ours = (f"{name!r} (weights {digest!r})" for name, digest in (stored.made_for, (target.name, target.digest)))
        other = "or, as any drafts leave the text exact, ignore its field target_digest"
        raise ValueError(f"the drafter was made for {theirs}, not for {ours}: load that target, train a drafter for this one, {other}")
    return drafter


def weights_of(drafter: Drafter) -> dict[str, Tensor]:
    """A drafter's own weights in bfloat16 on the CPU, to be written. Raises ValueError if one is not finite."""
    tensors = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in drafter.named_parameters()}
    check_finite(tensors)
    return tensors


def written_layers(shape: DrafterConfig) -> dict[str, object]:
    """What other programs' configs say of our layers, which are Qwen3's, beside their sizes."""
    return {
        "layer_types": ["full_attention"] * shape.num_hidden_layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def refuse_unwritten(drafter: Drafter, layout: str, target: Target | None = None, **only: object) -> None:
    """Raises ValueError, naming the field, for a drafter that another program's layout cannot hold: none takes unusual fields.

    target: given where that program reads the target's embedding table as it is stored, even if the target itself scales it.
    only: fields for which that layout has no other value.
    """
    if type(drafter) is not Drafter:
        raise ValueError(f"{layout} holds a {Drafter.architecture}, not a {drafter.architecture}: use save_drafter")
    config = drafter.config
    odd = config.unusual() | {name: getattr(config, name) for name in only if getattr(config, name) != only[name]}
    if target is not None and type(target.embedding) is not nn.Embedding and (scale := odd.pop("embedding_scale", None)) != 1.0:
        raise ValueError(f"embedding_scale is {scale!r}, and {layout} takes {target.name}'s table as it is stored: use save_drafter")
    for name, value in odd.items():
        holds = f"holds only {only[name]!r}" if name in only else "has no such field"
        raise ValueError(f"{name} is {value!r}, and {layout} {holds}: use save_drafter")


def foreign(theirs: Tensor, ours: Tensor) -> bool:
    """Whether rows of a table are no copy of ours, quantised or not."""
    theirs, ours = theirs.to("cpu", torch.float32), ours.to("cpu", torch.float32)
    return not (theirs - ours).norm() < FOREIGN_COPY * ours.norm()


def check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if wrong := int((~torch.isfinite(tensor)).sum()):
            raise ValueError(f"{name} has {wrong} NaN or infinite values as {tensor.dtype}: go back to an earlier checkpoint")


def shape_of(stored: Stored) -> DrafterConfig:
    """The drafter's config. Raises ValueError, naming the field, for a value of the wrong kind or out of range."""
    values = stored.values
    found = {f: values.get(f.name) for f in fields(DrafterConfig) if f.name not in OPTIONAL or values.get(f.name) is not None}
    for f, value in found.items():
        zero = f.name in MAY_BE_ZERO and type(value) is int and value == 0
        if not zero and not VALID[f.type](value):
            raise ValueError(f"{f.name} is {value!r}, not a {f.type} in range: restore config.json")
    shape = DrafterConfig(**{f.name: value for f, value in found.items()})
    if shape.rope_scaling:
        if (kind := shape.rope_scaling.get("rope_type")) not in ROPE:
            raise ValueError(f"rope_type is {kind!r}, and only default, {', '.join(ROPE)} are supported: restore config.json")
        rope = Rope.at(torch.ones(1, 1), shape, torch.float32)
        if rope.sin.shape[-1] != shape.head_dim or not math.isfinite(rope.sin.sum() + rope.cos.sum()):
            raise ValueError(f"rope_scaling {shape.rope_scaling} does not rotate heads of {shape.head_dim}: restore config.json")
    return shape


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


def _with_tables(shape: DrafterConfig, stored: Stored, target: Target, d2t: Tensor) -> DrafterConfig:
    """Which embedding and head are used: the target's where the file has none or equal ones, else the file's, as in its training.
    Raises ValueError for tables of another shape, and for unlike ones in a format that holds nothing but copies of the target's."""
    originals = {"embed_tokens.weight": target.embedding.weight, "lm_head.weight": target.head_weight}
    own, scale = list(shape.own_tables), shape.embedding_scale
    for name, copy in stored.copies.items():
        mine = originals[name][d2t] if name == "lm_head.weight" and len(d2t) < target.vocab_size else originals[name]
        some_rows = slice(None, None, max(1, len(mine) // 1024))
        if copy.shape != mine.shape or (stored.frozen and foreign(copy[some_rows], mine[some_rows])):
            found = f"{list(copy.shape)}, is not {target.name}'s, {list(mine.shape)}"
            raise ValueError(f"{name}, {found}: load the target that the drafter was made for")
        parts = zip(copy.split(ROWS), mine.split(ROWS), strict=True)
        if not all(torch.allclose(a.to("cpu", torch.float32), b.to("cpu", torch.float32), **SAME) for a, b in parts):
            own.append(name.split(".")[0])
    if "embed_tokens" in own and scale is None:
        scale = stored.own_scale
    plain = "embed_tokens" in own or type(target.embedding) is nn.Embedding
    return replace(shape, own_tables=tuple(own), embedding_scale=None if plain and scale == 1.0 else scale)
