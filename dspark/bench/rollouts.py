"""``python -m dspark.bench.rollouts``: draft whole blocks on the dev prompts, see what survives, and calibrate the confidence.

One half of the dev prompts is fitted, the other half judges; the test prompts are never used.
"""

import argparse
import copy
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dspark.bench.arms import Models
from dspark.bench.plan import Plan, Unit, add_options, plan_of
from dspark.bench.provenance import utc
from dspark.bench.results import Ledger, Row
from dspark.cli import run_main
from dspark.decode import generate
from dspark.draft.source import NOTHING, Ask, Draft, DraftSource
from dspark.formats.checkpoint import CONFIG
from dspark.formats.native import save_drafter
from dspark.load import default_drafter, load_drafter
from dspark.schedule import FixedWindow
from dspark.target.target import Target
from dspark.tune.calibrate import Calibration, Rollouts, calibrate, calibration_report, ranking_together, rollouts
from dspark.verify.passes import pass_of
from dspark.verify.sampling import Sampling

COMMAND = "python -m dspark.bench.rollouts"
TEMPERATURES, FITTED = (0.0, 1.0), 1.0
FIT, JUDGE = "fit", "judge"
TYPES = {"logits": "float32", "acceptance": "float32", "checked": "int32", "survived": "int32"}  # columns of lists


def measure_rollouts(plan: Plan, models: Models, out: Path, fit_repeats: int | None = None) -> pd.DataFrame:
    """One row per run of a prompt. Resumes.

    logits, acceptance: γ numbers a block, concatenated: the logit of c_k as the head gives it, and the probability with which x_k
        survives given x_<k (NaN where it was not checked).
    checked, survived: one number a block, how many drafts were checked and how many survived.
    Repeats are new draws, so greedy runs are made once. fit_repeats: fewer repeats for the half that is fitted; the more blocks judge,
    the less depends on luck. Raises ValueError for a drafter without a confidence head.
    """
    drafter, target = models.drafter, models.target
    if not drafter.has_confidence:
        raise ValueError("the drafter has no confidence head, so there is nothing to calibrate: train one with it")
    drafter.sts_temperatures = ()  # the head's own logits are wanted
    most = {FIT: fit_repeats or plan.repeats, JUDGE: plan.repeats}
    about = plan.configuration("rollouts", target.digest, drafter) | {"temperatures": list(TEMPERATURES), "fit_repeats": most[FIT]}
    constant, turns = plan.provenance(models), defaultdict(lambda: cycle((FIT, JUDGE)))  # every other prompt of each domain
    halves = {unit.item.id: next(turns[unit.item.domain]) for unit in plan.units if unit.repeat == 0}

    def measure(run: tuple[float, Unit]) -> list[Row]:
        t, unit = run
        watched, source, acceptances = observed(target, drafter, Sampling(t))
        options = {"max_new_tokens": plan.tokens, "temperature": t, "seed": unit.seed}
        stream = generate(watched, source, unit.item.messages, policy=FixedWindow(), **options).rounds
        try:
            data = rollouts(stream[1:], drafter.block_size, acceptances=acceptances[1:])
            # Three digits take half the space of seven, and no number of blocks here could distinguish more.
            lists = {name: getattr(data, name).half().flatten().tolist() for name in ("logits", "acceptance")}
            lists |= {name: getattr(data, name).sum(-1).tolist() for name in ("checked", "survived")}
        except ValueError:  # the text ended before a block could be checked
            lists = {name: [] for name in TYPES}
        row = unit.columns() | {"temperature": t, "half": halves[unit.item.id], "max_new_tokens": plan.tokens}
        return [row | {"blocks": len(lists["checked"])} | lists | {"utc": utc()} | constant]

    units = ((t, unit) for t in TEMPERATURES for unit in plan.units if unit.repeat < (most[halves[unit.item.id]] if t else 1))
    runs = {f"{t:g}/{unit.key}": (t, unit) for t, unit in units}
    return Ledger(out, about).run(runs, measure, TYPES)


def observed(target: Target, drafter: DraftSource, sampling: Sampling) -> tuple[Target, DraftSource, list[list[float]]]:
    """Copies of a target and a drafter that decode as the originals do, and a list that fills while they do: per target pass, the
    prefill first, Σ min(p_d, p_t) of each checked draft, the probability that x_k survives given x_<k, which c_k estimates."""
    watched, source, run, last, acceptances = copy.copy(target), copy.copy(drafter), pass_of(target), NOTHING, []

    class Observed:
        name, bytes_per_token, new_cache = run.name, run.bytes_per_token, run.new_cache

        def __call__(self, *arguments: object, **options: object) -> tuple[list[Tensor], list[Tensor | None]]:
            (logits,), taps = run(*arguments, **options)
            pairs = zip(last.probs, sampling.probs(logits[:-1]), strict=False) if len(logits) > 1 else ()
            acceptances.append([float(1 - (p_target - p_draft).clip(0).sum()) for p_draft, p_target in pairs])
            return [logits], taps

    def propose(asks: Sequence[Ask]) -> list[Draft]:
        nonlocal last
        (last,) = drafter.propose(asks)
        return [last]

    watched.verifier, source.propose = Observed(), propose
    return watched, source, acceptances


def rollouts_of(frame: pd.DataFrame, **chosen: object) -> Rollouts:
    """The blocks of the rows whose columns hold the chosen values (half, temperature, domain, …). Raises ValueError if there are none."""
    for name, value in chosen.items():
        frame = frame[frame[name] == value]
    frame = frame[frame["blocks"] > 0]
    if frame.empty:
        raise ValueError(f"no blocks with {chosen}: roll out more prompts with {COMMAND}")
    blocks = int(frame["blocks"].sum())
    values = {name: torch.from_numpy(np.concatenate(frame[name].to_list())).reshape(blocks, -1) for name in TYPES}
    position = torch.arange(values["logits"].shape[1])
    return Rollouts(values["logits"], position < values["survived"], position < values["checked"], values["acceptance"])


def judged(frame: pd.DataFrame, calibration: Calibration, report: Callable[..., list[Row]] = calibration_report) -> pd.DataFrame:
    """Confidence before and after calibration, on the half that was not fitted: one row per sampling temperature and position."""
    data = {t: rollouts_of(frame, half=JUDGE, temperature=t) for t in sorted(set(frame["temperature"]))}
    return pd.DataFrame([{"temperature": t} | row for t, part in data.items() for row in report(part, calibration)])


def ranked(frame: pd.DataFrame, calibration: Calibration) -> pd.DataFrame:
    """How the confidence ranks the drafts of all positions together, on that half: one row per temperature."""
    return judged(frame, calibration, lambda data, calibration: [ranking_together(data, calibration)])


def store(calibration: Calibration, name: str, target: Target) -> Path:
    """Add the offset to the bias of the drafter's confidence head and write the temperatures into its config; all else stays.
    Returns the folder. Raises ValueError if it does not exist."""
    folder = default_drafter() if name == "default" else Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"no drafter folder at {folder}: a calibration can only be stored in a folder, so download the drafter first")
    drafter = load_drafter(folder, target)
    drafter.confidence_head.proj.bias += calibration.offset
    drafter.sts_temperatures = calibration.temperatures
    training = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("training")
    save_drafter(drafter, target, folder, training=training)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ("arms", "baseline", "split", "temperature", "top_p", "top_k"), prompts=16, repeats=3)
    parser.add_argument("--fit-repeats", type=int, help="repeats of the half that is fitted; default as many as of the one that judges")
    parser.add_argument("--store", action="store_true", help="write the calibration into the drafter's folder")
    return run_main(parser, _fit, arguments, kept="finished runs")


def _fit(options: argparse.Namespace) -> None:
    plan = plan_of(options, arms="fixed", baseline="fixed", split="dev")
    if options.fit_repeats is not None and not 1 <= options.fit_repeats <= plan.repeats:
        raise ValueError(f"fit-repeats must be 1 to {plan.repeats}, as many as repeats, got {options.fit_repeats}")
    torch.set_num_threads(plan.threads)
    models, out = plan.load(), options.out or plan.default_out("rollouts-dev")
    frame = measure_rollouts(plan, models, out, fit_repeats=options.fit_repeats)
    calibration = calibrate(rollouts_of(frame, half=FIT, temperature=FITTED))
    for table in (judged(frame, calibration), ranked(frame, calibration)):
        print(table.round(4).to_string(index=False))
    print(f"{calibration} · {len(frame)} runs in {out}")
    if options.store:
        print(f"stored in {store(calibration, plan.drafter, models.target)}")


if __name__ == "__main__":
    sys.exit(main())
