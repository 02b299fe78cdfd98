"""Step times → the curve that the scheduler reads, and the τ that a speed-up takes on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd
from matplotlib.figure import Figure

from dspark.bench import published
from dspark.bench.explained import WITHIN, check_predictions
from dspark.bench.sps import COMMAND, curve_of
from dspark.lab.static import INKS, MARKS
from dspark.paper.figures import WIDTH, dress, printed
from dspark.paper.macros import MEASURED, SETTING, SIMULATED, Macro, integer, number, percent
from dspark.paper.part import Part
from dspark.tune.predict import break_even

FILE = "sps-bfloat16"
TIMED = ("speed-", "peers-")  # how the names of speed runs begin
PLACE = ("target", "machine", "device", "dtype", "threads")  # step times foretell runs that agree in these
MANY = 10  # prompts a domain from which on a median over them is more than one or two texts
SPEEDUPS = {"One": 1.0, "Low": 1 + published.RANGE[0], "High": 1 + published.RANGE[1]}


def flags(frames: Mapping[str, pd.DataFrame]) -> dict[str, bool]:
    checked = foreseen(frames)
    return {"Foreseen": not checked.empty, "ForeseenMany": not checked.empty and bool((checked["n"] >= MANY).any())}


def part(frames: Mapping[str, pd.DataFrame]) -> Part:
    """The break-even is that of the drafter's whole block behind the shortest context."""
    if FILE not in frames:
        return Part()
    if "processes" not in frames[FILE]:
        raise ValueError(f"{FILE}.parquet holds step times of an older version, not as measured: make it again with {COMMAND}")
    told = (*_macros(frames[FILE]), *_foreseen("", foreseen(frames)), *_foreseen("Own", foreseen(frames, own=True)))
    return Part(told, {}, {"figure-steps": curves(frames[FILE])})


def foreseen(frames: Mapping[str, pd.DataFrame], own: bool = False) -> pd.DataFrame:
    """:func:`dspark.bench.explained.check_predictions` of all speed runs in the place where step times were measured apart, by these
    or by each run's own. Its column n: prompts a domain of the run."""
    if FILE not in frames:
        return pd.DataFrame()
    steps = frames[FILE]
    curve, place = None if own else curve_of(steps, int(steps["context"].min())), steps.iloc[0]
    runs = (frame for name, frame in frames.items() if name.startswith(TIMED))
    checks = [
        check_predictions(run, curve).assign(n=run["n"].iloc[0]) for run in runs if all(run.iloc[0][same] == place[same] for same in PLACE)
    ]
    return pd.concat(checks) if checks else pd.DataFrame()


def _foreseen(whose: str, checked: pd.DataFrame) -> Iterator[Macro]:
    if checked.empty:
        return
    if not whose:
        yield Macro(SETTING, "ForeseenCases", integer(len(checked)))
        yield Macro(SETTING, "ForeseenTolerance", percent(WITHIN))
        if len(many := checked[checked["n"] >= MANY]):
            yield Macro(SETTING, "ForeseenMany", integer(MANY))
            yield Macro(SETTING, "ForeseenManyCases", integer(len(many)))
            yield Macro(SIMULATED, "ForeseenManyWithin", integer(many["within"].sum()))
            yield Macro(SIMULATED, "ForeseenManyError", percent(many["error"].abs().max(), 1))
    yield Macro(SIMULATED, f"Foreseen{whose}Within", integer(checked["within"].sum()))
    yield Macro(SIMULATED, f"Foreseen{whose}Error", percent(checked["error"].abs().max(), 1))


def _macros(frame: pd.DataFrame) -> Iterator[Macro]:
    context, window = int(frame["context"].min()), int(frame["drafter_block_size"].max())
    curve = curve_of(frame, context)
    of_context = frame[frame["context"] == context].set_index(["kind", "tokens"])["seconds"]  # as measured; the curve never falls
    draft = of_context["draft", window]
    yield Macro(SETTING, "StepsContext", integer(context))
    yield Macro(SETTING, "StepsWindow", integer(window))
    yield Macro(SETTING, "StepsCeiling", integer(window + 1))
    yield Macro(SETTING, "StepsRepeats", integer(frame["repeats"].min()))
    yield Macro(SETTING, "StepsProcesses", integer(frame["processes"].min()))
    for name, seconds in (("Plain", of_context["verify", 1]), ("Block", of_context["verify", 1 + window]), ("Draft", draft)):
        yield Macro(MEASURED, f"Steps{name}", number(1e3 * seconds, 1) + r"\,ms")
    for name, needs in zip(SPEEDUPS, break_even(curve, [window], draft, list(SPEEDUPS.values())), strict=True):
        yield Macro(SIMULATED, f"Needed{name}", number(needs.required))
        yield Macro(SIMULATED, f"NeededFree{name}", number(needs.free))


def curves(frame: pd.DataFrame) -> Figure:
    """Milliseconds of a target pass, and of drafting a block, over the tokens in it; a line per context length."""
    with printed():
        figure = Figure(figsize=(0.7 * WIDTH, 2.4), layout="constrained")
        axes = figure.subplots()
        for i, (context, rows) in enumerate(frame.sort_values("tokens").groupby("context")):
            for kind, style in (("verify", "-"), ("draft", ":")):
                line = rows[rows["kind"] == kind]
                label = f"context of {context:,}" if kind == "verify" else None
                axes.plot(line["tokens"], 1e3 * line["seconds"], style, marker=MARKS[i], color=INKS[i], ms=4, linewidth=1.2, label=label)
        axes.plot([], [], ":", color="black", label="drafting a block\n(colours as above)")
        axes.set_ylim(bottom=0)
        axes.set_xticks(range(0, int(frame["tokens"].max()) + 1, 2))
        dress(axes, "", "tokens in the pass, or in the block that is drafted", "ms")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
