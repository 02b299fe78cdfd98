"""Two checkouts of this repository against each other, prompt by prompt and arm by arm in turn: did a change make decoding faster?

    python data/compare.py OLD NEW --prompts 10 --tokens 48 --out runs/compare.json
    python data/compare.py OLD NEW --self-play 256 --out runs/compare-self-play.json

OLD, NEW: folders, such as two `git worktree`s. Each decodes in a process of its own, of which only one is at work at a time. Greedy, on
test prompts, with the default target and drafter. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np

DOMAINS = ("code", "math", "chat", "structured")
ARMS = ("plain", "fixed+copy", "prefix+copy")
CONTEXT, NEW = 32, 16  # tokens of a self-play row before the steps that are timed, and steps


def serve(checkout: str, threads: int) -> None:
    """One process: reads {arm, messages, tokens} per line, answers with what decoding took."""
    sys.path.insert(0, checkout)
    import torch

    import dspark

    torch.set_num_threads(threads)
    older = Path(checkout, "dspark", "profile.py").exists()  # before it moved
    profile = importlib.import_module("dspark.profile" if older else "dspark.tune.profile")
    target = dspark.load_target("default")
    source = dspark.ContextLookup(dspark.load_drafter("default", target))
    policies = {"plain": None, "fixed+copy": dspark.FixedWindow(), "prefix+copy": dspark.PrefixScheduler(profile.sps_curve(target))}
    print("{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["arm"] == "self-play":
            print(json.dumps(self_play(target, asked["rows"])), flush=True)
            continue
        options = {"policy": policies[asked["arm"]], "max_new_tokens": asked["tokens"]}
        out = dspark.generate(target, source if asked["arm"] != "plain" else None, asked["messages"], **options)
        rounds = out.rounds[1:]
        tokens, seconds = sum(len(r.committed) for r in rounds), sum(r.seconds for r in rounds)
        models = sum(r.draft_seconds + r.verify_seconds for r in rounds)
        took = {"ms_per_token": 1e3 * seconds / tokens, "other_ms_per_round": 1e3 * (seconds - models) / len(rounds)}
        took |= {"draft_ms": 1e3 * sum(r.draft_seconds for r in rounds) / len(rounds), "tau": tokens / len(rounds)}
        print(json.dumps(took), flush=True)


def self_play(target: object, rows: int) -> dict[str, float]:
    """Tokens a second that so many rows of self-play sample together: steps after ``CONTEXT`` tokens, their prefill taken off."""
    import torch

    from dspark.train.selfplay import converse, turns_of

    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(1000, target.vocab_size, (rows, CONTEXT), generator=generator).tolist()

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        converse(target, turns_of(target), starts, torch.ones(rows), CONTEXT + steps, 0.9, generator)
        return time.perf_counter() - start

    seconds(1)  # the first pass allocates the buffers
    return {"tokens_per_second": rows * NEW / (seconds(1 + NEW) - seconds(1))}


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """One row per checkout, arm and prompt."""
    processes = {}
    for name in ("old", "new"):  # one after the other, so that neither measures its step times beside the other
        checkout = str(Path(getattr(options, name)).resolve())
        command = [sys.executable, __file__, checkout, checkout, "--serve", "--threads", str(options.threads)]
        environment = os.environ | {"PYTHONPATH": checkout}
        processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout)
        processes[name].stdout.readline()

    def ask(name: str, asked: dict[str, object]) -> dict[str, object]:
        processes[name].stdin.write(json.dumps(asked) + "\n")
        processes[name].stdin.flush()
        return {"checkout": name, "arm": asked["arm"]} | json.loads(processes[name].stdout.readline())

    if options.self_play:
        return [ask(name, {"arm": "self-play", "rows": options.self_play}) for name in ("old", "new", "new", "old")]
    rows, turn = [], 0
    for domain in DOMAINS:
        lines = (Path(options.new) / "data" / "prompts" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        items = [item for item in map(json.loads, lines) if item["split"] == "test"][: options.prompts]
        for item, arm in product(items, ARMS):
            turn += 1
            for name in ("old", "new")[:: 1 if turn % 2 else -1]:
                asked = {"arm": arm, "messages": item["messages"], "tokens": options.tokens}
                rows.append({"domain": domain, "prompt": item["id"]} | ask(name, asked))
    for process in processes.values():
        process.stdin.close()
    return rows


def ratio(rows: list[dict[str, object]], above: tuple[str, str], below: tuple[str, str]) -> str:
    """Time per token of (checkout, arm) over another's: geometric mean of the domains' medians of per-prompt ratios, 95 % bootstrap."""
    times = {(r["checkout"], r["arm"], r["domain"], r["prompt"]): r["ms_per_token"] for r in rows}
    ratios = {d: np.array([t / times[(*below, d, p)] for (c, a, d2, p), t in times.items() if (c, a, d2) == (*above, d)]) for d in DOMAINS}

    def mean(chosen: dict[str, np.ndarray]) -> float:
        return math.exp(sum(math.log(np.median(values)) for values in chosen.values()) / len(chosen))

    rng = np.random.default_rng(0)
    drawn = [mean({d: rng.choice(values, len(values)) for d, values in ratios.items()}) for _ in range(2000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{mean(ratios):.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--prompts", type=int, default=10, help="test prompts per domain; default %(default)s")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens; default %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--self-play", type=int, metavar="ROWS", help="time self-play with so many rows instead of prompts")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.json"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.old, options.threads)
    rows = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=0) + "\n")
    if options.self_play:
        for name in ("old", "new"):
            speeds = [r["tokens_per_second"] for r in rows if r["checkout"] == name]
            print(f"{name}: {median(speeds):.0f} tokens/s of {options.self_play} rows ({', '.join(f'{s:.0f}' for s in speeds)})")
        return
    for arm in ARMS:
        print(f"{arm}: time per token, old over new {ratio(rows, ('old', arm), ('new', arm))}")
    for name, arm in product(("old", "new"), ARMS[1:]):
        print(f"{name}: {arm} over its own plain loop {ratio(rows, (name, 'plain'), (name, arm))}")
    for name in ("old", "new"):
        mine = [r for r in rows if r["checkout"] == name and r["arm"] == "fixed+copy"]
        print(f"{name}: fixed+copy, medians in ms:", {k: round(median(r[k] for r in mine), 2) for k in ("draft_ms", "other_ms_per_round")})


if __name__ == "__main__":
    main()
