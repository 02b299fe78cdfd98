"""Self-play text: token ids, which of them the target wrote as the assistant, and at what temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from dspark.files import read_tensors, write_atomically

MAKE = "make it with `python -m dspark.train corpus`"


@dataclass(frozen=True)
class Corpus:
    """Rows of text, all of the same length."""

    token_ids: Tensor  # [rows, tokens] int64
    assistant: Tensor  # [rows, tokens] bool: the assistant's tokens, which the drafter learns from
    temperature: Tensor  # [rows] float32, of the assistant's turns

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def rows(self, index: Tensor | slice) -> Corpus:
        return Corpus(self.token_ids[index], self.assistant[index], self.temperature[index])


def load_corpus(path: str | Path) -> Corpus:
    """Read a corpus file. Raises ValueError if it is missing, damaged or has another layout."""
    stored, _ = read_tensors(Path(path), MAKE)
    ids, bits, temperature = (stored.get(name, torch.empty(0)) for name in ("token_ids", "assistant_bits", "temperature"))
    rows, tokens = ids.shape if ids.dim() == 2 else (-1, -1)
    for name, found, fits in (
        ("token_ids", ids, rows >= 0 and ids.dtype in (torch.uint16, torch.int32) and not (ids.long() < 0).any()),
        ("assistant_bits", bits, bits.dtype == torch.uint8 and bits.shape == (rows, -(-tokens // 8))),
        ("temperature", temperature, temperature.dtype == torch.float32 and temperature.shape == (rows,)),
    ):
        if not fits:
            raise ValueError(f"{path} is no self-play corpus ({name} is {found.dtype} {list(found.shape)} or out of range): {MAKE}")
    assistant = np.unpackbits(bits.numpy(), axis=1)[:, :tokens].astype(bool)
    return Corpus(ids.long(), torch.from_numpy(assistant), temperature)


def save_corpus(corpus: Corpus, path: str | Path) -> None:
    """Write a corpus file: token_ids uint16 (int32 if an id is 65 536 or more), assistant_bits uint8, temperature float32.

    Raises ValueError if the file cannot be written (a full disk, a read-only folder).
    """
    ids = corpus.token_ids.numpy()
    stored = {
        "token_ids": ids.astype(np.uint16 if ids.max(initial=0) < 1 << 16 else np.int32),
        "assistant_bits": np.packbits(corpus.assistant.numpy(), axis=1),
        "temperature": corpus.temperature.numpy().astype(np.float32),
    }
    write_atomically(path, save(stored))


def concatenate(parts: Sequence[Corpus]) -> Corpus:
    """The rows of all parts, in order. Raises ValueError if there are none or if their rows differ in length."""
    lengths = sorted({part.token_ids.shape[1] for part in parts})
    if len(lengths) != 1:
        raise ValueError(f"cannot join corpora of {lengths} tokens a row: pass one or more of the same length")
    return Corpus(*(torch.cat([getattr(part, name) for part in parts]) for name in ("token_ids", "assistant", "temperature")))
