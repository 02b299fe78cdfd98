"""Drafters trained alike and measured alike: what does each part of the design buy? (The twin of the paper's Table 1 and Figs. 2–4.)

One corpus, one step budget, the same taps, the same batches in the same order, the same draft vocabulary; only what a variant
names differs. Everything resumes: a finished drafter is not trained again, a finished measurement not repeated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dspark.bench.arms import Models
from dspark.bench.plan import Plan, rotated
from dspark.bench.provenance import drafter_columns, environment
from dspark.bench.results import SCHEMA_VERSION, Ledger, read_results, write_results
from dspark.bench.speed import measure_speed
from dspark.draft.drafter import Drafter
from dspark.formats.checkpoint import CONFIG, save_drafter
from dspark.load import load_drafter
from dspark.target.target import Target
from dspark.train.corpus import load_corpus
from dspark.train.features import FeatureStore
from dspark.train.loop import Trainer
from dspark.train.run import train_to
from dspark.train.variants import VARIANTS, Recipe, Variant
from dspark.verify.sampling import Chance, Sampling

log = logging.getLogger(__name__)


def train_all(target: Target, variants: Sequence[Variant], recipe: Recipe, corpus_path: Path, out: Path, features: Path | None) -> None:
    """Train what is not finished, in the order given, each into its folder ``out/name``. ``target``: not packed.

    Raises ValueError for a folder that holds a drafter of another recipe, corpus or target.
    """
    whole = load_corpus(corpus_path)
    corpus, d2t = recipe.text(whole), recipe.vocabulary(whole, target)
    wanted = {"recipe": asdict(recipe), "corpus": {"rows": len(whole), "sha256": _sha(corpus_path)}}
    for variant in variants:
        folder = out / variant.name
        if not _finished(folder, wanted, target):
            drafter = recipe.start(variant, target, d2t)
            store = FeatureStore(target, corpus, drafter.target_layer_ids, features)
            trainer = Trainer(target, drafter, store, recipe.config(), folder.with_name(folder.name + ".training"))
            train_to(trainer, folder, validate_every=max(1, recipe.steps // 10), about={"variant": variant.name} | wanted)


def _finished(folder: Path, wanted: dict[str, object], target: Target) -> bool:
    if not (folder / CONFIG).is_file():
        return False
    held = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    training = held.get("training", {})
    if held.get("target_digest") != target.digest or any(training.get(name) != value for name, value in wanted.items()):
        raise ValueError(f"{folder} holds a drafter of another target, recipe or corpus: choose another --out, or delete it")
    return True


def trained_rows(folder: Path, out: Path) -> pd.DataFrame:
    """One row per finished drafter in ``folder``, from what its config.json tells: shape, steps, held-out loss, τ and acceptance
    by position. Written to ``out`` anew each time, as nothing is measured here; rows that ``out`` has of other drafters stay, as their
    weights need not be kept. Raises ValueError if no drafter is finished, or ``out`` holds something else or drafters of another target,
    corpus, recipe or schema version."""
    rows = []
    for name, variant in VARIANTS.items():
        if not (folder / name / CONFIG).is_file():
            continue
        held = json.loads((folder / name / CONFIG).read_text(encoding="utf-8"))
        training = held["training"]
        shape = {f.name: getattr(variant, f.name) for f in fields(Variant) if f.name not in ("name", "kind", "rank")}
        shape |= {"drafter": name, "architecture": held["architectures"][0], "rank": held["markov_rank"]}
        told = {key: training[key] for key in ("steps", "seconds", "corpus_rows", "response_tokens", "revision", "machine", "threads")}
        told |= {f"held_out_{key}": training["held_out"][key] for key in ("loss", "tau", "acceptance")}
        told |= {"corpus_sha256": training["corpus"]["sha256"], "schema_version": SCHEMA_VERSION}
        rows.append(shape | told | {"recipe": json.dumps(training["recipe"]), "target_digest": held["target_digest"]})
    if not rows:
        raise ValueError(f"no finished drafter in {folder}: train them first, with --stages train")
    frame = pd.DataFrame(rows)
    if out.is_file():
        frame = _with_others(frame, out)
    write_results(frame, out)
    return frame


def _with_others(frame: pd.DataFrame, out: Path) -> pd.DataFrame:
    """``frame`` and what ``out`` has of drafters that were trained like these, in the order of VARIANTS."""
    earlier = _alike(out, frame.iloc[0])
    others = earlier[earlier["drafter"].isin(VARIANTS.keys() - set(frame["drafter"]))]
    return pd.concat([frame, others]).sort_values("drafter", key=lambda names: names.map(list(VARIANTS).index), ignore_index=True)


def check_records(out: Path, target: Target, recipe: Recipe, corpus_path: Path) -> None:
    """Raises ValueError, before anything is trained, where :func:`trained_rows` could not add to what ``out`` holds."""
    if out.is_file():
        wanted = {"target_digest": target.digest, "corpus_sha256": _sha(corpus_path), "recipe": json.dumps(asdict(recipe))}
        _alike(out, wanted | {"schema_version": SCHEMA_VERSION})


def _alike(out: Path, wanted: Mapping[str, object]) -> pd.DataFrame:
    """The records in ``out``. Raises ValueError unless all of them are of this target, corpus, recipe and schema version."""
    earlier, names = read_results(out), ["target_digest", "corpus_sha256", "recipe"]
    if missing := {"drafter", *names} - set(earlier):
        raise ValueError(f"{out} holds no training records (no column {min(missing)!r}): delete it, or choose another --results")
    if "schema_version" not in earlier:
        raise ValueError(f"{out} was written before rows said their schema version: choose another --results, or delete it")
    if other := next((name for name in [*names, "schema_version"] if (earlier[name] != wanted[name]).any()), None):
        raise ValueError(f"{out} holds drafters of another {other}: choose another --results, or delete it")
    return earlier


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def decode_all(target: Target, folders: dict[str, Path], results: Path, plan: Plan) -> None:
    """Real decoding by the plan, one results file per drafter."""
    for name, folder in folders.items():
        log.info("decoding with %s", name)
        measure_speed(
            replace(plan, drafter=str(folder)),
            Models(target, load_drafter(folder, target)),
            results / f"drafters-t{plan.temperature:g}-{name}.parquet",
        )


# ---- what drafting costs


def to_time(
    target: Target, bare: Target, variants: Sequence[Variant], recipe: Recipe, corpus_path: Path, folder: Path
) -> dict[str, tuple[Drafter, bool]]:
    """Each drafter, and whether it was trained: finished ones from ``folder``, the others as their training would start, since what
    a block costs depends on shapes and not on weights. bare: the same target, not packed."""
    found: dict[str, tuple[Drafter, bool]] = {}
    d2t = recipe.vocabulary(load_corpus(corpus_path), target)
    with TemporaryDirectory() as fresh:
        for variant in variants:
            trained = (folder / variant.name / CONFIG).is_file()
            if not trained:
                save_drafter(recipe.start(variant, bare, d2t), bare, Path(fresh) / variant.name)
            found[variant.name] = load_drafter((folder if trained else Path(fresh)) / variant.name, target), trained
    return found


def time_all(target: Target, drafters: dict[str, tuple[Drafter, bool]], out: Path, context: int = 256, repeats: int = 15) -> pd.DataFrame:
    """One row per drafter and repeat, in ``out`` and returned; the drafters take turns, so a slow spell falls on all of them.

    draft_ms: one block behind ``context`` tokens · head_ms: the sequential head's part of it · verify_ms: the target's pass over
    the block and its anchor, at the same place. Medians of five, milliseconds.
    """
    place = environment(target) | {"context": context}
    about = {name: {"drafter": name, "trained": trained} | drafter_columns(d) | place for name, (d, trained) in drafters.items()}
    told = {name: columns["drafter_digest"] for name, columns in about.items()}
    ledger = Ledger(out, {"mode": "drafters-time", "drafters": told, "repeats": repeats} | place)
    if not ledger.complete:
        text = torch.randint(target.vocab_size, (1, context), generator=torch.Generator().manual_seed(0)).tolist()[0]
        for repeat in tqdm(range(repeats), desc="timing", unit="repeat"):
            if str(repeat) not in ledger.done:
                times = {name: _times(target, drafters[name][0], text) for name in rotated(list(drafters), repeat)}
                ledger.add(str(repeat), [about[name] | {"repeat": repeat} | columns for name, columns in times.items()])
    return ledger.finish()


def _times(target: Target, drafter: Drafter, text: list[int]) -> dict[str, float]:
    block, cache, state = drafter.block_size, target.new_cache(), drafter.new_state(text)
    _, taps = target.forward(torch.tensor([text], device=target.device), cache, drafter.target_layer_ids)
    drafter.extend(state, text, taps)
    anchor = text[-1]
    ids = torch.full((1, block + 1), anchor, device=target.device)

    def verify() -> None:
        target.forward(ids, cache, drafter.target_layer_ids)
        cache.rewind(len(text))

    draft = partial(drafter.draft, state, anchor, block, Sampling(1.0), Chance(torch.Generator(target.device).manual_seed(0)))
    head = partial(_run_head, drafter, torch.zeros(block, drafter.config.hidden_size, dtype=target.dtype, device=target.device))
    return {"draft_ms": _median_ms(draft, target), "head_ms": _median_ms(head, target), "verify_ms": _median_ms(verify, target)}


@torch.inference_mode()
def _run_head(drafter: Drafter, hidden: Tensor) -> None:
    """What :meth:`dspark.draft.drafter.Drafter.draft` does because there is a sequential head, and nothing else."""
    if (head := drafter.markov_head) is None:
        return
    logits, state = torch.zeros(len(drafter.d2t), device=hidden.device), None
    for row in hidden:
        latent, state = head.step(row, head.markov_w1.weight[0], state)
        logits = logits + head.markov_w2(latent)


def _median_ms(call: Callable[[], object], target: Target, times: int = 5) -> float:
    call()  # the first one pays for memory
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds)
