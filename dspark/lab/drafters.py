"""Drafters side by side: acceptance by position, τ by domain, by depth, block size and head, and what the Markov bias does to a token.

Frames are those of ``python -m dspark.train compare`` (one results file per drafter that decoded, one of training records), or of a
short run here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from dspark.bench import published
from dspark.bench.speed import read_speed
from dspark.bench.stats import acceptance_by_position, interval
from dspark.draft.drafter import Drafter
from dspark.lab.figures import FATES, GREY, dressed
from dspark.target.target import Target

LOOKS = {  # drafter → name, colour, dash
    "dspark": ("DSpark", FATES["draft"].colour(), "solid"),
    "dflash": ("DFlash (no sequential head)", FATES["correction"].colour(), "dash"),
    "eagle": ("autoregressive (EAGLE-3-like)", FATES["bonus"].colour(), "dot"),
}
HEAD_OFF = "the same drafter, its head switched off"
OTHER = (GREY, "dashdot")
Z = 1.959964  # standard errors to either side of a share: 95 %


def read_drafters(folder: Path, temperature: float) -> pd.DataFrame:
    """All comparisons in a results folder at one temperature; ``arm`` names the drafter. Empty if there are none.

    Raises ValueError if there is no such folder, and where files were measured on different prompts, lengths or models: they cannot be
    compared.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: leave results empty for the committed ones")
    frames = [read_speed(path, "python -m dspark.train compare") for path in sorted(folder.glob(f"drafters-t{temperature:g}-*.parquet"))]
    if not frames:
        return pd.DataFrame()
    return joined(frames, folder)


def joined(frames: Sequence[pd.DataFrame], where: Path | str) -> pd.DataFrame:
    """Comparisons as one frame, whose ``arm`` names the drafter. where: for the message of a ValueError if they were not measured alike."""
    frame = pd.concat(frames, ignore_index=True)
    for column in ("split", "n", "max_new_tokens", "target_digest", "dtype", "seed"):
        if frame[column].nunique() > 1:
            raise ValueError(f"the drafters in {where} were measured with {column} {list(frame[column].unique())}: measure them alike")
    return frame.assign(arm=frame["drafter"])


# ---- figures and tables of measured rows


def tau_table(frame: pd.DataFrame, reference: str = "dspark", resamples: int = 2000) -> pd.DataFrame:
    """:func:`tau_gains` in words: τ of every drafter by domain, their mean, and the reference's gain with its interval."""
    lines = []
    for row in tau_gains(frame, reference, resamples).to_dict("records"):
        arm, gain, low, high = (row.pop(name) for name in ("drafter", "gain", "low", "high"))
        told = "–" if arm == reference else f"{gain:+.1%} [{low:+.1%}, {high:+.1%}]"
        lines.append({"drafter": arm} | {name: f"{tau:.2f}" for name, tau in row.items()} | {f"gain of {reference}": told})
    return pd.DataFrame(lines).set_index("drafter")


def tau_gains(frame: pd.DataFrame, reference: str = "dspark", resamples: int = 2000) -> pd.DataFrame:
    """Columns drafter, one for each domain's τ, mean, and gain, low, high: by which share the reference's mean exceeds it, with the
    95 % bootstrap interval over prompts.

    frame: rows of one prompt each, columns arm, domain, prompt_id, decoded_tokens, rounds. Raises ValueError if the reference was
    not measured.
    """
    if reference not in set(frame["arm"]):
        raise ValueError(f"{reference!r} was not measured: choose one of {', '.join(sorted(set(frame['arm'])))}")
    pair = ["decoded_tokens", "rounds"]
    counts = {  # drafter → domain → [prompts, 2], paired by prompt
        arm: {d: part.sort_values("prompt_id")[pair].to_numpy(float) for d, part in rows.groupby("domain", sort=False)}
        for arm, rows in frame.groupby("arm", sort=False)
    }
    rng, lines = np.random.default_rng(0), []
    draws = {d: rng.integers(len(part), size=(resamples, len(part))) for d, part in counts[reference].items()}
    resampled = {arm: np.mean([_tau(part[draws[d]]) for d, part in by.items()], axis=0) for arm, by in counts.items()}
    for arm, by in counts.items():
        taus = {domain: _tau(part) for domain, part in by.items()}
        mean = np.mean(list(taus.values()))
        gain = np.mean([_tau(part) for part in counts[reference].values()]) / mean - 1
        low, high = interval(resampled[reference] / resampled[arm] - 1)
        lines.append({"drafter": arm} | taus | {"mean": mean, "gain": gain, "low": low, "high": high})
    return pd.DataFrame(lines)


def _tau(counts: np.ndarray) -> np.ndarray:
    """[..., prompts, (tokens, rounds)] → tokens over rounds."""
    tokens, rounds = np.moveaxis(counts.sum(-2), -1, 0)
    return tokens / np.maximum(rounds, 1)


def pooled_positions(frame: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Conditional acceptance in real decoding, all domains together: columns drafter, position, n, acceptance, error (half of
    its 95 % interval)."""
    counts = acceptance_by_position(frame[frame["arm"].isin(arms)]).groupby(["arm", "position"], sort=False)[["reached", "accepted"]].sum()
    counts = counts.reset_index().rename(columns={"arm": "drafter", "reached": "n"})
    share = counts["accepted"] / counts["n"]
    return counts.assign(acceptance=share, error=Z * np.sqrt(share * (1 - share) / counts["n"])).drop(columns="accepted")


def acceptance_figure(positions: pd.DataFrame, note: str) -> go.Figure:
    """Fig. 2's twin: of the drafts whose predecessors were all right, how many are? One line per drafter, n in the tooltip.

    positions: columns drafter, position, n, acceptance, error · note: what was counted, for the title.
    """
    figure = go.Figure()
    for drafter, rows in positions.groupby("drafter", sort=False):
        up, down = rows["error"].clip(upper=1 - rows["acceptance"]), rows["error"].clip(upper=rows["acceptance"])  # a share ends at 0 and 1
        name, colour, dash = LOOKS.get(drafter, (drafter, *(LOOKS["dflash"][1:] if drafter == HEAD_OFF else OTHER)))
        figure.add_trace(
            go.Scatter(
                x=rows["position"],
                y=rows["acceptance"],
                error_y={"array": up, "arrayminus": down, "color": colour, "thickness": 1},
                name=name,
                mode="lines+markers",
                line={"color": colour, "dash": dash, "width": 2.5},
                customdata=rows["n"],
                hovertemplate=name + "<br>position %{x}: %{y:.3f}, n = %{customdata}<extra></extra>",
            )
        )
    figure.update_xaxes(title="position in the block (tokens behind the anchor)", dtick=1)
    figure.update_yaxes(title="conditional acceptance (share)")
    return dressed(figure, f"Acceptance by position ({note}, bars: 95 %)", 420)


SIZES = {"layers": "layers of the drafter (number)", "block_size": "block size γ (tokens)"}


def by_size(trained: pd.DataFrame, field: str) -> pd.DataFrame:
    """With and without the sequential head at every depth or block size: columns drafter ("dspark" or "dflash"), value, tau.

    trained: training records (``drafters-trained.parquet``), τ that of held-out text · field: a key of SIZES. Only drafters that
    have the base's value in the other field take part; empty if the base "dspark" was not trained.
    """
    (other,) = SIZES.keys() - {field}
    base = trained.loc[trained["drafter"] == "dspark", other]
    kept = trained[trained["drafter"].str.fullmatch("(dspark|dflash)(-.*)?") & trained[other].isin(base)]
    sides = kept["drafter"].str.split("-").str[0]
    return pd.DataFrame({"drafter": sides, "value": kept[field], "tau": kept["held_out_tau"]}).sort_values(["drafter", "value"])


def size_figure(trained: pd.DataFrame, field: str) -> go.Figure:
    """Figs. 3 and 4: τ on held-out text over depth or block size. Raises ValueError if "dspark" was not trained."""
    points = by_size(trained, field)
    if points.empty:
        raise ValueError("'dspark' was not trained: run python -m dspark.train compare --only dspark")
    figure = go.Figure()
    for side in ("dspark", "dflash"):
        line = points[points["drafter"] == side]
        name, colour, dash = LOOKS[side]
        look = {"color": colour, "dash": dash, "width": 2.5}
        figure.add_trace(go.Scatter(x=line["value"], y=line["tau"], name=name, mode="lines+markers", line=look))
    figure.update_xaxes(title=SIZES[field], tickvals=sorted(points["value"].unique()))
    figure.update_yaxes(title="τ on held-out text (tokens per round)")
    steps = ", ".join(map(str, sorted(trained["steps"].unique())))
    return dressed(figure, f"Tokens per round after {steps} steps of training (n = {len(points)} drafters)", 400)


def head_table(trained: pd.DataFrame) -> pd.DataFrame:
    """The kinds of sequential head in drafters that are otherwise the base: held-out τ and acceptance by position."""
    base = trained[trained["drafter"] == "dspark"]
    alike = trained[trained["layers"].isin(base["layers"]) & trained["block_size"].isin(base["block_size"])]
    kinds = alike["head"].where(alike["rank"] > 0, "none")
    shares = [" ".join(f"{a:.3f}" for a in row) for row in alike["held_out_acceptance"]]
    table = pd.DataFrame({"sequential head": kinds, "τ, held out": alike["held_out_tau"].round(3), "acceptance by position": shares})
    return table.set_index("sequential head").sort_values("τ, held out", ascending=False)


def cost_table(times: pd.DataFrame) -> pd.DataFrame:
    """Fig. 4's other half: what one block costs, medians over the repeats, and the sequential head's share of a round.

    times: rows of :func:`dspark.train.compare.time_all`, milliseconds.
    """
    middle = times.groupby("drafter", sort=False)[["draft_ms", "head_ms", "verify_ms"]].median()
    share = middle["head_ms"] / (middle["draft_ms"] + middle["verify_ms"])
    titles = {"draft_ms": "draft (ms)", "head_ms": "of it the sequential head (ms)", "verify_ms": "verify (ms)"}
    return middle.rename(columns=titles).round(2).assign(**{"head's share of a round": share.map("{:.1%}".format)})


def head_shares(times: pd.DataFrame) -> pd.Series:
    """Block size γ → the sequential head's share of a round, of DSpark drafters that differ in nothing else; medians over the repeats.

    times: as for :func:`cost_table`. The head runs in sequence, once a token: this is what a longer block costs more.
    """
    alike = times[times["drafter"].str.fullmatch(r"dspark(-block\d+)?")]
    middle = alike.groupby("drafter_block_size")[["draft_ms", "head_ms", "verify_ms"]].median()
    return middle["head_ms"] / (middle["draft_ms"] + middle["verify_ms"])


def head_share_figure(times: pd.DataFrame) -> go.Figure:
    """Fig. 4's other half over block sizes, beside the published range. Raises ValueError if "dspark" was not timed."""
    shares = head_shares(times)
    if shares.empty:
        raise ValueError("'dspark' was not timed: run python -m dspark.train compare --only main,block --stages time")
    name, colour, dash = LOOKS["dspark"]
    line = {"color": colour, "dash": dash, "width": 2.5}
    figure = go.Figure(go.Scatter(x=shares.index, y=100 * shares, name=name, mode="lines+markers", line=line))
    low, high = (100 * share for share in published.HEAD_SHARE)
    figure.add_hrect(low, high, fillcolor=GREY, opacity=0.15, line_width=0, annotation_text="published, on other hardware")
    figure.update_xaxes(title=SIZES["block_size"], tickvals=list(shares.index))
    figure.update_yaxes(title="share of a round (%)", rangemode="tozero")
    n = times.groupby("drafter").size().min()
    return dressed(figure, f"What the sequential head takes of a round (medians of n = {n} repeats)", 400)


# ---- what the Markov bias does


@torch.inference_mode()
def known_blocks(target: Target, drafter: Drafter, token_ids: Sequence[int], anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks behind some positions of a known text, whose tokens stand for drafts that were all right.

    anchors: [n] positions. Returns probabilities at temperature 1 over the draft vocabulary, [n, γ, draft_vocab] each: of the
    drafter, of the drafter without its Markov bias, and of the target (whose rest lies outside). Raises ValueError for an anchor
    with nothing before it or without γ − 1 tokens behind it.
    """
    last = len(token_ids) - drafter.block_size
    if len(anchors) == 0 or not (1 <= int(anchors.min()) and int(anchors.max()) <= last):
        raise ValueError(f"anchors {anchors.tolist()} must lie in 1..{last} in a text of {len(token_ids)} tokens, and there must be one")
    ids = torch.tensor([list(token_ids)], device=target.device)
    logits, taps = target.forward(ids, None, drafter.target_layer_ids)
    positions = (anchors[:, None] + torch.arange(drafter.block_size)).to(target.device)[None]  # [1, n, γ]
    previous = ids[0][positions]
    tokens = torch.full_like(previous, drafter.config.mask_token_id)
    tokens[..., 0] = previous[..., 0]
    hidden = drafter.block_hidden(ids, taps, tokens, previous, positions)
    # A block at a time, a latent at a time, as drafting does: an 8-bit layer rounds all rows of its input by one scale.
    base, head = torch.stack([drafter.head(block).float() for block in hidden[0]]), drafter.markov_head
    biased = base
    if head is not None:
        latents = head.latents(hidden, head.markov_w1(previous)).flatten(0, -2)  # [n·γ, r]
        biased = base + torch.stack([head.markov_w2(latent).float() for latent in latents]).view_as(base)
    return biased.softmax(-1), base.softmax(-1), logits[0].float().softmax(-1)[:, drafter.d2t][positions[0]]


def known_text_acceptance(target: Target, drafter: Drafter, token_ids: Sequence[int], first: int) -> tuple[np.ndarray, np.ndarray]:
    """Σ min(p_d, p_t) for the block behind every position from ``first`` on, with the Markov bias and without: the conditional
    acceptance at temperature 1, computed instead of counted. Returns two arrays [anchors, γ]."""
    anchors = torch.arange(first, len(token_ids) - drafter.block_size + 1)
    biased, base, p_target = known_blocks(target, drafter, token_ids, anchors)
    return tuple(torch.minimum(p, p_target).sum(-1).cpu().numpy() for p in (biased, base))


def bias_view(target: Target, drafter: Drafter, token_ids: Sequence[int], at: int, top: int = 5) -> pd.DataFrame:
    """The block behind the anchor ``token_ids[at]``: each slot with the Markov bias, without it, and as the target sees it.

    Every slot's ``top`` tokens of each of the three. Columns: slot (1 … γ) · behind: the text it follows · token, piece · biased,
    parallel, target: probabilities at temperature 1 · kept_biased, kept_parallel: Σ min(p_d, p_t) of the slot.
    """
    views = [p[0] for p in known_blocks(target, drafter, token_ids, torch.tensor([at]))]
    rows = []
    for k in range(drafter.block_size):
        slot = {"slot": k + 1, "behind": target.decode([token_ids[at + k]])}
        for name, p in zip(("biased", "parallel"), views, strict=False):
            slot[f"kept_{name}"] = float(torch.minimum(p[k], views[2][k]).sum())
        for i in dict.fromkeys(i for p in views for i in p[k].topk(min(top, p.shape[-1])).indices.tolist()):
            token = int(drafter.d2t[i])
            numbers = {name: float(p[k, i]) for name, p in zip(("biased", "parallel", "target"), views, strict=True)}
            rows.append(slot | {"token": token, "piece": target.decode([token])} | numbers)
    return pd.DataFrame(rows)


def bias_figure(view: pd.DataFrame, slot: int, top: int = 6) -> go.Figure:
    """The most probable continuations at one slot: without the bias, with it, and what the target would say."""
    rows = view[view["slot"] == slot]
    if rows.empty:
        raise ValueError(f"slot {slot} is not in the block: choose 1 to {view['slot'].max()}")
    rows = rows.loc[rows[["parallel", "biased", "target"]].max(axis=1).sort_values(ascending=False).index[:top]].iloc[::-1]
    labels = [f"“{piece}”".replace("\n", "↵") + f" {token}" for piece, token in zip(rows["piece"], rows["token"], strict=True)]
    shown = (("target", "the target", GREY), ("biased", "drafter with the bias", FATES["draft"].colour(0.85)))
    shown += (("parallel", "drafter without it", FATES["correction"].colour(0.85)),)
    bars = [
        go.Bar(y=labels, x=rows[column], name=name, orientation="h", marker_color=colour, texttemplate="%{x:.2f}", textposition="outside")
        for column, name, colour in shown
    ]
    figure = go.Figure(bars)
    figure.update_xaxes(title="probability", range=[0, 1.1])
    figure.update_yaxes(title="token (text, id)")
    figure.update_layout(legend={"traceorder": "reversed"})
    about = rows.iloc[0]
    behind, without, kept = about["behind"].replace("\n", "↵"), about["kept_parallel"], about["kept_biased"]
    title = f"Slot {slot}, behind “{behind}”: {without:.0%} kept without the bias, {kept:.0%} with it (n = 1 place)"
    return dressed(figure, title, 160 + 60 * len(rows))


def computed_positions(named: dict[str, Sequence[np.ndarray]]) -> pd.DataFrame:
    """Arrays [blocks, γ] of several texts under a drafter's name → the frame that :func:`acceptance_figure` draws."""
    rows = []
    for drafter, parts in named.items():
        values = np.concatenate(parts)
        for k, column in enumerate(values.T, 1):
            error = Z * column.std(ddof=1) / math.sqrt(len(column)) if len(column) > 1 else math.nan
            rows.append({"drafter": drafter, "position": k, "n": len(column), "acceptance": column.mean(), "error": error})
    return pd.DataFrame(rows)
