"""``python -m dspark.lab.readme``: write the measured numbers of data/results into the README, between its two markers."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from dspark.bench.prompts import data_dir
from dspark.bench.results import read_rows
from dspark.bench.stats import ALL, summarise
from dspark.lab.static import caption
from dspark.proof.sampled import ALL_PROMPTS

BEGIN, END = "<!-- results -->", "<!-- /results -->"
FOLD = "<details><summary>More: other temperatures and processors, peers, memory, and that the text keeps the model's law</summary>"
MTP1 = "mtp1"
PICTURE = "![Speed-up over plain decoding and tokens per round, by domain](data/figures/headline.svg)"


def results_block(data: Path) -> str:
    """Markdown made of the picture and of every results file in the data folder; the same for the same files.

    The picture and the first table are seen at once, the rest is folded.
    """
    makers = {"speed": speed_markdown, "peers": speed_markdown, "identity": identity_line, "memory": memory_line, "sps": steps_line}
    files = sorted((data / "results").glob("*.parquet"), key=lambda path: path.stem)
    commands = dict.fromkeys(makers, "python -m dspark.bench") | {"sps": "python -m dspark.bench.sps"}
    parts = [make(read_rows(path, commands[kind])) for kind, make in makers.items() for path in files if path.stem.startswith(f"{kind}-")]
    first, *rest = [part for part in (*parts, proof_lines(data / "results")) if part] or [
        "No results are committed yet: `make bench` measures them."
    ]
    picture = [PICTURE] if (data / "figures" / "headline.svg").is_file() else []
    return "\n\n".join([*picture, first, *([FOLD, *rest, "</details>"] if rest else [])])


def speed_markdown(frame: pd.DataFrame) -> str:
    """One table: a line per arm; per domain the speed-up with its interval, and τ where something was drafted."""
    baseline = frame.iloc[0]["baseline"]
    lines = summarise(frame, baseline)
    domains = list(dict.fromkeys(lines["domain"]))
    rows = [f"Speed-up over `{baseline}` [95 % interval], τ ({caption(frame)}):", ""]
    rows += ["| | " + " | ".join("geometric mean" if d == ALL else d for d in domains) + " |", "|---" * (len(domains) + 1) + "|"]
    for arm in dict.fromkeys(lines["arm"]):
        if arm != baseline:
            of_arm = lines[lines["arm"] == arm].set_index("domain")
            rows.append(f"| `{arm}` | " + " | ".join(_cell(of_arm.loc[d]) for d in domains) + " |")
    remarks = [remark for remark in (_over_mtp1(frame), _same_texts(frame)) if remark]
    return "\n".join(rows) + "".join(f"\n\n{remark}" for remark in remarks)


def _cell(line: pd.Series) -> str:
    text = f"{line['speedup']:.2f}× [{line['low']:.2f}, {line['high']:.2f}]"
    return text + (f", τ {line['tokens_per_round']:.2f}" if line["tokens_per_round"] > 1 else "")


def _over_mtp1(frame: pd.DataFrame) -> str:
    """What the published range was measured against; empty for a run without it."""
    if MTP1 not in set(frame["arm"]):
        return ""
    lines = summarise(frame, MTP1)
    lines = lines[(lines["domain"] == ALL) & (lines["tokens_per_round"] > 1) & (lines["arm"] != MTP1)]
    ratios = (f"`{line['arm']}` {line['speedup']:.2f}× [{line['low']:.2f}, {line['high']:.2f}]" for _, line in lines.iterrows())
    return f"Over `{MTP1}`, geometric mean: {', '.join(ratios)}."


def _same_texts(frame: pd.DataFrame) -> str:
    """How many greedy texts came out token for token as the baseline's; empty where text was sampled."""
    if frame["temperature"].max() > 0:
        return ""
    baseline, of_arms = frame.iloc[0]["baseline"], frame.groupby("arm", sort=False)["equals_baseline"]
    counts = (f"`{arm}` {int(equal.sum())} of {len(equal)}" for arm, equal in of_arms if arm != baseline)
    return f"Texts that are `{baseline}`'s token for token: {', '.join(counts)}."


def identity_line(frame: pd.DataFrame) -> str:
    """One sentence: in how many cases the greedy text is ``model.generate``'s."""
    prompts, arms = frame["prompt_id"].nunique(), frame["arm"].nunique()
    return (
        f"Greedy text in {frame.iloc[0]['dtype']} equals `model.generate(do_sample=False)` token for token in {frame['equal'].sum()} "
        f"of {len(frame)} cases ({prompts} prompts × {arms} ways to decode)."
    )


def memory_line(frame: pd.DataFrame) -> str:
    """One sentence: peak memory of every arm while decoding (of the whole process where that is not known), over the baseline's."""
    baseline = frame.iloc[0]["baseline"]
    column = "peak_rss_mib" if frame["decode_peak_mib"].isna().any() else "decode_peak_mib"
    peaks = frame.groupby("arm", sort=False)[column].median()
    ratios = ", ".join(f"`{arm}` {peak / peaks[baseline]:.2f}×" for arm, peak in peaks.items() if arm != baseline)
    first = frame.iloc[0]
    place = f"{first['threads']} threads of {first['machine']}" if first["device"] == "cpu" else str(first["device"])
    prompts = f"n = {first['n']} {'prompt' if first['n'] == 1 else 'prompts'} a domain"
    return f"Peak memory against `{baseline}` ({peaks[baseline]:.0f} MiB; {prompts}; {place}): {ratios}."


def steps_line(frame: pd.DataFrame) -> str:
    """One sentence: what a pass over one token takes, and over two and six. A token alone that takes longer than two attends slowly."""
    first, passes = frame.iloc[0], frame[frame["kind"] == "verify"].pivot(index="context", columns="tokens", values="seconds")
    place = f"{first['threads']} threads of {first['machine']}" if first["device"] == "cpu" else str(first["device"])
    told = ", ".join(
        f"{1e3 * row[1]:.1f}, {1e3 * row[2]:.1f} and {1e3 * row[6]:.1f} ms behind {n:,} tokens" for n, row in passes.iterrows()
    )
    return f"A pass of the target over one, two and six tokens takes {told} ({first['dtype']}, {place}, medians)."


def proof_lines(results: Path) -> str:
    """A list with one sentence per finished part of the proof of exactness; empty if there is none."""
    sayings = {
        "enumeration": _enumerated,
        "sampled": _sampled,
        "texts": _texts,
        "crossed": _crossed,
        "planted": _planted,
        "killed": _killed,
    }
    paths = {name: results / f"proof-{name}.parquet" for name in sayings}
    lines = [f"- {say(read_rows(paths[name], 'make proof'))}" for name, say in sayings.items() if paths[name].is_file()]
    return (
        "\n".join(["That the text keeps the model's law (`make proof`, [notebook](notebooks/07_losslessness.ipynb)):", "", *lines])
        if lines
        else ""
    )


def _enumerated(frame: pd.DataFrame) -> str:
    largest = frame["difference"].abs().max()
    return f"small models, every branch, in fractions: {len(frame)} cases, {frame['branches'].sum():,} branches, difference {largest:g}"


def _sampled(frame: pd.DataFrame) -> str:
    most, whole = frame.loc[frame["n"].idxmax()], frame["every_block_run"].sum()
    prompts = frame.loc[frame["prompt"] != ALL_PROMPTS, "prompt"].nunique()
    return (
        f"the shipped model in {' and '.join(dict.fromkeys(frame['dtype']))}, {prompts} prompts, "
        f"{len(frame)} χ² tests of {frame['n'].min():,} to {most['n']:,} draws, {whole} of them with "
        "every block run through target and cache, the others with their rows remembered: smallest p after Holm's correction "
        f"{frame['p_adjusted'].min():.2g}; with the most draws a total variation of "
        f"{most['detectable_tv']:.2g} is caught with power 0.9"
    )


def _texts(frame: pd.DataFrame) -> str:
    sentences = []
    for dtype, rows in frame.groupby("dtype", sort=False):
        apart = rows[~rows["equal"]]
        above = (apart["margin"] > apart["noise"]).sum()
        ways, all_ways = rows["ways_per_prompt"].max(), rows["arm"].nunique()
        each = f"{ways} ways" if ways == all_ways else f"{ways} of {all_ways} ways"
        of_what = f"{rows['prompt'].nunique()} prompts, each decoded in {each}, {rows['max_new_tokens'].max()} new tokens"
        words = f"greedy text in {dtype}: {rows['equal'].sum()} of {len(rows)} are `model.generate`'s ({of_what})"
        sentences.append(words + (f", {above} of the others part by more than rounding explains" if len(apart) else ""))
    return "; ".join(sentences)


def _crossed(frame: pd.DataFrame) -> str:
    one_way = frame.groupby(["policy", "block_size"])["prompts"].sum().min()
    return (
        f"greedy text of tiny random models in float32: {frame['equal'].sum():,} of {frame['prompts'].sum():,} are `model.generate`'s "
        f"({one_way} prompts in {frame['situation'].nunique()} situations, each with {frame['policy'].nunique()} policies at block sizes "
        f"{frame['block_size'].min()} to {frame['block_size'].max()}; {frame['accepted'].sum():,} drafts kept, "
        f"{frame['rejected'].sum():,} refused)"
    )


def _planted(frame: pd.DataFrame) -> str:
    return f"planted bugs: {(frame['caught_by'] != '').sum()} of {len(frame)} caught by a named test"


def _killed(frame: pd.DataFrame) -> str:
    jobs = ", ".join(f"{len(rows)} of {job}" for job, rows in frame.groupby("job", sort=False))
    return f"killed at random moments and resumed ({jobs}): {frame['equal'].sum()} of {len(frame)} end as if never killed"


def rewritten(readme: str, block: str) -> str:
    """The README with ``block`` between its markers. Raises ValueError unless each marker stands in it once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the README must hold {BEGIN} and {END} once each, in this order: put them back")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """The command. Returns the exit status: 0, or 1 for bad input."""
    try:
        readme = data_dir().parent / "README.md"
        readme.write_text(rewritten(readme.read_text(encoding="utf-8"), results_block(data_dir())), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"dspark.lab.readme: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
