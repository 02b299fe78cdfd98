"""``python -m dspark.bench gpu --minutes 8``: everything that has to be measured on a GPU, in one command.

First equality: the graphed texts are transformers' own. Then speed with one request, step times up to 4 096 tokens, throughput with 1 to
512 requests, memory. Each part is a process of its own and writes its rows as it goes, so a part that fails or is cut off costs itself
alone and keeps what it has. ``--rehearse`` runs every line but the capture itself at toy size on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean

from dspark.bench.gpu_parts import GRAPHED, PARTS, Bench, GpuPlan, Sheet
from dspark.bench.provenance import environment, utc
from dspark.cli import add_fields, from_fields, run_main
from dspark.files import one_line, write_atomically

SHARES = {"equality": 0.15, "speed": 0.35, "sps": 0.12, "requests": 0.3, "memory": 0.08}  # of the time, in the order of running
GRACE = 60.0  # seconds beyond its share after which a part is ended: it checks the time between rows itself


def run_part(plan: GpuPlan, part: str, folder: Path, seconds: float) -> None:
    """One part, in the process that calls this; an error ends in its file."""
    sheet = Sheet(folder / f"gpu-{part}.json", {"part": part, "plan": asdict(plan), "utc": utc()})
    try:
        bench = Bench(plan, part, seconds)
        sheet.write(environment=environment(bench.target) | {"pass": bench.passes[GRAPHED].name})
        PARTS[part](bench, sheet)
        sheet.write(complete=True)
    except Exception as error:
        sheet.write(error=f"{type(error).__name__}: {one_line(error)}")


def measure(plan: GpuPlan, folder: Path, run: Callable[..., None] = run_part) -> dict[str, dict]:
    """All parts, one after another, each with its share of the time that is left. Returns part → what its file holds."""
    ends, found = time.monotonic() + 60 * plan.minutes, {}
    for i, (part, share) in enumerate(SHARES.items()):
        seconds = max(ends - time.monotonic(), 1.0) * share / sum(list(SHARES.values())[i:])
        path = folder / f"gpu-{part}.json"
        path.unlink(missing_ok=True)  # an earlier run's
        process = get_context("spawn").Process(target=run, args=(plan, part, folder, seconds))
        process.start()
        process.join(seconds + GRACE)
        if process.is_alive():
            process.kill()
            process.join()
        found[part] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": [], "complete": False, "error": ""}
        if not found[part]["complete"] and not found[part]["error"]:
            found[part]["error"] = f"its process ended with status {process.exitcode}"
            write_atomically(path, json.dumps(found[part], indent=1).encode())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`. Also returns 1 if a part failed or texts differ."""
    parser = argparse.ArgumentParser(prog="python -m dspark.bench gpu", description=__doc__.splitlines()[0])
    add_fields(parser, GpuPlan)
    parser.add_argument("--rehearse", action="store_true", help="toy models on the CPU: is every line in order?")
    parser.add_argument("--out", type=Path, default=Path("runs") / "bench" / "gpu", help="folder of gpu-PART.json; default runs/bench/gpu")
    return run_main(parser, _run, arguments)


def _run(options: argparse.Namespace) -> int:
    found = measure(from_fields(GpuPlan, options), options.out)
    for part, content in found.items():
        state = "complete" if content["complete"] else f"incomplete ({content['error']})"
        print(f"{part:9} {len(content['rows']):4} rows, {state}")
    rows = found["speed"]["rows"]
    if rows:
        print("tokens per second, geometric mean over prompts: " + ", ".join(f"{a} {s:.1f}" for a, s in tokens_per_second(rows).items()))
    print(f"in {options.out}")
    unequal = any(row["equal"] < row["texts"] for row in found["equality"]["rows"])
    return int(unequal or not all(content["complete"] for content in found.values()))


def tokens_per_second(rows: Sequence[dict]) -> dict[str, float]:
    """Arm → geometric mean over prompts, of the rows of the part ``speed``."""
    arms = dict.fromkeys(row["arm"] for row in rows)
    return {arm: geometric_mean(row["tokens"] / row["seconds"] for row in rows if row["arm"] == arm) for arm in arms}
