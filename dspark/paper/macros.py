"""A value in the paper is a TeX macro: its prefix says of which kind it is, and so does its look on the page.

Measured: timed or counted in a run of data/results · Simulated: computed by a model, not timed · Quoted: published by others ·
Setting: a choice of ours (a seed of no claim).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MEASURED, SIMULATED, QUOTED, SETTING = KINDS = ("Measured", "Simulated", "Quoted", "Setting")
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "×": r"$\times$"}
SPECIAL |= {"τ": r"$\tau$", "γ": r"$\gamma$", "ℓ": r"$\ell$", "χ²": r"$\chi^2$", "‖": r"$\|$", "₁": "$_1$", "½": r"$\frac12$"}
SPECIAL |= {"…": r"\dots{}", "–": "--", "“": "``", "”": "''", "≤": r"$\le$", "≥": r"$\ge$", "→": r"$\to$", "·": r"$\cdot$"}
SPECIAL |= {"ε": r"$\varepsilon$", "<": r"\textless{}", ">": r"\textgreater{}"} | {c: "\\" + c for c in "&%$#_{}"}


@dataclass(frozen=True)
class Macro:
    """kind: one of KINDS · name: what stands behind the prefix, letters only · text: TeX · source: of a quoted value ·
    dressed: words with values among them, which carry their looks already."""

    kind: str
    name: str
    text: str
    source: str = ""
    dressed: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not re.fullmatch("[A-Za-z]+", self.name):
            raise ValueError(f"a macro needs a kind out of {', '.join(KINDS)} and a name of letters, got {self.kind!r} and {self.name!r}")
        if (self.kind == QUOTED) != bool(self.source):
            raise ValueError(f"\\{self.kind}{self.name}: quoted values have a source, and no other kind has one")

    @property
    def command(self) -> str:
        return self.kind + self.name

    @property
    def definition(self) -> str:
        # xspace: a macro in running text keeps the space behind it.
        text = self.text if self.dressed else styled(self.kind, self.text)
        return rf"\newcommand{{\{self.command}}}{{{text}\xspace}}" + (f" % {self.source}" if self.source else "")


def styled(kind: str, text: str) -> str:
    """``text`` in the look of its kind, which main.tex defines."""
    return rf"\{kind.lower()}{{{text}}}"


def definitions(macros: Iterable[Macro]) -> str:
    """One line per macro. Raises ValueError if a name is defined twice: TeX would stop there."""
    lines: dict[str, str] = {}
    for macro in macros:
        if macro.command in lines:
            raise ValueError(f"\\{macro.command} is defined twice: give each value its own name")
        lines[macro.command] = macro.definition
    return "".join(line + "\n" for line in lines.values())


def switches(flags: Mapping[str, bool]) -> str:
    """``\\ifHas…`` for every flag: what was not measured is left out of the text by TeX itself."""
    return "".join(f"\\newif\\ifHas{name}\\Has{name}{str(bool(on)).lower()}\n" for name, on in flags.items())


def escaped(text: object) -> str:
    """Any text as TeX. Raises ValueError for a character that the paper's fonts are not known to have."""
    pattern = "|".join(map(re.escape, sorted(SPECIAL, key=len, reverse=True)))
    result = re.sub(pattern, lambda found: SPECIAL[found[0]], str(text))
    strange = sorted({c for c in result if ord(c) > 255})
    if strange:
        raise ValueError(f"no TeX is known for {strange[0]!r} in {text!r}: add it to SPECIAL in dspark/paper/macros.py")
    return result


def code(text: object) -> str:
    """Names from the code, breakable behind underscores and slashes."""
    breakable = re.sub(r"(\\_|/|::)", r"\1\\allowbreak{}", escaped(text))
    return rf"\texttt{{{breakable}}}"


def number(value: float, digits: int = 2) -> str:
    """1234.5 → 1,234.50; a dash where there is no value."""
    return "--" if not math.isfinite(value) else f"{value:,.{digits}f}".replace(",", "{,}").replace("-", "$-$")


def integer(value: float) -> str:
    return number(value, 0)


def significant(value: float, digits: int = 2) -> str:
    """A small number as a human writes it; powers of ten in TeX."""
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    return f"${mantissa}\\cdot10^{{{int(exponent)}}}$" if exponent else mantissa


def times(value: float) -> str:
    """A ratio: 1.41×."""
    return number(value) + r"$\times$"


def percent(share: float, digits: int = 0) -> str:
    """A share or gain: 0.41 → 41 %."""
    return number(100 * share, digits) + r"\,\%"


def listed(words: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
