"""What both panels share: errors and saving, the menu of policies with its sliders, the colour switch, rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from textwrap import shorten

import ipywidgets as w

from dspark.bench.trace import Trace
from dspark.bench.trace_file import save_trace
from dspark.files import one_line
from dspark.lab.strips import COLOURS
from dspark.schedule import POLICIES, Parameter, make_policy, parse_policy

STYLE = {"description_width": "110px"}
WIDEST = "420px"  # enough for the longest name of a policy
SHORT = 80  # characters of a prompt in a list
LONGEST = 1000  # tokens in a block, until the drafter's block size is known


class Panel:
    """Shows ``box``, errors in ``message``, and saves :meth:`trace` to the path in ``path``."""

    box: w.VBox
    message: w.HTML
    path: w.Text
    trace: Callable[[], Trace]
    error = ""

    def show_error(self, sentence: str) -> None:
        """Show an error, which a screen reader announces; "" removes it."""
        self.error = sentence
        style = "border-left:4px solid rgb(213,94,0);padding:.2em .6em"
        self.message.value = f'<div role="alert" style="{style}">{escape(sentence)}</div>' if sentence else ""

    def save(self) -> None:
        """Save the trace to the path in the box."""
        try:
            save_trace(self.trace(), self.path.value)
        except (ValueError, OSError) as error:
            self.show_error(one_line(error))
        else:
            self.show_error("")
            self.message.value = f'<span role="status">{escape(f"saved: {self.path.value}")}</span>'

    def close(self) -> None:
        """Remove the widgets."""
        for member in family(self.box):
            member.close()

    def _repr_mimebundle_(self, **options: object) -> object:
        return self.box._repr_mimebundle_(**options)


class PolicyControls:
    """The menu of policies and the sliders of the chosen one, as the registry :data:`dspark.schedule.POLICIES` describes them.

    spec: the policy to start with and its first numbers, such as "adaptive:0.6,0.3".
    changed: called after a widget moved.
    continuous: call it at every step of a drag.

    ``box`` holds all widgets, ``kind`` is the menu. Raises ValueError for an unknown policy or too many numbers.
    """

    def __init__(self, spec: str, changed: Callable[[], None], *, continuous: bool = False) -> None:
        chosen, _, numbers = spec.partition(":")
        make_policy(chosen, sps=lambda: float)  # this and the next line raise for an unknown name or wrong numbers
        parse_policy(spec, lambda: float)
        self.kind = w.Dropdown(
            options=[(row.label, name) for name, row in POLICIES.items()],
            value=chosen,
            description="policy",
            tooltip="The rule that decides how many drafted tokens the target verifies",
            style=STYLE,
            layout=w.Layout(width="auto", max_width=WIDEST),
        )
        self._all = {name: {p.name: _slider(p, continuous) for p in row.parameters} for name, row in POLICIES.items()}
        for slider, number in zip(self.sliders.values(), filter(None, numbers.split(",")), strict=False):
            slider.value = float(number)
        self._changed = changed
        every = [slider for sliders in self._all.values() for slider in sliders.values()]
        self.box = w.VBox([self.kind, *every])
        self._show_sliders()
        for widget in (self.kind, *every):
            widget.observe(self._moved, names="value")

    @property
    def sliders(self) -> dict[str, w.IntSlider | w.FloatSlider]:
        """Parameter name → slider, of the chosen policy."""
        return self._all[self.kind.value]

    def chosen(self) -> tuple[str, dict[str, float]]:
        """The policy's name and the values of its parameters, for :func:`dspark.schedule.make_policy`."""
        return self.kind.value, {name: slider.value for name, slider in self.sliders.items()}

    def set_block_size(self, block_size: int) -> None:
        """Set the upper end of every slider that stands for the whole block; one at its upper end stays there."""
        for name, sliders in self._all.items():
            for slider in [sliders[p.name] for p in POLICIES[name].parameters if p.default is None]:
                at_end = slider.value == slider.max
                slider.max = block_size
                slider.value = block_size if at_end else slider.value

    def _moved(self, _change: object) -> None:
        self._show_sliders()
        self._changed()

    def _show_sliders(self) -> None:
        for name, sliders in self._all.items():
            for slider in sliders.values():
                slider.layout.display = None if name == self.kind.value else "none"


def _slider(p: Parameter, continuous: bool) -> w.IntSlider | w.FloatSlider:
    look = {"description": p.label, "tooltip": p.tooltip, "continuous_update": continuous, "style": STYLE}
    look["layout"] = w.Layout(width="auto", max_width=WIDEST)
    if p.step == 1:
        high = LONGEST if p.default is None else int(p.high)  # None stands for the whole block
        return w.IntSlider(int(p.default or high), int(p.low), high, **look)
    return w.FloatSlider(p.default, min=p.low, max=p.high, step=p.step, readout_format=".2f", **look)


def heat_colours() -> w.ToggleButtons:
    """What the heatmap's colours mean, a name of :data:`dspark.lab.strips.COLOURS`."""
    return w.ToggleButtons(
        options=list(COLOURS),
        description="colour",
        tooltip="What the colours of the heatmap mean",
        tooltips=list(COLOURS.values()),
        style={"button_width": "auto", "description_width": "50px"},
    )


def row(children: Sequence[w.Widget]) -> w.HBox:
    """Side by side where the page is wide enough, else one below the other."""
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap", grid_gap="4px 16px"))


def column(children: Sequence[w.Widget], width: int) -> w.VBox:
    """width: preferred, in pixels."""
    return w.VBox(children, layout=w.Layout(flex=f"1 1 {width}px", min_width=f"{min(width, 300)}px"))


def short(prompt: str) -> str:
    """A prompt as one line of a list."""
    return shorten(prompt, SHORT, placeholder="…")


def family(widget: w.Widget) -> list[w.Widget]:
    """A widget with its children, layouts and styles, leaves first; closing them all frees them."""
    below = [member for child in getattr(widget, "children", ()) for member in family(child)]
    own = [part for name in ("layout", "style") if isinstance(part := getattr(widget, name, None), w.Widget)]
    return [*below, *own, widget]
