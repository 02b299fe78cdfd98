"""What all notebooks share: a cell that checks the parameters before anything loads, and one that saves and shows the summary."""

import ast
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
import transformers
from IPython import get_ipython

from dspark.bench.prompts import DOMAINS
from dspark.files import closest, write_atomically
from dspark.load import DTYPES, usable_device

TYPES = {"str": str, "int": int, "float": (float, int), "bool": bool}
FREE = {"seed", "position", "bias"}  # numbers without a range; a name means the same in every notebook
FROM_ZERO = {"block_size", "markov_rank", "live_prompts"}  # other whole numbers start at 1, and fractions at 0
SHARES = {"top_p", "threshold", "thresholds", "target_probs", "draft_probs"}  # end at 1
CHOICES = {"dtype": DTYPES, "domains": DOMAINS}  # of domains several, with commas


def unknown(kind: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for a misspelt name; it names the closest one."""
    return ValueError(f"there is no {kind} {name!r}" + (closest(name, known) or f": choose from {', '.join(known)}"))


def check(values: Mapping[str, object], kinds: Mapping[str, str]) -> None:
    """Raises ValueError for the first parameter that is not declared, has another type, or lies outside its range.

    values: name → value. kinds: name → declared type, such as "list[str]".
    """
    for name, value in values.items():
        if name not in kinds:
            raise unknown("parameter", name, list(kinds))
        kind = kinds[name].removeprefix("list[").removesuffix("]")
        listed = kind != kinds[name]
        each = value if listed and isinstance(value, list) else [value]
        is_kind = (isinstance(v, TYPES.get(kind, object)) and (kind == "bool" or not isinstance(v, bool)) for v in each)
        if listed != isinstance(value, list) or not each or not all(is_kind):
            raise ValueError(f"parameter {name} needs {kinds[name]}{' with an entry' * listed}, got {value!r}")
        low, high = int(kind == "int" and name not in FROM_ZERO), 1 if name in SHARES else math.inf
        for v in each if kind in ("int", "float") and name not in FREE else ():
            if not low <= v <= high:  # NaN is outside, too
                raise ValueError(f"parameter {name} must be {f'from {low} to {high}' if high == 1 else f'at least {low}'}, got {v!r}")
        for word in str(value).split(",") if name in CHOICES else ():
            if word.strip() not in CHOICES[name]:
                raise unknown(name, word.strip(), list(CHOICES[name]))


def begin() -> None:
    """The first cell after the parameters: checks them, then uses so many threads and hides transformers' progress bars.

    Raises ValueError for a wrong one (:func:`check`), and for one that papermill passed but the notebook does not have.
    """
    names, kinds, given = get_ipython().user_ns, {}, {}
    for source in names["In"]:  # every cell that has run; a parameter is an assignment with a type
        body = ast.parse(source).body
        declared = {node.target.id: ast.unparse(node.annotation) for node in body if isinstance(node, ast.AnnAssign)}
        kinds = declared or kinds
        if source.startswith("# Parameters"):  # papermill's own cell
            given = {target.id: None for node in body if isinstance(node, ast.Assign) for target in node.targets}
    check({name: names[name] for name in {**kinds, **given}}, kinds)
    usable_device(names.get("device", "cpu"))
    torch.set_num_threads(names.get("threads", torch.get_num_threads()))
    transformers.utils.logging.disable_progress_bar()  # a saved notebook shows that widget as a blank


def finish(summary: Mapping[str, object], out: str) -> pd.DataFrame:
    """The last cell: writes a flat summary to ``out`` as JSON, if that is not empty, and returns its numbers and words as a table.

    A sweep shows the first three entries beside what was swept, so these should be the results.
    """
    summary = {name: None if value != value else value for name, value in summary.items()}  # NaN is no JSON
    if out:
        write_atomically(Path(out), json.dumps(summary, indent=1).encode())
    short = {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in summary.items() if not isinstance(v, dict | list | None)}
    return pd.DataFrame({"value": {name: text for name, text in short.items() if text and len(text) < 60 and "\n" not in text}})
