"""What only a GPU can show: graphs are captured and replayed, give the same texts, and a round waits for the host at two places only."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny import random_prompt, tiny_drafter, tiny_target

import dspark
from dspark.cpu import pack_target
from dspark.engine import Engine
from dspark.schedule import Policy
from dspark.target.target import Target
from dspark.verify import graphs
from dspark.verify.static import static_pass

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use: CUDA graphs are not tested here")
POLICIES = [dspark.FixedWindow(), dspark.ConfidenceThreshold(0.3), dspark.PrefixScheduler(lambda b: 1 / (1 + 0.1 * b)), dspark.MTP1()]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


def on(device: torch.device, **config: object) -> Target:
    target = tiny_target(eos_token_id=None, **config)
    return Target(target.model.to(device), None, "tiny")


def reference(target: Target, prompt: list[int], count: int) -> list[int]:
    row = torch.tensor([prompt], device=target.device)
    out = target.model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=count, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_graphed_greedy_texts_are_those_of_model_generate(device: torch.device, policy: Policy) -> None:
    target = pack_target(on(device))
    assert target.pass_name == "graphs"
    drafter = tiny_drafter(target)
    prompts = [random_prompt(seed, 5 + 9 * seed) for seed in range(4)]
    for source in (drafter, dspark.ContextLookup(drafter, 1)):
        for _ in range(2):
            found = [o.token_ids for o in dspark.generate(target, source, prompts, max_new_tokens=40, policy=policy)]
            assert found == [reference(target, prompt, 40) for prompt in prompts]
    plain = dspark.generate(target, None, prompts[0], max_new_tokens=40).token_ids
    assert plain == reference(target, prompts[0], 40)
    gc.collect()
    assert target.pass_name == "graphs"  # nothing failed to be captured
    assert any(callable(program) for buffers in target.verifier.free for program in buffers.programs.values())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_round_waits_for_the_host_at_its_two_places_only(
    device: torch.device, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch itself raises at every other wait."""
    target, waits, real = pack_target(on(device)), [], graphs.to_host

    def allowed(x: torch.Tensor) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("default")
        waits.append(x)
        found = real(x)
        torch.cuda.set_sync_debug_mode("error")
        return found

    engine = Engine(target, tiny_drafter(target), dspark.ConfidenceThreshold(0.3), max_requests=3)
    for i in range(3):
        engine.submit([5, 6, 7 + i], max_new_tokens=60, temperature=temperature, seed=i)
    for _ in range(10):  # prompts, and the shapes that are captured
        engine.step()
    monkeypatch.setattr(graphs, "to_host", allowed)
    try:
        for _ in range(10):
            waits.clear()
            torch.cuda.set_sync_debug_mode("error")
            finished = engine.step()
            torch.cuda.set_sync_debug_mode("default")
            assert 1 <= len(waits) <= 2 and len(finished) == 3
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sampled_texts_are_the_same_with_and_without_graphs(device: torch.device) -> None:
    texts = []
    for new_capture in (None, lambda: lambda program: (program, 0)):
        target = on(device)
        target.verifier = static_pass(target, new_capture)
        drafter = tiny_drafter(target, draft_vocab_size=60)
        options = {"max_new_tokens": 50, "temperature": 0.9, "seed": 1, "policy": dspark.FixedWindow()}
        texts.append([o.token_ids for o in dspark.generate(target, drafter, [[5, 6, 7], [8, 9]], **options)])
        texts.append([o.token_ids for o in dspark.generate(target, drafter, [[5, 6, 7], [8, 9]], top_p=0.9, top_k=20, **options)])
    assert texts[0] == texts[2] and texts[1] == texts[3] and texts[0] != texts[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_decodes_and_graphs_are_counted(device: torch.device, dtype: torch.dtype) -> None:
    target = pack_target(on(device, dtype=dtype))
    before = target.verifier.graphs.memory
    found = dspark.generate(target, tiny_drafter(target), random_prompt(0, 30), max_new_tokens=40, policy=dspark.FixedWindow())
    assert len(found.token_ids) == 40 and target.verifier.graphs.memory <= before and target.pass_name == "graphs"


def test_many_requests_at_once(device: torch.device) -> None:
    target = pack_target(on(device))
    prompts = [random_prompt(seed, 3 + seed % 40) for seed in range(200)]
    found = dspark.generate(target, tiny_drafter(target), prompts, max_new_tokens=12, policy=dspark.FixedWindow())
    wrong = [i for i, o in enumerate(found[:20]) if o.token_ids != reference(target, prompts[i], 12)]
    assert not wrong


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="cuda:99"):
        dspark.load_target("default", device="cuda:99")
