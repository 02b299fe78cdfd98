"""``python -m tests.exact [PART ...]``: the long exactness checks. Writes data/results/proof.json; the short ones run in ``make test``."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

from dspark import load_drafter, load_target
from dspark.bench.prompts import data_dir, load_prompts
from dspark.bench.provenance import cores, revision
from dspark.cli import run_main
from dspark.files import write_atomically
from dspark.schedule import PrefixScheduler
from dspark.tune.profile import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1]))  # where pytest finds these modules
from exact import draws, enumeration, greedy, planted, tables

SIGNIFICANCE = 0.01  # of all tests together
Result = dict[str, object]


def enumerate_everything(options: argparse.Namespace) -> Result:
    """Every branch of small models, of one request and of several served together."""
    cases = enumeration.few_cases() if options.short else enumeration.every_case()
    todo = [(case.policy + ", two requests" * (len(case.tokens) > 1), lambda case=case: enumeration.prove(case)) for case in cases]
    todo += [(f"{name}, tables", lambda p=p: tables.served_together(tables.PAIR, p)) for name, p in tables.PAIR_POLICIES.items()]
    by_policy: dict[str, Counter[str]] = {}
    largest = 0.0
    for name, prove in tqdm(todo, desc="enumeration", unit="case"):
        proof = prove()
        largest = max(largest, float(proof.difference))
        by_policy.setdefault(name, Counter()).update(cases=1, branches=proof.branches)
    total = sum(by_policy.values(), Counter())
    return {"holds": largest == 0, **total, "largest_difference": largest, "by_policy": {k: dict(v) for k, v in by_policy.items()}}


def appendix_a(options: argparse.Namespace) -> Result:
    """The counterexample: the first token's distribution under two schedules."""
    schedules = {"prefix scheduler": PrefixScheduler, "global argmax": tables.GlobalArgmax}
    first = {name: tables.first_tokens(policy(tables.APPENDIX_A_STEPS)) for name, policy in schedules.items()}
    first = {"target": tables.tenths(tables.APPENDIX_A.p_target, ()).tolist()} | first
    holds = first["target"] == first["prefix scheduler"] != first["global argmax"]
    return {"holds": holds, "first_token": {name: list(map(str, p)) for name, p in first.items()}}


def greedy_texts(options: argparse.Namespace) -> Result:
    """Greedy float32 texts of tiny models against model.generate."""
    prompts, sizes = (1, [3]) if options.short else (3, list(greedy.BLOCK_SIZES))
    ways: dict[str, Counter[str]] = {}
    todo = list(product(greedy.SITUATIONS, range(prompts)))
    for situation, i in tqdm(todo, desc="greedy", unit="prompt"):
        for name, counts in greedy.compared(situation, i, sizes):
            ways.setdefault(name, Counter()).update(counts)
    found = sum(ways.values(), Counter())
    about = {"prompts": len(todo), "block_sizes": sizes, "ways": {name: dict(c) for name, c in ways.items()}}
    return {"holds": found["equal"] == found["texts"], **found, **about}


def sampled(options: argparse.Namespace) -> Result:
    """Draws on the shipped model in float32, under every policy, against the target's distribution."""
    target = load_target("default", dtype="float32")
    drafter = load_drafter("default", target)
    tests = []
    worlds = [(domain, sampling) for domain in options.domains.split(",") for sampling in draws.SAMPLINGS]
    for seed, (domain, sampling) in enumerate(tqdm(worlds, desc="draws", unit="distribution")):
        item = load_prompts(domain, "dev", 1)[0]
        found = draws.every_policy(target, drafter, target.encode(item.messages), sampling, options.draws, seed)
        about = {"prompt": item.id, "temperature": sampling.temperature, "top_p": sampling.top_p, "n": options.draws}
        tests += [about | {"policy": name, "p_value": p} for name, p in found.items()]
    for test, adjusted in zip(tests, draws.holm([test["p_value"] for test in tests]), strict=True):
        test["p_adjusted"] = adjusted
    smallest = min(test["p_adjusted"] for test in tests)
    about = {"tokens": draws.TOKENS, "draws": options.draws * len(tests), "smallest_p_adjusted": smallest}
    return {"holds": smallest > SIGNIFICANCE, **about, "significance": SIGNIFICANCE, "target": target.name, "tests": tests}


def planted_bugs(options: argparse.Namespace) -> Result:
    """Every planted bug against the test that it names."""
    codes = planted.exit_codes(["clean", *planted.BUGS])
    bugs = [{"bug": n, "breaks": bug.breaks, "caught_by": bug.caught_by * (codes[n] == 1)} for n, bug in planted.BUGS.items()]
    caught = sum(bool(bug["caught_by"]) for bug in bugs)
    return {"holds": codes["clean"] == 0 and caught == len(bugs), "caught": caught, "of": len(bugs), "bugs": bugs}


PARTS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "enumeration": enumerate_everything,
    "appendix_a": appendix_a,
    "greedy": greedy_texts,
    "draws": sampled,
    "planted": planted_bugs,
}


def prove(options: argparse.Namespace) -> int:
    """Run the parts, one after another; each joins the file as it ends. Returns 1 if one of them does not hold."""
    held = []
    for name in options.parts or PARTS:
        start = time.monotonic()
        result = PARTS[name](options)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
        stamp = {"commit": revision(), "machine": cpu_name(), "cores": cores(), **versions, "seconds": round(time.monotonic() - start)}
        kept = json.loads(options.out.read_text()) if options.out.exists() else {}
        write_atomically(options.out, json.dumps(kept | {name: result | stamp}, indent=1, ensure_ascii=False).encode() + b"\n")
        shown = {key: value for key, value in result.items() if not isinstance(value, list | dict)}
        print(f"{name}: {shown}, {stamp['seconds']} s", flush=True)
        held.append(result["holds"])
    return 0 if all(held) else 1


def parser() -> argparse.ArgumentParser:
    parts = "; ".join(f"{name}: {part.__doc__}" for name, part in PARTS.items())
    made = argparse.ArgumentParser("python -m tests.exact", description=__doc__, epilog=parts)
    made.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part", help="default all of them")
    made.add_argument("--out", type=Path, default=data_dir() / "results" / "proof.json", help="default %(default)s")
    made.add_argument("--domains", default="math,chat,code", help="whose first dev prompt the draws answer; default %(default)s")
    made.add_argument("--draws", type=int, default=600, help="per prompt, sampling and policy; default %(default)s, some ten minutes")
    made.add_argument("--short", action="store_true", help="fewer cases and texts")
    return made


if __name__ == "__main__":
    sys.exit(run_main(parser(), prove, kept="finished parts"))
