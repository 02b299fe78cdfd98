"""Curves of a training run, from the records that :meth:`dspark.train.loop.Trainer.run` yields."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dspark.lab.figures import FATES, GREY, dressed


def training_curves(records: Sequence[dict[str, object]], steps: int) -> go.Figure:
    """Loss, acceptance by position and τ over the steps so far: training batches as thin lines, held-out rows as thick ones.

    records: one per step; some have ``held_out``. steps: the planned number.
    """
    figure = make_subplots(rows=1, cols=3, subplot_titles=("loss", "acceptance by position (held out)", "τ at temperature 1"))
    validated = [r for r in records if "held_out" in r]
    at, blue, green = [r["step"] for r in validated], FATES["draft"].colour(), FATES["bonus"].colour()
    for column, name in ((1, "loss"), (3, "tau")):
        line = {"x": [r["step"] for r in records], "y": [r[name] for r in records], "line": {"color": GREY, "width": 1}}
        held = {"x": at, "y": [r["held_out"][name] for r in validated], "line": {"color": blue, "width": 2.5}, "mode": "lines+markers"}
        figure.add_trace(go.Scatter(name="training batch", showlegend=column == 1, mode="lines", **line), 1, column)
        figure.add_trace(go.Scatter(name="held-out rows", showlegend=column == 1, **held), 1, column)
    for k in range(len(validated[0]["held_out"]["acceptance"]) if validated else 0):
        shade = {"color": green.replace(",1)", f",{max(0.25, 1 - 0.18 * k):g})"), "width": 2.5}
        values = [r["held_out"]["acceptance"][k] for r in validated]
        figure.add_trace(go.Scatter(x=at, y=values, name=f"position {k + 1}", line=shade, mode="lines+markers"), 1, 2)
    figure.update_xaxes(title="step (number)", range=[0, steps])
    for column, title in ((1, "loss (no unit)"), (2, "acceptance (share)"), (3, "tokens per round")):
        figure.update_yaxes(title=title, col=column)
    done = records[-1]["step"] if records else 0
    figure = dressed(figure, f"Training, n = {done} of {steps} steps", 400)
    return figure.update_layout(legend={"y": -0.3, "yanchor": "top"}, margin={"b": 90})
