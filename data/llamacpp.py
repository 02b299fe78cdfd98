"""Does llama.cpp draft with our drafter what we draft, and does drafting pay there? The first is counts only, so a busy machine will do.

    python data/llamacpp.py --out data/results/llamacpp.json
    python data/llamacpp.py --out data/results/llamacpp.json --times   # on a quiet machine, about two minutes; the counts stay

Ten ``dev`` prompts, greedy, bfloat16, whole blocks. Each is decoded by llama.cpp and by us. Where the two texts differ, so do the rounds,
so our drafter is also asked at the start of each of llama.cpp's rounds, on llama.cpp's text: how many of its drafts would have survived?

``--times``: llama.cpp's own times of a step over one to six tokens and of drafting a block, and its speed with windows of one to five
drafts on the first prompts. The times predict the speeds (notebook 09, section 7).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile

import torch
from tqdm.auto import tqdm, trange

from dspark.bench.llamacpp import LlamaCpp, by_llamacpp, package_version
from dspark.bench.measure import Settings, by_dspark, first_divergence
from dspark.bench.plan import Plan
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


def step_ms(target: Target, text: list[int], widths: Sequence[int], tokens: int, repeats: int) -> list[float]:
    """Medians of llama.cpp's own time of a step over so many tokens: of as many users, who all write on from ``text`` at once."""
    server = LlamaCpp(default_target_gguf(), target, n_parallel=max(widths))
    asked = {"prompt": text, "temperature": 0, "samplers": ["temperature"], "cache_prompt": True, "ignore_eos": True}

    def ask(user: int, count: int) -> dict[str, float]:
        return next(server.ask(asked | {"id_slot": user, "n_predict": count}))["timings"]

    for user in range(max(widths)):
        ask(user, 1)  # the text stays in each user's cache
    found = {width: [] for width in widths}
    for width in list(widths) * repeats:
        with ThreadPoolExecutor(width) as pool:
            timings = list(pool.map(ask, range(width), [tokens] * width))
        assert all(each["cache_n"] >= len(text) - 1 for each in timings), "a cache was not kept"
        found[width] += [each["predicted_ms"] / (each["predicted_n"] - 1) for each in timings]
    server.pipe.close()
    return [median(times) for times in found.values()]


def measure_window(target: Target, drafter: Drafter, window: int, prompts: Sequence[list[int]], tokens: int) -> dict[str, object]:
    """All prompts in llama.cpp, at most so many drafts a round; 0 is plain decoding.

    tokens: after the first. seconds: of them. draft_ms: of one block, by llama.cpp's own count. accepted: per round but the last ones.
    """
    with TemporaryFile() as log:
        out = os.dup(2)
        os.dup2(log.fileno(), 2)  # the server's messages go there
        try:
            server = LlamaCpp(default_target_gguf(), target, drafter if window else None, window, verbosity=INFO)
        finally:
            os.dup2(out, 2)
        decode = server.decoder(Settings(max_new_tokens=tokens))
        trials = [decode(ids, 0) for ids in (prompts[0], *prompts)][1:]  # the first one warms up
        server.pipe.close()
        time.sleep(1)
        log.seek(0)
        found = re.findall(r"#calls\(b,g,a\) = +\d+ +(\d+).*dur\(b,g,a\) = [\d.]+, ([\d.]+)", log.read().decode(errors="replace"))
    calls, draft_ms = map(float, found[-1] if found else (1, 0))
    sums = {"tokens": sum(len(trial.token_ids) - 1 for trial in trials), "rounds": sum(len(trial.rounds) for trial in trials)}
    sums |= {"seconds": sum(trial.seconds for trial in trials), "draft_ms": draft_ms / calls}
    return {"window": window} | sums | {"accepted": [len(each.committed) - 1 for trial in trials for each in trial.rounds[:-1]]}


def measure_times(target: Target, drafter: Drafter, prompts: Sequence[list[int]], tokens: int, repeats: int) -> dict[str, object]:
    """step_ms: over 1, 2, … tokens. windows: of 0 (plain decoding), 1, … drafts. acceptance: by position, conditional, of whole blocks."""
    windows = [measure_window(target, drafter, window, prompts, tokens) for window in trange(drafter.block_size + 1, desc="windows")]
    accepted = [each.pop("accepted") for each in windows][-1]
    reached = [sum(n >= k for n in accepted) for k in range(drafter.block_size + 1)]
    step = step_ms(target, prompts[0], range(1, drafter.block_size + 2), tokens, repeats)
    asked = {"context": len(prompts[0]), "prompts": len(prompts), "max_new_tokens": tokens, "repeats": repeats}
    return asked | {"step_ms": step, "windows": windows, "acceptance": [after / before for before, after in pairwise(reached)]}


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    target, stock = load_target(), load_target(pack=False)
    drafter = load_drafter("default", stock)  # a packed one computes in 8 bits
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
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each width of that; default 3")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--out", type=Path, default=Path("runs/llamacpp.json"), help="JSON file; default runs/llamacpp.json")
    sys.exit(run_main(parser, main))
