"""Result frames → macros. A part whose file is not there gives no macro, and a switch that takes its sentences out of the text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from dspark.bench import published
from dspark.bench.identity import beyond_rounding
from dspark.bench.results import read_rows
from dspark.bench.stats import ALL, summarise
from dspark.draft.lookup import LEAST_SURVIVAL, LONGEST, RATES
from dspark.paper import confidence, drafters, policies, shapes, steps
from dspark.paper.latency import largest_error, with_prediction
from dspark.paper.macros import (
    MEASURED,
    SETTING,
    SIMULATED,
    Macro,
    code,
    escaped,
    integer,
    listed,
    number,
    percent,
    significant,
    styled,
    times,
)
from dspark.proof.counterexample import A, first_token_laws
from dspark.proof.sampled import ALL_PROMPTS, POWER, SIGNIFICANCE
from dspark.proof.statistics import chi2_tail
from dspark.schedule import SIBLING_RATES
from dspark.train.losses import LossWeights

Frames = Mapping[str, pd.DataFrame]  # name of the results file → its rows
RUNS = {"Greedy": "speed-bfloat16-t0", "Sampled": "speed-bfloat16-t1"}  # the text speaks of these; other runs get a table
WIDER = {"GreedyWider": "speed-n20-bfloat16-t0", "SampledWider": "speed-n20-bfloat16-t1"}  # more prompts, fewer arms
PARTS = RUNS | {
    "Memory": "memory-bfloat16-t0",
    "Rewind": "rewind-bfloat16-t0",
    "Enumeration": "proof-enumeration",
    "Draws": "proof-sampled",
    "Texts": "proof-texts",
    "Crossed": "proof-crossed",
    "Planted": "proof-planted",
    "Killed": "proof-killed",
    "Confidence": confidence.FILE,
    "Policies": policies.FILE,
    "Steps": steps.FILE,
    "HeldOut": drafters.HELD_OUT,
    "DraftTimes": drafters.TIMES,
}
DRAFT_SHARE = 0.15  # of T_plain: the goal for T_draft
ROLES = ("Generate", "Mtp", "Block", "Copy", "Phrases", "Scheduled", "Siblings")  # ways to decode that the text speaks of


def read_frames(results: Path) -> dict[str, pd.DataFrame]:
    """The results that the paper is made of: the files of PARTS, all speed runs and all compared drafters, no others.

    Raises ValueError if there is none, or one is empty or of another schema version.
    """
    several = (*steps.TIMED, drafters.DECODED)
    paths = [
        path
        for path in sorted(results.glob("*.parquet"), key=lambda path: path.stem)
        if path.stem in PARTS.values() or path.stem.startswith(several)
    ]
    frames = {path.stem: read_rows(path, "the command that data/README.md names") for path in paths}
    if not frames:
        raise ValueError(f"no results in {results}: make bench measures them")
    return frames


def roles(frame: pd.DataFrame) -> dict[str, str]:
    """Role → measured arm of a speed run. Block drafts the drafter's whole block, Copy also copies, Phrases recalls, too, Scheduled
    does so under the prefix scheduler, and Siblings has siblings as well."""
    block_size = frame["drafter_block_size"].max()
    names = {"Generate": ("generate",), "Mtp": ("mtp1", "fixed:1"), "Block": ("fixed", f"fixed:{block_size}")}
    names |= {"Copy": ("fixed+copy",), "Phrases": ("fixed+phrases",), "Scheduled": ("prefix+phrases",)}
    names |= {"Siblings": ("prefix+phrases+siblings",)}
    measured = set(frame["arm"])
    found = {role: [arm for arm in names[role] if arm in measured] for role in ROLES}
    return {role: arms[0] for role, arms in found.items() if arms}


def flags(frames: Frames) -> dict[str, bool]:
    """Switch → on. The switches are always the same ones, whatever was measured."""
    result = {part: name in frames for part, name in PARTS.items()}
    for run, name in (RUNS | WIDER).items():
        present = roles(frames[name]) if name in frames else {}
        result |= {run + role: role in present for role in ROLES}
    result["Speed"] = any(result[run] for run in RUNS)
    result["Block"] = any(result[f"{run}Block"] for run in RUNS)
    return (
        result
        | drafters.flags(frames)
        | shapes.flags(frames)
        | steps.flags(frames)
        | policies.flags(frames)
        | {"MoreRuns": bool(more_runs(frames)), "Second": bool(second_machine(frames))}
    )


def more_runs(frames: Frames) -> list[str]:
    """Speed runs that get a table of their own in the appendix."""
    return [name for name in frames if name.startswith(steps.TIMED) and name not in RUNS.values()]


def macros(frames: Frames, training: Mapping[str, object]) -> list[Macro]:
    """Every value that the text may use. training: what the shipped drafter's config.json says of how it was trained."""
    makers = {"Memory": _memory, "Rewind": _rewind, "Enumeration": _enumeration, "Draws": _draws, "Texts": _texts}
    makers |= {"Crossed": _crossed, "Planted": _planted, "Killed": _killed}
    result = [*_method(), *_training(training)]
    for run, name in (RUNS | WIDER).items():
        if name in frames:
            result += _speed(run, frames[name])
    result += _settings(next((frames[name] for name in RUNS.values() if name in frames), None))
    lines = [with_prediction(frames[name]) for name in RUNS.values() if name in frames]
    if lines:
        result.append(Macro(SIMULATED, "LargestError", percent(max(map(largest_error, lines)))))
    for part, make in makers.items():
        if PARTS[part] in frames:
            result += make(frames[PARTS[part]])
    if runs := second_machine(frames):
        result += _second(runs)
    return result


def training_record(drafter: Path) -> dict[str, object]:
    """The entry ``training`` of a drafter's config.json. Raises ValueError if there is none."""
    path = drafter / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["training"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no training record ({type(error).__name__}): train a drafter with make train") from None


def _method() -> Iterator[Macro]:
    weights = LossWeights()
    for name, value in (("CrossEntropy", weights.cross_entropy), ("Variation", weights.total_variation)):
        yield Macro(SETTING, "Loss" + name, f"{value:g}")
    yield Macro(SETTING, "LossConfidence", f"{weights.confidence:g}")
    yield Macro(SETTING, "LossDecay", f"{weights.decay:g}")
    yield Macro(SETTING, "Level", percent(0.95))
    yield Macro(SETTING, "DraftShareGoal", percent(DRAFT_SHARE))
    yield Macro(SETTING, "ContextRateLow", f"{RATES[2]:g}")
    yield Macro(SETTING, "ContextRateHigh", f"{RATES[LONGEST]:g}")
    yield Macro(SETTING, "ContextLongest", integer(LONGEST))
    yield Macro(SETTING, "LookupLeast", f"{LEAST_SURVIVAL:g}")
    yield Macro(SETTING, "SiblingRates", ", ".join(f"{rate:g}" for rate in SIBLING_RATES))
    laws = first_token_laws()
    yield Macro(SIMULATED, "AppendixWrongLaw", number(float(laws["GlobalArgmax"][A,])))
    yield Macro(SIMULATED, "AppendixPrefixLaw", number(float(laws["PrefixScheduler"][A,])))


def _training(training: Mapping[str, object]) -> Iterator[Macro]:
    yield Macro(SETTING, "TrainingSteps", integer(training["steps"]))
    yield Macro(SETTING, "TrainingRows", integer(training["corpus_rows"]))
    yield Macro(SETTING, "TrainingTokens", integer(training["response_tokens"]))
    yield Macro(MEASURED, "HeldOutTau", number(training["held_out"]["tau"]))


def _settings(frame: pd.DataFrame | None) -> Iterator[Macro]:
    if frame is None:
        return
    first, drafting = frame.iloc[0], frame.loc[frame["drafter_block_size"].idxmax()]
    place = f"{first['threads']} threads of {first['machine']}" if first["device"] == "cpu" else str(first["device"])
    head, rank = str(drafting["drafter_head"]).rsplit("-", 1)
    for name, text in {
        "Target": escaped(first["target"]),
        "Place": escaped(place),
        "Dtype": code(first["dtype"]),
        "NewTokens": integer(first["max_new_tokens"]),
        "Prompts": integer(first["n"]),
        "Split": escaped(first["split"]),
        "Domains": listed(escaped(domain) for domain in dict.fromkeys(frame["domain"])),
        "BlockSize": integer(drafting["drafter_block_size"]),
        "Layers": integer(drafting["drafter_layers"]),
        "Head": escaped(head),
        "Rank": escaped(rank),
        "DraftVocabulary": integer(drafting["drafter_vocab"]),
        "Torch": escaped(first["torch"]),
        "Transformers": escaped(first["transformers"]),
    }.items():
        yield Macro(SETTING, name, text)


def _speed(run: str, frame: pd.DataFrame) -> Iterator[Macro]:
    lines = summarise(frame, "plain").set_index(["arm", "domain"])
    predicted = with_prediction(frame).set_index(["arm", "domain"])["predicted"]
    yield Macro(SETTING, f"{run}Temperature", f"{frame.iloc[0]['temperature']:g}")
    yield Macro(SETTING, f"{run}Prompts", integer(frame.iloc[0]["n"]))
    yield Macro(MEASURED, f"{run}PlainStep", number(lines.loc[("plain", ALL), "plain_ms"], 1) + r"\,ms")
    present = roles(frame)
    for role, arm in present.items():
        name, whole, by_domain = run + role, lines.loc[(arm, ALL)], lines.loc[arm].drop(ALL)["speedup"]
        yield Macro(SETTING, f"{name}Arm", code(arm))
        yield Macro(MEASURED, f"{name}Speedup", times(whole["speedup"]))
        yield Macro(MEASURED, f"{name}Low", number(whole["low"]))
        yield Macro(MEASURED, f"{name}High", number(whole["high"]))
        yield Macro(MEASURED, f"{name}SlowestDomain", escaped(by_domain.idxmin()))
        yield Macro(MEASURED, f"{name}SlowestSpeedup", times(by_domain.min()))
        yield Macro(MEASURED, f"{name}FastestDomain", escaped(by_domain.idxmax()))
        yield Macro(MEASURED, f"{name}FastestSpeedup", times(by_domain.max()))
        yield Macro(MEASURED, f"{name}Equal", percent(whole["equal"]))
        if role == "Generate":
            continue
        yield Macro(MEASURED, f"{name}Gain", percent(whole["speedup"] - 1))
        yield Macro(MEASURED, f"{name}Place", published.place(whole["low"] - 1, whole["high"] - 1))
        yield Macro(MEASURED, f"{name}Tau", number(whole["tokens_per_round"]))
        yield Macro(MEASURED, f"{name}Draft", number(whole["draft_ms"], 1) + r"\,ms")
        yield Macro(MEASURED, f"{name}DraftShare", percent(whole["draft_ms"] / whole["plain_ms"], 1))
        yield Macro(MEASURED, f"{name}Verify", number(whole["verify_ms"], 1) + r"\,ms")
        yield Macro(SIMULATED, f"{name}Speedup", times(predicted[(arm, ALL)]))
        if "Mtp" in present and role != "Mtp":
            against = summarise(frame, present["Mtp"]).set_index(["arm", "domain"]).loc[(arm, ALL)]
            yield Macro(MEASURED, f"{name}OverMtp", times(against["speedup"]))
            yield Macro(MEASURED, f"{name}OverMtpLow", number(against["low"]))
            yield Macro(MEASURED, f"{name}OverMtpHigh", number(against["high"]))
            yield Macro(MEASURED, f"{name}OverMtpPlace", published.place(against["low"] - 1, against["high"] - 1))


def _second(runs: list[pd.DataFrame]) -> Iterator[Macro]:
    """What the drafter alone gains over MTP-1 in further runs of the same kind, on another machine: greedy first."""
    for run, frame in zip(RUNS, runs, strict=True):
        present = roles(frame)
        against = summarise(frame, present["Mtp"]).set_index(["arm", "domain"]).loc[(present["Block"], ALL)]
        yield Macro(MEASURED, f"Second{run}OverMtp", times(against["speedup"]))
        yield Macro(MEASURED, f"Second{run}OverMtpLow", number(against["low"]))
        yield Macro(MEASURED, f"Second{run}OverMtpHigh", number(against["high"]))
    yield Macro(SETTING, "SecondPlace", escaped(f"{runs[0].iloc[0]['threads']} threads of {runs[0].iloc[0]['machine']}"))


def second_machine(frames: Frames) -> list[pd.DataFrame]:
    """The runs of RUNS once more, of another machine, each with the drafter alone and MTP-1; empty unless both are there."""
    found = [frame for name in RUNS.values() for other, frame in frames.items() if other.startswith(f"{name}-")]
    return found if len(found) == len(RUNS) and all({"Mtp", "Block"} <= roles(frame).keys() for frame in found) else []


def _memory(frame: pd.DataFrame) -> Iterator[Macro]:
    baseline = frame.iloc[0]["baseline"]
    column = "peak_rss_mib" if frame["decode_peak_mib"].isna().any() else "decode_peak_mib"
    peaks = frame.groupby("arm", sort=False)[column].median()
    yield Macro(SETTING, "MemoryBaseline", code(baseline))
    yield Macro(SETTING, "MemoryPrompts", integer(frame["n"].max()))
    yield Macro(MEASURED, "MemoryPeak", integer(peaks[baseline]) + r"\,MiB")
    ratios = [f"{code(arm)} {_measured(times(peak / peaks[baseline]))}" for arm, peak in peaks.items() if arm != baseline]
    yield Macro(MEASURED, "MemoryRatios", listed(ratios), dressed=True)


def _rewind(frame: pd.DataFrame) -> Iterator[Macro]:
    by_context = frame.sort_values("context")
    yield Macro(MEASURED, "RewindTimes", listed(number(us, 1) for us in by_context["rewind_us"]) + r"\,\textmu s")
    yield Macro(SETTING, "RewindContexts", listed(integer(n) for n in by_context["context"]))
    yield Macro(SETTING, "RewindRepeats", integer(frame["repeats"].min()))


def _enumeration(frame: pd.DataFrame) -> Iterator[Macro]:
    yield Macro(MEASURED, "EnumerationCases", integer(len(frame)))
    yield Macro(MEASURED, "EnumerationBranches", integer(frame["branches"].sum()))
    yield Macro(MEASURED, "EnumerationDifference", significant(frame["difference"].abs().max()))
    yield Macro(MEASURED, "EnumerationPolicies", integer(frame["policy"].nunique()))
    yield Macro(MEASURED, "EnumerationRequests", integer(frame["requests"].max()))


def _draws(frame: pd.DataFrame) -> Iterator[Macro]:
    most, own = frame.loc[frame["n"].idxmax()], frame[frame["prompt"] != ALL_PROMPTS]
    yield Macro(MEASURED, "DrawsTests", integer(len(frame)))
    yield Macro(MEASURED, "DrawsFewest", integer(frame["n"].min()))
    yield Macro(MEASURED, "DrawsMost", integer(most["n"]))
    yield Macro(MEASURED, "DrawsSmallestP", significant(frame["p_adjusted"].min()))
    yield Macro(MEASURED, "DrawsRejected", integer((frame["p_adjusted"] <= SIGNIFICANCE).sum()))
    yield Macro(MEASURED, "DrawsDetectable", significant(most["detectable_tv"]))
    yield Macro(MEASURED, "DrawsIndependent", integer(len(own)))
    yield Macro(MEASURED, "DrawsTogether", significant(chi2_tail(own["chi2"].sum(), int(own["dof"].sum()))))
    whole = frame[frame["every_block_run"]]
    yield Macro(SETTING, "DrawsPrompts", integer(own["prompt"].nunique()))
    yield Macro(MEASURED, "DrawsWhole", integer(len(whole)))
    yield Macro(MEASURED, "DrawsRows", integer(whole["rows_compared"].sum()))
    yield Macro(MEASURED, "DrawsRowDifference", significant(whole["largest_row_difference"].max()))
    yield Macro(SETTING, "DrawsTokens", integer(frame["tokens"].max()))
    yield Macro(SETTING, "DrawsDtype", listed(code(dtype) for dtype in dict.fromkeys(frame["dtype"])))
    yield Macro(SETTING, "Significance", f"{SIGNIFICANCE:g}")
    yield Macro(SETTING, "Power", f"{POWER:g}")


def _texts(frame: pd.DataFrame) -> Iterator[Macro]:
    sentences = []
    for dtype, rows in frame.groupby("dtype", sort=False):
        equal, beyond = rows["equal"].sum(), beyond_rounding(rows).sum()
        prompts, ways, tokens = rows["prompt"].nunique(), rows["ways_per_prompt"].max(), rows["max_new_tokens"].max()
        extent = f"{integer(prompts)} prompts, {integer(ways)} ways each, {integer(tokens)} new tokens"
        all_of_them, apart, those = (_measured(integer(n)) for n in (len(rows), len(rows) - equal, beyond))
        left = f", and {those} of the other {apart} part by more than rounding explains" if equal < len(rows) else ""
        sentences.append(f"in {code(dtype)} {_measured(integer(equal))} of {all_of_them} texts are equal ({extent}){left}")
    yield Macro(MEASURED, "TextsEqual", "; ".join(sentences), dressed=True)
    yield Macro(SETTING, "TextsArms", integer(frame["arm"].nunique()))
    rounded = frame[(frame["dtype"] != "float32") & (frame["arm"] == "plain")]
    yield Macro(MEASURED, "TextsPlainApart", integer((~rounded["equal"]).sum()))
    yield Macro(MEASURED, "TextsPlain", integer(len(rounded)))


def _crossed(frame: pd.DataFrame) -> Iterator[Macro]:
    yield Macro(MEASURED, "CrossedEqual", integer(frame["equal"].sum()))
    yield Macro(MEASURED, "CrossedTexts", integer(frame["prompts"].sum()))
    yield Macro(MEASURED, "CrossedKept", integer(frame["accepted"].sum()))
    yield Macro(MEASURED, "CrossedRefused", integer(frame["rejected"].sum()))
    yield Macro(SETTING, "CrossedPrompts", integer(frame.groupby(["policy", "block_size"])["prompts"].sum().min()))
    yield Macro(SETTING, "CrossedPolicies", integer(frame["policy"].nunique()))
    yield Macro(SETTING, "CrossedSituations", integer(frame["situation"].nunique()))
    yield Macro(SETTING, "CrossedBlock", integer(frame["block_size"].max()))


def _planted(frame: pd.DataFrame) -> Iterator[Macro]:
    yield Macro(MEASURED, "PlantedCaught", integer((frame["caught_by"] != "").sum()))
    yield Macro(MEASURED, "PlantedBugs", integer(len(frame)))
    yield Macro(MEASURED, "PlantedSeen", integer((frame["seen_in"] != "").sum()))


def _killed(frame: pd.DataFrame) -> Iterator[Macro]:
    yield Macro(MEASURED, "KilledEqual", integer(frame["equal"].sum()))
    yield Macro(MEASURED, "KilledRuns", integer(len(frame)))
    jobs = [f"{_measured(integer(len(rows)))} of {escaped(job)}" for job, rows in frame.groupby("job", sort=False)]
    yield Macro(MEASURED, "KilledJobs", listed(jobs), dressed=True)


def _measured(text: str) -> str:
    return styled(MEASURED, text)
