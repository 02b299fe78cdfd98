"""``python paper/build.py``: the paper's numbers, tables and figures from data/results, and its PDF where LaTeX is installed.

tex: how a value is written · figures: what is drawn. A result that is missing stops the build with the command that makes it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import figures
import pandas as pd
from tex import Values, check_complete, code, escaped, integer, listed, milliseconds, number, percent, signed, styled, table, times

from dspark.bench import published
from dspark.bench.arms import arm_label
from dspark.bench.replay import Traces, against_windows, pooled, replayed, windows
from dspark.bench.results import read_rows
from dspark.bench.rollouts import FIT, FITTED, JUDGE, judged, ranked, rollouts_of
from dspark.bench.sps import curve_of
from dspark.bench.stats import ALL, summarise
from dspark.bench.traces import traces_of
from dspark.cli import run_main
from dspark.files import write_atomically
from dspark.lab.drafters import joined, pooled_positions, tau_gains
from dspark.tune.calibrate import Calibration, calibrate
from dspark.tune.predict import required_tokens_per_round

PAPER = Path(__file__).resolve().parent
DATA = PAPER.parent / "data"
DRAFTERS = {"dspark": "DSpark", "dflash": "DFlash", "eagle": "autoregressive"}

BENCH = "python -m dspark.bench --arms"
CORPUS = "--corpus data/corpus/smollm2-135m-selfplay.safetensors --skip-rows 2560"
COMPARE = f"python -m dspark.train compare {CORPUS} --results data/results --only"
HEADLINE = f"{BENCH} plain,generate,mtp1,fixed:5,fixed+copy,auto+copy --prompts"
OTHERS = "plain,generate,lookup,assisted,mtp1,fixed:2,fixed:3,fixed:4,fixed:5,adaptive,confidence:0.1,confidence:0.3,prefix"
COMMANDS = {  # results file → the command that makes it
    "speed-bfloat16-t0": f"{HEADLINE} 20 --out data/results/speed-bfloat16-t0.parquet",
    "speed-bfloat16-t1": f"{HEADLINE} 10 --temperature 1 --out data/results/speed-bfloat16-t1.parquet",
    "peers-bfloat16-t0": f"{BENCH} {OTHERS} --prompts 3 --tokens 96 --out data/results/peers-bfloat16-t0.parquet",
    "sps-bfloat16": "python -m dspark.bench.sps --out data/results/sps-bfloat16.parquet",
    "traces-test": "python -m dspark.bench.traces --out data/results/traces-test.parquet",
    "rollouts-dev": "python -m dspark.bench.rollouts --repeats 18 --fit-repeats 6 --out data/results/rollouts-dev.parquet",
    "drafters-trained": f"{COMPARE} main,heads,block,layers --stages train",
    "drafters-time": f"{COMPARE} main,block --stages time",
} | {f"drafters-t1-{name}": f"{COMPARE} main" for name in DRAFTERS}
RUNS = {"Greedy": "speed-bfloat16-t0", "Sampled": "speed-bfloat16-t1"}  # the text speaks of these; the table shows all speed runs
BLOCK, COPY, MTP = "fixed:5", "fixed+copy", "mtp1"
POLICIES = ("adaptive", "confidence:0.1", "confidence:0.3", "confidence:0.5", "prefix", "oracle")
Frames = dict[str, pd.DataFrame]


def read(results: Path) -> Frames:
    """All results that the paper is made of, by file name. Raises ValueError, with the command, for one that is missing or unusable."""
    return {name: read_rows(results / f"{name}.parquet", command) for name, command in COMMANDS.items()}


def totals(frames: Frames, name: str, baseline: str = "plain") -> pd.DataFrame:
    """The line "all" of every arm of a headline run. Raises ValueError, with the command, for an arm that was not measured."""
    if missing := {"plain", "generate", MTP, BLOCK, COPY} - set(frames[name]["arm"]):
        raise ValueError(f"{name}.parquet has no rows of {', '.join(sorted(missing))}: measure them with {COMMANDS[name]}")
    return summarise(frames[name], baseline).query("domain == @ALL").set_index("arm")


def setup(values: Values, frame: pd.DataFrame, training: dict) -> None:
    """frame: the greedy run · training: what the shipped drafter's config.json says of how it was trained."""
    first, drafting = frame.iloc[0], frame.loc[frame["drafter_block_size"].idxmax()]
    head, rank = str(drafting["drafter_head"]).rsplit("-", 1)
    place = f"{first['threads']} threads of {first['machine']}"
    for name, text in {"Target": first["target"], "Dtype": first["dtype"], "Head": head, "Rank": rank, "Place": place}.items():
        values.set(f"Setting{name}", escaped(text))
    values.set("SettingDomains", listed(map(escaped, dict.fromkeys(frame["domain"]))))
    values.set("SettingLevel", percent(0.95))
    for name, count in {
        "NewTokens": first["max_new_tokens"],
        "Prompts": first["n"],
        "BlockSize": drafting["drafter_block_size"],
        "Layers": drafting["drafter_layers"],
        "DraftVocabulary": drafting["drafter_vocab"],
        "TrainingSteps": training["steps"],
        "TrainingTokens": training["response_tokens"],
    }.items():
        values.set(f"Setting{name}", integer(count))
    values.set("MeasuredHeldOutTau", number(training["held_out"]["tau"]))


def quoted(values: Values) -> None:
    gain = "speed per user at matched throughput over MTP-1, both models"
    for name, text, where in (
        ("RangeLow", percent(published.RANGE[0]), gain),
        ("RangeHigh", percent(published.RANGE[1]), gain),
        ("HeadShareLow", percent(published.HEAD_SHARE[0], 1), "Fig. 4"),
        ("HeadShareHigh", percent(published.HEAD_SHARE[1], 1), "Fig. 4"),
        ("OverDflash", percent(published.gain("dflash")), "Table 1, mean over all benchmarks"),
        ("OverEagle", percent(published.gain("eagle")), "Table 1, mean over all benchmarks"),
        ("EceAfter", r"1\,\%", "Fig. 6, about"),
        ("AppendixWrong", "0.85", "Appendix A"),
        ("AppendixRight", "0.7", "Appendix A"),
    ):
        values.set(f"Quoted{name}", text, f"{published.SOURCE}, {where}")


def speed(values: Values, frames: Frames) -> None:
    for run, name in RUNS.items():
        over_plain, over_mtp = totals(frames, name), totals(frames, name, MTP)
        for role, arm in (("Block", BLOCK), ("Copy", COPY)):
            for what, line in (("Speedup", over_plain.loc[arm]), ("OverMtp", over_mtp.loc[arm])):
                values.interval(f"Measured{run}{role}{what}", times(line["speedup"]), number(line["low"]), number(line["high"]))
            values.set(f"Measured{run}{role}Tau", number(over_plain.loc[arm, "tokens_per_round"]))
    greedy = totals(frames, RUNS["Greedy"])
    values.set("MeasuredGenerateSpeedup", times(greedy.loc["generate", "speedup"]))
    values.set("MeasuredBlockEqual", percent(greedy.loc[BLOCK, "equal"]))
    values.set("MeasuredPlainStep", milliseconds(greedy.loc["plain", "plain_ms"]))
    values.set("MeasuredBlockVerify", milliseconds(greedy.loc[BLOCK, "verify_ms"]))
    values.set("MeasuredBlockDraft", milliseconds(greedy.loc[BLOCK, "draft_ms"]))


def speed_table(frames: Frames) -> str:
    """All speed runs: a line for each arm."""
    rows = []
    for frame in (frame for name, frame in frames.items() if name.startswith("speed-")):
        first, lines = frame.iloc[0], summarise(frame, "plain").set_index(["arm", "domain"])
        domains = list(dict.fromkeys(frame["domain"]))
        rows.append([rf"\emph{{temperature {first['temperature']:g}, {first['n']} prompts a domain, {escaped(first['machine'])}}}"])
        for arm in frame.loc[frame["arm"] != "plain", "arm"].unique():
            whole = lines.loc[arm, ALL]
            tau = number(whole["tokens_per_round"]) if whole["tokens_per_round"] > 1 else "--"
            total = f"{times(whole['speedup'])} [{number(whole['low'])}, {number(whole['high'])}]"
            cells = [tau, total, *(times(lines.loc[(arm, domain), "speedup"]) for domain in domains)]
            rows.append([escaped(arm_label(arm)), *(styled("Measured", cell) for cell in cells)])
    caption = r"Tokens per round, and speed-up over plain decoding: the geometric mean over the domains with its \SettingLevel interval."
    heads = ["", r"$\tau$", "speed-up", *map(escaped, domains)]
    return table("speed", caption, "lrr" + "r" * len(domains), heads, rows)


def steps(values: Values, frame: pd.DataFrame) -> None:
    context, window = int(frame["context"].min()), int(frame["drafter_block_size"].max())
    seconds = frame[frame["context"] == context].set_index(["kind", "tokens"])["seconds"]
    curve, draft = curve_of(frame, context), seconds["draft", window]
    values.set("SettingStepsContext", integer(context))
    for name, spent in (("Plain", seconds["verify", 1]), ("Block", seconds["verify", 1 + window]), ("Draft", draft)):
        values.set(f"MeasuredSteps{name}", milliseconds(1e3 * spent))
    for name, gain in (("Even", 0.0), ("Low", published.RANGE[0]), ("High", published.RANGE[1])):
        values.set(f"SimulatedNeeded{name}", number(required_tokens_per_round(curve, window, draft, 1 + gain)))


def policies(values: Values, traces: Traces, peers: pd.DataFrame) -> str:
    """Returns the table of all policies, replayed over the same traces. peers: a run in which some of them were timed side by side."""
    about = traces[0][1].about
    found = replayed(traces, ["plain", *windows(int(about["block_size"])), *POLICIES])
    lines = pooled(found)
    timed = summarise(peers, "plain").query("domain == @ALL").set_index("arm")["speedup"]
    window = timed[timed.index.str.startswith("fixed:")].idxmax()  # the fastest over all domains
    line = summarise(peers, window).set_index(["arm", "domain"]).loc[("prefix", ALL)]
    values.set("SettingPolicyTexts", integer(len(traces)))
    values.set("SettingPolicyTokens", integer(about["max_new_tokens"]))
    values.interval("SimulatedPolicyPrefix", *(percent(share, 1) for share in against_windows(found, "prefix")["single"]))
    values.set("SettingTimedPrompts", integer(peers["n"].iloc[0]))
    values.interval("MeasuredTimedPrefix", times(line["speedup"]), number(line["low"]), number(line["high"]))
    rows = []
    for policy, line in lines[lines["domain"] == ALL].set_index("policy").drop("plain").iterrows():
        cells = [number(line["tokens_per_round"]), number(line["checked"]), percent(line["acceptance"]), times(line["speedup"])]
        cells.append(percent(against_windows(found, policy)["single"][0], 1))
        rows.append([escaped(arm_label(policy)), *(styled("Simulated", cell) for cell in cells)])
    caption = (
        r"Policies replayed over the same \SettingPolicyTexts greedy texts with the same step times: tokens and verified drafts per round, "
        r"share of those accepted, speed-up over plain decoding, and tokens per second relative to the best single window. The oracle "
        "knows every outcome: it is a bound, not a policy."
    )
    return table("policies", caption, "lrrrrr", ["policy", r"$\tau$", "verified", "accepted", "speed-up", "of the best window"], rows)


def confidence(values: Values, frame: pd.DataFrame, calibration: Calibration) -> None:
    rows, together = judged(frame, calibration), ranked(frame, calibration).set_index("temperature")
    values.set("SettingConfidencePrompts", integer(frame["prompt_id"].nunique()))
    for run, temperature in (("Greedy", 0.0), ("Sampled", 1.0)):
        part = rows[rows["temperature"] == temperature]
        values.set(f"MeasuredConfidence{run}Before", percent(part["ece_before"].max(), 1))
        values.set(f"MeasuredConfidence{run}After", percent(part["ece_after"].max(), 1))
        values.set(f"MeasuredConfidence{run}AucLow", number(part["auc_after"].min()))
        values.set(f"MeasuredConfidence{run}AucHigh", number(part["auc_after"].max()))
        values.set(f"MeasuredConfidence{run}AucTogether", number(together.at[temperature, "auc"]))
    values.set("MeasuredConfidenceAucBestLow", number(part["auc_best"].min()))
    values.set("MeasuredConfidenceAucBestHigh", number(part["auc_best"].max()))


def drafters(values: Values, decoded: pd.DataFrame, trained: pd.DataFrame, spent: pd.DataFrame) -> str:
    """Returns the table of drafters trained alike. decoded: rows of prompts · trained: records of training · spent: timed blocks."""
    gains = tau_gains(decoded).set_index("drafter").loc[list(DRAFTERS)]
    values.set("SettingComparedSteps", listed(map(integer, trained["steps"].unique())))
    values.set("SettingComparedPrompts", integer(decoded["n"].max()))
    for name, other in (("Dflash", "dflash"), ("Eagle", "eagle")):
        values.interval(f"MeasuredOver{name}", *(signed(gains.loc[other, end]) for end in ("gain", "low", "high")))
    alike = spent[spent["drafter"].str.fullmatch(r"dspark(-block\d+)?")]  # they differ in their block size alone
    medians = alike.groupby("drafter_block_size")[["draft_ms", "head_ms", "verify_ms"]].median()
    shares, taus = medians["head_ms"] / (medians["draft_ms"] + medians["verify_ms"]), trained.set_index("drafter")["held_out_tau"]
    values.set("SettingHeadShareBlocks", listed(map(integer, shares.index)))
    values.set("MeasuredHeadShareLow", percent(shares.min(), 1))
    values.set("MeasuredHeadShareHigh", percent(shares.max(), 1))
    for name, drafter in (("Vanilla", "dspark"), ("Gated", "gated"), ("Rnn", "rnn")):
        values.set(f"MeasuredHead{name}", number(taus[drafter]))
    middle = spent.groupby("drafter")[["draft_ms", "head_ms"]].median()
    verify = spent[spent["drafter"].isin(DRAFTERS)]["verify_ms"].median()  # the same pass, timed beside each of them
    domains, rows = list(dict.fromkeys(decoded["domain"])), []
    for drafter, line in gains.iterrows():
        draft, head = middle.loc[drafter]
        measured = [*(number(line[name]) for name in (*domains, "mean")), number(draft, 1), number(head, 1)]
        latency = styled("Simulated", number((draft + verify) / line["mean"], 1))
        rows.append([DRAFTERS[drafter], *(styled("Measured", cell) for cell in measured), latency])
    caption = (
        r"Drafters trained alike, sampling at temperature one: tokens per round by domain and their mean; milliseconds to draft a block, "
        r"and of these the sequential head; latency per token $L$ in milliseconds, computed with a target pass of "
        rf"{styled('Measured', milliseconds(verify))}."
    )
    heads = ["drafter", *map(escaped, domains), "mean", r"$\Tdraft$", "head", "$L$"]
    return table("drafters", caption, "l" + "r" * (len(heads) - 1), heads, rows)


def runs_table(frames: Frames) -> str:
    rows = []
    for name, frame in frames.items():
        revisions, machines = (", ".join(dict.fromkeys(frame[column])) for column in ("revision", "machine"))
        rows.append([code(name), integer(len(frame)), code(revisions), escaped(machines)])
    caption = "The results that this paper is made from: rows, revision of the code and machine of each file."
    return table("runs", caption, "lrll", ["file", "rows", "revision", "machine"], rows, r"\footnotesize")


def generated(data: Path = DATA) -> dict[str, bytes]:
    """File name → content. The same results give the same bytes. Raises ValueError for results that are missing or unusable."""
    frames = read(data / "results")
    config = json.loads((data / "drafters" / "smollm2-135m-instruct" / "config.json").read_text(encoding="utf-8"))
    decoded = joined([frames[f"drafters-t1-{name}"] for name in DRAFTERS], data / "results")
    rolled, values = frames["rollouts-dev"], Values()
    calibration = calibrate(rollouts_of(rolled, half=FIT, temperature=FITTED))
    setup(values, frames[RUNS["Greedy"]], config["training"])
    quoted(values)
    speed(values, frames)
    steps(values, frames["sps-bfloat16"])
    confidence(values, rolled, calibration)
    tex = {
        "table-speed": speed_table(frames),
        "table-policies": policies(values, traces_of(frames["traces-test"]), frames["peers-bfloat16-t0"]),
        "table-drafters": drafters(values, decoded, frames["drafters-trained"], frames["drafters-time"]),
        "table-runs": runs_table(frames),
        "numbers": "".join(values.values()),
    }
    header = "% Generated by paper/build.py from data/results: do not edit.\n"
    files = {f"{name}.tex": (header + content).encode() for name, content in tex.items()}
    with figures.printed():
        for name, picture in {
            "steps": figures.steps(frames["sps-bfloat16"]),
            "reliability": figures.reliability_diagrams(rollouts_of(rolled, half=JUDGE, temperature=1.0), calibration),
            "drafters": figures.drafters(pooled_positions(decoded, list(DRAFTERS)), frames["drafters-trained"], DRAFTERS),
        }.items():
            files[f"figure-{name}.pdf"] = figures.pdf(picture)
    return files


def typeset() -> Path | None:
    """main.tex → paper/build/main.pdf, or None without LaTeX. Raises ValueError with the error of TeX."""
    if shutil.which("pdflatex") is None:
        return None
    (PAPER / "build").mkdir(exist_ok=True)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-output-directory=build", "main.tex"]
    for _ in range(3):  # until references and widths of tables have settled
        done = subprocess.run(command, cwd=PAPER, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise ValueError(f"LaTeX stopped: {done.stdout[done.stdout.find(chr(10) + '!') :][:400]}")
    return PAPER / "build" / "main.pdf"


def build(options: argparse.Namespace) -> None:
    files = generated()
    check_complete((PAPER / "main.tex").read_text(encoding="utf-8"), files)
    for name, content in files.items():
        write_atomically(PAPER / "generated" / name, content)
    print(f"{len(files)} files in {PAPER / 'generated'}; {typeset() or 'no PDF, as LaTeX is not installed'}")


if __name__ == "__main__":
    sys.exit(run_main(argparse.ArgumentParser(prog="paper/build.py", description=__doc__), build))
