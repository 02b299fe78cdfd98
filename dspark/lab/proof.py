"""Figures and tables of exactness: pure functions of distributions and of the file that ``make proof`` writes."""

import json
from pathlib import Path

import pandas as pd

from dspark.bench.arms import arm_colour, arm_label
from dspark.lab.figures import GREY, Drawing, panels, styled

PARTS = ("enumeration", "appendix_a", "greedy", "draws", "planted")


def read_proof(path: Path) -> dict[str, dict[str, object]]:
    """Part → its result; a line is printed for each part that was not run. Raises ValueError if the file is missing or damaged."""
    try:
        parts = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read {path} ({type(error).__name__}): make proof writes it") from None
    for part in (part for part in PARTS if part not in parts):
        print(f"{part} was not run, so its section shows nothing: make proof ARGS={part} adds it")
    return parts


@styled
def p_values(result: dict[str, object]) -> Drawing:
    """One dot per χ² test. Under the exact distribution the dots spread evenly over 0 … 1."""
    frame = pd.DataFrame(result["tests"]).iloc[::-1]
    finding = f"No policy's draws can be told from the target's distribution: {len(frame)} tests, dots spread evenly"
    smallest = f"smallest p {frame['p_value'].min():.2g}, corrected for the number of tests {frame['p_adjusted'].min():.2g}"
    caption = f"n = {result['draws']:,} draws; {smallest}; dashed: alarm; {result['machine']}"
    figure, (axes,) = panels(finding, caption, 1.5 + 0.27 * frame["policy"].nunique())
    axes.scatter(frame["p_value"], frame["policy"].map(arm_label), s=22, c=frame["policy"].map(arm_colour))
    axes.axvline(result["significance"] / len(frame), color=GREY, linestyle="--")
    axes.set(xlabel="p-value of χ² against the target's distribution", xlim=(-0.02, 1.02))
    return figure
