"""A corpus in shards: each is made from its own seed, on any machine, and one manifest names them all.

``text.json`` holds the recipe and each shard's seed, digest, response tokens and near-duplicates; ``text.shards/`` holds the shards.
"""

import json
import random
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dspark.files import digest, file_sha256, write_atomically
from dspark.load import load_target
from dspark.target.target import Target
from dspark.train.corpus import Corpus, concatenate, read_manifest, read_shard, save_corpus, shard_files
from dspark.train.selfplay import Subject, converse, load_subjects, turns_and_starts
from dspark.workers import ENGINES, check_engine

TEMPERATURES = (0.0, 0.6, 1.0)  # of the answers; row i takes the i-th of them, over and over
USER_TEMPERATURE = 0.9
GRAM = 8  # tokens
REPEATED = 0.8  # a row is a near-duplicate if more of its answers' distinct GRAM-token stretches are in earlier rows
MIX = np.uint64(0x9E3779B97F4A7C15)  # an odd number, of the golden ratio
DEFAULTS = {"rows": 4096, "tokens": 448, "batch": 256, "seed": 0}

_loaded = cache(lambda name, dtype, device: load_target(name, dtype=dtype, device=device))  # once in each worker


def make_shard(source: Target | tuple[str, ...], subjects: Sequence[Subject], recipe: dict[str, object], task: tuple[int, int]) -> Corpus:
    """One shard. source: the target, or its name, dtype and device. recipe: what rows depend on. task: index and rows of the shard."""
    (index, count), target = task, source if isinstance(source, Target) else _loaded(*source)
    if target.digest != recipe["target"]:
        raise ValueError(f"{target.name} of a worker is {target.digest}, not {recipe['target']}: give it the same files")
    (turns, starts), first = turns_and_starts(target, subjects), index * recipe["batch"]
    rng = random.Random(f"{recipe['seed']}/{index}")
    generator = torch.Generator(target.device).manual_seed(rng.getrandbits(63))
    chosen = rng.choices([start for start, _ in starts], [weight for _, weight in starts], k=count)
    temperature = torch.tensor([TEMPERATURES[row % len(TEMPERATURES)] for row in range(first, first + count)])
    return converse(target, turns, chosen, temperature, recipe["tokens"], USER_TEMPERATURE, generator)


def self_play(
    target: Target,
    path: Path,
    *,
    subjects: Sequence[Subject] | None = None,
    source: tuple[str, str, str] | None = None,
    engine: str = "local",
    jobs: int = 1,
    **given: int | None,
) -> Corpus:
    """Let a target write a corpus, shard by shard, and then its manifest. Returns the rows that are no near-duplicates.

    path: of the manifest, ``*.json``. An interrupted run resumes at the missing shards and gives the same rows as an uninterrupted one.
    subjects: what the conversations are about; None: :func:`load_subjects`
    source: name, dtype and device of the target, where workers have to load it
    engine, jobs: of :mod:`dspark.workers`
    given: ``rows``, of ``tokens`` each, ``batch`` rows a shard, sampled at a time, and ``seed``. What is None or missing is as in the
        manifest, else as in ``DEFAULTS``. More rows extend a corpus.

    Raises ValueError for settings out of range or other than those of the shards that are there, a target without a usable chat template,
    a shard that is damaged or has more rows than asked for, or a full disk (finished shards are kept).
    """
    path, subjects = Path(path), load_subjects() if subjects is None else tuple(subjects)
    check_engine(engine, jobs)
    if path.suffix != ".json":
        raise ValueError(f"{path} is to be the manifest of the shards: let its name end in .json")
    earlier = read_manifest(path) if path.exists() else {"recipe": {}, "shards": ()}
    usual = DEFAULTS | {name: value for name, value in (earlier | earlier["recipe"]).items() if name in DEFAULTS}
    recipe = usual | {name: value for name, value in given.items() if value is not None}
    rows, batch = recipe.pop("rows"), recipe["batch"]
    if rows < 1 or batch < 1:
        raise ValueError(f"rows={rows}, batch={batch}: both must be at least 1")
    _check_length(target, subjects, recipe["tokens"])
    topics = digest(repr((subjects, getattr(target.tokenizer, "chat_template", None))))
    recipe |= {"target": target.digest, "name": target.name, "dtype": str(target.dtype), "topics": topics}
    recipe |= {"temperatures": list(TEMPERATURES), "user_temperature": USER_TEMPERATURE}
    _refuse_other(path, earlier["recipe"] or recipe, recipe)

    counts, parts = [min(batch, rows - first) for first in range(0, rows, batch)], {}
    for index, file in enumerate(files := shard_files(path, len(counts))):
        if file.exists():
            part, header = read_shard(file, "delete it, and the same command makes it again")
            _refuse_other(file, json.loads(header.get("about", "{}")), recipe | {"shard": index})
            if len(part) > counts[index]:
                raise ValueError(f"{file} has {len(part)} rows, not {counts[index]}: ask for more rows, or choose another path")
            parts |= {index: part} if len(part) == counts[index] else {}  # a shorter last one is made again
    todo = [task for task in enumerate(counts) if task[0] not in parts]
    work = partial(make_shard, target if source is None or (engine, jobs) == ("local", 1) else source, subjects, recipe)
    made = ENGINES[engine](work, todo, jobs, gpus=int(target.device.type == "cuda")) if todo else ()
    for (index, _), part in tqdm(made, total=len(todo), desc="self-play", unit="shard"):
        save_corpus(part, files[index], json.dumps(recipe | {"shard": index}))
        parts[index] = part

    repeated = near_duplicates(corpus := concatenate([parts[index] for index in range(len(files))]))
    manifest = {"recipe": recipe, "rows": rows, "near_duplicates": int(repeated.sum()), "response_tokens": 0, "shards": []}
    for index, (file, drop) in enumerate(zip(files, repeated.split(counts), strict=True)):
        about = {"seed": f"{recipe['seed']}/{index}", "sha256": file_sha256(file), "rows": counts[index]}
        about |= {"response_tokens": int(parts[index].assistant[~drop].sum()), "near_duplicates": drop.nonzero()[:, 0].tolist()}
        for known in earlier["shards"][index : index + 1]:
            if known["rows"] == counts[index] and known["sha256"] != about["sha256"]:
                raise ValueError(f"{file} is not the shard of {path}, which another machine or version made: delete {path} to use yours")
        manifest["response_tokens"] += about["response_tokens"]
        manifest["shards"].append(about)
    write_atomically(path, json.dumps(manifest, indent=1).encode())
    return corpus.rows(~repeated)


def _check_length(target: Target, subjects: Sequence[Subject], tokens: int) -> None:
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
    ids, width = corpus.token_ids.numpy().astype(np.uint64), max(0, corpus.token_ids.shape[1] - GRAM + 1)
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
