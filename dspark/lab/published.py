"""What the paper reports, to be printed beside what was measured here. Quoted (:mod:`dspark.bench.published`), never measured by us."""

from __future__ import annotations

import pandas as pd

from dspark.bench import published

TABLE_1 = f"{published.SOURCE}, {published.TABLE_1}, {published.COMPARED}"


def published_tau() -> pd.DataFrame:
    """Drafter × benchmark, and how much more DSpark commits per round than each, over all benchmarks (ratio of the means)."""
    rows = {name: published.TAU[published.COMPARED, theirs] for name, theirs in published.DRAFTERS.items()}
    frame = pd.DataFrame(rows, index=published.BENCHMARKS).T.rename_axis("drafter")
    return frame.assign(**{"DSpark's gain": [f"{published.gain(name):+.0%}" for name in frame.index]})
