"""Peak memory of each arm, each in a process of its own: a peak never falls, so arms cannot share one."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch

from dspark.bench.plan import Plan, rotated
from dspark.bench.process import in_new_process
from dspark.bench.provenance import peak_rss_mib
from dspark.bench.results import Ledger, Row
from dspark.bench.speed import constant_columns


def measure_memory(plan: Plan, out: Path) -> pd.DataFrame:
    """One row per arm and repeat. Resumes. The parent never loads a model, as a child's count starts at its parent's peak."""
    plan.check("memory")
    ledger = Ledger(out, plan.configuration("memory", "", None))
    names = [arm.name for arm in plan.parsed_arms]
    runs = {f"{repeat}/{name}": (repeat, name) for repeat in range(plan.repeats) for name in rotated(names, repeat)}
    return ledger.run(runs, lambda run: [{"repeat": run[0]} | in_new_process(peak_of, replace(plan, arms=run[1], repeats=1))])


def peak_of(plan: Plan) -> Row:
    """Load the plan's one arm, decode all prompts, and return how much memory that took.

    peak_rss_mib: of the whole process, loading included.
    decode_peak_mib: while decoding, weights included; NaN where the system cannot restart its count.
    device_peak_mib: the same on a GPU; NaN without one.
    """
    (arm,) = plan.parsed_arms
    torch.set_num_threads(plan.threads)
    models = plan.load()
    target = models.target
    decoder = models.decoder(arm, plan.settings)
    restarted = _restart_peak(target.device)
    tokens = sum(len(decoder(target.encode(unit.item.messages), unit.seed).token_ids) for unit in plan.units)
    gpu = target.device.type == "cuda"
    return {
        "arm": arm.name,
        "tokens": tokens,
        "peak_rss_mib": peak_rss_mib(),
        "decode_peak_mib": _high_water_mib() if restarted else math.nan,
        "device_peak_mib": torch.cuda.max_memory_allocated(target.device) / (1 << 20) if gpu else math.nan,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    } | constant_columns(plan, models)[arm.name]


def _restart_peak(device: torch.device) -> bool:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM restarts at the current size
    except OSError:
        return False
    return True


def _high_water_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
