"""What every panel is made of: widgets that choose a policy, the heatmap's colours, columns, and a place for what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

import ipywidgets as w

from dspark.schedule import MTP1, SIBLING_RATES, AdaptiveWindow, Autoregressive, ConfidenceThreshold, FixedWindow, Policy, PrefixScheduler

SPS = Callable[[int], float]

KINDS = {
    "fixed": "fixed window",
    "mtp1": "one token ahead (MTP-1)",
    "adaptive": "adaptive window",
    "confidence": "confidence: survival over a threshold",
    "conditional": "confidence: each over a threshold",
    "prefix": "prefix scheduler (Algorithm 1)",
    "plain": "plain decoding",
}
READ_BY = {
    "fixed": ("window",),
    "adaptive": ("widen", "narrow", "fallback", "window"),
    "confidence": ("threshold",),
    "conditional": ("threshold",),
}
SLIDERS = {  # name → (label, tooltip)
    "window": ("window (tokens)", "How many tokens a round drafts: always that many, or at most that many if the window adapts"),
    "threshold": ("confidence", "Drafting stops before the first token whose confidence, or survival, lies under this"),
    "widen": ("widen above", "If the target gave the drafts more than this on average, the window grows by one"),
    "narrow": ("narrow below", "If the target gave the drafts less than this on average, the window shrinks by one"),
    "fallback": ("fall back below", "If the target gave the drafts less than this on average, the next step is plain decoding"),
}
STYLE = {"description_width": "110px"}
WIDEST = "420px"  # the longest name of a policy is read whole
SHORT = 80  # characters of a prompt in a list


def policy_of(kind: str, value: Mapping[str, float], sps: Callable[[], SPS], *, siblings: bool = False) -> Policy:
    """The policy that the widgets stand for. sps: asked for measured step times if the policy reads them · siblings: whether the prefix
    scheduler, the one policy that can, also has second guesses checked.

    Raises ValueError where the values contradict each other.
    """
    match kind:
        case "fixed":
            return FixedWindow(int(value["window"]))
        case "mtp1":
            return MTP1()
        case "adaptive":
            return AdaptiveWindow(value["widen"], value["narrow"], value["fallback"], max_window=int(value["window"]))
        case "confidence":
            return ConfidenceThreshold(value["threshold"], on="survival")
        case "conditional":
            return ConfidenceThreshold(value["threshold"], on="conditional")
        case "prefix":
            return PrefixScheduler(sps(), sibling_rates=SIBLING_RATES if siblings else ())
        case _:
            return Autoregressive()


class PolicyControls:
    """box: the widgets, to be shown · kind and sliders: by name, to be set · changed: called after any of them moved.

    kind: a name of KINDS · block_size: the widest window offered · values: starting values of the sliders, by name ·
    continuous: tell of every step of a drag, where the answer costs milliseconds. Raises ValueError for a name that is not there.
    """

    def __init__(
        self,
        kind: str,
        block_size: int,
        changed: Callable[[], None],
        *,
        continuous: bool = False,
        **values: float,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"policy {kind!r} is unknown: choose one of {', '.join(KINDS)}")
        if unknown := values.keys() - SLIDERS.keys():
            raise ValueError(f"a policy has no {min(unknown)!r}: choose from {', '.join(SLIDERS)}")
        start = {"threshold": 0.3, "widen": 0.6, "narrow": 0.3, "fallback": 0.05} | values
        self.kind = w.Dropdown(
            options=[(label, name) for name, label in KINDS.items()],
            value=kind,
            description="policy",
            tooltip="How it is decided how many drafted tokens the target checks",
            style=STYLE,
            layout=w.Layout(width="auto", max_width=WIDEST),
        )
        self.sliders: dict[str, w.IntSlider | w.FloatSlider] = {}
        for name, (label, tooltip) in SLIDERS.items():
            shared = {"description": label, "tooltip": tooltip, "continuous_update": continuous, "style": STYLE}
            shared["layout"] = w.Layout(width="auto", max_width=WIDEST)
            if name == "window":
                widest = min(int(values.get("window", block_size)), block_size)
                self.sliders[name] = w.IntSlider(widest, 1, block_size, **shared)
            else:
                self.sliders[name] = w.FloatSlider(start[name], min=0, max=1, step=0.01, readout_format=".2f", **shared)
        self._changed = changed
        self.box = w.VBox([self.kind, *self.sliders.values()])
        self._show_only_what_counts()
        for widget in (self.kind, *self.sliders.values()):
            widget.observe(self._moved, names="value")

    def chosen(self) -> tuple[str, dict[str, float]]:
        """The policy's name and the sliders, for :func:`policy_of`."""
        return self.kind.value, {name: slider.value for name, slider in self.sliders.items()}

    def widest(self, block_size: int) -> None:
        """Another drafter, another block size; a window that stood at the widest stays there."""
        slider = self.sliders["window"]
        at_end = slider.value == slider.max
        slider.max = block_size
        if at_end:
            slider.value = block_size

    def _moved(self, change: object) -> None:
        self._show_only_what_counts()
        self._changed()

    def _show_only_what_counts(self) -> None:
        for name, slider in self.sliders.items():
            slider.layout.display = None if name in READ_BY.get(self.kind.value, ()) else "none"


def heat_colours() -> w.ToggleButtons:
    """What the heatmap's colours mean, a name of :data:`dspark.lab.strips.COLOURS`."""
    return w.ToggleButtons(
        options=[("fate", "fate"), ("confidence", "confidence"), ("target mass", "target")],
        description="colour",
        tooltip="What the colours of the heatmap mean",
        tooltips=["what became of each draft", "how sure the drafter was", "what the target thought of it"],
        style={"button_width": "auto", "description_width": "50px"},
    )


def row(children: Sequence[w.Widget]) -> w.HBox:
    """Side by side where the page is wide enough, else one under the other."""
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap", grid_gap="4px 16px"))


def column(children: Sequence[w.Widget], width: int) -> w.VBox:
    """width: pixels that it would like to have."""
    return w.VBox(children, layout=w.Layout(flex=f"1 1 {width}px", min_width=f"{min(width, 300)}px"))


def alert(sentence: str) -> str:
    """HTML that a screen reader reads out; nothing for no sentence."""
    style = "border-left:4px solid rgb(213,94,0);padding:.2em .6em"
    return f'<div role="alert" style="{style}">{escape(sentence)}</div>' if sentence else ""


def short(prompt: str) -> str:
    """A prompt as a line of a list."""
    line = " ".join(prompt.split())
    return line if len(line) <= SHORT else line[: SHORT - 1] + "…"


def family(widget: w.Widget) -> list[w.Widget]:
    """The widget and all that belongs to it, leaves first: children, layouts, styles. Closing them frees them."""
    below = [member for child in getattr(widget, "children", ()) for member in family(child)]
    own = [part for name in ("layout", "style") if isinstance(part := getattr(widget, name, None), w.Widget)]
    return [*below, *own, widget]
