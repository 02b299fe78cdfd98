"""Which numbers of the paper stand beside a pair."""

from __future__ import annotations

import pytest

from dspark.bench import published


@pytest.mark.parametrize(
    ("target", "drafter", "first"),
    [
        ("Qwen/Qwen3-4B", "deepseek-ai/dspark_qwen3_4b_block7", 6.11),
        ("Qwen/Qwen3-4B", "deepseek-ai/dflash_qwen3_4b_block7", 5.40),
        ("/models/Qwen3-14B", "/drafters/dspark_qwen3_14b_block7", 6.21),
        ("google/gemma-4-12B-it", "deepseek-ai/dspark_gemma4_12b_block7", 6.05),
        ("Qwen/Qwen3-4B-Base", "deepseek-ai/dspark_qwen3_4b_block7", None),
        ("Qwen/Qwen3-8B", "deepseek-ai/dspark_qwen3_4b_block7", None),
        ("Qwen/Qwen3-8B", "deepseek-ai/dflash_qwen3_8b_block7", None),
        ("default", "default", None),
    ],
)
def test_only_the_papers_own_pairs_are_quoted(target: str, drafter: str, first: float | None) -> None:
    assert published.tau_of(target, drafter).get("gsm8k") == first
