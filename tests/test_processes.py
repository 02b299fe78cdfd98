"""``accelerate launch -m dspark.train drafter``: two processes take the steps of one, are killed, and resume."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_killed import Job, models, run, steps_kept  # noqa: F401  models: the tiny models and their text, a fixture
from torch import Tensor

from dspark.train.__main__ import main

STEPS, HEAVY = 40, 200.0  # seconds that a start may take on a busy machine
TRAIN = f"dspark.train drafter --target target --dtype float32 --corpus corpus.safetensors --steps {STEPS} --sequences 3 --anchors 4"
TRAIN += " --checkpoint-every 4 --taps 0,1 --layers 1 --mask-token 3 --block-size 3 --markov-rank 4 --draft-vocab 60"


def start(models: Path, out: Path, *more: str, command: str = "") -> subprocess.Popen:  # noqa: F811
    """Two processes and their launcher. They share the three rows of a step unequally."""
    out.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = f"-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port {port} -m"
    words = [sys.executable, *launch.split(), *(command or f"{TRAIN} --out {out.name}/drafter").split(), *more]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with out.with_suffix(".txt").open("a") as text:
        return subprocess.Popen(words, cwd=models, env=environment, stdout=text, stderr=text)


def losses(out: Path) -> dict[int, Tensor]:
    """Step → its loss and τ, of the last run that took it."""
    lines = [json.loads(line) for line in (out / "drafter.training" / "log.jsonl").read_text().splitlines()]
    return {line["step"]: torch.tensor([line["loss"], line["tau"]]) for line in lines}


def test_two_processes_take_the_steps_of_one_are_killed_and_resume(models: Path) -> None:  # noqa: F811
    single, pair = models / "single", models / "pair"
    assert run(Job(f"{TRAIN} --out single/drafter", "", steps_kept, steps_kept), single) == 0, single.with_suffix(".txt").read_text()
    features = ("--features", "pair/features")  # computed by one process, read by both
    for how in (signal.SIGTERM, signal.SIGKILL):
        before, process, deadline = len(steps_kept(pair)), start(models, pair, *features), time.monotonic() + HEAVY
        while len(steps_kept(pair)) <= before and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        # The launcher passes SIGTERM on. SIGKILL leaves it no time to, and its processes have sessions of their own.
        children = psutil.Process(process.pid).children(recursive=True) if how == signal.SIGKILL else []
        for each in (*children, process):
            each.send_signal(how)
        process.wait(HEAVY)
        assert before < len(steps_kept(pair)) < STEPS, pair.with_suffix(".txt").read_text()
    assert start(models, pair, *features).wait(HEAVY) == 0, pair.with_suffix(".txt").read_text()
    ours, theirs = losses(pair), losses(single)
    assert list(ours) == sorted(ours) and list(theirs) == list(range(1, STEPS + 1))
    assert len(theirs.keys() - ours.keys()) <= 1, "SIGTERM between an update and its line may cost the line"
    assert all(torch.allclose(ours[step], theirs[step], rtol=1e-4, atol=1e-5) for step in ours)
    ours, theirs = (load_file(out / "drafter" / "model.safetensors") for out in (pair, single))
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), rtol=0.02, atol=1e-4) for name in theirs)


def test_processes_that_cannot_share_a_step_are_refused(models: Path) -> None:  # noqa: F811
    out, error = models / "refused", "2 processes share 1 sequences a step: launch fewer, or raise --sequences"
    assert start(models, out, command=f"{TRAIN} --sequences 1 --out refused/drafter").wait(HEAVY) != 0
    assert error in out.with_suffix(".txt").read_text() and os.listdir(out) == []


@pytest.mark.parametrize("command", ["corpus --corpus text.json", "compare --only main"])
def test_all_but_the_training_of_one_drafter_runs_in_one_process(command: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command.split()) != 0
    assert f"{command.split()[0]} runs in one process" in capsys.readouterr().err
