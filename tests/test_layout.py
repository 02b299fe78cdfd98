"""The layout of the package: who may import whom, how long files are, and what has gone for good."""

from __future__ import annotations

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dspark"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)

# From the bottom up. A room (a folder or a file of dspark/) imports only rooms of its own line and of the lines before it.
LEVELS = (
    ("round", "clock", "files", "cli", "workers"),
    ("rewind",),
    ("target",),
    ("verify", "schedule"),
    ("draft",),
    ("request",),
    ("device",),
    ("tune",),
    ("engine",),
    ("decode",),
    ("formats", "cpu"),
    ("load",),
    ("hf",),
    ("train", "bench"),
    ("lab",),
)
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
CORE = {"round", "clock", "target", "draft", "verify", "schedule", "rewind", "request", "device", "engine", "decode"}
HELPERS = {"files", "tune"}  # digests of weights are computed in one place; the default policy reads measured step times
OUTSIDE_OF_CORE = {"torch", "transformers", "numpy"} | set(sys.stdlib_module_names)


def room(path: Path) -> str:
    """dspark/draft/drafter.py → draft, dspark/decode.py → decode."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"dspark.{alias.name}" for alias in node.names} if node.module == "dspark" else {node.module}
    return found


def rooms_imported(path: Path) -> set[str]:
    """Rooms of dspark that a file imports, without its own; names of dspark/__init__.py count as the top of the core."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("dspark.")}
    return {name for name in names if name in LEVEL} - {room(path)}


def lines(*paths: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


INSIDE = [path for path in FILES if path != PACKAGE / "__init__.py"]
each_file = pytest.mark.parametrize("path", INSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))


def test_every_folder_and_file_has_its_level():
    assert {room(path) for path in INSIDE} <= set(LEVEL)


@each_file
def test_no_import_points_up(path):
    if path.name == "__main__.py":
        pytest.skip("a command: nothing imports it, so it may start anything")
    above = {name for name in rooms_imported(path) if LEVEL[name] > LEVEL[room(path)]}
    assert not above, f"{path.relative_to(ROOT)} imports {', '.join(sorted(above))}"


def test_no_two_rooms_import_each_other_in_a_circle():
    graph = {name: set() for name in LEVEL}
    for path in INSIDE:
        if path.name != "__main__.py":
            graph[room(path)] |= rooms_imported(path)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@each_file
def test_the_core_imports_the_core_torch_transformers_and_numpy_only(path):
    if room(path) not in CORE:
        pytest.skip("not of the core")
    names = imports(path)
    assert {name.split(".")[0] for name in names if not name.startswith("dspark")} <= OUTSIDE_OF_CORE
    assert "dspark" not in names and {name.split(".")[1] for name in names if name.startswith("dspark.")} <= CORE | HELPERS


@each_file
def test_what_is_for_the_cpu_or_on_disk_is_applied_from_outside(path):
    if rooms_imported(path) & {"cpu", "formats"}:
        assert room(path) in {"formats", "cpu", "load", "hf", "tune", "train", "bench", "lab"}


@each_file
def test_no_file_is_longer_than_300_lines(path):
    assert lines(path) <= 300


def test_the_core_stays_small():
    """The round itself; the engine that runs it for many requests, and what one may leave out when reading, have files of their own."""
    rooms = {"decode", "draft", "verify", "schedule", "rewind", "target"}
    left_out = "schedule/auto schedule/topk draft/gemma4 draft/scaling target/prompt target/states target/stream".split()
    left_out += "draft/selector draft/convolution verify/graphs verify/processors verify/static".split()
    beside = {PACKAGE / f"{name}.py" for name in left_out}
    assert lines(*(path for path in INSIDE if room(path) in rooms and path not in beside)) <= 2_324


def test_the_package_stays_small():
    assert lines(*FILES) <= 14_182


def test_exactness_stays_small():
    tests = ROOT / "tests"
    assert lines(*(tests / "exact").glob("*.py"), tests / "test_exact.py", tests / "test_planted.py") <= 1_300


@pytest.mark.parametrize(("page", "limit"), [("README.md", 110), ("data/README.md", 80), ("RESULTS.md", 220)])
def test_pages_stay_short(page, limit):
    assert lines(ROOT / page) <= limit


GONE = re.compile(r"PhraseMemory|[+.]phrases|phrases=|[Ss]ibling|\bvotes?\b|can_branch")
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", ROOT / "data" / "README.md", ROOT / "Makefile", ROOT / "paper" / "main.tex"]
READER = PACKAGE / "bench" / "results.py"  # leaves their rows out of older files
WRITTEN = [*(path for path in FILES if path != READER), *sorted((ROOT / "notebooks").glob("*.ipynb")), *PAGES]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_phrases_votes_and_siblings_are_gone(path):
    """data/LOG.md says why."""
    assert not GONE.findall(path.read_text(encoding="utf-8"))
