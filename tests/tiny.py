"""Shared by the tests: tiny random models, the text of `model.generate`, drafts that are partly wrong, a full disk."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dspark.draft.drafter import Drafter
from dspark.draft.source import Draft
from dspark.target.target import Target
from dspark.train.start import drafter_for
from dspark.verify.sampling import Rng, Sampling

SELECTOR = {"markov_head_type": "selector", "num_candidates": 6}
CONVOLUTIONS = {"convolution_kernel": 3, "convolution_groups": 4}
DFLASH2 = SELECTOR | CONVOLUTIONS
HEADS = ({"markov_head_type": "vanilla"}, {"markov_head_type": "gated"}, {"markov_head_type": "rnn"}, SELECTOR, {"markov_rank": 0}, DFLASH2)
WINDOW = 8  # tokens that the sliding layers see
LETTERS = "".join(map(chr, range(32, 127)))
TEMPLATE = (
    "{% for m in messages %}<start>{{ m['role'] }} {{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant {% endif %}"
)


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


def tiny_drafter(target: Target, *, seed: int = 1, std: float = 0.3, **shape: object) -> Drafter:
    """A random drafter for that target: block 4, two layers, Markov rank 8, all weights far from zero."""
    settings = {"block_size": 4, "target_layer_ids": (0, 2), "mask_token_id": 3, "markov_rank": 8, "num_hidden_layers": 2}
    drafter = drafter_for(target, seed=seed, **(settings | shape))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for weight in drafter.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=std)
    return drafter.to(target.dtype).attach(target).eval().requires_grad_(False)


def dense(draft: Draft) -> Tensor:
    """The rows that the draft was drawn from, with their zeros; not for one-hot rows."""
    rows = draft.probs
    return rows if isinstance(rows, Tensor) else -torch.stack([torch.zeros(len(row.t2d)) - row for row in rows])


def sliding_target(attention: str) -> Target:
    """A random Gemma3 whose layers alternate between a window of 8 tokens and the whole context."""
    config = Gemma3TextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.4,
        tie_word_embeddings=False,
        max_position_embeddings=1024,
        eos_token_id=None,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Target(Gemma3ForCausalLM(config), None, "tiny-gemma3")


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token per printable character, 100 in all, with a chat template; token 2 ends a turn and the text."""
    names = ["<pad>", "<unknown>", "<end>", "<mask>", "<start>", *LETTERS]
    letters = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unknown>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "unk_token": "<unknown>", "eos_token": "<end>", "mask_token": "<mask>", "bos_token": "<start>"}
    return PreTrainedTokenizerFast(tokenizer_object=letters, chat_template=TEMPLATE, clean_up_tokenization_spaces=False, **special)


def reference(target: Target, prompt: list[int], count: int) -> list[int]:
    """What transformers alone makes of it."""
    eos = sorted(target.eos_token_ids) or None
    ids = torch.tensor([prompt])
    out = target.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=eos, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def random_prompt(seed: int, length: int, vocab: int = 100) -> list[int]:
    return torch.randint(4, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Wavering:
    """Drafts the text that will come, with a wrong token every so often: runs of acceptances of every length, up to whole blocks.

    Tokens after the end of the text are drafted as well, if ``text`` goes on there. Its confidence is a seeded coin's, so that
    the policies cut anywhere. errors: share of wrong tokens.
    """

    target_layer_ids, has_confidence = (0,), True

    def __init__(self, target: Target, text: list[int], block_size: int, errors: float = 0.2, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        wrong = (torch.rand(len(text), generator=generator) < errors).tolist()
        self.vocab, self.block_size = target.vocab_size, block_size
        self.text = [(token + w) % self.vocab for token, w in zip(text, wrong, strict=True)]
        self.confidence = torch.rand(len(text), generator=generator).sqrt()

    def new_state(self, prompt: list[int]) -> dict[str, int]:
        return {"at": -len(prompt)}

    def extend(self, state: dict[str, int], token_ids: list[int], taps: Tensor) -> None:
        assert taps.shape[1] == len(token_ids)
        state["at"] += len(token_ids)

    def draft(self, state: dict[str, int], anchor: int, window: int, sampling: Sampling, rng: Rng) -> Draft:
        ahead = slice(state["at"] + 1, state["at"] + 1 + window)
        tokens, confidence = self.text[ahead], self.confidence[ahead]
        return Draft(tokens, torch.eye(self.vocab)[tokens], confidence, "wavering")


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
