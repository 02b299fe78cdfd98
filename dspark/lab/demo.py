"""``python -m dspark.lab.demo``: run the first notebook in batch on this machine and print its result."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import papermill
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from dspark.cli import run_main
from dspark.formats.fetch import default_folder

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "00_start.ipynb"
READ = {"str": str, "int": int, "float": float, "bool": lambda text: json.loads(text.lower())}  # Python writes True, JSON true


def notebook_parameters(notebook: Path) -> dict[str, dict[str, str]]:
    """Name → {"inferred_type_name", "default", "help"} of the cell tagged ``parameters``. ValueError if the file is missing."""
    if not notebook.is_file():
        raise ValueError(f"no notebook at {notebook}: run the demo from a clone of the repository")
    return papermill.inspect_notebook(str(notebook))


def checked_parameters(pairs: Sequence[tuple[str, str]], notebook: Path) -> dict[str, object]:
    """``name value`` pairs as typed parameters. Papermill would only log an unknown name; here it is a ValueError."""
    known, chosen = notebook_parameters(notebook), {}
    for name, text in pairs:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            raise ValueError(f"{notebook.name} has no parameter {name!r}: {hint}")
        kind = known[name]["inferred_type_name"]
        try:
            chosen[name] = READ.get(kind, json.loads)(text)
            if kind.startswith("list") and not (isinstance(chosen[name], list) and chosen[name]):
                raise ValueError(kind)
        except ValueError:
            raise ValueError(f"parameter {name} needs {kind}, got {text!r}; its default is {known[name]['default']}") from None
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
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            {**parameters, "out": str(saved)},
            kernel_name="python3",
            progress_bar=progress,
            cwd=str(notebook.parent),
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # its messages would break the progress bar
        )
    except (PapermillExecutionError, CellExecutionError) as error:
        raise ValueError(f"{f'{error.ename}: {error.evalue}'.splitlines()[0]} {kept}") from None
    except DeadKernelError:
        raise ValueError(f"the notebook's kernel died, perhaps because memory ran out: free some, or lower max_new_tokens {kept}") from None
    return json.loads(saved.read_text(encoding="utf-8"))


def report(summary: Mapping[str, object], executed: Path) -> str:
    """What the demo prints."""
    s, with_drafts = summary, f"DSpark, {summary['policy']}"
    decoding = "greedy" if s["temperature"] == 0 else f"temperature {s['temperature']:g}"
    threads = f"{s['threads']} thread{'s' if s['threads'] > 1 else ''}"
    texts = f"--- the text, {with_drafts}\n{s['text']}\n\n--- plain decoding ({s['comparison']})\n{s['plain_text']}\n"
    numbers = {
        "plain decoding": f"{s['plain_tokens_per_second']:.1f} tokens/s",
        with_drafts: f"{s['tokens_per_second']:.1f} tokens/s",
        "speed-up": f"{s['speedup']:.2f}× (95 % interval over {s['n']} prompts: {s['low']:.2f} to {s['high']:.2f})",
        "τ": f"{s['tokens_per_round']:.2f} tokens per round",
        "measured with": f"{s['target']}, {decoding}, {s['max_new_tokens']} new tokens, {s['dtype']}, {threads}",
        "notebook": shown(executed),
    }
    width = max(map(len, numbers))
    return "\n".join([f"{'prompt':{width}}  {s['prompt']}\n", texts, *(f"{name:{width}}  {text}" for name, text in numbers.items())])


def shown(path: Path) -> str:
    """A path as the reader would type it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def demo(options: argparse.Namespace) -> None:
    """Run the notebook and print its report."""
    for noisy in ("papermill", "traitlets", "asyncio"):  # after Ctrl-C they would log the kernel's end at length
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    parameters = checked_parameters(options.pairs, NOTEBOOK)
    if parameters.get("target", "default") == "default":
        default_folder()  # the first download shows its progress here, not inside the notebook
    executed = options.out.resolve()
    print(report(run(NOTEBOOK, executed, parameters), executed))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m dspark.lab.demo", description=__doc__)
    pair = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    parser.add_argument("-p", dest="pairs", help="set a parameter of the notebook, see its first code cell", **pair)
    out = ROOT / "runs" / NOTEBOOK.name
    parser.add_argument("--out", type=Path, default=out, help=f"the executed notebook; default runs/{NOTEBOOK.name}")
    return run_main(parser, demo, arguments)


if __name__ == "__main__":
    sys.exit(main())
