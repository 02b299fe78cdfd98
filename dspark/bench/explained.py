"""Why an arm is as fast as it is: τ, draft length, acceptance and the models' times, combined by L = (T_draft + T_verify) / τ.

Pure functions of a speed frame. The times are means over the whole run, one number per arm; prompts and domains differ only in how many
drafts survive. So a correct prediction shows that the speed-up IS its acceptance.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from dspark.bench.stats import acceptance_by_position, speedups
from dspark.tune.predict import SPS, expected_tokens_per_round, predict_speedup
from dspark.tune.profile import SPSCurve

PLAIN = "plain"
WITHIN = 0.10  # the error that a prediction may have


def explained(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per arm of our loop, domain and prompt, compared with plain decoding.

    draft_length: drafts checked per round.
    acceptance: share of those that were accepted.
    tokens_per_round: τ.
    predicted: τ · T_plain / (T_draft + T_verify). Means over all rounds of the arm, since no median represents both rounds that draft
        and rounds that look drafts up.
    speedup: measured, latency per token of plain over that of the arm.
    Raises ValueError if plain was not measured.
    """
    measured = speedups(frame, PLAIN)[["arm", "prompt_id", "speedup"]]
    by_arm = frame.groupby("arm")
    seconds = by_arm["model_seconds"].sum(min_count=1) / by_arm["rounds"].sum()  # T_draft + T_verify; NaN where they were not timed
    ours = frame[(frame["arm"] != PLAIN) & (frame["checked"] > 0)]
    by = ours.groupby(["arm", "domain", "prompt_id"], sort=False)
    total = by[["decoded_tokens", "rounds", "checked", "accepted"]].sum()
    tau = total["decoded_tokens"] / total["rounds"]
    result = pd.DataFrame(
        {
            "theme": by["theme"].first(),
            "draft_length": total["checked"] / total["rounds"],
            "acceptance": total["accepted"] / total["checked"],
            "tokens_per_round": tau,
            "predicted": tau * seconds[PLAIN] / seconds.reindex(total.index.get_level_values("arm")).to_numpy(),
        }
    ).reset_index()
    return result.merge(measured, on=["arm", "prompt_id"])


def summary_by_domain(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`explained`, medians over prompts: one row per arm and domain, with ``error`` = predicted / speedup − 1."""
    numbers = ["draft_length", "acceptance", "tokens_per_round", "predicted", "speedup"]
    lines = explained(frame).groupby(["arm", "domain"], sort=False)[numbers].median().reset_index()
    return lines.assign(error=lines["predicted"] / lines["speedup"] - 1)


def check_predictions(frame: pd.DataFrame, sps: SPS | None = None) -> pd.DataFrame:
    """:func:`dspark.tune.predict.predict_speedup` against the run, for every fixed window and domain.

    sps: measured apart from the run; None takes the run's own median step times, which tests the formula and not the profile.
    Columns: arm, domain, window; tokens_per_round, predicted from the conditional acceptance by position; predicted and measured
    speedup; error = predicted / speedup − 1; within: |error| ≤ 10 %. Arms with copies are left out, as copies have another acceptance
    by position. Empty without a fixed window.
    """
    windows = {arm: window for arm in dict.fromkeys(frame["arm"]) if (window := _window(arm)) is not None}
    curve = sps or own_steps(frame, windows)
    positions = acceptance_by_position(frame[frame["arm"].isin(windows)])
    measured = speedups(frame, PLAIN).groupby(["arm", "domain"])["speedup"].median()
    result = []
    for (arm, domain), part in positions.groupby(["arm", "domain"], sort=False):
        acceptance = part.sort_values("position")["acceptance"].fillna(0).tolist()
        draft_seconds = frame.loc[frame["arm"] == arm, "draft_ms"].median() / 1e3
        predicted, speedup = predict_speedup(curve, acceptance, draft_seconds), measured[arm, domain]
        error = predicted / speedup - 1
        tau = expected_tokens_per_round(acceptance)
        result.append((arm, domain, windows[arm], tau, predicted, speedup, error, abs(error) <= WITHIN))
    return pd.DataFrame(result, columns=["arm", "domain", "window", "tokens_per_round", "predicted", "speedup", "error", "within"])


def own_steps(frame: pd.DataFrame, windows: dict[str, int]) -> SPSCurve:
    """The step times of the run itself: plain at width 1, a window of n at width n + 1."""
    widths = {PLAIN: 1} | {arm: window + 1 for arm, window in windows.items()}
    known = frame[frame["arm"].isin(widths)]
    medians = known["verify_ms"].groupby(known["arm"].map(widths)).median()
    return SPSCurve(tuple(int(w) for w in medians.index), tuple(np.asarray(medians) / 1e3))


def _window(arm: str) -> int | None:
    match = re.fullmatch(r"mtp1|fixed:(\d+)", arm)
    return int(match[1] or 1) if match else None
