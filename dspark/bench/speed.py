"""What ``python -m dspark.bench`` measures of its arms: speed, peak memory, and whether the greedy text is ``model.generate``'s.

In float32 it must be. In bfloat16 two nearly tied tokens may swap, as one row and a block of rows run through kernels that round
differently: every divergence is weighed where it begins.
"""

import math
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from dspark.bench.arms import Models
from dspark.bench.measure import Decoder, Trial, by_transformers, first_divergence, summary
from dspark.bench.plan import Plan, Unit, rotated
from dspark.bench.provenance import peaks, utc
from dspark.bench.results import Ledger, Row
from dspark.rewind import Slot
from dspark.target.prompt import Prompt
from dspark.target.target import Target
from dspark.verify.passes import TargetPass, TransformersPass, pass_of


def measure_speed(plan: Plan, models: Models, out: Path) -> pd.DataFrame:
    """One row per prompt, arm and repeat, in ``out`` and returned. Resumes a killed run of the same plan.

    All arms run on every prompt, one after the other, and a different one starts each time.
    """
    plan.check("speed")
    ledger = Ledger(out, plan.configuration("speed", models.target.digest, models.drafter))
    if ledger.complete:
        return ledger.finish()
    target, constant = models.target, constant_columns(plan, models)
    decoders = {arm.name: models.decoder(arm, plan.settings) for arm in plan.parsed_arms}
    warm_up(plan, target, decoders)

    def measure(unit: Unit) -> list[Row]:
        ids = target.encode(unit.item.messages)
        trials = {name: decoders[name](ids, unit.seed) for name in rotated(list(decoders), unit.turn)}
        about, expected = unit.columns() | {"utc": utc()}, trials[plan.baseline].token_ids
        return [
            about | {"arm": name, "place": place, "equals_baseline": trial.token_ids == expected} | summary(trial) | constant[name]
            for place, (name, trial) in enumerate(trials.items())
        ]

    return ledger.run({unit.key: unit for unit in plan.units}, measure)


def warm_up(plan: Plan, target: Target, decoders: dict[str, Decoder]) -> None:
    """Each arm once on a prompt that is not measured: the first pass pays for memory and caches."""
    ids = target.encode(plan.warm_up_prompt().messages)
    for decoder in tqdm(decoders.values(), desc="warm-up", unit="arm", leave=False):
        decoder(ids, plan.seed)


def constant_columns(plan: Plan, models: Models) -> dict[str, Row]:
    """Name of an arm → columns that all its rows share."""
    chosen = {name: getattr(plan, name) for name in ("baseline", "split", "temperature", "top_p", "top_k", "seed", "repeats")}
    chosen |= {"prompt_set": plan.domains, "n": plan.prompts, "max_new_tokens": plan.tokens}
    trained, untrained = (plan.provenance(each) | chosen for each in (models, replace(models, drafter=None)))
    return {a.name: (trained if a.trained else untrained) | ({"pass": a.pass_name} if a.pass_name else {}) for a in plan.parsed_arms}


def in_new_process(function: Callable, *arguments: object) -> object:
    """``function(*arguments)``, run in a process of its own. Raises what it raises, or ValueError if the process was killed."""
    try:
        # Ctrl-C reaches the child as well, where Python's own handler would print a traceback.
        with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise ValueError("a measuring process was killed (out of memory?): free some memory and repeat") from None


def measure_memory(plan: Plan, out: Path) -> pd.DataFrame:
    """Peak memory: one row per arm and repeat. Resumes. A peak never falls, so each arm has a process of its own; and a child's count
    starts at its parent's peak, so the parent never loads a model."""
    names = [arm.name for arm in plan.parsed_arms]
    runs = {f"{repeat}/{name}": (repeat, name) for repeat in range(plan.repeats) for name in rotated(names, repeat)}
    ledger = Ledger(out, plan.configuration("memory", "", None))
    return ledger.run(runs, lambda run: [{"repeat": run[0]} | in_new_process(peak_of, replace(plan, arms=run[1], repeats=1))])


def peak_of(plan: Plan) -> Row:
    """Load the plan's one arm and decode all prompts."""
    (arm,) = plan.parsed_arms
    torch.set_num_threads(plan.threads)
    models = plan.load()
    target, decoder = models.target, models.decoder(arm, plan.settings)
    tokens = sum(len(decoder(target.encode(unit.item.messages), unit.seed).token_ids) for unit in plan.units)
    return {"arm": arm.name, "tokens": tokens} | peaks(target.device) | {"utc": utc()} | constant_columns(plan, models)[arm.name]


def check_identity(plan: Plan, models: Models, out: Path) -> pd.DataFrame:
    """Decode every prompt greedily with every arm and by ``model.generate`` of the stock target. One row per prompt and arm. Resumes.

    tokens: of the reference. equal: whether all are the reference's.
    first_divergence: index of the first new token that differs, −1 for none.
    margin, noise: see :func:`weigh`; NaN for none.
    """
    decoders = {arm: models.decoder(arm, plan.settings) for arm in plan.parsed_arms}
    reference, constant = by_transformers(models.stock, plan.settings), constant_columns(plan, models)

    def measure(unit: Unit) -> list[Row]:
        prompt, rows = models.target.encode(unit.item.messages), []
        expected = reference(prompt, 0).token_ids
        for arm, decoder in decoders.items():
            trial = decoder(prompt, 0)
            i = first_divergence(trial.token_ids, expected)
            ran = replace(models, target=models.stock) if arm.peer else models
            margin, noise = weigh(ran, prompt, expected, trial, i) if i >= 0 else (math.nan, math.nan)
            row = {"arm": arm.name, "tokens": len(expected), "equal": i < 0, "first_divergence": i, "margin": margin, "noise": noise}
            rows.append(unit.columns() | row | {"utc": utc()} | constant[arm.name])
        return rows

    ledger = Ledger(out, plan.configuration("identity", models.target.digest, models.drafter))
    return ledger.run({unit.key: unit for unit in plan.units}, measure)


def weigh(models: Models, prompt: list[int], expected: list[int], trial: Trial, i: int) -> tuple[float, float]:
    """How far apart two tokens are where the texts diverge, and how much of that rounding removes; both in logits, ≥ 0.

    The text up to new token i runs again: on the stock target as the reference ran, and on the arm's through the pass and in the widths
    of its rounds. Rounding swapped the tokens if and only if margin ≤ noise.
    margin: the first run's lead of the reference's token over the arm's; infinite where a text only ends earlier: rounding ends none.
    noise: by how much that lead is smaller in the second run, at most twice what rounding moves any logit. That is measured on the stock
        target with its own cache, between one pass and token by token, so a fault of our pass or cache cannot pass for rounding.
    """
    if i >= min(len(expected), len(trial.token_ids)):
        return math.inf, 0.0
    modules, verifier, text = TransformersPass(models.stock), pass_of(models.target), [*prompt, *expected[:i]]
    alone = logits_of(modules, DynamicCache(), prompt, (([token], 1) for token in expected), i)
    # Peers show no drafts: what they committed ran in one pass.
    passes = (([r.anchor, *(r.draft_tokens[: r.verify_length] or r.committed[:-1])], len(r.committed)) for r in trial.rounds)
    together = logits_of(verifier, (cache := verifier.new_cache()).open(), prompt, passes, i, cache)
    singly = logits_of(modules, DynamicCache(), text[:1], (([token], 1) for token in text[1:]), len(text) - 1)
    at_once = logits_of(modules, DynamicCache(), text, (), 0)
    lead, left = (float(row[expected[i]] - row[trial.token_ids[i]]) for row in (alone, together))
    return abs(lead), min(max(0.0, lead - left), 2 * float((singly - at_once).abs().max()))


def margin(target: Target, prompt: Prompt, tokens: list[int], i: int) -> float:
    """By how many logits the target prefers its best token to its second, for new token ``i`` of this text, decoded plainly."""
    verifier, passes = pass_of(target), (([token], 1) for token in tokens)
    cache = verifier.new_cache()
    best, second = logits_of(verifier, cache.open(), target.encode(prompt), passes, i, cache).topk(2).values.tolist()
    return best - second


def logits_of(
    verifier: TargetPass, slot: Slot, prompt: list[int], passes: Iterable[tuple[Sequence[int], int]], i: int, cache: object = None
) -> Tensor:
    """The logits [vocab] float32 that choose new token ``i`` after ``prompt``.

    slot: empty; of ``cache`` if the pass needs one.
    passes: the text as it runs: tokens of a pass, and how many of them stay in the slot.
    """
    [rows], _ = verifier([prompt], [slot], cache, last_only=True)
    first, held, passes = 0, len(prompt), iter(passes)  # rows[k] chooses new token first + k
    while i >= first + len(rows):
        tokens, kept = next(passes)
        first, held = first + len(rows), held + kept
        [rows], _ = verifier([tokens], [slot], cache)
        if kept < len(tokens):
            slot.rewind(held)
        rows = rows[:kept]
    return rows[i - first].float()
