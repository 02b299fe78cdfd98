"""A configuration to measure: checked before anything is loaded, with its prompts in order."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

from dspark.bench.arms import HEADLINE, Arm, Models, parse_arms
from dspark.bench.measure import Settings
from dspark.bench.prompts import DOMAINS, PromptItem, load_prompts
from dspark.bench.provenance import cores, drafter_columns, environment
from dspark.bench.results import SCHEMA_VERSION
from dspark.cli import add_fields, from_fields, option
from dspark.cpu import is_packed
from dspark.draft.drafter import Drafter
from dspark.files import digest
from dspark.load import DTYPES, load_drafter, load_target
from dspark.tune.profile import cpu_name
from dspark.verify.sampling import Sampling


@dataclass(frozen=True)
class Plan:
    """Every field is an option of ``python -m dspark.bench``. Raises ValueError for a value that cannot be measured."""

    arms: str = option(HEADLINE, "ways to decode, separated by commas")
    baseline: str = option("plain", "the arm that speed and memory are compared with")
    target: str = option("default", "default, a folder, a .gguf file or a hub id")
    drafter: str = option("default", "default, a folder or a hub id")
    domains: str = option(",".join(DOMAINS), "prompt sets: of these, .jsonl files, GSM8K and others of the hub, separated by commas")
    split: str = option("test", "dev (to tune on) or test (to report)")
    prompts: int = option(20, "prompts of each domain")
    tokens: int = option(128, "new tokens at most")
    temperature: float = option(0.0, "0 is greedy")
    top_p: float = option(1.0, "nucleus; 1 keeps every token")
    top_k: int = option(0, "0 keeps every token")
    dtype: str = option("bfloat16", ", ".join(DTYPES))
    device: str = option("cpu", "cpu, cuda, cuda:1")
    threads: int = option(2, "CPU threads of the models")
    seed: int = option(0, "of the sampled tokens; each prompt and repeat derives its own from it")
    repeats: int = option(1, "times everything is measured; medians are taken over them")

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_k, self.top_p)
        for name in ("prompts", "tokens", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        _ = self.parsed_arms, self.units  # read now: a misspelled arm or domain is found before any model is loaded

    @cached_property
    def parsed_arms(self) -> tuple[Arm, ...]:
        return parse_arms(self.arms)

    @property
    def settings(self) -> Settings:
        return Settings(self.tokens, self.temperature, self.top_p, self.top_k)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Every prompt once per repeat. Domains take turns, so that an unfinished run covers all of them."""
        sets = [load_prompts(domain.strip(), self.split, self.prompts) for domain in self.domains.split(",")]
        return tuple(
            Unit(items[i], repeat, turn=i + d + repeat, seed=zlib.crc32(f"{self.seed}/{repeat}/{items[i].id}".encode()))
            for repeat in range(self.repeats)
            for i in range(self.prompts)
            for d, items in enumerate(sets)
        )

    def warm_up_prompt(self) -> PromptItem:
        """One prompt of the split that is not measured, or the first of a set without splits."""
        return load_prompts(self.domains.split(",")[0].strip(), "test" if self.split == "dev" else "dev", 1)[0]

    def check(self, mode: str) -> None:
        """Raises ValueError if this plan cannot be run as "speed", "memory" or "identity"."""
        if mode == "identity" and self.temperature:
            raise ValueError(f"identity compares greedy text, but temperature is {self.temperature}: leave it at 0")
        if mode != "identity" and self.baseline not in [arm.name for arm in self.parsed_arms]:
            raise ValueError(f"the baseline {self.baseline!r} is not among the arms {self.arms}: add it, or choose --baseline from them")

    def load(self, stock: bool = False) -> Models:
        """The models that the arms need. stock: load the stock target as well, even if no arm needs it."""
        load = partial(load_target, self.target, dtype=self.dtype, device=self.device)
        peers = [arm.peer is not None for arm in self.parsed_arms]
        target = load(pack=not all(peers))
        drafter = load_drafter(self.drafter, target) if any(arm.trained for arm in self.parsed_arms) else None
        if not (stock or any(peers)):
            return Models(target, drafter)
        return Models(target, drafter, stock=load(pack=False) if is_packed(target.model) else target)

    def default_out(self, name: str) -> Path:
        """A file in runs/bench of the working directory; other options give another file, so no run ends at an earlier one's rows."""
        return Path("runs") / "bench" / f"{name}-{digest(repr(self))[:6]}.parquet"

    def provenance(self, models: Models) -> dict[str, object]:
        """Columns that all rows of a run with these models share."""
        name = _without_path(self.drafter) if models.drafter else ""
        return environment(models.target) | {"drafter": name} | drafter_columns(models.drafter)

    def configuration(self, mode: str, target_digest: str, drafter: Drafter | None) -> dict[str, object]:
        """All that must be equal for two runs to share a file. Folders by name and digest: paths mean nothing elsewhere."""
        names = {"target": _without_path(self.target), "drafter": _without_path(self.drafter)}
        if others := [unit.item for unit in self.units if unit.item.domain not in DOMAINS]:
            names |= {"domains": ",".join(dict.fromkeys(item.domain for item in others)), "prompts_digest": digest(*(i.id for i in others))}
        digests = {"target_digest": target_digest, "drafter_digest": drafter_columns(drafter)["drafter_digest"]}
        return {"mode": mode, "schema_version": SCHEMA_VERSION} | asdict(self) | names | digests | {"machine": cpu_name(), "cores": cores()}


def add_options(parser: argparse.ArgumentParser, without: Sequence[str] = (), **defaults: object) -> None:
    """Every field of :class:`Plan` but ``without`` as an option, and ``--out``. defaults: where the command's differ from the plan's."""
    add_fields(parser, Plan, without, **defaults)
    parser.add_argument("--out", type=Path, help="Parquet file; default one in runs/bench that is named after the options")


plan_of = partial(from_fields, Plan)


@dataclass(frozen=True)
class Unit:
    """One prompt in one repeat."""

    item: PromptItem
    repeat: int
    turn: int  # counts up, so that another arm starts each time
    seed: int  # of the sampled tokens

    @property
    def key(self) -> str:
        return f"{self.repeat}/{self.item.id}"

    def columns(self) -> dict[str, object]:
        return {"domain": self.item.domain, "prompt_id": self.item.id, "repeat": self.repeat}


def _without_path(name: str) -> str:
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """A B C, B C A, C A B, …"""
    first = turn % len(names)
    return [*names[first:], *names[:first]]
