"""Drafters side by side: acceptance by position, and τ by domain, depth, block size and head. Pure functions of the frames that
``python -m dspark.train compare`` writes: one results file per drafter, one of training records, one of step times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from dspark.bench import published
from dspark.bench.results import read_rows
from dspark.bench.stats import acceptance_by_position, interval
from dspark.lab.figures import FATES, dressed

LOOKS = {  # drafter → name, colour, dash
    "dspark": ("DSpark", FATES["draft"].colour(), "solid"),
    "dflash": ("DFlash (no sequential head)", FATES["correction"].colour(), "dash"),
    "eagle": ("autoregressive (EAGLE-3-like)", FATES["bonus"].colour(), "dot"),
}
SIZES = {"layers": "layers of the drafter (number)", "block_size": "block size γ (tokens)"}
REFERENCE = "dspark"
RESAMPLES = 2000
Z = 1.959964  # half of a 95 % interval in standard errors
TABLE_1 = f"{published.SOURCE}, {published.TABLE_1}, {published.COMPARED}"


def read_drafters(folder: Path, temperature: float) -> pd.DataFrame:
    """All comparisons in a results folder at one temperature; ``arm`` names the drafter. Empty if there are none.

    Raises ValueError if there is no such folder, or if the files were measured on different prompts, lengths or models.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: leave results empty for the committed ones")
    frames = [read_rows(path, "python -m dspark.train compare") for path in sorted(folder.glob(f"drafters-t{temperature:g}-*.parquet"))]
    return joined(frames, folder) if frames else pd.DataFrame()


def joined(frames: Sequence[pd.DataFrame], where: Path | str) -> pd.DataFrame:
    """Comparisons as one frame; ``arm`` names the drafter. Raises ValueError, which names ``where``, if they were not measured alike."""
    frame = pd.concat(frames, ignore_index=True)
    for column in ("split", "n", "max_new_tokens", "target_digest", "dtype", "seed"):
        if frame[column].nunique() > 1:
            raise ValueError(f"the drafters in {where} were measured with {column} {list(frame[column].unique())}: use the same for all")
    return frame.assign(arm=frame["drafter"])


def tau_table(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`tau_gains` for the reader: τ of every drafter by domain, the mean, and DSpark's gain with its interval."""
    gains = tau_gains(frame).set_index("drafter")
    ends = gains[["gain", "low", "high"]].itertuples()
    shown = ["–" if arm == REFERENCE else f"{gain:+.1%} [{low:+.1%}, {high:+.1%}]" for arm, gain, low, high in ends]
    return gains.drop(columns=["gain", "low", "high"]).map("{:.2f}".format).assign(**{f"gain of {REFERENCE}": shown})


def tau_gains(frame: pd.DataFrame) -> pd.DataFrame:
    """τ of every drafter, and how much DSpark's mean exceeds it, with a 95 % bootstrap interval over prompts.

    frame: one row per prompt with columns arm, domain, prompt_id, decoded_tokens, rounds. Returns columns drafter, τ of each domain,
    mean, gain, low, high.
    """
    pair = ["decoded_tokens", "rounds"]
    counts = {  # drafter → domain → [prompts, 2], paired by prompt
        arm: {d: part.sort_values("prompt_id")[pair].to_numpy(float) for d, part in rows.groupby("domain", sort=False)}
        for arm, rows in frame.groupby("arm", sort=False)
    }
    rng, lines = np.random.default_rng(0), []
    draws = {d: rng.integers(len(part), size=(RESAMPLES, len(part))) for d, part in counts[REFERENCE].items()}
    resampled = {arm: np.mean([_tau(part[draws[d]]) for d, part in by.items()], axis=0) for arm, by in counts.items()}
    means = {arm: np.mean([_tau(part) for part in by.values()]) for arm, by in counts.items()}
    for arm, by in counts.items():
        low, high = interval(resampled[REFERENCE] / resampled[arm] - 1)
        gain = {"mean": means[arm], "gain": means[REFERENCE] / means[arm] - 1, "low": low, "high": high}
        lines.append({"drafter": arm} | {domain: _tau(part) for domain, part in by.items()} | gain)
    return pd.DataFrame(lines)


def _tau(counts: np.ndarray) -> np.ndarray:
    """[..., prompts, (tokens, rounds)] → tokens over rounds."""
    tokens, rounds = np.moveaxis(counts.sum(-2), -1, 0)
    return tokens / np.maximum(rounds, 1)


def pooled_positions(frame: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Conditional acceptance in real decoding, all domains together.

    Columns drafter, position, n, acceptance, error (half of its 95 % interval).
    """
    counts = acceptance_by_position(frame[frame["arm"].isin(arms)]).groupby(["arm", "position"], sort=False)[["reached", "accepted"]].sum()
    counts = counts.reset_index().rename(columns={"arm": "drafter", "reached": "n"})
    share = counts["accepted"] / counts["n"]
    return counts.assign(acceptance=share, error=Z * np.sqrt(share * (1 - share) / counts["n"])).drop(columns="accepted")


def _lines(points: pd.DataFrame, x: str, y: str, **options: object) -> go.Figure:
    """One line per drafter, with its name, colour and dash."""
    points = points.assign(name=points["drafter"].map({drafter: name for drafter, (name, _, _) in LOOKS.items()}))
    colours, dashes = ({look[0]: look[i] for look in LOOKS.values()} for i in (1, 2))
    look = {"color": "name", "color_discrete_map": colours, "line_dash": "name", "line_dash_map": dashes, "markers": True}
    return px.line(points, x=x, y=y, category_orders={"name": list(colours)}, **look, **options)


def acceptance_figure(positions: pd.DataFrame, note: str) -> go.Figure:
    """The counterpart of the paper's Fig. 2: acceptance of drafts whose predecessors were all accepted, one line per drafter.

    positions: columns drafter, position, n, acceptance, error. note: what was counted, for the title.
    """
    up, down = (positions["error"].clip(upper=most) for most in (1 - positions["acceptance"], positions["acceptance"]))  # within 0 … 1
    figure = _lines(positions, "position", "acceptance", error_y=up, error_y_minus=down, hover_data=["n"])
    figure.update_xaxes(title="position in the block (tokens after the anchor)", dtick=1)
    figure.update_yaxes(title="conditional acceptance (share)")
    return dressed(figure, f"Acceptance by position ({note}, bars: 95 %)", 420)


def by_size(trained: pd.DataFrame, field: str) -> pd.DataFrame:
    """Held-out τ with and without the sequential head at every depth or block size.

    trained: training records (``drafters-trained.parquet``). field: a key of :data:`SIZES`; in the other field all drafters are like
    the base "dspark". Returns columns drafter ("dspark" or "dflash"), value, tau; empty if the base was not trained.
    """
    (other,) = SIZES.keys() - {field}
    base = trained.loc[trained["drafter"] == "dspark", other]
    kept = trained[trained["drafter"].str.fullmatch("(dspark|dflash)(-.*)?") & trained[other].isin(base)]
    sides = kept["drafter"].str.split("-").str[0]
    return pd.DataFrame({"drafter": sides, "value": kept[field], "tau": kept["held_out_tau"]}).sort_values(["drafter", "value"])


def size_figure(trained: pd.DataFrame, field: str) -> go.Figure:
    """The counterparts of Figs. 3 and 4: held-out τ over depth or block size. Raises ValueError if "dspark" was not trained."""
    points = by_size(trained, field)
    if points.empty:
        raise ValueError("'dspark' was not trained: run python -m dspark.train compare --only dspark")
    figure = _lines(points, "value", "tau")
    figure.update_xaxes(title=SIZES[field], tickvals=sorted(points["value"].unique()))
    figure.update_yaxes(title="τ on held-out text (tokens per round)")
    steps = ", ".join(map(str, sorted(trained["steps"].unique())))
    return dressed(figure, f"Tokens per round after {steps} steps of training (n = {len(points)} drafters)", 400)


def cost_table(times: pd.DataFrame) -> pd.DataFrame:
    """The cost of one block, medians over the repeats, and the sequential head's share of a round (Fig. 4).

    times: rows of :func:`dspark.train.compare.time_all`, in milliseconds.
    """
    titles = {"draft_ms": "draft (ms)", "head_ms": "of it the sequential head (ms)", "verify_ms": "verify (ms)"}
    medians = times.groupby("drafter", sort=False)[list(titles)].median()
    share = medians["head_ms"] / (medians["draft_ms"] + medians["verify_ms"])
    return medians.rename(columns=titles).round(2).assign(**{"head's share of a round": share.map("{:.1%}".format)})


def published_tau() -> pd.DataFrame:
    """τ as the paper reports it: drafter × benchmark, and DSpark's gain over each drafter, over all benchmarks (ratio of the means)."""
    rows = {name: published.TAU[published.COMPARED, theirs] for name, theirs in published.DRAFTERS.items()}
    frame = pd.DataFrame(rows, index=published.BENCHMARKS).T.rename_axis("drafter")
    return frame.assign(**{"DSpark's gain": [f"{published.gain(name):+.0%}" for name in frame.index]})
