"""What a proof has read, as a digest: a result is kept exactly as long as none of it changes."""

from __future__ import annotations

import ast
import hashlib
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers

import dspark
from dspark.bench.prompts import data_dir
from dspark.load import default_drafter

PACKAGE = Path(dspark.__file__).parent


def digest(modules: Iterable[str], files: Iterable[Path] = ()) -> str:
    """16 hex digits that change with what any of these modules, or of what they import of this package, does, with the bytes
    of these files, and with the versions of Python, PyTorch and transformers; not with comments and docstrings."""
    sha = hashlib.sha256(repr((platform.python_version(), torch.__version__, transformers.__version__)).encode())
    read = [(path, _deeds(path)) for path in sources(modules)] + [(path, path.read_bytes()) for path in files]
    for path, content in read:
        sha.update(f"{path.name} {len(content)} ".encode() + content)
    return sha.hexdigest()[:16]


def sources(modules: Iterable[str]) -> list[Path]:
    """The files of these modules and of all that they import of this package, wherever in the file the import stands, in order."""
    waiting, found = list(modules), {}
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = _file(name)
        waiting += [parent for parent in [name.rpartition(".")[0]] if parent]
        waiting += _imported(found[name])
    return [found[name] for name in sorted(found)]


def _deeds(module: Path) -> bytes:
    """What a module says to Python, without what it says to people: better words must not make a proof old."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree).encode()


def shipped_files() -> list[Path]:
    """The prompts and the default target's drafter. The target itself is pinned in dspark/formats/fetch.py."""
    return [*sorted((data_dir() / "prompts").glob("*.jsonl")), *sorted(default_drafter().iterdir())]


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            yield node.module
            yield from (name for alias in node.names if _file(name := f"{node.module}.{alias.name}"))


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE.name


def _file(module: str) -> Path | None:
    """None if it is no module of this package."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)
