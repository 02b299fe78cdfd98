"""Drafters trained alike and measured alike: what does each part of the design gain? (The paper's Table 1 and Figs. 2–4.)

One corpus, one number of steps, the same taps, the same batches in the same order, the same draft vocabulary: only what a variant
names differs. Everything resumes: a finished drafter is not trained again, a finished measurement is not repeated.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dspark.bench.arms import Models
from dspark.bench.plan import Plan, rotated
from dspark.bench.provenance import drafter_columns, environment
from dspark.bench.results import SCHEMA_VERSION, Ledger, read_results, write_results
from dspark.bench.speed import measure_speed
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
from dspark.train.start import drafter_for, frequent_tokens, spread
from dspark.verify.sampling import Rng, Sampling

log = logging.getLogger(__name__)

FROM_TRAINING = ("steps", "seconds", "corpus_rows", "response_tokens", "revision", "machine", "threads")  # columns of a record


@dataclass(frozen=True)
class Variant:
    """What sets one drafter apart."""

    name: str
    layers: int = 2
    block_size: int = 5
    rank: int = -1  # of the Markov head; −1: the recipe's, 0: none (DFlash)
    head: str = "vanilla"  # kind of Markov head: vanilla, gated, rnn
    kind: type[Drafter] = Drafter


def _pairs(label: str, name: str, values: Sequence[int]) -> tuple[Variant, ...]:
    """DSpark and DFlash at each value of the field ``name``, called dspark-LABEL8, dflash-LABEL8, …"""
    sides = (("dspark", -1), ("dflash", 0))
    return tuple(Variant(f"{side}-{label}{value}", rank=rank, **{name: value}) for value in values for side, rank in sides)


GROUPS: dict[str, tuple[Variant, ...]] = {  # in order of importance
    "main": (Variant("dspark"), Variant("dflash", rank=0), Variant("eagle", layers=1, rank=0, kind=EagleDrafter)),
    "heads": (Variant("gated", head="gated"), Variant("rnn", head="rnn")),
    "block": _pairs("block", "block_size", (8, 3, 12, 2, 16)),
    "layers": _pairs("layers", "layers", (1, 4, 3)),
}
VARIANTS = {variant.name: variant for group in GROUPS.values() for variant in group}


def chosen(names: str) -> list[Variant]:
    """names: variants, groups or "all", separated by commas. Returns each variant once. Raises ValueError for an unknown name."""
    result: dict[str, Variant] = {}
    for name in (part.strip() for part in names.split(",")):
        if name != "all" and name not in GROUPS and name not in VARIANTS:
            raise ValueError(f"drafter {name!r} is unknown: choose from all, {', '.join(GROUPS)}, {', '.join(VARIANTS)}")
        group = VARIANTS.values() if name == "all" else GROUPS.get(name) or (VARIANTS[name],)
        result |= {variant.name: variant for variant in group}
    return list(result.values())


def _option(default: object, text: str) -> object:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """What all variants share. Every field is an option of ``python -m dspark.train compare``."""

    steps: int = _option(500, "training steps of each drafter")
    sequences: int = _option(4, "corpus rows per step")
    anchors: int = _option(64, "blocks per row and step")
    lr: float = _option(2e-3, "learning rate at the end of the warm-up")
    skip_rows: int = _option(0, "leave out the first rows of the shuffled corpus")
    rows: int = _option(0, "use only so many rows of it; 0 for all")
    taps: str = _option("1,8,15,22,28", "target layers the drafters read")
    markov_rank: int = _option(48, "rank of every Markov head")
    draft_vocab: int = _option(8192, "most frequent response tokens that can be drafted")
    mask_token: int = _option(3, "an unused special token of the target")
    seed: int = 0  # of the rows, the batches and the first weights

    def config(self) -> TrainConfig:
        return TrainConfig(self.steps, self.sequences, self.anchors, self.lr, seed=self.seed, checkpoint_every=100)

    def text(self, corpus: Corpus) -> Corpus:
        """The rows to train on, the last shard of them held out."""
        order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(self.seed))
        return corpus.rows(order[self.skip_rows :][: self.rows or None])

    def vocabulary(self, corpus: Corpus, target: Target) -> Tensor:
        """d2t of all drafters, [draft_vocab] int64: the most frequent response tokens of the whole corpus."""
        return frequent_tokens(corpus.token_ids, corpus.assistant, self.draft_vocab, target.vocab_size, target.eos_token_ids)

    def start(self, variant: Variant, target: Target, d2t: Tensor) -> Drafter:
        """A fresh drafter; its layers start as copies of the target's, from the first to the last."""
        return drafter_for(
            target,
            kind=variant.kind,
            d2t=d2t,
            init_layers=spread(variant.layers, target.num_layers - 1),
            seed=self.seed,
            block_size=variant.block_size,
            target_layer_ids=tuple(map(int, self.taps.split(","))),
            markov_rank=self.markov_rank if variant.rank < 0 else variant.rank,
            markov_head_type=variant.head,
            mask_token_id=self.mask_token,
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

    @property
    def records(self) -> Path:
        """The results file with one row per trained drafter."""
        return self.results / "drafters-trained.parquet"

    @cached_property
    def corpus(self) -> Corpus:
        return load_corpus(self.corpus_path)

    @cached_property
    def d2t(self) -> Tensor:
        return self.recipe.vocabulary(self.corpus, self.target)

    def train(self, variants: Sequence[Variant]) -> None:
        """Train the drafters that are not finished, in this order. Raises ValueError for a folder with a drafter trained otherwise."""
        text = self.recipe.text(self.corpus)
        about = {"recipe": asdict(self.recipe), "corpus": {"rows": len(self.corpus), "sha256": self._origin["corpus_sha256"]}}
        for variant in variants:
            if self._config(variant.name) is None:
                folder, drafter = self.out / variant.name, self.recipe.start(variant, self.target, self.d2t)
                store = FeatureStore(self.target, text, drafter.target_layer_ids, self.features)
                trainer = Trainer(self.target, drafter, store, self.recipe.config(), folder.with_name(folder.name + ".training"))
                train_to(trainer, folder, validate_every=max(1, self.recipe.steps // 10), about={"variant": variant.name} | about)

    def _config(self, name: str) -> dict | None:
        """config.json of a finished drafter, None if it is not finished. Raises ValueError if it was trained otherwise."""
        path = self.out / name / CONFIG
        if not path.is_file():
            return None
        config = json.loads(path.read_text(encoding="utf-8"))
        training = config.get("training", {})
        found = (config.get("target_digest"), training.get("recipe"), training.get("corpus", {}).get("sha256"))
        if found != (self.target.digest, asdict(self.recipe), self._origin["corpus_sha256"]):
            raise ValueError(f"{path.parent} holds a drafter of another target, recipe or corpus: choose another --out, or delete it")
        return config

    # ---- records of the trained drafters

    @cached_property
    def _origin(self) -> dict[str, object]:
        """The columns that must be equal in all rows of the records."""
        digests = {"target_digest": self.target.digest, "corpus_sha256": file_sha256(self.corpus_path)[:16]}
        return digests | {"recipe": json.dumps(asdict(self.recipe)), "schema_version": SCHEMA_VERSION}

    def earlier_records(self) -> pd.DataFrame | None:
        """The rows in the records file, None if there is none. Raises ValueError if it holds anything but drafters trained alike."""
        if not self.records.is_file():
            return None
        earlier = read_results(self.records)
        if missing := {"drafter", *self._origin} - set(earlier):
            found = f"{self.records} is older, or holds no training records (no column {min(missing)!r})"
            raise ValueError(f"{found}: choose another --results, or delete it")
        if other := next((name for name, value in self._origin.items() if (earlier[name] != value).any()), None):
            raise ValueError(f"{self.records} holds drafters of another {other}: choose another --results, or delete it")
        return earlier

    def record(self) -> pd.DataFrame:
        """Write one row per finished drafter: shape, steps, and loss, τ and acceptance by position on the held-out rows.

        Earlier rows of other variants stay, as their weights need not be kept. Raises ValueError if no drafter is finished, or if
        the file holds anything but drafters trained alike.
        """
        configs = {name: config for name in VARIANTS if (config := self._config(name)) is not None}
        if not configs:
            raise ValueError(f"no finished drafter in {self.out}: train them first, with --stages train")
        frame, earlier = pd.DataFrame([self._row(name, config) for name, config in configs.items()]), self.earlier_records()
        if earlier is not None:
            frame = pd.concat([frame, earlier[earlier["drafter"].isin(VARIANTS.keys() - configs)]])
            frame = frame.sort_values("drafter", key=lambda names: names.map(list(VARIANTS).index), ignore_index=True)
        write_results(frame, self.records)
        return frame

    def _row(self, name: str, config: dict) -> dict[str, object]:
        variant, training = VARIANTS[name], config["training"]
        shape = {"layers": variant.layers, "block_size": variant.block_size, "head": variant.head, "drafter": name}
        shape |= {"architecture": config["architectures"][0], "rank": config["markov_rank"]}
        held_out = {f"held_out_{key}": training["held_out"][key] for key in ("loss", "tau", "acceptance")}
        return shape | {key: training[key] for key in FROM_TRAINING} | held_out | self._origin

    # ---- decoding, and what a block costs

    def decode(self, target: Target, variants: Sequence[Variant], plan: Plan) -> None:
        """Decode with each trained drafter by the plan: one results file per drafter. target: the same, laid out for decoding."""
        for variant in variants:
            log.info("decoding with %s", variant.name)
            folder, out = self.out / variant.name, self.results / f"drafters-t{plan.temperature:g}-{variant.name}.parquet"
            measure_speed(replace(plan, drafter=str(folder)), Models(target, load_drafter(folder, target)), out)

    def time(self, target: Target, variants: Sequence[Variant], context: int = 256, repeats: int = 15) -> pd.DataFrame:
        """One row per drafter and repeat. The drafters take turns, so that a slow spell of the machine falls on all of them.

        Drafters that are not trained are timed as their training would start, as the cost depends on shapes alone.
        draft_ms: one block after ``context`` tokens; head_ms: the Markov head's part of it; verify_ms: the target's pass over the
        block and its anchor, at the same place. Each is a median of five, in milliseconds.
        """
        drafters, columns = {}, {}
        place = environment(target) | {"context": context}
        for variant in variants:
            name, folder = variant.name, self.out / variant.name
            if trained := (folder / CONFIG).is_file():
                drafters[name] = load_drafter(folder, target)
            else:
                fresh = self.recipe.start(variant, self.target, self.d2t)
                drafters[name] = ready(fresh.to(target.dtype).attach(target), target)
            columns[name] = {"drafter": name, "trained": trained} | drafter_columns(drafters[name]) | place
        digests = {name: column["drafter_digest"] for name, column in columns.items()}
        configuration = {"mode": "drafters-time", "drafters": digests, "repeats": repeats} | place
        ledger = Ledger(self.results / "drafters-time.parquet", configuration)
        text = torch.randint(target.vocab_size, (1, context), generator=torch.Generator().manual_seed(0)).tolist()[0]
        for repeat in tqdm(range(0 if ledger.complete else repeats), desc="timing", unit="repeat"):
            if str(repeat) not in ledger.done:
                times = {name: _times(target, drafters[name], text) for name in rotated(list(drafters), repeat)}
                ledger.add(str(repeat), [columns[name] | {"repeat": repeat} | row for name, row in times.items()])
        return ledger.finish()


def _times(target: Target, drafter: Drafter, text: list[int]) -> dict[str, float]:
    block, cache, state = drafter.block_size, target.new_cache(), drafter.new_state(text)
    _, taps = target.forward(torch.tensor([text], device=target.device), cache, drafter.target_layer_ids)
    drafter.extend(state, text, taps)
    anchor = text[-1]
    ids = torch.full((1, block + 1), anchor, device=target.device)

    def verify() -> None:
        target.forward(ids, cache, drafter.target_layer_ids)
        cache.rewind(len(text))

    draft = partial(drafter.draft, state, anchor, block, Sampling(1.0), Rng(torch.Generator(target.device).manual_seed(0)))
    head = partial(_run_head, drafter, torch.zeros(block, drafter.config.hidden_size, dtype=target.dtype, device=target.device))
    return {"draft_ms": _median_ms(draft, target), "head_ms": _median_ms(head, target), "verify_ms": _median_ms(verify, target)}


@torch.inference_mode()
def _run_head(drafter: Drafter, hidden: Tensor) -> None:
    """The work of the Markov head in :meth:`dspark.draft.drafter.Drafter.draft`, nothing else. hidden: [γ, hidden]."""
    if (head := drafter.markov_head) is None:
        return
    logits, state = torch.zeros(len(drafter.d2t), device=hidden.device), None
    for row in hidden:
        latent, state = head.step(row, head.markov_w1.weight[0], state)
        logits = logits + head.markov_w2(latent)


def _median_ms(call: Callable[[], object], target: Target, times: int = 5) -> float:
    call()  # the first call allocates memory
    seconds = []
    for _ in range(times):
        start = now(target.device)
        call()
        seconds.append(now(target.device) - start)
    return 1e3 * median(seconds)
