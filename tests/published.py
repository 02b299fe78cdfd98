"""Published drafters made small: configs with their own fields, random weights under the published names, and what a block computes.

:func:`block` is written from the published equations, slot by slot and head by head, and shares nothing with the package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, VOCAB, HEAD_DIM, RANK, MASK, WINDOW, LAYERS = 32, 48, 100, 8, 8, 3, 6, 9
SMALL = {
    "hidden_size": HIDDEN,
    "target_hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
    "head_dim": HEAD_DIM,
    "global_head_dim": 2 * HEAD_DIM,
    "markov_rank": RANK,
    "mask_token_id": MASK,
    "sliding_window": WINDOW,
    "original_max_position_embeddings": 64,
}


def config_files() -> list[Path]:
    """The published configs that lie beside the checkout; none where there is no such folder."""
    folders = [parent / "shared" / "configs" for parent in Path(__file__).resolve().parents]
    return sorted(next((folder for folder in folders if folder.is_dir()), Path()).glob("*.json"))


def small(config: dict) -> dict:
    """The same fields with small sizes: 32 wide, 100 tokens, the first taps; flags, kinds, block and layers stay."""
    shrunk = {}
    for name, value in config.items():
        if isinstance(value, dict):
            value = small(value)
        elif name in SMALL and value:
            value = SMALL[name]
        elif name == "draft_vocab_size" and value:
            value = VOCAB if value == config.get("transformer_layer_config", config).get("vocab_size") else 40
        elif name == "num_target_layers":
            value = LAYERS
        elif name in ("target_layer_ids", "aux_hidden_state_layer_ids"):
            value = list(range(len(value)))
        elif name == "num_attention_heads":
            value = 4
        elif name in ("num_key_value_heads", "num_global_key_value_heads"):
            value = 4 if value == config["num_attention_heads"] else 2 if value > 1 else 1
        shrunk[name] = value
    return shrunk


def weights(config: dict, seed: int = 0, **has: bool) -> dict[str, Tensor]:
    """Random weights of a small config under the published names. has: d2t, bias, embed_tokens, lm_head."""
    c = config | (config.get("dflash_config") or {}) | (config.get("transformer_layer_config") or {})
    gemma, generator = "global_head_dim" in c, torch.Generator().manual_seed(seed)
    h, d, heads, draft = c["hidden_size"], c["global_head_dim"] if gemma else HEAD_DIM, c["num_attention_heads"], VOCAB
    groups, taps = c["num_global_key_value_heads"] if gemma else c["num_key_value_heads"], c.get("target_layer_ids")
    shapes = {"fc.weight": (h, h * len(taps or c["aux_hidden_state_layer_ids"])), "hidden_norm.weight": (h,), "norm.weight": (h,)}
    norms = ("input_layernorm", "post_attention_layernorm", *(("pre_feedforward_layernorm", "post_feedforward_layernorm") * gemma))
    for i in range(c["num_hidden_layers"]):
        at = f"layers.{i}."
        shapes |= {f"{at}{name}.weight": (h,) for name in norms}
        sides = {"q": heads, "k": groups} | ({} if gemma else {"v": groups})
        shapes |= {f"{at}self_attn.{side}_proj.weight": (count * d, h) for side, count in sides.items()}
        shapes |= {f"{at}self_attn.{side}_norm.weight": (d,) for side in "qk"} | {f"{at}self_attn.o_proj.weight": (h, heads * d)}
        if has.get("bias"):
            shapes |= {f"{at}self_attn.{side}_proj.bias": (count * d,) for side, count in sides.items()}
            shapes[f"{at}self_attn.o_proj.bias"] = (h,)
        shapes |= {f"{at}mlp.{name}_proj.weight": (INNER, h) for name in ("gate", "up")} | {f"{at}mlp.down_proj.weight": (h, INNER)}
        shapes |= {f"{at}layer_scalar": (1,)} if gemma else {}
    if has.get("d2t"):
        draft = c["draft_vocab_size"]
    rank = c.get("markov_rank") or 0
    if rank:
        shapes |= {"markov_head.markov_w1.weight": (VOCAB, rank), "markov_head.markov_w2.weight": (draft, rank)}
        kind = c.get("markov_head_type")
        if kind == "gated":
            shapes |= {"markov_head.gate_proj.weight": (rank, h + rank), "markov_head.gate_proj.bias": (rank,)}
        if kind == "rnn":
            shapes |= {"markov_head.joint_proj.weight": (3 * rank, 2 * rank + h), "markov_head.joint_proj.bias": (3 * rank,)}
    if c.get("enable_confidence_head"):
        reads = h + rank * bool(c.get("confidence_head_with_markov", True))
        shapes |= {"confidence_head.proj.weight": (1, reads), "confidence_head.proj.bias": (1,)}
    if has.get("embed_tokens"):
        shapes["embed_tokens.weight"] = (VOCAB, h)
    if has.get("lm_head"):
        shapes["lm_head.weight"] = (draft, h)
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 + ("norm" in name or "scalar" in name) for name, shape in shapes.items()}
    if has.get("d2t"):
        ids = torch.randperm(VOCAB, generator=generator)[:draft].sort().values
        mask = torch.zeros(VOCAB, dtype=torch.bool)
        mask[ids] = True
        tensors |= {"d2t": ids - torch.arange(draft), "t2d": mask}
    return tensors


def write(folder: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def whole(layer: int, slot: int, key: int, anchor: int) -> bool:
    """Every slot sees the whole context and the whole block."""
    return True


@dataclass
class Facts:
    """What a published description says of a drafter beside its weights."""

    slots: int
    layers: int
    frequencies: list[float]  # d/2 angles per position
    heads: int = 4
    groups: int = 2
    neighbours: bool = False  # rotated pairs are (2i, 2i+1) instead of (i, i + d/2)
    boost: float = 1.0  # of cosines and sines
    first: int = 0  # the first slot that predicts
    warm: bool = False  # the rnn's state passes through slot 0 all the same
    kind: str = "vanilla"
    sees: Callable[[int, int, int, int], bool] = whole  # (layer, slot, position of the key, position of the anchor)
    gemma: bool = False
    cap: float = 0.0
    act: Callable[[Tensor], Tensor] = torch.nn.functional.silu
    eps: float = 1e-6


def frequencies(theta: float, d: int = HEAD_DIM) -> list[float]:
    return [theta ** (-2 * i / d) for i in range(d // 2)]


def yarn(theta: float, factor: float, original: int, fast: float = 32.0, slow: float = 1.0, d: int = HEAD_DIM) -> tuple[list[float], float]:
    """Peng et al., 2023: slow dimensions are interpolated, fast ones kept, and the attention is sharpened."""
    at = lambda turns: d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))  # noqa: E731
    low, high = max(math.floor(at(fast)), 0), min(math.ceil(at(slow)), d - 1)
    kept = [1 - min(max((i - low) / (high - low or 0.001), 0), 1) for i in range(d // 2)]
    return [f * k + f / factor * (1 - k) for f, k in zip(frequencies(theta, d), kept, strict=True)], 0.1 * math.log(factor) + 1


def block(f: Facts, w: dict[str, Tensor], taps: Tensor, anchor: int, table: Tensor, head: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """Greedy draft ids, logits [drafts, vocabulary of the head] and confidence logits [drafts] after a context. taps: [tokens, m·h]."""

    def normed(x: Tensor, weight: Tensor | float) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + f.eps).sqrt() * weight

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def turned(x: Tensor, position: int) -> Tensor:
        out, d = x.clone(), x.shape[-1]
        for i, frequency in enumerate(f.frequencies):
            a, b = (2 * i, 2 * i + 1) if f.neighbours else (i, i + d // 2)
            cos, sin = math.cos(position * frequency) * f.boost, math.sin(position * frequency) * f.boost
            out[..., a], out[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., b] * cos + x[..., a] * sin
        return out

    start = len(taps)
    context = normed(taps @ w["fc.weight"].T, w["hidden_norm.weight"])
    x = table[[anchor, *[MASK] * (f.slots - 1)]]
    for n in range(f.layers):
        at = f"layers.{n}."
        inner = normed(x, w[at + "input_layernorm.weight"])
        both, d = torch.cat([context, inner]), len(w[at + "self_attn.q_norm.weight"])
        queries = linear(inner, at + "self_attn.q_proj").view(-1, f.heads, d)
        keys = linear(both, at + "self_attn.k_proj").view(-1, f.groups, d)
        values = normed(keys, 1.0) if f.gemma else linear(both, at + "self_attn.v_proj").view(-1, f.groups, d)
        queries = normed(queries, w[at + "self_attn.q_norm.weight"])
        keys = normed(keys, w[at + "self_attn.k_norm.weight"])
        queries = torch.stack([turned(q, start + s) for s, q in enumerate(queries)])
        keys = torch.stack([turned(k, p) for p, k in enumerate(keys)])
        mixed = torch.zeros(f.slots, f.heads, d)
        for s in range(f.slots):
            seen = [p for p in range(start + f.slots) if f.sees(n, s, p, start)]
            for a in range(f.heads):
                g = a // (f.heads // f.groups)
                scores = keys[seen, g] @ queries[s, a] * (1.0 if f.gemma else d**-0.5)
                mixed[s, a] = scores.softmax(0) @ values[seen, g]
        attended, after = linear(mixed.flatten(1), at + "self_attn.o_proj"), w[at + "post_attention_layernorm.weight"]
        x = x + (normed(attended, after) if f.gemma else attended)
        inner = normed(x, w[at + "pre_feedforward_layernorm.weight"] if f.gemma else after)
        out = linear(f.act(linear(inner, at + "mlp.gate_proj")) * linear(inner, at + "mlp.up_proj"), at + "mlp.down_proj")
        x = x + (normed(out, w[at + "post_feedforward_layernorm.weight"]) if f.gemma else out)
        x = x * w[at + "layer_scalar"] if f.gemma else x
    hidden = normed(x, w["norm.weight"])
    logits = hidden @ head.T
    logits = f.cap * torch.tanh(logits / f.cap) if f.cap else logits
    ids = w["d2t"] + torch.arange(len(w["d2t"])) if "d2t" in w else torch.arange(VOCAB)
    previous, state, tokens, rows, sure = anchor, torch.zeros(RANK), [], [], []
    for s in range(0 if f.warm else f.first, f.slots):
        row, embedded = logits[s], None
        if "markov_head.markov_w1.weight" in w:
            latent = embedded = w["markov_head.markov_w1.weight"][previous]
            if f.kind == "gated":
                latent = linear(torch.cat([hidden[s], embedded]), "markov_head.gate_proj").sigmoid() * embedded
            if f.kind == "rnn":
                gate, candidate, output = linear(torch.cat([state, embedded, hidden[s]]), "markov_head.joint_proj").chunk(3)
                state, latent = gate.sigmoid() * state + (1 - gate.sigmoid()) * candidate.tanh(), output.tanh()
            row = row + w["markov_head.markov_w2.weight"] @ latent
        if s < f.first:
            continue
        if "confidence_head.proj.weight" in w:
            reads = torch.cat([hidden[s], embedded]) if w["confidence_head.proj.weight"].shape[1] > HIDDEN else hidden[s]
            sure.append(linear(reads, "confidence_head.proj")[0])
        rows.append(row)
        previous = int(ids[row.argmax()])
        tokens.append(previous)
    return tokens, torch.stack(rows), torch.stack(sure) if sure else torch.empty(0)
