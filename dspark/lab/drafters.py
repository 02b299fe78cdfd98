"""Drafters: compared (from the frames of ``python -m dspark.train compare``), trained inside a notebook, and their bias on a known text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dspark.bench.results import read_rows
from dspark.bench.stats import acceptance_by_position, interval
from dspark.draft.drafter import Drafter
from dspark.lab.figures import FATES, Drawing, curves, distributions, panels, styled
from dspark.target.target import Target
from dspark.train.compare import Recipe, Variant
from dspark.train.corpus import Corpus
from dspark.train.features import FeatureStore
from dspark.train.loop import Trainer

LOOKS = {  # drafter → name, colour, line
    "dspark": ("DSpark", FATES["draft"].hex, "-"),
    "dflash": ("DFlash (no sequential head)", FATES["correction"].hex, "--"),
    "eagle": ("autoregressive (EAGLE-3-like)", FATES["bonus"].hex, ":"),
}
SIZES = {"layers": "layers of the drafter", "block_size": "tokens in a block"}
REFERENCE, RESAMPLES = "dspark", 2000
Z = 1.959964  # half of a 95 % interval in standard errors


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


def tau_gains(frame: pd.DataFrame) -> pd.DataFrame:
    """τ of every drafter, and how much DSpark's mean exceeds it, with a 95 % bootstrap interval over prompts.

    frame: one row per prompt with columns arm, domain, prompt_id, decoded_tokens, rounds. Returns columns drafter, τ of each domain,
    mean, gain, low, high.
    """
    arms, rng, taus = list(dict.fromkeys(frame["arm"])), np.random.default_rng(0), {}
    for domain, part in frame.groupby("domain", sort=False):
        counts = part.pivot(index="prompt_id", columns="arm", values=["decoded_tokens", "rounds"])
        draws = rng.integers(len(counts), size=(RESAMPLES, len(counts)))
        drawn = np.vstack([np.arange(len(counts)), draws])  # all prompts once, then the resamples
        tokens, rounds = (counts[name][arms].to_numpy(float)[drawn].sum(1) for name in ("decoded_tokens", "rounds"))
        taus[domain] = tokens / np.maximum(rounds, 1)  # [1 + resamples, arms]
    mean = np.mean(list(taus.values()), axis=0)
    gain = mean[:, [arms.index(REFERENCE)]] / mean - 1
    low, high = np.transpose([interval(column) for column in gain[1:].T])
    table = {domain: tau[0] for domain, tau in taus.items()} | {"mean": mean[0], "gain": gain[0], "low": low, "high": high}
    return pd.DataFrame({"drafter": arms} | table)


def pooled_positions(frame: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Conditional acceptance in real decoding, all domains together.

    Columns drafter, position, n, acceptance, error (half of its 95 % interval).
    """
    counts = acceptance_by_position(frame[frame["arm"].isin(arms)]).groupby(["arm", "position"], sort=False)[["reached", "accepted"]].sum()
    counts = counts.reset_index().rename(columns={"arm": "drafter", "reached": "n"})
    share = counts["accepted"] / counts["n"]
    return counts.assign(acceptance=share, error=Z * np.sqrt(share * (1 - share) / counts["n"])).drop(columns="accepted")


def _lines(points: pd.DataFrame, x: str, y: str) -> list[dict[str, object]]:
    """One line per drafter, with its name, colour and dash, and the intervals that the points have."""
    each = ((points[points["drafter"] == drafter], *look) for drafter, look in LOOKS.items())
    return [
        {"x": rows[x], "y": rows[y], "error": rows.get("error"), "label": name, "color": colour, "linestyle": dash}
        for rows, name, colour, dash in each
        if len(rows)
    ]


def acceptance_figure(positions: pd.DataFrame, about: str) -> Drawing:
    """The counterpart of the paper's Fig. 2: acceptance of drafts whose predecessors were all accepted, one line per drafter.

    positions: columns drafter, position, n, acceptance, error. about: what was counted, for the caption.
    """
    ends = positions.groupby("drafter", sort=False)["acceptance"].agg(["first", "last"])
    finding = "Acceptance along the block: " + ", ".join(f"{LOOKS[d][0].split(' ')[0]} {a:.0%} → {b:.0%}" for d, a, b in ends.itertuples())
    axes = {"xlabel": "position in the block (tokens after the anchor)", "ylabel": "conditional acceptance (share)", "ylim": (0, None)}
    ticks = sorted(positions["position"].unique())
    return curves(_lines(positions, "position", "acceptance"), finding, f"{about}; lines: 95 % intervals", xticks=ticks, **axes)


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


def size_figure(trained: pd.DataFrame, field: str) -> Drawing:
    """The counterparts of Figs. 3 and 4: held-out τ over depth or block size. Raises ValueError if "dspark" was not trained."""
    points = by_size(trained, field)
    if points.empty:
        raise ValueError("'dspark' was not trained: run python -m dspark.train compare --only dspark")
    steps, machines = (", ".join(map(str, sorted(trained[name].unique()))) for name in ("steps", "machine"))
    ends = points.groupby("drafter")["tau"]
    finding = f"Fewest {SIZES[field]} with the head: τ {ends.first()['dspark']:.2f}; most without it: {ends.last()['dflash']:.2f}"
    about = f"n = {len(points)} drafters, {steps} steps of training on {machines}; held-out text at temperature 1"
    axes = {"xlabel": SIZES[field], "ylabel": "τ on held-out text (tokens per round)", "xticks": sorted(points["value"].unique())}
    return curves(_lines(points, "value", "tau"), finding, about, 3.6, **axes)


@styled
def training_curves(records: Sequence[dict[str, object]], steps: int) -> Drawing:
    """Loss, acceptance by position and τ over the steps so far, in training batches and in held-out rows.

    records: from :meth:`dspark.train.loop.Trainer.run`, one per step; some have ``held_out``. steps: the planned number.
    """
    held, losses = [r for r in records if r.get("held_out")], [r["loss"] for r in records]
    finding = f"The loss goes from {losses[0]:.2f} to {losses[-1]:.2f}"
    figure, axes = panels(finding, f"n = {records[-1]['step']} of {steps} steps; dots: held-out rows", 3.2, 3)
    labels = {"loss": "loss", "acceptance": "acceptance, held out (share)", "tau": "τ at T = 1 (tokens a round)"}
    for panel, (name, label) in zip(axes, labels.items(), strict=True):
        if name != "acceptance":
            panel.plot([r["step"] for r in records], [r[name] for r in records], color="C0", alpha=0.6, label="training batch")
        for k, column in enumerate(zip(*(np.atleast_1d(r["held_out"][name]) for r in held), strict=True)):  # one per position, or one
            line = f"position {k + 1}" if name == "acceptance" else "held-out rows"
            panel.plot([r["step"] for r in held], column, f"C{k + (name != 'acceptance')}o-", markersize=4, label=line)
        panel.set(title=label, xlabel="step", xlim=(0, steps))
        if panel.lines:
            panel.legend()
    return figure


def trainer_for(target: Target, corpus: Corpus, recipe: Recipe, folder: Path, *, layers: int, block_size: int) -> Trainer:
    """A trainer of a fresh drafter; it continues from the checkpoint in ``folder`` if there is one. At most 64 rows are held out."""
    drafter = recipe.start(Variant(folder.name, layers, block_size), target, corpus)
    store = FeatureStore(target, corpus, drafter.target_layer_ids, folder / "features", shard_rows=max(1, min(64, len(corpus) // 3)))
    return Trainer(target, drafter, store, recipe.config(checkpoint_every=max(1, recipe.steps // 4)), folder / "drafter.training")


@torch.inference_mode()
def known_blocks(target: Target, drafter: Drafter, token_ids: Sequence[int], anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks after some positions of a known text.

    anchors: [n] int64, positions in the text. Returns probabilities at temperature 1 over the draft vocabulary, [n, γ, draft_vocab]
    each: of the drafter with its Markov bias, without it, and of the target. Raises ValueError for an anchor at the start of the text
    or with fewer than γ − 1 tokens after it.
    """
    last = len(token_ids) - drafter.block_size
    if len(anchors) == 0 or not (1 <= int(anchors.min()) and int(anchors.max()) <= last):
        raise ValueError(f"anchors {anchors.tolist()} must be one or more of 1..{last} in a text of {len(token_ids)} tokens")
    ids = torch.tensor([list(token_ids)], device=target.device)
    logits, taps = target.forward(ids, None, drafter.target_layer_ids)
    positions = (anchors[:, None] + torch.arange(drafter.block_size)).to(target.device)[None]  # [1, n, γ]
    previous = ids[0][positions]
    tokens = torch.full_like(previous, drafter.config.mask_token_id)
    tokens[..., 0] = previous[..., 0]
    hidden = drafter.block_hidden(ids, taps, tokens, previous, positions)
    base, head = drafter.head(hidden[0]).float(), drafter.markov_head
    biased = base if head is None else head.logits(base, head.latents(hidden, head.markov_w1(previous))[0])
    return biased.softmax(-1), base.softmax(-1), logits[0].float().softmax(-1)[:, drafter.d2t][positions[0]]


def known_text_acceptance(target: Target, drafter: Drafter, token_ids: Sequence[int], first: int) -> tuple[np.ndarray, np.ndarray]:
    """Conditional acceptance Σ min(p_d, p_t) at temperature 1 for the block after every position from ``first`` on.

    Returns two arrays [anchors, γ]: with the Markov bias and without it.
    """
    anchors = torch.arange(first, len(token_ids) - drafter.block_size + 1)
    biased, base, p_target = known_blocks(target, drafter, token_ids, anchors)
    return tuple(torch.minimum(p, p_target).sum(-1).cpu().numpy() for p in (biased, base))


def bias_figure(target: Target, drafter: Drafter, token_ids: Sequence[int], at: int, slot: int, top: int = 6) -> Drawing:
    """The most probable tokens at one slot (1..γ) of the block after ``token_ids[at]``: target, drafter with and without its bias."""
    if not 1 <= slot <= drafter.block_size:
        raise ValueError(f"slot {slot} is not in the block: choose 1 to {drafter.block_size}")
    biased, parallel, p_target = (p[0, slot - 1] for p in known_blocks(target, drafter, token_ids, torch.tensor([at])))
    places = torch.stack([biased, parallel, p_target]).amax(0).topk(min(top, len(p_target))).indices
    labels = [f"“{target.decode([token])}” {token}".replace("\n", "↵") for token in drafter.d2t[places].tolist()]
    named = {"target": p_target, "drafter with the bias": biased, "drafter without it": parallel}
    without, kept = (float(torch.minimum(p, p_target).sum()) for p in (parallel, biased))
    after = target.decode([token_ids[at + slot - 1]]).replace("\n", "↵")
    finding = f"Slot {slot}, after “{after}”: {without:.0%} accepted without the bias, {kept:.0%} with it"
    caption = f"{target.name}, n = 1 place, temperature 1; the {len(places)} most probable tokens"
    return distributions({name: p[places].tolist() for name, p in named.items()}, labels, finding, caption)
