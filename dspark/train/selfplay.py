"""Self-play: the target writes both sides of many conversations, so that the drafter learns from text of the target's own law.

Every row is a system prompt, a user turn and an answer, and so on until the row is full: after each end of turn the chat template's
tokens are forced and sampling goes on, so all rows have the same length and none is padded.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dspark.target.target import Target
from dspark.train.corpus import Corpus, concatenate, load_corpus, save_corpus, write_atomically
from dspark.train.subjects import SUBJECTS, Subject
from dspark.train.turns import Turns, head_of, turns_of

USER_SHARE = 1 / 3  # of a row: a longer user turn is ended by force, because the drafter learns from answers only
REPORT_EVERY = 16  # positions between two updates of the progress bar
CPU_SLICE = 16  # rows sampled at a time on a CPU: their float32 probabilities stay in its cache (three times faster than 256 at once)


def sample(logits: Tensor, temperature: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution; temperature 0 takes the argmax.

    logits: [rows, vocab] of any float dtype. temperature: [rows] float32. generator: on the logits' device. Returns [rows] int64.
    """
    uniform = torch.rand(len(logits), 1, generator=generator, device=logits.device)
    size = CPU_SLICE if logits.device.type == "cpu" else len(logits)
    slices = zip(logits.split(size), temperature[:, None].split(size), uniform.split(size), strict=True)
    return torch.cat([_invert(*rows) for rows in slices])


def _invert(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    greedy = temperature == 0  # [rows, 1]
    cdf = torch.softmax(logits.float() / temperature.masked_fill(greedy, 1.0), dim=-1).cumsum(-1)  # [rows, vocab]
    total = cdf[:, -1:]
    # Strictly below the total, which uniform · total can round up to; right=True never lands on a token of probability 0.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cdf, threshold, right=True)
    return torch.where(greedy, logits.argmax(-1, keepdim=True), drawn)[:, 0]


@torch.no_grad()
def converse(
    target: Target,
    turns: Turns,
    starts: Sequence[Sequence[int]],
    temperature: Tensor,
    tokens: int,
    user_temperature: float,
    generator: torch.Generator,
    report: Callable[[int, int], None] = lambda *_: None,
) -> Corpus:
    """Let the target talk to itself, one conversation per start, until every row has ``tokens`` tokens.

    starts: token ids up to and with the opening of the first user turn. temperature: [rows] float32, of the assistant's turns.
    generator: on the target's device. ``report(tokens, response tokens)`` is called now and then with how many are new.
    The returned mask marks the sampled tokens of the assistant, its end of turn included. Everything is on the CPU.
    """
    device, rows, shortest = target.device, len(starts), min(map(len, starts))
    forces = [torch.tensor(piece, dtype=torch.long, device=device) for piece in (turns.to_assistant[1:], turns.to_user)]
    end_of_user, stops = turns.to_assistant[0], torch.tensor(turns.stops, device=device)
    margin = max(map(len, forces)) + 1  # the last turn's end may force tokens beyond the row
    ids = torch.full((rows, tokens + margin), -1, device=device)  # -1: free, to be sampled; else forced or done
    for row, start in zip(ids, starts, strict=True):
        row[: len(start)] = torch.tensor(start, device=device)
    response = torch.zeros(rows, tokens, dtype=torch.bool, device=device)
    answering = torch.zeros(rows, dtype=torch.bool, device=device)  # whose turn: the assistant's or the user's
    spoken = torch.zeros(rows, dtype=torch.long, device=device)  # sampled tokens of the current turn
    temperature, as_user = temperature.to(device), torch.full((rows,), user_temperature, device=device)
    cache, fresh, told = target.new_cache(), ids[:, :shortest], 0
    for place in range(shortest, tokens):
        logits, _ = target.forward(fresh, cache, logits_to_keep=1)
        token = sample(logits[:, -1], torch.where(answering, temperature, as_user), generator)
        free = ids[:, place] < 0
        too_long = ~answering & (spoken >= int(tokens * USER_SHARE))
        ended = free & (torch.isin(token, stops) | too_long)
        token = token.masked_fill(ended & ~answering, end_of_user)
        ids[:, place] = torch.where(free, token, ids[:, place])
        response[:, place] = free & answering
        for speaker, force in zip((~answering, answering), forces, strict=True):
            coming = ids[:, place + 1 : place + 1 + len(force)]
            coming.copy_(torch.where((ended & speaker)[:, None], force, coming))
        spoken = torch.where(free & ~ended, spoken + 1, 0)
        answering = answering ^ ended
        fresh = ids[:, place : place + 1]
        if (place + 1) % REPORT_EVERY == 0 or place + 1 == tokens:
            report((place + 1 - told) * rows, int(response[:, told : place + 1].sum()))
            told = place + 1
    return Corpus(ids[:, :tokens].cpu(), response.cpu(), temperature.cpu())


def self_play(
    target: Target,
    path: Path,
    *,
    rows: int,
    tokens: int = 448,
    batch: int = 256,
    temperatures: Sequence[float] = (0.0, 0.6, 1.0),
    user_temperature: float = 0.9,
    seed: int = 0,
    subjects: Sequence[Subject] = SUBJECTS,
) -> Corpus:
    """Make a corpus of ``rows`` conversations of ``tokens`` tokens each and write it to ``path`` (see :func:`save_corpus`).

    ``batch`` rows are sampled at a time and kept in the folder ``<path>.parts``: a run that was stopped goes on at the first missing
    part and gives the rows of an uninterrupted one; a larger ``rows`` grows the corpus (a last part that was not full is made anew).
    ``temperatures``: of the answers, row after row in turn. Raises ValueError for settings out of range, a folder made with other
    settings, a target without chat template, or a full disk (finished parts stay).
    """
    path = Path(path)
    _check(target, rows=rows, tokens=tokens, batch=batch, temperatures=temperatures, user_temperature=user_temperature)
    turns, starts = turns_of(target), _starts(target, subjects)
    needed = max(len(start) for start, _ in starts) + len(turns.to_assistant) + 1
    if tokens - int(tokens * USER_SHARE) < needed:
        raise ValueError(f"tokens={tokens} leaves no room for an answer behind the longest opening: ask for at least {needed * 3 // 2 + 1}")
    topics = hashlib.sha256(repr((tuple(subjects), target.tokenizer.chat_template)).encode()).hexdigest()[:16]
    settings = {"target": target.digest, "dtype": str(target.dtype), "tokens": tokens, "batch": batch, "seed": seed, "topics": topics}
    folder = path.with_name(path.name + ".parts")
    _claim(folder, path, settings | {"temperatures": list(temperatures), "user_temperature": user_temperature})

    parts, responses, started = [], 0, time.perf_counter()
    with tqdm(total=rows * tokens, desc="self-play", unit="token", unit_scale=True) as bar:

        def report(sampled: int, answered: int) -> None:
            nonlocal responses
            responses += answered
            bar.set_postfix_str(f"{responses / (time.perf_counter() - started):.0f} response tokens/s", refresh=False)
            bar.update(sampled)

        for chunk, first in enumerate(range(0, rows, batch)):
            file, count = folder / f"{chunk:06d}.safetensors", min(batch, rows - first)
            part = load_corpus(file) if file.exists() else None
            if part is None or len(part) < count:
                chance = random.Random(f"{seed}/{chunk}")
                generator = torch.Generator(target.device).manual_seed(chance.getrandbits(63))
                chosen = chance.choices([start for start, _ in starts], [weight for _, weight in starts], k=count)
                heat = torch.tensor([float(temperatures[row % len(temperatures)]) for row in range(first, first + count)])
                part = converse(target, turns, chosen, heat, tokens, user_temperature, generator, report)
                save_corpus(part, file)
            else:
                bar.update(count * tokens)
            parts.append(part.rows(slice(count)))
    corpus = concatenate(parts)
    save_corpus(corpus, path)
    return corpus


def _starts(target: Target, subjects: Sequence[Subject]) -> list[tuple[list[int], float]]:
    """Every way to start a row, as (token ids up to and with the opening, weight)."""
    if not subjects:
        raise ValueError("subjects is empty: pass at least one Subject")
    ways = [way for subject in subjects for way in subject.starts()]
    heads = {system: head_of(target.tokenizer, system) for _, system, _ in ways}
    return [(target.tokenizer(heads[system] + opening, add_special_tokens=False)["input_ids"], weight) for weight, system, opening in ways]


def _check(target: Target, *, rows: int, tokens: int, batch: int, temperatures: Sequence[float], user_temperature: float) -> None:
    if rows < 1 or batch < 1:
        raise ValueError(f"rows={rows}, batch={batch}: both must be at least 1")
    if tokens > target.max_context:
        raise ValueError(f"tokens={tokens}, but {target.name} takes at most {target.max_context}: ask for fewer")
    if not temperatures or not all(0 <= heat < float("inf") for heat in (*temperatures, user_temperature)):
        raise ValueError(f"temperatures {list(temperatures)}, user_temperature {user_temperature}: give numbers from 0 (greedy) up")


def _claim(folder: Path, path: Path, settings: dict[str, object]) -> None:
    """The folder belongs to one set of settings; parts made with any other are refused, not mixed in."""
    note = folder / "settings.json"
    if not note.exists():
        if path.exists():
            raise ValueError(f"{path} exists, but {folder} with its parts does not: delete the file or choose another path")
        write_atomically(note, json.dumps(settings, indent=1).encode())
    found = json.loads(note.read_text())
    other = [key for key in sorted(found.keys() | settings.keys()) if found.get(key) != settings.get(key)]
    if other:
        there, asked = ({key: side.get(key) for key in other} for side in (found, settings))
        raise ValueError(f"{folder} was made with {there}, not with {asked}: use the same settings or another path")
