"""A corpus in shards: each is made from its own seed, on any machine, and one manifest names them all.

``text.json`` holds the recipe and each shard's seed, digest, response tokens and near-duplicates; ``text.shards/`` holds the shards.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dspark.files import digest, file_sha256, write_atomically
from dspark.load import load_target
from dspark.target.target import Target
from dspark.train.corpus import Corpus, concatenate, read_manifest, read_shard, save_corpus, shard_files
from dspark.train.selfplay import Subject, converse, encoded_starts, free_text, load_subjects, turns_of
from dspark.workers import ENGINES, check_engine

TEMPERATURES = (0.0, 0.6, 1.0)  # of the answers; row i takes the i-th of them, over and over
USER_TEMPERATURE = 0.9
GRAM = 8  # tokens
REPEATED = 0.8  # a row is a near-duplicate if more of its answers' distinct GRAM-token stretches are in earlier rows
MIX = np.uint64(0x9E3779B97F4A7C15)  # an odd number, of the golden ratio
DEFAULTS = {"rows": 4096, "tokens": 448, "batch": 256, "seed": 0}

Source = Target | tuple[str, str, str]  # a loaded target, or name, dtype and device of one that every worker loads once


@dataclass(frozen=True)
class Play:
    """Makes the shards of one corpus. ``recipe``: what their rows depend on, beside the shard's index and number of rows."""

    source: Source
    subjects: tuple[Subject, ...]
    recipe: dict[str, object]

    def __call__(self, task: tuple[int, int]) -> Corpus:
        """task: index and rows of a shard. Raises ValueError if this machine's target is another one."""
        (index, count), tokens = task, self.recipe["tokens"]
        target = self.source if isinstance(self.source, Target) else _loaded(*self.source)
        if target.digest != self.recipe["target"]:
            raise ValueError(
                f"a worker's {target.name} has the digest {target.digest}, not {self.recipe['target']}: give it the same files"
            )
        turns, starts = turns_and_starts(target, self.subjects)
        rng, first = random.Random(self.seed(index)), index * self.recipe["batch"]
        generator = torch.Generator(target.device).manual_seed(rng.getrandbits(63))
        chosen = rng.choices([start for start, _ in starts], [weight for _, weight in starts], k=count)
        temperature = torch.tensor([TEMPERATURES[row % len(TEMPERATURES)] for row in range(first, first + count)])
        return converse(target, turns, chosen, temperature, tokens, USER_TEMPERATURE, generator)

    def seed(self, index: int) -> str:
        return f"{self.recipe['seed']}/{index}"


_loaded = cache(lambda name, dtype, device: load_target(name, dtype=dtype, device=device))


def turns_and_starts(target: Target, subjects: Sequence[Subject]) -> tuple:
    """As the chat template has them; free text without one."""
    if getattr(target.tokenizer, "chat_template", None) is None:
        return free_text(target)
    return turns_of(target), encoded_starts(target, subjects)


def self_play(
    target: Target,
    path: Path,
    *,
    rows: int | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    seed: int | None = None,
    subjects: Sequence[Subject] | None = None,
    source: Source | None = None,
    engine: str = "local",
    jobs: int = 1,
) -> Corpus:
    """Make a corpus of ``rows`` rows of ``tokens`` tokens, in shards of ``batch`` rows that are sampled at a time.

    path: the manifest, ``*.json``, written last. An interrupted run resumes at the missing shards and gives the same rows as an
        uninterrupted one; a larger ``rows`` extends the corpus. What is None is as in the manifest, else as in ``DEFAULTS``.
    subjects: what the conversations are about; None: :func:`load_subjects`
    source: the target as workers load it, where an engine has several
    engine, jobs: of :mod:`dspark.workers`

    Returns the rows that are no near-duplicates. Raises ValueError for settings out of range or other than those of the shards that are
    there, a target without a usable chat template, a damaged shard, or a full disk (finished shards are kept).
    """
    path, subjects = Path(path), load_subjects() if subjects is None else tuple(subjects)
    check_engine(engine, jobs)
    if path.suffix != ".json":
        raise ValueError(f"{path} is to be the manifest of the shards: let its name end in .json")
    earlier = read_manifest(path) if path.exists() else {}
    usual = DEFAULTS | ({"rows": earlier["rows"], **earlier["recipe"]} if earlier else {})
    given = {"rows": rows, "tokens": tokens, "batch": batch, "seed": seed}
    recipe = {name: usual[name] if value is None else value for name, value in given.items()}
    rows, batch = recipe.pop("rows"), recipe["batch"]
    if rows < 1 or batch < 1:
        raise ValueError(f"rows={rows}, batch={batch}: both must be at least 1")
    check_length(target, subjects, recipe["tokens"])
    topics = digest(repr((subjects, getattr(target.tokenizer, "chat_template", None))))
    recipe |= {"target": target.digest, "name": target.name, "dtype": str(target.dtype), "topics": topics}
    recipe |= {"temperatures": list(TEMPERATURES), "user_temperature": USER_TEMPERATURE}
    if earlier:
        _refuse_other(path, earlier["recipe"], recipe)

    play = Play(target if source is None or (engine, jobs) == ("local", 1) else source, subjects, recipe)
    counts, files = _counts(rows, batch), shard_files(path, -(-rows // batch))
    named = zip(_counts(earlier.get("rows", 0), batch), earlier.get("shards", ()), strict=True)
    named = [shard["sha256"] if count == now else None for (count, shard), now in zip(named, counts, strict=False)]
    parts: dict[int, Corpus] = {}

    def take(index: int, part: Corpus) -> None:
        if index < len(named) and named[index] not in (None, file_sha256(files[index])):
            raise ValueError(
                f"{files[index]} is not the shard of {path}, which another machine or version made: delete {path} to use yours"
            )
        parts[index] = part

    for index, file in enumerate(files):
        if file.exists():
            part, header = read_shard(file, "delete it, and the same command makes it again")
            _refuse_other(file, json.loads(header.get("about", "{}")), recipe | {"shard": index})
            if len(part) == counts[index]:  # a shorter last one is made again
                take(index, part)
    todo = [task for task in enumerate(counts) if task[0] not in parts]
    with tqdm(total=len(files), initial=len(parts), desc="self-play", unit="shard") as bar:
        for (index, _), part in ENGINES[engine](play, todo, jobs, gpus=int(target.device.type == "cuda")) if todo else ():
            save_corpus(part, files[index], json.dumps(recipe | {"shard": index}))
            take(index, part)
            bar.update()
    corpus, shards = concatenate([parts[index] for index in range(len(files))]), []
    repeated = near_duplicates(corpus)
    for index, drop in enumerate(repeated.split(counts)):
        about = {"seed": play.seed(index), "sha256": file_sha256(files[index])}
        about |= {"response_tokens": int(parts[index].assistant[~drop].sum()), "near_duplicates": drop.nonzero()[:, 0].tolist()}
        shards.append(about)
    corpus = corpus.rows(~repeated)
    total = {"rows": rows, "near_duplicates": int(repeated.sum()), "response_tokens": int(corpus.assistant.sum())}
    write_atomically(path, json.dumps({"recipe": recipe, **total, "shards": shards}, indent=1).encode())
    return corpus


def _counts(rows: int, batch: int) -> list[int]:
    """Rows of each shard."""
    return [min(batch, rows - first) for first in range(0, rows, batch)]


def check_length(target: Target, subjects: Sequence[Subject], tokens: int) -> None:
    """Raises ValueError for rows that are too long for the target, or too short for an answer."""
    if tokens > target.max_context:
        raise ValueError(f"tokens={tokens}, but {target.name} takes at most {target.max_context}: ask for fewer")
    turns, starts = turns_and_starts(target, subjects)
    needed = max(len(start) for start, _ in starts) + len(turns.to_assistant) + 1
    if tokens - int(tokens * turns.user_share) < needed:
        least = int(needed / (1 - turns.user_share)) + 1
        raise ValueError(f"tokens={tokens} leaves no room for an answer after the longest opening: ask for at least {least}")


def _refuse_other(where: Path, found: dict, wanted: dict) -> None:
    """Raises ValueError if a manifest or shard was made with other settings."""
    if other := [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]:
        there, asked = ({name: side.get(name) for name in other} for side in (found, wanted))
        raise ValueError(f"{where} was made with {there}, not with {asked}: use the same settings or another path")


def near_duplicates(corpus: Corpus) -> Tensor:
    """[rows] bool: rows whose answers are mostly in earlier rows, by the hashes of their n-grams (Broder, 1997, without sampling)."""
    ids, width = corpus.token_ids.numpy().astype(np.uint64), corpus.token_ids.shape[1] - GRAM + 1
    hashes, inside = np.zeros((len(corpus), width), np.uint64), np.ones((len(corpus), width), bool)
    for i in range(GRAM):
        hashes = (hashes ^ ids[:, i : i + width]) * MIX  # modulo 2⁶⁴
        hashes ^= hashes >> np.uint64(29)
        inside &= corpus.assistant.numpy()[:, i : i + width]
    rows, places = inside.nonzero()
    hashes = hashes[rows, places]
    once = np.sort(np.unique(hashes ^ (rows.astype(np.uint64) * MIX), return_index=True)[1])  # each n-gram of a row once
    rows, hashes = rows[once], hashes[once]
    first = np.unique(hashes, return_index=True)[1]  # where it appears in the corpus for the first time
    fresh, all_of_it = (np.bincount(which, minlength=len(corpus)) for which in (rows[first], rows))
    return torch.from_numpy(fresh < (1 - REPEATED) * all_of_it)
