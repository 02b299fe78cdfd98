"""Arms: each name on the command line is one way to decode a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dspark.bench.measure import Decoder, Settings, by_dspark, by_transformers
from dspark.decode import DraftSource
from dspark.draft import Drafter
from dspark.lookup import ContextLookup
from dspark.profile import sps_curve
from dspark.schedule import MTP1, AdaptiveWindow, ConfidenceThreshold, FixedWindow, Policy, PrefixScheduler
from dspark.target import Target

CHOICES = (
    "plain, generate, fixed[:N], mtp1, adaptive[:WIDEN,NARROW,FALLBACK], confidence:T (survival), conditional:T, prefix; "
    "all but the first two may end in +copy or +copy:N"
)


@dataclass(frozen=True)
class Arm:
    """One way to decode. policy: made once the target is there (``prefix`` needs its step times), None without a drafter ·
    wrap: what is put round the drafter, None for nothing."""

    name: str
    policy: Callable[[Target], Policy] | None = None
    wrap: Callable[[Drafter], DraftSource] | None = None

    @property
    def drafts(self) -> bool:
        return self.policy is not None

    def source(self, drafter: Drafter) -> DraftSource:
        """The drafter as this arm uses it."""
        return self.wrap(drafter) if self.wrap else drafter

    def decoder(self, target: Target, drafter: Drafter | None, settings: Settings, stock: Target | None = None) -> Decoder:
        """Ready to run. Raises ValueError if the drafter cannot serve the policy, or ``generate`` lacks the stock target."""
        if self.name == "generate":
            return by_transformers(stock or target, settings)
        if not self.drafts:
            return by_dspark(target, None, None, settings)
        source = self.source(drafter)
        policy = self.policy(target)
        try:
            policy.check(source.block_size, source.has_confidence)
        except ValueError as error:
            raise ValueError(f"arm {self.name!r}: {error}") from None
        return by_dspark(target, source, policy, settings)


@dataclass(frozen=True)
class Models:
    """target: decodes in our loop · drafter: None where no arm drafts · stock: the target as transformers loads it, its weights
    not rearranged: what a user of ``model.generate`` has. None where no arm needs it, the target itself where they are the same."""

    target: Target
    drafter: Drafter | None = None
    stock: Target | None = None

    def decoder(self, arm: Arm, settings: Settings) -> Decoder:
        return arm.decoder(self.target, self.drafter, settings, self.stock)


def parse_arms(names: str) -> tuple[Arm, ...]:
    """``"plain,fixed:5,adaptive:0.6,0.3,0.05+copy"`` → arms. Raises ValueError naming the wrong one and the choices."""
    # A comma separates arms where a name follows it, and an arm's numbers where a number does.
    arms = tuple(parse_arm(name.strip()) for name in re.split(r",(?=\s*[A-Za-z])", names))
    twice = {arm.name for arm in arms if sum(other.name == arm.name for other in arms) > 1}
    if twice:
        raise ValueError(f"arm {min(twice)!r} is named twice: name each arm once")
    return arms


def parse_arm(name: str) -> Arm:
    """One arm by its name."""
    if name in ("plain", "generate"):
        return Arm(name)
    policy, *suffixes = name.split("+")
    try:
        return Arm(name, _policy(policy), _wrap(suffixes))
    except ValueError as error:
        raise ValueError(f"arm {name!r} cannot be read ({error}): choose from {CHOICES}") from None


def _policy(spec: str) -> Callable[[Target], Policy]:
    kind, _, values = spec.partition(":")
    match kind, values.split(",") if values else []:
        case "fixed", []:
            policy: Policy = FixedWindow()
        case "fixed", [n]:
            policy = FixedWindow(int(n))
        case "mtp1", []:
            policy = MTP1()
        case "adaptive", []:
            policy = AdaptiveWindow()
        case "adaptive", [widen, narrow, fallback]:
            policy = AdaptiveWindow(float(widen), float(narrow), float(fallback))
        case "confidence", [threshold]:
            policy = ConfidenceThreshold(float(threshold), on="survival")
        case "conditional", [threshold]:
            policy = ConfidenceThreshold(float(threshold), on="conditional")
        case "prefix", []:
            return lambda target: PrefixScheduler(sps_curve(target))
        case _:
            raise ValueError("no such policy, or not its numbers")
    return lambda _target: policy


def _wrap(suffixes: list[str]) -> Callable[[Drafter], DraftSource] | None:
    match [suffix.split(":") for suffix in suffixes]:
        case []:
            return None
        case [["copy"]]:
            return ContextLookup
        case [["copy", n]] if int(n) >= 1:
            return partial(ContextLookup, min_match=int(n))
        case _:
            raise ValueError("only +copy or +copy:N, N at least 1, may follow a policy")
