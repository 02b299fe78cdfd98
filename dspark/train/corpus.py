"""Self-play text: token ids, which of them the target wrote as the assistant, and at what temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from dspark.files import one_line, write_atomically


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
    if not Path(path).is_file():
        raise ValueError(f"no corpus at {path}: make one with `python -m dspark.train corpus`")
    try:
        stored = load_file(path)
        ids, bits, temperature = stored["token_ids"], stored["assistant_bits"], stored["temperature"]
    except (SafetensorError, OSError, KeyError, TypeError) as error:  # TypeError: a dtype that NumPy does not have
        raise ValueError(f"{path} is not a self-play corpus: {one_line(error)}") from None
    rows, tokens = ids.shape if ids.ndim == 2 else (-1, -1)
    for name, array, fits in (
        ("token_ids", ids, rows >= 0 and ids.dtype in (np.uint16, np.int32) and ids.min(initial=0) >= 0),
        ("assistant_bits", bits, bits.dtype == np.uint8 and bits.shape == (rows, -(-tokens // 8))),
        ("temperature", temperature, temperature.dtype == np.float32 and temperature.shape == (rows,)),
    ):
        if not fits:
            found = f"{name} is {array.dtype} {list(array.shape)} or out of range"
            raise ValueError(f"{path} is not a self-play corpus: {found}. Make it again with `python -m dspark.train corpus`")
    assistant = np.unpackbits(bits, axis=1)[:, :tokens].astype(bool)
    return Corpus(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(assistant), torch.from_numpy(temperature))


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
