"""Self-play: the target writes both sides of many conversations, so the drafter learns from the target's own distribution.

:mod:`dspark.train.shards` makes a corpus of them.

A row is a system prompt, a user turn, an answer, and so on until it is full. After each end of turn the chat template's tokens are
inserted and sampling continues, so all rows have the same length and no padding.
"""

import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm.auto import tqdm

from dspark.files import data_dir
from dspark.target.target import Target
from dspark.train.corpus import Corpus

OPENED_SHARE = 0.7  # of a subject's rows start with one of its openings, the others with a system prompt and a free user turn
USER_SHARE, OPENING_SHARE = 1 / 3, 1 / 16  # of a row: the longest user turn, the opening of a free text
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

    to_assistant: tuple[int, ...]  # all that follows the user's text: end of turn, assistant header; none in free text
    to_user: tuple[int, ...]  # what follows the assistant's end of turn, or a free text
    stops: tuple[int, ...]  # every EOS, and the template's own ends of turn
    user_share: float = USER_SHARE  # of a row: a longer user turn is cut off, because the drafter learns from answers only


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


def turns_and_starts(target: Target, subjects: Sequence[Subject]) -> tuple[Turns, list[tuple[list[int], float]]]:
    """As the chat template has them. Without one: free text from its first token, a short opening of which is sampled like a user turn,
    so that greedy texts differ. Raises ValueError if nothing says what the first token is, and as :func:`turns_of`.
    """
    if getattr(target.tokenizer, "chat_template", None) is not None:
        starts = [start for subject in subjects for start in subject.starts()]
        heads = {system: pieces(target.tokenizer, system)[0] for _, system, _ in starts}
        encode = partial(target.tokenizer, add_special_tokens=False)
        return turns_of(target), [(encode(heads[system] + opening)["input_ids"], weight) for weight, system, opening in starts]
    stops = tuple(sorted(target.eos_token_ids))
    tokens = [getattr(target.tokenizer, "bos_token_id", None), getattr(target.config, "bos_token_id", None), *stops]
    first = next((token for token in tokens if token is not None), None)
    if first is None:
        raise ValueError(f"{target.name} has no chat template and no first token of a text: set bos_token_id in its config")
    return Turns((), () if first in stops else (first,), stops, OPENING_SHARE), [([first], 1.0)]


def pieces(tokenizer: object, system: str | None) -> tuple[str, str, str]:
    """What the template prints before the first user text, after an answer, and after a user text.

    system: the system prompt; None, or a template that takes none, leaves it to the template.
    Raises ValueError for a chat template that cannot be used.
    """
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
    chat, stops = bool(turns.to_assistant), torch.tensor(turns.stops, device=device)
    longest = int(tokens * turns.user_share)
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
        too_long = ~answering & (turn_length >= longest)
        stopped = torch.isin(token, stops)
        ended = free & (stopped | too_long)
        if chat:
            token = token.masked_fill(ended & ~answering, turns.to_assistant[0])
        ids[:, place] = torch.where(free, token, ids[:, place])
        response[:, place] = free & answering
        answer = ~answering & (~stopped | chat)  # follows an end here
        for begins, piece in zip((answer, ~answer), inserted, strict=True):
            following = ids[:, place + 1 : place + 1 + len(piece)]
            following.copy_(torch.where((ended & begins)[:, None], piece, following))
        turn_length = torch.where(free & ~ended, turn_length + 1, 0)
        answering = torch.where(ended, answer, answering)
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
