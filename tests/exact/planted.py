"""Would the tests notice? Each bug replaces one function or method of the product, and the test that it names must fail then.

``python -m exact.planted`` plants each bug in a process of its own, which has run no test before: one that had might remember results.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dspark.rewind import GrowingKV

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
CACHE = "test_rewind.py::test_growing_keeps_what_was_written"
TAPS = "test_rewind.py::test_taps_are_the_residual_stream_after_the_named_layers"
CLOSING = "test_lean.py::test_closing_a_slot_moves_the_last_request_and_nothing_else"
LEAN = "test_lean.py::test_logits_and_taps_are_those_of_transformers[llama]"
NEIGHBOURS = "test_engine.py::test_a_requests_draws_are_its_own[0.7]"
TAU = "test_rounds.py::test_tokens_after_the_end_of_the_text_count_towards_nothing"
LONGROPE = "test_families.py::test_a_text_ends_where_longrope_would_move_the_positions"
COOLED = "test_draft.py::test_calibration_divides_the_logits_of_confidence"
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


@dataclass(frozen=True)
class Bug:
    """place: dotted, inside ``dspark``. caught_by: pytest's id of the test. breaks: what goes wrong. planted: replaces the place."""

    place: str
    caught_by: str
    breaks: str
    planted: Callable[..., object]

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


BUGS: dict[str, Bug] = {}


def at(place: str, caught_by: str, breaks: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    def keep(planted: Callable[..., object]) -> Callable[..., object]:
        BUGS[planted.__name__.replace("_", "-")] = Bug(place, caught_by, breaks, planted)
        return planted

    return keep


def recorded(real: Callable[..., object], drafter: object, hidden: torch.Tensor, asks: Sequence[object], **reported: object) -> object:
    """Draft as asked, but report rows of other sampling settings."""
    rows = [[] for _ in asks]

    def sampling(ask: object, kept: list[torch.Tensor]) -> SimpleNamespace:
        other = replace(ask.sampling, **reported)
        return SimpleNamespace(probs=lambda logits: (kept.append(other.probs(logits)), ask.sampling.probs(logits))[1])

    tokens, _ = real(drafter, hidden, [ask._replace(sampling=sampling(ask, kept)) for ask, kept in zip(asks, rows, strict=True)])
    return tokens, rows


class Planted:
    """Only a place for the functions: none is called as a method. Each takes the real function first, then its arguments."""

    @at("verify.accept.residual", TOP_P, "The correction comes from the target's whole row: a rejected draft gets a second chance.")
    def correction_from_target(real, p_target, p_draft):
        return p_target

    @at("verify.accept.residual", TOP_P, "Every entry of the residual is at least 1e-8: tokens come up that the target forbids.")
    def residual_epsilon(real, p_target, p_draft):
        difference = (p_target - p_draft).clip(1e-8)
        return difference / difference.sum()

    @at("verify.accept.residual", TOP_P, "The residual is not divided by its sum, so it is no distribution.")
    def residual_not_renormalised(real, p_target, p_draft):
        return (p_target - p_draft).clip(0)

    @at("verify.accept.residual", SMALL, "A residual of 1e-8 or less is replaced by the target's row.")
    def residual_small_mass(real, p_target, p_draft):
        return real(p_target, p_draft) if (p_target - p_draft).clip(0).sum() > 1e-8 else p_target

    @at("verify.accept.accept", PLAIN, "After a fully accepted block the bonus is drawn from the last draft's own row.")
    def bonus_from_the_wrong_row(real, draft_tokens, p_draft, p_target, rng):
        if draft_tokens and all(rng.accepts(p_target[k, token], p_draft[k, token]) for k, token in enumerate(draft_tokens)):
            return len(draft_tokens), rng.choose(p_target[len(draft_tokens) - 1])
        return real(draft_tokens, p_draft, p_target, rng)

    @at("verify.accept.accept", UNIFORM, "One uniform number decides on every draft of a block.")
    def one_coin_per_block(real, draft_tokens, p_draft, p_target, rng):
        uniform = torch.rand((), generator=rng.generator)
        kept = [bool(uniform * p_draft[k, token] < p_target[k, token]) for k, token in enumerate(draft_tokens)]
        return ([*kept, False].index(False), 0)

    @at("verify.sampling.Rng.accepts", UNIFORM, "A draft is accepted whenever p_t ≥ p_d, and never otherwise.")
    def acceptance_without_coin(real, self, p_target, p_draft):
        return bool(p_draft <= p_target)

    @at("verify.accept.accept", TOP_P, "Drafts that the target finds unlikely are cut away by the very verification that decides on them.")
    def window_reads_this_round(real, draft_tokens, p_draft, p_target, rng):
        likely = [bool(p_target[k, token] > 0.3) for k, token in enumerate(draft_tokens)]
        return real(draft_tokens[: [*likely, False].index(False)], p_draft, p_target, rng)

    @at("verify.sampling.LazyProbs.__init__", TOP_P, "Only the drafter's side applies top-p: tokens come up outside the nucleus.")
    def target_without_top_p(real, self, sampling, logits):
        real(self, replace(sampling, top_p=1.0), logits)

    @at("verify.sampling.Sampling.probs", NEAR_TIE, "Greedy decoding compares logits rounded to bfloat16.")
    def greedy_after_rounding(real, self, logits):
        return real(self, logits.bfloat16() if self.temperature == 0 else logits)

    @at("draft.drafter.Drafter._sample", TOP_P, "Drafts are drawn from the nucleus but reported with their probabilities before top-p.")
    def drafter_reports_without_top_p(real, self, hidden, asks):
        return recorded(real, self, hidden, asks, top_p=1.0)

    @at("draft.drafter.Drafter._sample", HOT, "Drafts are reported with probabilities at temperature 1, without top-k.")
    def reported_at_another_temperature(real, self, hidden, asks):
        return recorded(real, self, hidden, asks, temperature=1.0, top_k=0)

    @at("draft.drafter.Drafter._sample", TOP_P, "Drafts are drawn from bfloat16 probabilities and accepted with float32 ones.")
    def drawn_in_low_precision(real, self, hidden, asks):
        rounding = [SimpleNamespace(choose=lambda probs, rng=ask.rng: rng.choose(probs.bfloat16().float())) for ask in asks]
        return real(self, hidden, [ask._replace(rng=rng) for ask, rng in zip(asks, rounding, strict=True)])

    @at("rewind.RewindCache.rewind", TOP_P, "After a fully accepted block the last draft is missing from the target's cache.")
    def cache_short_after_full_acceptance(real, self, length):
        real(self, max(0, length - (length == self.length)))

    @at("rewind.RewindCache.rewind", PLAIN, "The target's cache is not rewound: later tokens attend to rejected drafts.")
    def rejected_drafts_stay_in_the_cache(real, self, length):
        pass

    @at("rewind.GrowingKV.rewind", WINDOW, "The cache keeps a sliding window only, so a rewind uncovers positions whose keys are gone.")
    def sliding_window_forgets(real, self, length):
        self.keys = self.keys.clone()
        self.keys[:, :, : max(0, self.length - 8)] = 0
        real(self, length)

    @at("rewind.GrowingKV._grow", CACHE, "When the cache outgrows its buffer, the last token's keys and values are not carried over.")
    def growing_loses_a_row(real, self, keys, values, valid):
        real(self, keys, values, valid)
        self.keys[:, :, max(0, valid - 1) : valid] = 0

    @at("rewind._RewindLayer.get_seq_length", PLAIN, "Every pass but the first gives the target positions that are one too low.")
    def target_position_off_by_one(real, self, *arguments):
        return max(0, real(self, *arguments) - 1)

    @at("rewind.SlotCache.close", CLOSING, "A closed slot leaves the last request's keys and values where they were.")
    def closing_moves_nothing(real, self, slot):
        layers, self.layers = self.layers, []
        real(self, slot)
        self.layers = layers

    @at("verify.lean._Attention._mask", LEAN, "A request attends to the padding after its own text.")
    def padding_is_seen(real, self, window):
        return None if self.widest == 1 else real(self, window)

    @at("draft.source.propose", NEIGHBOURS, "A request's drafts are drawn with its neighbour's random numbers.")
    def draws_of_the_neighbour(real, source, asks):
        return real(source, [ask._replace(rng=asks[0].rng) for ask in asks])

    @at("request.until_end", TOP_P, "An end-of-text token among the accepted drafts is overlooked, and the text goes on after it.")
    def end_of_text_inside_a_block(real, tokens, end_ids):
        return tuple(tokens)

    @at("engine.Engine.enqueue", PLAIN, "A text goes one token beyond its length limit.")
    def length_limit_off_by_one(real, self, request):
        return real(self, replace(request, limit=request.limit + 1))

    @at("round.Output.tokens_per_round", TAU, "τ counts accepted drafts after an end-of-text token.")
    def tau_counts_after_the_end(real, self):
        return sum(r.accepted + 1 for r in self.rounds[1:]) / len(self.rounds[1:])

    @at("target.target.Taps._keep", TAPS, "Taps are taken through the target's final norm, whose output the drafter never saw in training.")
    def tap_after_the_final_norm(real, self, layer_id, out):
        real(self, layer_id, self.target.decoder.norm(out if isinstance(out, torch.Tensor) else out[0]))

    @at("target.target.Target.forward", TAPS, "The drafter reads the layer after the one it was trained on (τ fell from 3.03 to 2.45).")
    def tap_one_layer_off(real, self, token_ids, cache, taps=(), **options):
        return real(self, token_ids, cache, [i + 1 for i in taps], **options)

    @at("target.target.Target.max_context", LONGROPE, "A text runs on beyond the length at which LongRoPE moves all positions.")
    def positions_that_move_with_the_length(real, self):
        return int(getattr(self.config, "max_position_embeddings", None) or 1 << 30)

    @at("schedule.prefix.PrefixScheduler.lengths", APPENDIX, "The best budget over all candidates reads later confidences (Appendix A).")
    def global_argmax(real, self, confidence):
        from exact.tables import GlobalArgmax

        return GlobalArgmax(self.sps).lengths(confidence)

    @at("schedule.prefix.PrefixScheduler._throughput", SCHEDULE, "The scheduler weighs no step times, so all drafts are verified.")
    def scheduler_without_step_times(real, self, expected, budget):
        return expected

    @at("schedule.policies.ConfidenceThreshold.lengths", THRESHOLD, "The target runs over the whole block whatever the schedule says.")
    def whole_block_is_verified(real, self, confidence):
        return [len(c) for c in confidence]

    @at("schedule.policies.ConfidenceThreshold.lengths", CONDITIONAL, "All confidences above the threshold count, so later ones decide.")
    def threshold_counts_all(real, self, confidence):
        return [int((c >= self.threshold).sum()) for c in confidence]

    @at("draft.drafter.Drafter._spread", REDUCED, "Probabilities over the reduced vocabulary are read as if its ids were the target's.")
    def draft_vocabulary_not_mapped(real, self, rows):
        return F.pad(torch.stack(rows), (0, self.config.vocab_size - len(rows[0])))

    @at("draft.drafter.Drafter._confidence", CONDITIONAL, "c_k is computed from x_k itself: whether x_k is checked depends on it.")
    def confidence_sees_the_token(real, self, hidden, previous):
        return real(self, hidden, [*previous[1:], previous[-1]])

    @at("draft.drafter.Drafter._confidence", COOLED, "The confidence's logit is multiplied by its temperature.")
    def calibration_upside_down(real, self, hidden, previous):
        kept = self.sts_temperatures
        self.sts_temperatures = tuple(1 / t for t in kept)
        try:
            return real(self, hidden, previous)
        finally:
            self.sts_temperatures = kept

    @at("draft.drafter.Drafter._run_backbone", STATE, "The block's own keys and values stay in the drafter's cache.")
    def block_stays_in_the_drafters_cache(real, self, asks):
        hidden = real(self, asks)
        for kv in [kv for ask in asks for kv in ask.state.layers]:
            kv.length += 1
        return hidden

    @at("draft.drafter.Drafter.backbone", PARALLEL, "The block starts one position too late: acceptance fell from 0.8 to 0.22.")
    def drafter_position_off_by_one(real, self, tokens, positions, contexts, mask=None):
        return real(self, tokens, positions + isinstance(contexts[0], GrowingKV), contexts, mask)

    @at("draft.drafter.Drafter.extend", PARALLEL, "The context takes in the taps of a rejected draft: acceptance decays with the text.")
    def rejected_drafts_stay_in_the_drafters_context(real, self, state, token_ids, taps):
        real(self, state, token_ids, torch.cat([taps, taps[:, -1:]], 1))

    @at("draft.drafter.Drafter.new_state", PLAIN, "A request starts with the drafter's cache of the one before.")
    def reused_drafter_cache(real, self, prompt=()):
        self.__dict__.setdefault("slot", real(self, prompt))
        return self.__dict__["slot"]

    @at("draft.lookup.ContextLookup.new_state", COPYING, "A request copies from what the one before it said.")
    def reused_context(real, self, prompt=()):
        old = self.__dict__.get("old")
        self.old = real(self, prompt)
        if old is not None:
            self.old.follows = old.follows
        return self.old

    @at("draft.lookup.ContextLookup.extend", COPY, "Copies begin with a token that is already there.")
    def copy_starts_one_early(real, self, state, token_ids, taps):
        real(self, state, token_ids, taps)
        state.follows = {gram: gram[-1] for gram in state.follows}

    @at("draft.lookup.ContextLookup._one_hot", COPY, "A copied token is reported with the rate at which copies came true.")
    def copies_reported_as_likely_as_they_proved(real, self, tokens, rates):
        draft = real(self, tokens, rates)
        return replace(draft, probs=draft.probs * torch.tensor(rates)[:, None])

    @at("draft.backbone.block_mask", BLOCKS, "In training a block sees the taps of its anchor, which drafting lacks.")
    def context_holds_the_anchor(real, anchors, block_size, length):
        return real(anchors + 1, block_size, length)

    @at("draft.eagle.EagleDrafter.block_hidden", EAGLE, "The autoregressive baseline is trained with the target's view of the anchor.")
    def eagle_feature_of_the_anchor_itself(real, self, token_ids, taps, tokens, previous, positions):
        return real(self, token_ids, taps, tokens, previous, positions + 1)

    @at("draft.eagle.EagleDrafter._step", EAGLE, "The baseline drafts one position too early, unlike in training.")
    def eagle_position_off_by_one(real, self, x, position, entries):
        return real(self, x, position - 1, entries)

    @at("draft.eagle.EagleDrafter.draft", EAGLE_PIECES, "An entry made from the baseline's own feature stays in its cache.")
    def eagle_own_features_stay(real, self, state, anchor, window, sampling, rng):
        draft = real(self, state, anchor, window, sampling, rng)
        state.layers[0].length += 1
        return draft

    @at("draft.eagle.EagleDrafter._inputs", EAGLE_STEPS, "Training cuts the steps of a block apart.")
    def eagle_steps_detached(real, self, tokens, features):
        return real(self, tokens, features.detach())

    @at("cpu.fused.FusedBackbone.context", FUSED, "The fast path rotates new context as if the text began there.")
    def fused_context_starts_anew(real, self, taps, positions):
        return real(self, taps, positions - positions.min())

    @at("cpu.fused.FusedLayer.__init__", FUSED, "The fast path norms the keys of a block with the weight of its queries.")
    def fused_heads_share_one_norm(real, self, *arguments):
        real(self, *arguments)
        self.head_norms[self.heads :] = self.head_norms[0]

    @at("bench.trace._judged", TRACE_END, "A trace judges no draft after the end of the text.")
    def trace_stops_at_the_end_of_text(real, r, text, eos_token_ids):
        ends = [i for i, token in enumerate(text) if token in eos_token_ids]
        return real(r, text[: ends[0] + 1] if ends else text, eos_token_ids)

    @at("bench.replay.replay", REPLAY, "A replay drafts one token too many before the length limit.")
    def replay_counts_the_limit_wrong(real, trace, policy):
        return real(replace(trace, about=trace.about | {"max_new_tokens": trace.about["max_new_tokens"] + 1}), policy)

    @at("formats.checkpoint._digest", DAMAGE, "Weights are not compared with the digest they were written with.")
    def damaged_weights_are_loaded(real, tensors):
        return "0" * 16

    @at("formats.speculators.read", SPECULATORS, "Tap numbers of a format that counts from the embedding are taken as ours.")
    def tap_numbers_of_another_format(real, config, tensors):
        stored = real(config, tensors)
        return stored and replace(stored, values=stored.values | {"target_layer_ids": config["aux_hidden_state_layer_ids"]})

    @at("train.checkpoint.load_checkpoint", RESUMED, "A resumed training gives the optimizer's moments to other weights.")
    def moments_in_another_order(real, path, drafter, optimizer, wanted):
        steps, last = real(path, drafter, optimizer, wanted), {}
        for weight, state in optimizer.state.items():
            other = last.setdefault(weight.shape, state)
            state["exp_avg"], other["exp_avg"] = other["exp_avg"], state["exp_avg"]
        return steps


def in_a_fork(name: str) -> int:
    """Plant one bug in a child process and run its test there; "clean" plants nothing and runs the tests of all bugs.

    Returns pytest's exit code: 0 if every test passed, 1 if a test failed; anything else proves nothing.
    """
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        tests = {bug.caught_by for bug in BUGS.values() if name in ("clean", bug.planted.__name__.replace("_", "-"))}
        if name in BUGS:
            BUGS[name].plant()
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--timeout=120", f"--rootdir={TESTS.parent}"]
        code = int(pytest.main([*options, *(str(TESTS / test) for test in sorted(tests))]))
    finally:
        os._exit(code)


def exit_codes(names: Sequence[str]) -> dict[str, int]:
    """:func:`in_a_fork` for each name, from a fresh process."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    fresh = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | fresh
    found = subprocess.run([sys.executable, "-m", "exact.planted", *names], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {name: int(code) for name, code in map(str.split, found.stdout.splitlines())}


if __name__ == "__main__":
    for heavy in ("hypothesis.stateful", "exact.draws", "exact.greedy"):  # imported once for all forks
        importlib.import_module(heavy)
    planted = importlib.import_module("exact.planted")  # this very file, by the name under which tests know it
    for each in planted.BUGS.values():
        pkgutil.resolve_name(f"dspark.{each.place}")
    for chosen in sys.argv[1:]:
        print(chosen, planted.in_a_fork(chosen), flush=True)
