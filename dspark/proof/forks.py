"""``python -P forks.py WORKERS``: pytest in many folders, with the heavy libraries imported once and a fork for every folder.

A script, never imported: a fork must find ``dspark`` in its own folder, so the process it is forked from must not know the package.
Reads from standard input a JSON list of jobs {name, folder, arguments, seconds}; writes, as each job ends, one line of JSON:
{name, passed, failed, error, seconds}. passed: number of tests · failed: id of a test → the first line of what it said · error: why
the job proves nothing ("" if it does). Standard library, PyTorch, transformers and pytest only.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

PREPARED = (  # what the tests import, beside the package itself
    "hypothesis",
    "numpy",
    "pandas",
    "pyarrow.parquet",
    "safetensors.torch",
    "tqdm.auto",
    "transformers.cache_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.llama.modeling_llama",
)


class Recorder:
    """A pytest plugin that keeps what failed, while running and while collecting. Behind a case that failed the others are left out."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: dict[str, str] = {}
        self.broken: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(f"{report.nodeid} cannot be collected: {str(report.longrepr).splitlines()[-1]}")

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.nodeid.split("[")[0] in {failed.split("[")[0] for failed in self.failed}:
            pytest.skip("another case of it has failed, which is enough")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = (crash.message if crash else str(report.longrepr)).splitlines()
            self.failed.setdefault(report.nodeid, said[0] if said else "")
        elif report.when == "call" and report.passed:
            self.passed += 1


def main() -> None:
    jobs, running, starter = json.load(sys.stdin), {}, os.getppid()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for name in PREPARED:
        importlib.import_module(name)
    if "dspark" in sys.modules:
        raise RuntimeError("dspark is imported already: every fork would test that one")
    while jobs or running:
        while jobs and len(running) < int(sys.argv[1]):
            job = jobs.pop(0)
            running[fork(job)] = (job, time.monotonic())
        if os.getppid() != starter:  # nobody reads on: leave no test running behind
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            return
        for pid, (job, start) in list(running.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                print(answer(job, time.monotonic() - start), flush=True)
                del running[pid]
            elif time.monotonic() - start > job["seconds"]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def fork(job: dict) -> int:
    """The process id of a child that does the job and ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        folder = Path(job["folder"])
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        (folder / "answer.json").write_text(json.dumps(tested(folder, job["arguments"])))
    finally:
        os._exit(0)


def tested(folder: Path, arguments: list[str]) -> dict[str, object]:
    recorder, error = Recorder(), ""
    sys.path.insert(0, str(folder))
    try:
        import dspark

        if not Path(dspark.__file__).is_relative_to(folder):
            raise ImportError(f"dspark comes from {dspark.__file__}")
        code = pytest.main(arguments, plugins=[recorder])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.stdout.flush()
            last = (folder / "output.txt").read_text().strip().splitlines()[-1:]
            error = "; ".join(recorder.broken) or f"pytest ended with {code!r}: {''.join(last)}"
    except Exception as reason:
        error = f"{type(reason).__name__}: {reason}"
    return {"passed": recorder.passed, "failed": recorder.failed, "error": error}


def answer(job: dict, seconds: float) -> str:
    try:
        found = json.loads(Path(job["folder"], "answer.json").read_text())
    except (OSError, ValueError):
        found = {"passed": 0, "failed": {}, "error": f"the tests died, or were stopped after {job['seconds']} s"}
    return json.dumps({"name": job["name"], **found, "seconds": seconds})


if __name__ == "__main__":
    main()
