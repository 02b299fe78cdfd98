"""A packed target attends without copies of shared keys and values, and computes what transformers computes."""

from __future__ import annotations

import pytest
import torch
from test_families import FAMILIES, model_of
from tiny import tiny_target
from torch import nn

from dspark.cpu import attention, pack_target
from dspark.cpu.attention import NAME, share_keys
from dspark.target.target import Target


def prompts(rows: int, length: int, vocab: int) -> torch.Tensor:
    return torch.randint(4, vocab, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_the_same_without_copies_of_keys(family: str) -> None:
    """Token by token, in blocks (prompt lookup, whose first pass asks for several rows of logits), and for two texts at once."""
    model, pair = model_of(family), prompts(2, 6, 60)
    repeated = pair[:1].repeat(1, 2)

    def texts(model: nn.Module) -> list[torch.Tensor]:
        options = {"do_sample": False, "max_new_tokens": 16, "use_cache": True}
        return [
            model.generate(repeated, **options),
            model.generate(repeated, prompt_lookup_num_tokens=3, **options),
            model.generate(pair, **options),
        ]

    before = texts(model)
    share_keys(Target(model, None, family).decoder)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(texts(model), before, strict=True))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_block_has_the_same_logits_without_copies_of_keys(heads: int) -> None:
    plain, shared = (tiny_target(num_key_value_heads=heads, dtype=torch.bfloat16) for _ in range(2))
    share_keys(shared.decoder)
    assert shared.config._attn_implementation == NAME
    for new in ([5], [5, 6, 7, 8]):
        found = []
        for target in (plain, shared):
            cache = target.new_cache()
            target.forward(prompts(1, 20, 100), cache)
            found.append(target.forward(torch.tensor([new]), cache)[0])
        assert torch.equal(*found)


def test_a_block_of_a_packed_target_has_the_logits_of_single_tokens() -> None:
    target = pack_target(tiny_target(eos_token_id=None, dtype=torch.bfloat16, hidden_size=64))
    prompt, block, cache = prompts(1, 12, 100), [5, 9, 20], target.new_cache()
    target.forward(prompt, cache)
    logits, _ = target.forward(torch.tensor([block]), cache)
    for row in range(3):
        alone, _ = target.forward(torch.cat([prompt, torch.tensor([block[: row + 1]])], 1), None)
        assert (logits[0, row] - alone[0, -1]).abs().max() < 0.05 * alone.abs().max()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_single_tokens_of_a_batch_attend_alike_with_folded_heads(
    heads: int, dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in self-play, up to rounding. One stream attends as transformers does, and so do heads that share nothing."""
    plain, shared = (tiny_target(num_key_value_heads=heads, dtype=dtype) for _ in range(2))
    share_keys(shared.decoder)
    calls, real = [], attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: calls.append(a[1].shape[2]) or real(*a, **k))
    for streams in (1, 3):
        texts, found = prompts(streams, 20, 100), []
        for target in (plain, shared):
            cache = target.new_cache()
            target.forward(texts[:, :-1], cache)
            calls.clear()
            found.append(target.forward(texts[:, -1:], cache)[0].float())
        usual = streams == 1 or heads == 4
        assert torch.equal(*found) if usual else torch.allclose(*found, atol=close * float(found[0].abs().max()))
        assert calls == [1] * (plain.num_layers if usual else 0)
