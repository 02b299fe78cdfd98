"""Where a row comes from: machine, versions, git revision, models."""

import math
import os
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

import torch
import transformers

import dspark
from dspark.bench.results import SCHEMA_VERSION
from dspark.draft.drafter import Drafter
from dspark.files import weights_digest
from dspark.target.target import Target
from dspark.tune.profile import cpu_name, device_name


def machine() -> dict[str, object]:
    """Columns of the machine and of what is installed on it."""
    return {
        "machine": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dspark": dspark.__version__,
    }


def environment(target: Target) -> dict[str, object]:
    """Columns that all rows of a process share."""
    return {
        "target": target.name,
        "target_digest": target.digest,
        "dtype": str(target.dtype).removeprefix("torch."),
        "pass": target.pass_name,
        "device": device_name(target.device),
        **machine(),
        "revision": revision(),
        "schema_version": SCHEMA_VERSION,
    }


def drafter_columns(drafter: Drafter | None) -> dict[str, object]:
    """Columns that describe the drafter; empty ones for arms without it."""
    values = ("", 0, 0, "", 0)
    if drafter is not None:
        c = drafter.config
        values = (drafter_digest(drafter), c.block_size, c.num_hidden_layers, f"{c.markov_head_type}-{c.markov_rank}", c.draft_vocab_size)
    return dict(zip((f"drafter_{name}" for name in ("digest", "block_size", "layers", "head", "vocab")), values, strict=True))


def drafter_digest(drafter: Drafter) -> str:
    """16 hex digits that change with training or calibration."""
    return weights_digest(drafter, repr(drafter.sts_temperatures))


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def revision() -> str:
    """Short git hash of the running code, with "-dirty" if tracked files were changed; "unknown" outside git."""
    git = ["git", "--no-optional-locks", "-C", str(Path(dspark.__file__).parent)]
    run = partial(subprocess.run, capture_output=True, text=True, timeout=30, check=True)
    try:
        # An installed copy may lie inside another repository: only a tracked file has a revision.
        run([*git, "ls-files", "--error-unmatch", "__init__.py"])
        return run([*git, "describe", "--always", "--dirty", "--exclude=*"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def utc() -> str:
    """Now, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_rss_mib() -> float:
    """Peak memory of this process, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def peaks(device: torch.device) -> dict[str, float]:
    """Columns of the peak memory of this process, MiB: of the whole process, and of the GPU; NaN without one."""
    gpu = torch.cuda.max_memory_allocated(device) / (1 << 20) if device.type == "cuda" else math.nan
    return {"peak_rss_mib": peak_rss_mib(), "device_peak_mib": gpu}
