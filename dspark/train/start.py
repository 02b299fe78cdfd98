"""A fresh drafter for a target: its shape, its vocabulary, and weights that start close to something useful."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dspark.draft.backbone import DrafterConfig
from dspark.draft.drafter import Drafter
from dspark.load import ready
from dspark.target.target import Target
from dspark.train.corpus import Corpus

LAYERS, BLOCK_SIZE, MARKOV_RANK, DRAFT_VOCAB, TAPS = 2, 5, 48, 8192, 5  # the default shape


def frequent_tokens(target: Target, corpus: Corpus, count: int) -> Tensor:
    """The draft vocabulary d2t: the ``count`` most frequent response tokens, including the ends of text; sorted ids, int64."""
    frequency = torch.bincount(corpus.token_ids[corpus.assistant], minlength=target.vocab_size)
    frequency[list(target.eos_token_ids)] = frequency.max() + 1
    return frequency.topk(min(count, target.vocab_size)).indices.sort().values


def spread(count: int, last: int, first: int = 0) -> tuple[int, ...]:
    """``count`` layers from ``first`` to ``last``, evenly; the last one if only one is asked for."""
    step = (last - first) / max(1, count - 1)
    return tuple(last - int(step * (count - 1 - i) + 0.5) for i in range(count))


def spread_taps(layers: int) -> tuple[int, ...]:
    """The default taps of a target with so many layers: five, evenly from the second to the last but one.

    A shallow target gives fewer; one of a single layer gives −1, its embedding.
    """
    return spread(min(TAPS, max(1, layers - 2)), layers - 2, min(1, layers - 2))


def unused_token(target: Target, corpus: Corpus) -> int:
    """A mask token: a special token without another role that the corpus does not hold, else the last token that it does not hold.

    Raises ValueError if the corpus holds every token.
    """
    added = target.tokenizer.added_tokens_decoder if target.tokenizer else {}
    special = {token for token, about in added.items() if about.special}
    roles = {getattr(target.tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad", "unk", "sep", "cls")}
    unused = set(range(target.vocab_size)) - set(corpus.token_ids.unique().tolist()) - target.eos_token_ids - roles
    if not unused:
        raise ValueError(f"the corpus holds every token of {target.name}: choose a mask token with --mask-token")
    return min(unused & special, default=max(unused))


def untrained_drafter(target: Target, layers: int = LAYERS, block_size: int = BLOCK_SIZE) -> Drafter:
    """A drafter of the default shape with random weights, ready to draft: a block's cost depends on shapes alone."""
    shape = {"num_hidden_layers": layers, "block_size": block_size, "target_layer_ids": spread_taps(target.num_layers)}
    d2t = torch.arange(min(DRAFT_VOCAB, target.vocab_size))
    drafter = drafter_for(target, d2t=d2t, markov_rank=MARKOV_RANK, mask_token_id=0, **shape)
    return ready(drafter.to(target.dtype).attach(target), target)


def drafter_for(
    target: Target,
    *,
    kind: type[Drafter] = Drafter,
    d2t: Tensor | None = None,
    init_layers: tuple[int, ...] = (),
    seed: int = 0,
    **shape: object,
) -> Drafter:
    """A fresh drafter, shaped like the target's layers unless ``shape`` says otherwise.

    kind: Drafter, or the class of a baseline
    d2t: [draft_vocab] int64, the draft vocabulary; None: the target's
    init_layers: the target layers that the drafter's layers start as copies of: weights of the same name and norms that compute the
        same; the rest is random
    shape: any field of DrafterConfig

    Raises ValueError if the target's layers have other sizes than the drafter's, or its embedding another width than its layers.
    """
    if wrong := [i for i in init_layers if not 0 <= i < target.num_layers]:
        raise ValueError(f"init_layers {wrong} do not exist: {target.name} has layers 0 to {target.num_layers - 1}")
    if target.head_weight.shape[1] != target.hidden_size:
        widths = f"an embedding of {target.head_weight.shape[1]} and layers of {target.hidden_size}"
        raise ValueError(f"{target.name} has {widths}, which a drafter cannot share: ContextLookup(None, target=…) drafts without one")
    text = target.config
    heads = _number(text, "num_attention_heads", max(1, target.hidden_size // 64))  # a state-space model has none
    rope = getattr(text, "rope_parameters", None) or {}  # models with several kinds of layers have one of each kind
    config = DrafterConfig(
        **{
            "vocab_size": target.vocab_size,
            "hidden_size": target.hidden_size,
            "intermediate_size": _number(text, "intermediate_size", 4 * target.hidden_size),
            "num_hidden_layers": len(init_layers) or LAYERS,
            "num_attention_heads": heads,
            "num_key_value_heads": _number(text, "num_key_value_heads", heads),
            "head_dim": _number(text, "head_dim", target.hidden_size // heads),
            "rms_norm_eps": _number(text, "rms_norm_eps", 1e-6),
            "rope_theta": (rope.get("full_attention") or rope).get("rope_theta") or 10_000.0,
            "draft_vocab_size": None if d2t is None else len(d2t),
            **shape,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = kind(config)
        for name, weight in drafter.named_parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.02)
            if name.endswith(("markov_w2.weight", "confidence_head.proj.weight")) or ".convolutions." in name:
                torch.nn.init.zeros_(weight)  # start as the purely parallel drafter, without convolutions and with c = ½
    if d2t is not None:
        drafter.d2t.copy_(d2t)
    if init_layers:
        _start_from(drafter, target, init_layers)
    return drafter


def _number(config: object, name: str, default: float) -> float:
    """A number of the target's config, of its last layer where each has its own; ``default`` where there is none."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers raises it for a number that differs from layer to layer
        return default
    return (value[-1] if isinstance(value, Sequence) else value) or default


@torch.no_grad()
def _is_norm(layer: nn.Module, name: str) -> bool:
    """Whether this is the weight of an RMSNorm like the drafter's. Gemma adds one to its weights, a LayerNorm also centres."""
    module, weight = layer.get_submodule(name.rpartition(".")[0]), layer.get_parameter(name)
    x = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    normed = weight.float() * x.float() * x.float().square().mean().rsqrt()
    return torch.allclose(module(x).float(), normed, rtol=0.02, atol=0.02)


def _start_from(drafter: Drafter, target: Target, init_layers: tuple[int, ...]) -> None:
    """Copy the target's layers; the context starts as the deepest tap, normed as the last copied layer expects."""
    for layer, source in zip(drafter.layers, init_layers, strict=False):
        theirs, own = target.layers[source], layer.state_dict()
        copied = {n: w for n, w in theirs.state_dict().items() if n in own and (w.dim() > 1 or _is_norm(theirs, n))}
        try:
            layer.load_state_dict(copied, strict=False)
        except RuntimeError as error:
            raise ValueError(f"target layer {source} cannot start a drafter layer: {str(error).splitlines()[-1].strip()}") from None
    with torch.no_grad():
        drafter.fc.weight.mul_(0.1)[:, -target.hidden_size :] += torch.eye(target.hidden_size)
        if "input_layernorm.weight" in copied:
            drafter.init_context_norm(copied["input_layernorm.weight"])
