"""The pass on static buffers gives what the lean pass gives, and decoding survives whatever keeps it from CUDA graphs."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from static import pretended_graphs, static_target
from test_decode import greedy_reference
from test_lean import random_target
from tiny import random_prompt, tiny_drafter, tiny_target

import dspark
from dspark.cpu import pack_target
from dspark.load import usable_dtype
from dspark.verify.graphs import Graphs
from dspark.verify.lean import lean_pass
from dspark.verify.static import StaticPass, bucket, static_pass


@pytest.mark.parametrize("name", ["llama with biases, one key head, tied", "mistral with a window", "qwen3"])
def test_logits_and_taps_are_those_of_the_lean_pass(name: str) -> None:
    """Requests that pause, long pieces that run eagerly, rewinds, and a cache that must grow; every bucket is captured and replayed."""
    target = random_target(name)
    lean, static = lean_pass(target), static_pass(target, pretended_graphs)
    caches = lean.new_cache(), static.new_cache()
    slots, kept = [[cache.open() for _ in range(4)] for cache in caches], []
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 20, 1, 3), *[(1, 1, 1, 1)] * 3, *[(6, 1, 3, 1)] * 3, (70, 2, 1, 1), *[(0, 3, 2, 0), (0, 0, 1, 2)] * 3]
    for counts in [*shapes, (0, 150, 0, 0), *[(0, 60, 1, 2)] * 3]:
        tokens = [torch.randint(100, (n,), generator=generator).tolist() for n in counts[::-1] if n]
        chosen = [[slot for slot, n in zip(s, counts, strict=True) if n][::-1] for s in slots]
        found, expected = (
            run(tokens, s, cache, (-1, 0, 1)) for run, s, cache in zip((static, lean), chosen[::-1], caches[::-1], strict=True)
        )
        for mine, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
            assert mine.shape == theirs.shape
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert all(torch.equal(tensor, copy) for tensor, copy in kept)  # results outlive the next replay
        kept = [(tensor, tensor.clone()) for tensor in (*found[0], *found[1])]
        for pair in zip(*slots, strict=True):
            for slot in pair:
                slot.rewind(slot.length - min(2, slot.length - 1))
    assert caches[1].capacity == 512 and caches[1].buffers.programs
    caches[1].reserve(513)
    assert not caches[1].buffers.programs  # graphs of the old buffers are gone


def test_padding_overwrites_no_key_of_a_slot_that_fills_its_row() -> None:
    run = static_target().verifier
    cache = run.new_cache()
    slots = [cache.open() for _ in range(4)]
    run([random_prompt(0, 20)] * 3, slots[:3], cache)
    run([random_prompt(1, 256)], slots[3:], cache)
    before = [buffer[3, :, :256].clone() for buffer in cache.layers[0]]
    run([[5, 6], [7, 8], [9]], slots[:3], cache)
    assert all(torch.equal(old, buffer[3, :, :256]) for old, buffer in zip(before, cache.layers[0], strict=True))


def test_buckets_waste_at_most_a_third() -> None:
    assert [bucket(n) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert all(n <= bucket(n) <= 1.5 * n for n in range(1, 5000))


def test_the_next_engine_finds_the_graphs_of_the_one_before() -> None:
    target, captured = tiny_target(eos_token_id=None), []

    def counting() -> object:
        capture = pretended_graphs()
        return lambda program: captured.append(program) or capture(program)

    target.verifier = static_pass(target, counting)
    drafter = tiny_drafter(target)
    after = []
    for _ in range(3):
        found = dspark.generate(target, drafter, [5, 6, 7], max_new_tokens=30, policy=dspark.FixedWindow()).token_ids
        assert found == greedy_reference(target, [5, 6, 7], 30)
        gc.collect()
        after.append(len(captured))
    assert 0 < after[1] == after[2]  # by the second text every bucket has been used twice
    assert len(target.verifier.free) == 1


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), RuntimeError("CUDA driver version is insufficient")],
)
def test_a_capture_that_fails_costs_one_warning_and_nothing_else(error: RuntimeError, caplog: pytest.LogCaptureFixture) -> None:
    target = tiny_target(eos_token_id=None)
    attempts = []

    def failing() -> object:
        def capture(program: object) -> None:
            attempts.append(program)
            raise error

        return capture

    target.verifier = static_pass(target, failing)
    assert target.pass_name == "graphs"
    drafter = tiny_drafter(target)
    for _ in range(2):
        found = dspark.generate(target, drafter, [5, 6, 7], max_new_tokens=30, policy=dspark.FixedWindow()).token_ids
        assert found == greedy_reference(target, [5, 6, 7], 30)
    assert len(attempts) == 1 and target.pass_name == "static"
    assert [record.levelname for record in caplog.records] == ["WARNING"] and str(error) in caplog.text


def test_graphs_stop_at_their_memory() -> None:
    target, captured = tiny_target(eos_token_id=None), []

    def counting() -> object:
        return lambda program: captured.append(program) or (program, 10)

    target.verifier = StaticPass(lean_pass(target), Graphs(counting, memory=15))
    found = dspark.generate(target, tiny_drafter(target), [5, 6, 7], max_new_tokens=60, policy=dspark.AdaptiveWindow(0.02, 0.01, 0.001))
    assert len(captured) == 2 and len(found.token_ids) == 60
    assert found.token_ids == greedy_reference(target, [5, 6, 7], 60)


def test_a_target_split_over_devices_runs_its_own_modules_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    target = tiny_target()
    target.model.register_parameter("elsewhere", torch.nn.Parameter(torch.empty(1, device="meta")))
    with caplog.at_level(logging.WARNING):
        pack_target(target)
        texts = [dspark.generate(target, None, prompt, max_new_tokens=6).token_ids for prompt in ([5, 6], [7])]
    assert target.pass_name == "transformers" and texts == [greedy_reference(target, prompt, 6) for prompt in ([5, 6], [7])]
    assert len(caplog.records) == 1 and "cpu, meta" in caplog.text


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_a_card_without_bfloat16_gets_float16(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda")
    assert usable_dtype("bfloat16", cuda) is expected and ("float16" in caplog.text) == (expected is torch.float16)
    assert usable_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16 and usable_dtype("float32", cuda) is torch.float32


def test_float16_decodes_on_static_buffers() -> None:
    target = static_target(dtype=torch.float16, eos_token_id=None)
    found = dspark.generate(target, tiny_drafter(target), random_prompt(0, 9), max_new_tokens=12, policy=dspark.FixedWindow())
    assert len(found.token_ids) == 12 and all(0 <= token < 100 for token in found.token_ids)
