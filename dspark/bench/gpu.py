"""``python -m dspark.bench gpu --minutes 8``: everything that has to be measured on a GPU, in one command.

Each part is a process of its own with its share of the time. It keeps what it has measured, and the same command resumes there.
``--rehearse`` runs every line but the capture itself at toy size on a CPU.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dspark.bench.arms import Models, lean_of
from dspark.bench.load import LoadPlan, closed, measure_load
from dspark.bench.plan import Plan
from dspark.bench.provenance import utc
from dspark.bench.results import Ledger, Row, rows_so_far
from dspark.bench.speed import check_identity, measure_memory, measure_speed
from dspark.bench.stats import TABLES
from dspark.cli import add_fields, from_fields, run_main
from dspark.draft.backbone import DrafterConfig
from dspark.draft.drafter import Drafter
from dspark.files import one_line
from dspark.load import DTYPES
from dspark.target.target import Target
from dspark.tune.profile import CONTEXT, pass_times
from dspark.verify.static import static_pass

OPTIONS = ("target", "drafter", "device", "dtype")  # of dspark.bench that this command has
ARMS = "eager,plain,fixed,prefix,fixed+copy,prefix+copy"
BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens in a pass
EACH = 8  # tokens of a user in the wide passes
USERS = "1,2,4,8,16,32,64,128,256,512"
TOY = {"prompts": 1, "tokens": 8, "threads": 1}  # of a rehearsal
TOY_BUDGETS, TOY_USERS = (1, 4, 32), "1,3"
GRACE = 60.0  # seconds in which a part whose time is over may end its step


class Part(NamedTuple):
    share: float  # of the time
    measure: Callable[[Plan, Path], object]  # from a plan into a file
    differs: dict[str, object]  # how this plan differs from the command's


def measure_steps(plan: Plan, out: Path) -> pd.DataFrame:
    """Seconds of a pass over B tokens, graphed and eager: of one request as far as that goes, then of many with ``EACH`` tokens."""
    models = plan.load()
    target, constant = models.target, plan.provenance(models)
    passes = {"graphed": target.verifier, "eager": lean_of(target)}

    def measure(budget: int) -> list[Row]:
        shape = (1 if budget <= 2 * EACH else budget // EACH, budget, min(CONTEXT, target.max_context // 2))
        seconds = {name: pass_times(target, [shape], repeats=15, run=run)[shape] for name, run in passes.items()}
        about = constant | {"tokens": budget, "requests": shape[0], "utc": utc()}
        return [about | {"pass": name, "seconds": each} for name, each in seconds.items()]

    ledger = Ledger(out, plan.configuration("gpu-sps", target.digest, models.drafter))
    return ledger.run({str(budget): budget for budget in (TOY_BUDGETS if isinstance(plan, ToyPlan) else BUDGETS)}, measure)


def measure_users(plan: Plan, out: Path) -> pd.DataFrame:
    """The closed loops of ``python -m dspark.bench load``, each user with two requests."""
    load = LoadPlan(**asdict(plan), users=TOY_USERS if isinstance(plan, ToyPlan) else USERS, rates="", per_user=2)
    return measure_load(load, plan.load(), out)


PARTS = {  # in the order of running
    "equality": Part(0.15, lambda plan, out: check_identity(plan, plan.load(stock=True), out), {"dtype": "float32", "tokens": 64}),
    "speed": Part(0.35, lambda plan, out: measure_speed(plan, plan.load(), out), {"arms": ARMS}),
    "sps": Part(0.12, measure_steps, {}),
    "requests": Part(0.3, measure_users, {"tokens": 64}),
    "memory": Part(0.08, measure_memory, {}),
}


class ToyPlan(Plan):
    """Random models of a few thousand weights instead of the plan's, and prompts of a few letters."""

    def load(self, stock: bool = False) -> Models:
        shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LlamaConfig(num_hidden_layers=3, max_position_embeddings=512, initializer_range=0.3, eos_token_id=None, **shape)
            target = ToyTarget(LlamaForCausalLM(config).to(DTYPES[self.dtype]), None, "toy")
            config = DrafterConfig(**shape, num_hidden_layers=1, head_dim=8, target_layer_ids=(0, 1), mask_token_id=3, block_size=3)
            drafter = Drafter(config)
        target.verifier = static_pass(target)
        return Models(target, drafter.to(target.dtype).attach(target).eval().requires_grad_(False), stock=target)


class ToyTarget(Target):
    def _apply_template(self, messages: list[dict[str, str]], _: object) -> list[int]:
        return [5 + ord(letter) % 50 for letter in messages[0]["content"][:24]]


def run_part(plan: Plan, part: str, folder: Path) -> None:
    """One part, in the process that calls this. Ends it with a line on stderr and status 1 if the part stops early."""
    differs = PARTS[part].differs | (TOY if isinstance(plan, ToyPlan) else {})
    try:
        PARTS[part].measure(replace(plan, **differs), folder / f"gpu-{part}.parquet")
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        sys.exit(f"dspark.bench gpu: {part} stopped ({one_line(error)}); what it has measured is kept")


def measure(plan: Plan, minutes: float, folder: Path, run: Callable[..., None] = run_part) -> dict[str, pd.DataFrame]:
    """All parts, one after another, each with its share of the time that is left. Returns part → its rows so far."""
    ends, left = time.monotonic() + 60 * minutes, sum(part.share for part in PARTS.values())
    for name, part in PARTS.items():
        process = get_context("spawn").Process(target=run, args=(plan, name, folder))
        process.start()
        process.join(max(ends - time.monotonic(), 1.0) * part.share / left)
        for stop in (partial(os.kill, process.pid, signal.SIGINT), process.kill):
            if process.is_alive():
                stop()
                process.join(GRACE)
        left -= part.share
    return {name: rows_so_far(folder / f"gpu-{name}.parquet") for name in PARTS}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`. Also returns 1 if a part is incomplete or texts differ."""
    parser = argparse.ArgumentParser(prog="python -m dspark.bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything; default %(default)s")
    add_fields(parser, Plan, [name for name in Plan.__dataclass_fields__ if name not in OPTIONS], device="cuda")
    parser.add_argument("--rehearse", action="store_true", help="toy models on the CPU: is every line in order?")
    parser.add_argument("--out", type=Path, default=Path("runs") / "bench" / "gpu", help="folder of the parts' files; default %(default)s")
    return run_main(parser, _run, arguments, kept="finished rows")


def _run(options: argparse.Namespace) -> int:
    if not options.minutes > 0:
        raise ValueError(f"minutes must be positive, got {options.minutes}")
    if options.rehearse:
        options.device = "cpu"
    elif not (options.device.startswith("cuda") and torch.cuda.is_available()):
        found = f"device {options.device!r} is no GPU that PyTorch can use here"
        raise ValueError(f"{found}: --rehearse runs everything at toy size on the CPU")
    plan = from_fields(ToyPlan if options.rehearse else Plan, options, arms="plain,fixed,prefix", prompts=8, tokens=128)
    found = measure(plan, options.minutes, options.out)
    complete = {name: (options.out / f"gpu-{name}.parquet").exists() for name in PARTS}
    for name, frame in found.items():
        print(f"{name:9} {len(frame):4} rows, {'complete' if complete[name] else 'incomplete: the same command resumes there'}")
    if complete["speed"]:
        print(TABLES["speed"](found["speed"], "plain"))
    if complete["requests"]:
        print(f"{closed(found['requests']).round(0).to_string()}\ntokens per second in all, by number of users")
    return int(not all(complete.values()) or not found["equality"]["equal"].all())
