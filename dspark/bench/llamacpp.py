"""llama.cpp (package ``xllamacpp``, an optional extra) on the same bfloat16 weights, plainly or with our drafter in it."""

import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby, pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch

from dspark.bench.measure import Decoder, Settings, Trial
from dspark.draft.drafter import Drafter
from dspark.formats.fetch import DEFAULT
from dspark.formats.gguf import default_target_gguf, export_gguf
from dspark.round import Round
from dspark.target.target import Target

PACKAGE = "xllamacpp"
CONTEXT = 4096  # tokens for which llama.cpp reserves memory


def by_llamacpp(target: Target, drafter: Drafter | None, settings: Settings) -> Decoder:
    """llama.cpp's own server in another process, with as many threads as PyTorch has. With a drafter: its DSpark drafting, whole blocks.
    Raises ValueError where the comparison would be another one: sampled text, a target other than the bundled one, other types."""
    if settings.temperature:
        raise ValueError(f"llamacpp is measured on greedy text, but temperature is {settings.temperature}: leave it at 0")
    if target.name != DEFAULT.name or target.dtype != torch.bfloat16 or target.device.type != "cpu":
        found = f"{target.name} in {target.dtype} on {target.device}"
        raise ValueError(f"llamacpp runs {DEFAULT.name} in bfloat16 on the CPU, not {found}: leave the arm out")
    return LlamaCpp(default_target_gguf(), target, drafter).decoder(settings)


def package_version() -> str:
    """Such as "xllamacpp 2026.10.11549", for the rows of a run. Raises ValueError where it is missing."""
    try:
        return f"{PACKAGE} {version(PACKAGE)}"
    except PackageNotFoundError:
        raise ValueError(f"llamacpp needs the package {PACKAGE}: pip install {PACKAGE}, or leave the arm out") from None


def passes(start: float, answers: Sequence[tuple[float, dict]]) -> list[tuple[int, float]]:
    """Where each of the target's passes ends, the prefill first: tokens so far, and when they were seen.

    answers: one per token of whole characters and a last one, as (seconds, answer). Tokens of one pass share its clock,
    ``predicted_ms``. Of a character that several passes make only the end is seen: they share its time evenly.
    """
    ends: list[tuple[int, float]] = []
    tokens = accepted = 0
    before = start + answers[0][1]["timings"]["prompt_ms"] / 1e3
    for _, group in groupby(answers, key=lambda each: each[1]["timings"]["predicted_ms"]):
        (moment, _), *_, (_, last) = [*group] * 2
        more = last["tokens_predicted"] - tokens
        tokens += more
        kept = last["timings"].get("draft_n_accepted", 0) - accepted
        accepted += kept
        n = max(1, more - kept) if more else 0  # each pass makes one token of its own; the last answer may bring none
        ends += [(tokens - n + i, before + (moment - before) * i / n) for i in range(1, n + 1)]
        before = moment
    return ends


def serve(address: Connection, target_gguf: str, drafter_gguf: str, context: int, window: int, threads: int, options: dict) -> None:
    """A process that is llama.cpp's server until its parent goes; sends the address it listens at.

    drafter_gguf: "" for plain decoding. options: more of its parameters, by their names.
    In one process its threads and PyTorch's would be more than the cores, and OpenMP lets both sleep then: our passes took twice as long.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = target_gguf
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.cache_ram_mib = context, 1, 0, 0
    params.fit_params, params.verbosity = False, -1
    for name, value in options.items():
        setattr(params, name, value)
    draft = params.speculative.draft
    for each in (params.cpuparams, params.cpuparams_batch, draft.cpuparams, draft.cpuparams_batch):
        each.n_threads = threads
    if drafter_gguf:
        draft.mparams.path = drafter_gguf
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_DSPARK]
        draft.n_max, draft.n_min, draft.p_min, draft.n_gpu_layers = window, 0, 0.0, 0
    server = xllamacpp.Server(params)
    address.send(server.listening_address)
    address.poll(None)


class LlamaCpp:
    """A running server. drafter: exported for this server alone; window: 0 for its whole block; options: see :func:`serve`."""

    def __init__(self, target_gguf: Path, target: Target, drafter: Drafter | None = None, window: int = 0, **options: object) -> None:
        package_version()
        spawn, context = get_context("spawn"), min(target.max_context, CONTEXT)
        self.pipe, there = spawn.Pipe()  # the server ends when this end of the pipe is closed
        with tempfile.TemporaryDirectory() as scratch:
            file = ""
            if drafter is not None:
                file, window = f"{scratch}/drafter.gguf", window or drafter.block_size
                export_gguf(drafter, target, file, target_gguf)
            arguments = (there, str(target_gguf), file, context, window, torch.get_num_threads(), options)
            spawn.Process(target=serve, args=arguments, daemon=True).start()
            there.close()
            try:
                self.address = self.pipe.recv()
            except EOFError:
                raise ValueError(f"llama.cpp's server did not start with {target_gguf}: its own message is above") from None

    def decoder(self, settings: Settings) -> Decoder:
        """Greedy. Times inside a round are NaN, and rejected drafts are not seen."""

        def decode(prompt_ids: list[int], seed: int) -> Trial:
            asked = {"prompt": prompt_ids, "n_predict": settings.max_new_tokens, "temperature": 0, "samplers": ["temperature"]}
            asked |= {"cache_prompt": False, "return_tokens": True, "timings_per_token": True}
            start = time.perf_counter()
            answers = [(time.perf_counter(), answer) for answer in self.ask(asked | {"stream": True})]
            ids = [token for _, answer in answers for token in answer["tokens"]]
            if len(ids) != answers[-1][1]["tokens_predicted"]:  # the stream leaves out tokens that end inside a character
                (whole,) = self.ask(asked)
                ids = whole["tokens"]
            ends = passes(start, answers)
            rounds = [
                Round(index=i, anchor=ids[a - 1], committed=tuple(ids[a:b]), verify_seconds=math.nan, seconds=after - before)
                for i, ((a, before), (b, after)) in enumerate(pairwise(ends), 1)
            ]
            return Trial(ids, rounds, ends[0][1] - start, ends[-1][1] - ends[0][1])

        return decode

    def ask(self, body: dict[str, object]) -> Iterator[dict]:
        """One answer, or one per token and a last one. Raises ValueError with the server's reason."""
        request = Request(f"{self.address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with build_opener(ProxyHandler({})).open(request) as response:
                for line in response:
                    if text := line.strip().removeprefix(b"data:"):
                        answer = json.loads(text)
                        if "error" in answer:
                            raise ValueError(f"llama.cpp failed: {answer['error']}")
                        yield answer
        except HTTPError as error:
            raise ValueError(f"llama.cpp refuses the prompt: {error.read(500).decode(errors='replace')}") from None
