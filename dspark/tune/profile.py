"""Seconds of one target step over B tokens: measured once per machine, cached, read by the scheduler."""

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm

from dspark.clock import now
from dspark.device.round import static_round
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import Ask, DraftSource, propose
from dspark.files import cache_dir, digest, write_atomically
from dspark.rewind import SlotCache
from dspark.target.target import Target
from dspark.tune.curve import Extra, SPSCurve
from dspark.verify.passes import TargetPass, pass_of
from dspark.verify.sampling import Rng, Sampling

log = logging.getLogger(__name__)
T = TypeVar("T", SPSCurve, Extra)
K = TypeVar("K")
Shape = tuple[int, int, int]  # of a pass: requests that share it, tokens of all of them, tokens in the cache of each

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
REQUESTS = (1, 2, 4, 8, 16, 32)  # that draft together
CONTEXT = 256  # cached tokens before the steps that are measured
SHAPES = ((1, 1, CONTEXT), (1, 8, CONTEXT), (8, 8, CONTEXT), (1, 1, 768), (1, 8, 768), (2, 8, 768))
PATIENCE = 2.0  # seconds for one kind of step where the default policy waits for it
FORMAT = 7  # of the cached files; files of another format are measured again
_while_busy: dict[Path, object] = {}  # file → times that serve while this machine is busy, and are not written there


def profile_sps(target: Target, **options: object) -> SPSCurve:
    """The curve of :func:`median_steps` on this machine, with its options. Raises ValueError as it does."""
    measured = median_steps(target, **options)
    return SPSCurve(tuple(measured), tuple(measured.values()))


def median_steps(
    target: Target, *, context: int = CONTEXT, widths: Sequence[int] = WIDTHS, repeats: int = 9, patience: float = math.inf
) -> dict[int, float]:
    """Width, ascending → median seconds of a step over that many tokens after ``context`` cached ones, as measured.

    Raises ValueError for a context that is empty or does not fit the target, or fewer than one repeat.
    """
    widths = tuple(sorted(set(widths)))
    if repeats < 1 or not widths or widths[0] < 1:
        raise ValueError(f"repeats and widths must be at least 1, got {repeats} repeats of widths {widths}")
    longest = target.max_context - widths[-1]
    if not 1 <= context <= longest:
        raise ValueError(f"context must lie in 1..{longest}, so that {widths[-1]} more tokens fit into {target.name}, got {context}")
    times = pass_times(target, [(1, width, context) for width in widths], repeats=repeats, patience=patience)
    return {width: seconds for (_, width, _), seconds in times.items()}


def pass_times(
    target: Target, shapes: Sequence[Shape], *, repeats: int, patience: float = math.inf, run: TargetPass | None = None
) -> dict[Shape, float]:
    """Shape → median seconds of one pass. run: None for the target's own pass."""
    run, held = run or pass_of(target), {}
    most = max(tokens + context for _, tokens, context in shapes)
    ids = torch.randint(target.vocab_size, (most,), generator=torch.Generator().manual_seed(0)).tolist()
    for context in {context for *_, context in shapes}:
        cache = run.new_cache()
        slots = [cache.open() for _ in range(max(requests for requests, _, c in shapes if c == context))]
        for slot in slots:
            if isinstance(cache, SlotCache):  # what it holds does not change the time
                cache.reserve(context)
                slot.length = context
            else:
                run([ids[:context]], [slot], cache, last_only=True)
        held[context] = cache, slots

    def step(shape: Shape) -> float:
        requests, tokens, context = shape
        cache, slots = held[context]
        chosen = slots[:requests][::-1]  # out of order, as after some requests have left
        start = now(target.device)
        run([ids[: tokens // requests]] * requests, chosen, cache)
        taken = now(target.device) - start
        for slot in chosen:
            slot.rewind(context)
        return taken

    return medians(step, shapes, repeats, patience)


def medians(step: Callable[[K], float], kinds: Sequence[K], repeats: int, patience: float = math.inf) -> dict[K, float]:
    """Kind of step → median of ``step(kind)``. The first of each kind is left out: it allocates buffers or absorbs the prompt.

    The kinds take turns, starting with another one each time, so a slow period of the machine affects all of them. After ``patience``
    seconds three repeats are enough.
    """
    start, times = time.perf_counter(), {kind: [] for kind in kinds}
    for turn in tqdm(range(1 + repeats), "measuring step times", leave=False, delay=1):
        if turn > 3 and time.perf_counter() - start > patience:
            break
        first = turn % len(kinds)
        for kind in (*kinds[first:], *kinds[:first]):
            times[kind].append(step(kind))
    return {kind: median(found[1:]) for kind, found in times.items()}


def profile_draft(target: Target, drafter: DraftSource, *, context: int = CONTEXT, repeats: int = 9) -> float:
    """T_draft on this machine: median seconds of one greedy block; see :func:`draft_times`."""
    return draft_times(target, drafter, context=context, widths=[drafter.block_size], repeats=repeats)[drafter.block_size]


def draft_times(
    target: Target, drafter: DraftSource, *, context: int = CONTEXT, widths: Sequence[int] = (), repeats: int = 9, alone: bool = False
) -> dict[int, float]:
    """Width → median seconds of a greedy draft of that many tokens after ``context`` tokens.

    The times depend on shapes alone, so an untrained drafter will do. widths: default 1, 2, … γ. alone: draft after draft, without the
    target's passes in between, which displace the drafter's weights from the caches. Raises ValueError for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    shapes = [(1, width) for width in widths or range(1, drafter.block_size + 1)]
    return {width: seconds for (_, width), seconds in _block_times(target, drafter, shapes, context, repeats, alone=alone).items()}


def _block_times(
    target: Target,
    drafter: DraftSource,
    shapes: Sequence[tuple[int, int]],
    context: int,
    repeats: int,
    patience: float = math.inf,
    alone: bool = False,
) -> dict[tuple[int, int], float]:
    """(requests, tokens of each) → median seconds of drafting them together, where this target's rounds draft: on the device, or here."""
    static = None if isinstance(drafter, ContextLookup) else static_round(pass_of(target), drafter)
    most, states, slots, rng = max(n for n, _ in shapes), [], [], Rng(torch.Generator(target.device).manual_seed(0))
    if static:
        slots = [static.cache.open() for _ in range(most)]
        for slot in slots:
            slot.length = context  # what the slots hold does not matter
    else:
        tokens = torch.randint(target.vocab_size, (context,), generator=torch.Generator().manual_seed(0)).tolist()
        cache = (run := pass_of(target)).new_cache()
        _, (taps,) = run([tokens], [slot := cache.open()], cache, drafter.target_layer_ids, last_only=True)
        states = [drafter.new_state(tokens) for _ in range(most)]
        for state in states:
            drafter.extend(state, tokens, taps)

    def draft(shape: tuple[int, int]) -> float:
        requests, width = shape
        if not (static or alone):
            run([tokens[-1:]], [slot], cache)
            slot.rewind(context)
        start = now(target.device)
        if static:
            static.draw(slots[:requests], width)
        else:
            propose(drafter, [Ask(state, tokens[-1], width, Sampling(), rng) for state in states[:requests]])
        taken = now(target.device) - start
        for state in states[:requests]:  # as after a round: the next draft has context to absorb
            drafter.extend(state, tokens[-1:], None if taps is None else taps[:, -1:])
        return taken

    return medians(draft, shapes, repeats, patience)


def sps_curve(target: Target) -> SPSCurve:
    """The curve of this target on this machine: from the cache, else measured (seconds) and kept there.

    One file per machine, device, target digest, dtype, weight layout, thread count and torch version, in ``cache_dir()/profiles``.
    """
    widths = [width for width in WIDTHS if 2 * width <= target.max_context]
    options = {"context": min(CONTEXT, target.max_context - widths[-1]), "widths": widths, "repeats": 5, "patience": PATIENCE}
    return _kept(target, {"context": options["context"]}, SPSCurve, lambda: profile_sps(target, **options))


def step_times(target: Target, drafter: DraftSource) -> SPSCurve:
    """:func:`measured_times` without staircases: all that :class:`dspark.schedule.Auto` reads."""
    return measured_times(target, drafter).convex()


def measured_times(target: Target, drafter: DraftSource) -> SPSCurve:
    """:func:`sps_curve` with what requests and contexts add, and the drafter's own times; measured and kept like it."""
    extra = _kept(target, {"shapes": SHAPES}, Extra, lambda: profile_extra(target))
    curve, trained = replace(sps_curve(target), extra=extra), drafter.drafter if isinstance(drafter, ContextLookup) else drafter
    if trained is None:  # copying costs nothing
        return curve
    config = str(getattr(trained, "config", vars(type(trained))))
    key = {"drafter": digest(f"{type(trained).__name__} {config}"), "fused": type(getattr(trained, "fused", None)).__name__}
    return replace(curve, draft=_kept(target, key, SPSCurve, lambda: profile_drafts(target, trained)))


def profile_extra(target: Target, repeats: int = 5) -> Extra:
    """What several requests and longer contexts add to a pass: least squares over the medians of SHAPES, nothing below 0."""
    longest = max(1, target.max_context - 8)  # a shorter context than SHAPES asks for is measured where the target takes no more
    shapes = [(requests, tokens, min(context, longest)) for requests, tokens, context in SHAPES]
    times, base, others = pass_times(target, shapes, repeats=repeats, patience=PATIENCE), shapes[0][2], shapes[2:]
    terms = np.array([(r - 1, r * (c - base), n * (c - base)) for r, n, c in others], dtype=float)
    found = np.linalg.lstsq(terms, np.array([times[r, n, c] - times[1, n, base] for r, n, c in others]))[0]
    return Extra(base, *np.maximum(found, 0.0).tolist())


def profile_drafts(target: Target, drafter: DraftSource, *, requests: Sequence[int] = REQUESTS, repeats: int = 5) -> SPSCurve:
    """Drafts per second by the number of requests that draft a whole block together."""
    context = max(1, min(CONTEXT, target.max_context - drafter.block_size - 1))
    times = _block_times(target, drafter, [(n, drafter.block_size) for n in requests], context, repeats, PATIENCE)
    return SPSCurve(tuple(requests), tuple(times.values()))


def _kept(target: Target, more: dict[str, object], kind: type[T], measure: Callable[[], T]) -> T:
    """Step times from the cache, else measured and kept there under all that they depend on; not kept if the machine is busy."""
    key = more | {
        "format": FORMAT,
        "machine": cpu_name(),
        "cores": os.cpu_count(),
        "device": device_name(target.device),
        "target": target.digest,
        "dtype": str(target.dtype),
        "pass": target.pass_name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    path = cache_dir() / "profiles" / f"{digest(json.dumps(key, sort_keys=True))}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] != json.loads(json.dumps(key)):
            raise ValueError(f"it was measured on {kept['key']['machine']}, {kept['key']['cores']} cores")
        return kind(**kept["times"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the profile %s cannot be read and is measured again (%s)", path.name, error)
    load = getattr(os, "getloadavg", lambda: (0.0,))()[0]  # Windows does not tell
    if load > os.cpu_count():
        if path not in _while_busy:
            log.warning("this machine is busy (load %.1f): its step times are not kept, and are measured again when it is not", load)
            _while_busy[path] = measure()
        return _while_busy[path]
    times = measure()
    try:
        write_atomically(path, json.dumps({"key": key, "times": asdict(times)}, indent=1).encode())
    except ValueError as error:
        log.warning("the profile could not be kept and will be measured again: %s", error)
    return times


def cpu_name() -> str:
    """The processor's model name and PyTorch's instruction set: clouds give several generations one name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def device_name(device: torch.device) -> str:
    """ "cpu", or the model name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
