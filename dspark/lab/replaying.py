"""What the panel reads from a recorded trace, so that any policy is replayed in milliseconds without a model."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from textwrap import shorten

from dspark.bench.prompts import DOMAINS, load_prompts
from dspark.bench.replay import replay
from dspark.bench.trace import Trace, copies, trace_decode
from dspark.files import data_dir
from dspark.lab.rounds import Run
from dspark.lab.text import remembered
from dspark.schedule import Autoregressive, make_policy

Replayer = Callable[[str, Mapping[str, float]], Run]  # a policy's name and the values of its parameters
SAMPLE = data_dir() / "results" / "traces" / "sample.parquet"  # comes with the repository


def replayer(trace: Trace) -> Replayer:
    """What gives a policy's run over the trace, beside plain decoding. It raises ValueError for values that the policy refuses."""
    decode, plain = remembered(trace_decode(trace)), replay(trace, Autoregressive())
    words = {"how": "replayed, seconds predicted from the trace's step times, n = 1 prompt", "tokens": len(trace.token_ids)}

    def run(kind: str, values: Mapping[str, float]) -> Run:
        rounds = replay(trace, make_policy(kind, values, lambda: trace.times.sps))
        return Run(rounds=rounds, plain=plain, arm=kind + "+copy" * copies(trace), decode=decode, **words)

    return run


def runs_over(places: Iterable[float], run: Replayer, kind: str, others: dict[str, float], name: str) -> list[Run | None]:
    """The runs with each of these values of the parameter ``name``; None where it contradicts the others."""
    runs = dict.fromkeys(places)
    for place in runs:
        with suppress(ValueError):
            runs[place] = run(kind, others | {name: place})
    return list(runs.values())


def examples(recorded: Iterable[str]) -> list[tuple[str, str]]:
    """(label, prompt) of prompts to start from: those with a trace first, then one of each domain."""
    known = dict.fromkeys(recorded)
    others = [load_prompts(domain, "dev", 1)[0].messages[0]["content"] for domain in DOMAINS]
    return [("▶ " * (prompt in known) + shorten(prompt, 60, placeholder="…"), prompt) for prompt in known | dict.fromkeys(others)]
