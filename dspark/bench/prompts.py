"""The benchmark prompts: four domains, each split once into dev (to tune on) and test (to report on); and the sets of others."""

import json
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pyarrow.parquet as pq

from dspark.files import closest, data_dir, digest, one_line

DOMAINS = ("code", "math", "chat", "structured")
SPLITS = ("dev", "test")
HUB = {  # benchmark → its data set on the hub, the configuration and the split
    "GSM8K": "openai/gsm8k:main/test",
    "MATH-500": "HuggingFaceH4/MATH-500:default/test",
    "AIME25": "MathArena/aime_2025:default/train",
    "MBPP": "google-research-datasets/mbpp:sanitized/test",
    "HumanEval": "openai/openai_humaneval:openai_humaneval/test",
    "MT-Bench": "HuggingFaceH4/mt_bench_prompts:default/train",
    "Alpaca": "tatsu-lab/alpaca:default/train",
}
COLUMNS = ("messages", "turns", "prompt", "question", "problem", "instruction")  # where other sets keep the prompt


@dataclass(frozen=True)
class PromptItem:
    """One prompt. messages: what ``Target.encode`` takes, [{"role": "user", "content": …}]."""

    id: str
    domain: str
    split: str
    theme: str
    messages: list[dict[str, str]]


def load_prompts(domain: str, split: str = "test", n: int | None = None) -> list[PromptItem]:
    """The first ``n`` prompts (None: all) of one split of a domain, in a fixed random order that visits every theme before it repeats one.

    domain: one of :data:`DOMAINS`; a ``.jsonl`` file; a name in :data:`HUB`, or "owner/name:configuration/split" of another data set
        on the hub. The last three have one split, which stands for both.
    Raises ValueError for an unknown domain or split, n < 1, n above what the split holds, a missing file, or a row without a prompt.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: choose one of {', '.join(SPLITS)}")
    if domain in DOMAINS:
        path = data_dir() / "prompts" / f"{domain}.jsonl"
        if not path.is_file():
            raise ValueError(f"no prompt file at {path}: restore it from the repository or set DSPARK_DATA to the repository's data folder")
        items = [PromptItem(domain=domain, **json.loads(line)) for line in path.read_text(encoding="utf-8").strip().split("\n")]
        items = [item for item in items if item.split == split]
    else:
        name = Path(domain).stem if domain.endswith(".jsonl") else domain
        items = [_item(name, split, i, row) for i, row in enumerate(_rows(domain))]
    if n is not None and not 1 <= n <= len(items):
        raise ValueError(f"n is {n}, but {domain}/{split} holds {len(items)} prompts: choose 1 to {len(items)}, or None for all")
    return items[:n]


def _rows(name: str) -> list[dict]:
    """The rows of a set that is not one of :data:`DOMAINS`."""
    try:
        if name.endswith(".jsonl"):
            lines = Path(name).expanduser().read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other ends of lines
            return [json.loads(line) for line in lines if line.strip()]
        repository, colon, part = HUB.get(name, name).partition(":")
        if colon:
            from huggingface_hub import hf_hub_download

            where = {"repo_type": "dataset", "revision": "refs/convert/parquet"}  # the hub's own conversion, in one form for all sets
            return pq.read_table(hf_hub_download(repository, f"{part}/0000.parquet", **where)).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"prompts {name!r} cannot be read ({one_line(error)}): pass a .jsonl file with one prompt a line") from error
    sets = f"{', '.join(DOMAINS)}, a .jsonl file, {', '.join(HUB)}, or owner/name:configuration/split of a data set on the hub"
    raise ValueError(f"domain {name!r} is unknown{closest(name, (*DOMAINS, *HUB))}: choose one of {sets}")


def _item(name: str, split: str, index: int, row: object) -> PromptItem:
    """One row of another set: a text, its first turn, or a chat up to the first answer."""
    found = next((row[column] for column in COLUMNS if row.get(column)), None) if isinstance(row, dict) else None
    first = found[0] if isinstance(found, list) else found
    if isinstance(first, dict):
        messages = list(takewhile(lambda message: message.get("role") != "assistant", found))
    elif isinstance(first, str):
        messages = [{"role": "user", "content": f"{first}\n\n{row['input']}" if row.get("input") else first}]
    else:
        raise ValueError(f"row {index + 1} of {name} has no prompt: it needs a text, turns or messages in one of {', '.join(COLUMNS)}")
    return PromptItem(f"{name}/{index:03d}-{digest(json.dumps(messages))[:6]}", name, split, name, messages)
