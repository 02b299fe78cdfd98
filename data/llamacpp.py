"""Does llama.cpp draft with our drafter what we draft? Counts only, so a busy machine will do.

    python data/llamacpp.py --out data/results/llamacpp.json

Ten ``dev`` prompts, greedy, bfloat16, whole blocks. Each is decoded by llama.cpp and by us. Where the two texts differ, so do the rounds,
so our drafter is also asked at the start of each of llama.cpp's rounds, on llama.cpp's text: how many of its drafts would have survived?
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dspark.bench.llamacpp import by_llamacpp, package_version
from dspark.bench.measure import Settings, by_dspark, first_divergence
from dspark.bench.plan import Plan
from dspark.bench.provenance import drafter_columns, environment
from dspark.cli import run_main
from dspark.draft.drafter import Drafter
from dspark.files import write_atomically
from dspark.load import load_drafter, load_target
from dspark.round import Round
from dspark.schedule import FixedWindow
from dspark.target.target import Target
from dspark.verify.sampling import Rng, Sampling

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


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    target, stock = load_target(), load_target(pack=False)
    drafter = load_drafter("default", stock)  # a packed one computes in 8 bits
    about = {name: environment(target)[name] for name in ABOUT} | {"drafter_digest": drafter_columns(drafter)["drafter_digest"]}
    about |= {"xllamacpp": package_version(), "split": "dev", "max_new_tokens": options.tokens, "block_size": drafter.block_size}
    settings = Settings(max_new_tokens=options.tokens)
    theirs, ours = by_llamacpp(target, drafter, settings), by_dspark(target, drafter, FixedWindow(), settings)
    rows = []
    for unit in tqdm(Plan(split="dev", prompts=-(-options.prompts // 4)).units[: options.prompts], unit="prompt"):
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
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--out", type=Path, default=Path("runs/llamacpp.json"), help="JSON file; default runs/llamacpp.json")
    sys.exit(run_main(parser, main))
