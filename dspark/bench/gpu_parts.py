"""The parts of ``python -m dspark.bench gpu``, which add row after row to a sheet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dspark.bench.prompts import DOMAINS, load_prompts
from dspark.bench.provenance import peak_rss_mib
from dspark.cli import option
from dspark.clock import now
from dspark.draft.backbone import DrafterConfig
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import DraftSource
from dspark.engine import Engine
from dspark.files import one_line, write_atomically
from dspark.load import DTYPES, load_drafter, load_target
from dspark.schedule import Autoregressive, FixedWindow, Policy, PrefixScheduler
from dspark.target.target import Target
from dspark.tune.profile import SPSCurve
from dspark.verify import graphs
from dspark.verify.lean import lean_pass
from dspark.verify.static import WIDEST, static_pass

EAGER, GRAPHED = "eager", "graphed"
CONTEXT = 256  # tokens in the cache of step times
FORMAT = 1


@dataclass(frozen=True)
class Size:
    """How much is measured. prompts: of each domain. tokens: new ones per text. budgets: B of the step times. requests: R."""

    prompts: int
    tokens: int
    budgets: tuple[int, ...]
    requests: tuple[int, ...]
    repeats: int


FULL = Size(8, 128, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), 15)
TOY = Size(1, 8, (1, 4, 32), (1, 3), 2)


@dataclass(frozen=True)
class GpuPlan:
    """Every field but ``rehearse`` is an option of the command."""

    minutes: float = option(8.0, "time for everything")
    target: str = option("default", "default, a folder, a .gguf file or a hub id")
    drafter: str = option("default", "default, a folder or a hub id")
    device: str = option("cuda", "cuda, cuda:1")
    dtype: str = option("bfloat16", f"of all parts but equality, which runs in float32: {', '.join(DTYPES)}")
    rehearse: bool = False

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        if not self.rehearse and not (self.device.startswith("cuda") and torch.cuda.is_available()):
            raise ValueError(
                f"device {self.device!r} is no GPU that PyTorch can use here: --rehearse runs everything at toy size on the CPU"
            )

    @property
    def size(self) -> Size:
        return TOY if self.rehearse else FULL


class Sheet:
    """The rows of one part, on disk after every one: ``gpu-PART.json``."""

    def __init__(self, path: Path, about: dict[str, object]) -> None:
        self.path, self.content = path, {"format": FORMAT, **about, "complete": False, "error": "", "rows": []}
        self.write()

    def add(self, **row: object) -> None:
        self.content["rows"].append(row)
        self.write()

    def write(self, **changes: object) -> None:
        self.content |= changes
        write_atomically(self.path, json.dumps(self.content, indent=1).encode())


class Bench:
    """What the parts work with: models, both passes, prompts, and the time until which a part may begin another row."""

    def __init__(self, plan: GpuPlan, part: str, seconds: float, sheet: Sheet | None = None) -> None:
        self.until, self.size = time.monotonic() + seconds, plan.size
        dtype = "float32" if part == "equality" else plan.dtype
        if plan.rehearse:
            self.target, self.drafter, self.prompts = _toys(dtype)
        else:
            self.target = load_target(plan.target, dtype=dtype, device=plan.device)
            self.drafter = load_drafter(plan.drafter, self.target)
            items = [load_prompts(domain, "test", self.size.prompts) for domain in DOMAINS]
            self.prompts = [(item.domain, item.id, self.target.encode(item.messages)) for row in zip(*items, strict=True) for item in row]
        if lean_pass(self.target) is None:
            raise ValueError(f"{self.target.name} has no lean pass, so there is nothing to capture: choose another target")
        self.passes = {EAGER: lean_pass(self.target), GRAPHED: static_pass(self.target)}

    def in_time(self, items: Sequence[object]) -> Iterator[object]:
        """The items while there is time. Raises TimeoutError where it ends, so that the part says it is incomplete."""
        for item in items:
            if time.monotonic() > self.until:
                raise TimeoutError("its share of the time was over")
            yield item

    def engine(self, run: str, source: DraftSource | None, policy: Policy, requests: int = 1) -> Engine:
        self.target.verifier = self.passes[run]
        return Engine(self.target, source, policy, max_requests=requests)

    def curve(self, requests: int) -> SPSCurve:
        """Graphed step times around what this many requests verify."""
        whole = self.drafter.block_size + 1
        widths = [*(n for n in (1, 2, 4, 8) if n < whole), whole]
        times = {requests * n: self.step_seconds(GRAPHED, requests, n, 5) for n in widths}
        return SPSCurve(tuple(times), tuple(times.values()))

    @torch.inference_mode()
    def step_seconds(self, run: str, requests: int, width: int, repeats: int) -> float:
        """Median of a pass over ``width`` tokens of each request, after CONTEXT (or half the target's) tokens."""
        verifier, context = self.passes[run], min(CONTEXT, self.target.max_context // 2)
        cache, tokens = verifier.new_cache(), torch.arange(context + width) % self.target.vocab_size
        slots = [cache.open() for _ in range(requests)]
        cache.reserve(context + width + 1)
        times = []
        for _ in range(3 + repeats):  # the first three: eager, captured, replayed
            for slot in slots:
                slot.length = context  # what the slots hold does not matter here
            start = now(self.target.device)
            verifier([tokens[:width].tolist()] * requests, slots, cache)
            times.append(now(self.target.device) - start)
        return median(times[3:])


def _toys(dtype: str) -> tuple[Target, Drafter, list[tuple[str, str, list[int]]]]:
    """Random models of a few thousand weights, and prompts of token ids."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(num_hidden_layers=3, max_position_embeddings=512, initializer_range=0.3, eos_token_id=None, **shape)
        target = Target(LlamaForCausalLM(config).to(DTYPES[dtype]), None, "toy")
        drafter = Drafter(DrafterConfig(**shape, num_hidden_layers=1, head_dim=8, target_layer_ids=(0, 1), mask_token_id=3, block_size=3))
    drafter = drafter.to(target.dtype).attach(target).eval().requires_grad_(False)
    return target, drafter, [(domain, f"{domain}-{i}", [5 + i, 6, 7, 5 + i, 6]) for i, domain in enumerate(DOMAINS)]


# ---- the parts


def equality(bench: Bench, sheet: Sheet) -> None:
    """Greedy texts in float32, one request and four at a time, against ``model.generate``."""
    source = ContextLookup(bench.drafter)
    arms = {"plain": (None, Autoregressive()), "fixed": (bench.drafter, FixedWindow()), "prefix+copy": (source, PrefixScheduler(_flat))}
    texts = {name: _reference(bench.target, ids, bench.size.tokens // 2) for _, name, ids in bench.in_time(bench.prompts)}
    for requests in (1, 4):
        for arm, (drafter, policy) in bench.in_time(arms.items()):
            engine = bench.engine(GRAPHED, drafter, policy, requests)
            wanted = [(name, engine.submit(ids, max_new_tokens=bench.size.tokens // 2)) for _, name, ids in bench.prompts]
            list(engine.run())
            differ = [name for name, request in wanted if request.error or request.token_ids != texts[name]]
            sheet.add(arm=arm, requests=requests, texts=len(wanted), equal=len(wanted) - len(differ), differ=differ)


def _flat(tokens: int) -> float:
    """Step times under which some drafts pay and some do not."""
    return 1 / (1 + 0.1 * tokens)


def _reference(target: Target, ids: list[int], tokens: int) -> list[int]:
    row, eos = torch.tensor([ids], device=target.device), sorted(target.eos_token_ids) or None
    mask = torch.ones_like(row)
    out = target.model.generate(row, attention_mask=mask, do_sample=False, max_new_tokens=tokens, eos_token_id=eos, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def speed(bench: Bench, sheet: Sheet) -> None:
    """One greedy request at a time: all arms on every prompt, another one first each time; the first prompt twice, to capture."""
    copying, prefix = ContextLookup(bench.drafter), PrefixScheduler(bench.curve(1))
    arms = {
        "plain eager": (EAGER, None, Autoregressive()),
        "plain": (GRAPHED, None, Autoregressive()),
        "fixed": (GRAPHED, bench.drafter, FixedWindow()),
        "prefix": (GRAPHED, bench.drafter, prefix),
        "fixed+copy": (GRAPHED, copying, FixedWindow()),
        "prefix+copy": (GRAPHED, copying, prefix),
    }
    for i, (domain, name, ids) in bench.in_time(list(enumerate([bench.prompts[0], *bench.prompts]))):
        names = [*arms][i % len(arms) :] + [*arms][: i % len(arms)]
        for arm in names:
            engine = bench.engine(*arms[arm])
            request = engine.submit(ids, max_new_tokens=bench.size.tokens)
            engine.step()
            start, waits = now(bench.target.device), _count_waits(engine)
            seconds = now(bench.target.device) - start
            rounds = len(request.rounds) - 1
            if i:
                tokens = len(request.token_ids) - 1
                row = {"domain": domain, "prompt": name, "arm": arm, "tokens": tokens, "rounds": rounds, "seconds": seconds}
                sheet.add(**row, waits_per_round=waits / max(rounds, 1))


def _count_waits(engine: Engine) -> int:
    """Run the engine to the end; how often a round on static buffers waited for the device."""
    count, real = 0, graphs.to_host

    def counting(x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return real(x)

    graphs.to_host = counting
    try:
        list(engine.run())
    finally:
        graphs.to_host = real
    return count


def sps(bench: Bench, sheet: Sheet) -> None:
    """Seconds of a pass over B tokens: of one request as far as that goes, then of many with 8 tokens each."""
    for budget in bench.in_time(bench.size.budgets):
        requests = 1 if budget <= min(16, WIDEST) else budget // 8
        for run in (GRAPHED, EAGER):
            row = {"tokens": budget, "requests": requests, "pass": run}
            try:
                sheet.add(**row, seconds=bench.step_seconds(run, requests, budget // requests, bench.size.repeats))
            except RuntimeError as error:  # out of memory: smaller ones are measured already
                sheet.add(**row, seconds=None, error=one_line(error))
                _free_memory()


def requests(bench: Bench, sheet: Sheet) -> None:
    """Tokens per second while R requests are active, each policy twice, the second time measured."""
    for count in bench.in_time(bench.size.requests):
        policies = {"plain": Autoregressive(), "fixed": FixedWindow(), "prefix": None}
        for arm in policies:
            try:
                policy = policies[arm] or PrefixScheduler(bench.curve(count))
                source = None if arm == "plain" else bench.drafter
                _busy(bench, source, policy, count)
                sheet.add(requests=count, arm=arm, **_busy(bench, source, policy, count))
            except RuntimeError as error:
                sheet.add(requests=count, arm=arm, error=one_line(error))
                _free_memory()


def _busy(bench: Bench, source: DraftSource | None, policy: Policy, count: int) -> dict[str, float]:
    """Run as many requests until the first ends."""
    engine = bench.engine(GRAPHED, source, policy, count)
    for i in range(count):
        engine.submit(bench.prompts[i % len(bench.prompts)][2], max_new_tokens=bench.size.tokens // 2)
    engine.step()  # all prompts
    start, rounds, tokens, verified = now(bench.target.device), 0, 0, 0
    while len(engine.active) == count:
        finished = [r for _, r in engine.step()]
        rounds, tokens = rounds + 1, tokens + sum(len(r.committed) for r in finished)
        verified += sum(1 + r.verify_length for r in finished)
    seconds = now(bench.target.device) - start
    return {"rounds": rounds, "tokens": tokens, "verified": verified, "seconds": seconds}


def memory(bench: Bench, sheet: Sheet) -> None:
    """Peak bytes of the device and of graphs, plain and drafted, with the first and the middle number of requests."""
    cuda = bench.target.device.type == "cuda"
    for count in (bench.size.requests[0], bench.size.requests[len(bench.size.requests) // 2]):
        for arm, source, policy in bench.in_time([("plain", None, Autoregressive()), ("fixed", bench.drafter, FixedWindow())]):
            if cuda:
                torch.cuda.reset_peak_memory_stats(bench.target.device)
            before = bench.passes[GRAPHED].graphs.memory
            _busy(bench, source, policy, count)
            peak = torch.cuda.max_memory_allocated(bench.target.device) if cuda else 0
            taken = before - bench.passes[GRAPHED].graphs.memory if cuda else 0
            sheet.add(arm=arm, requests=count, device_peak_bytes=peak, graph_bytes=taken, peak_rss_mib=peak_rss_mib())


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[[Bench, Sheet], None]] = {part.__name__: part for part in (equality, speed, sps, requests, memory)}
