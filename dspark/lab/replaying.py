"""What the panel reads from a recorded trace, so that any policy is replayed in milliseconds without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import shorten

from dspark.bench.prompts import DOMAINS, load_prompts
from dspark.bench.replay import replay
from dspark.bench.trace import Trace, copies, trace_decode
from dspark.files import data_dir
from dspark.lab.rounds import Run
from dspark.lab.text import remembered
from dspark.schedule import Autoregressive, make_policy

SAMPLE = data_dir() / "results" / "traces" / "sample.parquet"  # comes with the repository


def replayed_run(trace: Trace, kind: str, values: Mapping[str, float]) -> Run:
    """The run of a policy over the trace, beside plain decoding. Raises ValueError for values that the policy refuses."""
    rounds = replay(trace, make_policy(kind, values, lambda: trace.times.sps))
    words = {"arm": kind + "+copy" * copies(trace), "how": "replayed, seconds predicted from the trace's step times, n = 1 prompt"}
    decode, plain = remembered(trace_decode(trace)), replay(trace, Autoregressive())
    return Run(rounds=rounds, plain=plain, tokens=len(trace.token_ids), decode=decode, **words)


def lines_over(places: Iterable[float], trace: Trace, kind: str, values: dict[str, float], name: str) -> dict[str, list[float | None]]:
    """Speed-up and τ with each of these values of the parameter ``name``; None where it contradicts the others."""
    tallies = []
    for place in places:
        try:
            tallies.append(replayed_run(trace, kind, values | {name: place}).tally())
        except ValueError:
            tallies.append(None)
    return {"speed-up": [t and t.speedup for t in tallies], "τ": [t and t.tokens_per_round for t in tallies]}


def examples(recorded: Iterable[str]) -> list[tuple[str, str]]:
    """(label, prompt) of prompts to start from: those with a trace first, then one of each domain."""
    known = dict.fromkeys(recorded)
    others = [load_prompts(domain, "dev", 1)[0].messages[0]["content"] for domain in DOMAINS]
    return [("▶ " * (prompt in known) + shorten(prompt, 60, placeholder="…"), prompt) for prompt in known | dict.fromkeys(others)]
