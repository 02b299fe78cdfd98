"""Arms: each name on the command line is one way to decode a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dspark.bench.measure import Decoder, Settings, by_dspark
from dspark.bench.stock import by_early_exit, by_prompt_lookup, by_transformers
from dspark.decode import DraftSource
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.schedule import MTP1, SIBLING_RATES, AdaptiveWindow, ConfidenceThreshold, FixedWindow, Policy, PrefixScheduler, Shortened
from dspark.target.target import Target
from dspark.tune.profile import sps_curve

CHOICES = (
    "plain, generate, lookup[:N] and assisted[:LAYERS] (transformers), copy[:N] (no drafter), fixed[:N], mtp1, "
    "adaptive[:WIDEN,NARROW,FALLBACK], confidence:T (survival), conditional:T, prefix; those with a drafter may end in "
    "+copy[:N] or +phrases[:N] (copying and remembered phrases), those of our loop in +block:N, and prefix in +siblings"
)


@dataclass(frozen=True)
class Arm:
    """One way to decode. policy: made once the target is there (``prefix`` needs its step times), None where we draft nothing ·
    wrap: drafter (None if the arm is not ``trained``) and target → what drafts · trained: needs the trained drafter ·
    peer: somebody else's loop, run on the stock target."""

    name: str
    policy: Callable[[Target], Policy] | None = None
    wrap: Callable[[Drafter | None, Target | None], DraftSource] | None = None
    trained: bool = False
    peer: Callable[[Target, Settings], Decoder] | None = None

    @property
    def drafts(self) -> bool:
        """Whether it drafts in our loop."""
        return self.policy is not None

    def source(self, drafter: Drafter | None, target: Target | None = None) -> DraftSource:
        """The drafter as this arm uses it. target: needed by ``copy`` alone."""
        mine = drafter if self.trained else None
        return self.wrap(mine, target) if self.wrap else mine

    def decoder(self, target: Target, drafter: Drafter | None, settings: Settings, stock: Target | None = None) -> Decoder:
        """Ready to run. Raises ValueError if the drafter cannot serve the policy, or a peer lacks the stock target."""
        if self.peer:
            return self.peer(stock or target, settings)
        if not self.drafts:
            return by_dspark(target, None, None, settings)
        source = self.source(drafter, target)
        policy = self.policy(target)
        try:
            policy.check(source.block_size, source.has_confidence)
        except ValueError as error:
            raise ValueError(f"arm {self.name!r}: {error}") from None
        return by_dspark(target, source, policy, settings)


@dataclass(frozen=True)
class Models:
    """target: decodes in our loop · drafter: None where no arm needs it · stock: the target as transformers loads it, its weights
    not rearranged: what a user of ``model.generate`` has. None where no arm needs it, the target itself where they are the same."""

    target: Target
    drafter: Drafter | None = None
    stock: Target | None = None

    def decoder(self, arm: Arm, settings: Settings) -> Decoder:
        return arm.decoder(self.target, self.drafter, settings, self.stock)


def separated(names: str) -> list[str]:
    """A comma separates arms where a name follows it, and an arm's numbers where a number does."""
    return [name.strip() for name in re.split(r",(?=\s*[A-Za-z])", names)]


def parse_arms(names: str) -> tuple[Arm, ...]:
    """``"plain,fixed:5,adaptive:0.6,0.3,0.05+copy"`` → arms. Raises ValueError naming the wrong one and the choices."""
    arms = tuple(parse_arm(name) for name in separated(names))
    twice = {arm.name for arm in arms if sum(other.name == arm.name for other in arms) > 1}
    if twice:
        raise ValueError(f"arm {min(twice)!r} is named twice: name each arm once")
    return arms


def parse_arm(name: str) -> Arm:
    """One arm by its name."""
    kind, *suffixes = name.split("+")
    try:
        if not suffixes and (peer := _peer(kind)):
            return Arm(name, peer=peer)
        if name == "plain":
            return Arm(name)
        alone = kind.partition(":")[0] == "copy"
        wrap, block, siblings = _suffixes([kind, *suffixes] if alone else suffixes)
        policy = _policy("fixed" if alone else kind, siblings)
        return Arm(name, partial(_shortened, policy, block) if block else policy, wrap, not alone)
    except ValueError as error:
        raise ValueError(f"arm {name!r} cannot be read ({error}): choose from {CHOICES}") from None


def _peer(spec: str) -> Callable[[Target, Settings], Decoder] | None:
    kind, *values = spec.split(":")
    match kind, [int(value) for value in values] if kind in ("lookup", "assisted") else values:
        case "generate", []:
            return by_transformers
        case "lookup", []:
            return by_prompt_lookup
        case "lookup", [tokens] if tokens >= 1:
            return partial(by_prompt_lookup, tokens=tokens)
        case "assisted", []:
            return by_early_exit
        case "assisted", [layers] if layers >= 1:
            return partial(by_early_exit, layers=layers)
        case "generate" | "lookup" | "assisted", _:
            raise ValueError("its number must be a whole one, at least 1, and generate has none")
    return None


def _policy(spec: str, siblings: bool) -> Callable[[Target], Policy]:
    kind, _, values = spec.partition(":")
    if siblings and kind != "prefix":
        raise ValueError("only prefix takes +siblings")
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
        case "confidence" | "conditional", [threshold]:
            policy = ConfidenceThreshold(float(threshold), on="survival" if kind == "confidence" else "conditional")
        case "prefix", []:
            rates = SIBLING_RATES if siblings else ()
            return lambda target: PrefixScheduler(sps_curve(target), sibling_rates=rates)
        case _:
            raise ValueError("no such policy, or not its numbers")
    return lambda _target: policy


def _suffixes(suffixes: list[str]) -> tuple[Callable[[Drafter | None, Target | None], ContextLookup] | None, int | None, bool]:
    """(what is put round the drafter, longest block, whether there are siblings); None for what is not there."""
    chosen: dict[str, int] = {}
    for suffix in suffixes:
        kind, _, n = suffix.partition(":")
        unnumbered = (kind == "block" and not n) or (kind == "siblings" and n)
        if kind in chosen or kind not in ("copy", "phrases", "block", "siblings") or unnumbered or (n and int(n) < 1):
            raise ValueError("only +copy[:N] or +phrases[:N], +block:N, N at least 1, and +siblings, each once, may follow a policy")
        chosen[kind] = int(n or 2)
    if {"copy", "phrases"} <= chosen.keys():
        raise ValueError("+phrases copies as well: leave +copy out")
    min_match = chosen.get("copy", chosen.get("phrases"))
    return min_match and partial(_copying, min_match, "phrases" in chosen), chosen.get("block"), "siblings" in chosen


def _copying(min_match: int, recalls: bool, drafter: Drafter | None, target: Target | None) -> ContextLookup:
    if recalls and drafter.phrases is None:
        raise ValueError("the drafter's folder has no phrases: make them with `python -m dspark.train phrases`, or use +copy")
    return ContextLookup(drafter, min_match, phrases=drafter.phrases if recalls else None, target=target)


def _shortened(policy: Callable[[Target], Policy], block: int, target: Target) -> Policy:
    return Shortened(policy(target), block)
