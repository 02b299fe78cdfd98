"""What the tests share: tiny random models, small enough to enumerate and fast enough to forget, and a disk without room."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dspark.draft import Drafter
from dspark.target import Target
from dspark.train.start import drafter_for


def tiny_target(seed: int = 0, dtype: torch.dtype = torch.float32, **config: object) -> Target:
    """A random Llama of 4 layers, hidden 32, vocabulary 100; token 2 ends the text. No tokenizer: prompts are token ids."""
    settings = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | config)))
    return Target(model.to(dtype), None, "tiny")


def tiny_drafter(target: Target, *, seed: int = 1, **shape: object) -> Drafter:
    """A random drafter for that target: block 4, two layers, Markov rank 8, all weights far from zero."""
    settings = {"block_size": 4, "target_layer_ids": (0, 2), "mask_token_id": 3, "markov_rank": 8, "num_hidden_layers": 2}
    drafter = drafter_for(target, seed=seed, **(settings | shape))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for weight in drafter.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.3)
    return drafter.to(target.dtype).attach(target).eval().requires_grad_(False)


@contextmanager
def full_disk() -> Iterator[None]:
    """Inside it, writing more than 4 kB to a file fails as on a full disk, in every library.

    The limit holds for the whole process, standard output in a file included: keep nothing but the call under test inside.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
