"""The controls of the live panel: the menu of policies with the sliders of the registry, settings, buttons, and how to free them."""

from collections.abc import Callable
from functools import partial

import ipywidgets as w

from dspark.lab.session import Request
from dspark.schedule import POLICIES, Parameter, make_policy, parse_policy

LONGEST = 1000  # tokens in a block, until the drafter's block size is known
PERCENT = (*range(0, 10), *range(10, 30, 2), *range(30, 101, 5))  # places of a slider, finer at the low end: there the speed-up bends


class PolicyControls:
    """The menu of policies and the sliders of the chosen one, as the registry :data:`dspark.schedule.POLICIES` describes them.

    spec: the policy to start with and its first numbers, such as "adaptive:0.6,0.3".
    changed: called after a widget moved.

    ``box`` holds all widgets, ``kind`` is the menu, ``moved`` the parameter that was moved last ("": the policy has none). Raises
    ValueError for an unknown policy or too many numbers.
    """

    def __init__(self, spec: str, changed: Callable[[], object]) -> None:
        chosen, _, numbers = spec.partition(":")
        make_policy(chosen, sps=lambda: float)  # this and the next line raise for an unknown name or wrong numbers
        parse_policy(spec, lambda: float)
        choices, tooltip = [(row.label, name) for name, row in POLICIES.items()], "The rule that decides how many drafts are verified"
        self.kind = labelled(w.Dropdown, chosen, "policy", tooltip, options=choices)
        start = dict(zip((p.name for p in POLICIES[chosen].parameters), map(float, filter(None, numbers.split(","))), strict=False))
        self._all = {
            name: {p.name: _slider(p, start.get(p.name) if name == chosen else None) for p in row.parameters}
            for name, row in POLICIES.items()
        }
        self._changed, self.moved = changed, next(iter(self.sliders), "")
        every = [slider for sliders in self._all.values() for slider in sliders.values()]
        self.box = w.VBox([self.kind, *every])
        self._show_sliders()
        for widget in (self.kind, *every):
            widget.observe(self._moved, names="value")

    @property
    def sliders(self) -> dict[str, w.SelectionSlider]:
        """Parameter name → slider, of the chosen policy."""
        return self._all[self.kind.value]

    def chosen(self) -> tuple[str, dict[str, float]]:
        """The policy's name and the values of its parameters, for :func:`dspark.schedule.make_policy`."""
        return self.kind.value, {name: slider.value for name, slider in self.sliders.items()}

    def set_block_size(self, block_size: int) -> None:
        """Set the upper end of every slider whose default is the whole block; one at its upper end stays there."""
        for name, sliders in self._all.items():
            for p in [p for p in POLICIES[name].parameters if p.default is None and sliders[p.name].options[-1] != block_size]:
                slider, value = sliders[p.name], sliders[p.name].value
                at_end = value == slider.options[-1]
                slider.options = range(int(p.low), block_size + 1)
                slider.value = block_size if at_end else min(value, block_size)

    def _moved(self, change: dict[str, object]) -> None:
        self.moved = next((name for name, slider in self.sliders.items() if slider is change["owner"]), next(iter(self.sliders), ""))
        self._show_sliders()
        self._changed()

    def _show_sliders(self) -> None:
        for name, sliders in self._all.items():
            for slider in sliders.values():
                slider.layout.display = None if name == self.kind.value else "none"


def _slider(p: Parameter, start: float | None) -> w.SelectionSlider:
    value = p.default if start is None else start
    if p.step == 1:
        places = range(int(p.low), (LONGEST if p.default is None else int(p.high)) + 1)  # None: the whole block
        value = int(value or places[-1])
    else:
        places = sorted({round(p.low + (p.high - p.low) * n / 100, 4) for n in PERCENT} | {value})
    return labelled(w.SelectionSlider, value, p.label, p.tooltip, options=places)


class Settings:
    """The other controls, each an attribute: what to decode, how to show it, buttons. ``request`` and ``copy``: what to start with."""

    def __init__(self, request: Request, copy: bool) -> None:
        slider = partial(labelled, w.FloatSlider, step=0.05, continuous_update=False)
        tick, width = partial(w.Checkbox, indent=False), {"width": "auto"}
        button = partial(w.Button, disabled=True, layout=w.Layout(flex="1 1 0", **width))
        ask, most = "The question to the model, one user turn", max(512, request.max_new_tokens)
        self.examples = labelled(w.Dropdown, "", "examples", "Those with ▶ have a trace and are replayed at once", options=[("", "")])
        self.prompt = w.Textarea(request.prompt, placeholder="prompt", tooltip=ask, rows=3, continuous_update=False, layout=width)
        self.length = labelled(w.IntSlider, request.max_new_tokens, "new tokens", "Upper limit of the text's length", min=8, max=most)
        self.temperature = slider(request.temperature, "temperature", "0 is greedy: always the most likely token", min=0, max=2)
        self.top_p = slider(request.top_p, "top-p", "Sample from the most likely tokens with this total probability", min=0.05, max=1)
        self.seed = labelled(w.BoundedIntText, request.seed, "seed", "The same seed gives the same sampled text", min=0, max=2**31 - 1)
        self.copy = tick(copy, description="copy from the context", tooltip="Where the text repeats itself, draft what followed before")
        self.race = tick(True, description="race plain decoding", tooltip="It is recorded once per prompt and replayed in real time")
        self.slow = tick(False, description="slow motion", tooltip="Show every round twice: the drafts alone, then the target's verdict")
        self.run_button = button(description="Run", icon="play", button_style="primary", tooltip="Decode to the end")
        self.step_button = button(description="Step", icon="step-forward", tooltip="Decode one round and wait")
        self.stop_button = button(description="Stop", icon="stop", tooltip="Stop after the current round")
        self.path = labelled(w.Text, "", "traces", "A Parquet file of traces")
        self.record_button = button(description="Record", icon="circle", tooltip="Record a trace of this prompt for the sliders")
        self.load_button = button(description="Load", icon="folder-open", tooltip="Read the traces of this file", disabled=False)
        self.save_button = button(description="Save", icon="save", tooltip="Write the trace that is replayed to this file", disabled=False)
        self.more = w.ToggleButton(description="more", icon="sliders", tooltip="Length, sampling, copying, race, traces", layout=width)
        self.status = w.HTML()
        files = w.HBox([self.record_button, self.load_button, self.save_button])
        more = [self.length, self.top_p, self.seed, self.copy, self.race, self.slow, self.path, files]
        self.rest = w.VBox(more, layout={"display": "none"})
        self.more.observe(lambda change: setattr(self.rest.layout, "display", None if change["new"] else "none"), names="value")


def labelled(kind: type[w.Widget], value: object, label: str, tooltip: str, **options: object) -> w.Widget:
    """A widget with its label before it, as wide as its place."""
    style, layout = {"description_width": "104px"}, {"width": "auto"}
    return kind(**options, value=value, description=label, tooltip=tooltip, style=style, layout=layout)


def family(widget: w.Widget) -> list[w.Widget]:
    """A widget with its children, layouts and styles, leaves first; closing them all frees them."""
    below = [member for child in getattr(widget, "children", ()) for member in family(child)]
    own = [part for name in ("layout", "style") if isinstance(part := getattr(widget, name, None), w.Widget)]
    return [*below, *own, widget]
