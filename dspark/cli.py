"""The frame round every command: options from a dataclass, parse, run, one line for an error, an exit status."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import field, fields

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses; argparse exits with 2 as well


def option(default: object, text: str) -> object:
    """A field of a dataclass that :func:`add_fields` makes an option."""
    return field(default=default, metadata={"help": text})


def add_fields(parser: argparse.ArgumentParser, kind: type, without: Sequence[str] = (), **defaults: object) -> None:
    """An option for every field of the dataclass ``kind`` that has a help text. defaults: where the command's differ from the class's."""
    for each in fields(kind):
        if each.name not in without and "help" in each.metadata:
            value, default = type(each.default), defaults.get(each.name, each.default)
            words = {"metavar": value.__name__.upper(), "help": f"{each.metadata['help']}; default {default!r}"}
            parser.add_argument("--" + each.name.replace("_", "-"), type=value, default=default, **words)


def from_fields(kind: type, options: argparse.Namespace, **fixed: object) -> object:
    """The dataclass with the values of a command line. fixed: fields that the command sets itself."""
    return kind(**{each.name: getattr(options, each.name) for each in fields(kind) if hasattr(options, each.name)} | fixed)


def run_main(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None = None,
    *,
    kept: str = "",
) -> int:
    """Parse ``arguments`` (default: the command line) and pass the options to ``work``.

    parser: its ``prog`` is "python -m NAME"; errors are printed as "NAME: …" in one line on stderr.
    kept: what an interrupted run keeps, such as "finished prompts"; empty if nothing can be resumed.
    Returns the exit status: what ``work`` returned (None: 0), 2 after a ValueError or OSError, 130 after Ctrl-C.
    """
    options = parser.parse_args(arguments)
    name = parser.prog.removeprefix("python -m ")
    try:
        return work(options) or 0
    except (ValueError, OSError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        resume = f"; {kept} are kept, and the same command resumes there" if kept else ""
        print(f"{name}: interrupted{resume}", file=sys.stderr)
        return INTERRUPTED
