"""Depth, block size and kind of head of drafters that were trained alike, by τ on held-out text: Figs. 3 and 4 of the paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd
from matplotlib.figure import Figure

from dspark.lab.drafters import SIZES, by_size
from dspark.lab.static import INKS, MARKS
from dspark.paper.drafters import HELD_OUT, NAMES
from dspark.paper.figures import WIDTH, dress, printed
from dspark.paper.macros import MEASURED, SETTING, Macro, integer, listed, number, percent, styled
from dspark.paper.part import Part

HEADS = {"dspark": "vanilla", "gated": "gated", "rnn": "RNN"}  # drafter → what its sequential head is called
FIGURE = "figure-shapes"
LITTLE = 0.01  # of τ


def flags(frames: Mapping[str, pd.DataFrame]) -> dict[str, bool]:
    """Switch → on; Shapes if any of the others is."""
    trained = frames.get(HELD_OUT)
    result = {"Depth": not sides(trained, "layers").empty, "Blocks": not sides(trained, "block_size").empty}
    result["Heads"] = trained is not None and HEADS.keys() <= set(trained["drafter"])
    return result | {"Shapes": result["Depth"] or result["Blocks"]}


def part(frames: Mapping[str, pd.DataFrame]) -> Part:
    on, trained = flags(frames), frames.get(HELD_OUT)
    macros: list[Macro] = []
    if on["Depth"]:
        macros += _depth(sides(trained, "layers"))
    if on["Blocks"]:
        macros += _blocks(sides(trained, "block_size"))
    if on["Heads"]:
        taus = trained.set_index("drafter")["held_out_tau"]
        told = (f"{name} {styled(MEASURED, number(taus[drafter]))}" for drafter, name in HEADS.items())
        macros.append(Macro(MEASURED, "ShapeHeads", listed(told), dressed=True))
    return Part(tuple(macros), {}, {FIGURE: figure(trained)} if on["Shapes"] else {})


def sides(trained: pd.DataFrame | None, field: str) -> pd.DataFrame:
    """Index value, columns dspark and dflash: τ where both were trained. Empty unless at more than one value."""
    if trained is None:
        return pd.DataFrame()
    both = by_size(trained, field).pivot_table(index="value", columns="drafter", values="tau").dropna()
    return both if len(both) > 1 and both.shape[1] == 2 else pd.DataFrame()


def _depth(both: pd.DataFrame) -> Iterator[Macro]:
    least, most = both.index.min(), both.index.max()
    yield Macro(SETTING, "ShapeFewestLayers", integer(least))
    yield Macro(SETTING, "ShapeMostLayers", integer(most))
    yield Macro(MEASURED, "ShapeShallowDspark", number(both.loc[least, "dspark"]))
    yield Macro(MEASURED, "ShapeDeepDflash", number(both.loc[most, "dflash"]))
    yield Macro(MEASURED, "ShapeDeepDspark", number(both.loc[most, "dspark"]))
    yield Macro(MEASURED, "ShapeDepthVerdict", _verdict(both.loc[least, "dspark"] / both.loc[most, "dflash"] - 1))


def _verdict(gain: float) -> str:
    """In words, of one drafter each: a percent is little where a repetition was not tried."""
    return "as much" if abs(gain) < LITTLE else "more" if gain > 0 else "less"


def _blocks(both: pd.DataFrame) -> Iterator[Macro]:
    gain, least, most = both["dspark"] / both["dflash"] - 1, both.index.min(), both.index.max()
    yield Macro(SETTING, "ShapeSmallestBlock", integer(least))
    yield Macro(SETTING, "ShapeLargestBlock", integer(most))
    yield Macro(MEASURED, "ShapeSmallestGain", percent(gain[least], 1))
    yield Macro(MEASURED, "ShapeLargestGain", percent(gain[most], 1))
    falls, grown = int((gain.diff() < 0).sum()), gain[most] > gain[least]
    verdict = "grows" if not falls else "grows, but for one step," if grown and falls == 1 else "does not grow throughout"
    yield Macro(MEASURED, "ShapeBlockVerdict", verdict)


def figure(trained: pd.DataFrame) -> Figure:
    """A panel for each size that was varied, a line with and one without the sequential head."""
    panels = [(field, label) for field, label in SIZES.items() if not sides(trained, field).empty]
    with printed():
        figure = Figure(figsize=(0.45 * WIDTH * len(panels) + 0.1 * WIDTH, 2.3), layout="constrained")
        axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (field, label) in zip(axes_of, panels, strict=True):
            points = by_size(trained, field)
            for i, side in enumerate(("dspark", "dflash")):
                line = points[points["drafter"] == side]
                axes.plot(line["value"], line["tau"], color=INKS[i], marker=MARKS[i], ms=4, linewidth=1.2, label=NAMES[side])
            dress(axes, f"n = {len(points)} drafters", label, "tokens per round, held out" if axes is axes_of[0] else "")
            axes.set_xticks(sorted(points["value"].unique()))
        axes_of[0].legend(frameon=False)
    return figure
