"""Training: the gradient is the loss's own, blocks see only what drafting sees, a resumed run equals an uninterrupted one."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_drafter, tiny_target
from transformers import Gemma2Config, Gemma2ForCausalLM

import dspark.train.__main__
from dspark.draft.backbone import Context, block_mask
from dspark.target.target import Target
from dspark.train.corpus import Corpus
from dspark.train.features import FeatureStore, all_text
from dspark.train.loop import TrainConfig, Trainer
from dspark.train.losses import HeadLoss, block_loss, choose_blocks
from dspark.train.start import drafter_for, frequent_tokens, spread_taps, unused_token


def corpus(rows: int = 12, tokens: int = 24, vocab: int = 100) -> Corpus:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocab, (rows, tokens), generator=generator)
    assistant = torch.zeros(rows, tokens, dtype=torch.bool)
    assistant[:, 6:20] = True
    return Corpus(ids, assistant, torch.ones(rows))


def trainer(folder: Path, steps: int = 6, **options: object) -> Trainer:
    target = tiny_target()
    store = FeatureStore(target, corpus(), (0, 2), shard_rows=4)
    config = TrainConfig(steps=steps, sequences=2, anchors=3, learning_rate=1e-2, checkpoint_every=2, **options)
    drafter = drafter_for(
        target, init_layers=(0,), block_size=4, target_layer_ids=(0, 2), markov_rank=8, mask_token_id=3, d2t=torch.arange(2, 90)
    )
    return Trainer(target, drafter, store, config, folder)


@pytest.mark.parametrize("rank", [0, 8])
def test_the_written_out_gradient_equals_autograds(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    n, h, vocab, draft_vocab = 400, 16, 60, 40  # more rows than one chunk
    hidden = torch.randn(n, h, generator=generator, requires_grad=True)
    latent = torch.randn(n, rank, generator=generator, requires_grad=True)
    w2 = torch.randn(draft_vocab, rank, generator=generator, requires_grad=True)
    full_head = torch.randn(vocab, h, generator=generator)
    final = torch.randn(n, h, generator=generator)
    label = torch.randint(-1, draft_vocab, (n,), generator=generator)
    weight = torch.rand(n, generator=generator)
    logsumexp = (final @ full_head.T).logsumexp(-1)
    loss, acceptance = HeadLoss.apply(hidden, latent, w2, full_head[:draft_vocab], final, logsumexp, label, weight)
    inputs = (hidden, latent, w2)
    found = torch.autograd.grad(loss, inputs)

    logits = hidden @ full_head[:draft_vocab].T + latent @ w2.T
    p, q = logits.softmax(-1), (final @ full_head.T).softmax(-1)
    distance = (p - q[:, :draft_vocab]).abs().sum(-1) + q[:, draft_vocab:].sum(-1)
    ce = torch.nn.functional.cross_entropy(logits, label, ignore_index=-1, reduction="none")
    reference = (weight * (0.1 * ce + 0.9 * distance)).sum()
    expected = torch.autograd.grad(reference, inputs)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert torch.allclose(acceptance, 1 - distance / 2, atol=1e-5)
    assert torch.allclose(acceptance, torch.minimum(p, q[:, :draft_vocab]).sum(-1), atol=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_anchors_and_labels_are_response_tokens() -> None:
    text = corpus()
    shard = FeatureStore(tiny_target(), text, (0, 2)).shard(0)
    blocks = choose_blocks(shard, 8, 4, 3, torch.Generator().manual_seed(0))
    row = torch.arange(len(text))[:, None, None]
    assert text.assistant[row, blocks.positions[..., :1]].all()
    after = blocks.positions + 1
    assert text.assistant[row, after.clamp(max=23)][blocks.valid].all()
    assert (blocks.labels == text.token_ids[row, after.clamp(max=23)])[blocks.valid].all()
    assert (blocks.previous == text.token_ids[row, blocks.positions.clamp(max=23)]).all()
    assert not (blocks.valid[..., 1:] & ~blocks.valid[..., :-1]).any()
    assert (blocks.tokens[..., 1:] == 3).all()


def test_a_block_sees_context_before_its_anchor_and_itself_and_nothing_else() -> None:
    mask = block_mask(torch.tensor([[2, 5]]), block_size=3, length=7)[0, 0]
    assert mask.shape == (6, 13)
    assert mask[0, :7].tolist() == [True] * 2 + [False] * 5
    assert mask[5, :7].tolist() == [True] * 5 + [False] * 2
    assert mask[1, 7:].tolist() == [True] * 3 + [False] * 3
    assert mask[4, 7:].tolist() == [False] * 3 + [True] * 3


def test_training_and_drafting_see_the_same_distributions() -> None:
    """The acceptance of a training block equals Σ min(p_d, p_t) of the draft made at that anchor with these tokens."""
    target = tiny_target()
    drafter = tiny_drafter(target)
    shard = FeatureStore(target, corpus(), (0, 2)).shard(0)
    blocks = choose_blocks(shard, 1, 4, 3, torch.Generator().manual_seed(3))
    result = block_loss(drafter, shard, blocks)
    anchor = int(blocks.positions[0, 0, 0])
    ids = shard.token_ids[0]
    contexts = [Context(*kv) for kv in drafter.context(shard.taps[:1, :anchor])]
    hidden = drafter.backbone(blocks.tokens[:1, 0], blocks.positions[:1, 0], contexts)
    head = drafter.markov_head
    p_draft = (hidden @ drafter.head_weight.T + head.markov_w2(head.markov_w1(ids[None, anchor : anchor + 4]))).softmax(-1)
    p_target = target.forward(ids[None], None)[0][:, anchor : anchor + 4].softmax(-1)
    expected = torch.minimum(p_draft, p_target).sum(-1)
    valid = blocks.valid[0, 0]
    assert valid.sum() >= 2
    assert torch.allclose(result.acceptance[0, 0][valid], expected[0][valid], atol=1e-5)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    records = list(trainer(tmp_path, steps=40).run())
    first, last = (sum(r["loss"] for r in part) for part in (records[:8], records[-8:]))
    assert last < first


def test_weight_decay_shrinks_matrices_but_not_norms(tmp_path: Path) -> None:
    free, decayed = (trainer(tmp_path / name, steps=4, weight_decay=decay) for name, decay in (("free", 0.0), ("decayed", 0.5)))
    unread = 1  # a token that no text holds, so that only decay moves its row
    before = decayed.drafter.markov_head.markov_w1.weight[unread].clone()
    for each in (free, decayed):
        each.drafter.norm.weight.requires_grad_(False).grad = torch.zeros_like(each.drafter.norm.weight)
        list(each.run())
    shrunk = math.prod(1 - 0.5 * decayed.config.rate(step) for step in range(4))
    assert torch.allclose(decayed.drafter.markov_head.markov_w1.weight[unread], before * shrunk)
    assert torch.equal(free.drafter.markov_head.markov_w1.weight[unread], before)
    assert torch.equal(decayed.drafter.norm.weight, torch.ones_like(decayed.drafter.norm.weight))


def test_all_text_is_learnt_from_but_validation_stays_on_the_assistants_tokens() -> None:
    text = corpus()
    for shard_rows, held_out in ((9, 3), (4, 4), (12, 12)):
        taught = all_text(text, shard_rows)
        assert taught.assistant[: 12 - held_out].all()
        assert torch.equal(taught.assistant[12 - held_out :], text.assistant[12 - held_out :])
    assert not text.assistant.all()


def test_features_kept_for_fewer_of_the_tokens_are_refused(tmp_path: Path) -> None:
    target, text = tiny_target(), corpus()
    FeatureStore(target, text, (0, 2), tmp_path, shard_rows=4).shard(0)
    with pytest.raises(ValueError, match="learns from less of this text: choose another folder"):
        FeatureStore(target, all_text(text, 4), (0, 2), tmp_path, shard_rows=4).shard(0)


def test_a_training_resumed_twice_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    """Twice, because the second resume reads what a resumed training wrote."""
    whole = trainer(tmp_path / "whole")
    losses = [r["loss"] for r in whole.run()]
    found = []
    for part in (2, 3, 1):
        broken = trainer(tmp_path / "broken")  # a new process would start like this, from the last checkpoint
        assert broken.step == len(found)
        found += [record["loss"] for _, record in zip(range(part), broken.run(), strict=False)]
    assert found == losses
    for a, b in zip(whole.drafter.state_dict().values(), broken.drafter.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt here, whatever the test runner made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("method", "kept"), [("_loss", 3), ("optimizer", 4)])
def test_ctrl_c_during_a_step_keeps_every_finished_one(tmp_path: Path, interruptible: None, method: str, kept: int) -> None:
    """Before the update the step is lost, an update that has begun is finished."""
    run, whole = trainer(tmp_path / "a", steps=9), trainer(tmp_path / "b", steps=9)
    inside = run.optimizer.step if method == "optimizer" else run._loss

    def interrupted(*arguments: object) -> object:
        if run.step == 3:
            signal.raise_signal(signal.SIGINT)
        return inside(*arguments)

    owner, name = (run.optimizer, "step") if method == "optimizer" else (run, "_loss")
    setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(run.run())
    again = trainer(tmp_path / "a", steps=9)
    assert again.step == kept and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len([record for _, record in zip(range(kept), whole.run(), strict=False)]) == kept
    for a, b in zip(again.drafter.state_dict().values(), whole.drafter.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_target_that_changes_its_logits_after_the_head_is_refused() -> None:
    """Soft caps, scales and shifts are such changes; the loss computes the target's distribution from the head alone."""
    shape = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Gemma2Config(**shape, num_key_value_heads=2, head_dim=8, initializer_range=0.6, final_logit_softcapping=5.0)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="caps, scales or shifts"):
        FeatureStore(Target(Gemma2ForCausalLM(config), None, "capped"), corpus(), (0, 2))
    config.final_logit_softcapping = None
    FeatureStore(Target(Gemma2ForCausalLM(config), None, "plain"), corpus(), (0, 2))


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    steps = run.run()
    next(steps), next(steps), next(steps)
    with torch.no_grad():
        run.drafter.fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"fc\.weight"):
        run.save()
    with pytest.raises(ValueError, match="step 3"):
        next(steps)
    assert trainer(tmp_path).step == 2


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    list(trainer(tmp_path, steps=2).run())
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        trainer(tmp_path)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    list(trainer(tmp_path, steps=2).run())
    with pytest.raises(ValueError, match="seed"):
        trainer(tmp_path, steps=2, seed=1)
    assert trainer(tmp_path, steps=3).step == 2  # the length of the schedule may change on the way


def test_a_failed_write_keeps_the_last_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    steps = run.run()
    next(steps), next(steps), next(steps)  # the checkpoint of step 2 is on disk

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dspark.train.checkpoint.save_file", full)
    with pytest.raises(ValueError, match="No space left"):
        run.save()
    monkeypatch.undo()
    assert trainer(tmp_path).step == 2


def test_kept_features_of_other_text_or_taps_are_refused(tmp_path: Path) -> None:
    target, text = tiny_target(), corpus()
    kept = FeatureStore(target, text, (0, 2), tmp_path).shard(0)
    again = FeatureStore(target, text, (0, 2), tmp_path).shard(0)
    assert torch.equal(kept.taps, again.taps) and torch.equal(kept.logsumexp, again.logsumexp)
    for store in (FeatureStore(target, text, (0, 1), tmp_path), FeatureStore(tiny_target(seed=9), text, (0, 2), tmp_path)):
        with pytest.raises(ValueError, match="another folder"):
            store.shard(0)
    other = Corpus(text.token_ids.flip(0), text.assistant, text.temperature)
    with pytest.raises(ValueError, match="another folder"):
        FeatureStore(target, other, (0, 2), tmp_path).shard(0)


def test_the_draft_vocabulary_holds_the_frequent_tokens_and_the_end_of_text() -> None:
    text = Corpus(torch.tensor([[7, 7, 7, 8, 8, 9, 5, 5, 5, 5]]), torch.tensor([[True] * 6 + [False] * 4]), torch.ones(1))
    assert frequent_tokens(tiny_target(), text, 3).tolist() == [2, 7, 8]


@pytest.mark.parametrize("layers", range(1, 40))
def test_default_taps_are_different_layers_of_the_target(layers: int) -> None:
    taps = spread_taps(layers)
    assert list(taps) == sorted(set(taps)) and taps[-1] < layers - 1 and (0 <= taps[0] or (taps == (-1,) and layers == 1))
    assert len(taps) == min(5, max(layers - 2, 1))


def test_the_mask_token_is_not_in_the_corpus_and_special_if_possible() -> None:
    added = {token: SimpleNamespace(special=token != 4) for token in range(8)}
    tokenizer = SimpleNamespace(added_tokens_decoder=added, bos_token_id=5)
    target = SimpleNamespace(name="t", vocab_size=12, eos_token_ids=frozenset([2, 11]), tokenizer=tokenizer)
    text = SimpleNamespace(token_ids=torch.tensor([[0, 1], [3, 9]]))
    assert unused_token(target, text) == 6
    assert unused_token(target, SimpleNamespace(token_ids=torch.arange(8))) == 10
    target.tokenizer = None
    assert unused_token(target, text) == 10
    with pytest.raises(ValueError, match="--mask-token"):
        unused_token(target, SimpleNamespace(token_ids=torch.arange(12)))


@pytest.mark.parametrize(
    ("command", "device", "faster", "dtype"),
    [
        ("drafter", "cpu", True, "bfloat16"),
        ("drafter", "cpu", False, "float32"),
        ("compare", "cpu", False, "float32"),
        ("corpus", "cpu", False, "bfloat16"),  # sampled from packed weights
        ("drafter", "cuda", False, "bfloat16"),
    ],
)
def test_training_takes_the_dtype_that_is_faster_on_a_cpu(
    command: str, device: str, faster: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dspark.train.__main__, "bfloat16_is_faster", lambda: faster)
    assert dspark.train.__main__.usual_dtype(command, device) == dtype


def test_a_corpus_that_is_all_held_out_is_refused_with_its_size(tmp_path: Path) -> None:
    target = tiny_target()
    store = FeatureStore(target, corpus(rows=3), (0, 2), shard_rows=4)
    with pytest.raises(ValueError, match=r"3 rows, and the last 4 are held out.*make more rows"):
        Trainer(target, tiny_drafter(target), store, TrainConfig(steps=1), tmp_path)
