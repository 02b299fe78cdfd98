"""The drafter M_d: one parallel pass over the block, a sequential head that samples it token by token, and a confidence head that
predicts how likely each token is to be accepted (the paper's §3, semi-autoregressive generation)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.draft.backbone import TRAINED_HERE, Context, DrafterConfig, Layer, RMSNorm, Rope, block_mask
from dspark.draft.gemma4 import Gemma4Layer
from dspark.draft.heads import ConfidenceHead
from dspark.draft.selector import markov_head
from dspark.draft.source import Ask, Draft, Together
from dspark.rewind import GrowingKV
from dspark.verify.sampling import Narrow, OneHot, Rows

Contexts = Sequence[GrowingKV | Context]

if TYPE_CHECKING:
    from dspark.target.target import Target


@dataclass
class DraftState:
    """What the drafter remembers about one request."""

    layers: list[GrowingKV]  # keys and values of the context, one cache per layer; those of a block are dropped after drafting
    pending: list[Tensor] = field(default_factory=list)  # taps [1, tokens, m·hidden] of committed tokens that are not in layers yet


class Drafter(nn.Module, Together):
    """Backbone, Markov head and confidence head; embedding and LM head are the target's, frozen, unless it has tables of its own."""

    architecture = "DSparkDrafter"  # what config.json says

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config, h = config, config.hidden_size
        self.block_size, self.target_layer_ids = config.num_drafts, config.target_layer_ids
        self.has_confidence = config.enable_confidence_head
        self.fc = nn.Linear(len(config.target_layer_ids) * h, h, bias=False)
        self.hidden_norm = RMSNorm(h, eps=config.rms_norm_eps)
        layer = Gemma4Layer if config.layer_type == "gemma4" else Layer
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(h, eps=config.rms_norm_eps)
        self.markov_head = markov_head(config)
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
        if "embed_tokens" in config.own_tables:
            self.embed_tokens = nn.Embedding(config.vocab_size, h)
        if "lm_head" in config.own_tables:
            self.lm_head = nn.Linear(h, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.arange(config.draft_vocab_size))  # the target's id of each token that can be drafted
        self.register_buffer("head_weight", torch.empty(0), persistent=False)  # [draft_vocab, hidden], rows of the target's
        self.sts_temperatures: tuple[float, ...] = ()  # one per position, once calibrated (sequential temperature scaling)
        self.fused: Any = None  # or an object with faster context() and blocks(), put there by dspark.cpu.pack_drafter

    @torch.no_grad()
    def init_context_norm(self, norm_weight: Tensor) -> None:
        """Before training, with layers copied from the target: start from the norm [hidden] that those layers had on their input."""
        self.hidden_norm.weight.copy_(norm_weight)

    def attach(self, target: Target) -> Drafter:
        """Borrow the target's embedding and LM head. Raises ValueError if the drafter was made for another shape of target."""
        for name in ("hidden_size", "vocab_size"):
            if (mine := getattr(self.config, name)) != (theirs := getattr(target, name)):
                raise ValueError(f"the drafter's {name} is {mine}, but {target.name} has {theirs}: it was made for another target")
        target.check_taps(self.config.target_layer_ids)
        self.to(device=target.device)
        ids = torch.arange(len(self.d2t), device=target.device)
        self.t2d = ids.new_full((self.config.vocab_size,), -1).scatter_(0, self.d2t, ids)  # the inverse; −1 cannot be drafted
        own, scale = self.config.own_tables, self.config.embedding_scale
        table = (self.lm_head.weight if "lm_head" in own else target.head_weight).detach()
        self.head_weight = table if len(table) == len(ids) else table[self.d2t]
        embed = self.embed_tokens if "embed_tokens" in own else target.embedding
        if scale is not None:
            table, factor = embed.weight.detach(), torch.tensor(scale, dtype=target.dtype, device=target.device)
            embed = lambda tokens: F.embedding(tokens, table) * factor  # noqa: E731
        # Borrowed, not submodules: never saved, never trained.
        object.__setattr__(self, "embed", embed)
        object.__setattr__(self, "attached_to", target.embedding)
        object.__setattr__(self, "head", partial(F.linear, weight=self.head_weight))
        return self

    @property
    def bytes_per_token(self) -> int:
        """Of one request's context: keys and values of all layers."""
        itemsize = 4 if self.fused else self.head_weight.dtype.itemsize
        return 2 * len(self.layers) * self.config.num_key_value_heads * self.config.head_dim * itemsize

    # ---- the parallel backbone

    def context(self, taps: Tensor, positions: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values of context tokens. taps: [batch, tokens, m·hidden]; positions: [batch, tokens], None for 0, 1, …"""
        x = self.hidden_norm(self.fc(taps))
        if positions is None:
            positions = torch.arange(taps.shape[1], device=taps.device).expand(len(taps), -1)
        rope = Rope.at(positions, self.config, x.dtype)
        return [layer.self_attn.keys_values(x, rope) for layer in self.layers]

    def backbone(self, tokens: Tensor, positions: Tensor, contexts: Contexts, masks: Sequence[Tensor | None] = ()) -> Tensor:
        """[anchor, mask × (γ−1)] → [batch, n, hidden] after the norm. tokens, positions: [batch, n]; contexts, masks: one per layer, for
        :meth:`dspark.draft.backbone.Attention.forward`; no masks if all is visible in all layers."""
        x = self.embed(tokens)
        rope = Rope.at(positions, self.config, x.dtype)
        for layer, context, mask in zip(self.layers, contexts, masks or [None] * len(contexts), strict=True):
            x = layer(x, rope, context, mask)
        return self.norm(x)

    def block_hidden(self, token_ids: Tensor, taps: Tensor, tokens: Tensor, previous: Tensor, positions: Tensor) -> Tensor:
        """The backbone for many blocks of known texts in one pass, as drafting would compute it; used in training.

        token_ids: [rows, length], the texts; taps: [rows, length, m·hidden]. tokens, positions: [rows, anchors, γ], anchor and masks, and
        where they stand. previous: of this shape, x_{k−1} in the text; it and the ids are read by drafters that override this.
        Returns [rows, anchors, γ, hidden] after the norm. Raises ValueError for a drafter with unusual fields.
        """
        if unusual := self.config.unusual().keys() - TRAINED_HERE:
            raise ValueError(f"{', '.join(unusual)}: a drafter that has these can draft, but not be trained or drawn on known text here")
        contexts = [Context(*kv) for kv in self.context(taps)]
        masks = [block_mask(positions[..., 0], positions.shape[-1], taps.shape[1])] * len(contexts)
        return self.backbone(tokens.flatten(1), positions.flatten(1), contexts, masks).unflatten(1, positions.shape[1:])

    # ---- drafting: backbone → Markov head → confidence head

    def new_state(self, prompt: Sequence[int] = ()) -> DraftState:
        return DraftState([GrowingKV() for _ in self.layers])

    def extend(self, state: DraftState, token_ids: Sequence[int], taps: Tensor) -> None:
        """Add committed tokens to the context. taps: [1, tokens, m·hidden]; the ids are not read: the taps stand for the tokens."""
        state.pending.append(taps)

    @torch.inference_mode()
    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """One block per request, in one parallel pass and at most γ sequential steps for all of them (§3.1–3.2).

        Each has ``window`` tokens; the anchor's position is the length of the context. Raises ValueError unless 1 ≤ window ≤ block_size.
        """
        for ask in asks:
            if not 1 <= ask.window <= self.block_size:
                raise ValueError(f"window {ask.window} must lie in 1..{self.block_size}, the drafter's block size")
        hidden, tokens, rows = self._drawn(asks)
        seen = [(h[: ask.window], [ask.anchor, *block[:-1]]) for ask, h, block in zip(asks, hidden, tokens, strict=True)]
        return [Draft(*each) for each in zip(tokens, map(self._spread, rows, tokens), self._confidence(seen), strict=True)]

    def _drawn(self, asks: Sequence[Ask]) -> tuple[Sequence[Tensor], Sequence[list[int]], Sequence[list[Tensor | OneHot]]]:
        """Every request's block: h_1..h_w [≥ w, hidden], its w tokens, and the w rows [draft_vocab] they were drawn from.

        The parallel pass runs over [anchor, mask × (γ−1)] of each request and leaves the contexts as they were.
        """
        states = [ask.state for ask in asks]
        self._absorb(states)
        starts = [state.layers[0].length for state in states]
        tokens = torch.full((len(asks), self.config.block_size), self.config.mask_token_id, device=self.head_weight.device)
        tokens[:, 0] = torch.tensor([ask.anchor for ask in asks])
        try:
            hidden = (self.fused or self).blocks(tokens, states)  # [R, γ, hidden]
        finally:
            for state, start in zip(states, starts, strict=True):
                for kv in state.layers:
                    kv.rewind(start)  # the block's own keys and values are dropped
        return self._sample(hidden, asks)

    def _absorb(self, states: Sequence[DraftState]) -> None:
        """Turn the pending taps of all requests into keys and values of their contexts, in one pass."""
        states = [state for state in states if state.pending]
        if not states:  # a second draft from the same context
            return
        taps = [torch.cat(state.pending, 1) for state in states]
        counts = [each.shape[1] for each in taps]
        positions = [state.layers[0].length + torch.arange(n, device=taps[0].device) for state, n in zip(states, counts, strict=True)]
        context = (self.fused or self).context(torch.cat(taps, 1), torch.cat(positions)[None])
        for i, kv in enumerate(context):
            for state, keys, values in zip(states, *(side.split(counts, 2) for side in kv), strict=True):
                state.layers[i].append(keys, values)
        for state in states:
            state.pending.clear()

    def blocks(self, tokens: Tensor, states: Sequence[DraftState]) -> Tensor:
        """Blocks of several requests, one after another. tokens: [R, γ] → [R, γ, hidden]; their keys and values join the contexts."""
        slots = torch.arange(tokens.shape[1], device=tokens.device)[None]
        each = zip(tokens, states, [state.layers[0].length for state in states], strict=True)
        return torch.cat([self.backbone(row[None], slots + start, s.layers, self._masks(start)) for row, s, start in each])

    def _masks(self, start: int) -> list[Tensor | None]:
        """What each layer's slots see of a context of ``start`` tokens and of their block; None if they see all."""
        config, plain, anchor = self.config, (0,) * len(self.layers), torch.tensor([[start]], device=self.head_weight.device)
        sees = zip(config.sliding_windows or plain, config.causal_layers or plain, strict=True)
        return [block_mask(anchor, config.block_size, start, *each, config.windows_move) if any(each) else None for each in sees]

    def _sample(self, hidden: Tensor, asks: Sequence[Ask]) -> tuple[Tensor, list[list[int]], list[list[Tensor | OneHot]]]:
        """Draw every request's block from left to right. hidden: [R, γ, hidden].

        Returns the part of it that predicts drafts, [R, num_drafts, hidden], and per request its tokens and the rows [draft_vocab].
        """
        widest = max(ask.window for ask in asks)
        previous, state, cap = [ask.anchor for ask in asks], None, self.config.final_logit_softcapping
        if self.config.head_starts_at_anchor and self.markov_head is not None:
            _, state = self.markov_head.step(hidden[:, 0], self.markov_head.markov_w1.weight[previous], None)
        hidden = hidden[:, -self.block_size :]  # without slot 0 where it predicts nothing
        base = self.head(hidden[:, :widest]).float()  # U: [R, w, draft_vocab]
        if cap is not None:
            base = cap * torch.tanh(base / cap)
        tokens, rows = [[] for _ in asks], [[] for _ in asks]
        for k in range(widest):
            logits, state = (self.fused or self).next_logits(base, hidden, k, previous, state)
            for r, ask in enumerate(asks):
                if k < ask.window:
                    rows[r].append(ask.sampling.row(logits[r]))
                    previous[r] = int(self.d2t[ask.rng.choose(rows[r][k])])
                    tokens[r].append(previous[r])
        return hidden, tokens, rows

    def next_logits(self, base: Tensor, hidden: Tensor, k: int, previous: Sequence[int] | Tensor, state: Any) -> tuple[Tensor, Any]:
        """U_k + B_k, [R, draft_vocab], and the Markov head's next state. base: U, [R, w, draft_vocab]; hidden: h; previous: x_{k−1}."""
        base, hidden = base[:, k], hidden[:, k]
        if self.markov_head is None:
            return base, None
        latent, state = self.markov_head.step(hidden, self.markov_head.markov_w1.weight[previous], state)
        return self.markov_head.logits(base, latent), state

    def _confidence(self, drafts: Sequence[tuple[Tensor, Sequence[int]]]) -> Sequence[Tensor]:
        """c_1..c_w of each draft, calibrated: [w] float32, NaN without a head. drafts: h_1..h_w [w, hidden] and x_0..x_{w−1} of each."""
        counts = [len(previous) for _, previous in drafts]
        if self.confidence_head is None:
            return [torch.full((w,), math.nan) for w in counts]
        previous = [token for _, tokens in drafts for token in tokens]
        embedded = self.markov_head.markov_w1.weight[previous].float() if self.markov_head else None
        logits = self.confidence_head(torch.cat([hidden for hidden, _ in drafts]).float(), embedded).float()
        if self.sts_temperatures:
            each = [temperature for w in counts for temperature in self.sts_temperatures[:w]]
            logits = logits / torch.tensor(each, device=logits.device)
        return logits.sigmoid().split(counts)

    def _spread(self, rows: Sequence[Tensor | OneHot], tokens: Sequence[int]) -> Rows:
        """w rows [draft_vocab] → w rows [vocab]; other tokens have no probability. tokens: drawn from these rows."""
        if isinstance(rows[0], OneHot):
            return [*map(OneHot, tokens)]
        if self.config.draft_vocab_size == self.config.vocab_size:
            return torch.stack(list(rows))
        return [Narrow(row, self.d2t, self.t2d) for row in rows]
