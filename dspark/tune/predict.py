"""What could a drafter gain on this model and this machine, before anything is trained? L = (T_draft + T_verify) / τ."""

import math
from collections.abc import Sequence
from itertools import product

import pandas as pd

from dspark.schedule import SPS


def expected_tokens_per_round(acceptance: Sequence[float]) -> float:
    """τ of a window of len(acceptance) tokens: 1 + Σ_k Π_{i≤k} α_i, with α_k the conditional acceptance at position k, in 0..1.
    Raises ValueError for a number outside 0..1."""
    wrong = [a for a in acceptance if not 0 <= a <= 1]
    if wrong:
        raise ValueError(f"an acceptance must lie in 0..1, got {wrong[0]}: pass the conditional acceptance at positions 1, 2, …")
    return 1 + sum(math.prod(acceptance[: k + 1]) for k in range(len(acceptance)))


def predict_speedup(sps: SPS, acceptance: Sequence[float], draft_seconds: float) -> float:
    """Speed-up over plain decoding of a fixed window with these acceptances: τ · T_plain / (T_draft + T_verify).

    sps: measured on this machine (:func:`dspark.tune.profile.profile_sps`). draft_seconds: T_draft, one block; 0 where drafting is free.
    """
    return expected_tokens_per_round(acceptance) / required_tokens_per_round(sps, len(acceptance), draft_seconds)


def required_tokens_per_round(sps: SPS, window: int, draft_seconds: float, speedup: float = 1.0, replayed: int = 0) -> float:
    """The τ that a window needs for this speed-up: speedup · (T_draft + T_verify) / T_plain. More than window + 1 is unreachable.

    replayed: of a target with states, how many tokens it runs again before they get a pass of their own; half of them in the mean.
    Raises ValueError for a negative draft time, a window under 1 or a speed-up that is not positive.
    """
    for name, value, least in (("draft_seconds", draft_seconds, 0), ("window", window, 1)):
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not speedup > 0:
        raise ValueError(f"speedup must be positive, got {speedup}")
    saved = 1 / (speedup * sps(1)) - (1 / (replayed * sps(replayed)) if replayed else 0)  # seconds that a token may take
    return (draft_seconds + 1 / sps(1 + window + replayed // 2)) / saved if saved > 0 else math.inf


def break_even(sps: SPS, windows: Sequence[int], draft_seconds: float, speedups: Sequence[float], replayed: int = 0) -> pd.DataFrame:
    """The τ that every window needs for every speed-up, T_draft being the same for every window: the backbone runs once a block.

    Columns: window, speedup; required: τ with the drafter's time; free: τ without it; reachable: whether required ≤ window + 1.
    """
    frame = pd.DataFrame(product(windows, speedups), columns=["window", "speedup"])
    for name, seconds in (("required", draft_seconds), ("free", 0.0)):
        frame[name] = [required_tokens_per_round(sps, n, seconds, speedup, replayed) for n, speedup in product(windows, speedups)]
    return frame.assign(reachable=frame["required"] <= frame["window"] + 1)
