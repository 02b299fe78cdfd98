"""``python -m dspark.bench.report``: write RESULTS.md and the table of README.md from the files in data/results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dspark.bench.markdown import caption, paragraphs, place, speed_table, table
from dspark.bench.policies import ORACLE, pooled, replayed, windows
from dspark.bench.prompts import data_dir
from dspark.bench.results import read_rows
from dspark.bench.rollouts import FIT, judged, read_rollouts, rollouts_of
from dspark.bench.speed import read_speed
from dspark.bench.stats import ALL
from dspark.bench.traces import read_traces
from dspark.cli import run_main
from dspark.files import write_atomically
from dspark.tune.calibrate import calibrate

BEGIN, END = "<!-- results -->", "<!-- /results -->"
HEADLINE = "speed-bfloat16-t0.parquet"
HEADLINE_ARMS = ("generate", "mtp1", "fixed:5", "fixed+copy")
REPLAYED = ("adaptive", "confidence:0.1", "prefix", ORACLE)
COMPARE = "python -m dspark.train compare"
WIDTHS = (1, 2, 4, 6, 8, 12, 16)  # tokens in a pass, of the step times that are shown

INTRODUCTION = """\
# Results

Every number on this page comes from a file in [data/results](data/README.md). `python -m dspark.bench.report` writes the page:
do not edit it. What was tried without a result file is in [data/LOG.md](data/LOG.md).

![Speed-up over plain decoding and tokens per round, by domain](data/figures/headline.svg)

## How to read the tables

- A speed-up is a ratio per prompt, measured in one process with the arms in rotating order. The cell of a domain is the median of
  these ratios with its 95 % bootstrap interval over prompts; the last column is the geometric mean of the domains. Cells are medians
  of ratios: do not divide one by another. Two runs of one machine differ on top of that: compare `generate` in two tables.
- τ is tokens per round: accepted drafts + 1, over all prompts of a domain.
- `plain` is our loop without a drafter. `generate` is transformers' own loop on weights as transformers loads them; ours are packed
  for the CPU first. `lookup` and `assisted` are transformers' own methods on those weights; for lack of a smaller model, `assisted`
  drafts with the target's first layers.
- `mtp1` verifies one draft per round, `fixed:5` the whole block, `prefix` as many as pay off given this machine's step times. `+copy`
  adds copying from the context.
- In bfloat16 a pass over a block and a pass over one token round differently, so greedy texts part where two tokens are nearly tied.
  In float32 they are equal.
- AVX512 is a Zen 5 processor with bfloat16 kernels. AVX2 is a Zen 3 processor without them, which uses float16 copies of the weights;
  it was measured with an earlier drafter."""


def results_page(data: Path) -> str:
    """All of RESULTS.md, made from the result files in ``data``/results. Sections without a file are left out."""
    sections: dict[str, Callable[[Path], str]] = {
        "Speed": lambda folder: _tables(folder, "speed-*.parquet"),
        "Other methods of transformers, and more policies": lambda folder: _tables(folder, "peers-*.parquet"),
        "Time and memory": lambda folder: paragraphs((_steps(folder), _rewind(folder), _memory(folder))),
        "Schedules on the same texts": _schedules,
        "Calibration of the confidence": _calibration,
        "Exactness": _exactness,
        "Drafters trained alike": lambda folder: paragraphs((_decoded(folder), _sizes(folder))),
    }
    made = {title: make(data / "results") for title, make in sections.items()}
    return paragraphs([INTRODUCTION, *(f"## {title}\n\n{text}" for title, text in made.items() if text)]) + "\n"


def headline_table(data: Path) -> str:
    """The one table of README.md. Raises ValueError if its file or one of its arms is missing."""
    frame = read_speed(data / "results" / HEADLINE)
    missing = [arm for arm in HEADLINE_ARMS if arm not in set(frame["arm"])]
    if missing:
        raise ValueError(f"{HEADLINE} has no arm {', '.join(missing)}: measure it again with python -m dspark.bench")
    return speed_table(frame[frame["arm"].isin([frame.iloc[0]["baseline"], *HEADLINE_ARMS])], remarks=False)


def filled(readme: str, table: str) -> str:
    """The README with ``table`` between its two markers. Raises ValueError unless each marker occurs once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md needs {BEGIN} and {END} once each, in this order: put them back")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def _tables(folder: Path, pattern: str) -> str:
    """The tables of all speed files whose name matches."""
    paths = sorted(folder.glob(pattern), key=lambda path: (path.stem.count("-avx2"), path.stem))
    return paragraphs(speed_table(read_speed(path)) for path in paths)


def _steps(folder: Path) -> str:
    """Measured step times by tokens in the pass and by context, and what drafting a whole block takes."""
    parts = []
    for path in sorted(folder.glob("sps-*.parquet")):
        frame = read_rows(path, "python -m dspark.bench.sps")
        passes = frame[frame["kind"] == "verify"].pivot(index="context", columns="tokens", values="seconds")
        block = frame[frame["kind"] == "draft"].pivot(index="context", columns="tokens", values="seconds")
        widths = [width for width in WIDTHS if width in passes]
        rows = [
            [f"{context:,}", *(f"{1e3 * row[width]:.1f}" for width in widths), f"{1e3 * block.loc[context].iloc[-1]:.1f}"]
            for context, row in passes.iterrows()
        ]
        heads = ["tokens of context", *(f"{width} tokens" if width > 1 else "1 token" for width in widths), "a drafted block"]
        about = f"One target pass over so many tokens, in ms (medians; {frame.iloc[0]['dtype']}, {place(frame)}):"
        parts.append(f"{about}\n\n{table(heads, rows)}")
    return paragraphs(parts)


def _rewind(folder: Path) -> str:
    """What rewinding the KV cache takes."""
    parts = []
    for path in sorted(folder.glob("rewind-*.parquet")):
        frame = read_rows(path, "python -m dspark.bench rewind")
        times = ", ".join(f"{row['rewind_us']:.1f} µs after {row['context']:,} tokens" for _, row in frame.iterrows())
        parts.append(f"Rewinding the KV cache takes {times} (medians of {frame.iloc[0]['repeats']}).")
    return paragraphs(parts)


def _memory(folder: Path) -> str:
    """Peak memory of every arm while decoding (of the whole process where that is not known), over the baseline's."""
    parts = []
    for path in sorted(folder.glob("memory-*.parquet")):
        frame = read_speed(path)
        baseline, n = frame.iloc[0]["baseline"], frame.iloc[0]["n"]
        column = "peak_rss_mib" if frame["decode_peak_mib"].isna().any() else "decode_peak_mib"
        peaks = frame.groupby("arm", sort=False)[column].median()
        ratios = ", ".join(f"`{arm}` {peak / peaks[baseline]:.2f}×" for arm, peak in peaks.items() if arm != baseline)
        about = f"{peaks[baseline]:.0f} MiB; n = {n} {'prompt' if n == 1 else 'prompts'} per domain; {place(frame)}"
        parts.append(f"Peak memory over `{baseline}` ({about}): {ratios}.")
    return paragraphs(parts)


def _schedules(folder: Path) -> str:
    """Policies replayed on the recorded traces: same text, same step times, no noise."""
    path = folder / "traces-test.parquet"
    if not path.is_file():
        return ""
    traces = read_traces(path)
    about, block_size = traces[0][0], int(traces[0][1].about["block_size"])
    lines = pooled(replayed(traces, ["plain", *windows(block_size), *REPLAYED])).set_index(["policy", "domain"])
    domains = [domain for domain in dict.fromkeys(domain for _, domain in lines.index) if domain != ALL]
    rows = []
    for policy in [*windows(block_size), *REPLAYED]:
        whole = lines.loc[(policy, ALL)]
        whole_cells = [f"{whole['tokens_per_round']:.2f}", f"{whole['checked']:.2f}", f"{whole['acceptance']:.0%}"]
        rows.append([f"`{policy}`", *(f"{lines.loc[(policy, domain)]['speedup']:.2f}×" for domain in (*domains, ALL)), *whole_cells])
    heads = ["", *domains, "geometric mean", "τ", "verified per round", "accepted of them"]
    words = (
        f"{len(traces)} greedy traces of {about['split']} prompts, drafter alone, with the step times measured beside them: speed-up over "
        f"plain decoding. `{ORACLE}` knows every acceptance in advance and is an upper bound, not a policy."
    )
    return f"{words}\n\n{table(heads, rows)}"


def _calibration(folder: Path) -> str:
    """Survival before and after calibration, on the half of the dev prompts that was not fitted."""
    path = folder / "rollouts-dev.parquet"
    if not path.is_file():
        return ""
    frame = read_rollouts(path)
    found = judged(frame, calibrate(rollouts_of(frame, half=FIT)))
    kinds = sorted(set(found["temperature"]))
    rows = []
    for position, lines in found.groupby("position"):
        row = [f"{position:.0f}"]
        for _, line in lines.sort_values("temperature").iterrows():
            row.append(f"{line['survival']:.1%} of {line['n']:,.0f}")
            row.append(f"{line['ece_before']:.1%} → {line['ece_after']:.1%} ({line['noise']:.1%})")
            row.append(f"{line['auc_after']:.3f} ({line['auc_best']:.3f})")
        rows.append(row)
    heads = [f"{name}, T = {kind:g}" for kind in kinds for name in ("survived", "ECE", "AUC")]
    words = (
        "Predicted survival a_k against what survived, on dev prompts that the calibration did not see. ECE: expected calibration error "
        "before → after calibration, in parentheses what a perfect head would show on as many blocks. AUC: area under the ROC curve, in "
        "parentheses that of a head which knows both distributions."
    )
    return f"{words}\n\n{table(['position', *heads], rows)}"


def _exactness(folder: Path) -> str:
    """What ``make proof`` found, one line per part that was run."""
    path = folder / "proof.json"
    if not path.is_file():
        return ""
    sentences = {
        "enumeration": "Small models, all branches of a round, in fractions: {cases:,} cases, {branches:,} branches, largest difference "
        "from the target's distribution {largest_difference:g}.",
        "greedy": "Greedy float32 texts of tiny random models: {equal:,} of {texts:,} equal those of `model.generate`.",
        "draws": "{target} in float32: {draws:,} draws, smallest p of the χ² tests after Holm's correction {smallest_p_adjusted:.2g}.",
        "planted": "Planted bugs: {caught} of {of} caught by the test that each names.",
    }
    parts = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"- {words.format(**parts[name])} (Commit {parts[name]['commit']}.)" for name, words in sentences.items() if name in parts]
    return "\n".join(["The text keeps the target's distribution (`make proof`, [notebook](notebooks/07_losslessness.ipynb)):", "", *lines])


def _decoded(folder: Path) -> str:
    """τ of the drafters of ``python -m dspark.train compare`` in real decoding, by domain."""
    frames = {path.stem.rsplit("-", 1)[1]: read_speed(path) for path in sorted(folder.glob("drafters-t1-*.parquet"))}
    if not frames:
        return ""
    rows = []
    for name, frame in frames.items():
        totals = frame.groupby("domain", sort=False)[["decoded_tokens", "rounds"]].sum()
        rows.append([f"`{name}`", *(f"{tau:.2f}" for tau in totals["decoded_tokens"] / totals["rounds"])])
    about = next(iter(frames.values()))
    words = f"τ with 500 training steps each on the same batches, whole blocks verified ({caption(about)}):"
    return f"{words}\n\n{table(['', *dict.fromkeys(about['domain'])], rows)}"


def _sizes(folder: Path) -> str:
    """Training records by block size and depth: held-out τ, acceptance at the first positions, and the time of a drafted block."""
    path, times = folder / "drafters-trained.parquet", folder / "drafters-time.parquet"
    if not path.is_file():
        return ""
    frame = read_rows(path, COMPARE)
    milliseconds = read_rows(times, COMPARE).groupby("drafter")["draft_ms"].median().to_dict() if times.is_file() else {}
    cells = {}
    for _, line in frame.iterrows():
        acceptance = " ".join(f"{value:.2f}" for value in line["held_out_acceptance"][:3])
        cost = f"; {milliseconds[line['drafter']]:.1f} ms" if line["drafter"] in milliseconds else ""
        kind = line["drafter"].split("-")[0]
        cells[line["block_size"], line["layers"], kind] = f"{line['held_out_tau']:.3f}; {acceptance}{cost}"
    kinds = list(dict.fromkeys(kind for _, _, kind in cells))
    sizes = sorted({(block_size, layers) for block_size, layers, _ in cells})
    rows = [[str(block), str(layers), *(cells.get((block, layers, kind), "") for kind in kinds)] for block, layers in sizes]
    words = (
        "Held-out τ; acceptance at positions 1 to 3 (1 − ½‖p_d − p_t‖₁ at temperature 1, given that the drafts before were accepted); time "
        "of a drafted block. `dspark` has the plain Markov head, `gated` and `rnn` the other two, `dflash` none; `eagle` drafts token by "
        "token. The published gains over DFlash and over an autoregressive drafter did not appear at this size with this much training; no "
        "bug that would explain it is known."
    )
    return f"{words}\n\n{table(['block size', 'layers', *(f'`{kind}`' for kind in kinds)], rows)}"


def write(data: Path) -> None:
    """Write RESULTS.md and the table of README.md, beside the data folder."""
    readme = data.parent / "README.md"
    page, text = results_page(data), filled(readme.read_text(encoding="utf-8"), headline_table(data))
    write_atomically(data.parent / "RESULTS.md", page.encode())
    write_atomically(readme, text.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dspark.bench.report", description=__doc__)
    return run_main(parser, lambda options: write(data_dir()), arguments)


if __name__ == "__main__":
    sys.exit(main())
