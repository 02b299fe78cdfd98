"""How values are written in TeX: numbers, names, macros whose prefix says where a value comes from, and tables.

Measured: timed or counted in a run whose rows are in data/results. Simulated: computed by a model, not timed.
Quoted: published by others. Setting: a choice of ours, such as a number of prompts. main.tex gives each kind its look.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

KINDS = ("Measured", "Simulated", "Quoted", "Setting")
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--", "×": r"$\times$"}
SPECIAL |= {"τ": r"$\tau$", "γ": r"$\gamma$"} | {c: "\\" + c for c in "&%$#_{}"}


def styled(kind: str, text: str) -> str:
    """``text`` in the look of its kind, one of KINDS."""
    return rf"\{kind.lower()}{{{text}}}"


def escaped(text: object) -> str:
    """Any text as TeX. Raises ValueError for a character that the paper's fonts may lack."""
    result = "".join(SPECIAL.get(c, c) for c in str(text))
    if strange := [c for c in result if ord(c) > 255]:
        raise ValueError(f"no TeX is known for {strange[0]!r} in {text!r}: add it to SPECIAL in paper/tex.py")
    return result


def code(text: object) -> str:
    """A name from the code; TeX may break it after an underscore or a slash."""
    breakable = re.sub(r"(\\_|/)", r"\1\\allowbreak{}", escaped(text))
    return rf"\texttt{{{breakable}}}"


def number(value: float, digits: int = 2) -> str:
    """1234.5 → 1,234.50; a dash for NaN."""
    return "--" if not math.isfinite(value) else f"{value:,.{digits}f}".replace(",", "{,}").replace("-", "$-$")


def integer(value: float) -> str:
    return number(value, 0)


def times(ratio: float) -> str:
    """1.405 → 1.41×."""
    return number(ratio) + r"$\times$"


def milliseconds(value: float) -> str:
    return number(value, 1) + r"\,ms"


def percent(share: float, digits: int = 0) -> str:
    """0.41 → 41 %."""
    return number(100 * share, digits) + r"\,\%"


def signed(share: float) -> str:
    """0.041 → +4.1 %."""
    return ("$+$" if share >= 0 else "") + percent(share, 1)


def listed(words: Iterable[str]) -> str:
    """["a", "b", "c"] → "a, b and c"."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


class Values(dict[str, str]):
    """Macro name (a kind, then letters) → the line of TeX that defines it."""

    def set(self, name: str, text: str, source: str = "") -> None:
        """Raises ValueError for a name without a kind, one set twice, and a source where none belongs or none for a quoted value."""
        kind = next((kind for kind in KINDS if re.fullmatch(f"{kind}[A-Z][A-Za-z]*", name)), None)
        if kind is None or name in self:
            raise ValueError(f"\\{name}: a macro is named once, by a kind ({', '.join(KINDS)}) and letters")
        if (kind == "Quoted") != bool(source):
            raise ValueError(f"\\{name}: quoted values have a source, and no others have one")
        # xspace keeps the space after a macro in running text.
        self[name] = rf"\newcommand{{\{name}}}{{{styled(kind, text)}\xspace}}" + (f" % {source}" if source else "") + "\n"

    def interval(self, name: str, value: str, low: str, high: str) -> None:
        """A value, and the ends of its interval under the names Low and High."""
        for end, text in (("", value), ("Low", low), ("High", high)):
            self.set(name + end, text)


def table(label: str, caption: str, columns: str, heads: Sequence[str], rows: Sequence[Sequence[str]], size: str = r"\small") -> str:
    """A float with a booktabs table. A row of one cell is a heading across all columns."""
    lines = [rf"\multicolumn{{{len(heads)}}}{{@{{}}l}}{{{row[0]}}}" if len(row) == 1 else " & ".join(row) for row in rows]
    body = "".join(rf"{line} \\" + "\n" for line in lines)
    return (
        f"\\begin{{table}}[tbp]\n\\centering\n\\caption{{{caption}}}\\label{{tab:{label}}}\n"
        rf"{size}\begin{{tabular}}{{@{{}}{columns}@{{}}}}" + "\n\\toprule\n" + " & ".join(heads) + " \\\\\n\\midrule\n"
        f"{body}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def check_complete(main: str, files: dict[str, bytes]) -> None:
    """Raises ValueError for a value or file that main.tex uses and nothing makes, or the other way round."""
    tex = main + "".join(content.decode() for name, content in files.items() if name.endswith(".tex"))
    kinds = rf"\\((?:{'|'.join(KINDS)})[A-Za-z]+)"
    made = set(re.findall(rf"\\newcommand\{{{kinds}", tex)) | files.keys()
    used = set(re.findall(rf"(?<!newcommand\{{){kinds}", tex))
    included = re.findall(r"\\(input|includegraphics)(?:\[[^\]]*\])?\{generated/([^}]*)\}", main)
    used |= {name + (".tex" if kind == "input" else ".pdf") for kind, name in included}
    if used != made:
        raise ValueError(f"main.tex uses what is not made: {sorted(used - made)}; made but not used: {sorted(made - used)}")
