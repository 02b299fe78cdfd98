"""``python -m dspark.paper``: regenerate the paper's numbers, tables and figures, and typeset it where LaTeX is installed."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dspark.bench.prompts import data_dir
from dspark.paper.build import complaints, generated, write

PACKAGES = "texlive-latex-base texlive-latex-recommended texlive-fonts-recommended texlive-pictures lmodern"  # Debian's
INSTALL = f"apt-get install --no-install-recommends {PACKAGES}"
FIXED_TIME = {"SOURCE_DATE_EPOCH": "0", "FORCE_SOURCE_DATE": "1"}  # the PDF's dates and id


def typeset(paper: Path) -> Path | None:
    """main.tex → build/main.pdf; None if LaTeX or one of its packages is not installed. Raises ValueError with TeX's own error."""
    latex = shutil.which("pdflatex")
    if latex is None:
        return None
    (paper / "build").mkdir(exist_ok=True)
    command = [latex, "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "-output-directory=build", "main.tex"]
    for _ in range(3):  # the tables' widths, then the references to what they moved
        done = subprocess.run(command, cwd=paper, env=os.environ | FIXED_TIME, capture_output=True, text=True, errors="replace")
        if re.search(r"File `[^']+\.(sty|cls)' not found", done.stdout):
            return None
        if done.returncode:
            error = re.search(r"^! .*(?:\n.*){0,3}", done.stdout, re.MULTILINE)
            raise ValueError(f"LaTeX stopped: {error[0] if error else done.stdout[-300:]}")
    return paper / "build" / "main.pdf"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 1 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m dspark.paper", description=__doc__)
    parser.add_argument("--out", type=Path, help="where the generated files go; default paper/generated. Then nothing is typeset")
    options = parser.parse_args(arguments)
    try:
        paper = data_dir().parent / "paper"
        files = generated(data_dir())
        write(files, options.out or paper / "generated")
        print(f"{len(files)} files in {options.out or paper / 'generated'}")
        if options.out:
            return 0
        if wrong := complaints(paper, files):
            raise ValueError("\n".join(wrong))
        made = typeset(paper)
    except (ValueError, OSError) as error:
        print(f"dspark.paper: {error}", file=sys.stderr)
        return 1
    print(made or f"no PDF, as LaTeX or a package of it is missing: {INSTALL}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
