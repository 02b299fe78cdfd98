"""Complete traces → how every policy would have done on the same texts with the same step times. Replayed, so computed, not timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from dspark.bench.policies import (
    ALL,
    ORACLE,
    PREFIX,
    PRICED,
    against_windows,
    against_windows_interval,
    has_windows,
    pooled,
    replayed,
    timed_against_windows,
    windows,
)
from dspark.bench.trace_file import traces_of
from dspark.paper.macros import MEASURED, SETTING, SIMULATED, Macro, code, escaped, integer, number, percent, styled, times
from dspark.paper.part import Part
from dspark.paper.tables import floated, tabular

FILE = "traces-test"
PEERS = "peers-"  # how the names of runs begin in which all policies were timed
OTHERS = ("mtp1", "adaptive", "confidence:0.1", "confidence:0.3", "confidence:0.5", PREFIX, PRICED, ORACLE)
GOAL = 0.97  # of the tokens per second of the best fixed window of each domain
NAMES = {PREFIX: "Prefix", PRICED: "Priced", "adaptive": "Adaptive"}  # policies whose verdict the text speaks


def flags(frames: Mapping[str, pd.DataFrame]) -> dict[str, bool]:
    return {"TimedPolicies": _peers(frames) is not None}


def _peers(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame | None:
    """A run in which fixed windows and the prefix scheduler were timed side by side."""
    return next((frame for name, frame in frames.items() if name.startswith(PEERS) and has_windows(frame)), None)


def part(frames: Mapping[str, pd.DataFrame]) -> Part:
    """Every fixed window and OTHERS."""
    if FILE not in frames:
        return Part()
    traces = traces_of(frames[FILE])
    block_size = int(traces[0][1].about["block_size"])
    found = replayed(traces, ["plain", *windows(block_size), *OTHERS])
    lines = pooled(found)
    n, tokens = len(traces), traces[0][1].about["max_new_tokens"]
    first = frames[FILE].iloc[0]
    place = f"{first['threads']} threads of {first['machine']}"
    return Part(
        (*_macros(lines, n, tokens, block_size), *_intervals(found), *_timed(_peers(frames))),
        {"table-policies": table(lines, n, place, "tab:policies")},
    )


def _macros(lines: pd.DataFrame, n: int, tokens: int, block_size: int) -> Iterator[Macro]:
    yield Macro(SETTING, "PolicyTexts", integer(n))
    yield Macro(SETTING, "PolicyTokens", integer(tokens))
    yield Macro(SETTING, "PolicyWindows", integer(block_size))
    yield Macro(SETTING, "PolicyGoal", percent(GOAL))
    whole = lines[lines["domain"] == ALL].set_index("policy")
    single = whole.loc[windows(block_size), "tokens_per_second"]
    yield Macro(SIMULATED, "PolicyBestWindow", code(single.idxmax()))
    yield Macro(SIMULATED, "PolicyWorstWindow", code(single.idxmin()))
    yield Macro(SIMULATED, "PolicyBestWindowSpeedup", times(whole.loc[single.idxmax(), "speedup"]))
    yield Macro(SIMULATED, "PolicyOracleSpeedup", times(whole.loc[ORACLE, "speedup"]))
    for name, mine, best in zip(("Drafting", "Checking"), _milliseconds(whole.loc[PREFIX]), _milliseconds(whole.loc[ORACLE]), strict=True):
        yield Macro(SIMULATED, f"PolicyOracle{name}", number(mine - best, 1) + r"\,ms")
    thresholds = whole[whole.index.str.startswith("confidence:")]["tokens_per_second"]
    yield Macro(SIMULATED, "PolicyThreshold", code(thresholds.idxmax()))
    yield Macro(SIMULATED, "PolicyThresholdSingle", percent(against_windows(lines, thresholds.idxmax())["single"], 1))
    for policy, name in NAMES.items():
        found, mine = against_windows(lines, policy), whole.loc[policy]
        yield Macro(SIMULATED, f"Policy{name}Speedup", times(mine["speedup"]))
        yield Macro(SIMULATED, f"Policy{name}Checked", number(mine["checked"]))
        yield Macro(SIMULATED, f"Policy{name}Accepted", percent(mine["acceptance"]))
        yield Macro(SIMULATED, f"Policy{name}Hindsight", percent(found["hindsight"], 1))
        yield Macro(SIMULATED, f"Policy{name}Goal", "reached" if found["hindsight"] >= GOAL else "missed")
        yield Macro(SIMULATED, f"Policy{name}Least", percent(found["worst"], 1))
        yield Macro(SIMULATED, f"Policy{name}LeastDomain", escaped(found["worst_domain"]))
        yield Macro(SIMULATED, f"Policy{name}Single", percent(found["single"], 1))
        yield Macro(SIMULATED, f"Policy{name}OverWorst", percent(mine["tokens_per_second"] / single.min(), 1))


def _intervals(found: pd.DataFrame) -> Iterator[Macro]:
    """Over prompts, of the prefix scheduler against fixed windows."""
    for of, (low, high) in against_windows_interval(found, PREFIX).items():
        for end, value in (("Low", low), ("High", high)):
            yield Macro(SIMULATED, f"PolicyPrefix{of.capitalize()}{end}", percent(value, 1))


def _timed(run: pd.DataFrame | None) -> Iterator[Macro]:
    """What the clock said of the prefix scheduler and the best fixed window of all domains together."""
    if run is None:
        return
    found = timed_against_windows(run)
    yield Macro(SETTING, "TimedPrompts", integer(found["n"]))
    yield Macro(MEASURED, "TimedWindow", code(found["best_single"]))
    yield Macro(MEASURED, "TimedPrefix", times(found["single"]))
    yield Macro(MEASURED, "TimedPrefixLow", number(found["low"]))
    yield Macro(MEASURED, "TimedPrefixHigh", number(found["high"]))
    yield Macro(MEASURED, "TimedPrefixSpeedup", times(found["speedup"]))


def _milliseconds(line: pd.Series) -> tuple[float, float]:
    """Of a token: drafting, and all else."""
    whole, share = 1e3 / line["tokens_per_second"], line["draft_share"]
    return share * whole, (1 - share) * whole


def table(lines: pd.DataFrame, n: int, place: str, label: str) -> str:
    """lines: of :func:`dspark.bench.policies.pooled` · place: where the step times were measured."""
    whole = lines[lines["domain"] == ALL].set_index("policy")
    domains = [domain for domain in dict.fromkeys(lines["domain"]) if domain != ALL]
    by_domain = lines.set_index(["policy", "domain"])["speedup"]
    rows = []
    for policy, line in whole.drop("plain").iterrows():
        found = against_windows(lines, policy)
        values = [number(line["tokens_per_round"]), number(line["checked"]), percent(line["acceptance"])]
        values += [times(by_domain[(policy, domain)]) for domain in domains]
        values += [times(line["speedup"]), percent(found["hindsight"], 1), percent(found["single"], 1)]
        rows.append([code(policy), *(styled(SIMULATED, value) for value in values)])
    heads = ["policy", r"$\tau$", "checked", "accepted", *map(escaped, domains), "all", "of best each", "of best one"]
    about = (
        f"Every policy, replayed over the same {styled(SETTING, integer(n))} greedy texts with the same step times, those of "
        f"{escaped(place)}: tokens and checked drafts per round, share of the checked drafts accepted, speed-up over plain decoding by "
        "domain and in the geometric mean, and tokens per second against the fixed window that is the best in each domain once all is "
        "known, and against the best single one. The oracle is a bound, no policy."
    )
    return floated(tabular("l" + "r" * (len(heads) - 1), heads, rows, size=r"\scriptsize\setlength{\tabcolsep}{4pt}"), about, label)
