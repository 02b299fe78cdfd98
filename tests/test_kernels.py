"""The compiled kernels: products and attention to float32's precision, and the same bits for a row whatever stands beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_drafter, tiny_target

import dspark
from dspark.cpu import kernels, pack_drafter, pack_target, product
from dspark.target.target import Target
from dspark.verify.passes import pass_of


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def target() -> Target:
    return pack_target(tiny_target(dtype=torch.bfloat16, eos_token_id=None, head_dim=16))


@pytest.mark.parametrize("rows", [*range(1, 9), 12, 13, 40])
@pytest.mark.parametrize("shape", [(2, 16), (30, 48), (33, 160), (64, 576), (5, 33)], ids=str)
def test_a_product_has_the_precision_of_float32_and_each_row_the_bits_that_it_has_alone(rows: int, shape: tuple[int, int]) -> None:
    weight, x = random(*shape).bfloat16(), random(rows, shape[1], seed=1)
    packed = product.words(weight)
    found, exact = product.multiply(x, packed, shape[0]), x.double() @ weight.double().T
    assert (found - exact).abs().max() <= 1e-6 * (x.abs() @ weight.float().abs().T).max()
    assert torch.equal(found, torch.cat([product.multiply(row[None], packed, shape[0]) for row in x]))


@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (4, 2), (7, 1), (8, 1)], ids=str)
@pytest.mark.parametrize("window", [1, 5, 300, 1000])
def test_attention_sees_the_tokens_of_its_own_slot_in_the_window(heads: int, shared: int, window: int) -> None:
    """From the first token of a text to the last for which there is room."""
    size, slots, ends = 64, torch.tensor([0, 0, 0, 0, 2, 1, 1]), torch.tensor([1, 2, 3, 4, 9, 600, 601])
    queries, keys, values = random(7, heads + shared, size), random(3, shared, 601, size, seed=1), random(3, shared, 601, size, seed=2)
    found = kernels.attention(*(part.numpy() for part in (queries, keys, values, slots, ends)), window)
    for t, (slot, end) in enumerate(zip(slots.tolist(), ends.tolist(), strict=True)):
        seen = [part[slot, :, max(0, end - window) : end].double() for part in (keys, values)]
        mixed = F.scaled_dot_product_attention(queries[t, :heads, None].double(), *seen, enable_gqa=True)
        assert torch.allclose(torch.from_numpy(found[t]).double(), mixed.flatten(), atol=1e-5)
    alone = [
        kernels.attention(*(p.numpy() for p in (queries[t : t + 1], keys, values, slots[t : t + 1], ends[t : t + 1])), window)
        for t in range(7)
    ]
    assert np.array_equal(found, np.concatenate(alone))


@pytest.mark.parametrize("mean", [-9.0, 0.0, 9.0])
def test_the_largest_number_is_found_by_its_bits(mean: float) -> None:
    numbers = (random(37) + mean).numpy()
    assert kernels._largest(numbers) == numbers.max()


@pytest.mark.parametrize("size", [16, 48, 64, 112])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 13])
def test_mixtures_are_sums_of_weighted_values(rows: int, size: int) -> None:
    x, values, out = random(rows, 21), random(21, size, seed=1), torch.empty(rows, size)
    product.mixtures(x.numpy(), values.numpy(), out.numpy())
    assert torch.allclose(out.double(), x.double() @ values.double(), atol=1e-5)


@pytest.mark.parametrize("x", [-1000.0, -87.0, -5.0, 0.0, 0.3, 1.0, 20.0])
def test_silu_is_that_of_pytorch(x: float) -> None:
    gate_up = torch.tensor([[x] * 8 + [2.0] * 8])
    assert torch.allclose(torch.from_numpy(kernels._swiglu(gate_up.numpy())), 2 * F.silu(gate_up[:, :8]), rtol=1e-6, atol=1e-30)


def test_a_token_has_the_same_logits_alone_in_a_block_and_beside_other_requests(target: Target) -> None:
    """To the last bit, so that in bfloat16 too a checked block gives the text of plain decoding."""
    run, text = pass_of(target), list(range(4, 33))
    cache = run.new_cache()
    one, block, beside, other = (cache.open() for _ in range(4))
    alone = torch.cat([run([[token]], [one], cache)[0][0] for token in text])
    blocks = torch.cat([run([text[i : i + 7]], [block], cache)[0][0] for i in range(0, len(text), 7)])
    among = torch.cat([run([[50, 51, 52], text[i : i + 2]], [other, beside], cache)[0][1] for i in range(0, len(text), 2)])
    assert run.name == "compiled" and torch.equal(alone, blocks) and torch.equal(alone, among)


def test_in_bfloat16_too_drafting_does_not_change_the_greedy_text(target: Target) -> None:
    source = dspark.ContextLookup(pack_drafter(tiny_drafter(target)), 1)
    prompts = [[first, *range(first, 40, 5)] for first in range(4, 24)]
    plain, drafted = (dspark.generate(target, each, prompts, max_new_tokens=24) for each in (None, source))
    assert [out.token_ids for out in drafted] == [out.token_ids for out in plain]
    assert sum(r.accepted for out in drafted for r in out.rounds) > 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_logits_do_not_depend_on_the_number_of_threads(target: Target, threads: int) -> None:
    before = torch.get_num_threads()
    texts = []
    try:
        for number in (before, threads):
            torch.set_num_threads(number)
            run = pass_of(target)
            cache = run.new_cache()
            texts.append(run([[5, 6, 7, 8]], [cache.open()], cache)[0][0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*texts)


def test_a_product_of_rows_that_are_not_adjacent_is_that_of_a_copy() -> None:
    weight, wide = product.words(random(8, 32).bfloat16()), random(5, 64, seed=1)
    assert torch.equal(product.multiply(wide[:, :32], weight, 8), product.multiply(wide[:, :32].clone(), weight, 8))


@pytest.mark.parametrize(
    "shape", [{"head_dim": 12}, {"hidden_size": 40, "head_dim": 16}, {"head_dim": 16, "intermediate_size": 72}, {"head_dim": 16}], ids=str
)
def test_sizes_that_no_register_fits_run_the_lean_pass(shape: dict[str, int]) -> None:
    target = pack_target(tiny_target(dtype=torch.bfloat16, **shape))
    assert target.pass_name == ("compiled" if shape == {"head_dim": 16} else "lean")
    drafter = pack_drafter(tiny_drafter(target))
    text = dspark.generate(target, dspark.ContextLookup(drafter, 1), [5, 6, 7], max_new_tokens=12).token_ids
    assert text == dspark.generate(target, None, [5, 6, 7], max_new_tokens=12).token_ids


def test_no_rows_give_no_rows() -> None:
    assert product.multiply(torch.empty(2, 0, 16), product.words(random(5, 16).bfloat16()), 5).shape == (2, 0, 5)


def test_kernels_that_cannot_be_kept_are_compiled_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is a file here, as where nothing may be written."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "file"))
    double = product.compiled("int64(int64)")(lambda x: 2 * x)
    assert double(4) == 8 and "cannot be kept" in caplog.text
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    double = product.compiled("int64(int64)")(lambda x: 2 * x)
    assert double(4) == 8 and list((tmp_path / "kernels").glob("*/*/*.nbi"))
