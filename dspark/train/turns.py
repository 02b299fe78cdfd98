"""What a chat template forces between the turns of a conversation, derived from the template of any chat model."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from jinja2 import TemplateError

from dspark.target.target import Target

log = logging.getLogger(__name__)

PLACEHOLDERS = ("PLACEHOLDERONE", "PLACEHOLDERTWO", "PLACEHOLDERTHREE")


@dataclass(frozen=True)
class Turns:
    """Forced token ids and the ids that end a turn when sampled.

    to_assistant: all that follows the user's text (end of turn, assistant header). to_user: what follows the assistant's end of turn.
    stops: every EOS and the template's own ends of turn.
    """

    to_assistant: tuple[int, ...]
    to_user: tuple[int, ...]
    stops: tuple[int, ...]


def turns_of(target: Target) -> Turns:
    """Derive the forced tokens. Raises ValueError for a target without a usable chat template or without an end of turn."""
    _, after_answer, after_question = _pieces(target.tokenizer, None)
    to_user, to_assistant = (target.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (after_answer, after_question))
    special = target.eos_token_ids.union(target.tokenizer.all_special_ids, target.tokenizer.get_added_vocab().values())
    # The first special token after a text is what the speaker samples to end the turn; whitespace before it is the speaker's own affair.
    places = [place for place, token in enumerate(to_user) if token in special]
    ends = to_user[places[0] : places[0] + 1] if places else []
    ends += [token for token in to_assistant if token in special][:1]
    if not to_assistant or not target.eos_token_ids.union(ends):
        raise ValueError(f"no token ends a turn in the chat template of {target.name}: set eos_token_id in its generation config")
    to_user = to_user[places[0] + 1 :] if places else to_user
    return Turns(tuple(to_assistant), tuple(to_user), tuple(sorted(target.eos_token_ids.union(ends))))


def head_of(tokenizer: object | None, system: str | None) -> str:
    """What the template prints before the first user text; ``system`` None leaves the system prompt to the template.

    A template that takes no system prompt gives the head without it. Raises ValueError for a tokenizer without a usable chat template.
    """
    return _pieces(tokenizer, system)[0]


def _pieces(tokenizer: object | None, system: str | None) -> tuple[str, str, str]:
    """Render a conversation of placeholders and cut it: before the first user text, after an answer, after a user text."""
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
        return _pieces(tokenizer, None)
    if [rendered.count(text) for text in PLACEHOLDERS] != [1, 1, 1]:
        raise ValueError(f"the chat template must print each message once, but gives {rendered!r}: set another tokenizer.chat_template")
    head, rest = rendered.split(PLACEHOLDERS[0])
    rest = rest.split(PLACEHOLDERS[1])[1]
    after_answer, after_question = rest.split(PLACEHOLDERS[2])
    return head, after_answer, after_question
