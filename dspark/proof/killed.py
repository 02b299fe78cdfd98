"""Training and benchmarking, killed and resumed: nothing finished is lost, and the end equals that of a run that nobody killed.

Both commands run on tiny random models. They are ended by SIGKILL at random moments and, as such a moment seldom falls into a write,
now and then in the middle of one: by a limit on the size of files, whose signal ends a process as abruptly.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dspark.bench.provenance import cores, environment
from dspark.bench.results import Ledger, Row, read_results
from dspark.formats.native import save_drafter
from dspark.load import load_target
from dspark.proof.inputs import digest
from dspark.proof.workers import side_by_side
from dspark.target.target import Target
from dspark.train.corpus import Corpus, save_corpus
from dspark.train.start import drafter_for

SEED = 0
JOBS = {"training": "dspark.train", "benchmark": "dspark.bench"}
MOMENTS, WRITES, IN_SERIES = 30, 6, 6  # kills of each job, and how many of them follow one another in one process
LONGEST = 300  # seconds until a run that nobody kills counts as hanging
PREPARED = ["dspark.proof.killed", "dspark.bench.speed", "dspark.train.loop", "transformers.models.llama.modeling_llama"]
TIMED = ["prefill_seconds", "seconds", "latency_ms", "draft_ms", "verify_ms", "round_ms", "model_seconds", "other_share"]
TIMED += ["peak_rss_mib", "load_average", "utc"]  # the columns of a benchmark that no two runs share


@dataclass(frozen=True)
class Job:
    """A command that resumes. arguments: of its results' folder · finished: in that folder, what must never be lost, in order ·
    reached: how far it got, in its own count of steps · result: what must not depend on kills, once it ended · largest: bytes of
    the largest file that it writes piece by piece or whole."""

    name: str
    module: str
    arguments: Callable[[Path], list[str]]
    finished: Callable[[Path], list[object]]
    reached: Callable[[Path], int]
    result: Callable[[Path], str]
    largest: Callable[[Path], int]

    def start(self, folder: Path, file_limit: int | None = None) -> BaseProcess:
        """The command, in a process of its own. file_limit: bytes of a file at which the system ends it."""
        folder.mkdir(exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PREPARED)  # the heavy imports once, and a fork for every start
        arguments = (self.module, self.arguments(folder), str(self.said(folder)), file_limit)
        process = context.Process(target=_command, args=arguments, daemon=True)
        process.start()
        return process

    def said(self, folder: Path) -> Path:
        return folder.with_suffix(".txt")

    def complete(self, folder: Path) -> float:
        """Run to the end, in seconds. Raises ValueError if it does not end well."""
        process, start = self.start(folder), time.monotonic()
        process.join(LONGEST)
        self.check(process, folder)
        return time.monotonic() - start

    def check(self, process: BaseProcess, folder: Path) -> None:
        if process.exitcode != 0:
            process.kill()
            last = self.said(folder).read_text().strip().splitlines()[-1:] or ["it said nothing"]
            raise ValueError(f"{self.name} ended with {process.exitcode} and not with 0: {last[0]}")


def _command(module: str, arguments: list[str], said: str, file_limit: int | None) -> None:
    """What ``python -m module arguments`` does, its output in a file."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared between processes, and would outlive this one
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would make an error of it
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


# ---- the two jobs


def jobs(folder: Path) -> list[Job]:
    """Tiny models and a tiny corpus in ``folder``, and the commands that use them."""
    _write_models(folder)
    common = {"target": folder / "target", "dtype": "float32"}
    training = common | {"corpus": folder / "corpus.safetensors", "steps": 90, "sequences": 2, "anchors": 4, "checkpoint-every": 3}
    training |= {"taps": "0,1", "init-layers": "0", "mask-token": 3, "block-size": 3, "markov-rank": 4}
    training |= {"draft-vocab": 60, "validate-every": 1000}
    bench = common | {"drafter": folder / "drafter", "arms": "plain,fixed:3,adaptive+copy", "domains": "chat", "threads": 1}
    bench |= {"prompts": 6, "tokens": 8, "temperature": 1.0, "repeats": 2}
    return [
        Job(
            "training",
            JOBS["training"],
            lambda out: ["drafter", *_options(training | {"out": out / "drafter", "features": out / "features"})],
            _steps_kept,
            _step_reached,
            lambda out: _digest_of(out / "drafter" / "model.safetensors", _checkpoint(out)),
            lambda out: _checkpoint(out).stat().st_size,
        ),
        Job(
            "benchmark",
            JOBS["benchmark"],
            lambda out: ["speed", *_options(bench | {"out": out / "speed.parquet"})],
            _rows_kept,
            lambda out: len(_rows_kept(out)),
            _without_times,
            lambda out: len(read_results(out / "speed.parquet").to_json(orient="records")),  # about what the ledger takes
        ),
    ]


def _options(values: dict[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def _write_models(folder: Path) -> None:
    letters = {chr(32 + i): 5 + i for i in range(95)} | {"?!": 3}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?!").save_pretrained(folder / "target")
    shape = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        config = LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.4, eos_token_id=2)
        LlamaForCausalLM(config).save_pretrained(folder / "target")
    target = load_target(folder / "target", dtype="float32")
    drafter = drafter_for(target, block_size=3, target_layer_ids=(0, 1), markov_rank=4, mask_token_id=3, seed=SEED)
    save_drafter(drafter, target, folder / "drafter")
    assistant = torch.zeros(130, 24, dtype=torch.bool)
    assistant[:, 4:] = True
    ids = torch.randint(4, 100, assistant.shape, generator=torch.Generator().manual_seed(SEED))
    save_corpus(Corpus(ids, assistant, torch.ones(len(ids))), folder / "corpus.safetensors")


def _checkpoint(out: Path) -> Path:
    return out / "drafter.training" / "checkpoint.safetensors"


def _steps_kept(out: Path) -> list[object]:
    """1, 2, … up to the checkpoint's step."""
    if not _checkpoint(out).exists():
        return []
    with safe_open(_checkpoint(out), "pt") as file:
        return list(range(1, 1 + json.loads(file.metadata()["about"])["step"]))


def _step_reached(out: Path) -> int:
    log = out / "drafter.training" / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def _digest_of(*files: Path) -> str:
    """Of every tensor's name and bytes, in several files."""
    sha = hashlib.sha256()
    for file in files:
        for name, tensor in sorted(load_file(file).items()):
            sha.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _rows_kept(out: Path) -> list[object]:
    """(prompt, repeat, arm, its time) of every measured row: a row that was measured again has another time."""
    file = out / "speed.parquet"
    if file.exists():
        rows = read_results(file).to_dict("records")
    else:
        partial = file.with_name(file.name + ".partial.jsonl")
        content = partial.read_bytes() if partial.exists() else b""
        whole = content[: content.rfind(b"\n") + 1].splitlines()
        rows = [row for line in whole[1:] for row in json.loads(line)["rows"]]
    return [(row["prompt_id"], row["repeat"], row["arm"], row["seconds"]) for row in rows]


def _without_times(out: Path) -> str:
    frame = read_results(out / "speed.parquet").drop(columns=TIMED).sort_values(["prompt_id", "repeat", "arm"], ignore_index=True)
    if frame.duplicated(["prompt_id", "repeat", "arm"]).any():
        return "a row stands there twice"
    return frame.map(lambda value: value.tolist() if isinstance(value, np.ndarray) else value).to_json()


# ---- killing them


@dataclass(frozen=True)
class Whole:
    """The run that nobody killed."""

    seconds: float
    result: str
    largest: int


def killed_until_done(job: Job, whole: Whole, folder: Path, causes: list[str], dice: random.Random) -> list[Row]:
    """Start, kill and start again until the job ends, or until ``causes`` are used up, and then let it end. One row per kill."""
    rows: list[Row] = []
    kept, lost = [], False
    while causes:
        limit = dice.randrange(whole.largest // 8, whole.largest) if causes[0] == "write" else None
        deadline = LONGEST if limit else dice.random() * whole.seconds
        start = time.monotonic()
        process = job.start(folder, limit)
        process.join(deadline)
        process.kill()
        process.join()
        moment = time.monotonic() - start
        if process.exitcode >= 0:
            job.check(process, folder)
            break
        before, kept = kept, job.finished(folder)
        lost |= kept[: len(before)] != before
        rows.append({"cause": causes.pop(0), "moment": round(moment, 3), "killed_at_step": job.reached(folder)})
        rows[-1] |= {"finished_before": len(before), "finished_after": len(kept)}
    else:
        job.complete(folder)
    lost |= job.finished(folder)[: len(kept)] != kept
    equal = not lost and job.result(folder) == whole.result
    return [row | {"equal": equal} for row in rows]


@dataclass(frozen=True)
class Series:
    """Some kills of one job: as many runs of it as they take. scratch: a folder for all series."""

    scratch: Path
    job: str
    number: int
    causes: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.job}-{self.number}"

    def killed(self) -> list[Row]:
        job, whole, target = _laboratory(self.scratch / str(os.getpid()), self.job)
        dice, causes, rows, run = random.Random(f"{SEED}/{self.key}"), list(self.causes), [], 0
        while causes:
            found = killed_until_done(job, whole, self.scratch / f"{self.key}-{run}", causes, dice)
            about = {"job": self.job, "series": self.number, "run": run}
            rows += [about | row | environment(target) | {"threads": 1} for row in found]
            run += 1
        return rows


@cache
def _laboratory(folder: Path, name: str) -> tuple[Job, Whole, Target]:
    """A job, what it comes to if nobody kills it, and the target that it uses: once for every process."""
    folder.mkdir(exist_ok=True)
    (job,) = (job for job in jobs(folder) if job.name == name)
    return job, _undisturbed(job, folder), load_target(folder / "target", dtype="float32")


def run(out: Path, smoke: bool = False) -> pd.DataFrame:
    """One row per kill, in ``out`` and returned; goes on where it was itself killed.

    job: training or benchmark · series, run: those with the same numbers are kills of one run · cause: moment, or write for the
    middle of one · moment: seconds after the start · killed_at_step: steps taken, or rows measured · finished_before,
    finished_after: how many of them were safe on disk, at the start and after the kill · equal: nothing that was safe was lost, and
    the end of this run equals that of the one nobody killed, bit for bit. smoke: 3 moments and 1 write of each.
    """
    causes = ["moment"] * (3 if smoke else MOMENTS) + ["write"] * (1 if smoke else WRITES)
    origin = {"inputs": inputs()}
    ledger = Ledger(out, {"part": "killed", "kills": len(causes), "seed": SEED} | origin)
    with tempfile.TemporaryDirectory() as scratch:
        series = []
        for job in JOBS:
            mixed = random.Random(f"{SEED}/{job}").sample(causes, len(causes))
            parts = [tuple(mixed[first : first + IN_SERIES]) for first in range(0, len(mixed), IN_SERIES)]
            series += [Series(Path(scratch), job, number, part) for number, part in enumerate(parts)]
        todo = [] if ledger.complete else [each for each in series if each.key not in ledger.done]
        done = side_by_side(Series.killed, todo, 1 if smoke else cores())
        for each, rows in tqdm(done, desc="killed", unit="series", initial=len(series) - len(todo), total=len(series)):
            ledger.add(each.key, [row | origin for row in rows])
    return ledger.finish().sort_values(["job", "series", "run"], ignore_index=True, kind="stable", ascending=[False, True, True])


def inputs() -> str:
    return digest([__name__, *(f"{module}.__main__" for module in JOBS.values())])


def _undisturbed(job: Job, scratch: Path) -> Whole:
    """Run twice: the first start pays for the imports, and two results show that the job is deterministic."""
    folders = scratch / f"{job.name}-first", scratch / f"{job.name}-whole"
    seconds = [job.complete(folder) for folder in folders]
    first, result = map(job.result, folders)
    if first != result:
        raise ValueError(f"two runs of the {job.name} that nobody killed differ: there is nothing to compare with")
    return Whole(seconds[1], result, job.largest(folders[1]))


def table(frame: pd.DataFrame) -> str:
    """Per job: kills, where they fell, what was lost."""
    lines = [f"{'job':10} kills (in a write)  runs  killed after          at step   equal to the end of a run that nobody killed"]
    for name, part in frame.groupby("job", sort=False):
        when = f"{part['moment'].min():.2f} to {part['moment'].max():.2f} s"
        at = f"{part['killed_at_step'].min()} to {part['killed_at_step'].max()}"
        kills = f"{len(part)} ({(part['cause'] == 'write').sum()})"
        lines.append(
            f"{name:10} {kills:18}  {part.groupby(['series', 'run']).ngroups:4}  {when:20}  {at:8}  {part['equal'].sum()} of {len(part)}"
        )
    return "\n".join(lines)
