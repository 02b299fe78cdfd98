"""``python -m tests.soak``: an hour of random arrivals, cancels and bad requests. Ends with an error if they do harm."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence

import dspark
from dspark.bench.prompts import DOMAINS, load_prompts
from dspark.bench.provenance import peak_rss_mib
from dspark.cli import run_main
from dspark.draft.source import DraftSource
from dspark.engine import Engine
from dspark.request import Request
from dspark.target.target import Prompt, Target

BAD = ({"max_new_tokens": 0}, {"temperature": -1.0}, {"seed": -1}, {"top_p": 0.0})
GROWTH = 1.1  # of the peak of memory after a quarter of the time, at most


def soak(
    target: Target, drafter: DraftSource, prompts: Sequence[Prompt], seconds: float, *, seed: int = 0, users: int = 8, tokens: int = 24
) -> dict[str, float]:
    """Keep an engine busy for so long; greedy, so texts can be compared with those of plain decoding alone.

    Returns requests, cancelled, refused, longest_wait (steps in the queue) and growth of the process's memory. Raises AssertionError
    for a text that differs, a request that waits longer than all before it could take, a slot that leaks, memory that grows.
    """
    draw, start, step = random.Random(seed), time.monotonic(), 0
    alone = [dspark.generate(target, None, prompt, max_new_tokens=tokens).token_ids for prompt in prompts]
    engine = Engine(target, drafter, max_requests=users)
    sent: dict[Request, tuple[int, int]] = {}  # prompt, step of arrival
    counts, early = {"requests": 0, "cancelled": 0, "refused": 0, "longest_wait": 0}, 0.0
    while (passed := (time.monotonic() - start) / seconds) < 1 or engine.active or engine.waiting:
        while passed < 1 and len(engine.waiting) < 2 * users and draw.random() < 0.5:
            i = draw.randrange(len(prompts))
            sent[engine.submit(prompts[i], max_new_tokens=draw.randint(1, tokens))] = i, step
            counts["requests"] += 1
        if sent and draw.random() < 0.05:
            engine.cancel(draw.choice(list(sent)))
            counts["cancelled"] += 1
        if engine.active and draw.random() < 0.05:
            bad = draw.choice([*BAD, {"id": engine.active[0].id}])
            try:
                engine.submit(prompts[0], **bad)
            except ValueError:
                counts["refused"] += 1
            else:
                raise AssertionError(f"the engine took a request with {bad}")
        engine.step()
        step += 1
        for request, (i, since) in list(sent.items()):
            if request.status == "waiting":
                counts["longest_wait"] = max(counts["longest_wait"], step - since)
                assert step - since <= 3 * users * (tokens + 1), f"request {request.id!r} has waited for {step - since} steps"
            elif request.done:
                assert request.status in ("finished", "cancelled"), f"request {request.id!r} failed: {request.error!r}"
                expected = alone[i][: len(request.token_ids) if request.status == "cancelled" else request.limit]
                assert request.token_ids == expected, f"request {request.id!r} wrote another text than alone"
                del sent[request]
        if passed > 0.25:
            early = early or peak_rss_mib()
    assert not sent and not getattr(engine.cache, "slots", []), "a request or a slot was never given back"
    growth = peak_rss_mib() / early if early else 1.0
    assert growth <= GROWTH, f"memory grew by a factor of {growth:.2f}"
    return counts | {"steps": step, "growth": growth}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600.0, help="default an hour")
    parser.add_argument("--users", type=int, default=8, help="requests served at once; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and cancels")
    return run_main(parser, _soak, arguments)


def _soak(options: argparse.Namespace) -> None:
    if not options.seconds > 0:
        raise ValueError(f"seconds must be positive, got {options.seconds}")
    target = dspark.load_target(dtype="float32")
    prompts = [item.messages for domain in DOMAINS for item in load_prompts(domain, "dev", 2)]
    drafter = dspark.load_drafter("default", target)
    print(soak(target, drafter, prompts, options.seconds, seed=options.seed, users=options.users))


if __name__ == "__main__":
    sys.exit(main())
