"""Result frames → TeX floats. Every cell with a number has the look of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from dspark.bench.published import BENCHMARKS, TAU
from dspark.bench.stats import ALL, summarise
from dspark.lab.static import caption
from dspark.paper import quoted
from dspark.paper.latency import with_prediction
from dspark.paper.macros import MEASURED, QUOTED, SIMULATED, code, escaped, integer, number, styled, times


def speed(frame: pd.DataFrame, label: str) -> str:
    """An arm takes two lines: the speed-up of every domain, and under it the interval and τ."""
    lines = summarise(frame, "plain")
    domains = list(dict.fromkeys(lines["domain"]))
    rows = []
    for arm in dict.fromkeys(lines["arm"]):
        if arm != "plain":
            of_arm = lines[lines["arm"] == arm].set_index("domain").loc[domains]
            rows.append([code(arm), *(styled(MEASURED, times(s)) for s in of_arm["speedup"])])
            rows.append(["", *(_interval(line) for _, line in of_arm.iterrows())])
    heads = ["", *("geometric mean" if d == ALL else escaped(d) for d in domains)]
    about = rf"Speed-up over plain decoding; under it the \SettingLevel interval and $\tau$. {escaped(caption(frame))}."
    return floated(tabular("l" + "c" * len(domains), heads, rows, every=2), about, label)


def _interval(line: pd.Series) -> str:
    tau = f", $\\tau$ {number(line['tokens_per_round'])}" if line["tokens_per_round"] > 1 else ""
    interval = styled(MEASURED, f"[{number(line['low'])}, {number(line['high'])}]{tau}")
    return rf"{{\scriptsize {interval}}}"


def latency(runs: Mapping[str, pd.DataFrame], arms: Mapping[str, Sequence[str]], label: str) -> str:
    """Where the time goes, and the speed-up that follows from it beside the one that was timed. arms: of each run."""
    rows = []
    for run, frame in runs.items():
        lines = with_prediction(frame)
        for arm in arms[run]:
            for _, line in lines[lines["arm"] == arm].iterrows():
                values = [
                    number(line["tokens_per_round"]),
                    *(number(line[f"{name}_ms"], 1) for name in ("plain", "draft", "verify", "model")),
                ]
                domain = "all" if line["domain"] == ALL else escaped(line["domain"])
                measured = [styled(MEASURED, value) for value in (*values, times(line["speedup"]))]
                rows.append([escaped(run.lower()), code(arm), domain, *measured, styled(SIMULATED, times(line["predicted"]))])
    heads = ["run", "arm", "domain", r"$\tau$", r"$T_{\mathrm{plain}}$", r"$T_{\mathrm{draft}}$", r"$T_{\mathrm{verify}}$", "sum"]
    about = (
        r"Step times in milliseconds on \SettingPlace (medians over prompts; where most rounds look their drafts up, the median draft is "
        r"a lookup), mean of their sum in a round, and speed-up as timed and as computed from $\tau$ and the means: "
        r"$\tau\,T_{\mathrm{plain}}/(T_{\mathrm{draft}}+T_{\mathrm{verify}})$."
    )
    domains = next(iter(runs.values()))["domain"].nunique() + 1
    return floated(tabular("lllrrrrrrr", [*heads, "timed", "computed"], rows, every=domains, size=r"\scriptsize"), about, label)


def published(label: str) -> str:
    """What the paper we reproduce reports for τ."""
    rows = [[escaped(target), escaped(name), *(styled(QUOTED, number(tau)) for tau in row)] for (target, name), row in TAU.items()]
    about = f"Quoted, not measured here. {escaped(quoted.TAU_SOURCE)}."
    heads = ["target", "drafter", *map(escaped, BENCHMARKS)]
    # The caption and the letters say that all of it is quoted; quotation marks in every cell would say it too often.
    size = r"\scriptsize\setlength{\tabcolsep}{5pt}\renewcommand{\quoted}[1]{\textcolor{quotedink}{\textsf{#1}}}"
    return floated(tabular("ll" + "r" * len(BENCHMARKS), heads, rows, size=size), about, label)


def planted(frame: pd.DataFrame) -> str:
    """Bug → where others met it → the test that catches it; as long as it takes."""
    ragged = r">{\raggedright\arraybackslash}p"
    columns = rf"@{{}}{ragged}{{0.24\textwidth}}{ragged}{{0.19\textwidth}}{ragged}{{0.5\textwidth}}@{{}}"
    chosen = frame[["bug", "seen_in", "caught_by"]].itertuples(index=False, name=None)
    # Of a parametrised test the name is enough.
    rows = [[escaped(bug.replace("-", " ")), escaped(seen or "--"), code(test.split("[")[0] or "none")] for bug, seen, test in chosen]
    body = "".join(" & ".join(row) + r" \\" + "\n" for row in rows)
    head = r"\toprule planted bug & seen in & caught by \\ \midrule"
    start = rf"{{\scriptsize\begin{{longtable}}{{{columns}}}" + "\n" + head + r"\endhead \bottomrule \endfoot"
    return f"{start}\n{body}\\end{{longtable}}}}\n"


def runs(frames: Mapping[str, pd.DataFrame], label: str) -> str:
    """File → rows, and the revisions, machine and drafters behind them."""
    rows = []
    for name, frame in frames.items():
        drafters = _distinct(frame, "drafter_digest")
        rows.append(
            [code(name), integer(len(frame)), *(code(_distinct(frame, c)) for c in ("revision", "torch", "machine")), code(drafters)]
        )
    about = "The results files behind this paper: one row each, with the code's revisions and the digest of the drafter."
    heads = ["file", "rows", "revision", "torch", "machine", "drafter"]
    wide = r"lrp{0.19\textwidth}llp{0.16\textwidth}"
    return floated(tabular(wide, heads, rows, size=r"\scriptsize"), about, label)


def _distinct(frame: pd.DataFrame, column: str) -> str:
    values = dict.fromkeys(frame[column]) if column in frame else ()
    return ", ".join(str(value) for value in values if isinstance(value, str) and value) or "–"


def tabular(columns: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, every: int = 0, size: str = r"\small") -> str:
    """every: a little space behind so many rows."""
    lines = [" & ".join(row) + r" \\" + (r"[3pt]" if every and i % every == 0 and i < len(rows) else "") for i, row in enumerate(rows, 1)]
    head = " & ".join(heads) + r" \\"
    parts = [rf"{size}\begin{{tabular}}{{@{{}}{columns}@{{}}}}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(parts)


def floated(tabular: str, about: str, label: str) -> str:
    return f"\\begin{{table}}[htbp]\n\\centering\n\\caption{{{about}}}\\label{{{label}}}\n{tabular}\n\\end{{table}}\n"
