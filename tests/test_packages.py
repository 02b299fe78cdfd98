"""Blocks of published drafters equal those of the packages that trained them, where these are installed; elsewhere it is skipped by name.

``pip install --no-deps speculators==0.9.0 specforge==0.2.0 dflash==0.1.0``, and what they import, in an environment of its own.
:mod:`test_formats` checks the same against the published equations, without them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import HIDDEN, MASK, VOCAB, WINDOW, weights, write
from test_formats import ANCHOR, PROMPT, QWEN3, SLIDES, SPECFORGE, ZLAB, speculators
from tiny import tiny_target
from torch import Tensor
from transformers import Qwen3Config

import dspark
from dspark.target.target import Target
from dspark.verify.sampling import Rng, Sampling

KINDS = ("vanilla", "gated", "rnn")


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(eos_token_id=None)


def ours(folder: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Greedy tokens, logits and confidences of the block after PROMPT and ANCHOR, and the taps [tokens, m·h]."""
    drafter, logits, probs = dspark.load_drafter(folder, target), [], Sampling.row
    _, taps = target.forward(torch.tensor([PROMPT]), target.new_cache(), drafter.target_layer_ids)
    state = drafter.new_state(PROMPT)
    drafter.extend(state, PROMPT, taps)
    with monkeypatch.context() as patch:
        patch.setattr(Sampling, "row", lambda self, row: logits.append(row.clone()) or probs(self, row))
        draft = drafter.draft(state, ANCHOR, drafter.block_size, Sampling(), Rng())
    return draft.tokens, torch.stack(logits), draft.confidence, taps[0]


def qwen3(config: dict, **more: object) -> Qwen3Config:
    return Qwen3Config(**(config | {"attn_implementation": "eager"} | more))


SPECULATORS = {
    **{f"anchor, {kind}": speculators(sample_from_anchor=True, markov_head_type=kind) for kind in KINDS},
    **{f"1+N, {kind}": speculators(sample_from_anchor=False, markov_head_type=kind) for kind in KINDS},
    "sliding": speculators(sample_from_anchor=True, **SLIDES),
    "sliding, 1+N": speculators(sample_from_anchor=False, **SLIDES),
    "sliding both ways": speculators(sample_from_anchor=True, sliding_window_non_causal=True, **SLIDES),
    "reduced": speculators(sample_from_anchor=True, draft_vocab_size=40),
    "confidence alone": speculators(sample_from_anchor=True, confidence_head_with_markov=False),
    "yarn": speculators(
        sample_from_anchor=True,
        rope_theta=None,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e4},
    ),
}


@pytest.mark.parametrize("config", SPECULATORS.values(), ids=SPECULATORS)
def test_blocks_are_those_of_speculators_own_class(config: dict, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("speculators.models.dspark")
    reduced = config["draft_vocab_size"] < VOCAB
    tensors = weights(config, d2t=reduced, lm_head=reduced)
    layers = {name: value for name, value in config["transformer_layer_config"].items() if value is not None}
    config = config | {"transformer_layer_config": layers}
    write(tmp_path, config, tensors)
    tokens, logits, confidence, taps = ours(tmp_path, target, monkeypatch)

    outer = {name: value for name, value in config.items() if name not in ("transformer_layer_config", "speculators_model_type")}
    model = package.DSparkDraftModel(package.DSparkSpeculatorConfig(**outer, transformer_layer_config=qwen3(layers))).eval()
    head = tensors["lm_head.weight"] if reduced else target.head_weight
    tables = {"embed_tokens.weight": target.embedding.weight, "lm_head.weight": head, "verifier_lm_head.weight": torch.zeros_like(head)}
    tables["verifier_norm.weight"] = torch.ones(HIDDEN)
    model.load_state_dict(tensors | tables)
    slots, first, start = config["block_size"], not config["sample_from_anchor"], len(PROMPT)
    length = start + 2 * slots + 2
    ids = torch.tensor([[*PROMPT, ANCHOR, *tokens, *[0] * length]])[:, :length]
    at_anchor = torch.zeros(1, length)
    at_anchor[0, start] = 1
    states = torch.cat([taps, torch.randn(length - start, taps.shape[1])])[None]
    with torch.no_grad():
        hidden, rows, *_ = model._backbone_forward(
            states, ids, at_anchor, torch.zeros(1, length, HIDDEN), torch.zeros(1, length, dtype=torch.long), max_anchors=1
        )
        block = ids[:, start : start + slots]
        previous = torch.cat([block[:, :1], block[:, :-1]], 1) if first else block
        embedded = model.markov_head.prev_embeddings(previous)
        rows = rows + model.markov_head.block_bias(prev_token_ids=previous, hidden_states=hidden, prev_emb=embedded)
        reads = torch.cat([hidden, embedded], -1) if config["confidence_head_with_markov"] else hidden
        sure = model.confidence_head(reads).sigmoid()
    assert torch.allclose(logits, rows[0, first:], atol=1e-4, rtol=1e-4)
    assert torch.allclose(confidence, sure[0, first:], atol=1e-4)
    chosen = rows[0, first:].argmax(-1)
    assert tokens == (chosen + tensors["d2t"][chosen] if reduced else chosen).tolist()


def parallel(model: torch.nn.Module, target: Target, taps: Tensor, slots: int, **more: object) -> Tensor:
    """Hidden states [slots, hidden] of a block by a class of z-lab or SpecForge."""
    noise = target.embedding(torch.tensor([[ANCHOR, *[MASK] * (slots - 1)]]))
    with torch.no_grad():
        return model(position_ids=torch.arange(len(taps) + slots)[None], noise_embedding=noise, target_hidden=taps[None], **more)[0]


@pytest.mark.parametrize(
    "changes",
    [{}, SLIDES, SLIDES | {"is_causal": False}, {"is_causal": True}, {"final_logit_softcapping": 2.0}, {"attention_bias": False}],
    ids=["full", "sliding", "sliding both ways", "causal", "capped", "no bias"],
)
def test_blocks_are_those_of_zlabs_own_class(changes: dict, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("dflash.model")
    config = ZLAB | changes
    tensors = weights(config)
    write(tmp_path, config, tensors)
    tokens, logits, _, taps = ours(tmp_path, target, monkeypatch)
    inner = {name: config[name] for name in ("mask_token_id", "target_layer_ids")}
    model = package.DFlashDraftModel(
        qwen3({k: v for k, v in config.items() if k != "model_type"}, num_target_layers=4, dflash_config=inner)
    )
    model.eval().load_state_dict(tensors)
    rows = model.compute_logits(parallel(model, target, taps, config["block_size"])[1:], target.head)
    assert torch.allclose(logits, rows, atol=1e-4, rtol=1e-4)
    assert tokens == rows.argmax(-1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_specforges_own_class(kind: str, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("specforge.modeling.draft.dspark")
    inner = {name: SPECFORGE[name] for name in ("mask_token_id", "target_layer_ids", "markov_rank", "enable_confidence_head")}
    inner |= {"confidence_head_with_markov": True, "markov_head_type": kind}
    config = {name: value for name, value in SPECFORGE.items() if name not in inner} | {"dflash_config": inner}
    tensors = weights(config | inner)
    write(tmp_path, config, tensors)
    tokens, logits, confidence, taps = ours(tmp_path, target, monkeypatch)
    model = package.DSparkDraftModel(qwen3({k: v for k, v in config.items() if k != "model_type"}, num_target_layers=4)).eval()
    model.load_state_dict(tensors)
    hidden = parallel(model, target, taps, config["block_size"])[None, 1:]
    with torch.no_grad():
        drawn, rows = model.markov_head.sample_block_tokens(
            target.head(hidden), first_prev_token_ids=torch.tensor([ANCHOR]), hidden_states=hidden
        )
        sure = model.predict_confidence(hidden, prev_token_ids=torch.cat([torch.tensor([[ANCHOR]]), drawn[:, :-1]], 1)).sigmoid()
    assert tokens == drawn[0].tolist()
    assert torch.allclose(logits, rows[0], atol=1e-4, rtol=1e-4)
    assert torch.allclose(confidence, sure[0], atol=1e-4)


def test_the_window_is_shorter_than_the_prompt() -> None:
    """Else the sliding cases above would not differ from the full ones."""
    assert WINDOW < len(PROMPT) and QWEN3["block_size"] <= WINDOW
