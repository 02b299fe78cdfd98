"""Self-play text: token ids, which of them the target wrote as the assistant, and at what temperature."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from dspark.files import file_sha256, one_line, read_tensors, write_atomically
from dspark.target.target import Target

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


def load_corpus(path: str | Path, target: Target | None = None) -> Corpus:
    """Read a corpus: one file, or the manifest ``*.json`` of a corpus in shards, without its near-duplicates.

    target: the model that must have written it, if the corpus names one. Raises ValueError for a file missing, changed or there twice.
    """
    path = Path(path)
    if path.suffix != ".json":
        return read_shard(path, MAKE)[0]
    manifest, parts = read_manifest(path), []
    if target is not None and manifest["recipe"]["target"] != target.digest:
        found = f"{path} was written by {manifest['recipe']['name']} ({manifest['recipe']['target']})"
        raise ValueError(f"{found}, not by {target.name} ({target.digest}): choose text of this target")
    check_seeds(path)
    for file, shard in zip(shard_files(path, len(manifest["shards"])), manifest["shards"], strict=True):
        remedy = f"delete it, and `python -m dspark.train corpus --corpus {path}` makes it again"
        part, _ = read_shard(file, remedy)
        if file_sha256(file) != shard["sha256"]:
            raise ValueError(f"{file} is not the shard that {path} names: {remedy}")
        kept = torch.ones(len(part), dtype=torch.bool)
        kept[shard["near_duplicates"]] = False
        parts.append(part.rows(kept))
    return concatenate(parts)


def shard_files(path: Path, count: int) -> list[Path]:
    return [path.with_suffix(".shards") / f"{index:06d}.safetensors" for index in range(count)]


def read_manifest(path: Path) -> dict:
    """``recipe``: what all shards depend on; ``rows``; ``shards``: seed, sha256, rows, response_tokens and near_duplicates of each.

    Raises ValueError for a file that is no manifest.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        recipe, shards = manifest["recipe"], manifest["shards"]
        texts = [recipe["target"], recipe["name"], *(shard[name] for shard in shards for name in ("seed", "sha256"))]
        numbers = [recipe["tokens"], recipe["batch"], recipe["seed"], *(row for shard in shards for row in shard["near_duplicates"])]
        dropped = all(0 <= row < shard["rows"] for shard in shards for row in shard["near_duplicates"])
        kinds = {type(text) for text in texts}, {type(number) for number in numbers}
        if kinds != ({str}, {int}) or not dropped or manifest["rows"] != sum(shard["rows"] for shard in shards):
            raise ValueError("a value is of the wrong kind or out of range")
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest of a corpus ({one_line(error)}): choose another path, or {MAKE}") from None
    return manifest


def check_seeds(*paths: Path) -> None:
    """Raises ValueError if two shards of these manifests were made alike, so that they hold the same rows."""
    seen: dict[str, Path] = {}
    for path in (path for path in paths if path.suffix == ".json"):
        manifest = read_manifest(path)
        for shard in manifest["shards"]:
            key = json.dumps([manifest["recipe"] | {"seed": shard["seed"]}], sort_keys=True)
            if key in seen:
                raise ValueError(f"{seen[key]} and {path} both hold the shard of seed {shard['seed']}: make one with another --seed")
            seen[key] = path


def read_shard(path: Path, remedy: str) -> tuple[Corpus, dict[str, str]]:
    """One file, and the text entries of its header. Raises ValueError if it is missing, damaged or has another layout."""
    stored, header = read_tensors(path, remedy)
    ids, bits, temperature = (stored.get(name, torch.empty(0)) for name in ("token_ids", "assistant_bits", "temperature"))
    rows, tokens = ids.shape if ids.dim() == 2 else (-1, -1)
    for name, found, fits in (
        ("token_ids", ids, rows >= 0 and ids.dtype in (torch.uint16, torch.int32) and not (ids.long() < 0).any()),
        ("assistant_bits", bits, bits.dtype == torch.uint8 and bits.shape == (rows, -(-tokens // 8))),
        ("temperature", temperature, temperature.dtype == torch.float32 and temperature.shape == (rows,)),
    ):
        if not fits:
            raise ValueError(f"{path} is no self-play corpus ({name} is {found.dtype} {list(found.shape)} or out of range): {remedy}")
    assistant = np.unpackbits(bits.numpy(), axis=1)[:, :tokens].astype(bool)
    return Corpus(ids.long(), torch.from_numpy(assistant), temperature), header


def save_corpus(corpus: Corpus, path: str | Path, about: str = "") -> None:
    """Write a corpus file: token_ids uint16 (int32 if an id is 65 536 or more), assistant_bits uint8, temperature float32.

    about: of the rows, for the file's header. Raises ValueError if the file cannot be written (a full disk, a read-only folder).
    """
    ids = corpus.token_ids.numpy()
    stored = {
        "token_ids": ids.astype(np.uint16 if ids.max(initial=0) < 1 << 16 else np.int32),
        "assistant_bits": np.packbits(corpus.assistant.numpy(), axis=1),
        "temperature": corpus.temperature.numpy().astype(np.float32),
    }
    write_atomically(path, save(stored, {"about": about} if about else None))


def concatenate(parts: Sequence[Corpus]) -> Corpus:
    """The rows of all parts, in order. Raises ValueError if there are none or if their rows differ in length."""
    lengths = sorted({part.token_ids.shape[1] for part in parts})
    if len(lengths) != 1:
        raise ValueError(f"cannot join corpora of {lengths} tokens a row: pass one or more of the same length")
    return Corpus(*(torch.cat([getattr(part, name) for part in parts]) for name in ("token_ids", "assistant", "temperature")))
