"""Training a drafter for a frozen target: batches, optimiser, checkpoints. Resumes bit-exactly after a kill."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.target.target import Target
from dspark.train.blocks import Blocks, StepResult, block_loss, choose_blocks
from dspark.train.features import FeatureStore, Shard
from dspark.train.interrupt import held_back
from dspark.train.losses import LossWeights

LEARN_FROM = ("answers", "all")


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser and batch. One step sees ``sequences`` rows of the corpus with ``anchors`` blocks each."""

    steps: int
    sequences: int = 4
    anchors: int = 64
    learning_rate: float = 6e-4
    warmup: float = 0.04
    clip: float = 1.0
    weight_decay: float = 0.0
    learn_from: str = "answers"  # where anchors stand; "all": in every part of the rows that are not held out
    seed: int = 0
    checkpoint_every: int = 500
    validation_shards: int = 1
    loss: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "anchors", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.weight_decay * self.learning_rate < 1:
            raise ValueError(f"weight_decay must be from 0 (none) to less than 1 / learning_rate, got {self.weight_decay}")
        if self.learn_from not in LEARN_FROM:
            raise ValueError(f"learn_from must be one of {', '.join(LEARN_FROM)}, got {self.learn_from!r}")

    def rate(self, step: int) -> float:
        """Linear warm-up, then cosine to 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


class Trainer:
    """Holds what a resume needs: float32 master weights, AdamW's moments, the step. Everything random derives from (seed, step)."""

    def __init__(self, target: Target, drafter: Drafter, store: FeatureStore, config: TrainConfig, folder: Path) -> None:
        if len(store) <= config.validation_shards:
            held = config.validation_shards * store.shard_rows
            found = f"the corpus has {len(store.corpus)} rows, of which the last {min(held, len(store.corpus))} are held out"
            raise ValueError(f"{found}, so nothing is left to train on: make more than {held} rows")
        self.target, self.store, self.config, self.folder = target, store, config, folder
        self.drafter = drafter.float().attach(target)
        self.optimizer = torch.optim.AdamW(_groups(self.drafter, config.weight_decay), lr=config.learning_rate, fused=True)
        self.t2d = torch.full((drafter.config.vocab_size,), -1, device=target.device)
        self.t2d[drafter.d2t] = torch.arange(len(drafter.d2t), device=target.device)
        self.step = 0
        self._loaded: tuple[int, Shard] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def _about(self) -> dict[str, object]:
        """What a checkpoint belongs to."""
        shape = {"architecture": self.drafter.architecture} | self.drafter.config.to_dict()
        return {"train": asdict(self.config), "drafter": shape, "target": self.target.digest, "text": self.store.text}

    def run(self) -> Iterator[dict[str, object]]:
        """Train from the current step to the end, yielding one record a step; checkpoints on the way, at the end and when it is stopped."""
        try:
            while self.step < self.config.steps:
                yield self._train_step()
                if self.step % self.config.checkpoint_every == 0:
                    self.save()
        except (GeneratorExit, KeyboardInterrupt):  # the consumer stopped early; Ctrl-C, which mostly comes during a step
            self.save()
            raise
        self.save()

    def _train_step(self) -> dict[str, object]:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        with self._autocast():
            result = self._loss(self._batch(), generator)
        if not torch.isfinite(result.loss):
            raise ValueError(f"the loss is {result.loss.item()} at step {self.step}: lower learning_rate ({self.config.learning_rate})")
        self.optimizer.zero_grad(set_to_none=False)
        result.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), self.config.clip)
        if not torch.isfinite(norm):
            raise ValueError(f"the gradient is {norm.item()} at step {self.step}: lower learning_rate ({self.config.learning_rate})")
        with held_back():
            self.optimizer.step()
            self.step += 1
        return {"step": self.step, "lr": self.config.rate(self.step - 1), "grad_norm": norm.item(), **result.summary()}

    @torch.no_grad()
    def validate(self, batches: int = 8) -> dict[str, object]:
        """The same record over held-out rows, on the same anchors every time."""
        shard = self.store.shard(len(self.store) - 1)
        results = []
        for i in range(batches):
            rows = torch.arange(i * self.config.sequences, (i + 1) * self.config.sequences) % len(shard.token_ids)
            with self._autocast():
                results.append(self._loss(self._slice(shard, rows), torch.Generator().manual_seed(i)))
        return StepResult(
            torch.stack([r.loss for r in results]).mean(),
            torch.cat([r.acceptance for r in results]),
            torch.cat([r.valid for r in results]),
            {},
        ).summary()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.target.device.type, dtype=torch.bfloat16, enabled=self.target.dtype == torch.bfloat16)

    def _loss(self, shard: Shard, generator: torch.Generator) -> StepResult:
        config = self.drafter.config
        blocks = choose_blocks(shard, self.config.anchors, config.block_size, config.mask_token_id, generator)
        shard, blocks = _to(shard, self.target.device), _to(blocks, self.target.device)
        return block_loss(self.drafter, self.t2d, shard, blocks, self.config.loss)

    def _batch(self) -> Shard:
        """The rows of this step: shards in a new random order every epoch, rows inside a shard as well."""
        train_shards = len(self.store) - self.config.validation_shards
        per_shard = max(1, self.store.shard_rows // self.config.sequences)
        visit, part = divmod(self.step, per_shard)
        epoch, turn = divmod(visit, train_shards)
        order = torch.randperm(train_shards, generator=torch.Generator().manual_seed(self.config.seed * 7_919 + epoch))
        index = int(order[turn])
        if self._loaded is None or self._loaded[0] != index:
            self._loaded = (index, self.store.shard(index))
        shard = self._loaded[1]
        rows = torch.randperm(len(shard.token_ids), generator=torch.Generator().manual_seed(self.config.seed * 104_729 + visit))
        chosen = torch.arange(part * self.config.sequences, (part + 1) * self.config.sequences) % len(rows)
        return self._slice(shard, rows[chosen])

    @staticmethod
    def _slice(shard: Shard, rows: Tensor) -> Shard:
        return Shard(*(getattr(shard, name)[rows] for name in Shard.__dataclass_fields__))

    # ---- what survives a kill

    def save(self) -> None:
        """Write weights, moments and step to one file, whole or not at all; never weights that are not finite."""
        if broken := [name for name, weight in self.drafter.named_parameters() if not weight.isfinite().all()]:
            raise ValueError(f"{broken[0]} is not finite after step {self.step}: {self.checkpoint} is kept as it was; continue from it")
        tensors = {f"weights.{name}": value for name, value in self.drafter.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        about = {"step": self.step} | self._about
        scratch = self.checkpoint.with_suffix(f".{os.getpid()}.part")
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, scratch, {"about": json.dumps(about)})
            scratch.replace(self.checkpoint)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            raise ValueError(f"cannot write {self.checkpoint}: {error}. The last whole checkpoint is kept") from error
        finally:
            scratch.unlink(missing_ok=True)

    def _resume(self) -> None:
        about, tensors = self._read()
        wanted = self._about
        about.setdefault("text", wanted["text"])  # older ones do not name it
        if isinstance(about.get("drafter"), dict):  # checkpoints that name no architecture hold the only one of their time
            about["drafter"] = {"architecture": Drafter.architecture} | about["drafter"]
        about["train"] = {"weight_decay": 0.0, "learn_from": "answers"} | about["train"]  # what older ones do not name
        for name in ("steps", "checkpoint_every"):  # may change on the way: fewer steps anneal sooner, more go on for longer
            about["train"][name] = wanted["train"][name]
        for key, value in wanted.items():
            if about.get(key) != json.loads(json.dumps(value)):
                raise ValueError(f"{self.checkpoint} was made with {key} = {about.get(key)!r}, not {value}: choose another folder")
        self._check(tensors)
        self.drafter.load_state_dict({n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, i, part = name.split(".")
                moments.setdefault(int(i), {})[part] = tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step = about["step"]

    def _read(self) -> tuple[dict, dict[str, Tensor]]:
        try:
            if not self.checkpoint.is_file():
                raise OSError("it is not a file")
            with safe_open(self.checkpoint, "pt", device=str(self.target.device)) as file:
                about = json.loads((file.metadata() or {})["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if type(about["step"]) is not int or about["step"] < 0 or type(about["train"]) is not dict:
                raise ValueError(f"step {about['step']!r}")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{self.checkpoint} is damaged ({reason}): delete it to start over") from None
        return about, tensors

    def _check(self, tensors: dict[str, Tensor]) -> None:
        """Raises ValueError unless these are weights and moments of this drafter, all finite, over the same draft vocabulary."""
        like = {f"weights.{name}": value for name, value in self.drafter.state_dict().items()}
        for i, weight in enumerate(self.drafter.parameters()):
            like |= {f"optimizer.{i}.step": weight.sum(), f"optimizer.{i}.exp_avg": weight, f"optimizer.{i}.exp_avg_sq": weight}
        for name in sorted(like.keys() | tensors.keys()):
            found = tensors.get(name)
            if name not in like or found is None or (found.shape, found.dtype) != (like[name].shape, like[name].dtype):
                raise ValueError(f"{self.checkpoint} is damaged ({name!r} is missing or misshapen): delete it to start over")
            if not found.isfinite().all() or (name.endswith("exp_avg_sq") and (found < 0).any()):
                raise ValueError(f"{self.checkpoint} is damaged ({name} is out of range): delete it to start over")
        if not torch.equal(tensors["weights.d2t"], self.drafter.d2t):
            raise ValueError(f"{self.checkpoint} was made with another draft vocabulary, from another corpus: choose another folder")


def _groups(drafter: Drafter, weight_decay: float) -> list[dict[str, object]]:
    """All parameters in their order, norms and biases undecayed."""
    return [{"params": [weight], "weight_decay": weight_decay if weight.dim() > 1 else 0.0} for weight in drafter.parameters()]


def _to(record: Shard | Blocks, device: torch.device) -> Shard | Blocks:
    return type(record)(*(getattr(record, name).to(device) for name in record.__dataclass_fields__))
