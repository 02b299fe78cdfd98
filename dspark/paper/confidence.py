"""Rollouts → what the paper says of the confidence: calibration and ranking by position, before and after the fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dspark.bench.rollouts import FIT, JUDGE, judged, ranked, rollouts_of
from dspark.lab.figures import GREY
from dspark.lab.static import INKS
from dspark.paper.figures import WIDTH, dress, printed, wilson
from dspark.paper.macros import MEASURED, SETTING, Macro, integer, listed, number, percent, styled
from dspark.paper.part import Part
from dspark.paper.tables import floated, tabular
from dspark.tune.calibrate import AS_TRAINED, Calibration, Rollouts, calibrate, reliability

FILE = "rollouts-dev"
FITTED = 1.0  # sampling temperature
NAMES = {0.0: "Greedy", 1.0: "Sampled"}
ECE_GOAL, AUC_GOAL = 0.015, 0.80
LEAST = 20  # cases in a bin that is drawn


def part(frames: Mapping[str, pd.DataFrame]) -> Part:
    """Offset and temperatures are fitted on one half of the prompts; everything said and shown is of the other."""
    if FILE not in frames:
        return Part()
    frame = frames[FILE]
    calibration = calibrate(rollouts_of(frame, half=FIT, temperature=FITTED))
    rows = judged(frame, calibration)
    picture = diagrams(rollouts_of(frame, half=JUDGE, temperature=FITTED), calibration)
    table = by_position(rows, "tab:confidence")
    return Part((*_macros(frame, rows, calibration),), {"table-confidence": table}, {"figure-reliability": picture})


def _macros(frame: pd.DataFrame, rows: pd.DataFrame, calibration: Calibration) -> Iterator[Macro]:
    yield Macro(SETTING, "ConfidencePrompts", integer(frame["prompt_id"].nunique()))
    yield Macro(SETTING, "ConfidenceFitted", f"{FITTED:g}")
    yield Macro(SETTING, "ConfidenceGoal", percent(ECE_GOAL, 1))
    yield Macro(SETTING, "AucGoal", number(AUC_GOAL))
    yield Macro(SETTING, "ConfidenceLeast", integer(LEAST))
    yield Macro(SETTING, "ConfidencePositions", integer(rows["position"].max()))
    yield Macro(MEASURED, "ConfidenceOffset", number(calibration.offset))
    yield Macro(MEASURED, "ConfidenceTemperatures", listed(number(t) for t in calibration.temperatures))
    for temperature, name in NAMES.items():
        part_of = rows[rows["temperature"] == temperature].reset_index(drop=True)
        worst = part_of.loc[part_of["ece_after"].idxmax()]
        yield Macro(MEASURED, f"Confidence{name}Before", percent(part_of["ece_before"].max(), 1))
        yield Macro(MEASURED, f"Confidence{name}After", percent(worst["ece_after"], 1))
        yield Macro(MEASURED, f"Confidence{name}Noise", percent(worst["noise"], 1))
        yield Macro(MEASURED, f"Confidence{name}WorstPosition", integer(worst["position"]))
        yield Macro(MEASURED, f"Confidence{name}AucLow", number(part_of["auc_after"].min(), 3))
        yield Macro(MEASURED, f"Confidence{name}AucHigh", number(part_of["auc_after"].max(), 3))
        yield Macro(MEASURED, f"Confidence{name}AucBestLow", number(part_of["auc_best"].min()))
        yield Macro(MEASURED, f"Confidence{name}AucBestHigh", number(part_of["auc_best"].max()))
        yield Macro(MEASURED, f"Confidence{name}EceMet", integer((part_of["ece_after"] <= ECE_GOAL).sum()))
        yield Macro(MEASURED, f"Confidence{name}Known", percent(part_of["ece_known"].max(), 1))
        yield Macro(MEASURED, f"Confidence{name}KnownMet", integer((part_of["ece_known"] <= ECE_GOAL).sum()))
        yield Macro(MEASURED, f"Confidence{name}Worse", integer((part_of["ece_after"] > part_of["ece_before"]).sum()))
        yield Macro(MEASURED, f"Confidence{name}AucMet", integer((part_of["auc_after"] >= AUC_GOAL).sum()))
    together = ranked(frame, calibration).set_index("temperature")
    for temperature, name in NAMES.items():
        for column, tail in (("auc", "Auc"), ("auc_position", "AucPosition"), ("auc_best", "AucBest")):
            yield Macro(MEASURED, f"Confidence{name}Together{tail}", number(together.at[temperature, column]))


def by_position(rows: pd.DataFrame, label: str) -> str:
    """rows: of :func:`dspark.bench.rollouts.judged`."""
    body = []
    for _, row in rows.iterrows():
        shares = [percent(row[name], 1) for name in ("survival", "ece_before", "ece_after", "noise", "ece_known")]
        values = [integer(row["n"]), *shares, *(number(row[name], 3) for name in ("auc_before", "auc_after", "auc_best"))]
        body.append([f"{row['temperature']:g}", integer(row["position"]), *(styled(MEASURED, value) for value in values)])
    about = (
        "The confidence $a_k$ on the half of the prompts that was not fitted: share of blocks that survive to position $k$, calibration "
        "error (ECE) before and after the fit, the error that a perfect head would show on as many cases, the error after the fit against "
        "the probability that the draft is accepted instead of what came of it (known), AUC before and after, and the "
        "AUC of a head that knew both laws: greedy it would know the outcome, sampling only its probability."
    )
    heads = ["temperature", "$k$", "blocks", "survive", "ECE before", "after", "perfect", "known", "AUC before", "after", "perfect"]
    return floated(tabular("rr" + "r" * 9, heads, body, every=int(rows["position"].max())), about, label)


def diagrams(data: Rollouts, calibration: Calibration) -> Figure:
    """One panel per position: how often blocks survived to it against the stated a_k, before and after calibration."""
    with printed():
        figure = Figure(figsize=(WIDTH, 2.0), layout="constrained")
        panels = figure.subplots(1, data.block_size, sharex=True, sharey=True, squeeze=False)[0]
        for k, axes in enumerate(panels):
            axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
            looks = (
                ("before", AS_TRAINED, {"color": INKS[1], "marker": "s", "mfc": "none"}),
                ("after", calibration, {"color": INKS[0], "marker": "o"}),
            )
            for label, put_right, look in looks:
                confidence, outcome = data.at(k, put_right)
                bins = [b for b in reliability(confidence, outcome) if b["n"] >= LEAST]
                # Rounded: the same picture though a machine's last bit differs.
                stated, came = ([round(b[axis], 4) for b in bins] for axis in ("confidence", "frequency"))
                spread = _spread(bins) if put_right is calibration else None
                axes.errorbar(stated, came, yerr=spread, ms=3, linewidth=0.8, elinewidth=0.6, label=f"{label} calibration", **look)
            dress(axes, f"position {k + 1}\nn = {int(data.checked[:, k].sum()):,}", "stated $a_k$", "" if k else "survived (share)")
            axes.set_xticks([0, 0.5, 1])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _spread(bins: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Below and above each frequency: its 95 % interval (Wilson). [2, bins]."""
    n, share = (np.array([b[name] for b in bins], dtype=float) for name in ("n", "frequency"))
    low, high = wilson(share * n, n)
    return np.round([share - low, high - share], 4).clip(min=0)
