"""Ended by SIGKILL, a training or a benchmark loses nothing that was finished, and ends as if nobody had killed it.

Both commands run on tiny random models. They are killed at random moments and, since such a moment seldom falls into a write, also in
the middle of one: by a limit on the size of files, whose signal ends a process as abruptly.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import letter_tokenizer, tiny_drafter, tiny_target
from tqdm import tqdm

from dspark import save_drafter
from dspark.bench.results import read_results
from dspark.train.corpus import Corpus, save_corpus

PRELOADED = ["test_killed", "dspark.bench.speed", "dspark.train.loop", "transformers.models.llama.modeling_llama"]
TIMED = ["prefill_seconds", "seconds", "latency_ms", "draft_ms", "verify_ms", "round_ms", "round_ms_p90"]
TIMED += ["utc"]  # the columns of a benchmark that no two runs share
TRAINING = "--corpus corpus.safetensors --steps 40 --sequences 2 --anchors 4 --checkpoint-every 3 --taps 0,1 --layers 1"
TRAINING += " --mask-token 3 --block-size 3 --markov-rank 4 --draft-vocab 60"
BENCH = "--drafter drafter --arms plain,fixed:3,adaptive+copy --domains chat --threads 1 --prompts 4 --tokens 8 --temperature 1.0"


class Job(NamedTuple):
    """A command that resumes.

    command: run in the models' folder; {out} stands for its results.
    written: its largest file.
    finished: in the results' folder, what must never be lost, in order.
    result: what must not depend on kills.
    """

    command: str
    written: str
    finished: Callable[[Path], list[object]]
    result: Callable[[Path], object]


def run(job: Job, out: Path, seconds: float = 200.0, file_limit: int | None = None) -> int:
    """Start in ``out``'s parent, kill after so many seconds; the exit code, negative if it was killed."""
    out.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # the heavy imports once, then a fork per start
    process = context.Process(target=command, args=(job.command.format(out=out.name).split(), out, file_limit), daemon=True)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def command(arguments: list[str], out: Path, file_limit: int | None) -> None:
    """What ``python -m`` does, its output in a file."""
    os.chdir(out.parent)
    with open(out.with_suffix(".txt"), "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared between processes and would outlive this one
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would make an error of it
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def checkpoint(out: Path) -> Path:
    return out / "drafter.training" / "checkpoint.safetensors"


def steps_kept(out: Path) -> list[object]:
    if not checkpoint(out).exists():
        return []
    with safe_open(checkpoint(out), "pt") as file:
        return list(range(json.loads(file.metadata()["about"])["step"]))


def weights(out: Path) -> dict[str, list[float]]:
    files = (load_file(file) for file in (out / "drafter" / "model.safetensors", checkpoint(out)))
    return {f"{i} {name}": tensor.tolist() for i, file in enumerate(files) for name, tensor in file.items()}


def rows_kept(out: Path) -> list[object]:
    """(prompt, repeat, arm, its time) of every measured row: a row that was measured again has another time."""
    partial = out / "speed.parquet.partial.jsonl"
    if (out / "speed.parquet").exists():
        rows = read_results(out / "speed.parquet").to_dict("records")
    else:
        content = partial.read_bytes() if partial.exists() else b""
        rows = [row for line in content[: content.rfind(b"\n") + 1].splitlines()[1:] for row in json.loads(line)["rows"]]
    return [(row["prompt_id"], row["repeat"], row["arm"], row["seconds"]) for row in rows]


def untimed_rows(out: Path) -> str:
    frame = read_results(out / "speed.parquet").drop(columns=TIMED, errors="ignore")
    frame = frame.sort_values(["prompt_id", "repeat", "arm"], ignore_index=True)
    assert not frame.duplicated(["prompt_id", "repeat", "arm"]).any()
    return frame.map(lambda value: value.tolist() if isinstance(value, np.ndarray) else value).to_json()


ON_TINY_MODELS = "--target target --dtype float32"
TRAIN = f"dspark.train drafter {ON_TINY_MODELS} {TRAINING} --out {{out}}/drafter --features {{out}}/features"
JOBS = {
    "training": Job(TRAIN, "drafter.training/checkpoint.safetensors", steps_kept, weights),
    "benchmark": Job(f"dspark.bench speed {ON_TINY_MODELS} {BENCH} --out {{out}}/speed.parquet", "speed.parquet", rows_kept, untimed_rows),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    target = tiny_target(num_hidden_layers=3)
    target.model.save_pretrained(folder / "target")
    letter_tokenizer().save_pretrained(folder / "target")
    save_drafter(tiny_drafter(target, block_size=3, target_layer_ids=(0, 1), markov_rank=4), target, folder / "drafter")
    assistant = torch.zeros(130, 24, dtype=torch.bool)
    assistant[:, 4:] = True
    ids = torch.randint(4, 100, assistant.shape, generator=torch.Generator().manual_seed(0))
    save_corpus(Corpus(ids, assistant, torch.ones(len(ids))), folder / "corpus.safetensors")
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_a_killed_job_loses_nothing_finished_and_ends_as_if_undisturbed(name: str, models: Path) -> None:
    job, dice = JOBS[name], random.Random(name)
    first, whole, out = (models / f"{name}-{what}" for what in ("first", "whole", "killed"))
    assert run(job, first) == 0, first.with_suffix(".txt").read_text()  # this start pays for the imports
    start = time.monotonic()
    assert run(job, whole) == 0
    seconds, largest = time.monotonic() - start, (whole / job.written).stat().st_size
    assert job.result(whole) == job.result(first)  # deterministic, so there is something to compare with

    kept, kills = [], 0
    for cause in ("moment", "write", "moment", "write", "moment"):
        limit = dice.randrange(largest // 8, largest) if cause == "write" else None
        code = run(job, out, 200.0 if limit else (0.3 + 0.5 * dice.random()) * seconds, limit)
        kills += code < 0
        finished = job.finished(out)
        assert finished[: len(kept)] == kept
        kept = finished
        if code >= 0:
            break
    assert kills > 1
    assert run(job, out) == 0, out.with_suffix(".txt").read_text()
    assert job.finished(out)[: len(kept)] == kept
    assert job.result(out) == job.result(whole)
