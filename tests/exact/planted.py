"""Would the tests notice? Each bug replaces one function or method of the product, and the test that it names must fail then.

Each is planted in a process of its own, which has run no test before: one that had might remember results.
"""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from dspark.draft.source import Ask
from dspark.request import until_end
from dspark.rewind import GrowingKV
from dspark.verify.sampling import nucleus
from exact.tables import GlobalArgmax

TESTS = Path(__file__).resolve().parents[1]
SAMPLED = "test_exact.py::test_sampled_text_has_the_targets_distribution[{}]"
PLAIN, REDUCED = SAMPLED.format("fixed:2 rnn T1 vocab2 block3 tokens4"), SAMPLED.format("fixed:2 reduced T1 k2 vocab5 block2 tokens3")
TOP_P = SAMPLED.format("adaptive:0.6 gated T1 p0.8 vocab3 block2 tokens4 eos")
HOT = SAMPLED.format("mtp1 gated T2 vocab3 block2 tokens4 eos")
CONDITIONAL = SAMPLED.format("conditional:0.5 vanilla T1 vocab2 block3 tokens4")
COPYING = SAMPLED.format("fixed:4 copying T1 vocab2 block4 tokens6 eos")
APPENDIX = "test_exact.py::test_appendix_a_the_global_argmax_is_biased_and_the_prefix_scheduler_is_not"
CUTS = "test_exact.py::test_a_schedule_cuts_blocks_of_the_same_length_at_different_places[{}]"
SCHEDULE, THRESHOLD = CUTS.format("prefix"), CUTS.format("confidence:0.3")
WINDOW = "test_exact.py::test_every_policy_gives_the_greedy_text_of_model_generate[window, eager]"
UNIFORM = "test_verify.py::test_every_draft_has_a_uniform_number_of_its_own"
SMALL = "test_verify.py::test_no_residual_is_too_small_to_count"
NEAR_TIE = "test_verify.py::test_greedy_tells_logits_apart_that_only_float32_tells_apart"
COPY = "test_lookup.py::test_what_followed_the_last_occurrence_is_copied"
STATE = "test_draft.py::test_drafting_leaves_only_context_in_the_drafters_cache"
PARALLEL = "test_draft.py::test_step_by_step_drafting_equals_the_training_forward_pass"
COOLED = "test_draft.py::test_calibration_divides_the_logits_of_confidence"
CACHE = "test_rewind.py::test_growing_keeps_what_was_written"
TAPS = "test_rewind.py::test_taps_are_the_residual_stream_after_the_named_layers"
CLOSING = "test_lean.py::test_closing_a_slot_moves_the_last_request_and_nothing_else"
LEAN, COMPILED = (f"test_lean.py::test_logits_and_taps_are_those_of_transformers[{kind}-llama]" for kind in ("lean", "compiled"))
NEIGHBOURS = "test_engine.py::test_a_requests_draws_are_its_own[0.7]"
PENALTY = "test_processors.py::test_sampled_text_has_the_distribution_of_the_processed_target[repetition]"
TAU = "test_rounds.py::test_tokens_after_the_end_of_the_text_count_towards_nothing"
LONGROPE = "test_families.py::test_a_text_ends_where_longrope_would_move_the_positions"
FUSED = "test_fused.py::test_the_fused_backbone_drafts_as_the_plain_one"
EAGLE = "test_eagle.py::test_training_and_drafting_see_the_same_distributions"
EAGLE_PIECES = "test_eagle.py::test_context_in_pieces_with_drafts_between_equals_context_at_once"
EAGLE_STEPS = "test_eagle.py::test_later_steps_teach_through_the_features_of_earlier_ones"
BLOCKS = "test_train.py::test_a_block_sees_context_before_its_anchor_and_itself_and_nothing_else"
RESUMED = "test_train.py::test_a_training_resumed_twice_equals_an_uninterrupted_one_bit_for_bit"
TRACE_END = "test_trace.py::test_a_replay_ends_where_decoding_ends_with_the_end_of_text_anywhere_in_a_block"
REPLAY = "test_trace.py::test_a_replay_gives_the_rounds_of_decoding_whatever_the_policy"
DAMAGE = "test_checkpoint.py::test_a_flipped_bit_is_damage"
SPECULATORS = "test_checkpoint.py::test_speculators_layout_is_read"

RAN = 10  # added to pytest's exit code: a process that fails before it ends with 1 itself
TAP_IDS = "aux_hidden_state_layer_ids"  # as speculators call them
Function = Callable[..., object]


class Bug(NamedTuple):
    """place: dotted, inside ``dspark``. caught_by: pytest's id of the test. planted: called with the real function and its arguments."""

    place: str
    caught_by: str
    planted: Function

    def plant(self) -> None:
        """Replace the function where it is defined, and in every loaded module that imported it."""
        where, _, name = self.place.rpartition(".")
        owner = pkgutil.resolve_name(f"dspark.{where}")
        real = vars(owner)[name]
        function = real.fget if isinstance(real, property) else real

        def bug(*arguments: object, **options: object) -> object:
            return self.planted(function, *arguments, **options)

        setattr(owner, name, property(bug) if isinstance(real, property) else bug)
        for module in [module for key, module in sys.modules.items() if key.startswith(("dspark", "exact"))]:
            for key in [key for key, value in vars(module).items() if value is real]:
                setattr(module, key, bug)


def given(**changes: Function) -> Function:
    """Call the real function with some arguments changed. changes: name of the argument → what is made of it."""

    def planted(real: Function, *arguments: object, **options: object) -> object:
        bound = inspect.signature(real).bind(*arguments, **options)
        bound.apply_defaults()
        if not changes.keys() <= bound.arguments.keys():
            os._exit(3)  # an error here would look like a bug that was caught
        bound.arguments.update({name: change(bound.arguments[name]) for name, change in changes.items()})
        return real(*bound.args, **bound.kwargs)

    return planted


def drawn_from(other: Function, **reported: object) -> Function:
    """Draft with other sampling settings, and report those rows, but draw each token from what ``other`` makes of its row."""

    def asked(ask: Ask) -> Ask:
        rng = SimpleNamespace(choose=lambda probs: ask.rng.choose(other(probs)))
        return ask._replace(rng=rng, sampling=replace(ask.sampling, **reported))

    return given(asks=lambda asks: [asked(ask) for ask in asks])


def changed(thing: object, **attributes: object) -> object:
    """A shallow copy with other attributes."""
    other = copy.copy(thing)
    vars(other).update(attributes)
    return other


def one_coin(rng: object) -> object:
    """Draws in which one uniform number decides on all drafts."""
    uniform = torch.rand((), generator=rng.generator)
    return SimpleNamespace(choose=rng.choose, accepts=lambda p_target, p_draft: bool(uniform * p_draft < p_target))


def lengthened(result: object, *states: object) -> object:
    """The result, after one position beyond the end of these caches of a drafter has become valid."""
    for kv in [kv for state in states for kv in state.layers]:
        kv.length += 1
    return result


def windowed(kv: GrowingKV) -> GrowingKV:
    """The cache without all keys but the last eight."""
    if kv.keys is not None:
        kv.keys = kv.keys * (torch.arange(kv.capacity) >= kv.length - 8)[:, None]
    return kv


def moments_in_another_order(real: Function, path: Path, drafter: object, optimizer: torch.optim.Optimizer, wanted: object) -> int:
    steps, last = real(path, drafter, optimizer, wanted), {}
    for weight, state in optimizer.state.items():
        other = last.setdefault(weight.shape, state)
        state["exp_avg"], other["exp_avg"] = other["exp_avg"], state["exp_avg"]
    return steps


BUGS = {  # what breaks → how
    "The correction comes from the target's whole row: a rejected draft gets a second chance.": Bug(
        "verify.accept.residual", TOP_P, lambda real, p_target, p_draft: p_target
    ),
    "Every entry of the residual is at least 1e-8: tokens come up that the target forbids.": Bug(
        "verify.accept.residual", TOP_P, lambda real, p_target, p_draft: real((p_target - p_draft).clip(1e-8), 0 * p_draft)
    ),
    "The residual is not divided by its sum, so it is no distribution.": Bug(
        "verify.accept.residual", TOP_P, lambda real, p_target, p_draft: (p_target - p_draft).clip(0)
    ),
    "A residual of 1e-8 or less is replaced by the target's row.": Bug(
        "verify.accept.residual", SMALL, lambda real, p_t, p_d: real(p_t, p_d) if (p_t - p_d).clip(0).sum() > 1e-8 else p_t
    ),
    "After a fully accepted block the bonus is drawn from the last draft's own row.": Bug(
        "request.Request.p_target", PLAIN, given(logits=lambda rows: torch.cat([rows[:-1], rows[-2:][:1]]))
    ),
    "One uniform number decides on every draft of a block.": Bug("verify.accept.accept", UNIFORM, given(rng=one_coin)),
    "A draft is accepted whenever p_t ≥ p_d, and never otherwise.": Bug(
        "verify.sampling.Rng.accepts", UNIFORM, lambda real, self, p_target, p_draft: bool(p_draft <= p_target)
    ),
    "Drafts are cut away by the very verification that decides on them, where the target finds the first of them unlikely.": Bug(
        "verify.accept.accept", TOP_P, lambda real, x, p_d, p_t, rng: real(x if x and p_t[0][x[0]] > 0.3 else [], p_d, p_t, rng)
    ),
    "Only the drafter's side applies top-p: tokens come up outside the nucleus.": Bug(
        "request.Request.p_target", TOP_P, given(self=lambda r: changed(r, sampling=replace(r.sampling, top_p=1.0)))
    ),
    "Every row of a block is processed with the text before the block.": Bug(
        "verify.processors.ProcessedProbs.row", PENALTY, lambda real, self, k: real(changed(self, logits=self.logits[[k]]), 0)
    ),
    "Greedy decoding compares logits rounded to bfloat16.": Bug(
        "verify.sampling.Sampling.row", NEAR_TIE, lambda real, self, x: real(self, x if self.temperature else x.bfloat16())
    ),
    "Drafts are drawn from the nucleus but reported with their probabilities before top-p.": Bug(
        "draft.drafter.Drafter._sample", TOP_P, drawn_from(lambda probs: nucleus(probs, 0.8), top_p=1.0)
    ),
    "Drafts are drawn at temperature 2 but reported with probabilities at temperature 1.": Bug(
        "draft.drafter.Drafter._sample", HOT, drawn_from(torch.sqrt, temperature=1.0)
    ),
    "Drafts are drawn from bfloat16 probabilities and accepted with float32 ones.": Bug(
        "draft.drafter.Drafter._sample", TOP_P, drawn_from(lambda probs: probs.bfloat16().float())
    ),
    "After a fully accepted block the last draft is missing from the target's cache.": Bug(
        "rewind.RewindCache.rewind", TOP_P, lambda real, self, length: real(self, max(0, length - (length == self.length)))
    ),
    "The target's cache is not rewound: later tokens attend to rejected drafts.": Bug(
        "rewind.RewindCache.rewind", PLAIN, lambda real, self, length: None
    ),
    "The cache keeps a sliding window only: a rewind uncovers lost keys.": Bug("rewind.GrowingKV.rewind", WINDOW, given(self=windowed)),
    "When the cache outgrows its buffer, the last token's keys and values are not carried over.": Bug(
        "rewind.enlarged", CACHE, given(buffer=lambda kv: kv[:, :, : kv[0, 0, :, 0].count_nonzero() - 1])
    ),
    "Every pass but the first gives the target positions that are one too low.": Bug(
        "rewind.RewindLayer.get_seq_length", PLAIN, lambda real, self, *arguments: max(0, real(self, *arguments) - 1)
    ),
    "A closed slot leaves the last request's keys and values where they were.": Bug(
        "rewind.SlotCache.close", CLOSING, given(self=lambda cache: changed(cache, layers=[]))
    ),
    "A request attends to the padding after its own text.": Bug(
        "verify.lean.Attention._mask", LEAN, lambda real, self, window: None if self.widest == 1 else real(self, window)
    ),
    "A request's drafts are drawn with its neighbour's random numbers.": Bug(
        "draft.source.propose", NEIGHBOURS, given(asks=lambda asks: [ask._replace(rng=asks[0].rng) for ask in asks])
    ),
    "An end-of-text token among the accepted drafts is overlooked, and the text goes on after it.": Bug(
        "request.until_end", TOP_P, lambda real, tokens, end_ids: tuple(tokens)
    ),
    "A text goes one token beyond its length limit.": Bug(
        "engine.Engine.enqueue", PLAIN, given(request=lambda request: replace(request, limit=request.limit + 1))
    ),
    "τ counts accepted drafts after an end-of-text token.": Bug(
        "round.Output.tokens_per_round", TAU, lambda real, self: sum(r.accepted + 1 for r in self.rounds[1:]) / len(self.rounds[1:])
    ),
    "Taps are taken through the target's final norm, whose output the drafter never saw in training.": Bug(
        "target.target.Taps._keep", TAPS, lambda real, self, layer_id, out: real(self, layer_id, self.target.decoder.norm(out))
    ),
    "The drafter reads the layer after the one it was trained on (τ fell from 3.03 to 2.45).": Bug(
        "target.target.Target.forward", TAPS, given(taps=lambda taps: [i + 1 for i in taps])
    ),
    "A text runs on beyond the length at which LongRoPE moves all positions.": Bug(
        "target.target.Target.max_context", LONGROPE, lambda real, self: self.config.max_position_embeddings
    ),
    "The best budget over all candidates reads later confidences (Appendix A).": Bug(
        "schedule.PrefixScheduler.lengths", APPENDIX, lambda real, self, confidence, *_: GlobalArgmax(self.sps).lengths(confidence)
    ),
    "The scheduler weighs no step times, so all drafts are verified.": Bug(
        "schedule.PrefixScheduler._throughput", SCHEDULE, lambda real, self, expected, budget: expected
    ),
    "The target runs over the whole block whatever the schedule says.": Bug(
        "schedule.ConfidenceThreshold.lengths", THRESHOLD, lambda real, self, confidence, *_: [len(c) for c in confidence]
    ),
    "All confidences above the threshold count, so later ones decide.": Bug(
        "schedule.ConfidenceThreshold.lengths", CONDITIONAL, lambda real, self, cs, *_: [int((c >= self.threshold).sum()) for c in cs]
    ),
    "Probabilities over the reduced vocabulary are read as if its ids were the target's.": Bug(
        "draft.drafter.Drafter._spread", REDUCED, given(self=lambda d: changed(d, d2t=torch.arange(len(d.d2t))))
    ),
    "c_k is computed from x_k itself: whether x_k is checked depends on it.": Bug(
        "draft.drafter.Drafter._confidence", CONDITIONAL, given(drafts=lambda drafts: [(h, [*p[1:], p[-1]]) for h, p in drafts])
    ),
    "The confidence's logit is multiplied by its temperature.": Bug(
        "draft.drafter.Drafter._confidence", COOLED, given(self=lambda d: changed(d, sts_temperatures=[1 / t for t in d.sts_temperatures]))
    ),
    "The block's own keys and values stay in the drafter's cache.": Bug(
        "draft.drafter.Drafter._drawn", STATE, lambda real, self, asks: lengthened(real(self, asks), *(ask.state for ask in asks))
    ),
    "The block starts one position too late: acceptance fell from 0.8 to 0.22.": Bug(
        "draft.drafter.Drafter.blocks", PARALLEL, given(self=lambda d: changed(d, backbone=lambda x, at, kv: d.backbone(x, at + 1, kv)))
    ),
    "The context takes in the taps of a rejected draft: acceptance decays with the text.": Bug(
        "draft.drafter.Drafter.extend", PARALLEL, given(taps=lambda taps: torch.cat([taps, taps[:, -1:]], 1))
    ),
    "A request starts with the drafter's cache of the one before.": Bug(
        "draft.drafter.Drafter.new_state", PLAIN, lambda real, self, prompt=(): vars(self).setdefault("slot", real(self, prompt))
    ),
    "A request copies from what the one before it said.": Bug(
        "draft.lookup.ContextLookup.new_state", COPYING, lambda real, s, *p: replace(real(s, *p), follows=vars(s).setdefault("f", {}))
    ),
    "Copies begin with a token that is already there.": Bug(
        "draft.lookup.ContextLookup.copy", COPY, given(state=lambda s: changed(s, follows={gram: gram[-1] for gram in s.follows}))
    ),
    "A copied token is reported with half its probability.": Bug(
        "draft.lookup.ContextLookup.propose", COPY, lambda real, *a: [replace(d, probs=torch.eye(100)[d.tokens] / 2) for d in real(*a)]
    ),
    "In training a block sees the taps of its anchor, which drafting lacks.": Bug(
        "draft.backbone.block_mask", BLOCKS, given(anchors=lambda anchors: anchors + 1)
    ),
    "The autoregressive baseline is trained with the target's view of the anchor.": Bug(
        "draft.eagle.EagleDrafter.block_hidden", EAGLE, given(positions=lambda positions: positions + 1)
    ),
    "The baseline drafts one position too early, unlike in training.": Bug(
        "draft.eagle.EagleDrafter._step", EAGLE, given(position=lambda position: position - 1)
    ),
    "An entry made from the baseline's own feature stays in its cache.": Bug(
        "draft.eagle.EagleDrafter._draw", EAGLE_PIECES, lambda real, self, ask: lengthened(real(self, ask), ask.state)
    ),
    "Training cuts the steps of a block apart.": Bug("draft.eagle.EagleDrafter._inputs", EAGLE_STEPS, given(features=torch.Tensor.detach)),
    "The fast path rotates new context as if the text began there.": Bug(
        "cpu.fused.FusedBackbone.context", FUSED, given(positions=lambda positions: positions - positions.min())
    ),
    "The fast path norms the keys of a block with the weight of its queries.": Bug(
        "cpu.fused.FusedLayer.__call__", FUSED, given(self=lambda layer: changed(layer, head_norms=layer.head_norms[:1]))
    ),
    "In the compiled pass a token sees the place after its own.": Bug("cpu.kernels.Places", COMPILED, given(ends=lambda ends: ends + 1)),
    "A trace judges no draft after the end of the text.": Bug(
        "bench.trace._judged", TRACE_END, lambda real, r, text, end_ids: real(r, until_end(text, end_ids), end_ids)
    ),
    "A replay drafts one token too many before the length limit.": Bug(
        "bench.replay.replay", REPLAY, given(trace=lambda t: replace(t, about=t.about | {"max_new_tokens": t.about["max_new_tokens"] + 1}))
    ),
    "Weights are not compared with their digest.": Bug("formats.checkpoint._digest", DAMAGE, lambda real, tensors: "0" * 16),
    "Tap numbers of a format that counts from the embedding are taken as ours.": Bug(
        "formats.speculators.read", SPECULATORS, given(config=lambda config: config | {TAP_IDS: [i + 1 for i in config.get(TAP_IDS, ())]})
    ),
    "A resume gives the optimizer's moments to other weights.": Bug("train.checkpoint.load_checkpoint", RESUMED, moments_in_another_order),
}


def run_planted(name: str) -> None:
    """Plant one bug and run the test that it names, or none ("clean") and run those of all; exits with RAN and pytest's exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    if name in BUGS:
        BUGS[name].plant()
    tests = {str(TESTS / bug.caught_by) for bug in ([BUGS[name]] if name in BUGS else BUGS.values())}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--timeout=120", f"--rootdir={TESTS.parent}"]
    sys.exit(RAN + pytest.main([*options, *sorted(tests)]))


def exit_code(name: str) -> int:
    """0 if :func:`run_planted` saw all tests pass, 1 if one failed, else nothing is proved. Forked from a process that ran nothing."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.conftest", "hypothesis.stateful", "exact.planted", "exact.draws", "exact.greedy"])
    process = server.Process(target=run_planted, args=(name,))
    process.start()
    process.join()
    return process.exitcode - RAN
