"""``model.generate`` of transformers, alone and with its two ways to draft without a second model."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import torch
from torch import Tensor

from dspark.bench.measure import Decoder, Settings, Trial
from dspark.cpu import is_packed
from dspark.round import Round
from dspark.target.target import Target


def by_transformers(target: Target, settings: Settings, **options: object) -> Decoder:
    """``model.generate`` as a user has it: its own cache and loop, the same distribution, length and end-of-text tokens.

    options: of ``generate``. Only whole steps can be seen from outside, so times inside a step are NaN and nothing counts as checked.
    The prefill's step may yield several tokens where it drafts; the rounds leave out all of them.
    Raises ValueError for a target whose weights were rearranged for speed.
    """
    if is_packed(target.model):
        raise ValueError(f"{target.name} is packed, but generate measures transformers alone: use load_target(…, pack=False)")
    eos = sorted(target.eos_token_ids)
    fixed = {"eos_token_id": eos or None, "pad_token_id": eos[0] if eos else 0, "repetition_penalty": 1.0, "use_cache": True}
    fixed |= {"do_sample": settings.temperature > 0}
    if settings.temperature:
        fixed |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}

    def decoder(prompt_ids: list[int], seed: int) -> Trial:
        ids = torch.tensor([prompt_ids], device=target.device)
        steps, limit = _Steps(), min(settings.max_new_tokens, target.max_context - len(prompt_ids))
        with torch.random.fork_rng(devices=[target.device] if target.device.type == "cuda" else []):
            torch.manual_seed(seed)
            start = time.perf_counter()
            target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, streamer=steps, **fixed, **options)
            end = time.perf_counter()
        _prompt, first, *_ = steps.times
        rounds = [
            Round(index=i, anchor=before[-1], committed=tuple(tokens), verify_seconds=math.nan, seconds=b - a)
            for i, ((before, tokens), (a, b)) in enumerate(zip(pairwise(steps.tokens[1:]), pairwise(steps.times[1:]), strict=True), 1)
        ]
        return Trial([token for step in steps.tokens[1:] for token in step], rounds, first - start, end - first)

    return decoder


def by_early_exit(target: Target, settings: Settings) -> Decoder:
    """Transformers' assisted generation; the assistant is the first third of the target's own layers.

    No smaller model shares the default target's vocabulary. The layers cost no memory, but were not trained to be read early.
    Transformers chooses the draft length: until confidence falls below 0.4, 20 at most.
    """
    return by_transformers(target, settings, assistant_early_exit=max(1, target.num_layers // 3))


class _Steps:
    """A streamer that records which tokens came when; ``generate`` passes it the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        pass
