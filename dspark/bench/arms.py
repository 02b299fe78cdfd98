"""Arms: each name on the command line is one way to decode a prompt."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dspark.bench.llamacpp import by_llamacpp, package_version
from dspark.bench.measure import Decoder, Settings, by_dspark, by_transformers
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


def by_early_exit(target: Target, settings: Settings) -> Decoder:
    """Transformers' assisted generation. No smaller model shares the default target's vocabulary, so the assistant is the first third
    of the target's own layers: no memory, but not trained to be read early. Transformers chooses the draft length, 20 at most."""
    return by_transformers(target, settings, assistant_early_exit=max(1, target.num_layers // 3))


HEADLINE = "plain,generate,mtp1,fixed:5,fixed+copy,auto+copy"
PEERS: dict[str, Callable[[Target, Settings], Decoder]] = {  # other loops than ours, on the stock target
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
    """One way to decode."""

    name: str  # as on the command line
    spec: str = ""  # the policy, for parse_policy; "" where our loop drafts nothing
    min_match: int = 0  # tokens that must repeat before the context is copied; 0 copies nothing
    trained: bool = False  # whether it needs the trained drafter

    @property
    def peer(self) -> Callable[[Target, Settings], Decoder] | None:
        return PEERS.get(self.name)

    @property
    def pass_name(self) -> str:
        """What runs the target's pass; "" for the target itself."""
        return package_version() if self.name in LLAMACPP else "lean" if self.name == "eager" else "transformers" if self.peer else ""

    def policy(self, target: Target, source: DraftSource) -> Policy:
        """The policy on this target; ``auto`` and ``prefix`` measure step times if they are not in the cache."""
        return parse_policy(self.spec, lambda: step_times(target, source))

    def source(self, drafter: Drafter | None, target: Target | None = None) -> DraftSource:
        """The drafter as this arm uses it. target: needed by ``copy`` alone."""
        mine = drafter if self.trained else None
        return ContextLookup(mine, self.min_match, target=target) if self.min_match else mine


@dataclass(frozen=True)
class Models:
    """What the arms of a run need."""

    target: Target  # decodes in our loop
    drafter: Drafter | None = None  # None where no arm needs it
    stock: Target | None = None  # as transformers loads it, weights not rearranged; ``target`` itself where they agree

    def decoder(self, arm: Arm, settings: Settings) -> Decoder:
        """Ready to run. Raises ValueError if the drafter cannot serve the policy, or a peer lacks the stock target."""
        target = self.target
        if arm.name in LLAMACPP:
            return by_llamacpp(target, self.drafter if arm.trained else None, settings)
        if arm.peer:
            return arm.peer(self.stock or target, settings)
        if not arm.spec:
            return by_dspark(target, None, None, settings)
        source = arm.source(self.drafter, target)
        policy = arm.policy(target, source)
        try:
            policy.check(source.block_size, source.has_confidence)
        except ValueError as error:
            raise ValueError(f"arm {arm.name!r}: {error}") from None
        return by_dspark(target, source, policy, settings)


def parse_arms(names: str) -> tuple[Arm, ...]:
    """``"plain,fixed:5,adaptive:0.6,0.3,0.05+copy"`` → arms: a comma before a name separates them, before a number their numbers.
    Raises ValueError naming the wrong one and the choices."""
    single = [name.strip() for name in re.split(r",(?=\s*[A-Za-z])", names)]
    if twice := {name for name in single if single.count(name) > 1}:
        raise ValueError(f"arm {min(twice)!r} is named twice: name each arm once")
    return tuple(map(parse_arm, single))


def parse_arm(name: str) -> Arm:
    """One arm by its name. Raises ValueError for a misspelled one."""
    if name in ("plain", *PEERS, *LLAMACPP):
        return Arm(name, trained=LLAMACPP.get(name, False))
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


OTHER_ARMS = {  # what figures show beside our policies: label and colour
    "generate": ("transformers' generate", "#4d4d4d"),
    "lookup": ("transformers' prompt lookup", "#a6761d"),
    "assisted": ("transformers' assisted", "#b2abd2"),
    "llamacpp": ("llama.cpp", "#e66101"),
    "llamacpp+dspark": ("llama.cpp, our drafter", "#fdb863"),
    "copy": ("copying alone", "#117733"),
    "oracle": ("oracle", "#8c8c8c"),
}
COPYING_SHADE = 0.75  # how much of a policy's colour stays when it also copies


def _look(arm: str) -> tuple[str, str]:
    """Label and colour, the same in every figure: "fixed:5+copy" → "fixed window 5, copying" and the policy's colour, darker."""
    if arm in OTHER_ARMS:
        return OTHER_ARMS[arm]
    kind, *suffixes = arm.split("+")
    name, _, numbers = kind.partition(":")
    row = POLICIES.get(name)
    label, colour = (row.label, row.colour) if row else OTHER_ARMS.get(name, (name, "#999999"))
    parts = [f"{label} {numbers}".strip(), *(f"blocks of {s.partition(':')[2]}" for s in suffixes if s.startswith("block:"))]
    if any(s.startswith("copy") for s in suffixes):
        parts.append("copying")
        colour = "#" + "".join(f"{round(COPYING_SHADE * int(colour[i : i + 2], 16)):02x}" for i in (1, 3, 5))
    return ", ".join(parts), colour


def arm_label(arm: str) -> str:
    """What figures call an arm such as ``"fixed:5+copy"`` or ``"generate"``."""
    return _look(arm)[0]


def arm_colour(arm: str) -> str:
    """Its colour in figures, as hex."""
    return _look(arm)[1]
