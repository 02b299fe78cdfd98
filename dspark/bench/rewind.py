"""The time of one ``cache.rewind`` at several context lengths. It should not depend on them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import Tensor

from dspark.bench.markdown import place
from dspark.bench.plan import Plan
from dspark.bench.provenance import environment
from dspark.bench.results import write_results
from dspark.clock import now
from dspark.load import load_target
from dspark.rewind import RewindCache
from dspark.target.target import Target

LENGTHS = (100, 1_000, 8_000)
BLOCK = 8  # tokens rejected each time
REPEATS = 500


def measure_rewind(plan: Plan, out: Path) -> pd.DataFrame:
    """One row per context length: the median and the 95th percentile of one rewind, µs."""
    target = load_target(plan.target, dtype=plan.dtype, device=plan.device)
    frame = pd.DataFrame([{"context": n} | rewind_microseconds(target, n) for n in LENGTHS])
    frame = frame.assign(utc=datetime.now(UTC).isoformat(timespec="seconds"), **environment(target))
    write_results(frame, out)
    return frame


def rewind_microseconds(target: Target, context: int) -> dict[str, float]:
    """Fill a cache of the target's shape with one token's keys and values, then extend by a block and rewind past it, again and again."""
    cache = target.new_cache()
    seconds = []
    with torch.inference_mode():
        target.forward(torch.zeros(1, 1, dtype=torch.long, device=target.device), cache)
        token = [(layer.kv.keys[:, :, :1].clone(), layer.kv.values[:, :, :1].clone()) for layer in cache.layers]
        _extend(cache, token, context - 1)
        for _ in range(REPEATS):
            _extend(cache, token, BLOCK)
            start = now(target.device)
            cache.rewind(context)
            seconds.append(now(target.device) - start)
    return {"rewind_us": 1e6 * median(seconds), "rewind_p95_us": 1e6 * sorted(seconds)[int(0.95 * REPEATS)], "repeats": REPEATS}


def _extend(cache: RewindCache, token: list[tuple[Tensor, Tensor]], times: int) -> None:
    for i, (keys, values) in enumerate(token):
        cache.update(keys.expand(-1, -1, times, -1), values.expand(-1, -1, times, -1), i)


def rewind_table(frame: pd.DataFrame) -> str:
    """For the terminal."""
    shown = frame[["context", "rewind_us", "rewind_p95_us"]].round(1).to_string(index=False)
    return (
        f"one rewind in µs, median and 95th percentile of {frame.iloc[0]['repeats']}, {frame.iloc[0]['target']} on {place(frame)}\n{shown}"
    )
