"""Would the tests notice? Bugs are planted in a copy of the package, one at a time; each must be caught by a test that it names.

A bug is a file in tests/planted: what goes wrong, where others have met it, the edit that plants it, the tests that must catch it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import transformers
from tqdm.auto import tqdm

import dspark
from dspark.bench.provenance import cores, revision
from dspark.bench.results import SCHEMA_VERSION, Ledger, Row
from dspark.proof.inputs import digest
from dspark.tune.profile import cpu_name

ROOT = Path(dspark.__file__).resolve().parents[1]
FORKS = Path(__file__).with_name("forks.py")
COPIED = ("dspark", "tests", "pyproject.toml")
ONE_TEST, ALL_TESTS = 60, 900  # seconds until a test counts as hanging, and until a copy is given up
OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--timeout", str(ONE_TEST))


@dataclass(frozen=True)
class Edit:
    """Replace ``find``, which the file holds exactly once."""

    file: str
    find: str
    replace: str


@dataclass(frozen=True)
class Bug:
    """about: what goes wrong, one sentence · seen_in: who fell into it ("" if nobody is known) · tests: pytest's ids, all must catch it."""

    name: str
    about: str
    seen_in: str
    tests: tuple[str, ...]
    edits: tuple[Edit, ...]

    @classmethod
    def read(cls, path: Path) -> Bug:
        """Raises ValueError if the file is not what tests/planted/README.md asks for."""
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
            edits = tuple(Edit(**edit) for edit in content.pop("edits"))
            return cls(path.stem, tests=tuple(content.pop("tests")), edits=edits, **content)
        except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not describe a bug ({error}): see README.md beside it") from None

    @property
    def file(self) -> str:
        return ", ".join(dict.fromkeys(edit.file for edit in self.edits))

    def plant(self, folder: Path) -> None:
        """Edit the copy in ``folder``. Raises ValueError where the code has moved on."""
        for edit in self.edits:
            code = (folder / edit.file).read_text(encoding="utf-8")
            if (times := code.count(edit.find)) != 1:
                raise ValueError(f"{self.name}: {edit.file} holds its text {times} times, not once: bring the edit up to date")
            (folder / edit.file).write_text(code.replace(edit.find, edit.replace), encoding="utf-8")


@dataclass(frozen=True)
class Trial:
    """What pytest found in one copy. passed: number of tests · failed: id → the first line of what it said, in the order they ran ·
    error: why the trial proves nothing ("" if it does) · seconds: of the whole copy."""

    passed: int
    failed: dict[str, str]
    error: str
    seconds: float

    def caught(self, bug: Bug) -> dict[str, str]:
        """Each test that the bug names → its first case that failed, "" if none did. Raises ValueError if the trial proves nothing."""
        if self.error:
            raise ValueError(f"{bug.name}: {self.error}")
        return {name: next((test for test in self.failed if test == name or test.startswith(f"{name}[")), "") for name in bug.tests}


def bugs() -> list[Bug]:
    """All of tests/planted, by name. Raises ValueError outside a clone."""
    found = [Bug.read(path) for path in sorted((ROOT / "tests" / "planted").glob("*.toml"))]
    if not found:
        raise ValueError(f"no planted bugs in {ROOT / 'tests'}: run from a clone of the repository, installed with pip install -e")
    return found


def clean(planted: Sequence[Bug]) -> Bug:
    """No bug at all: every test that the others name must pass."""
    return Bug("clean", "nothing is changed", "", tuple(dict.fromkeys(test for bug in planted for test in bug.tests)), ())


def try_out(planted: Sequence[Bug]) -> Iterator[tuple[Bug, Trial]]:
    """Plant each bug in a copy of its own and run there the tests that it names.

    Yields each bug as its tests end, two at a time on two cores. Raises ValueError where an edit does not fit.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copies = {bug.name: Path(scratch).resolve() / bug.name for bug in planted}
        for bug in planted:
            _copy(copies[bug.name])
            bug.plant(copies[bug.name])
        named = {bug.name: bug for bug in planted}
        jobs = [
            {
                "name": name,
                "folder": str(folder),
                "arguments": [*OPTIONS, f"--rootdir={folder}", *named[name].tests],
                "seconds": ALL_TESTS,
            }
            for name, folder in copies.items()
        ]
        for line in _forked(jobs):
            found = json.loads(line)
            yield named[found.pop("name")], Trial(**found)


def _copy(folder: Path) -> None:
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "planted"))
        else:
            shutil.copy2(ROOT / name, folder)


def _forked(jobs: list[dict[str, object]]) -> Iterator[str]:
    """The answers of :mod:`dspark.proof.forks`. Nothing of it outlives this generator."""
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # two copies at a time; and threads do not survive a fork
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "PYTHONPATH")}
    process = subprocess.Popen(
        [sys.executable, "-P", FORKS, str(min(cores(), len(jobs)))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=kept | one_thread | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        start_new_session=True,
    )
    try:
        process.stdin.write(json.dumps(jobs))
        process.stdin.close()
        yield from process.stdout
        if process.wait():
            raise ValueError(f"{FORKS.name} ended with {process.returncode}: its message stands above")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(out: Path, smoke: bool = False) -> pd.DataFrame:
    """Every bug against the tests that it names; written to ``out``. Goes on where a killed run stopped.

    smoke: three bugs. Raises ValueError if a test fails without any bug.
    """
    planted = bugs()[: 3 if smoke else None]
    ledger = Ledger(out, {"part": "planted", "smoke": smoke, "inputs": inputs()})
    waiting = [bug for bug in (clean(planted), *planted) if bug.name not in ledger.done]
    if not ledger.complete:
        for bug, trial in tqdm(try_out(waiting), total=len(waiting), desc="planted bugs"):
            caught = next(filter(None, trial.caught(bug).values()), "")
            if trial.failed and not bug.edits:
                raise ValueError(f"without any bug {next(iter(trial.failed))} fails: mend that first")
            ledger.add(bug.name, [_row(bug, trial, caught)] if bug.edits else [])
    return ledger.finish().sort_values("bug", ignore_index=True)


def _row(bug: Bug, trial: Trial, caught: str) -> Row:
    return {
        "bug": bug.name,
        "about": bug.about,
        "seen_in": bug.seen_in,
        "file": bug.file,
        "caught_by": caught,
        "said": trial.failed.get(caught, ""),
        "failed_tests": len({test.split("[")[0] for test in trial.failed}),
        "seconds": round(trial.seconds, 2),
        "machine": cpu_name(),
        "cores": cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dspark": dspark.__version__,
        "revision": revision(),
        "schema_version": SCHEMA_VERSION,
        "inputs": inputs(),
    }


def inputs() -> str:
    """Changes with the package, the tests and the bugs."""
    files = (path for name in COPIED for path in [ROOT / name, *(ROOT / name).rglob("*")])
    return digest([__name__], sorted(path for path in files if path.suffix in (".py", ".toml")))


def table(frame: pd.DataFrame) -> str:
    """Bug, how many tests notice it, and the named test that failed first."""
    wide = max(map(len, frame["bug"]))
    lines = [
        f"{row.bug:{wide}}  {row.failed_tests:>3}  {row.caught_by.removeprefix('tests/') or 'NOTHING CATCHES IT'}"
        for row in frame.itertuples()
    ]
    return "\n".join([f"{'bug':{wide}}  failing tests, and the first that the bug names", *lines])
