"""A request's text is what it is alone, in random mixtures of requests, policies, sources, joins and cancels."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from static import static_target
from tiny import Wavering, letter_tokenizer, reference, tiny_drafter, tiny_target

import dspark
from dspark.bench.arms import Models
from dspark.bench.measure import Trial, first_divergence
from dspark.bench.speed import weigh
from dspark.draft.source import Draft, DraftSource
from dspark.engine import Engine
from dspark.request import Request
from dspark.schedule import POLICIES, Policy, make_policy
from dspark.target.target import Target
from dspark.verify.lean import lean_pass

BLOCK, LONGEST = 4, 12  # tokens of a block, tokens of a text
MIXTURES = {"transformers": 25, "lean": 100, "static": 25}  # pass → how many
Texts = dict[tuple[int, ...], list[int]]


class Foreseeing:
    """Drafts every request's coming text with errors, so that blocks of all requests are accepted to different lengths."""

    target_layer_ids, has_confidence, block_size = (0,), True, BLOCK

    def __init__(self, target: Target, texts: Texts) -> None:
        self.target, self.texts = target, texts

    def new_state(self, prompt: Sequence[int]) -> tuple[Wavering, dict[str, int]]:
        source = Wavering(self.target, self.texts[tuple(prompt)], BLOCK, 0.2, seed=sum(prompt))
        return source, source.new_state(prompt)

    def extend(self, state: tuple[Wavering, dict[str, int]], token_ids: Sequence[int], taps: torch.Tensor) -> None:
        state[0].extend(state[1], token_ids, taps)

    def draft(self, state: tuple[Wavering, dict[str, int]], *asked: object) -> Draft:
        return state[0].draft(state[1], *asked)


def any_policy(name: str, draw: random.Random) -> Policy:
    """The policy of this name with random numbers, on made-up step times with random stairs."""
    row = POLICIES[name]
    shares = sorted((draw.random() for p in row.parameters if p.step != 1), reverse=True)  # adaptive wants them falling
    values = {p.name: draw.randint(1, BLOCK) if p.step == 1 else shares.pop(0) for p in row.parameters}
    stair, rise = draw.randint(1, 8), draw.uniform(0.01, 0.3)
    return make_policy(name, values, lambda: lambda tokens: 1 / (1 + rise * (tokens // stair)))


def cut(target: Target, text: list[int], limit: int, stop: str | None) -> list[int]:
    """The text up to a limit, an end-of-text token or a stop string, looked for in the text so far, token by token."""
    stopped = [n for n in range(1, len(text) + 1) if stop is not None and stop in target.decode(text[:n])]
    ends = sorted(stopped + [n for n, token in enumerate(text, 1) if token in target.eos_token_ids])
    return text[: min(limit, *ends[:1], len(text))]


def mixture(target: Target, texts: Texts, sources: Sequence[DraftSource], seed: int) -> Counter[str]:
    """Serve one random mixture and compare every text with the one that its request gets alone. Counts what happened."""
    draw = random.Random(seed)
    name, source = sorted(POLICIES)[seed % len(POLICIES)], draw.choice(sources)
    policy = any_policy(name, draw)
    engine = Engine(target, source, policy, max_requests=draw.randint(1, 5))
    todo, requests, met = draw.randint(2, 7), [], Counter({name: 1})
    while todo or engine.waiting or engine.active:
        while todo and (draw.random() < 0.5 or not engine.active):
            todo -= 1
            prompt, options = draw.choice(list(texts)), {"max_new_tokens": draw.randint(1, LONGEST), "seed": draw.randint(0, 9)}
            if sampled := draw.random() < 0.25:
                options |= {"temperature": draw.uniform(0.3, 2), "top_k": draw.choice([0, 20]), "top_p": draw.choice([1.0, 0.8])}
            elif draw.random() < 0.3:
                start = draw.randrange(len(texts[prompt]))
                options["stop"] = target.decode(texts[prompt][start : start + draw.randint(1, 2)]) or "~"
            requests.append((engine.submit(list(prompt), **options), options, sampled))
        if engine.active and draw.random() < 0.06:
            engine.cancel(draw.choice([*engine.active, *engine.waiting]))
        rounds = engine.step()
        met["widest"] = max(met["widest"], len(rounds))
        for _, finished in rounds:
            met.update(accepted=finished.accepted, rejected=finished.verify_length - finished.accepted)
            met["unchecked"] += len(finished.draft_tokens) - finished.verify_length
            met["inside"] += finished.committed[-1] in target.eos_token_ids and len(finished.committed) <= finished.accepted
    assert not getattr(engine.cache, "slots", ()), "every slot was given back"
    for request, options, sampled in requests:
        met.update({request.status: 1, "sampled": sampled, "stopped": "stop" in options})
        if not sampled:
            expected = cut(target, texts[tuple(request.prompt)], options["max_new_tokens"], options.get("stop"))
            compare(target, request, expected, f"mixture {seed}, {name}")
        elif not hasattr(policy, "sps"):  # a scheduler cuts blocks by what its neighbours are like: same distribution, other draws
            alone = dspark.generate(target, source, request.prompt, policy=policy, **options).token_ids
            assert request.token_ids == alone[: len(request.token_ids)], f"mixture {seed}, {name}, sampled"
    return met


def compare(target: Target, request: Request, expected: list[int], where: str) -> None:
    """Token for token, up to where a request was cancelled; a flip is allowed only between tokens that rounding can swap."""
    whole = expected[: len(request.token_ids)] if request.status == "cancelled" else expected
    if (i := first_divergence(request.token_ids, whole)) >= 0:
        trial = Trial(request.token_ids, request.rounds[1:], 0.0, 0.0)
        margin, noise = weigh(Models(target, None, target), request.prompt, whole, trial, i)
        assert margin <= noise, f"{where}: token {i} of {request.id} differs, margin {margin:g}, rounding {noise:g}"


@pytest.fixture(scope="module", params=MIXTURES)
def served(request: pytest.FixtureRequest) -> tuple[int, tuple[Target, Texts, list[DraftSource]]]:
    """How many mixtures; a target, prompts with the text of each as if nothing ended it, and sources. One token ends texts."""
    target = (static_target if request.param == "static" else tiny_target)(num_hidden_layers=2, eos_token_id=None)
    target.tokenizer = letter_tokenizer()
    if request.param == "lean":
        target.verifier = lean_pass(target)
    draw = random.Random(0)
    texts = {}
    for _ in range(20):
        prompt = [draw.randrange(4, 100) for _ in range(draw.randint(1, 12))]
        texts[tuple(prompt)] = reference(target, prompt, LONGEST)
    target.eos_token_ids = frozenset([Counter(token for text in texts.values() for token in text[2:]).most_common(1)[0][0]])
    for prompt, text in texts.items():
        assert dspark.generate(target, None, list(prompt), max_new_tokens=LONGEST).token_ids == cut(target, text, LONGEST, None)
    drafter, seeing = tiny_drafter(target, target_layer_ids=(0,)), Foreseeing(target, texts)
    copying = [dspark.ContextLookup(drafter, 1), dspark.ContextLookup(None, 1, BLOCK, target=target)]
    return MIXTURES[request.param], (target, texts, [seeing, seeing, drafter, *copying])


def test_a_request_is_served_as_if_it_were_alone(served: tuple[int, tuple[Target, Texts, list[DraftSource]]]) -> None:
    """Random lengths, policies of the registry, sources, samplings, stop strings, joins, cancels and numbers of places."""
    met, (mixtures, parts) = Counter(), served
    for seed in range(mixtures):
        found = mixture(*parts, seed)
        met, widest = met + found, max(met["widest"], found["widest"])
        met["widest"] = widest
    assert min(met[name] for name in POLICIES) >= mixtures // len(POLICIES)
    assert met["finished"] > 2 * mixtures and met["widest"] > 3 and not met["failed"]
    assert min(met["accepted"], met["rejected"]) > mixtures / 2
    assert min(met["unchecked"], met["sampled"], met["stopped"], 2 * met["cancelled"]) > mixtures / 4
    assert met["inside"]  # an accepted draft ended the text, with more of its block after it
