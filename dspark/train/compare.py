"""Drafters trained alike and measured alike: what does each part of the design gain? (The paper's Table 1 and Figs. 2–4.)

One corpus, one number of steps, the same taps, the same batches in the same order, the same draft vocabulary: only what a variant
names differs. Everything resumes: a finished drafter is not trained again, a finished measurement is not repeated.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from dspark.bench.arms import Models
from dspark.bench.plan import Plan, rotated
from dspark.bench.provenance import drafter_columns, environment
from dspark.bench.results import SCHEMA_VERSION, Ledger, read_results, write_results
from dspark.bench.speed import measure_speed
from dspark.cli import option
from dspark.clock import now
from dspark.draft.drafter import Drafter
from dspark.draft.eagle import EagleDrafter
from dspark.files import file_sha256
from dspark.formats.checkpoint import CONFIG
from dspark.load import load_drafter, ready
from dspark.target.target import Target
from dspark.train.corpus import Corpus, load_corpus
from dspark.train.features import FeatureStore
from dspark.train.loop import TrainConfig, Trainer, train_to
from dspark.train.start import BLOCK_SIZE, LAYERS, drafter_for, frequent_tokens, spread, spread_taps, unused_token
from dspark.tune.profile import median_steps, medians, profile_draft

CANDIDATES, KERNEL, CHANNEL_GROUPS = 16, 3, 8  # of a selector head; of convolutions: slots, and groups of channels


@dataclass(frozen=True)
class Variant:
    """What sets one drafter apart."""

    name: str
    layers: int = LAYERS
    block_size: int = BLOCK_SIZE
    rank: int = -1  # of the Markov head; −1: the recipe's, 0: none (DFlash)
    head: str = "vanilla"  # kind of Markov head: vanilla, gated, rnn, selector
    kind: type[Drafter] = Drafter
    candidates: int = CANDIDATES  # of a selector, where the draft vocabulary has as many
    convolutions: bool = False


SIDES = (("dspark", -1), ("dflash", 0))  # name and rank of the drafters that are compared at each size
GROUPS: dict[str, tuple[Variant, ...]] = {  # in order of importance
    "main": (Variant("dspark"), Variant("dflash", rank=0), Variant("eagle", layers=1, rank=0, kind=EagleDrafter)),
    "heads": (Variant("gated", head="gated"), Variant("rnn", head="rnn")),
    "dflash2": (
        Variant("dflash2", head="selector", convolutions=True),
        Variant("dspark+selector", head="selector"),  # in place of its own head
        Variant("dspark+conv", convolutions=True),
        Variant("dflash+conv", rank=0, convolutions=True),
    ),
    "block": tuple(Variant(f"{side}-block{n}", block_size=n, rank=rank) for n in (8, 3, 12, 2, 16) for side, rank in SIDES),
    "layers": tuple(Variant(f"{side}-layers{n}", layers=n, rank=rank) for n in (1, 4, 3) for side, rank in SIDES),
}
ALIKE = (*GROUPS["main"], *GROUPS["heads"], *GROUPS["dflash2"])
GROUPS["block7"] = tuple(replace(variant, name=f"{variant.name}-block7", block_size=7) for variant in ALIKE)
VARIANTS = {variant.name: variant for group in GROUPS.values() for variant in group}


def chosen(names: str) -> list[Variant]:
    """names: variants, groups or "all", separated by commas. Returns each variant once. Raises ValueError for an unknown name."""
    sets = {"all": tuple(VARIANTS.values())} | GROUPS | {name: (variant,) for name, variant in VARIANTS.items()}
    asked = [name.strip() for name in names.split(",")]
    if wrong := [name for name in asked if name not in sets]:
        raise ValueError(f"drafter {wrong[0]!r} is unknown: choose from {', '.join(sets)}")
    return list(dict.fromkeys(variant for name in asked for variant in sets[name]))


@dataclass(frozen=True)
class Recipe:
    """What all variants share. Every field is an option of the commands ``drafter`` and ``compare``."""

    steps: int = option(500, "training steps")
    sequences: int = option(4, "corpus rows per step")
    anchors: int = option(64, "blocks per row and step")
    lr: float = option(2e-3, "learning rate at the end of the warm-up")
    skip_rows: int = option(0, "leave out the first rows of the shuffled corpus")
    rows: int = option(0, "use only so many rows of it; 0 for all")
    taps: str = option("1,8,15,22,28", "target layers the drafter reads; empty for five of them, spread evenly")
    markov_rank: int = option(48, "rank of the Markov head; 0 for the purely parallel drafter (DFlash)")
    draft_vocab: int = option(8192, "most frequent response tokens that can be drafted")
    mask_token: int = option(3, "-1 for a special token that the corpus does not hold, else any such token")
    seed: int = 0  # of the rows, the batches and the first weights

    def config(self, **options: object) -> TrainConfig:
        return TrainConfig(self.steps, self.sequences, self.anchors, self.lr, seed=self.seed, **options)

    def text(self, corpus: Corpus) -> Corpus:
        """The rows to train on, the last shard of them held out."""
        shuffled = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(self.seed))
        return corpus.rows(shuffled[self.skip_rows :][: self.rows or None])

    def start(self, variant: Variant, target: Target, corpus: Corpus) -> Drafter:
        """A fresh drafter; its layers start as copies of the target's, from the first to the last. Drafts tokens of the whole corpus."""
        groups = math.gcd(CHANNEL_GROUPS, target.hidden_size)
        convolutions = {"convolution_kernel": KERNEL, "convolution_groups": groups} if variant.convolutions else {}
        return drafter_for(
            target,
            kind=variant.kind,
            d2t=frequent_tokens(target, corpus, self.draft_vocab),
            init_layers=spread(min(variant.layers, target.num_layers), target.num_layers - 1),
            seed=self.seed,
            block_size=variant.block_size,
            target_layer_ids=tuple(map(int, self.taps.split(","))) if self.taps else spread_taps(target.num_layers),
            markov_rank=self.markov_rank if variant.rank < 0 else variant.rank,
            markov_head_type=variant.head,
            num_candidates=min(variant.candidates, self.draft_vocab) if variant.head == "selector" else 0,
            **convolutions,
            mask_token_id=unused_token(target, corpus) if self.mask_token < 0 else self.mask_token,
        )


@dataclass(frozen=True)
class Comparison:
    """What the drafters are trained with, and where they and their measurements are kept."""

    target: Target  # not packed: training reads the weights
    recipe: Recipe
    corpus_path: Path
    out: Path  # holds one folder per drafter
    results: Path  # folder of the results files
    features: Path | None = None  # folder that keeps the target's features

    @cached_property
    def corpus(self) -> Corpus:
        return load_corpus(self.corpus_path, self.target)

    @cached_property
    def _origin(self) -> dict[str, object]:
        """The columns that must be equal in all rows of the training records."""
        digests = {"target_digest": self.target.digest, "corpus_sha256": file_sha256(self.corpus_path)[:16]}
        return digests | {"recipe": json.dumps(asdict(self.recipe)), "schema_version": SCHEMA_VERSION}

    def train(self, variants: Sequence[Variant]) -> None:
        """Train the drafters that are not finished, in this order, and record all finished ones in ``drafters-trained.parquet``.

        Earlier records of other variants stay, as their weights need not be kept. Raises ValueError, before anything is trained, for
        a folder or records of drafters trained otherwise.
        """
        records, text = self.results / "drafters-trained.parquet", self.recipe.text(self.corpus)
        earlier = self._records(records)
        about = {"recipe": asdict(self.recipe), "corpus": {"rows": len(self.corpus), "sha256": self._origin["corpus_sha256"]}}
        for variant in variants:
            if not self._config(variant.name):
                folder, drafter = self.out / variant.name, self.recipe.start(variant, self.target, self.corpus)
                store = FeatureStore(self.target, text, drafter.target_layer_ids, self.features)
                config = self.recipe.config(checkpoint_every=100)
                train_to(Trainer(self.target, drafter, store, config, folder.with_name(folder.name + ".training")), folder, about=about)
        rows = [{"drafter": name} | _shape_and_loss(config) for name in VARIANTS if (config := self._config(name))]
        frame = pd.concat([earlier, pd.DataFrame(rows).assign(**self._origin)]).drop_duplicates("drafter", keep="last")
        order = {name: i for i, name in enumerate(VARIANTS)}
        write_results(frame.sort_values("drafter", key=lambda names: names.map(order), ignore_index=True), records)

    def _config(self, name: str) -> dict:
        """config.json of a finished drafter, {} if it is not finished. Raises ValueError if it was trained otherwise."""
        path = self.out / name / CONFIG
        if not path.is_file():
            return {}
        config = json.loads(path.read_text(encoding="utf-8"))
        training = config.get("training", {})
        found = (config.get("target_digest"), training.get("recipe"), training.get("corpus", {}).get("sha256"))
        if found != (self.target.digest, asdict(self.recipe), self._origin["corpus_sha256"]):
            raise ValueError(f"{path.parent} holds a drafter of another target, recipe or corpus: choose another --out, or delete it")
        return config

    def _records(self, path: Path) -> pd.DataFrame:
        """The rows of a file, empty if there is none. Raises ValueError if it holds anything but drafters trained alike."""
        if not path.is_file():
            return pd.DataFrame()
        frame = read_results(path)
        if wrong := [name for name, value in self._origin.items() if name not in frame or (frame[name] != value).any()]:
            raise ValueError(f"{path} does not hold drafters of the same {wrong[0]!r}: choose another --results, or delete it")
        return frame

    def decode(self, target: Target, variants: Sequence[Variant], plan: Plan) -> None:
        """Decode with each trained drafter by the plan: one results file per drafter. target: the same, laid out for decoding."""
        for variant in variants:
            folder, out = self.out / variant.name, self.results / f"drafters-t{plan.temperature:g}-{variant.name}.parquet"
            measure_speed(replace(plan, drafter=str(folder)), Models(target, load_drafter(folder, target)), out)

    def time(self, target: Target, variants: Sequence[Variant], context: int = 256, repeats: int = 15) -> pd.DataFrame:
        """One row per drafter and repeat. The drafters take turns, so that a slow spell of the machine falls on all of them.

        They are timed as their training starts, as the cost depends on shapes alone. draft_ms: one greedy block after ``context`` tokens;
        head_ms: the Markov head's part of it; verify_ms: the target's pass over the block and its anchor, at the same place. Each is
        a median of five, in milliseconds.
        """
        drafters, place = {}, environment(target) | {"context": context}
        for variant in variants:
            fresh = self.recipe.start(variant, self.target, self.corpus)
            drafters[variant.name] = ready(fresh.to(target.dtype).attach(target), target)
        columns = {name: {"drafter": name} | drafter_columns(drafter) | place for name, drafter in drafters.items()}
        digests = {name: column["drafter_digest"] for name, column in columns.items()}
        configuration = {"mode": "drafters-time", "drafters": digests, "repeats": repeats} | place

        def measure(repeat: int) -> list[dict[str, object]]:
            names = rotated(list(drafters), repeat)
            return [columns[name] | {"repeat": repeat} | _times(target, drafters[name], context) for name in names]

        return Ledger(self.results / "drafters-time.parquet", configuration).run({str(i): i for i in range(repeats)}, measure)


def _shape_and_loss(config: dict) -> dict[str, object]:
    """Columns of the training records. config: config.json of a finished drafter."""
    names = {"layers": "num_hidden_layers", "block_size": "block_size", "head": "markov_head_type", "rank": "markov_rank"}
    training, held_out = config["training"], config["training"]["held_out"]
    columns = {name: config[field] for name, field in names.items()} | {name: training[name] for name in ("steps", "revision", "machine")}
    curve = dict(training.get("curve", ()))  # of none that an older dspark trained
    columns |= {"curve_steps": list(curve), "curve_tau": list(curve.values())}
    return columns | {f"held_out_{name}": held_out[name] for name in ("loss", "tau", "acceptance")}


def _times(target: Target, drafter: Drafter, context: int) -> dict[str, float]:
    width = drafter.block_size + 1
    seconds = {
        "draft_ms": profile_draft(target, drafter, context=context, repeats=5),
        "head_ms": _head_seconds(drafter, torch.zeros(width - 1, target.hidden_size, dtype=target.dtype, device=target.device)),
        "verify_ms": median_steps(target, context=context, widths=[width], repeats=5)[width],
    }
    return {name: 1e3 * value for name, value in seconds.items()}


@torch.inference_mode()
def _head_seconds(drafter: Drafter, hidden: Tensor, repeats: int = 5) -> float:
    """Median seconds that the Markov head adds to the draft of a whole block, 0 without a head. hidden: [γ, hidden]."""
    if drafter.markov_head is None:
        return 0.0

    def block(_: object) -> float:
        start, state = now(hidden.device), None
        base = torch.zeros(1, len(hidden), len(drafter.d2t), device=hidden.device)
        for k in range(len(hidden)):
            _, state = (drafter.fused or drafter).next_logits(base, hidden[None], k, [0], state)
        return now(hidden.device) - start

    return medians(block, [None], repeats)[None]
