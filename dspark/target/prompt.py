"""What people pass as a prompt, as plain lists: text, chats, and token ids in lists, tensors, arrays or tokenizers' encodings."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

Prompt = str | Sequence[int] | Sequence[dict[str, str]]


def plain(prompt: object) -> object:
    """Encodings (without their padding), tensors and arrays become lists, those of one row a single list; the rest stays as it is."""
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        ids, mask = plain(prompt["input_ids"]), plain(prompt.get("attention_mask"))
        if mask is None or not isinstance(ids, list):
            return ids
        rows = zip(ids, mask, strict=True) if ids and isinstance(ids[0], list) else [(ids, mask)]
        kept = [[token for token, seen in zip(*row, strict=True) if seen] for row in rows]
        return kept if len(kept) > 1 else kept[0]
    if hasattr(prompt, "tolist"):
        rows = prompt.tolist()
        return rows[0] if isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], list) else rows
    if isinstance(prompt, (list, tuple)):
        return [plain(each) if hasattr(each, "tolist") or (isinstance(each, Mapping) and "input_ids" in each) else each for each in prompt]
    return prompt


def is_batch(prompt: object) -> bool:
    """Whether a plain prompt is a list of prompts: of strings, of chats, of token lists."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(each, (str, list, tuple)) for each in prompt)


def checked(prompt: object) -> list[dict[str, str]] | list[int]:
    """One prompt as chat messages or token ids. Raises ValueError for what is neither."""
    prompt = plain(prompt)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt.strip() else []
    if isinstance(prompt, (bytes, bytearray)):
        raise ValueError("the prompt is bytes: pass text, such as prompt.decode()")
    if isinstance(prompt, Mapping):
        raise ValueError(f"the prompt is a dict with {', '.join(map(str, prompt)) or 'nothing'}: a chat is a list of messages, [message]")
    if not isinstance(prompt, Sequence):
        raise ValueError(f"the prompt is {prompt!r}: pass some text, a list of chat messages, or token ids")
    if len(prompt) == 0:
        raise ValueError("the prompt is empty: pass some text, a list of chat messages, or token ids")
    if all(isinstance(each, Mapping) for each in prompt):
        return [message | {"content": _joined(message["content"])} if "content" in message else message for message in prompt]
    if len(prompt) == 1 and isinstance(prompt[0], list):
        return checked(prompt[0])
    if is_batch(prompt):
        raise ValueError(f"these are {len(prompt)} prompts: pass one at a time, or all of them to dspark.generate")
    return [_token(each) for each in prompt]


def _joined(content: object) -> object:
    """The text of a message whose content is a list of parts; any other content stays. Raises ValueError for images and the like."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise ValueError(f"part {part!r} of a message is no text: dspark decodes text alone")
    return "".join(part["text"] for part in content)


def _token(value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"token id {value!r} is no whole number: pass some text, a list of chat messages, or token ids") from None
