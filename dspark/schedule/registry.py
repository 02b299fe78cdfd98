"""The one registry of policies: command line, bench, notebooks, panels, sweeps and tests read their names and sliders from here.

To add a policy, write one class and add one row::

    POLICIES["mine"] = PolicyRow("mine", "my policy", "#7f3c8d", lambda values, sps: MyPolicy(values["reach"]),
                                 (Parameter("reach", "reach", "What reach means", default=0.5),))
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dspark.files import closest
from dspark.schedule.auto import Auto
from dspark.schedule.policies import MTP1, SPS, AdaptiveWindow, Autoregressive, ConfidenceThreshold, FixedWindow, Policy, Shortened
from dspark.schedule.prefix import PrefixScheduler
from dspark.schedule.topk import AsyncTopK

Values = Mapping[str, float | None]


@dataclass(frozen=True)
class Parameter:
    """One number of a policy, as a slider shows it.

    name: key in the values, and on a command line.
    label, tooltip: for the slider.
    default: None for the drafter's whole block.
    low, high, step: of the slider; step 1 means whole numbers.
    """

    name: str
    label: str
    tooltip: str
    default: float | None
    low: float = 0.0
    high: float = 1.0
    step: float = 0.01

    def read(self, value: float | str | None) -> float | int | None:
        """A value as the policy takes it. Raises ValueError if it is not a number, or not a whole one where step is 1."""
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{self.name} must be a number, got {value!r}") from None
        if self.step == 1 and number % 1 != 0:
            raise ValueError(f"{self.name} must be a whole number, got {value!r}")
        return round(number) if self.step == 1 else number


@dataclass(frozen=True)
class PolicyRow:
    """One policy.

    name: on a command line, in a sweep, in results.
    label: in menus and legends.
    colour: hex, in every figure.
    make: (values of the parameters, function that returns measured step times) → the policy.
    parameters: in the order in which the command line gives them.
    """

    name: str
    label: str
    colour: str
    make: Callable[[Values, Callable[[], SPS]], Policy]
    parameters: tuple[Parameter, ...] = ()


_WINDOW = Parameter("window", "window (tokens)", "Tokens drafted per round, or at most that many if the window adapts", None, 1, 16, 1)
_THRESHOLD = Parameter("threshold", "threshold", "The block is cut before the first token below it", 0.1)

_ROWS = (
    PolicyRow("auto", "automatic", "#e8397f", lambda v, sps: Auto(sps())),
    PolicyRow("prefix", "prefix scheduler", "#0072b2", lambda v, sps: PrefixScheduler(sps())),
    PolicyRow("async", "asynchronous top-K", "#999933", lambda v, sps: AsyncTopK(sps())),
    PolicyRow("fixed", "fixed window", "#e69f00", lambda v, sps: FixedWindow(v["window"]), (_WINDOW,)),
    PolicyRow("mtp1", "one token (MTP-1)", "#cc79a7", lambda v, sps: MTP1()),
    PolicyRow(
        "adaptive",
        "adaptive window",
        "#009e73",
        lambda v, sps: AdaptiveWindow(v["widen"], v["narrow"], v["fallback"], max_window=v["window"]),
        (
            Parameter("widen", "widen above", "Above this mean target probability of the drafts the window grows by one", 0.6),
            Parameter("narrow", "narrow below", "Below this mean target probability of the drafts the window shrinks by one", 0.3),
            Parameter("fallback", "fall back below", "Below this mean target probability the next step is plain decoding", 0.05),
            _WINDOW,
        ),
    ),
    PolicyRow("confidence", "survival threshold", "#d55e00", lambda v, sps: ConfidenceThreshold(**v), (_THRESHOLD,)),
    PolicyRow("conditional", "confidence threshold", "#56b4e9", lambda v, sps: ConfidenceThreshold(**v, on="conditional"), (_THRESHOLD,)),
    PolicyRow("plain", "plain decoding", "#7f7f7f", lambda v, sps: Autoregressive()),
)
POLICIES: dict[str, PolicyRow] = {row.name: row for row in _ROWS}


def make_policy(name: str, values: Values | None = None, sps: Callable[[], SPS] | None = None) -> Policy:
    """The policy of this name.

    values: parameter → number; missing ones take their defaults.
    sps: returns measured step times, called only if the policy reads them (``lambda: sps_curve(target)``).
    Raises ValueError for an unknown name or parameter (the closest is named), or a value that the policy refuses.
    """
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is unknown{closest(name, POLICIES)}: choose one of {', '.join(POLICIES)}")
    row, values = POLICIES[name], dict(values or {})
    known = {parameter.name: parameter for parameter in row.parameters}
    if unknown := sorted(values.keys() - known.keys()):
        choices = f"choose from {', '.join(known)}" if known else "it has none"
        raise ValueError(f"policy {name!r} has no parameter {unknown[0]!r}{closest(unknown[0], known)}: {choices}")
    read = {key: parameter.read(values.get(key, parameter.default)) for key, parameter in known.items()}

    def missing() -> SPS:
        raise ValueError(f"policy {name!r} reads measured step times: pass sps=lambda: step_times(target, drafter) (dspark.tune.profile)")

    return row.make(read, sps or missing)


def parse_policy(spec: str, sps: Callable[[], SPS] | None = None) -> Policy:
    """``"fixed:5"``, ``"adaptive:0.6,0.3"``, ``"prefix"``, ``"prefix+block:3"`` → the policy.

    Numbers stand in the order of the row's parameters; trailing ones may be left out. Raises ValueError as :func:`make_policy`.
    """
    spec, _, block = spec.partition("+block:")
    name, colon, numbers = spec.partition(":")
    given = numbers.split(",") if colon else []
    parameters = POLICIES[name].parameters if name in POLICIES else ()
    if name in POLICIES and len(given) > len(parameters):
        raise ValueError(f"policy {name!r} takes {len(parameters)} numbers at most, got {spec!r}")
    policy = make_policy(name, dict(zip((p.name for p in parameters), given, strict=False)), sps)
    return Shortened(policy, _WINDOW.read(block)) if block else policy
