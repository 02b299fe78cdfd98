"""``python data/report.py``: RESULTS.md and the table of README.md from the files in data/results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from dspark.bench.load import CLOSED, closed, read_load
from dspark.bench.replay import ORACLE, pooled, replayed, windows
from dspark.bench.results import read_rows, rows_so_far
from dspark.bench.rollouts import FIT, FITTED, judged, rollouts_of
from dspark.bench.stats import ALL, caption, place, summarise
from dspark.bench.traces import traces_of
from dspark.cli import run_main
from dspark.files import write_atomically
from dspark.tune.calibrate import calibrate
from dspark.tune.curve import SPSCurve
from dspark.tune.predict import predict_speedup

DATA = Path(__file__).resolve().parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"
MTP1, GENERATE = "mtp1", "generate"
HEADLINE, COMPARE = "speed-bfloat16-t0.parquet", "python -m dspark.train compare"
HEADLINE_ARMS = (GENERATE, MTP1, "fixed:5", "auto+copy")
REPLAYED = ("adaptive", "confidence:0.1", "prefix", ORACLE)
WIDTHS = (1, 2, 4, 6, 8, 12, 16)  # tokens in a pass, of the step times that are shown

INTRODUCTION = """\
# Results

Every number on this page comes from a file in [data/results](data/README.md). `python data/report.py` writes the page:
do not edit it. What was tried without a result file is in [data/LOG.md](data/LOG.md).

![Speed-up over plain decoding and tokens per round, by domain](data/figures/headline.svg)

## How to read the tables

- A speed-up is a ratio per prompt, measured in one process with the arms in rotating order. The cell of a domain is the median of
  these ratios with its 95 % bootstrap interval over prompts; the last column is the geometric mean of the domains. Cells are medians
  of ratios: do not divide one by another. Two runs of one machine differ on top of that: compare `generate` in two tables.
- τ is tokens per round: accepted drafts + 1, over all prompts of a domain.
- `plain` is our loop without a drafter. `generate` is transformers' own loop on weights as transformers loads them; ours are packed
  for the CPU first. `lookup` (prompt lookup) and `assisted` (the target's first layers draft) are transformers' own, on such weights;
  without bfloat16 kernels their pass over several tokens takes nearly as long as that many over one (see "The target's pass").
- `mtp1` verifies one draft per round, `fixed:5` the whole block, `prefix` as many as pay off given this machine's step times; `auto`, the
  default, first decides which requests draft. `async` plans with older rounds, `adaptive` moves the window, `confidence:0.1` cuts where
  predicted survival falls below 0.1, `oracle` knows the verdict. `+copy` adds copying from the context.
- Where activations are bfloat16, a block and a single token round differently, so greedy texts part at near ties. In float32 texts are
  equal, and also with bfloat16 weights in our compiled pass, whose activations are float32: see the counts.
- `Intel(R) Xeon(R) Processor (AVX512)` is an Emerald Rapids without AMX, `AMD EPYC (AVX2)` a Zen 3; `AMD EPYC` alone is a processor with
  AVX-512. Tables of other machines than the first were measured with older passes."""


def results_page(data: Path) -> str:
    """All of RESULTS.md, made from the result files in ``data``/results. Sections without a file are left out, but for the GPU's."""
    results = data / "results"
    sections = {
        "Speed": _each(results, "speed-*", speed_table),
        "Other methods of transformers, and more policies": _each(results, "peers-*", speed_table),
        "Time and memory": paragraphs((_each(results, "sps-*", _steps, ".sps"), _each(results, "memory-*", _memory, " memory"))),
        "The target's pass": _passes(results),
        "Under load": _load(results),
        "Schedules on the same texts": _each(results, "traces-test", _schedules, ".traces"),
        "Calibration of the confidence": _each(results, "rollouts-dev", _calibration, ".rollouts"),
        "Exactness": _exactness(results / "proof.json"),
        "On a GPU": _gpu(results / "gpu"),
        "The drafter in llama.cpp": _llamacpp(results / "llamacpp.json"),
        "Drafters trained alike": paragraphs((_decoded(results), _sizes(results))),
    }
    return paragraphs([INTRODUCTION, *(f"## {title}\n\n{text}" for title, text in sections.items() if text)]) + "\n"


def _each(folder: Path, pattern: str, make: Callable[[pd.DataFrame], str], command: str = "") -> str:
    """What ``make`` makes of every file whose name matches. command: the end of the command that measures it."""
    return paragraphs(make(read_rows(path, f"python -m dspark.bench{command}")) for path in sorted(folder.glob(f"{pattern}.parquet")))


def headline_table(data: Path) -> str:
    """The one table of README.md. Raises ValueError if its file or one of its arms is missing."""
    frame = read_rows(data / "results" / HEADLINE)
    if missing := [arm for arm in HEADLINE_ARMS if arm not in set(frame["arm"])]:
        raise ValueError(f"{HEADLINE} has no arm {', '.join(missing)}: measure it again with python -m dspark.bench")
    return speed_table(frame[frame["arm"].isin([frame.iloc[0]["baseline"], *HEADLINE_ARMS])], texts=False)


def filled(readme: str, table: str) -> str:
    """The README with ``table`` between its two markers. Raises ValueError unless each marker occurs once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md needs {BEGIN} and {END} once each, in this order: put them back")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of ready cells."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def paragraphs(parts: Iterable[str]) -> str:
    """The parts that are not empty, with a blank line between them."""
    return "\n\n".join(part for part in parts if part)


def speed_table(frame: pd.DataFrame, texts: bool = True) -> str:
    """One row per arm: speed-up over the run's baseline with its interval in every domain, τ where something was drafted, tokens/s.

    The words before the table also compare the arms with MTP-1 and with transformers' own loop.
    texts: say there how many texts equal the baseline's.
    """
    baseline, domains = frame.iloc[0]["baseline"], list(dict.fromkeys(frame["domain"]))
    lines = summarise(frame, baseline).set_index(["arm", "domain"])
    cells = lines.apply(_speedup, axis=1) + [f", τ {tau:.2f}" if tau > 1 else "" for tau in lines["tokens_per_round"]]
    arms, speeds = dict.fromkeys(frame["arm"]), lines["tokens_per_second"].map("{:.0f}".format)
    rows = [[f"`{arm}`", *(cells[arm, domain] for domain in (*domains, ALL)), speeds[arm, ALL]] for arm in arms if arm != baseline]
    words = [f"Speed-up over `{baseline}`, which writes {speeds[baseline, ALL]} tokens/s, [95 % interval], τ ({caption(frame)})."]
    words += [over(frame, MTP1), over(frame, GENERATE), same_texts(frame) if texts else ""]
    return paragraphs([" ".join(filter(None, words)), table(["", *domains, "geometric mean", "tokens/s"], rows)])


def _speedup(line: pd.Series) -> str:
    return f"{line['speedup']:.2f}× [{line['low']:.2f}, {line['high']:.2f}]"


def over(frame: pd.DataFrame, other: str) -> str:
    """Speed-ups of what drafts more than one token over another arm; empty for a run without it."""
    if other not in set(frame["arm"]):
        return ""
    lines = summarise(frame, other).query("domain == @ALL and tokens_per_round > 1 and arm not in [@MTP1, @other]").set_index("arm")
    return f"Over `{other}`, geometric mean: {', '.join(f'`{arm}` {_speedup(line)}' for arm, line in lines.iterrows())}."


def same_texts(frame: pd.DataFrame) -> str:
    """How many greedy texts equal the baseline's token for token; empty where text was sampled."""
    if frame["temperature"].max() > 0:
        return ""
    baseline, by_arm = frame.iloc[0]["baseline"], frame.groupby("arm", sort=False)["equals_baseline"]
    counts = (f"`{arm}` {int(equal.sum())} of {len(equal)}" for arm, equal in by_arm if arm != baseline)
    return f"Texts equal to those of `{baseline}`, token for token: {', '.join(counts)}."


def _steps(frame: pd.DataFrame) -> str:
    """Measured step times by tokens in the pass and by context, and what drafting a whole block takes."""
    times = 1e3 * frame.pivot(index="context", columns=["kind", "tokens"], values="seconds")
    widths = [width for width in WIDTHS if width in times["verify"]]
    shown = times["verify"][widths].assign(block=times["draft"].sort_index(axis="columns").iloc[:, -1])
    rows = [[f"{context:,}", *(f"{ms:.1f}" for ms in row)] for context, row in shown.iterrows()]
    heads = ["tokens of context", *(f"{width} tokens" if width > 1 else "1 token" for width in widths), "a drafted block"]
    about = f"One target pass over so many tokens, in ms (medians; {frame.iloc[0]['dtype']}, {place(frame)}):"
    return f"{about}\n\n{table(heads, rows)}"


def _passes(folder: Path) -> str:
    """One target pass in three ways, from ``data/passes.py``."""
    words = "`compiled` and `lean` are ours, the others transformers' modules, on weights as they load or packed for the CPU."
    parts = [words] * any(folder.glob("passes-*.json"))
    for path in sorted(folder.glob("passes-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        times = {(row["pass"], row["context"], row["tokens"]): row["ms"] for row in found["passes"]}
        ways, contexts, widths = (dict.fromkeys(key[i] for key in sorted(times)) for i in range(3))
        rows = [[f"{way}, after {c:,}", *(f"{times[way, c, w]:.1f}" for w in sorted(widths))] for c in sorted(contexts) for way in ways]
        inside = (
            f"A drafted block takes {found['round']['block_ms']:.1f} ms, a round outside both models {found['round']['outside_ms']:.1f} ms"
        )
        about = (
            f"{found['dtype'].removeprefix('torch.')}, {found['threads']} threads of {found['cpu']}, medians of {found['repeats']} in turns"
        )
        parts += [f"Milliseconds of one target pass (`{path.stem}`; {about}). {inside} (median of {found['round']['rounds']} rounds)."]
        parts += [table(["pass, tokens before", *(f"{w} {'token' if w == 1 else 'tokens'}" for w in sorted(widths))], rows)]
    return paragraphs(parts)


def _load(folder: Path) -> str:
    """Tokens per second of all users together in closed loops, measured and simulated."""
    path, far = folder / "load-bfloat16.parquet", folder / "load-simulated.parquet"
    if not path.is_file():
        return ""
    frame = read_load(path)
    grid, about, repeats = closed(frame), frame.iloc[0], frame.groupby(["kind", "level", "arm"]).size().max()
    words = (
        "Generated tokens per second of all users together, prefill included in the time. Each user sends the next request when the last "
        f"is answered ({about['dtype']}, {about['threads']} threads of {about['machine']}, {about['split']} prompts, {about['tokens']} new "
        f"tokens on average; {f'medians of {repeats} runs' if repeats > 1 else 'one run a cell, so small differences are noise'})."
    )
    grid.columns = [f"{users:.0f}" for users in grid.columns]
    if far.is_file():
        rows = read_rows(far, "python -m dspark.bench.simulate")
        both, beyond = rows[rows["measured"].notna()], rows[rows["measured"].isna() & (rows["kind"] == CLOSED)]
        error = (both["tokens_per_second"] / both["measured"] - 1).abs()
        words += (
            f" Columns in italics are **simulated**, from recorded traces and steps timed in turns with the loads: on the "
            f"{len(both)} loads that were measured too, the two differ by {error.median():.0%} in the median and {error.max():.0%} at most."
        )
        simulated = beyond.pivot(index="arm", columns="level", values="tokens_per_second")
        grid = grid.join(simulated.rename(columns=lambda users: f"*{users:,.0f}*"))
    rows = ([f"`{arm}`", *(f"{value:.0f}" for value in row)] for arm, row in grid.iterrows())
    return f"{words}\n\n{table(['users', *grid.columns], rows)}"


def _memory(frame: pd.DataFrame) -> str:
    """Peak memory of every arm's process over the baseline's."""
    baseline, n = frame.iloc[0]["baseline"], frame.iloc[0]["n"]
    peaks = frame.groupby("arm", sort=False)["peak_rss_mib"].median()
    ratios = ", ".join(f"`{arm}` {peak / peaks[baseline]:.2f}×" for arm, peak in peaks.items() if arm != baseline)
    about = f"{peaks[baseline]:.0f} MiB; n = {n} {'prompt' if n == 1 else 'prompts'} per domain; {place(frame)}"
    return f"Peak memory over `{baseline}` ({about}): {ratios}."


def _schedules(frame: pd.DataFrame) -> str:
    """Policies replayed on the recorded traces: same text, same step times, no noise."""
    traces = traces_of(frame)
    about, block_size = traces[0][0], int(traces[0][1].about["block_size"])
    lines = pooled(replayed(traces, ["plain", *windows(block_size), *REPLAYED])).set_index(["policy", "domain"])
    domains = [domain for domain in dict.fromkeys(domain for _, domain in lines.index) if domain != ALL]
    rows = []
    for policy in [*windows(block_size), *REPLAYED]:
        speedups, whole = lines.loc[policy]["speedup"], lines.loc[(policy, ALL)]
        counts = [f"{whole['tokens_per_round']:.2f}", f"{whole['checked']:.2f}", f"{whole['acceptance']:.0%}"]
        rows.append([f"`{policy}`", *(f"{speedups[domain]:.2f}×" for domain in (*domains, ALL)), *counts])
    heads = ["", *domains, "geometric mean", "τ", "verified per round", "accepted of them"]
    words = (
        f"{len(traces)} greedy traces of {about['split']} prompts, drafter alone, with the step times measured beside them: speed-up over "
        f"plain decoding. `{ORACLE}` knows every acceptance in advance and is an upper bound, not a policy."
    )
    return f"{words}\n\n{table(heads, rows)}"


def _calibration(frame: pd.DataFrame) -> str:
    """Survival before and after calibration, on the half of the dev prompts that was not fitted."""
    found = judged(frame, calibrate(rollouts_of(frame, half=FIT, temperature=FITTED)))
    kinds = sorted(set(found["temperature"]))
    rows = []
    for position, lines in found.sort_values("temperature").groupby("position"):
        rows.append([f"{position:.0f}"])
        for line in lines.itertuples():
            rows[-1] += [f"{line.survival:.1%} of {line.n:,.0f}", f"{line.ece_before:.1%} → {line.ece_after:.1%} ({line.noise:.1%})"]
            rows[-1] += [f"{line.auc_after:.3f} ({line.auc_best:.3f})"]
    heads = [f"{name}, T = {kind:g}" for kind in kinds for name in ("survived", "ECE", "AUC")]
    words = (
        f"Predicted survival a_k against what survived. The calibration was fitted at temperature {FITTED:g} on half of the dev prompts; "
        "these rows are of the other half. ECE: expected calibration error before → after calibration, in parentheses what a perfect head "
        "would show on as many blocks. AUC: area under the ROC curve, in parentheses that of a head which knows both distributions."
    )
    return f"{words}\n\n{table(['position', *heads], rows)}"


def _exactness(path: Path) -> str:
    """What ``make proof`` found, one line per part that was run."""
    sentences = {
        "enumeration": "Small models, all branches of a round, in fractions: {cases:,} cases, {branches:,} branches, largest difference "
        "from the target's distribution {largest_difference:g}.",
        "greedy": "Greedy float32 texts of tiny random models: {equal:,} of {texts:,} equal those of `model.generate`.",
        "draws": "{target} in float32: {draws:,} draws, smallest p of the χ² tests after Bonferroni correction {smallest_p_adjusted:.2g}.",
        "planted": "Planted bugs: {caught} of {of} caught by the test that each names.",
    }
    parts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = [f"- {words.format(**parts[name])} (Commit {parts[name]['commit']}.)" for name, words in sentences.items() if name in parts]
    words = "The text keeps the target's distribution (`make proof`, [notebook](notebooks/07_losslessness.ipynb)):"
    return "\n".join([words, "", *lines]) if lines else ""


def _gpu(folder: Path) -> str:
    """What ``python -m dspark.bench gpu`` measured, part by part; files of rehearsals do not count."""
    parts = {part: rows_so_far(folder / f"gpu-{part}.parquet") for part in ("equality", "speed", "requests")}
    parts = {part: frame for part, frame in parts.items() if len(frame) and (frame["device"] != "cpu").all()}
    if not parts:
        return "Not measured on a GPU. `make test-gpu` and `python -m dspark.bench gpu` test and measure there."
    texts = parts.get("equality", pd.DataFrame({"equal": []}))["equal"]
    words = [f"{int(texts.sum())} of {len(texts)} greedy float32 texts are those of `model.generate`." if len(texts) else ""]
    if "speed" in parts:
        words.append(speed_table(parts["speed"]))
    if "requests" in parts:
        speeds = closed(parts["requests"])
        cells = ([str(n), *(f"{speed:.0f}" for speed in column)] for n, column in speeds.items())
        words += ["Tokens per second of all users together:", table(["users", *(f"`{arm}`" for arm in speeds.index)], cells)]
    return paragraphs(words)


def _llamacpp(path: Path) -> str:
    """Tokens per round of llama.cpp with our drafter, beside ours on the same prompts."""
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    about, prompts = found["about"], pd.DataFrame(found["prompts"])
    names = {"llamacpp": about["xllamacpp"], "dspark": "this repository"}
    tau = {name: prompts[f"{name}_tokens"] / prompts[f"{name}_rounds"] for name in names}
    difference, sums = tau["llamacpp"] - tau["dspark"], prompts.sum(numeric_only=True)
    rows = [
        [words, *(f"{sums[f'{name}_{kind}']:,}" for kind in ("tokens", "rounds")), f"{sums[f'{name}_tokens'] / sums[f'{name}_rounds']:.3f}"]
        for name, words in names.items()
    ]
    words = (
        f"The shipped drafter, exported to GGUF, on {len(prompts)} {about['split']} prompts (greedy, {about['dtype']}, at most "
        f"{about['max_new_tokens']} new tokens, blocks of {about['block_size']}). Per prompt llama.cpp's tokens per round differ from ours "
        f"by {difference.mean():+.3f} ± {1.96 * difference.sem():.3f} (95 %). Put into each of llama.cpp's rounds but the "
        f"last of a prompt, our drafter gets as many drafts accepted in {sums['equal_rounds']:,} of {sums['compared_rounds']:,} "
        f"({sums['dspark_accepted']:,} and {sums['llamacpp_accepted']:,} drafts in all)."
    )
    counts = f"{words}\n\n{table(['', 'tokens', 'rounds', 'τ'], rows)}"
    return paragraphs((counts, _llamacpp_times(found["times"]) if "times" in found else ""))


def _llamacpp_times(times: dict) -> str:
    """What drafting does to llama.cpp's speed, and what its own times predict."""
    about, windows, acceptance = times["about"], times["windows"], times["acceptance"]
    curve = SPSCurve(tuple(range(1, len(windows) + 1)), tuple(ms / 1e3 for ms in times["step_ms"]))
    plain, rows = windows[0]["seconds"] / windows[0]["tokens"], []
    for each in windows[1:]:
        predicted = predict_speedup(curve, acceptance[: each["window"]], each["draft_ms"] / 1e3)
        cells = [f"{times['step_ms'][each['window']]:.1f}", f"{each['draft_ms']:.1f}", f"{each['tokens'] / each['rounds']:.2f}"]
        rows.append([str(each["window"]), *cells, f"{predicted:.2f}×", f"{plain * each['tokens'] / each['seconds']:.2f}×"])
    words = (
        f"Does drafting pay there? On {about['threads']} threads of {about['machine']} llama.cpp writes {1 / plain:.0f} tokens/s plainly, "
        f"{times['step_ms'][0]:.1f} ms a step (`data/llamacpp.py --times`; {times['prompts']} {about['split']} prompts, greedy, "
        f"{about['dtype']}, {times['max_new_tokens']} new tokens). A step over more tokens costs it much more, so wide windows lose, "
        "as its own times of steps and drafts and the acceptance by position predict."
    )
    return f"{words}\n\n{table(['window', 'step (ms)', 'draft (ms)', 'τ', 'predicted', 'measured'], rows)}"


def _decoded(folder: Path) -> str:
    """τ of the drafters of ``python -m dspark.train compare`` in real decoding, by domain."""
    frames = {path.stem.rsplit("-", 1)[1]: read_rows(path) for path in sorted(folder.glob("drafters-t1-*.parquet"))}
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
    for line in frame.itertuples():
        acceptance = " ".join(f"{value:.2f}" for value in line.held_out_acceptance[:3])
        cost = f"; {milliseconds[line.drafter]:.1f} ms" if line.drafter in milliseconds else ""
        cells[line.block_size, line.layers, line.drafter.split("-")[0]] = f"{line.held_out_tau:.3f}; {acceptance}{cost}"
    kinds = list(dict.fromkeys(kind for _, _, kind in cells))
    sizes = sorted({(block_size, layers) for block_size, layers, _ in cells})
    rows = [[str(block), str(layers), *(cells.get((block, layers, kind), "") for kind in kinds)] for block, layers in sizes]
    words = (
        "Held-out τ; acceptance at positions 1 to 3 (1 − ½‖p_d − p_t‖₁ at temperature 1, with the text's own tokens as the drafts before, "
        "so it falls more than the conditional acceptance counted while decoding); time of a drafted block. `dspark` has the plain Markov "
        "head, `gated` and `rnn` the other two, `dflash` none; `eagle` drafts token by token. The gain over DFlash is smaller than "
        "published, and there is none over the autoregressive drafter; no bug that would explain it is known."
    )
    return f"{words}\n\n{table(['block size', 'layers', *(f'`{kind}`' for kind in kinds)], rows)}"


def write(_: argparse.Namespace) -> None:
    """Write RESULTS.md and the table of README.md, beside the data folder."""
    readme = DATA.parent / "README.md"
    page, text = results_page(DATA), filled(readme.read_text(encoding="utf-8"), headline_table(DATA))
    write_atomically(DATA.parent / "RESULTS.md", page.encode())
    write_atomically(readme, text.encode())


if __name__ == "__main__":
    sys.exit(run_main(argparse.ArgumentParser(prog="data/report.py", description=__doc__), write))
