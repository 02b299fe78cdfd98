"""A second real model: sliding windows and 262 144 tokens. Only where it is cached already; ``make test-gemma`` fetches it."""

from __future__ import annotations

import os

import pytest
import torch
from tiny import reference

import dspark
from dspark.formats.fetch import GEMMA
from dspark.hf import dspark_generate
from dspark.target.target import Target

NEW = 16
STORY = "The river is long. The boat is small. "
PROMPTS = {"short": STORY, "beyond the sliding window": STORY * 60}

pytestmark = pytest.mark.skipif(
    not ((GEMMA.cached / "config.json").is_file() or os.environ.get("DSPARK_GEMMA")), reason=f"{GEMMA.name} is not cached: make test-gemma"
)


@pytest.fixture(scope="module")
def gemma() -> Target:
    return dspark.load_target(GEMMA.name, dtype="float32")


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_plain_copied_and_custom_generate_texts_are_those_of_generate_in_float32(gemma: Target, prompt: str) -> None:
    ids = gemma.tokenizer(prompt)["input_ids"]
    assert prompt is STORY or len(ids) > gemma.config.sliding_window
    expected = reference(gemma, ids, NEW)
    copying = dspark.ContextLookup(None, target=gemma)
    copied = dspark.generate(gemma, copying, ids, policy=dspark.FixedWindow(), max_new_tokens=NEW)
    assert copied.token_ids == expected
    assert dspark.generate(gemma, None, ids, max_new_tokens=NEW).token_ids == expected
    call = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "custom_generate": dspark_generate}
    given = torch.tensor([ids])
    out = gemma.model.generate(given, attention_mask=torch.ones_like(given), policy=dspark.FixedWindow(), **call)
    assert out[0, len(ids) :].tolist() == expected
    assert sum(r.accepted for r in copied.rounds) > 0
