"""An autoregressive drafter in the manner of EAGLE-3 (Li et al., 2025): it drafts one token after another.

It reads the same taps as :class:`dspark.draft.drafter.Drafter` and borrows the same embedding and head, but its one layer runs once per
drafted token. At a token's position the layer reads that token's embedding and a feature of the position before it: the target's
fused taps if the target has processed that position, else the layer's own output. Training takes the same steps on the layer's own
outputs ("training-time test"), so it sees the inputs that drafting sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dspark.draft.backbone import Context, DrafterConfig, RMSNorm, Rope
from dspark.draft.drafter import Drafter, DraftState
from dspark.draft.source import Ask
from dspark.rewind import GrowingKV
from dspark.verify.sampling import OneHot


@dataclass
class EagleState(DraftState):
    """As :class:`DraftState`; the cache has one entry per token but the first, which has no feature before it.
    The taps of the last committed token stay pending: they wait for the anchor, which comes after it."""

    tokens: list[int] = field(default_factory=list)  # the ids at the same positions as pending


class EagleDrafter(Drafter):
    """One layer, run once per drafted token; without a Markov head, since the layer itself reads the token before."""

    architecture = "EagleDrafter"

    def __init__(self, config: DrafterConfig) -> None:
        if config.num_hidden_layers != 1 or config.markov_rank:
            found = f"num_hidden_layers {config.num_hidden_layers} and markov_rank {config.markov_rank}"
            raise ValueError(f"an {self.architecture} has 1 layer and no Markov head, not {found}: set them to 1 and 0")
        if unusual := config.unusual():
            raise ValueError(f"an {self.architecture} has no {', '.join(unusual)}: leave them out")
        super().__init__(config)
        self.embed_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.combine = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    @torch.no_grad()
    def init_context_norm(self, norm_weight: Tensor) -> None:
        """Before training: let the layer's input be the sum of feature and embedding. It norms that itself, so no norm is copied."""
        self.combine.weight.mul_(0.1).add_(torch.eye(self.config.hidden_size).repeat(1, 2))

    # ---- one step

    def _inputs(self, tokens: Tensor, features: Tensor) -> Tensor:
        """tokens: [..., n] ids, features: [..., n, hidden] of the positions before theirs → what the layer reads, [..., n, hidden]."""
        return self.combine(torch.cat([self.embed_norm(self.embed(tokens)), self.hidden_norm(features)], -1))

    def _keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The cache entries of tokens. x: [batch, n, hidden] from :meth:`_inputs`; two of [batch, kv_heads, n, head_dim]."""
        layer = self.layers[0]
        return layer.self_attn.keys_values(layer.input_layernorm(x), Rope.at(positions, self.config, x.dtype))

    def _step(self, x: Tensor, position: Tensor, entries: GrowingKV) -> Tensor:
        """The layer at one position while drafting. x: [1, 1, hidden], position: [1, 1]. Returns [1, 1, hidden]."""
        if self.fused is not None:
            return self.fused.layers[0](x, self.fused.rope(position[0]), [entries])
        return self.layers[0](x, Rope.at(position, self.config, x.dtype), entries, None)

    # ---- training

    def block_hidden(self, token_ids: Tensor, taps: Tensor, tokens: Tensor, previous: Tensor, positions: Tensor) -> Tensor:
        """γ steps of all blocks at once; see :meth:`dspark.draft.drafter.Drafter.block_hidden`. ``tokens`` is not read."""
        features, anchors = self.fc(taps), positions[..., 0]  # [rows, length, hidden], [rows, anchors]
        at = torch.arange(1, token_ids.shape[1], device=taps.device).expand(len(token_ids), -1)
        entries = Context(*self._keys_values(self._inputs(token_ids[:, 1:], features[:, :-1]), at))
        visible = at[:, None] < anchors[..., None]  # [rows, anchors, length − 1]: context strictly before the anchor, …
        own = torch.eye(anchors.shape[1], dtype=torch.bool, device=taps.device).expand(len(anchors), -1, -1)
        before = (anchors - 1).clamp(min=0)[..., None].expand(-1, -1, features.shape[-1])
        feature, out = features.gather(1, before), []
        for k in range(positions.shape[-1]):
            x = self._inputs(previous[..., k], feature)
            visible = torch.cat([visible, own], -1)  # … and the own block's steps so far
            feature = self.layers[0](x, Rope.at(positions[..., k], self.config, x.dtype), entries, visible[:, None])
            out.append(self.norm(feature))
        return torch.stack(out, dim=2)

    # ---- drafting

    def new_state(self, prompt: Sequence[int] = ()) -> EagleState:
        return EagleState([GrowingKV()])

    def extend(self, state: EagleState, token_ids: Sequence[int], taps: Tensor) -> None:
        """Add committed tokens to the context. taps: [1, tokens, m·hidden]."""
        state.pending.append(taps)
        state.tokens.extend(token_ids)

    def _absorb(self, state: EagleState) -> Tensor:
        """Make the cache entries of all tokens whose feature is known. Returns the feature before the anchor, [1, 1, hidden]."""
        taps, kv = torch.cat(state.pending, 1), state.layers[0]
        features = self.fc(taps)
        if len(state.tokens) > 1:
            ids = torch.tensor([state.tokens[1:]], device=taps.device)
            at = kv.length + 1 + torch.arange(ids.shape[1], device=taps.device)[None]
            kv.append(*self._keys_values(self._inputs(ids, features[:, :-1]), at))
        state.pending, state.tokens = [taps[:, -1:]], state.tokens[-1:]
        return features[:, -1:]

    def _drawn(self, asks: Sequence[Ask]) -> tuple[Sequence, ...]:
        """One request after another, and of each block one token after another: every step needs the one before."""
        return tuple(zip(*map(self._draw, asks), strict=True))

    def _draw(self, ask: Ask) -> tuple[Tensor, list[int], list[Tensor | OneHot]]:
        """One request's block: h_1..h_w [w, hidden], its w tokens, and the w rows [draft_vocab] they were drawn from."""
        feature, kv = self._absorb(ask.state), ask.state.layers[0]
        entries, previous, tokens, rows, hidden = kv.length, ask.anchor, [], [], []
        try:
            for _ in range(ask.window):
                position = torch.tensor([[kv.length + 1]], device=feature.device)
                x = self._inputs(torch.tensor([[previous]], device=feature.device), feature)
                feature = self._step(x, position, kv)
                hidden.append(self.norm(feature)[0])  # [1, hidden]
                probs = ask.sampling.row(self.head(hidden[-1])[0].float())
                previous = int(self.d2t[ask.rng.choose(probs)])
                tokens.append(previous)
                rows.append(probs)
        finally:
            kv.rewind(entries)  # entries made from the drafter's own features are dropped, the anchor's too: its next block makes it anew
        return torch.cat(hidden), tokens, rows
