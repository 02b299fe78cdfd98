"""Results files that are about to be drawn: of this schema version, and with rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dspark.bench.plan import SCHEMA_VERSION
from dspark.bench.results import read_results, read_rows


def read_speed(path: Path) -> pd.DataFrame:
    """Rows of a speed or memory run. Raises ValueError for a file that is missing, foreign, empty, or of another schema version."""
    return read_rows(path, SCHEMA_VERSION, "python -m dspark.bench")


def read_unversioned(path: Path, remedy: str) -> pd.DataFrame:
    """Rows of a file whose rows carry no schema version. remedy: the command that makes it. Raises ValueError for a file that is
    missing, foreign, or empty."""
    frame = read_results(path)
    if frame.empty:
        raise ValueError(f"{path} has no rows: make it again with {remedy}")
    return frame
