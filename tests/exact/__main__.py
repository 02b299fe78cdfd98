"""``python -m tests.exact [PART ...]``: the long exactness checks. Writes data/results/proof.json; the short ones run in ``make test``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

from tqdm.auto import tqdm

from dspark import load_drafter, load_target
from dspark.bench.prompts import data_dir, load_prompts
from dspark.bench.provenance import machine, revision
from dspark.cli import run_main
from dspark.files import write_atomically
from dspark.schedule import PrefixScheduler

sys.path.insert(0, str(Path(__file__).parents[1]))  # where pytest finds these modules
from exact.draws import SAMPLINGS, TOKENS, p_values
from exact.enumeration import every_case, few_cases, prove
from exact.greedy import BLOCK_SIZES, SITUATIONS, compared
from exact.planted import BUGS, exit_code
from exact.tables import APPENDIX_A, APPENDIX_A_STEPS, PAIR, PAIR_POLICIES, GlobalArgmax, first_tokens, served_together, tenths

SIGNIFICANCE = 0.01  # of all tests together
Result = dict[str, object]


def enumeration(options: argparse.Namespace) -> Result:
    """Every branch of small models, of one request and of several served together."""
    cases = few_cases() if options.short else every_case()
    todo = [(case.policy + ", two requests" * (len(case.tokens) > 1), partial(prove, case)) for case in cases]
    todo += [(f"{name}, tables", partial(served_together, PAIR, policy)) for name, policy in PAIR_POLICIES.items()]
    by_policy, largest = defaultdict(Counter), 0.0
    for name, proved in tqdm(todo, desc="enumeration", unit="case"):
        proof = proved()
        largest = max(largest, float(proof.difference))
        by_policy[name].update(cases=1, branches=proof.branches)
    return {"holds": largest == 0, **sum(by_policy.values(), Counter()), "largest_difference": largest, "by_policy": by_policy}


def appendix_a(options: argparse.Namespace) -> Result:
    """The counterexample: the first token's distribution under two schedules."""
    first = {
        "target": tenths(APPENDIX_A.p_target, ()).tolist(),
        "prefix scheduler": first_tokens(PrefixScheduler(APPENDIX_A_STEPS)),
        "global argmax": first_tokens(GlobalArgmax(APPENDIX_A_STEPS)),
    }
    holds = first["target"] == first["prefix scheduler"] != first["global argmax"]
    return {"holds": holds, "first_token": {name: list(map(str, p)) for name, p in first.items()}}


def greedy(options: argparse.Namespace) -> Result:
    """Greedy float32 texts of tiny models against model.generate."""
    prompts, sizes = (1, [3]) if options.short else (3, list(BLOCK_SIZES))
    ways, todo = defaultdict(Counter), list(product(SITUATIONS, range(prompts)))
    for situation, i in tqdm(todo, desc="greedy", unit="prompt"):
        for name, counts in compared(situation, i, sizes):
            ways[name].update(counts)
    found = sum(ways.values(), Counter())
    return {"holds": found["equal"] == found["texts"], **found, "prompts": len(todo), "block_sizes": sizes, "ways": ways}


def draws(options: argparse.Namespace) -> Result:
    """Draws on the shipped model in float32, under every policy, against the target's distribution."""
    target = load_target("default", dtype="float32")
    drafter = load_drafter("default", target)
    tests, worlds = [], list(product(options.domains.split(","), SAMPLINGS))
    for seed, (domain, sampling) in enumerate(tqdm(worlds, desc="draws", unit="distribution")):
        item = load_prompts(domain, "dev", 1)[0]
        found = p_values(target, drafter, target.encode(item.messages), sampling, options.draws, seed)
        about = {"prompt": item.id, "temperature": sampling.temperature, "top_p": sampling.top_p, "n": options.draws}
        tests += [about | {"policy": name, "p_value": p} for name, p in found.items()]
    for test in tests:
        test["p_adjusted"] = min(1.0, len(tests) * test["p_value"])  # Bonferroni
    smallest = min(test["p_adjusted"] for test in tests)
    about = {"tokens": TOKENS, "draws": options.draws * len(tests), "smallest_p_adjusted": smallest}
    return {"holds": smallest > SIGNIFICANCE, **about, "significance": SIGNIFICANCE, "target": target.name, "tests": tests}


def planted(options: argparse.Namespace) -> Result:
    """Every planted bug against the test that it names."""
    codes = {name: exit_code(name) for name in tqdm(["clean", *BUGS], desc="planted", unit="bug")}
    bugs = [{"breaks": breaks, "caught_by": bug.caught_by * (codes[breaks] == 1)} for breaks, bug in BUGS.items()]
    caught = sum(bool(bug["caught_by"]) for bug in bugs)
    return {"holds": codes["clean"] == 0 and caught == len(bugs), "caught": caught, "of": len(bugs), "bugs": bugs}


PARTS: dict[str, Callable[[argparse.Namespace], Result]] = {f.__name__: f for f in (enumeration, appendix_a, greedy, draws, planted)}


def run(options: argparse.Namespace) -> int:
    """Run the parts, one after another; each joins the file as it ends. Returns 1 if one of them does not hold."""
    held = []
    for name in options.parts or PARTS:
        start = time.monotonic()
        result = PARTS[name](options)
        stamp = {"commit": revision(), **machine(), "seconds": round(time.monotonic() - start)}
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
    sys.exit(run_main(parser(), run, kept="finished parts"))
