"""What the drafter learns from: the target's taps and last hidden states over a corpus, computed once, shard by shard."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark.files import digest, read_tensors, write_atomically
from dspark.target.target import Taps, Target
from dspark.train.corpus import Corpus

SHARD_ROWS = 64  # 200 MB of features at hidden size 576 and five taps; the last shard, full or not, is held out
BATCH_ROWS = 8


@dataclass(frozen=True)
class Shard:
    """Some rows of the corpus and what the target computes over them. Features have the target's dtype."""

    token_ids: Tensor  # [rows, tokens] int64
    assistant: Tensor  # [rows, tokens] bool: the tokens that are learnt from
    taps: Tensor  # [rows, tokens, m·hidden]
    final: Tensor  # [rows, tokens, hidden]: what the LM head reads
    logsumexp: Tensor  # [rows, tokens] float32 of the target's logits where there is something to learn, ∞ elsewhere


def all_text(corpus: Corpus, shard_rows: int = SHARD_ROWS) -> Corpus:
    """Mark every token as one to learn from, except in the last shard: validation stays on the assistant's tokens."""
    assistant = corpus.assistant.clone()
    assistant[: (len(corpus) - 1) // shard_rows * shard_rows] = True
    return Corpus(corpus.token_ids, assistant, corpus.temperature)


class FeatureStore:
    """Runs the target over the corpus on demand. With a ``folder``, every shard is kept there and computed only once.

    Raises ValueError if the target has no such taps, does not know a token of the corpus, or changes its logits after the head.
    """

    def __init__(
        self, target: Target, corpus: Corpus, taps: Sequence[int], folder: Path | None = None, shard_rows: int = SHARD_ROWS
    ) -> None:
        target.check_taps(taps)
        if len(corpus) and not 0 <= (highest := int(corpus.token_ids.max())) < target.vocab_size:
            raise ValueError(f"the corpus holds token {highest}, but {target.name} has {target.vocab_size}: choose text of this target")
        self.target, self.corpus, self.taps, self.folder = target, corpus, tuple(taps), folder
        self.shard_rows = shard_rows
        self._about = json.dumps({"target": target.digest, "taps": self.taps})
        self._check_head()

    @torch.inference_mode()
    def _check_head(self) -> None:
        """The loss computes the target's distribution from its head alone, so a target that changes the head's logits is refused."""
        token_ids = self.corpus.token_ids[:1, :16].to(self.target.device)
        if not token_ids.numel():
            return
        logits = self.target.model(input_ids=token_ids, use_cache=False).logits.float()
        head = self.target.head(self.target.decoder(input_ids=token_ids, use_cache=False).last_hidden_state).float()
        if (logits - head).abs().max() > max(1e-3, 4 * torch.finfo(self.target.dtype).eps) * logits.abs().max():
            found = f"{self.target.name} caps, scales or shifts its logits after the head, so a drafter would learn another distribution"
            raise ValueError(f"{found}: train for another target; ContextLookup(None, target=…) drafts for this one without training")

    def __len__(self) -> int:
        return -(-len(self.corpus) // self.shard_rows)

    def shard(self, index: int) -> Shard:
        """Shard ``index``, read from the folder or computed. Raises ValueError for a kept shard that is damaged or of other text."""
        corpus = self.corpus.rows(slice(index * self.shard_rows, (index + 1) * self.shard_rows))
        path = None if self.folder is None else self.folder / f"{index:05d}.safetensors"
        if path is not None and path.exists():
            return Shard(corpus.token_ids, corpus.assistant, **self._read(path, corpus))
        tensors = self._compute(corpus)
        if path is not None:
            stored = tensors | {"token_ids": corpus.token_ids.clone()}
            write_atomically(path, lambda scratch: save_file(stored, scratch, {"about": self._about}))
        return Shard(corpus.token_ids, corpus.assistant, **tensors)

    @cached_property
    def text(self) -> str:
        """16 hex digits that change with the text and with which of its tokens are learnt from."""
        return digest(self.corpus.token_ids.numpy().tobytes(), self.corpus.assistant.numpy().tobytes())

    def _read(self, path: Path, corpus: Corpus) -> dict[str, Tensor]:
        """A kept shard belongs to one target, one set of taps and these rows. Raises ValueError for anything else."""
        tensors, header = read_tensors(path, "delete it, and it is computed again")
        shape, hidden, dtype = corpus.token_ids.shape, self.target.hidden_size, self.target.dtype
        wanted = {"token_ids": (shape, torch.int64), "logsumexp": (shape, torch.float32)}
        wanted |= {"taps": ((*shape, len(self.taps) * hidden), dtype), "final": ((*shape, hidden), dtype)}
        whole = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == wanted
        if not whole or header.get("about") != self._about or not torch.equal(tensors.pop("token_ids"), corpus.token_ids):
            raise ValueError(f"{path} holds other features than {self._about} of this text: choose another folder, or delete it")
        read = (tensors["taps"], tensors["final"], tensors["logsumexp"][corpus.assistant])
        if not all(values.isfinite().all() for values in read):
            raise ValueError(f"{path} is damaged or was kept by a training that learns from less of this text: choose another folder")
        return tensors

    @torch.inference_mode()
    def _compute(self, corpus: Corpus) -> dict[str, Tensor]:
        parts = []
        for token_ids, assistant in zip(corpus.token_ids.split(BATCH_ROWS), corpus.assistant.split(BATCH_ROWS), strict=True):
            with Taps(self.target, self.taps) as tapped:
                final = self.target.decoder(input_ids=token_ids.to(self.target.device), use_cache=False).last_hidden_state
            logsumexp = torch.full(token_ids.shape, torch.inf, device=final.device)
            chunks = final[assistant].split(64)  # the float32 logits of all rows at once would not fit in memory
            logsumexp[assistant] = torch.cat([self.target.head(chunk).float().logsumexp(-1) for chunk in chunks])
            parts.append({"taps": tapped.joined().cpu(), "final": final.cpu(), "logsumexp": logsumexp.cpu()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
