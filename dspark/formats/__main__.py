"""``python -m dspark.formats COMMAND``: look at drafters on disk, and write them for other programs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dspark.cli import run_main
from dspark.formats.deepspec import export_deepspec
from dspark.formats.describe import describe
from dspark.formats.speculators import export_speculators
from dspark.load import find_drafter, load_drafter, load_target

FOLDERS = {"deepspec": export_deepspec, "speculators": export_speculators}  # vLLM reads both


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`. Each subcommand sets ``work``, the function that runs it."""
    parser = argparse.ArgumentParser(prog="python -m dspark.formats", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="what a drafter's folder holds, and what would be refused")
    inspect.set_defaults(work=_inspect)
    export = commands.add_parser("export", help="write a drafter for vLLM or llama.cpp, and print the command that serves it")
    export.add_argument("--to", required=True, choices=[*FOLDERS, "gguf"], help="vLLM reads the first two, llama.cpp the third")
    export.add_argument("--out", required=True, type=Path, help="a folder, or the .gguf file")
    export.add_argument("--target", default="default", help="the drafter's target: default, a folder, a .gguf file or a hub id")
    export.add_argument("--target-gguf", type=Path, help="to gguf: the target as llama.cpp will serve it, if --target is no such file")
    export.set_defaults(work=_export)
    for command in (inspect, export):
        command.add_argument("folder", help="default, a folder or a hub id")
        text = "read a field of config.json as if it were absent, for one that is refused and does not matter; may be repeated"
        command.add_argument("--ignore-field", metavar="NAME", action="append", default=[], help=text)
    return run_main(parser, lambda options: options.work(options), arguments)


def _inspect(options: argparse.Namespace) -> None:
    for name, text in describe(find_drafter(options.folder), options.ignore_field).items():
        print(f"{name:12} {text}")


def _export(options: argparse.Namespace) -> None:
    from dspark.formats.gguf import default_target_gguf, export_gguf  # only this command needs them

    source = options.target_gguf
    if options.to == "gguf" and source is None:
        if options.target != "default" and not options.target.endswith(".gguf"):
            raise ValueError(f"llama.cpp needs {options.target} as GGUF: pass that file with --target-gguf")
        source = default_target_gguf() if options.target == "default" else Path(options.target)
    target = load_target(options.target, pack=False)
    drafter = load_drafter(options.folder, target, ignore_fields=options.ignore_field)
    if options.to == "gguf":
        export_gguf(drafter, target, options.out, source)
        print(f"llama-server -m {source} -md {options.out} --spec-type draft-dspark --spec-draft-n-max {drafter.block_size}")
    else:
        FOLDERS[options.to](drafter, target, options.out)
        settings = {"method": "dspark", "model": str(options.out), "num_speculative_tokens": drafter.block_size}
        print(f"vllm serve {target.model.name_or_path} --speculative-config '{json.dumps(settings)}'")


if __name__ == "__main__":
    sys.exit(main())
