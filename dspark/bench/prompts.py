"""The benchmark prompts: four domains, each split once into dev (to tune on) and test (to report on)."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dspark.files import data_dir

DOMAINS = ("code", "math", "chat", "structured")
SPLITS = ("dev", "test")


@dataclass(frozen=True)
class PromptItem:
    """One prompt. messages: what ``Target.encode`` takes, [{"role": "user", "content": …}]."""

    id: str
    domain: str
    split: str
    theme: str
    messages: list[dict[str, str]]


def load_prompts(domain: str, split: str = "test", n: int | None = None) -> list[PromptItem]:
    """The first ``n`` prompts (None: all) of one split of a domain.

    The files keep a fixed random order that visits every theme before it repeats one (data/prompts/build.py). So any n covers as many
    themes as it can, and a smaller n is a prefix of a larger one.

    Raises ValueError for an unknown domain or split, n < 1, n above what the split holds, or a missing file.
    """
    for name, value, choices in (("domain", domain, DOMAINS), ("split", split, SPLITS)):
        if value not in choices:
            raise ValueError(f"{name} {value!r} is unknown: choose one of {', '.join(choices)}")
    path = data_dir() / "prompts" / f"{domain}.jsonl"
    if not path.is_file():
        raise ValueError(f"no prompt file at {path}: restore it from the repository or set DSPARK_DATA to the repository's data folder")
    items = [PromptItem(domain=domain, **json.loads(line)) for line in path.read_text(encoding="utf-8").strip().split("\n")]
    items = [item for item in items if item.split == split]
    if n is not None and not 1 <= n <= len(items):
        raise ValueError(f"n is {n}, but {domain}/{split} holds {len(items)} prompts: choose 1 to {len(items)}, or None for all")
    return items[:n]
