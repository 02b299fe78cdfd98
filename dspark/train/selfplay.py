"""Self-play: the target writes both sides of many conversations, so the drafter learns from the target's own distribution.

A row is a system prompt, a user turn, an answer, and so on until it is full. After each end of turn the chat template's tokens are
inserted and sampling continues, so all rows have the same length and no padding.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm.auto import tqdm

from dspark.files import data_dir, digest, write_atomically
from dspark.target.target import Target
from dspark.train.corpus import Corpus, concatenate, load_corpus, save_corpus

OPENED_SHARE = 0.7  # of a subject's rows start with one of its openings, the others with a system prompt and a free user turn
USER_SHARE = 1 / 3  # of a row: a longer user turn is cut off, because the drafter learns from answers only
TEMPERATURES = (0.0, 0.6, 1.0)  # of the answers; row i takes the i-th of them, over and over
USER_TEMPERATURE = 0.9
CPU_SLICE = 16  # rows sampled at a time on a CPU: their float32 probabilities fit its cache (three times faster than 256 at once)
PLACEHOLDERS = ("PLACEHOLDERONE", "PLACEHOLDERTWO", "PLACEHOLDERTHREE")


@dataclass(frozen=True)
class Subject:
    """What a conversation is about."""

    name: str
    share: float  # of the rows, relative to the other subjects' shares
    openings: tuple[str, ...]  # how the first user turn begins, under the template's own system prompt
    systems: tuple[str | None, ...] = (None,)  # system prompts before a free first user turn; None: the template's own

    def starts(self) -> list[tuple[float, str | None, str]]:
        """Every way to start a row: (weight, system prompt, opening). The weights sum to ``share``."""
        opened = [(self.share * OPENED_SHARE / len(self.openings), None, opening) for opening in self.openings]
        return opened + [(self.share * (1 - OPENED_SHARE) / len(self.systems), system, "") for system in self.systems]


def load_subjects() -> tuple[Subject, ...]:
    """The subjects of data/corpus/subjects.toml. Raises ValueError or OSError without the data folder."""
    tables = tomllib.loads((data_dir() / "corpus" / "subjects.toml").read_text(encoding="utf-8"))["subject"]
    # TOML has no None: an empty text stands for the template's own system prompt.
    return tuple(Subject(t["name"], t["share"], tuple(t["openings"]), tuple(s or None for s in t["systems"])) for t in tables)


@dataclass(frozen=True)
class Turns:
    """Token ids that the chat template prints between turns, and those that end a turn when they are sampled."""

    to_assistant: tuple[int, ...]  # all that follows the user's text: end of turn, assistant header
    to_user: tuple[int, ...]  # what follows the assistant's end of turn
    stops: tuple[int, ...]  # every EOS, and the template's own ends of turn


def turns_of(target: Target) -> Turns:
    """Read the turns off the template. Raises ValueError for a target without a usable chat template or without an end of turn."""
    _, after_answer, after_question = pieces(target.tokenizer, None)
    to_user, to_assistant = (target.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (after_answer, after_question))
    special = target.eos_token_ids.union(target.tokenizer.all_special_ids, target.tokenizer.get_added_vocab().values())
    # The first special token after a text is the one a speaker samples to end the turn. Whitespace before it belongs to the text.
    first = next((i for i, token in enumerate(to_user) if token in special), None)
    ends = [] if first is None else [to_user[first]]
    ends += [token for token in to_assistant if token in special][:1]
    stops = target.eos_token_ids.union(ends)
    if not to_assistant or not stops:
        raise ValueError(f"no token ends a turn in the chat template of {target.name}: set eos_token_id in its generation config")
    to_user = to_user if first is None else to_user[first + 1 :]
    return Turns(tuple(to_assistant), tuple(to_user), tuple(sorted(stops)))


def encoded_starts(target: Target, subjects: Sequence[Subject]) -> list[tuple[list[int], float]]:
    """Every way to start a row: (token ids up to and including the opening, weight)."""
    starts = [start for subject in subjects for start in subject.starts()]
    heads = {system: pieces(target.tokenizer, system)[0] for _, system, _ in starts}
    encode = partial(target.tokenizer, add_special_tokens=False)
    return [(encode(heads[system] + opening)["input_ids"], weight) for weight, system, opening in starts]


def pieces(tokenizer: object | None, system: str | None) -> tuple[str, str, str]:
    """What the template prints before the first user text, after an answer, and after a user text.

    system: the system prompt; None, or a template that takes none, leaves it to the template.
    Raises ValueError for a tokenizer without a usable chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the target has no chat template: self-play needs a chat (instruct) model, or set tokenizer.chat_template")
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), PLACEHOLDERS, strict=True)]
    instructed = messages if system is None else [{"role": "system", "content": system}, *messages]
    try:
        rendered = tokenizer.apply_chat_template(instructed, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        if system is None:
            raise ValueError(f"the chat template refuses a conversation of user, assistant and user: {error}") from error
        return pieces(tokenizer, None)
    if [rendered.count(text) for text in PLACEHOLDERS] != [1, 1, 1]:
        raise ValueError(f"the chat template must print each message once, but gives {rendered!r}: set another tokenizer.chat_template")
    head, _, after_answer, after_question = re.split("|".join(PLACEHOLDERS), rendered)
    return head, after_answer, after_question


def sample(logits: Tensor, temperature: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution; temperature 0 takes the argmax.

    logits: [rows, vocab], any float dtype; temperature: [rows] float32; generator: on the device of the logits. Returns [rows] int64.
    """
    uniform = torch.rand(len(logits), 1, generator=generator, device=logits.device)
    size = CPU_SLICE if logits.device.type == "cpu" else len(logits)
    slices = zip(logits.split(size), temperature[:, None].split(size), uniform.split(size), strict=True)
    return torch.cat([_invert(*rows) for rows in slices])


def _invert(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    greedy = temperature == 0  # [rows, 1]
    cdf = torch.softmax(logits.float() / temperature.masked_fill(greedy, 1.0), dim=-1).cumsum(-1)  # [rows, vocab]
    total = cdf[:, -1:]
    # uniform · total can round up to the total, so keep it strictly below; right=True never lands on a token of probability 0.
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
) -> Corpus:
    """Let the target talk to itself, one conversation per start, until every row has ``tokens`` tokens.

    starts: token ids up to and including the opening of the first user turn
    temperature: [rows] float32, of the assistant's turns
    generator: on the target's device

    Returns a corpus on the CPU. Its mask marks the assistant's sampled tokens, including the end of turn.
    """
    device, rows, shortest = target.device, len(starts), min(map(len, starts))
    end_of_user, stops = turns.to_assistant[0], torch.tensor(turns.stops, device=device)
    inserted = [torch.tensor(piece, dtype=torch.long, device=device) for piece in (turns.to_assistant[1:], turns.to_user)]
    margin = max(map(len, inserted)) + 1  # a turn that ends at the end of the row writes tokens past it
    ids = torch.full((rows, tokens + margin), -1, device=device)  # -1: to be sampled
    for row, start in zip(ids, starts, strict=True):
        row[: len(start)] = torch.tensor(start, device=device)
    response = torch.zeros(rows, tokens, dtype=torch.bool, device=device)
    answering = torch.zeros(rows, dtype=torch.bool, device=device)  # whose turn it is: the assistant's (True) or the user's
    turn_length = torch.zeros(rows, dtype=torch.long, device=device)  # sampled tokens of the current turn
    temperature, as_user = temperature.to(device), torch.full((rows,), user_temperature, device=device)
    step, latest = next_logits(target, rows), ids[:, :shortest]
    for place in tqdm(range(shortest, tokens), desc=f"{rows} rows of text", unit="token", leave=False):
        token = sample(step(latest), torch.where(answering, temperature, as_user), generator)
        free = ids[:, place] < 0
        too_long = ~answering & (turn_length >= int(tokens * USER_SHARE))
        ended = free & (torch.isin(token, stops) | too_long)
        token = token.masked_fill(ended & ~answering, end_of_user)
        ids[:, place] = torch.where(free, token, ids[:, place])
        response[:, place] = free & answering
        for speaker, piece in zip((~answering, answering), inserted, strict=True):
            following = ids[:, place + 1 : place + 1 + len(piece)]
            following.copy_(torch.where((ended & speaker)[:, None], piece, following))
        turn_length = torch.where(free & ~ended, turn_length + 1, 0)
        answering = answering ^ ended
        latest = ids[:, place : place + 1]
    return Corpus(ids[:, :tokens].cpu(), response.cpu(), temperature.cpu())


def next_logits(target: Target, rows: int) -> Callable[[Tensor], Tensor]:
    """A function from the rows' latest tokens [rows, n] to the logits [rows, vocab] of the next ones; it remembers earlier tokens."""
    if not target.verifier:
        cache = target.new_cache()
        return lambda latest: target.forward(latest, cache, logits_to_keep=1)[0][:, -1]
    slots_of = target.verifier.new_cache()
    slots = [slots_of.open() for _ in range(rows)]
    return lambda latest: torch.cat(target.verifier(latest.tolist(), slots, slots_of, last_only=True)[0])


def self_play(
    target: Target,
    path: Path,
    *,
    rows: int,
    tokens: int = 448,
    batch: int = 256,
    seed: int = 0,
    subjects: Sequence[Subject] | None = None,
) -> Corpus:
    """Make a corpus of ``rows`` conversations of ``tokens`` tokens each and write it to ``path``.

    batch: rows sampled at a time; each batch is kept as one part in the folder ``<path>.parts``. An interrupted run resumes at the
        first missing part and gives the same rows as an uninterrupted one; a larger ``rows`` extends the corpus.
    subjects: what the conversations are about; None: :func:`load_subjects`

    Raises ValueError for settings out of range, a folder made with other settings, a target without a chat template, or a full disk
    (finished parts are kept).
    """
    path, subjects = Path(path), load_subjects() if subjects is None else tuple(subjects)
    if rows < 1 or batch < 1:
        raise ValueError(f"rows={rows}, batch={batch}: both must be at least 1")
    if tokens > target.max_context:
        raise ValueError(f"tokens={tokens}, but {target.name} takes at most {target.max_context}: ask for fewer")
    turns, starts = turns_of(target), encoded_starts(target, subjects)
    needed = max(len(start) for start, _ in starts) + len(turns.to_assistant) + 1
    if tokens - int(tokens * USER_SHARE) < needed:
        raise ValueError(f"tokens={tokens} leaves no room for an answer after the longest opening: ask for at least {needed * 3 // 2 + 1}")
    topics = digest(repr((subjects, target.tokenizer.chat_template)))
    settings = {"target": target.digest, "dtype": str(target.dtype), "tokens": tokens, "batch": batch, "seed": seed, "topics": topics}
    folder = path.with_name(path.name + ".parts")
    _claim(folder, path, settings | {"temperatures": list(TEMPERATURES), "user_temperature": USER_TEMPERATURE})

    parts = []
    for index, first in enumerate(tqdm(range(0, rows, batch), desc="self-play", unit="part")):
        file, count = folder / f"{index:06d}.safetensors", min(batch, rows - first)
        part = load_corpus(file) if file.exists() else None
        if part is None or len(part) < count:
            rng = random.Random(f"{seed}/{index}")
            generator = torch.Generator(target.device).manual_seed(rng.getrandbits(63))
            chosen = rng.choices([start for start, _ in starts], [weight for _, weight in starts], k=count)
            temperature = torch.tensor([TEMPERATURES[row % len(TEMPERATURES)] for row in range(first, first + count)])
            part = converse(target, turns, chosen, temperature, tokens, USER_TEMPERATURE, generator)
            save_corpus(part, file)
        parts.append(part.rows(slice(count)))
    corpus = concatenate(parts)
    save_corpus(corpus, path)
    return corpus


def _claim(folder: Path, path: Path, settings: dict[str, object]) -> None:
    """Reserve the folder for these settings. Raises ValueError if its parts were made with others, which must not be mixed."""
    note = folder / "settings.json"
    if not note.exists():
        if path.exists():
            raise ValueError(f"{path} exists, but {folder} with its parts does not: delete the file or choose another path")
        write_atomically(note, json.dumps(settings, indent=1).encode())
    found = json.loads(note.read_text())
    if other := [key for key in sorted(found.keys() | settings.keys()) if found.get(key) != settings.get(key)]:
        there, asked = ({key: side.get(key) for key in other} for side in (found, settings))
        raise ValueError(f"{folder} was made with {there}, not with {asked}: use the same settings or another path")
