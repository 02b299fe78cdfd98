"""One target pass, three ways, in turn: transformers' modules as they load, the same with our products, and the compiled pass.

    python data/passes.py --out data/results/passes.json

After 200 and 1 500 cached tokens, for 1, 2, 6 and 12 tokens; then a drafted block, after a pass and draft after draft, and the time of a
round outside both models. Medians over --repeats turns, in milliseconds. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import median

import torch

import dspark
from dspark.bench.prompts import DOMAINS, load_prompts
from dspark.clock import now
from dspark.cpu.packed import pack_linears
from dspark.files import write_atomically
from dspark.target.target import Target
from dspark.tune.profile import cpu_name, draft_times
from dspark.verify.passes import TransformersPass

CONTEXTS, WIDTHS = (200, 1500), (1, 2, 6, 12)


def targets(name: str) -> dict[str, Target]:
    """The same weights, run in three ways."""
    stock, packed, lean = (dspark.load_target(name, pack=False), dspark.load_target(name, pack=False), dspark.load_target(name))
    pack_linears(packed.model)
    return {"transformers": stock, "modules, our products": packed, lean.pass_name: lean}


def measure_passes(ways: dict[str, Target], repeats: int) -> list[dict[str, object]]:
    """One row per way, context and width."""
    steps, times = {}, defaultdict(list)
    for (way, target), context in product(ways.items(), CONTEXTS):
        run = target.verifier or TransformersPass(target)
        cache = run.new_cache()
        slot = cache.open()
        tokens = torch.randint(target.vocab_size, (context + max(WIDTHS),), generator=torch.Generator().manual_seed(0)).tolist()
        run([tokens[:context]], [slot], cache, last_only=True)
        steps[way, context] = (run, cache, slot, tokens[context:])
    with torch.inference_mode():
        for turn in range(1 + repeats):
            for (way, context), width in sorted(product(steps, WIDTHS), reverse=bool(turn % 2)):
                run, cache, slot, tokens = steps[way, context]
                start = now(torch.device("cpu"))
                run([tokens[:width]], [slot], cache)
                times[way, context, width].append(now(torch.device("cpu")) - start)
                slot.rewind(context)
    return [
        {"pass": way, "context": context, "tokens": width, "ms": 1e3 * median(found[1:])} for (way, context, width), found in times.items()
    ]


def measure_round(target: Target, repeats: int) -> dict[str, float]:
    """A drafted block, and the time of a round outside both models, on dev prompts."""
    drafter = dspark.load_drafter("default", target)
    block, alone = (
        draft_times(target, drafter, context=200, widths=[drafter.block_size], repeats=repeats, alone=alone)[drafter.block_size]
        for alone in (False, True)
    )
    outside = []
    for item in (item for domain in DOMAINS for item in load_prompts(domain, "dev", 2)):
        out = dspark.generate(target, dspark.ContextLookup(drafter), item.messages, policy=dspark.FixedWindow(), max_new_tokens=48)
        outside += [r.seconds - r.draft_seconds - r.verify_seconds for r in out.rounds[1:]]
    return {"block_ms": 1e3 * block, "block_alone_ms": 1e3 * alone, "outside_ms": 1e3 * median(outside), "rounds": len(outside)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="default")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/passes.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways = targets(options.target)
    about = {"cpu": cpu_name(), "threads": options.threads, "dtype": str(next(iter(ways.values())).dtype), "repeats": options.repeats}
    result = about | {"passes": measure_passes(ways, options.repeats), "round": measure_round(list(ways.values())[-1], options.repeats)}
    write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
