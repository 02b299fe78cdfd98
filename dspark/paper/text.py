"""What the hand-written part of the paper may not say: a result as a literal, or a value that was not generated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# The arguments of these are names of things, not text.
NAMES = re.compile(r"\\(?:label|ref|eqref|pageref|cite|bibitem|input|includegraphics|vspace|hspace|hypersetup)\*?(?:\[[^\]]*\])?\{[^}]*\}")
MATH = re.compile(r"\$[^$]*\$|\\\[.*?\\\]|\\begin\{(equation|align)\*?\}.*?\\end\{\1\*?\}", re.DOTALL)
TIMES = r"(?:\$?\s*\\times|\\texttimes|×)"
LITERAL = re.compile(rf"\d+(?:[.,]|\{{,\}})\d+|(?<!\w)\.\d+|\d+[\s~]*(?:\\,)?\s*(?:\\%|%|percent|per\s+cent|{TIMES})")
INTEGER = re.compile(r"(?<![\w-])\d+")


def literals(tex: str, integers: bool = True) -> list[tuple[int, str]]:
    """(line, what stands there) of every literal decimal, percentage and factor between \\begin{document} and its end, math
    included, and with ``integers`` of every whole number outside math. Labels, citations and comments do not count."""
    body = _blanked(re.compile(r"(?<!\\)%[^\n]*"), tex)
    start, end = body.find(r"\begin{document}"), body.find(r"\end{document}")
    if start >= 0:
        body = re.sub(r"[^\n]", " ", body[:start]) + body[start : end if end >= 0 else None]
    body = _blanked(NAMES, body)
    found = [(match.start(), match[0]) for match in LITERAL.finditer(body)]
    if integers:
        words = _blanked(MATH, _blanked(LITERAL, body))
        found += [(match.start(), match[0]) for match in INTEGER.finditer(words)]
    return [(body.count("\n", 0, at) + 1, text.strip()) for at, text in sorted(found)]


def _blanked(pattern: re.Pattern[str], text: str) -> str:
    """Matches become spaces, so that every line keeps its number."""
    return pattern.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def shown(tex: str, flags: Mapping[str, bool]) -> str:
    """The text without what ``\\ifHas…`` leaves out. Raises ValueError for an unknown switch, or one that is not closed."""
    stack: list[bool] = []
    parts = []
    for piece in re.split(r"(\\ifHas[A-Za-z]+|\\else(?![A-Za-z])|\\fi(?![A-Za-z]))", tex):
        if piece.startswith(r"\ifHas"):
            name = piece.removeprefix(r"\ifHas")
            if name not in flags:
                raise ValueError(f"{piece} is no switch: choose one of {', '.join(sorted(flags))}")
            stack.append(flags[name])
        elif piece in (r"\else", r"\fi"):
            if not stack:
                raise ValueError(f"a {piece} closes no \\ifHas…")
            last = stack.pop()
            if piece == r"\else":
                stack.append(not last)
        elif all(stack):
            parts.append(piece)
    if stack:
        raise ValueError(f"{len(stack)} \\ifHas… are not closed")
    return "".join(parts)


def unknown(tex: str, defined: Iterable[str]) -> list[str]:
    """Macros with the prefix of a kind that the text uses and nobody defines."""
    used = re.findall(r"\\((?:Measured|Simulated|Quoted|Setting)[A-Za-z]+)", tex)
    return sorted(set(used) - set(defined))


def included(tex: str) -> set[str]:
    """Names of the generated files that the text takes in."""
    pattern = r"\\(input|includegraphics)(?:\[[^\]]*\])?\{generated/([^}]*)\}"
    return {name + (".tex" if kind == "input" else ".pdf") for kind, name in re.findall(pattern, tex)}
