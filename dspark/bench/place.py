"""Where a measurement goes that was given no --out: into runs/bench. What is committed lies in data/results and is never written over."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dspark.bench.plan import Plan

FOLDER = Path("runs") / "bench"


def place(name: str, plan: Plan) -> Path:
    """A file in the working directory, another one for other options: a run does not end at what an earlier one has left there."""
    options = hashlib.sha256(repr(plan).encode()).hexdigest()[:6]
    return FOLDER / f"{name}-{options}.parquet"
