"""One round for R requests that stays on the device: the host waits once, for the outcome, or twice if the policy reads confidences.

One program draws the blocks, another runs the target over anchors and drafts and judges them. They stand on static buffers, so CUDA
graphs of them can be replayed; on a CPU the same code runs without graphs. Copied blocks come from the host, which knows the text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dspark.clock import Marks
from dspark.device.drafter import Drawn, StaticDrafter
from dspark.device.rules import Block, Samplings, accept_each, accept_greedy, best_each
from dspark.draft.backbone import TRAINED_HERE
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import Draft, DraftSource
from dspark.request import Turn
from dspark.rewind import Slot
from dspark.schedule import Policy
from dspark.verify import graphs
from dspark.verify.passes import TargetPass
from dspark.verify.static import Shape, StaticPass

GREEDY, SAMPLED, FILTERED = "greedy", "sampled", "filtered"  # which part of the sampling the rows of a round need


@dataclass(frozen=True)
class _Static:
    """The static buffers of R rows; W is the width of the widest block."""

    numbers: Tensor  # [R, 3 + W] int64: start, count, anchor, then the copied tokens; −1 where the drafter's stand instead
    samplings: Tensor  # [R, 3] float64: temperature, top_k, top_p
    uniforms: Tensor  # [R, 2W + 1] float64; see dspark.device.rules
    drawn: Drawn | None  # the drafter's blocks

    def read_samplings(self, mode: str) -> Samplings | None:
        if mode == GREEDY:
            return None
        temperature, top_k, top_p = self.samplings.unbind(1)
        return Samplings(temperature.float(), top_k.long(), top_p.float(), mode == FILTERED)


@dataclass(frozen=True)
class _Programs:
    """What runs on the device. It knows no engine: the next one with this target and drafter replays it."""

    verifier: StaticPass
    buffers: graphs.Buffers
    drafter: StaticDrafter | None
    block_size: int
    taps: tuple[int, ...]

    def static(self, rows: int, mode: str) -> _Static:
        buffer, width, drawn = self.buffers.tensor, self.block_size, None
        if self.drafter is not None:
            config = self.drafter.drafter.config
            shape, vocab = (rows, config.block_size), 0 if mode == GREEDY else config.draft_vocab_size
            drawn = Drawn(
                buffer(("tokens", rows), shape, torch.int64),
                buffer(("probs", rows), shape, torch.float32),
                buffer(("confidence", rows), shape, torch.float32),
                buffer(("rows", rows, vocab), (*shape, vocab), torch.float32),
            )
        return _Static(
            buffer(("numbers", rows), (rows, 3 + width), torch.int64),
            buffer(("samplings", rows), (rows, 3), torch.float64),
            buffer(("uniforms", rows), (rows, 2 * width + 1), torch.float64),
            drawn,
        )

    def draw(self, static: _Static, context: int, width: int, mode: str) -> None:
        """The blocks of all rows, into the static buffers."""
        starts, anchors = static.numbers[:, 0], static.numbers[:, 2]
        self.drafter.draw(starts, anchors, context, width, static.read_samplings(mode), static.uniforms, static.drawn)

    def verify(self, static: _Static, table: tuple[Tensor, Tensor], shape: Shape, mode: str) -> Tensor:
        """Run the target over anchors and drafts, absorb its taps, judge the drafts.
        Returns [R, 2 + 4W] float64: accepted, next token, then per draft its id, p_t, p_d and c."""
        counts, tokens = static.numbers[:, 1], static.numbers[:, 2:]
        copied, drafts = tokens[:, 1:] >= 0, tokens[:, 1:].clamp(min=0)
        p_drafts, confidence = copied.float(), torch.zeros_like(drafts, dtype=torch.float32)
        if static.drawn is not None:
            drawn, width = static.drawn, static.drawn.tokens.shape[1]
            here = ~copied[:, :width]
            drafts[:, :width] = drawn.tokens.where(here, drafts[:, :width])
            p_drafts[:, :width] = drawn.probs.where(here, p_drafts[:, :width])
            confidence[:, :width] = drawn.confidence
        tokens = torch.cat([tokens[:, :1], drafts], 1)
        layout, logits, taps = self.verifier.program(self.buffers, table, static.numbers, tokens, shape, self.taps)
        if self.drafter is not None:
            self.drafter.absorb(taps, layout.row, layout.position)
        block, samplings = Block(drafts, (counts - 1).clamp(min=0), layout.first), static.read_samplings(mode)
        p_target = logits.softmax(-1, torch.float32)[block.judged_by, drafts]  # at temperature 1: what the records of greedy rounds hold
        if samplings is None:
            accepted, following = accept_greedy(block, best_each(logits))
        else:
            rows = samplings.at(layout.row).probs(logits)
            p_target = p_target.where(samplings.temperature[:, None] == 0, rows[block.judged_by, drafts])
            drawn_from = partial(self._drawn_from, static.drawn, drafts, copied)
            accepted, following = accept_each(block, p_drafts, drawn_from, rows, static.uniforms[:, self.block_size :])
        return torch.cat([accepted[:, None], following[:, None], drafts, p_target, p_drafts, confidence.double()], 1)

    def _drawn_from(self, drawn: Drawn | None, drafts: Tensor, copied: Tensor, k: Tensor) -> Tensor:
        """The distribution [R, vocab] of draft k + 1 of each row; a copied token has all the probability. k: [R]."""
        each = torch.arange(len(k), device=k.device)
        vocab = len(self.verifier.lean.embedding)
        rows = torch.zeros(len(k), vocab, device=k.device).scatter_(1, drafts[each, k][:, None], 1.0)
        if drawn is None:
            return rows
        own = self.drafter.spread(drawn.rows[each, k.clamp(max=drawn.rows.shape[1] - 1)])
        return rows.where(copied[each, k][:, None], own)


class StaticRound:
    """Runs the rounds of one engine, and is its draft source. Made by :func:`static_round`.
    cache: the engine's; further layers of the same slots hold the drafter's context."""

    def __init__(self, verifier: StaticPass, source: DraftSource | None) -> None:
        drafter = source.drafter if isinstance(source, ContextLookup) else source
        self.verifier, self.drafter = verifier, drafter
        self.copier = source if isinstance(source, ContextLookup) else None
        self.block_size = source.block_size if source else 0
        self.target_layer_ids = source.target_layer_ids if source else ()
        further = []  # layers of the drafter's context, without a slot yet
        if drafter is not None:
            config, like = drafter.config, drafter.fc.weight
            further = [tuple(like.new_empty(0, config.num_key_value_heads, 0, config.head_dim) for _ in range(2)) for _ in drafter.layers]
        self.cache = verifier.new_cache((drafter, self.block_size), further)
        buffers, static = self.cache.buffers, None
        if drafter is not None:
            temperatures = [drafter.sts_temperatures or (1.0,) * drafter.block_size]
            sent = buffers.upload("temperatures", temperatures, torch.float32)
            static = StaticDrafter(drafter, buffers, len(verifier.lean.layers), sent[0])
        self.programs = _Programs(verifier, buffers, static, max(self.block_size, 1), tuple(self.target_layer_ids))

    def new_state(self, prompt: Sequence[int] = ()) -> object:
        return self.copier.new_state(prompt) if self.copier else None

    def extend(self, state: object, token_ids: Sequence[int], taps: Tensor | None) -> None:
        """Index committed tokens for copying; the taps of a round were absorbed where they arose."""
        if self.copier:
            self.copier.index(state, token_ids)

    def join(self, slot: Slot, taps: Tensor | None) -> None:
        """Absorb a prompt that the slot holds. taps: [1, tokens, m·hidden]."""
        if self.drafter is not None:
            positions = torch.arange(slot.length, device=taps.device)
            self.programs.drafter.absorb(taps[0], torch.full_like(positions, slot.index), positions)

    def __call__(self, turns: Sequence[Turn], policy: Policy) -> list[float]:
        """Draft, schedule, verify: fills in each turn, and lengthens its slot by all that was verified.
        Returns the seconds of drafting and of verifying."""
        marks, mode = Marks(self.verifier.lean.device), _mode(turns)
        slots, limit = [turn.request.slot for turn in turns], self.drafter.block_size if self.drafter is not None else 0
        if self.copier is not None:  # what the text itself proposes, and how likely each token is to be right
            for turn in turns:
                turn.draft = self.copier.copy(turn.request.state, turn.request.anchor, turn.draft_limit)
        widths = [len(turn.draft.tokens) or max(min(turn.draft_limit, limit), 0) for turn in turns]
        self.cache.reserve(max(slot.length for slot in self.cache.slots) + self.block_size + 2)
        shape = self.cache.shape(slots, [1 + width for width in widths])
        static, run = self.programs.static(shape.rows, mode), self._run(mode)

        def schedule(confidence: Sequence[Tensor]) -> None:
            lengths = policy.lengths(confidence, [turn.request.rounds for turn in turns])
            for turn, length, width in zip(turns, lengths, widths, strict=True):
                turn.verify_length = min(length, width)

        reads = policy.reads_confidence and any(widths)
        if not reads:
            schedule([torch.full((width,), math.nan) for width in widths])
        self._send(turns, shape.rows, mode, static)
        drawing = [width for turn, width in zip(turns, widths, strict=True) if width and not turn.draft.tokens]
        if drawing:
            self.draw(slots, max(drawing), mode)
        if reads:
            host = graphs.to_host(static.drawn.confidence) if drawing else None
            each = zip(turns, widths, strict=True)
            schedule([turn.draft.confidence if turn.draft.tokens or not w else host[turn.request.slot.index, :w] for turn, w in each])
            self._send(turns, shape.rows, GREEDY, static)
        marks.add()
        shape = self.cache.shape(slots, [1 + turn.verify_length for turn in turns])
        table = self.verifier.lean.rope(self.cache.capacity)
        out = run(("verify", shape, mode), partial(self.programs.verify, static, table, shape, mode))
        marks.add()
        found, most = graphs.to_host(out).tolist(), self.programs.block_size
        for turn, width in zip(turns, widths, strict=True):
            accepted, following, *rest = found[turn.request.slot.index]
            turn.accepted, turn.next_token = int(accepted), int(following)
            tokens, p_target, p_draft, confidence = (rest[i * most : (i + 1) * most] for i in range(4))
            if width and not turn.draft.tokens:
                turn.draft = Draft([int(token) for token in tokens[:width]], torch.empty(0), torch.tensor(confidence[:width]))
            turn.target_probs, turn.draft_probs = tuple(p_target[: turn.verify_length]), tuple(p_draft[:width])
            turn.request.slot.length += 1 + turn.verify_length
        return marks.seconds()

    @torch.inference_mode()
    def draw(self, slots: Sequence[Slot], width: int, mode: str = GREEDY) -> None:
        """Draft ``width`` tokens in these slots and all before them, into the static buffers."""
        shape = self.cache.shape(slots, [self.drafter.block_size] * len(slots))
        static, key = self.programs.static(shape.rows, mode), ("draw", shape.rows, shape.context, width, mode)
        self._run(mode)(key, partial(self.programs.draw, static, shape.context, width, mode))

    def _run(self, mode: str) -> object:
        """What runs the programs of this round. Sorting a vocabulary asks the host for scratch memory, so it stays out of graphs."""
        return self.cache.buffers.run if mode != FILTERED else lambda key, program: program()

    def _send(self, turns: Sequence[Turn], rows: int, mode: str, static: _Static) -> None:
        """Fill the static buffers that the programs read. Rows without a turn keep their slots: they verify nothing."""
        numbers = [[0, 0, 0] + [-1] * self.programs.block_size for _ in range(rows)]
        for slot in self.cache.slots[:rows]:
            numbers[slot.index][0] = slot.length
        for turn in turns:
            tokens = turn.draft.tokens  # copied ones
            numbers[turn.request.slot.index][1 : 3 + len(tokens)] = [1 + turn.verify_length, turn.request.anchor, *tokens]
        self.cache.buffers.upload(("numbers", rows), numbers)
        if mode == GREEDY:
            return
        chosen = [[0.0, 0.0, 1.0] for _ in range(rows)]
        for turn in turns:
            sampling, row = turn.request.sampling, turn.request.slot.index
            chosen[row] = [sampling.temperature, sampling.top_k, sampling.top_p]
            if sampling.temperature:
                torch.rand(static.uniforms.shape[1], generator=turn.request.rng.generator, dtype=torch.float64, out=static.uniforms[row])
        self.cache.buffers.upload(("samplings", rows), chosen, torch.float64)


def _mode(turns: Sequence[Turn]) -> str:
    samplings = [turn.request.sampling for turn in turns]
    if all(sampling.temperature == 0 for sampling in samplings):
        return GREEDY
    return FILTERED if any(sampling.top_k or sampling.top_p < 1 for sampling in samplings) else SAMPLED


def static_round(verifier: TargetPass, source: DraftSource | None) -> StaticRound | None:
    """The round on the device, None if the target's pass or the source has no static form: then a round asks the host for every token."""
    inner = source.drafter if type(source) is ContextLookup else source
    known = inner is None or (type(inner) is Drafter and inner.fused is None and inner.config.unusual().keys() <= TRAINED_HERE)
    return StaticRound(verifier, source) if known and isinstance(verifier, StaticPass) else None
