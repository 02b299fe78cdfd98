"""One training run from its first step to a drafter on disk: progress, a log line a step, held-out numbers on the way."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dspark.bench.provenance import revision
from dspark.formats.checkpoint import save_drafter
from dspark.train.loop import Trainer
from dspark.tune.profile import cpu_name, device_name


def train_to(trainer: Trainer, out: Path, *, validate_every: int, about: dict[str, object]) -> None:
    """Train to the end and save the drafter in ``out``. Goes on from the trainer's checkpoint; its folder keeps ``log.jsonl``.

    about: what config.json shall tell beside steps, seconds (of this process, and of those before it) and held-out numbers.
    """
    start, before = time.time(), _seconds_before(trainer)
    bar = tqdm(total=trainer.config.steps, initial=trainer.step, unit="step", desc=out.name)
    # Closing the stream saves as well, when Ctrl-C comes here.
    with (trainer.folder / "log.jsonl").open("a") as log, bar, contextlib.closing(trainer.run()) as records:
        for record in records:
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.3f}", tau=f"{record['tau']:.2f}", acceptance=record["acceptance"])
            if record["step"] % validate_every == 0 or record["step"] == trainer.config.steps:
                record |= {"held_out": trainer.validate()}
            log.write(json.dumps(record | {"seconds": round(before + time.time() - start, 1)}) + "\n")
            log.flush()
    corpus = trainer.store.corpus
    summary = {
        "steps": trainer.step,
        **about,
        "corpus_rows": len(corpus),
        "response_tokens": int(corpus.assistant.sum()),
        "seconds": round(before + time.time() - start),
        "held_out": trainer.validate(),
        "revision": revision(),
        "machine": cpu_name() if trainer.target.device.type == "cpu" else device_name(trainer.target.device),
        "threads": torch.get_num_threads(),
    }
    save_drafter(trainer.drafter, trainer.target, out, training=summary)


def _seconds_before(trainer: Trainer) -> float:
    """What earlier processes spent on the steps that the checkpoint holds; lines of steps that were lost do not count."""
    path, spent = trainer.folder / "log.jsonl", 0.0
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):  # a line that a kill cut
            record = json.loads(line)
            if record["step"] <= trainer.step:
                spent = record.get("seconds", 0.0)
    return spent
