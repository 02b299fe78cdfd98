"""The drafter on static buffers: its context lies in the target's slots, and a block is drawn without a question to the host."""

from typing import NamedTuple

import torch
from torch import Tensor

from dspark.device.rules import Samplings, choose_each
from dspark.draft.drafter import Drafter
from dspark.verify.graphs import Buffers

Buffer = tuple[Tensor, Tensor]  # one layer's keys and values, two of [slots, kv_heads, capacity, head_dim]


class Drawn(NamedTuple):
    """Blocks of R rows; in static buffers, since another program judges them."""

    tokens: Tensor  # [R, γ] int64, the target's ids
    probs: Tensor  # [R, γ] float32, p_d of each token
    confidence: Tensor  # [R, γ] float32, c_k; NaN without a confidence head
    rows: Tensor  # [R, γ, draft_vocab] float32, what the tokens were drawn from; empty when decoding is greedy


class _SlotContext:
    """One layer's context of all rows, as the backbone sees it: the block's keys and values go after it, where nothing counts yet."""

    def __init__(self, buffers: Buffer, positions: Tensor, context: int) -> None:
        self.buffers, self.positions, self.context = buffers, positions, context

    def append(self, keys: Tensor, values: Tensor) -> Buffer:
        """keys, values: [R, kv_heads, γ, head_dim]; returns two of [R, kv_heads, context, head_dim]."""
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[rows, :, self.positions] = new.transpose(1, 2)
        return tuple(buffer[: len(keys), :, : self.context] for buffer in self.buffers)


class StaticDrafter:
    """What programs do with a drafter. temperatures: [γ] float32, of the confidences."""

    def __init__(self, drafter: Drafter, buffers: Buffers, first: int, temperatures: Tensor) -> None:
        self.drafter, self.buffers, self.first, self.temperatures = drafter, buffers, first, temperatures

    @property
    def layers(self) -> list[Buffer]:
        """The drafter's context, after the target's layers; others once the cache has grown."""
        return self.buffers.layers[self.first :]

    def absorb(self, taps: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Write the context of tokens that the target has processed. taps: [N, m·hidden]; rows, positions: [N], where it goes."""
        for buffers, new in zip(self.layers, self.drafter.context(taps[None], positions[None]), strict=True):
            for buffer, part in zip(buffers, new, strict=True):
                buffer[rows, :, positions] = part[0].transpose(0, 1)

    def draw(
        self, starts: Tensor, anchors: Tensor, context: int, width: int, samplings: Samplings | None, uniforms: Tensor, out: Drawn
    ) -> None:
        """Draft ``width`` tokens in every row (§3.1–3.2).

        starts, anchors: [R], the length of the context and x_0. context: positions of the buffers that attention reads.
        samplings: of the rows; None if all are greedy. uniforms: [R, ≥ width] float64, not read then.
        """
        drafter, heads = self.drafter, self.drafter.markov_head
        block = torch.full((len(starts), drafter.block_size), drafter.config.mask_token_id, device=starts.device)
        block[:, 0] = anchors
        positions = starts[:, None] + torch.arange(drafter.block_size, device=starts.device)
        visible = torch.arange(context, device=starts.device) <= positions[:, -1:]  # the whole context and the whole block
        contexts = [_SlotContext(layer, positions, context) for layer in self.layers]
        hidden = drafter.backbone(block, positions, contexts, [visible[:, None, None]] * len(contexts))
        base, previous, state = drafter.head(hidden[:, :width]).float(), anchors, None
        before = []
        for k in range(width):
            before.append(previous)
            logits, state = drafter.next_logits(base, hidden, k, previous, state)
            if samplings is None:
                chosen = logits.argmax(-1)
                out.probs[:, k] = 1.0
            else:
                out.rows[:, k] = samplings.probs(logits)
                chosen = choose_each(out.rows[:, k], uniforms[:, k]).clamp(min=0)
                out.probs[:, k] = out.rows[:, k].gather(1, chosen[:, None])[:, 0]
            previous = out.tokens[:, k] = drafter.d2t[chosen]
        if drafter.confidence_head is not None:
            embedded = heads.markov_w1.weight[torch.stack(before, 1)].float() if heads is not None else None
            logits = drafter.confidence_head(hidden[:, :width].float(), embedded).float() / self.temperatures[:width]
            out.confidence[:, :width] = logits.sigmoid()
        else:
            out.confidence.fill_(torch.nan)

    def spread(self, rows: Tensor) -> Tensor:
        """[R, draft_vocab] → [R, vocab]: tokens that the drafter cannot propose get probability zero."""
        vocab = self.drafter.config.vocab_size
        return rows if rows.shape[1] == vocab else rows.new_zeros(len(rows), vocab).index_copy_(1, self.drafter.d2t, rows)
