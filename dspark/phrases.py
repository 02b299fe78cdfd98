"""Phrases that the target is known to write: n-grams of its own self-play text, and what mostly follows them.

A model repeats itself across texts as well as inside one. Counting is all it takes to know, and looking up is all it costs to
draft: retrieval of whole phrases from a datastore is He et al., 2024 (REST); here the datastore is the target's own self-play.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

FILE = "phrases.safetensors"  # in a drafter's folder
ORDERS = (5, 4, 3)  # tokens of a remembered n-gram
LEAST_COUNT = 2  # a follower seen once may be chance
LEAST_RATE = 0.5  # of count / (all followers + 1)

PRIME, MIX, MASK = 0x100000001B3, 0x9E3779B97F4A7C15, (1 << 64) - 1


@dataclass(frozen=True)
class PhraseMemory:
    """keys: [n] uint32 hashes of n-grams, ascending · followers: [n] uint16, or int32 where a token is 2¹⁶ or more, the token that mostly
    follows · rates: [n] uint8, how often it did, in 1/255. So it takes 7 or 9 bytes a phrase. Two n-grams with the same hash at worst
    draft a wrong token, which the target refuses; among a million phrases an unknown n-gram has a known one's hash once in 4 000 times.
    """

    keys: np.ndarray
    followers: np.ndarray
    rates: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of_text(cls, token_ids: np.ndarray, assistant: np.ndarray) -> PhraseMemory:
        """Remember what follows each n-gram of :data:`ORDERS` in the assistant's turns. token_ids: [rows, tokens] int · assistant:
        [rows, tokens] bool, which of them the target wrote. Raises ValueError if nothing is said twice."""
        found = [_counted(token_ids, assistant, order) for order in ORDERS if order < token_ids.shape[1]]
        keys, followers, rates = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else ([], [], [])
        if not len(keys):
            raise ValueError(f"no phrase of {min(ORDERS)} tokens comes twice in {token_ids.size} tokens: pass more text")
        keys, order = np.unique(keys, return_index=True)
        return cls(keys, followers[order].astype(np.uint16 if followers.max() < 1 << 16 else np.int32), rates[order])

    def follower(self, gram: Sequence[int]) -> tuple[int, float] | None:
        """The token that mostly follows this n-gram, and its rate in 0..1; None if that is not known."""
        key = _key(gram)
        at = int(np.searchsorted(self.keys, np.uint32(key)))
        if at == len(self.keys) or int(self.keys[at]) != key:
            return None
        return int(self.followers[at]), int(self.rates[at]) / 255

    def save(self, path: str | Path, target_digest: str) -> None:
        """Write one file, whole or not at all. Raises ValueError if it cannot be written."""
        path = Path(path)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
        tensors = {"keys": self.keys, "followers": self.followers, "rates": self.rates}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(save(tensors, {"about": json.dumps({"orders": ORDERS, "target_digest": target_digest})}))
            scratch.replace(path)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error}. Make room or choose another place") from error
        finally:
            scratch.unlink(missing_ok=True)


def load_phrases(path: str | Path, target_digest: str | None, vocab_size: int) -> PhraseMemory:
    """Read a memory. target_digest: of the target it must have been made for, None to accept any.

    Raises ValueError for a file that is missing, damaged, of another layout or another target.
    """
    remedy = "make it with `python -m dspark.train phrases`"
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {})["about"])
            keys, followers, rates = (file.get_tensor(name) for name in ("keys", "followers", "rates"))
        made_for, orders = about["target_digest"], tuple(about["orders"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is no phrase memory ({reason}): {remedy}") from None
    kinds = [array.dtype for array in (keys, rates)] == [np.uint32, np.uint8] and followers.dtype in (np.uint16, np.int32)
    if not kinds or keys.ndim != 1 or not keys.shape == followers.shape == rates.shape or orders != ORDERS:
        raise ValueError(f"{path} is of another layout: {remedy}")
    if len(keys) and ((keys[1:] <= keys[:-1]).any() or not 0 <= followers.min() <= followers.max() < vocab_size):
        raise ValueError(f"{path} is damaged (keys out of order or tokens outside the vocabulary of {vocab_size}): {remedy}")
    if target_digest is not None and made_for != target_digest:
        raise ValueError(f"{path} was made for weights {made_for!r}, not for {target_digest}: {remedy}")
    return PhraseMemory(keys, followers, rates)


def _key(gram: Sequence[int]) -> int:
    """32-bit hash of an n-gram, its length included: the upper half of 64 bits, where all tokens meet."""
    key = len(gram)
    for token in gram:
        key = (key * PRIME + token + 1) & MASK
    return (key * MIX & MASK) >> 32


def _counted(token_ids: np.ndarray, assistant: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, their most frequent followers and the rates, of n-grams that pass both thresholds. Ties go to the larger token id."""
    ids = token_ids.astype(np.uint64)
    places = ids.shape[1] - order
    keys = np.full((ids.shape[0], places), order, dtype=np.uint64)
    for i in range(order):
        keys = keys * np.uint64(PRIME) + ids[:, i : places + i] + np.uint64(1)  # arrays of uint64 wrap round as _key does
    written = assistant[:, order:]
    keys, follower = keys[written], ids[:, order:][written]

    by_pair = np.lexsort((follower, keys))
    keys, follower = keys[by_pair], follower[by_pair]
    first = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]) | (follower[1:] != follower[:-1])]) if len(keys) else np.zeros(0, int)
    count = np.diff(np.r_[first, len(keys)])
    keys, follower = keys[first], follower[first]

    by_count = np.lexsort((count, keys))
    keys, follower, count = keys[by_count], follower[by_count], count[by_count]
    last = np.flatnonzero(np.r_[keys[1:] != keys[:-1], True]) if len(keys) else first
    seen = np.diff(np.r_[0, count.cumsum()[last]])  # all followers of the key
    best, rate = count[last], count[last] / (seen + 1)
    kept = last[(best >= LEAST_COUNT) & (rate >= LEAST_RATE)]
    rate = rate[(best >= LEAST_COUNT) & (rate >= LEAST_RATE)]
    return (keys[kept] * np.uint64(MIX) >> np.uint64(32)).astype(np.uint32), follower[kept], np.round(255 * rate).astype(np.uint8)
