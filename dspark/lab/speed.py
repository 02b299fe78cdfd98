"""Figures and tables of speed, of one request and of many: pure functions of the frames that :mod:`dspark.bench` writes."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dspark.bench import published
from dspark.bench.arms import arm_colour, arm_label
from dspark.bench.load import CLOSED, closed
from dspark.bench.measure import Trial, summary
from dspark.bench.stats import ALL, BUSY, busy, caption, spread, summarise
from dspark.lab.figures import GREY, Drawing, by_arm, curves
from dspark.round import Round

PLAIN, MTP1 = "plain", "mtp1"


def over(frame: pd.DataFrame, baseline: str, quoted: bool = False) -> Drawing:
    """Speed-up over ``baseline`` of every arm in every domain, with 95 % bootstrap intervals over prompts.

    quoted: shade the published range, measured against MTP-1 in production on many GPUs. Raises ValueError for another baseline.
    """
    if quoted and baseline != MTP1:
        raise ValueError(f"the published range is a speed-up over {MTP1}, not over {baseline!r}: leave it out")
    lines = summarise(frame, baseline).query("arm != @baseline")
    best = lines[lines["domain"] == ALL].sort_values("speedup").iloc[-1]
    intervals = "lines: 95 % over prompts" if lines["low"].notna().any() else "too few prompts for intervals"
    low, high = (1 + gain for gain in published.RANGE)
    range_note = f"grey, quoted: {low:.2f}–{high:.2f}× over MTP-1, of a far larger model on many GPUs" * quoted
    about = "; ".join(filter(None, [caption(frame), intervals, range_note]))
    doubt = ", but this machine was busy" * bool(busy(frame))
    finding = f"{arm_label(best['arm'])}: {best['speedup']:.2f}× as fast as {arm_label(baseline)}{doubt}"
    figure = by_arm(lines, f"speed-up over {arm_label(baseline)} (×)", finding, f"{busy(frame)} {about}".strip())
    for panel in figure.axes if quoted else ():
        panel.axvspan(low, high, color=GREY, alpha=0.18)
    return figure


def needed(points: pd.DataFrame, finding: str, about: str) -> Drawing:
    """τ that each window needs for each speed-up (solid; dotted if drafting were free), below the τ of a drafter that is always right.

    points: from :func:`dspark.tune.predict.break_even`.
    """
    windows, lines = np.sort(points["window"].unique()), []
    for i, (speedup, rows) in enumerate(points.groupby("speedup")):
        lines.append({"x": rows["window"], "y": rows["required"], "color": f"C{i}", "label": f"{speedup:g}× as fast"})
        lines.append({"x": rows["window"], "y": rows["free"], "color": f"C{i}", "linestyle": ":", "marker": ""})
    lines.append({"x": windows, "y": windows + 1, "color": GREY, "linestyle": "--", "marker": "", "label": "always right: window + 1"})
    axes = {"xlabel": "window (drafted tokens a round)", "ylabel": "τ needed (tokens a round)", "xticks": windows, "ylim": (0, None)}
    return curves(lines, finding, f"{about}; dotted: if drafting were free", **axes)


def flat_summary(frame: pd.DataFrame, arm: str) -> dict[str, float | str | int]:
    """One arm of a run as one flat row; NaN if every text ended with its first token.

    speedup, low, high: over plain decoding, all domains, with the 95 % bootstrap interval; speedup_code, …: by domain.
    tokens_per_round, tokens_per_second, plain_tokens_per_second: without the prefill.
    speedup_over_mtp1, …: the same over MTP-1, if that was measured.
    arm, n: its name, and the number of prompts. spread, busy: how evenly the machine ran, and whether the speeds are unreliable.
    """
    result: dict[str, float | str | int] = dict.fromkeys(("speedup", "tokens_per_round", "tokens_per_second"), math.nan)
    for baseline in [b for b in (PLAIN, MTP1) if b in set(frame["arm"])]:
        lines = summarise(frame, baseline).set_index(["arm", "domain"])
        mine, whole, end = lines.loc[arm], lines.loc[(arm, ALL)], "" if baseline == PLAIN else "_over_mtp1"
        result |= {f"{name}{end}": float(whole[name]) for name in ("speedup", "low", "high")}
        result |= {f"speedup{end}_{domain}": float(mine.loc[domain, "speedup"]) for domain in mine.index if domain != ALL}
    result |= {name: float(whole[name]) for name in ("tokens_per_round", "tokens_per_second")}
    result |= {"plain_tokens_per_second": float(lines.loc[(PLAIN, ALL), "tokens_per_second"]), "arm": arm, "n": int(whole["n"])}
    return result | {"spread": spread(frame), "busy": spread(frame) > BUSY}


def race_frame(heats: Sequence[Mapping[str, Trial]], prompts: Sequence[str]) -> pd.DataFrame:
    """One row per heat and arm, with the columns that :func:`dspark.bench.stats.summarise` reads.

    heats: arm → its trial on one prompt; :data:`PLAIN` is one of the arms. prompts: the prompt of each heat; the same prompt twice is
    another repeat.
    """
    rows = []
    for trials, prompt in zip(heats, prompts, strict=True):
        same = {arm: trial.token_ids == trials[PLAIN].token_ids for arm, trial in trials.items()}
        about = {"prompt_id": prompt, "domain": "race"}
        rows += [about | {"arm": arm, "equals_baseline": same[arm]} | summary(trial) for arm, trial in trials.items()]
    return pd.DataFrame(rows)


def race_table(frame: pd.DataFrame) -> pd.DataFrame:
    """For the reader: a row per prompt; tokens/s of the slowest, the median and the fastest heat, and τ of every arm."""
    shown = frame.assign(**{"tokens/s": 1e3 / frame["latency_ms"], "τ": frame["tokens_per_round"]}).rename(columns={"prompt_id": "prompt"})
    how = {"tokens/s": ["min", "median", "max"], "τ": ["median"]}
    shown = shown.sort_values("arm", key=lambda arms: arms != PLAIN, kind="stable")
    return shown.pivot_table(index="prompt", columns="arm", values=list(how), aggfunc=how, sort=False).round(2)


def median_heat(heats: Sequence[Mapping[str, Trial]], arm: str) -> list[tuple[str, list[Round]]]:
    """The lanes of the heat with the median speed-up, for :func:`dspark.lab.strips.race`: plain decoding and ``arm``."""
    ratio = [heat[PLAIN].seconds / heat[arm].seconds if heat[arm].seconds else 1.0 for heat in heats]
    heat = heats[sorted(range(len(heats)), key=ratio.__getitem__)[len(heats) // 2]]
    return [(name, [Round(index=0, committed=tuple(heat[name].token_ids[:1])), *heat[name].rounds]) for name in (PLAIN, arm)]


WINDOWS = ("plain", "mtp1", "fixed")  # arms that decide nothing
COLUMNS = {  # of the table behind the slider
    "tokens_per_second": "tokens/s in all",
    "user_tokens_per_second": "tokens/s a user",
    "token_ms_p99": "ms a token (p99)",
    "first_ms_p99": "ms to the first (p99)",
    "checked": "verified a round and user",
    "kv_mib": "keys and values (MiB)",
}


def _loops(frame: pd.DataFrame) -> pd.DataFrame:
    """Closed loops, medians over repeats: one row per arm and number of users."""
    rows = frame[frame["kind"] == CLOSED]
    return rows.groupby(["arm", "level"], sort=False)[list(COLUMNS)].median().reset_index().sort_values("level", kind="stable")


def _per_arm(frame: pd.DataFrame, x: str, y: str, finding: str, about: str, **labels: str) -> Drawing:
    """One line per arm over the numbers of users, which stand below the axis or beside dots."""
    lines = []
    for arm, rows in _loops(frame).groupby("arm", sort=False):
        place = {"x": list(map("{:g}".format, rows[x]))} if x == "level" else {"x": rows[x], "notes": rows["level"]}
        lines.append(place | {"y": rows[y], "color": arm_colour(arm), "label": arm_label(arm)})
    return curves(lines, finding, about, **labels)


def pareto(frame: pd.DataFrame, about: str) -> Drawing:
    """Tokens per second of all users together over those of one user; along a line the number of users grows (the paper's Fig. 7)."""
    x, y, best = "user_tokens_per_second", "tokens_per_second", closed(frame).idxmax().map(arm_label)
    finding = "Most tokens/s: " + ", ".join(f"{best[n]} (users: {n})" for n in (min(best.index), max(best.index)))
    about += "; numbers beside the first line's dots: users"
    return _per_arm(frame, x, y, finding, about, xlabel="tokens/s of one user", ylabel="tokens/s in all")


def budgets(frame: pd.DataFrame, about: str) -> Drawing:
    """Verified drafts per request and round over the number of users (the paper's Fig. 8)."""
    table = closed(frame, "checked")
    finding = f"The more users, the fewer drafts; most so for the {arm_label((table[min(table)] - table[max(table)]).idxmax())}"
    return _per_arm(frame, "level", "checked", finding, about, xlabel="users (not to scale)", ylabel="drafts verified a round and user")


def at_level(frame: pd.DataFrame, users: int) -> pd.DataFrame:
    """The arms with so many users, the one with the most tokens per second first."""
    rows = _loops(frame).query("level == @users").sort_values("tokens_per_second", ascending=False).set_index("arm")
    return rows[list(COLUMNS)].rename(columns=COLUMNS, index=arm_label).round(1)


def against_windows(frame: pd.DataFrame, arm: str, column: str = "tokens_per_second") -> tuple[pd.Series, float, str]:
    """An arm's tokens per second in all, against plain decoding and fixed windows.

    Returns its ratio to the best of them with each number of users, its ratio to the best single one of them over all numbers
    (geometric means), and the name of that one. Raises ValueError for an arm that was not measured.
    """
    table = closed(frame, column)
    windows = [name for name in table.index if name.partition(":")[0] in WINDOWS and "+" not in name]
    if arm not in table.index or not windows:
        raise ValueError(f"{arm!r} cannot be compared: measured were {', '.join(table.index)}")
    single = np.log(table.loc[windows]).mean(axis=1)
    overall = float(np.exp(np.log(table.loc[arm]).mean() - single.max()))
    return table.loc[arm] / table.loc[windows].max(), overall, str(single.idxmax())


def gain_at_matched_throughput(frame: pd.DataFrame, arm: str, baseline: str) -> pd.Series:
    """Speed of one user over the baseline's with as many tokens per second in all, less 1, at each of the baseline's numbers of users.

    The arm's speed is read from its own line (:func:`pareto`), straight between points; NaN beyond its ends.
    """
    of = {name: rows.set_index("level").sort_values("tokens_per_second") for name, rows in _loops(frame).groupby("arm")}
    mine, base = of[arm], of[baseline].sort_index()
    reached = np.interp(base["tokens_per_second"], mine["tokens_per_second"], mine["user_tokens_per_second"], np.nan, np.nan)
    return pd.Series(reached / base["user_tokens_per_second"] - 1, base.index.astype(int))
