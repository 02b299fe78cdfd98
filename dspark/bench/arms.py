"""Arms: each name on the command line is one way to decode a prompt."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dspark.bench.llamacpp import by_llamacpp, package_version
from dspark.bench.measure import Decoder, Settings, by_dspark
from dspark.bench.stock import by_early_exit, by_transformers
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import DraftSource
from dspark.schedule import POLICIES, Policy, parse_policy
from dspark.target.target import Target
from dspark.tune.profile import step_times
from dspark.verify.lean import lean_pass
from dspark.verify.passes import TargetPass


def lean_of(target: Target) -> TargetPass | None:
    """The lean pass of a target, kernel by kernel where its own pass replays CUDA graphs."""
    return getattr(target.verifier, "lean", None) or lean_pass(target)


def by_eager(target: Target, settings: Settings) -> Decoder:
    """Our plain loop without CUDA graphs."""
    eager = copy.copy(target)
    eager.verifier = lean_of(target)
    return by_dspark(eager, None, None, settings)


HEADLINE = "plain,generate,mtp1,fixed:5,fixed+copy,prefix+copy"
PEERS: dict[str, Callable[[Target, Settings], Decoder]] = {
    "generate": by_transformers,
    "lookup": partial(by_transformers, prompt_lookup_num_tokens=10),  # as in transformers' own documentation (Saxena, 2023)
    "assisted": by_early_exit,
    "eager": by_eager,
}
LLAMACPP = {"llamacpp": False, "llamacpp+dspark": True}  # name → whether our drafter drafts there
CHOICES = (
    f"{', '.join(['plain', *PEERS])} (transformers' own, and plain without CUDA graphs), {', '.join(LLAMACPP)}, copy[:N] (no drafter), "
    f"{', '.join(name for name in POLICIES if name != 'plain')} with their numbers, as in fixed:5 or confidence:0.3; "
    "+copy[:N] after one with a drafter copies from the context where N tokens repeat, +block:N drafts at most N tokens"
)


@dataclass(frozen=True)
class Arm:
    """One way to decode.

    name: as on the command line.
    spec: the policy for :func:`dspark.schedule.parse_policy`; "" where our loop drafts nothing.
    min_match: tokens that must repeat before the context is copied; 0 copies nothing.
    trained: whether it needs the trained drafter.
    peer: another loop than ours, run on the stock target.
    """

    name: str
    spec: str = ""
    min_match: int = 0
    trained: bool = False
    peer: Callable[[Target, Settings], Decoder] | None = None

    @property
    def pass_name(self) -> str:
        """What runs the target's pass; "" for the target itself."""
        return package_version() if self.name in LLAMACPP else "lean" if self.peer is by_eager else "transformers" if self.peer else ""

    def policy(self, target: Target, source: DraftSource) -> Policy:
        """The policy on this target; ``auto`` and ``prefix`` measure step times if they are not in the cache."""
        return parse_policy(self.spec, lambda: step_times(target, source))

    def source(self, drafter: Drafter | None, target: Target | None = None) -> DraftSource:
        """The drafter as this arm uses it. target: needed by ``copy`` alone."""
        mine = drafter if self.trained else None
        return ContextLookup(mine, self.min_match, target=target) if self.min_match else mine

    def decoder(self, target: Target, drafter: Drafter | None, settings: Settings, stock: Target | None = None) -> Decoder:
        """Ready to run. Raises ValueError if the drafter cannot serve the policy, or a peer lacks the stock target."""
        if self.name in LLAMACPP:
            return by_llamacpp(target, drafter if self.trained else None, settings)
        if self.peer:
            return self.peer(stock or target, settings)
        if not self.spec:
            return by_dspark(target, None, None, settings)
        source = self.source(drafter, target)
        policy = self.policy(target, source)
        try:
            policy.check(source.block_size, source.has_confidence)
        except ValueError as error:
            raise ValueError(f"arm {self.name!r}: {error}") from None
        return by_dspark(target, source, policy, settings)


@dataclass(frozen=True)
class Models:
    """What the arms of a run need.

    target: decodes in our loop.
    drafter: None where no arm needs it.
    stock: the target as transformers loads it, weights not rearranged; None where no arm needs it, ``target`` itself where they agree.
    """

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
    single = separated(names)
    if twice := {name for name in single if single.count(name) > 1}:
        raise ValueError(f"arm {min(twice)!r} is named twice: name each arm once")
    return tuple(map(parse_arm, single))


def parse_arm(name: str) -> Arm:
    """One arm by its name. Raises ValueError for a misspelled one."""
    if name == "plain" or name in PEERS:
        return Arm(name, peer=PEERS.get(name))
    if name in LLAMACPP:
        return Arm(name, trained=LLAMACPP[name])
    copying = re.search(r"(^|\+)copy(?::([1-9]\d*))?(?=\+|$)", name)
    alone = bool(copying) and not copying[1]
    spec = "fixed" * alone + (name.replace(copying[0], "", 1) if copying else name)
    try:
        if re.match(r"plain\b", spec):
            raise ValueError("plain drafts nothing, so nothing can follow it")
        parse_policy(spec, lambda: lambda tokens: 1.0)  # misspelled numbers are found before any model is loaded
    except ValueError as error:
        raise ValueError(f"arm {name!r} cannot be read ({error}): choose from {CHOICES}") from None
    return Arm(name, spec, int(copying[2] or 2) if copying else 0, trained=not alone)


# ---- how figures and tables show an arm

OTHER_ARMS = {  # what figures show beside our policies: label and colour
    "generate": ("transformers' generate", "#4d4d4d"),
    "lookup": ("transformers' prompt lookup", "#a6761d"),
    "assisted": ("transformers' assisted", "#b2abd2"),
    "llamacpp": ("llama.cpp", "#e66101"),
    "llamacpp+dspark": ("llama.cpp, our drafter", "#fdb863"),
    "copy": ("copying alone", "#117733"),
    "oracle": ("oracle", "#8c8c8c"),
}
COPYING_SHADE = 0.6  # how much of a policy's colour stays when it also copies


def _look(arm: str) -> tuple[tuple[str, str], str, list[str]]:
    """Label and colour of what an arm's name begins with, the numbers after it, and the suffixes that they leave out."""
    if arm in OTHER_ARMS:
        return OTHER_ARMS[arm], "", []
    kind, *suffixes = arm.split("+")
    name, _, numbers = kind.partition(":")
    row = POLICIES.get(name)
    return (row.label, row.colour) if row else OTHER_ARMS.get(name, (name, "#999999")), numbers, suffixes


def arm_colour(arm: str) -> str:
    """The colour of an arm such as ``"fixed:5+copy"`` or ``"generate"``, as hex; the same in every figure."""
    (_, colour), _, suffixes = _look(arm)
    if not any(suffix.startswith("copy") for suffix in suffixes):
        return colour
    return "#" + "".join(f"{round(COPYING_SHADE * int(colour[i : i + 2], 16)):02x}" for i in (1, 3, 5))


def arm_label(arm: str) -> str:
    """What figures call an arm: ``"fixed:5+copy"`` → "fixed window 5, copying"."""
    (label, _), numbers, suffixes = _look(arm)
    block = [f"blocks of {s.partition(':')[2]}" for s in suffixes if s.startswith("block:")]
    copying = ["copying"] * any(s.startswith("copy") for s in suffixes)
    return ", ".join([f"{label} {numbers}".strip(), *block, *copying])
