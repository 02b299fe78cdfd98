"""What the paper reports, to be printed beside what was measured here. Quoted, never measured by us."""

from __future__ import annotations

import pandas as pd

TABLE_1 = "DSpark (DeepSeek-AI and Peking University, 2026), Table 1: τ at temperature 1, blocks of 7, Qwen3-4B"
BENCHMARKS = ("GSM8K", "MATH", "AIME25", "MBPP", "HumanEval", "LCB", "MT-Bench", "Alpaca", "Arena-Hard")
TAU = {
    "eagle": (5.14, 4.62, 3.92, 3.69, 4.16, 3.77, 2.39, 2.26, 2.55),
    "dflash": (5.40, 4.85, 4.15, 4.40, 4.74, 4.18, 3.07, 2.96, 2.83),
    "dspark": (6.11, 5.70, 4.89, 5.13, 5.38, 4.86, 3.64, 3.54, 3.29),
}


def published_tau() -> pd.DataFrame:
    """Drafter × benchmark, and how much more DSpark commits per round than each, over all benchmarks (ratio of the means)."""
    frame = pd.DataFrame(TAU, index=BENCHMARKS).T.rename_axis("drafter")
    mean = frame.mean(axis=1)
    return frame.assign(**{"DSpark's gain": [f"{mean['dspark'] / value - 1:+.0%}" for value in mean]})
