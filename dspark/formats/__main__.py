"""``python -m dspark.formats COMMAND``: look at drafters on disk."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dspark.cli import run_main
from dspark.formats.describe import describe


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`. Each subcommand sets ``work``, the function that runs it."""
    parser = argparse.ArgumentParser(prog="python -m dspark.formats", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="what a drafter's folder holds, and what would be refused")
    inspect.add_argument("folder", type=Path, help="a folder with config.json")
    inspect.set_defaults(work=_inspect)
    return run_main(parser, lambda options: options.work(options), arguments)


def _inspect(options: argparse.Namespace) -> None:
    for name, text in describe(options.folder).items():
        print(f"{name:12} {text}")


if __name__ == "__main__":
    sys.exit(main())
