"""The drafter M_d: a parallel backbone proposes a block, a tiny sequential head ties its tokens together, a confidence head
says how likely each is to survive (the paper's §3: semi-autoregressive generation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.cpu.fused import FusedBackbone
from dspark.cpu.packed import PackedLinear, QuantizedLinear, can_pack, can_quantize, pack_linears
from dspark.draft.backbone import Context, DrafterConfig, Layer, RMSNorm, Rope, block_mask
from dspark.phrases import PhraseMemory
from dspark.rewind import GrowingKV
from dspark.target.target import Target
from dspark.verify.sampling import Chance, Sampling


class SequentialHead(nn.Module):
    """B_k = W2 · latent_k: what the token just drawn says about the next one.

    vanilla: latent = e = W1[x_{k−1}] · gated: σ(G[h_k; e]) ⊙ e · rnn: a state s runs along the block,
    [g, c, o] = J[s; e; h_k], s' = σ(g)⊙s + (1−σ(g))⊙tanh(c), latent = tanh(o), s_0 = 0.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.kind, self.rank = config.markov_head_type, config.markov_rank
        self.markov_w1 = nn.Embedding(config.vocab_size, self.rank)
        self.markov_w2 = nn.Linear(self.rank, config.draft_vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(config.hidden_size + self.rank, self.rank)
        if self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * self.rank + config.hidden_size, 3 * self.rank)

    def step(self, hidden: Tensor, embedded: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One position. hidden: [..., hidden]; embedded W1[x_{k−1}]: [..., rank]. Returns the latent [..., rank] and the state."""
        if self.kind == "vanilla":
            return embedded, None
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], -1))) * embedded, None
        state = torch.zeros_like(embedded) if state is None else state
        gate, candidate, output = self.joint_proj(torch.cat([state, embedded, hidden], -1)).chunk(3, -1)
        keep = torch.sigmoid(gate)
        return torch.tanh(output), keep * state + (1 - keep) * torch.tanh(candidate)

    def latents(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """All positions of known blocks. hidden [..., γ, hidden], embedded [..., γ, rank] → [..., γ, rank]."""
        if self.kind == "vanilla":
            return embedded
        state, out = None, []
        for k in range(embedded.shape[-2]):
            latent, state = self.step(hidden[..., k, :], embedded[..., k, :], state)
            out.append(latent)
        return torch.stack(out, dim=-2)


class ConfidenceHead(nn.Module):
    """c_k = σ(w · [h_k; W1[x_{k−1}]] + b). It never sees x_k."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.with_markov = config.confidence_head_with_markov and config.markov_rank > 0
        self.proj = nn.Linear(config.hidden_size + self.with_markov * config.markov_rank, 1)

    def forward(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """hidden: [..., hidden], embedded: [..., rank] → logits of c_k [...]."""
        x = torch.cat([hidden, embedded], -1) if self.with_markov else hidden
        return self.proj(x).squeeze(-1)

    def halves(self, hidden: Tensor) -> tuple[list[float], Tensor | None]:
        """The same sum, but for rounding, as a block needs it: for known hidden states [w, hidden] what they give the w logits, bias
        included, and the weights [rank] of W1[x_{k−1}], which is known one position at a time."""
        weight = self.proj.weight[0].to(hidden.dtype)
        known = (hidden @ weight[: hidden.shape[-1]]).double() + self.proj.bias.double()
        return known.tolist(), weight[hidden.shape[-1] :] if self.with_markov else None


@dataclass(frozen=True)
class Draft:
    """A proposed block of w tokens.

    tokens: w ids of the target's vocabulary · probs: [w, vocab] float32, exactly the distributions they were drawn from ·
    confidence: [w] float32, c_k (calibrated if the drafter carries temperatures); [w + 1] if the draft ended because the token behind
    was not worth drawing · source: who proposed it · another: (0-based slot, tokens) → [vocab], what one more guess for that slot, none
    of these tokens, is drawn from, None once every token was tried; None if there are no further guesses.
    """

    tokens: list[int]
    probs: Tensor
    confidence: Tensor
    source: str = "drafter"
    another: Callable[[int, Sequence[int]], Tensor | None] | None = None


NOTHING = Draft([], torch.empty(0, 0), torch.empty(0), "")

SUREST = 0.98  # no vote silences the drafter
Admits = Callable[[Sequence[float]], bool]  # c_1..c_k → is x_k worth drawing? See dspark.schedule.Policy.admits
Vote = Callable[[Sequence[int]], tuple[int, float] | None]  # drafts so far → a token that may come next, and a rate in 0..1


def everything(confidence: Sequence[float]) -> bool:
    """Admits the whole block."""
    return True


@dataclass
class DraftState:
    """The drafter's own cache: keys and values of the context only, plus taps that no draft needed yet."""

    layers: list[GrowingKV]
    pending: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of context, pending ones included."""
        return self.layers[0].length + sum(taps.shape[1] for taps in self.pending)


class Drafter(nn.Module):
    """Backbone, sequential head and confidence head; embedding and LM head are the target's, frozen."""

    architecture = "DSparkDrafter"  # what its config.json says; see :data:`dspark.formats.native.NATIVE`

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * h, h, bias=False)
        self.hidden_norm = RMSNorm(h, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(h, eps=config.rms_norm_eps)
        self.markov_head = SequentialHead(config) if config.markov_rank else None
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
        self.register_buffer("d2t", torch.arange(config.draft_vocab_size))
        self.register_buffer("head_weight", torch.empty(0), persistent=False)  # [draft_vocab, hidden], rows of the target's
        self.sts_temperatures: tuple[float, ...] = ()
        self.fused: FusedBackbone | None = None  # how a packed drafter drafts
        self.phrases: PhraseMemory | None = None  # what the target often writes, for dspark.ContextLookup

    @property
    def block_size(self) -> int:
        return self.config.block_size

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return self.config.target_layer_ids

    @property
    def has_confidence(self) -> bool:
        return self.confidence_head is not None

    @torch.no_grad()
    def start_context(self, norm_weight: Tensor) -> None:
        """For a fresh drafter whose layers start as copies: the context starts normed as the copied layers expect it."""
        self.hidden_norm.weight.copy_(norm_weight)

    def attach(self, target: Target) -> Drafter:
        """Borrow the target's embedding and LM head. Raises ValueError if the drafter was made for another shape of target."""
        for name, mine, theirs in (
            ("hidden_size", self.config.hidden_size, target.hidden_size),
            ("vocab_size", self.config.vocab_size, target.vocab_size),
        ):
            if mine != theirs:
                raise ValueError(f"the drafter's {name} is {mine}, but {target.name} has {theirs}: it was made for another target")
        target.check_taps(self.config.target_layer_ids)
        self.to(device=target.device)
        self.head_weight = target.head_weight[self.d2t].to(target.dtype)
        self.place_of = {token: place for place, token in enumerate(self.d2t.tolist())}
        # Borrowed, not submodules: never saved, never trained.
        object.__setattr__(self, "embed", target.embedding)
        object.__setattr__(self, "head", partial(F.linear, weight=self.head_weight))
        return self

    def pack(self) -> Drafter:
        """Lay the weights out for fast CPU passes where that is possible, in 8 bits where these are the faster; for drafting only."""
        if can_pack(self.head_weight):
            make = QuantizedLinear if can_quantize(self.head_weight) else PackedLinear
            self.fused = FusedBackbone(self, PackedLinear, make)
            object.__setattr__(self, "head", make(self.head_weight))
            if self.markov_head is not None:
                pack_linears(self.markov_head, partial(make, keep_weight=True))
            pack_linears(self, partial(PackedLinear, keep_weight=True))
        return self

    # ---- the parallel backbone

    def context(self, taps: Tensor, first: Tensor | int = 0) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values of context tokens. taps: [batch, tokens, m·hidden], at positions first, first+1, …"""
        x = self.hidden_norm(self.fc(taps))
        positions = first + torch.arange(taps.shape[1], device=taps.device).expand(taps.shape[0], -1)
        rope = self._rope(positions, x.dtype)
        return [layer.self_attn.keys_values(x, rope) for layer in self.layers]

    def backbone(self, tokens: Tensor, positions: Tensor, contexts: Sequence[GrowingKV | Context], mask: Tensor | None = None) -> Tensor:
        """[anchor, mask × (γ−1)] → hidden states. tokens, positions: [batch, n]; returns [batch, n, hidden] after the norm."""
        x = self.embed(tokens)
        rope = self._rope(positions, x.dtype)
        for layer, context in zip(self.layers, contexts, strict=True):
            x = layer(x, rope, context, mask)
        return self.norm(x)

    def block_hidden(self, token_ids: Tensor, taps: Tensor, tokens: Tensor, previous: Tensor, positions: Tensor) -> Tensor:
        """What drafting would compute for many blocks of known texts, all in one pass: the training loss is built on it.

        token_ids: [rows, length], the texts · taps: [rows, length, m·hidden] · tokens: anchor and masks, previous: x_{k−1} in the
        text, positions: where slot k stands, all [rows, anchors, γ]. Returns [rows, anchors, γ, hidden] after the norm. The parallel
        backbone sees nothing of a text but taps and anchors; a drafter that reads more overrides this.
        """
        contexts = [Context(*kv) for kv in self.context(taps)]
        mask = block_mask(positions[..., 0], positions.shape[-1], taps.shape[1])
        return self.backbone(tokens.flatten(1), positions.flatten(1), contexts, mask).unflatten(1, positions.shape[1:])

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        return Rope.at(positions, self.config.head_dim, self.config.rope_theta, dtype)

    # ---- drafting

    def new_state(self, prompt: Sequence[int] = ()) -> DraftState:
        return DraftState([GrowingKV() for _ in self.layers])

    def extend(self, state: DraftState, token_ids: Sequence[int], taps: Tensor) -> None:
        """Add committed tokens to the context. taps: [1, tokens, m·hidden]; the drafter reads no token ids but the anchor's."""
        state.pending.append(taps)

    def _absorb(self, state: DraftState) -> None:
        if not state.pending:  # a second draft from the same context
            return
        first = state.layers[0].length
        context = (self.fused or self).context(torch.cat(state.pending, 1), first)
        for kv, (keys, values) in zip(state.layers, context, strict=True):
            kv.append(keys, values)
        state.pending.clear()

    @torch.inference_mode()
    def draft(
        self,
        state: DraftState,
        anchor: int,
        window: int,
        sampling: Sampling,
        chance: Chance,
        admits: Admits = everything,
        vote: Vote | None = None,
    ) -> Draft:
        """Propose ``window`` tokens behind the anchor, whose position is the length of the context (Algorithm of §3.1–3.2).

        admits: asked before each token is drawn; the draft ends where it says no. vote: what else is known to follow the drafts so
        far; see :meth:`_heard` and :meth:`_lean`.
        """
        self._check_window(window)
        self._absorb(state)
        start, device = state.layers[0].length, self.head_weight.device
        block = torch.full((1, self.block_size), self.config.mask_token_id, device=device)
        block[0, 0] = anchor
        positions = torch.arange(start, start + self.block_size, device=device)[None]
        hidden = (self.fused or self).backbone(block, positions, state.layers)[0, :window]  # [w, hidden]
        for kv in state.layers:
            kv.rewind(start)  # the block's own keys and values are dropped; only context stays
        base = self.head(hidden).float()  # U: [w, draft_vocab]
        told, weight = self.confidence_head.halves(hidden) if self.has_confidence else ([math.nan] * window, None)

        tokens, previous, rows, leaning, confidence, embedded, latent_state = [], anchor, [], [], [], None, None
        for k in range(window):
            if self.markov_head is not None:
                embedded = self.markov_head.markov_w1.weight[previous]
            place, rate = self._heard(vote, tokens)
            heard = 0.0 if weight is None else float(embedded.to(weight.dtype) @ weight)
            confidence.append(self._confidence(told[k] + heard, k, rate))
            if not admits(confidence):
                break
            logits = base[k]
            if self.markov_head is not None:
                latent, latent_state = self.markov_head.step(hidden[k], embedded, latent_state)
                logits = logits + self.markov_head.markov_w2(latent)
            leaning.append(self._lean(logits, place, rate))
            probs = sampling.probs(leaning[k])
            choice = chance.choose(probs)
            previous = int(self.d2t[choice])
            tokens.append(previous)
            rows.append(probs)

        def another(k: int, tried: Sequence[int]) -> Tensor | None:
            if len(tried) == self.config.draft_vocab_size:
                return None
            left = leaning[k].index_fill(0, torch.tensor([self.place_of[token] for token in tried], device=device), -torch.inf)
            return self._spread([sampling.probs(left)])[0]

        return Draft(tokens, self._spread(rows), torch.tensor(confidence), another=another)

    def _heard(self, vote: Vote | None, tokens: Sequence[int]) -> tuple[int, float]:
        """Where in the draft vocabulary the token stands that is voted for, and its rate r; r = 0 where there is none."""
        token, rate = (vote(tokens) if vote else None) or (None, 0.0)
        place = self.place_of.get(token)
        return (0, 0.0) if place is None else (place, min(rate, SUREST))

    def _lean(self, logits: Tensor, place: int, rate: float) -> Tensor:
        """The next draft's logits [draft_vocab], leaning to the token that is voted for.

        The law becomes (1 − r)·softmax(logits) + r·[token], as if the vote were asked in a share r of all cases. Like the
        sequential head it reads the tokens before x_k only.
        """
        if not rate:
            return logits
        logits = logits.clone()
        logits[place] = torch.logaddexp(logits[place], logits.logsumexp(-1) + math.log(rate / (1 - rate)))
        return logits

    def _check_window(self, window: int) -> None:
        if not 1 <= window <= self.block_size:
            raise ValueError(f"window {window} must lie in 1..{self.block_size}, the drafter's block size")

    def _spread(self, rows: Sequence[Tensor]) -> Tensor:
        """w rows [draft_vocab] → [w, vocab]: tokens that the drafter cannot propose get probability zero."""
        if not rows:
            return NOTHING.probs
        probs = torch.stack(rows)
        if self.config.draft_vocab_size == self.config.vocab_size:
            return probs
        return probs.new_zeros(len(probs), self.config.vocab_size).scatter_(1, self.d2t.expand(len(probs), -1), probs)

    def _confidence(self, logit: float, k: int, rate: float) -> float:
        """c of slot k, 0-based, from the head's logit, NaN without a head; where a vote's rate is higher, that."""
        scaled = logit / self.sts_temperatures[k] if self.sts_temperatures else logit
        return max(1 / (1 + math.exp(-max(scaled, -700.0))), rate)
