"""What goes into a round and what is kept of it: no more is verified than was scheduled, no more is remembered than was committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from test_decode import Oracle, greedy_reference, policies
from tiny import tiny_drafter, tiny_target
from torch import Tensor

import dspark
from dspark.decode import Round, rounds
from dspark.draft.drafter import Drafter, DraftState
from dspark.draft.source import Draft
from dspark.engine import Engine
from dspark.request import Request
from dspark.schedule import Policy
from dspark.verify.sampling import Rng, Sampling

PROMPT = [5, 6, 7]


class Reading:
    """A drafter that keeps the tokens and taps it is given."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.tokens, self.taps = drafter, [], []
        self.block_size, self.target_layer_ids, self.has_confidence = drafter.block_size, drafter.target_layer_ids, True

    def new_state(self, prompt: Sequence[int]) -> DraftState:
        self.state = self.drafter.new_state(prompt)
        return self.state

    def extend(self, state: DraftState, token_ids: Sequence[int], taps: Tensor) -> None:
        self.tokens += token_ids
        self.taps.append(taps)
        self.drafter.extend(state, token_ids, taps)

    def draft(self, state: DraftState, *how: object) -> Draft:
        return self.drafter.draft(state, *how)


@pytest.mark.parametrize(
    "policy",
    [dspark.ConfidenceThreshold(0.5, on="conditional"), dspark.PrefixScheduler(lambda b: 1 / (1 + 0.2 * b))],
    ids=lambda policy: type(policy).__name__,
)
def test_the_target_runs_over_the_anchor_and_the_scheduled_drafts_only(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    target, passes = tiny_target(eos_token_id=None), []
    forward = target.forward

    def noting(token_ids: Tensor, *rest: object, **options: object) -> tuple[Tensor, Tensor | None]:
        passes.append(token_ids[0].tolist())
        return forward(token_ids, *rest, **options)

    monkeypatch.setattr(target, "forward", noting)
    out = dspark.generate(target, tiny_drafter(target), PROMPT, max_new_tokens=40, temperature=1.0, policy=policy)
    assert passes == [PROMPT, *([r.anchor, *r.draft_tokens[: r.verify_length]] for r in out.rounds[1:])]
    assert any(0 < r.verify_length < len(r.draft_tokens) for r in out.rounds)


class AcceptsAll(Rng):
    """Every acceptance draw favours the draft."""

    def accepts(self, p_target: Tensor, p_draft: Tensor) -> bool:
        return True


@pytest.mark.parametrize("policy", policies(4), ids=lambda policy: type(policy).__name__)
def test_only_the_acceptance_draws_decide_how_many_checked_drafts_stay(policy: Policy) -> None:
    """Cutting a block after the target has seen it would depend on the tokens and bend the distribution."""
    target, rng = tiny_target(eos_token_id=None), AcceptsAll(torch.Generator().manual_seed(0))
    engine = Engine(target, tiny_drafter(target), policy)
    stream = list(rounds(engine, engine.enqueue(Request(prompt=PROMPT, limit=20, sampling=Sampling(1.0), rng=rng))))
    assert [r.accepted for r in stream] == [r.verify_length for r in stream]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_drafters_context_is_the_committed_text_before_the_anchor(temperature: float) -> None:
    target = tiny_target(eos_token_id=None)
    reading = Reading(tiny_drafter(target))
    out = dspark.generate(target, reading, PROMPT, max_new_tokens=40, temperature=temperature)
    assert reading.tokens == [*PROMPT, *out.token_ids][:-1]
    taps = torch.cat(reading.taps, 1)
    assert taps.shape[1] == len(reading.tokens)
    assert torch.allclose(taps, target.forward(torch.tensor([reading.tokens]), None, reading.target_layer_ids)[1], atol=1e-4)
    assert any(r.accepted < r.verify_length for r in out.rounds)


@pytest.mark.parametrize("copying", [False, True])
def test_a_request_leaves_nothing_behind_for_the_next(copying: bool) -> None:
    """The same rounds, drafts and confidences included, as from a fresh drafter."""

    def source() -> object:
        drafter = tiny_drafter(target)
        return dspark.ContextLookup(drafter, 1) if copying else drafter

    def run(source: object, prompt: list[int]) -> list[Round]:
        found = dspark.generate(target, source, prompt, max_new_tokens=30, temperature=1.0).rounds
        return [replace(r, draft_seconds=0.0, verify_seconds=0.0, seconds=0.0) for r in found]

    target = tiny_target(eos_token_id=None)
    used = source()
    run(used, [8, 9] * 10)
    assert run(used, PROMPT * 3) == run(source(), PROMPT * 3)


def test_tokens_after_the_end_of_the_text_count_towards_nothing() -> None:
    target = tiny_target(eos_token_id=None)
    text = greedy_reference(target, PROMPT, 30)
    first = text.index(text[6])
    target.eos_token_ids = frozenset([text[6]])
    out = dspark.generate(target, Oracle(tiny_drafter(target), text), PROMPT, max_new_tokens=30)
    last = out.rounds[-1]
    assert last.accepted >= len(last.committed)  # the end was an accepted draft with more of the block after it
    assert out.tokens_per_round == first / (len(out.rounds) - 1)


@pytest.mark.parametrize("copying", [False, True])
def test_every_sampled_token_lies_in_the_targets_nucleus(copying: bool) -> None:
    target, sampling = tiny_target(eos_token_id=None), Sampling(2.0, top_p=0.6)
    drafter = tiny_drafter(target)
    source = dspark.ContextLookup(drafter, 1) if copying else drafter
    ids = dspark.generate(target, source, PROMPT, max_new_tokens=60, temperature=2.0, top_p=0.6).token_ids
    logits = target.forward(torch.tensor([[*PROMPT, *ids]]), None)[0][0, len(PROMPT) - 1 : -1]
    assert (sampling.probs(logits)[range(60), ids] > 0).all()
