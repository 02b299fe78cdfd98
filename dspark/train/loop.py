"""Training a drafter for a frozen target: batches, optimiser, validation. A training that was killed resumes bit-exactly.

Started by ``accelerate launch``, each process computes the gradient of its share of a step's rows, and all take the step of their sum.
"""

import contextlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor
from tqdm.auto import tqdm

from dspark.bench.provenance import revision
from dspark.draft.drafter import Drafter
from dspark.formats.native import save_drafter
from dspark.target.target import Target
from dspark.train.checkpoint import load_checkpoint, save_checkpoint
from dspark.train.features import FeatureStore, Shard
from dspark.train.losses import BlockLoss, Blocks, block_loss, choose_blocks
from dspark.tune.profile import cpu_name, device_name

WARMUP = 0.04  # share of the steps
CLIP = 1.0  # largest norm of the gradient


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser and batches. Raises ValueError for a value out of range."""

    steps: int
    sequences: int = 4  # corpus rows of one step
    anchors: int = 64  # blocks per row and step
    learning_rate: float = 6e-4  # at the end of the warm-up
    weight_decay: float = 0.0  # of matrices, not of norms and biases
    seed: int = 0
    checkpoint_every: int = 500  # steps

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "anchors", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.weight_decay * self.learning_rate < 1:
            raise ValueError(f"weight_decay must be from 0 (none) to less than 1 / learning_rate, got {self.weight_decay}")

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then cosine to 0."""
        warm = max(1, round(WARMUP * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


class Trainer:
    """Float32 master weights, AdamW's moments and the step. Everything random derives from (seed, step), so a resume is exact.

    Of several processes, the main one alone writes; all must see the same folders.

    The last shard of the store is held out. Continues from the checkpoint in ``folder`` if there is one. Raises ValueError if the
    corpus is too small, or the checkpoint damaged or of another training.
    """

    def __init__(self, target: Target, drafter: Drafter, store: FeatureStore, config: TrainConfig, folder: Path) -> None:
        if len(store) < 2:
            found = f"the corpus has {len(store.corpus)} rows, and the last {store.shard_rows} are held out"
            raise ValueError(f"{found}, so nothing is left to train on: make more rows")
        self.target, self.store, self.config, self.folder = target, store, config, folder
        self.processes = PartialState(cpu=target.device.type == "cpu")  # one, unless accelerate has launched several
        self._share = slice(self.processes.process_index, None, self.processes.num_processes)  # this one's rows of a batch
        if config.sequences < self.processes.num_processes:
            found = f"{self.processes.num_processes} processes share {config.sequences} sequences a step"
            raise ValueError(f"{found}: launch fewer, or raise --sequences")
        self.drafter = drafter.float().attach(target)
        decays = [(weight, config.weight_decay if weight.dim() > 1 else 0.0) for weight in self.drafter.parameters()]
        groups = [{"params": [weight], "weight_decay": decay} for weight, decay in decays]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        self.step, self.checkpoint = 0, folder / "checkpoint.safetensors"
        self._loaded: tuple[int, Shard] | None = None  # the shard of the last batch, and its index
        shape = {"architecture": drafter.architecture} | drafter.config.to_dict()
        # A checkpoint resumes only where all that the training depends on is the same.
        about = {"train": asdict(config), "drafter": shape, "target": target.digest, "text": store.text}
        self._about = about | {"dtype": str(target.dtype).removeprefix("torch.")}
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self.step = load_checkpoint(self.checkpoint, self.drafter, self.optimizer, self._about)
        if len(steps := set(gather_object([self.step]))) > 1:
            raise ValueError(f"the processes would resume from steps {sorted(steps)}: let all of them see one folder {folder}")

    def run(self) -> Iterator[dict[str, object]]:
        """Train from the current step to the end and yield one record a step. Saves now and then, at the end and when interrupted."""
        try:
            while self.step < self.config.steps:
                yield self._train_step()
                if self.step % self.config.checkpoint_every == 0:
                    self.save()
        except (GeneratorExit, KeyboardInterrupt):  # the consumer stopped early, or Ctrl-C
            with uninterrupted():  # a launcher that sees a process end stops the others too
                self.save()
            raise
        self.save()

    def _train_step(self) -> dict[str, object]:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        result = self._loss(self._batch(), generator)
        self.optimizer.zero_grad(set_to_none=False)
        result.loss.backward()
        result = self._summed(result, [weight.grad for weight in self.drafter.parameters() if weight.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), CLIP)
        if not (norm + result.loss).isfinite():
            found = f"the loss is {result.loss.item()} and its gradient {norm.item()} at step {self.step}"
            raise ValueError(f"{found}: lower learning_rate ({self.config.learning_rate})")
        with uninterrupted():
            self.optimizer.step()
            self.step += 1
        return {"step": self.step, "lr": self.config.rate(self.step - 1), "grad_norm": norm.item(), **result.summary()}

    @torch.no_grad()
    def validate(self, batches: int = 8) -> dict[str, object]:
        """The record of a step, over held-out rows with the same anchors every time."""
        shard = self._shard(len(self.store) - 1)
        results = []
        for i in range(batches):
            rows = torch.arange(i * self.config.sequences, (i + 1) * self.config.sequences) % len(shard.token_ids)
            share = self._loss(_each(shard, lambda x, rows=rows: x[rows]), torch.Generator().manual_seed(i))
            results.append(self._summed(share, []))
        acceptance, valid = (torch.cat([getattr(r, name) for r in results]) for name in ("acceptance", "valid"))
        return BlockLoss(torch.stack([r.loss for r in results]).mean(), acceptance, valid).summary()

    def _loss(self, shard: Shard, generator: torch.Generator) -> BlockLoss:
        config = self.drafter.config
        blocks = choose_blocks(shard, self.config.anchors, config.block_size, config.mask_token_id, generator)
        shard, blocks = (_each(record, lambda x: x[self._share].to(self.target.device)) for record in (shard, blocks))
        with torch.autocast(self.target.device.type, dtype=torch.bfloat16, enabled=self.target.dtype == torch.bfloat16):
            return block_loss(self.drafter, shard, blocks)

    def _summed(self, share: BlockLoss, gradients: list[Tensor]) -> BlockLoss:
        """The loss of all processes' shares; ``gradients`` become those of all of them. One sum over one vector a step."""
        if self.processes.num_processes == 1:
            return share
        whole = torch.zeros(2, self.config.sequences, *share.valid.shape[1:], device=share.valid.device)
        whole[:, self._share] = torch.stack([share.acceptance, share.valid.float()])
        tensors = [share.loss.detach(), whole, *gradients]
        try:
            vector = reduce(torch.cat([tensor.flatten() for tensor in tensors]), "sum")
        except RuntimeError as error:  # another process has ended: this one keeps what it has
            raise KeyboardInterrupt from error
        for tensor, total in zip(tensors, vector.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))
        return BlockLoss(tensors[0], whole[0], whole[1].bool())

    def _batch(self) -> Shard:
        """The rows of this step. Every epoch shuffles the shards, every visit to a shard its rows."""
        train_shards = len(self.store) - 1
        per_shard = max(1, self.store.shard_rows // self.config.sequences)
        visit, part = divmod(self.step, per_shard)
        epoch, place = divmod(visit, train_shards)
        order = torch.randperm(train_shards, generator=torch.Generator().manual_seed(self.config.seed * 7_919 + epoch))
        index = int(order[place])
        if self._loaded is None or self._loaded[0] != index:
            self._loaded = (index, self._shard(index))
        shard = self._loaded[1]
        rows = torch.randperm(len(shard.token_ids), generator=torch.Generator().manual_seed(self.config.seed * 104_729 + visit))
        chosen = rows[torch.arange(part * self.config.sequences, (part + 1) * self.config.sequences) % len(rows)]
        return _each(shard, lambda x: x[chosen])

    def _shard(self, index: int) -> Shard:
        """Of the processes of a machine the main one computes and keeps the features, and the others read them."""
        with self.processes.local_main_process_first() if self.store.folder else contextlib.nullcontext():
            return self.store.shard(index)

    def save(self) -> None:
        """Write the checkpoint. Raises ValueError as :func:`dspark.train.checkpoint.save_checkpoint` does."""
        if self.processes.is_main_process:
            save_checkpoint(self.checkpoint, self.drafter, self.optimizer, {"step": self.step} | self._about)


def _each(record: Shard | Blocks, change: Callable[[Tensor], Tensor]) -> Shard | Blocks:
    """The same record with every tensor changed."""
    return type(record)(*(change(getattr(record, part.name)) for part in fields(record)))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay the KeyboardInterrupt of SIGINT and SIGTERM until the body has run: half an update must not be saved."""
    received: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()  # no other thread is interrupted
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if in_main and signal.getsignal(n) is signal.default_int_handler]
    for number in numbers:
        signal.signal(number, lambda number, _frame: received.append(number))
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)
    if received:
        raise KeyboardInterrupt


def train_to(trainer: Trainer, out: Path, *, about: dict[str, object]) -> None:
    """Train to the end and save the drafter in ``out``, with progress, a line of ``log.jsonl`` a step, and held-out numbers.

    about: what config.json says of the training beside its steps, text, place and held-out numbers
    """
    main = trainer.processes.is_main_process
    path = trainer.folder / "log.jsonl" if main else Path(os.devnull)
    bar = tqdm(total=trainer.config.steps, initial=trainer.step, unit="step", desc=out.name, disable=not main)
    # Closing the iterator saves a checkpoint when Ctrl-C arrives in this function.
    with path.open("a" if trainer.step else "w") as log, bar, contextlib.closing(trainer.run()) as records:
        for record in records:
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.3f}", tau=f"{record['tau']:.2f}", acceptance=record["acceptance"])
            if record["step"] % trainer.config.checkpoint_every == 0:
                record |= {"held_out": trainer.validate()}
            log.write(json.dumps(record) + "\n")
            log.flush()
    corpus, curve = trainer.store.corpus, {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError):  # a line that a full disk tore apart; a step that was not judged
            record = json.loads(line)
            curve[record["step"]] = record["held_out"]["tau"]
    machine = cpu_name() if trainer.target.device.type == "cpu" else device_name(trainer.target.device)
    summary = {"steps": trainer.step, **about, "corpus_rows": len(corpus), "response_tokens": int(corpus.assistant.sum())}
    summary |= {"held_out": trainer.validate(), "curve": sorted(curve.items()), "revision": revision(), "machine": machine}
    if main:
        save_drafter(trainer.drafter, trainer.target, out, training=summary)
