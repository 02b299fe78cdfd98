"""Why an arm is as fast as it is: τ, draft length, acceptance and the models' times, put together by L = (T_draft + T_verify) / τ.

Pure functions of a speed frame. The times are means over the whole run, one number for each arm; what differs between prompts and
domains is how many drafts survive. So a prediction that hits says that the speed-up IS its acceptance.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd

from dspark.bench.stats import acceptance_by_position, speedups
from dspark.tune.predict import SPS, expected_tokens_per_round, predict_speedup
from dspark.tune.profile import SPSCurve

PLAIN = "plain"
WITHIN = 0.10  # what the prediction is held to


def explained(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per arm of our loop, domain and prompt; the plain arm is what they are compared with.

    draft_length: drafts checked per round · acceptance: of those, accepted · tokens_per_round: τ · predicted: τ · T_plain /
    (T_draft + T_verify), means over all rounds of the arm, as no median stands for rounds that draft and rounds that look drafts up ·
    speedup: measured, latency per token of plain over that of the arm.
    Raises ValueError if plain was not measured.
    """
    measured = speedups(frame, PLAIN).set_index(["arm", "prompt_id"])["speedup"]
    plain = _seconds_per_round(frame[frame["arm"] == PLAIN])
    result = []
    ours = frame[(frame["arm"] != PLAIN) & (frame["checked"] > 0)]
    for arm, of_arm in ours.groupby("arm", sort=False):
        seconds = _seconds_per_round(of_arm)
        for (domain, prompt), part in of_arm.groupby(["domain", "prompt_id"], sort=False):
            tokens, rounds, checked, accepted = (part[name].sum() for name in ("decoded_tokens", "rounds", "checked", "accepted"))
            result.append(
                {
                    "arm": arm,
                    "domain": domain,
                    "prompt_id": prompt,
                    "theme": part["theme"].iloc[0],
                    "draft_length": checked / rounds,
                    "acceptance": accepted / checked,
                    "tokens_per_round": tokens / rounds,
                    "predicted": tokens / rounds * plain / seconds,
                    "speedup": measured.get((arm, prompt), math.nan),
                }
            )
    names = ["arm", "domain", "prompt_id", "theme", "draft_length", "acceptance", "tokens_per_round", "predicted", "speedup"]
    return pd.DataFrame(result, columns=names).dropna(subset="speedup").reset_index(drop=True)


def _seconds_per_round(frame: pd.DataFrame) -> float:
    """T_draft + T_verify, the mean of all rounds; NaN where the models were not timed."""
    return frame["model_seconds"].sum(min_count=1) / frame["rounds"].sum()


def summary_by_domain(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`explained`, medians over prompts: one row per arm and domain, with ``error`` = predicted / speedup − 1."""
    numbers = ["draft_length", "acceptance", "tokens_per_round", "predicted", "speedup"]
    lines = explained(frame).groupby(["arm", "domain"], sort=False)[numbers].median().reset_index()
    return lines.assign(error=lines["predicted"] / lines["speedup"] - 1)


def check_predictions(frame: pd.DataFrame, sps: SPS | None = None) -> pd.DataFrame:
    """:func:`dspark.tune.predict.predict_speedup` against the run, for every fixed window and domain.

    sps: measured apart from the run; None takes the run's own median step times, which checks the law and not the profile.
    Columns arm, domain, window, tokens_per_round (predicted from the conditional acceptance by position), predicted, speedup
    (measured), error = predicted / speedup − 1, within: |error| ≤ 10 %. Copies have no acceptance by position of their own, so arms
    with copies are left out. Empty without a fixed window.
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
    """The step times that the run itself shows: plain at width 1, a window of n at width n + 1."""
    widths = {PLAIN: 1} | {arm: window + 1 for arm, window in windows.items()}
    known = frame[frame["arm"].isin(widths)]
    medians = known["verify_ms"].groupby(known["arm"].map(widths)).median()
    return SPSCurve(tuple(int(w) for w in medians.index), tuple(np.asarray(medians) / 1e3))


def _window(arm: str) -> int | None:
    match = re.fullmatch(r"mtp1|fixed:(\d+)", arm)
    return int(match[1] or 1) if match else None
