"""Does llama.cpp draft with our drafter what we draft, and does drafting pay there? The first is counts only, so a busy machine will do.

    python data/llamacpp.py --out data/results/llamacpp.json
    python data/llamacpp.py --out data/results/llamacpp.json --times   # on a quiet machine, about two minutes; the counts stay

Ten ``dev`` prompts, greedy, bfloat16, whole blocks. Each is decoded by llama.cpp and by us. Where the two texts differ, so do the rounds,
so our drafter is also asked at the start of each of llama.cpp's rounds, on llama.cpp's text: how many of its drafts would have survived?

``--times``: llama.cpp's own times of a step over one to six tokens and of drafting a block, and its speed with windows of one to five
drafts on the first prompts. The times predict the speeds (as in notebook 09, section 3).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import BinaryIO

import torch
from tqdm.auto import tqdm

from dspark.bench.llamacpp import LlamaCpp, by_llamacpp, package_version
from dspark.bench.measure import Settings, by_dspark, first_divergence
from dspark.bench.plan import Plan, rotated
from dspark.bench.provenance import drafter_columns, environment
from dspark.cli import run_main
from dspark.draft.drafter import Drafter
from dspark.files import write_atomically
from dspark.formats.gguf import default_target_gguf
from dspark.load import load_drafter, load_target
from dspark.round import Round
from dspark.schedule import FixedWindow
from dspark.target.target import Target
from dspark.verify.sampling import Rng, Sampling

INFO = 4  # verbosity at which llama.cpp says how long drafting took
FREE = 1000  # ids from here on are ordinary tokens
ABOUT = ("target", "target_digest", "dtype", "machine", "threads", "python", "torch", "dspark", "revision")


def survivors(target: Target, drafter: Drafter, prompt_ids: Sequence[int], token_ids: Sequence[int], rounds: Sequence[Round]) -> list[int]:
    """Per round, how many of OUR greedy drafts from its anchor the text confirms. The last round is left out: the limit cuts it."""
    ids = [*prompt_ids, *token_ids]
    _, taps = target.forward(torch.tensor([ids]), target.new_cache(), drafter.target_layer_ids)
    state, known, anchor, found = drafter.new_state(prompt_ids), 0, len(prompt_ids), []
    for each in rounds[:-1]:
        drafter.extend(state, ids[known:anchor], taps[:, known:anchor])
        known = anchor
        tokens = drafter.draft(state, ids[anchor], drafter.block_size, Sampling(), Rng(torch.Generator())).tokens
        same = first_divergence(tokens, ids[anchor + 1 : anchor + 1 + len(tokens)])
        found.append(len(tokens) if same < 0 else same)
        anchor += len(each.committed)
    return found


def server_of(target: Target, drafter: Drafter, window: int, log: BinaryIO) -> LlamaCpp:
    """One that drafts so many tokens a round, 0 for none, and writes its messages into the log."""
    errors = os.dup(2)
    os.dup2(log.fileno(), 2)  # which the new process inherits
    try:
        return LlamaCpp(default_target_gguf(), target, drafter if window else None, window, verbosity=INFO)
    finally:
        os.dup2(errors, 2)


def own_draft_ms(log: BinaryIO) -> float:
    """llama.cpp's own mean time of drafting a block, milliseconds; 0 where it drafted nothing."""
    log.seek(0)
    found = re.findall(r"#calls\(b,g,a\) = +\d+ +(\d+).*dur\(b,g,a\) = [\d.]+, ([\d.]+)", log.read().decode(errors="replace"))
    return float(found[-1][1]) / int(found[-1][0]) if found else 0.0


def pass_ms(server: LlamaCpp, text: list[int], widths: Sequence[int], repeats: int) -> list[float]:
    """Medians of llama.cpp's own time of a pass over so many tokens that follow ``text``, which its cache holds."""
    found: dict[int, list[float]] = {width: [] for width in widths}
    for i, width in enumerate([0, *list(widths) * repeats]):  # the first request fills the cache; each differs from its first token on
        prompt = [*text, *(FREE + 10 * i + k for k in range(max(width, 1)))]
        (answer,) = server.ask({"prompt": prompt, "n_predict": 1, "temperature": 0, "samplers": ["temperature"], "cache_prompt": True})
        if width:
            assert answer["timings"]["prompt_n"] == width, "the cache was not kept"
            found[width].append(answer["timings"]["prompt_ms"])
    return [median(times) for times in found.values()]


def measure_times(target: Target, drafter: Drafter, prompts: Sequence[list[int]], tokens: int, repeats: int) -> dict[str, object]:
    """One server for plain decoding (window 0) and one for every window; all decode each prompt, a different one first each time.

    windows: tokens after the first, rounds and seconds of all prompts together; draft_ms of one block.
    step_ms: a step over 1, 2, … tokens: plain decoding's, and how much longer a pass over more takes. (Passes are timed as prompts are,
        which costs a fixed time that decoding does not, and computes logits for the last token alone.)
    acceptance: by position, conditional, of whole blocks; the last rounds, which the limit cuts, are left out.
    """
    windows = range(drafter.block_size + 1)
    logs = [TemporaryFile() for _ in windows]
    servers = [server_of(target, drafter, window, log) for window, log in zip(windows, logs, strict=True)]
    decoders, trials = [server.decoder(Settings(max_new_tokens=tokens)) for server in servers], {window: [] for window in windows}
    for decode in decoders:
        decode(prompts[0], 0)  # warm-up
    for turn, ids in enumerate(tqdm(prompts, unit="prompt")):
        for window in rotated(windows, turn):
            trials[window].append(decoders[window](ids, 0))
    passes = pass_ms(servers[0], [*prompts[0], *trials[0][0].token_ids], [window + 1 for window in windows], repeats)
    for server in servers:
        server.pipe.close()
    time.sleep(1)
    rows = []
    for window, log in zip(windows, logs, strict=True):
        tokens_after, rounds = (sum(map(len, each)) for each in zip(*((t.token_ids[1:], t.rounds) for t in trials[window]), strict=True))
        seconds = sum(trial.seconds for trial in trials[window])
        rows.append({"window": window, "tokens": tokens_after, "rounds": rounds, "seconds": seconds, "draft_ms": own_draft_ms(log)})
    plain_ms = 1e3 * rows[0]["seconds"] / rows[0]["tokens"]
    accepted = [len(each.committed) - 1 for trial in trials[drafter.block_size] for each in trial.rounds[:-1]]
    reached = [sum(n >= k for n in accepted) for k in windows]
    asked = {"context": len(prompts[0]) + tokens, "prompts": len(prompts), "max_new_tokens": tokens, "repeats": repeats}
    found = {"pass_ms": passes, "step_ms": [plain_ms + each - passes[0] for each in passes], "windows": rows}
    return asked | found | {"acceptance": [after / before for before, after in pairwise(reached)]}


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    target, stock = load_target(), load_target(pack=False)
    drafter = load_drafter("default", stock)
    about = {name: environment(target)[name] for name in ABOUT} | {"drafter_digest": drafter_columns(drafter)["drafter_digest"]}
    about |= {"xllamacpp": package_version(), "split": "dev"}
    units = Plan(split="dev", prompts=-(-options.prompts // 4)).units[: options.prompts]
    if options.times:
        found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
        prompts = [target.encode(unit.item.messages) for unit in units[: options.timed]]
        found["times"] = {"about": about} | measure_times(target, drafter, prompts, options.tokens // 2, options.repeats)
        write_atomically(options.out, json.dumps(found, indent=1).encode() + b"\n")
        return
    about |= {"max_new_tokens": options.tokens, "block_size": drafter.block_size}
    settings = Settings(max_new_tokens=options.tokens)
    theirs, ours = by_llamacpp(target, drafter, settings), by_dspark(target, drafter, FixedWindow(), settings)
    rows = []
    for unit in tqdm(units, unit="prompt"):
        ids = target.encode(unit.item.messages)
        other, mine = theirs(ids, 0), ours(ids, 0)
        there = [len(each.committed) - 1 for each in other.rounds[:-1]]
        here = survivors(stock, drafter, ids, other.token_ids, other.rounds)
        row = {"prompt_id": unit.item.id, "first_divergence": first_divergence(other.token_ids, mine.token_ids)}
        for name, trial in (("llamacpp", other), ("dspark", mine)):
            row |= {f"{name}_tokens": len(trial.token_ids) - 1, f"{name}_rounds": len(trial.rounds)}
        row |= {"compared_rounds": len(there), "equal_rounds": sum(map(int.__eq__, there, here))}
        rows.append(row | {"llamacpp_accepted": sum(there), "dspark_accepted": sum(here)})
    write_atomically(options.out, json.dumps({"about": about, "prompts": rows}, indent=1).encode() + b"\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="data/llamacpp.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10, help="prompts in all; default 10")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens at most; default 128")
    parser.add_argument("--times", action="store_true", help="measure speed and step times instead, into the same file")
    parser.add_argument("--timed", type=int, default=4, help="prompts of that; default 4")
    parser.add_argument("--repeats", type=int, default=15, help="passes of each width of that; default 15")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--out", type=Path, default=Path("runs/llamacpp.json"), help="JSON file; default runs/llamacpp.json")
    sys.exit(run_main(parser, main))
