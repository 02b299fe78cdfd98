"""How a self-play conversation starts, and which tokens the chat template puts between its turns, for any chat model."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from dspark.files import data_dir
from dspark.target.target import Target

log = logging.getLogger(__name__)

OPENED_SHARE = 0.7  # of a subject's rows start with one of its openings, the others with a system prompt and a free user turn
PLACEHOLDERS = ("PLACEHOLDERONE", "PLACEHOLDERTWO", "PLACEHOLDERTHREE")


@dataclass(frozen=True)
class Subject:
    """What a conversation is about. Raises ValueError if the share is not positive or if there is no opening or system prompt."""

    name: str
    share: float  # of the rows, relative to the other subjects' shares
    openings: tuple[str, ...]  # how the first user turn begins, under the template's own system prompt
    systems: tuple[str | None, ...] = (None,)  # system prompts before a free first user turn; None: the template's own

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ValueError(f"subject {self.name!r} has share {self.share}: give a positive number")
        if not self.openings or not self.systems:
            raise ValueError(f"subject {self.name!r} needs at least one opening and one system prompt (None is the template's own)")

    def starts(self) -> list[tuple[float, str | None, str]]:
        """Every way to start a row: (weight, system prompt, opening). The weights sum to ``share``."""
        opened = [(self.share * OPENED_SHARE / len(self.openings), None, opening) for opening in self.openings]
        free = [(self.share * (1 - OPENED_SHARE) / len(self.systems), system, "") for system in self.systems]
        return opened + free


def load_subjects() -> tuple[Subject, ...]:
    """The subjects of data/corpus/subjects.toml. Raises ValueError if the file is missing."""
    path = data_dir() / "corpus" / "subjects.toml"
    if not path.is_file():
        raise ValueError(f"no subjects at {path}: restore the file from the repository, or pass subjects")
    tables = tomllib.loads(path.read_text(encoding="utf-8"))["subject"]
    return tuple(
        Subject(table["name"], table["share"], tuple(table["openings"]), tuple(system or None for system in table["systems"]))
        for table in tables
    )


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
    """Every way to start a row: (token ids up to and including the opening, weight). Raises ValueError if there are no subjects."""
    if not subjects:
        raise ValueError("subjects is empty: pass at least one Subject")
    starts = [start for subject in subjects for start in subject.starts()]
    heads = {system: pieces(target.tokenizer, system)[0] for _, system, _ in starts}
    return [
        (target.tokenizer(heads[system] + opening, add_special_tokens=False)["input_ids"], weight) for weight, system, opening in starts
    ]


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
        log.info("the chat template takes no system prompt: %r is left out", system)
        return pieces(tokenizer, None)
    if [rendered.count(text) for text in PLACEHOLDERS] != [1, 1, 1]:
        raise ValueError(f"the chat template must print each message once, but gives {rendered!r}: set another tokenizer.chat_template")
    head, rest = rendered.split(PLACEHOLDERS[0])
    rest = rest.split(PLACEHOLDERS[1])[1]
    after_answer, after_question = rest.split(PLACEHOLDERS[2])
    return head, after_answer, after_question
