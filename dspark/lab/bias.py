"""What the Markov bias does to a drafted token, on a known text whose own tokens serve as accepted drafts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.lab.figures import distributions
from dspark.target.target import Target


@torch.inference_mode()
def known_blocks(target: Target, drafter: Drafter, token_ids: Sequence[int], anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks after some positions of a known text.

    anchors: [n] int64, positions in the text. Returns probabilities at temperature 1 over the draft vocabulary, [n, γ, draft_vocab]
    each: of the drafter with its Markov bias, without it, and of the target. Raises ValueError for an anchor at the start of the text
    or with fewer than γ − 1 tokens after it.
    """
    last = len(token_ids) - drafter.block_size
    if len(anchors) == 0 or not (1 <= int(anchors.min()) and int(anchors.max()) <= last):
        raise ValueError(f"anchors {anchors.tolist()} must be one or more of 1..{last} in a text of {len(token_ids)} tokens")
    ids = torch.tensor([list(token_ids)], device=target.device)
    logits, taps = target.forward(ids, None, drafter.target_layer_ids)
    positions = (anchors[:, None] + torch.arange(drafter.block_size)).to(target.device)[None]  # [1, n, γ]
    previous = ids[0][positions]
    tokens = torch.full_like(previous, drafter.config.mask_token_id)
    tokens[..., 0] = previous[..., 0]
    hidden = drafter.block_hidden(ids, taps, tokens, previous, positions)
    # One block, then one latent at a time, as in drafting: an 8-bit layer rounds all rows of its input by one scale.
    base, head = torch.stack([drafter.head(block).float() for block in hidden[0]]), drafter.markov_head
    biased = base
    if head is not None:
        latents = head.latents(hidden, head.markov_w1(previous)).flatten(0, -2)  # [n·γ, r]
        biased = base + torch.stack([head.markov_w2(latent).float() for latent in latents]).view_as(base)
    return biased.softmax(-1), base.softmax(-1), logits[0].float().softmax(-1)[:, drafter.d2t][positions[0]]


def known_text_acceptance(target: Target, drafter: Drafter, token_ids: Sequence[int], first: int) -> tuple[np.ndarray, np.ndarray]:
    """Conditional acceptance Σ min(p_d, p_t) at temperature 1 for the block after every position from ``first`` on.

    Returns two arrays [anchors, γ]: with the Markov bias and without it.
    """
    anchors = torch.arange(first, len(token_ids) - drafter.block_size + 1)
    biased, base, p_target = known_blocks(target, drafter, token_ids, anchors)
    return tuple(torch.minimum(p, p_target).sum(-1).cpu().numpy() for p in (biased, base))


def bias_figure(target: Target, drafter: Drafter, token_ids: Sequence[int], at: int, slot: int, top: int = 6) -> go.Figure:
    """The most probable tokens at one slot (1..γ) of the block after ``token_ids[at]``: target, drafter with and without its bias."""
    if not 1 <= slot <= drafter.block_size:
        raise ValueError(f"slot {slot} is not in the block: choose 1 to {drafter.block_size}")
    biased, parallel, p_target = (p[0, slot - 1] for p in known_blocks(target, drafter, token_ids, torch.tensor([at])))
    places = torch.stack([biased, parallel, p_target]).amax(0).topk(min(top, len(p_target))).indices
    labels = [f"“{target.decode([token])}” {token}".replace("\n", "↵") for token in drafter.d2t[places].tolist()]
    named = {"target": p_target, "drafter with the bias": biased, "drafter without it": parallel}
    without, kept = (float(torch.minimum(p, p_target).sum()) for p in (parallel, biased))
    after = target.decode([token_ids[at + slot - 1]]).replace("\n", "↵")
    title = f"Slot {slot}, after “{after}”: {without:.0%} accepted without the bias, {kept:.0%} with it (n = 1 place)"
    return distributions({name: p[places].tolist() for name, p in named.items()}, labels, title)
