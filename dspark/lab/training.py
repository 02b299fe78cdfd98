"""Curves of a training run, from the records that :meth:`dspark.train.loop.Trainer.run` yields."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from dspark.lab.figures import dressed

PANELS = {
    "loss": "loss (no unit)",
    "acceptance": "acceptance by position, held out (share)",
    "tau": "τ at temperature 1 (tokens per round)",
}


def training_curves(records: Sequence[dict[str, object]], steps: int) -> go.Figure:
    """Loss, acceptance by position and τ over the steps so far, in training batches and in held-out rows.

    records: one per step; some have ``held_out``. steps: the planned number.
    """
    rows = []
    for r in records:
        held = r.get("held_out")
        rows += [(r["step"], name, "training batch", r[name]) for name in ("loss", "tau")]
        rows += [(r["step"], name, "held-out rows", held[name]) for name in ("loss", "tau") if held]
        rows += [(r["step"], "acceptance", f"position {k}", value) for k, value in enumerate(held["acceptance"] if held else (), 1)]
    frame = pd.DataFrame(rows, columns=["step", "panel", "line", "value"])
    look = {"facet_col": "panel", "facet_col_spacing": 0.06, "category_orders": {"panel": list(PANELS)}, "color": "line", "markers": True}
    figure = px.line(frame, x="step", y="value", **look).update_yaxes(matches=None, showticklabels=True, title="")
    figure.for_each_annotation(lambda note: note.update(text=PANELS[note.text.removeprefix("panel=")]))
    figure.update_xaxes(title="step (number)", range=[0, steps])
    return dressed(figure, f"Training, n = {records[-1]['step']} of {steps} steps", 400)
