"""The drafters that are compared with each other, and the recipe they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.draft.eagle import EagleDrafter
from dspark.target.target import Target
from dspark.train.corpus import Corpus
from dspark.train.loop import TrainConfig
from dspark.train.start import drafter_for, frequent_tokens, spread


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
