"""What both panels share: the pictures of a run, the menu of policies with its sliders, errors, rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import ipywidgets as w

from dspark.lab import strips
from dspark.lab.figures import Decode
from dspark.lab.text import numbers, tally
from dspark.round import Round
from dspark.schedule import POLICIES, Parameter, make_policy, parse_policy

STYLE = {"description_width": "110px"}
WIDEST = "420px"  # enough for the longest name of a policy
LONGEST = 1000  # tokens in a block, until the drafter's block size is known


class Panel:
    """The pictures of a run, the menu of policies and an error, as widgets; a subclass puts them into ``box``.

    policy, changed: see :class:`PolicyControls`.
    decode: token ids → text; set by the subclass.
    """

    box: w.VBox
    decode: Decode
    error = ""

    def __init__(self, policy: str, changed: Callable[[], object]) -> None:
        self.controls = PolicyControls(policy, changed)
        self.colour = w.ToggleButtons(
            options=list(strips.COLOURS),
            description="colour",
            tooltip="What the colours of the heatmap mean",
            tooltips=list(strips.COLOURS.values()),
            style={"button_width": "auto", "description_width": "50px"},
        )
        self.message, self.numbers, self.text, self.heat, self.windows, self.lanes = (w.HTML() for _ in range(6))
        self.pictures = column([self.lanes, self.colour, self.heat, self.windows], 480)

    def draw(self, rounds: Sequence[Round], plain: Sequence[Round], arm: str, block_size: int, tokens: int, how: str = "n = 1 run") -> None:
        """Show a run in numbers and pictures; the subclass shows its text.

        plain: rounds of plain decoding for the race, which is left out without them · arm: gives the name and the colour of the lane ·
        tokens: length of the whole text · how: how the seconds were obtained.
        """
        self.numbers.value = numbers(tally(rounds, plain), how)
        self.heat.value = strips.heat(rounds, block_size, self.colour.value, self.decode).svg()
        self.windows.value = strips.windows(rounds, block_size).svg()
        lanes = [("plain", plain), *([(arm, rounds)] if rounds else [])]
        self.lanes.value = strips.race(lanes, tokens).svg() if plain else ""

    def picture(self) -> str:
        """The outputs as plain HTML, for notebooks that run in batch."""
        return "".join(part.value for part in (self.numbers, self.text, self.heat, self.windows, self.lanes))

    def show_error(self, sentence: str) -> None:
        """Show an error, which a screen reader announces; "" removes it."""
        self.error = sentence
        style = "border-left:4px solid rgb(213,94,0);padding:.2em .6em"
        self.message.value = f'<div role="alert" style="{style}">{escape(sentence)}</div>' if sentence else ""

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

    ``box`` holds all widgets, ``kind`` is the menu. Raises ValueError for an unknown policy or too many numbers.
    """

    def __init__(self, spec: str, changed: Callable[[], object]) -> None:
        chosen, _, numbers = spec.partition(":")
        make_policy(chosen, sps=lambda: float)  # this and the next line raise for an unknown name or wrong numbers
        parse_policy(spec, lambda: float)
        choices, tooltip = [(row.label, name) for name, row in POLICIES.items()], "The rule that decides how many drafts are verified"
        self.kind = labelled(w.Dropdown, chosen, "policy", tooltip, options=choices, max_width=WIDEST)
        self._all = {name: {p.name: _slider(p) for p in row.parameters} for name, row in POLICIES.items()}
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
        """Set the upper end of every slider whose default is the whole block; one at its upper end stays there."""
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


def _slider(p: Parameter) -> w.IntSlider | w.FloatSlider:
    if p.step == 1:
        high = LONGEST if p.default is None else int(p.high)  # None: the whole block
        return labelled(w.IntSlider, int(p.default or high), p.label, p.tooltip, min=int(p.low), max=high, max_width=WIDEST)
    return labelled(w.FloatSlider, p.default, p.label, p.tooltip, min=p.low, max=p.high, step=p.step, max_width=WIDEST)


def labelled(kind: type[w.Widget], value: object, label: str, tooltip: str, max_width: str | None = None, **options: object) -> w.Widget:
    """A widget with its label before it, as wide as its place."""
    return kind(value=value, description=label, tooltip=tooltip, style=STYLE, layout=w.Layout(width="auto", max_width=max_width), **options)


def row(children: Sequence[w.Widget]) -> w.HBox:
    """Side by side where the page is wide enough, else one below the other."""
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap", grid_gap="4px 16px"))


def column(children: Sequence[w.Widget], width: int) -> w.VBox:
    """width: preferred, in pixels."""
    return w.VBox(children, layout=w.Layout(flex=f"1 1 {width}px", min_width=f"{min(width, 300)}px"))


def family(widget: w.Widget) -> list[w.Widget]:
    """A widget with its children, layouts and styles, leaves first; closing them all frees them."""
    below = [member for child in getattr(widget, "children", ()) for member in family(child)]
    own = [part for name in ("layout", "style") if isinstance(part := getattr(widget, name, None), w.Widget)]
    return [*below, *own, widget]
