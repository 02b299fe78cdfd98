"""``python -m dspark.train``: self-play corpus and drafter training from the command line."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from dspark.bench.plan import Plan, plan_of
from dspark.bench.provenance import drafter_digest
from dspark.cli import add_fields, from_fields, run_main
from dspark.draft.backbone import HEAD_TYPES
from dspark.files import cache_dir
from dspark.load import load_drafter, load_target
from dspark.train.compare import CANDIDATES, GROUPS, Comparison, Recipe, Variant, chosen
from dspark.train.corpus import check_seeds, concatenate, load_corpus
from dspark.train.features import SHARD_ROWS, FeatureStore, all_text
from dspark.train.loop import Trainer, train_to
from dspark.train.shards import DEFAULTS, self_play
from dspark.train.start import BLOCK_SIZE, LAYERS
from dspark.tune.profile import cpu_name
from dspark.workers import ENGINES

STAGES = ("train", "decode", "time")
# Options of dspark.bench that compare does not have, or has as its own.
UNSHARED = ("arms", "baseline", "target", "drafter", "top_p", "top_k", "dtype", "device", "seed", "repeats")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m dspark.train", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--target", default="default", help="'default', a hub id, a folder or a .gguf file")
    common.add_argument("--dtype", help="default bfloat16; float32 to train on a CPU where that is faster")
    common.add_argument("--device", default="cpu")
    common.add_argument("--corpus", type=Path, default=cache_dir() / "selfplay.json", help="self-play text: a manifest, or one file")

    corpus = commands.add_parser("corpus", parents=[common], help="let the target play both sides of conversations")
    for name, default in DEFAULTS.items():
        about = {"tokens": "tokens per row", "batch": "rows of a shard, sampled at a time"}.get(name, name)
        corpus.add_argument(f"--{name}", type=int, help=f"{about}; default as in the manifest, else {default}")
    corpus.add_argument("--engine", default="local", help=f"{' or '.join(ENGINES)}: where shards are made, on one machine or many")
    corpus.add_argument("--jobs", type=int, default=1, help="shards at a time")

    trained = argparse.ArgumentParser(add_help=False, parents=[common])
    trained.add_argument("--seed", type=int, default=0)
    trained.add_argument("--features", type=Path, help="keep the target's features here (7 kB a token for the default target)")

    drafter = commands.add_parser("drafter", parents=[trained], help="train a drafter; resumes; also in processes of accelerate launch")
    add_fields(drafter, Recipe, steps=5000, lr=1.5e-3, taps="", mask_token=-1)
    drafter.add_argument("--out", type=Path, required=True, help="folder of the finished drafter; its checkpoint is kept beside it")
    drafter.add_argument("--more", type=Path, help="learn from this corpus too, 64 rows at a time; the held-out rows are of --corpus")
    drafter.add_argument("--start-from", help="start with the weights and shape of this trained drafter: 'default', a folder, a hub id")
    drafter.add_argument("--learn-from", default="answers", choices=("answers", "all"), help="where blocks start; held-out rows: answers")
    drafter.add_argument("--weight-decay", type=float, default=0.0, help="of matrices, not of norms")
    drafter.add_argument("--block-size", type=int, default=BLOCK_SIZE)
    drafter.add_argument("--layers", type=int, default=LAYERS, choices=range(1, 9), help="start as copies of as many of the target's")
    drafter.add_argument("--head", default="vanilla", choices=HEAD_TYPES)
    drafter.add_argument("--candidates", type=int, default=CANDIDATES, help="among which a selector head chooses")
    drafter.add_argument("--convolutions", action="store_true", help="along the block, around attention and MLP")
    drafter.add_argument("--checkpoint-every", type=int, default=500, help="steps; held-out rows are judged as often")

    compare = commands.add_parser("compare", parents=[trained], help="train several kinds of drafter alike and decode with them; resumes")
    add_fields(compare, Recipe)
    add_fields(compare, Plan, UNSHARED, temperature=1.0)  # as in the paper's table
    compare.add_argument("--out", type=Path, default=Path("runs/compare"), help="holds one folder per drafter")
    compare.add_argument("--results", type=Path, help="folder of the measurements; default a folder in --out")
    compare.add_argument("--only", default="main", help=f"drafters or groups of them: all, {', '.join(GROUPS)}, dspark-block8, …")
    compare.add_argument("--stages", default="train,decode", help=f"of {', '.join(STAGES)}; time needs a quiet machine")
    return top


def bfloat16_is_faster() -> bool:
    """Whether training in bfloat16 is faster on this CPU: if oneDNN has kernels for it, but on Intel's only with AMX (data/LOG.md)."""
    kernels = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    return kernels and ("Intel" not in cpu_name() or torch.cpu._is_amx_tile_supported())


def usual_dtype(command: str, device: str) -> str:
    """The faster dtype for training; bfloat16 for everything else, and on a GPU."""
    slow = command in ("drafter", "compare") and device.startswith("cpu") and not bfloat16_is_faster()
    return "float32" if slow else "bfloat16"


def make_corpus(args: argparse.Namespace) -> None:
    target = load_target(args.target, dtype=args.dtype, device=args.device)
    given = {name: getattr(args, name) for name in DEFAULTS}
    self_play(target, args.corpus, **given, source=(args.target, args.dtype, args.device), engine=args.engine, jobs=args.jobs)


def train_drafter(args: argparse.Namespace) -> None:
    PartialState(cpu=args.device.startswith("cpu"))  # gives each process that accelerate has launched its own GPU
    recipe = from_fields(Recipe, args)
    config = recipe.config(weight_decay=args.weight_decay, checkpoint_every=args.checkpoint_every)
    target = load_target(args.target, dtype=args.dtype, device=args.device, pack=False)
    whole = load_corpus(args.corpus, target)
    corpus = recipe.text(whole)
    about = {"skipped_rows": args.skip_rows, "learnt_from": args.learn_from, "started_from": ""}
    if args.more:
        check_seeds(args.corpus, args.more)
        more = load_corpus(args.more, target)
        more = more.rows(slice(len(more) // SHARD_ROWS * SHARD_ROWS))  # whole shards, so that the held-out last one stays the same
        if not len(more) or not len(corpus):
            raise ValueError(f"--more {args.more} needs at least {SHARD_ROWS} rows and --corpus at least one that is not skipped")
        whole, corpus = (concatenate([more, part]) for part in (whole, corpus))
        about["more_rows"] = len(more)
    if args.start_from:
        drafter = load_drafter(args.start_from, target).requires_grad_(True)
        about["started_from"] = drafter_digest(drafter)
        drafter.sts_temperatures = ()  # fitted to the weights it starts from
    else:
        kind = {"head": args.head, "candidates": args.candidates, "convolutions": args.convolutions}
        drafter = recipe.start(Variant(args.out.name, args.layers, args.block_size, **kind), target, whole)
    if args.learn_from == "all":
        corpus = all_text(corpus)
    store = FeatureStore(target, corpus, drafter.target_layer_ids, args.features)
    trainer = Trainer(target, drafter, store, config, args.out.with_name(args.out.name + ".training"))
    train_to(trainer, args.out, about=about)


def compare_drafters(args: argparse.Namespace) -> None:
    variants, stages = chosen(args.only), [stage.strip() for stage in args.stages.split(",")]
    if wrong := [stage for stage in stages if stage not in STAGES]:
        raise ValueError(f"stage {wrong[0]!r} is unknown: choose from {', '.join(STAGES)}")
    plan = plan_of(args, arms="fixed", baseline="fixed")  # a wrong option is refused before anything is loaded or trained
    bare = load_target(args.target, dtype=args.dtype, device=args.device, pack=False)
    comparison = Comparison(bare, from_fields(Recipe, args), args.corpus, args.out, args.results or args.out / "results", args.features)
    if "train" in stages:
        comparison.train(variants)
    if stages != ["train"]:
        torch.set_num_threads(args.threads)
        target = load_target(args.target, dtype=args.dtype, device=args.device)
        if "decode" in stages:
            comparison.decode(target, variants, plan)
        if "time" in stages:
            comparison.time(target, variants)


def run(args: argparse.Namespace) -> None:
    if args.command != "drafter" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{args.command} runs in one process: accelerate launch is for drafter")
    args.dtype = args.dtype or usual_dtype(args.command, args.device)
    {"corpus": make_corpus, "drafter": train_drafter, "compare": compare_drafters}[args.command](args)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status, see :func:`dspark.cli.run_main`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # A background job starts with SIGINT ignored, and SIGTERM would skip the last checkpoint: both end the run cleanly here.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    return run_main(parser(), run, arguments, kept="finished steps and parts")


if __name__ == "__main__":
    sys.exit(main())
