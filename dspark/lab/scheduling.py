"""Figures of schedules and of the confidence that they read: pure functions of records and frames."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dspark.bench.stats import BUSY
from dspark.lab.figures import BESIDE, DRAFT_STATES, FATES, GREY, Drawing, curves, panels, styled
from dspark.schedule import Admission
from dspark.tune.calibrate import AS_TRAINED, Calibration, Rollouts, calibration_error, ranking_quality, reliability


def step_times(measured: Mapping[int, float], about: str) -> Drawing:
    """Milliseconds of a target pass over its number of tokens, as measured, and as the scheduler reads them: never falling.

    measured: tokens, ascending → seconds, from :func:`dspark.tune.profile.median_steps`.
    """
    widths, ms = np.array(list(measured)), 1e3 * np.array(list(measured.values()))
    read = np.maximum.accumulate(ms)
    lines = [
        {"x": widths, "y": read[0] / widths[0] * widths, "color": GREY, "linestyle": "--", "marker": "", "label": "one pass per token"},
        {"x": widths, "y": read, "color": FATES["draft"].hex, "marker": "", "label": "read by the scheduler"},
        {"x": widths, "y": ms, "color": FATES["correction"].hex, "linestyle": "", "label": "measured"},
    ]
    doubt = ", but this machine was busy" * bool((read / ms).max() > BUSY)
    finding = f"A pass over {widths[-1]} tokens takes {read[-1] / read[0]:.2f}× the time of a pass over one{doubt}"
    return curves(lines, finding, about, xlabel="tokens verified in one pass", ylabel="time of the pass (ms)", ylim=(0, 3 * read[-1]))


@styled
def admission_path(path: Sequence[Admission], tokens: Sequence[str], about: str) -> Drawing:
    """Expected tokens per second along the path of Algorithm 1, for one request; the first fall ends it.

    path: from :meth:`dspark.schedule.PrefixScheduler.admissions`. tokens: texts of the drafts, for the labels.
    """
    labels = ["anchor alone", *(f"{k}: “{token}”" for k, token in enumerate(tokens, 1))][: len(path)]
    end = "at the end of the block" if path[-1].admitted else "at the first fall"
    finding = f"Algorithm 1 verifies {sum(step.admitted for step in path) - 1} of {len(tokens)} drafts here: it stops {end}"
    figure, (axes,) = panels(finding, f"{about}, n = 1 round", 3.6)
    colours = [DRAFT_STATES["accepted" if step.admitted else "rejected"].hex for step in path]
    bars = axes.bar(range(len(path)), [step.throughput for step in path], color=colours, alpha=0.75)
    text = [f"a = {step.survival:.2f}\nB = {step.budget}\nΘ = {step.throughput:.1f}" for step in path]
    axes.bar_label(bars, text, label_type="center", color="white", fontsize=9)
    axes.set(xlabel="verified up to this draft", ylabel="Θ, expected throughput (tokens/s)", xticks=range(len(path)), xticklabels=labels)
    return figure


def threshold_curves(sweep: pd.DataFrame, about: str) -> Drawing:
    """Share of the verified drafts that were accepted, over their number a round: a line per domain, a mark per threshold.

    sweep: from :func:`dspark.bench.replay.threshold_sweep`. about: what was replayed, for the caption.
    """
    lines = [
        {"x": rows["checked"], "y": rows["acceptance"], "notes": rows["threshold"], "label": f"{domain} (n = {rows['n'].max()} prompts)"}
        for domain, rows in sweep[sweep["checked"] >= 0.05].groupby("domain", sort=False)
    ]
    axes = {"xlabel": "verified drafts a round (marks: thresholds)", "ylabel": "accepted (share of the verified)", "ylim": (0, 1.05)}
    return curves(lines, "A higher threshold verifies fewer drafts and accepts more of them", about, **axes)


@styled
def reliability_diagrams(data: Rollouts, calibration: Calibration, about: str) -> Drawing:
    """One panel per position: predicted survival a_k against the share that survived, as trained and calibrated.

    data: rollouts that were not used for the fit. Marks are bins with their 95 % interval; on the diagonal the head is calibrated.
    """
    fits = {"as trained": (AS_TRAINED, FATES["correction"].hex), "calibrated": (calibration, FATES["draft"].hex)}
    shown = [k for k in range(data.block_size) if data.checked[:, k].any()]
    errors = [[calibration_error(*data.at(k, fit)) for k in shown] for fit, _ in fits.values()]
    finding = f"Calibrated on other prompts, the largest ECE goes from {max(errors[0]):.1%} to {max(errors[1]):.1%}"
    caption = f"{about}; n = {len(data.logits)} blocks; lines: 95 % intervals of a share; ECE as trained → calibrated"
    figure, axes = panels(finding, caption, 3.4, len(shown), sharex=True, sharey=True)
    for panel, k, before, after in zip(axes, shown, *errors, strict=True):
        panel.plot([0, 1], [0, 1], color=GREY, linestyle="--")
        for name, (fit, colour) in fits.items():
            bins = pd.DataFrame(reliability(*data.at(k, fit))).sort_values("confidence")
            share = (bins["frequency"] * bins["n"] + 2) / (bins["n"] + 4)  # Agresti and Coull: an interval even where all survived
            error = 1.96 * np.sqrt(share * (1 - share) / (bins["n"] + 4))
            panel.vlines(bins["confidence"], (share - error).clip(0), (share + error).clip(upper=1), color=colour, alpha=0.4)
            panel.plot(bins["confidence"], bins["frequency"], "o-", color=colour, markersize=4, label=name)
        auc = ranking_quality(*data.at(k, calibration))
        panel.set_title(f"position {k + 1}\nECE {before:.1%} → {after:.1%}\nAUC {auc:.2f}", fontsize=9)
    axes[0].set_ylabel("share that survived")
    axes[len(shown) // 2].set_xlabel("predicted survival aₖ (probability)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc=BESIDE)
    return figure
