"""Parts of RESULTS.md: Markdown made from frames of result files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from dspark.bench.stats import ALL, summarise

MTP1 = "mtp1"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of ready cells."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def paragraphs(parts: Iterable[str]) -> str:
    """The parts that are not empty, with a blank line between them."""
    return "\n\n".join(part for part in parts if part)


def place(frame: pd.DataFrame) -> str:
    """Where the rows were measured: threads and processor, or the device."""
    first = frame.iloc[0]
    return f"{first['threads']} threads of {first['machine']}" if first["device"] == "cpu" else str(first["device"])


def caption(frame: pd.DataFrame) -> str:
    """What a speed file measured, in one line."""
    first = frame.iloc[0]
    sampling = "greedy" if first["temperature"] == 0 else f"temperature {first['temperature']:g}"
    return (
        f"{first['target']}, {sampling}, {first['dtype']}, {first['max_new_tokens']} new tokens, "
        f"n = {first['n']} {first['split']} prompts per domain, {place(frame)}"
    )


def speed_table(frame: pd.DataFrame, remarks: bool = True) -> str:
    """One row per arm: speed-up over the run's baseline with its interval in every domain, and τ where something was drafted.

    remarks: say before the table how the arms compare to MTP-1 and how many texts equal the baseline's.
    """
    baseline = frame.iloc[0]["baseline"]
    lines = summarise(frame, baseline).set_index(["arm", "domain"])
    domains = [*dict.fromkeys(frame["domain"]), ALL]
    arms = [arm for arm in dict.fromkeys(frame["arm"]) if arm != baseline]
    rows = [[f"`{arm}`", *(_cell(lines.loc[(arm, domain)]) for domain in domains)] for arm in arms]
    words = [
        f"Speed-up over `{baseline}` [95 % interval], τ ({caption(frame)}).",
        *([over_mtp1(frame), same_texts(frame)] if remarks else []),
    ]
    return paragraphs([" ".join(filter(None, words)), table(["", *domains[:-1], "geometric mean"], rows)])


def _cell(line: pd.Series) -> str:
    text = f"{line['speedup']:.2f}× [{line['low']:.2f}, {line['high']:.2f}]"
    return text + (f", τ {line['tokens_per_round']:.2f}" if line["tokens_per_round"] > 1 else "")


def over_mtp1(frame: pd.DataFrame) -> str:
    """Speed-ups over MTP-1, the baseline of the published range; empty for a run without it."""
    if MTP1 not in set(frame["arm"]):
        return ""
    lines = summarise(frame, MTP1)
    lines = lines[(lines["domain"] == ALL) & (lines["tokens_per_round"] > 1) & (lines["arm"] != MTP1)]
    ratios = (f"`{line['arm']}` {line['speedup']:.2f}× [{line['low']:.2f}, {line['high']:.2f}]" for _, line in lines.iterrows())
    return f"Over `{MTP1}`, geometric mean: {', '.join(ratios)}."


def same_texts(frame: pd.DataFrame) -> str:
    """How many greedy texts equal the baseline's token for token; empty where text was sampled."""
    if frame["temperature"].max() > 0:
        return ""
    baseline, by_arm = frame.iloc[0]["baseline"], frame.groupby("arm", sort=False)["equals_baseline"]
    counts = (f"`{arm}` {int(equal.sum())} of {len(equal)}" for arm, equal in by_arm if arm != baseline)
    return f"Texts equal to those of `{baseline}`, token for token: {', '.join(counts)}."
