"""Figures of loads: pure functions of the frames that :mod:`dspark.bench.load` and :mod:`dspark.bench.simulate` write."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from dspark.bench.arms import arm_label
from dspark.bench.load import CLOSED, closed
from dspark.lab.figures import arm_colours, dressed

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


def pareto(frame: pd.DataFrame, about: str) -> go.Figure:
    """Tokens per second of all users together over those of one user; along a line the number of users grows (the paper's Fig. 7)."""
    loops = _loops(frame)
    figure = px.line(
        loops, x="user_tokens_per_second", y="tokens_per_second", text="level", markers=True, log_y=True, **arm_colours(loops["arm"])
    )
    figure.update_traces(textposition="top right", textfont_size=9)
    figure.update_xaxes(title="tokens/s of one user").update_yaxes(title="tokens/s in all")
    return dressed(figure, f"Throughput against speed for one user, by number of users<br><sup>{about}</sup>", 520)


def budgets(frame: pd.DataFrame, about: str) -> go.Figure:
    """Verified drafts per request and round over the number of users (the paper's Fig. 8)."""
    loops = _loops(frame)
    figure = px.line(loops, x="level", y="checked", markers=True, log_x=True, **arm_colours(loops["arm"]))
    figure.update_xaxes(title="users").update_yaxes(title="drafts verified a round and user")
    return dressed(figure, f"What each policy verifies as the engine gets busier<br><sup>{about}</sup>", 420)


def at_level(frame: pd.DataFrame, users: int) -> pd.DataFrame:
    """The arms with so many users, the one with the most tokens per second first."""
    rows = _loops(frame).query("level == @users").sort_values("tokens_per_second", ascending=False).set_index("arm")
    return rows[list(COLUMNS)].rename(columns=COLUMNS, index=arm_label).round(1)


def level_slider(frame: pd.DataFrame) -> object:
    """A slider over the recorded numbers of users, and the table of each."""
    import ipywidgets as w

    levels = [int(n) for n in sorted(set(_loops(frame)["level"]))]
    tables, shown = {n: at_level(frame, n).to_html() for n in levels}, w.HTML()
    slider = w.SelectionSlider(options=levels, description="users", tooltip="Requests that are served at once", continuous_update=False)
    slider.observe(lambda change: setattr(shown, "value", tables[change["new"]]), names="value")
    shown.value = tables[levels[0]]
    return w.VBox([slider, shown])


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
    x, y = mine["tokens_per_second"], mine["user_tokens_per_second"]
    return pd.Series(
        np.interp(base["tokens_per_second"], x, y, np.nan, np.nan) / base["user_tokens_per_second"] - 1, base.index.astype(int)
    )
