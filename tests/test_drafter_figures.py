"""Figures of drafters: pure functions of rows, and of known text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import HEADS, dense, tiny_drafter, tiny_target

from dspark.bench import published
from dspark.bench.results import write_results
from dspark.draft.eagle import EagleDrafter
from dspark.lab import drafters
from dspark.verify.sampling import Rng, Sampling

EAGLE = {"kind": EagleDrafter, "num_hidden_layers": 1, "markov_rank": 0}
ARMS = {"dspark": (2.0, 2, 5), "dflash": (1.6, 2, 5), "eagle": (1.5, 1, 5), "dspark-block8": (2.2, 2, 8), "dflash-layers4": (1.7, 4, 5)}


def rows(split: str = "test") -> pd.DataFrame:
    """Two domains of three prompts for each drafter; all rounds are alike."""
    return pd.DataFrame(
        {
            **{"arm": arm, "drafter": arm, "domain": domain, "prompt_id": f"{domain}/{i}", "rounds": 10, "decoded_tokens": 10 * tau + i},
            **{"drafter_layers": layers, "drafter_block_size": block, "reached_at": [10, 8, 4], "accepted_at": [8, 4, 1]},
            **{
                "split": split,
                "n": 3,
                "max_new_tokens": 64,
                "target_digest": "t",
                "dtype": "float32",
                "seed": 0,
                "temperature": 1.0,
                "schema_version": 1,
            },
        }
        for arm, (tau, layers, block) in ARMS.items()
        for domain in ("code", "math")
        for i in range(3)
    )


# ---- the bias on real tokens


@pytest.mark.parametrize("head", [head for head in HEADS if "markov_rank" not in head], ids=str)
def test_a_known_block_is_the_block_that_drafting_makes(head: dict[str, object]) -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, **head, d2t=torch.arange(2, 90))
    text = torch.randint(4, 90, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    state = drafter.new_state(text[:5])
    drafter.extend(state, text[:5], target.forward(torch.tensor([text[:5]]), None, drafter.target_layer_ids)[1])
    draft = drafter.draft(state, text[5], 4, Sampling(1.0), Rng(torch.Generator().manual_seed(0)))
    biased, base, _ = drafters.known_blocks(target, drafter, [*text[:6], *draft.tokens], torch.tensor([5]))
    assert torch.allclose(dense(draft)[:, drafter.d2t], biased[0], atol=1e-5)
    assert not torch.allclose(base, biased, atol=1e-2)
    other = drafters.known_blocks(target, drafter, [*text[:6], 50, 51, 52, 53], torch.tensor([5]))
    assert torch.allclose(base, other[1], atol=1e-6) and not torch.allclose(biased, other[0], atol=1e-2)


def test_a_known_block_is_the_same_alone_and_among_others() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target)
    text = torch.randint(4, 90, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    together = drafters.known_blocks(target, drafter, text, torch.arange(3, 20))
    for i in (0, 9, 16):
        alone = drafters.known_blocks(target, drafter, text, torch.tensor([3 + i]))
        assert all(torch.allclose(one[0], all_of_them[i], atol=1e-4) for one, all_of_them in zip(alone, together, strict=True))


def test_the_figure_of_a_slot_shows_the_block_of_its_anchor() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target)
    text = list(range(10, 24))
    biased, base = drafters.known_text_acceptance(target, drafter, text, first=4)
    assert biased.shape == base.shape == (7, 4)
    figure = drafters.bias_figure(target, drafter, text, at=6, slot=2, top=4)
    assert "after “17”" in figure.get_suptitle()
    assert f"{base[2, 1]:.0%} accepted without the bias, {biased[2, 1]:.0%} with it" in figure.get_suptitle()
    assert [len(bars) for bars in figure.axes[0].containers] == [4, 4, 4]
    with pytest.raises(ValueError, match="slot 9"):
        drafters.bias_figure(target, drafter, text, at=6, slot=9)
    for at in (0, 11):
        with pytest.raises(ValueError, match=str(at)):
            drafters.bias_figure(target, drafter, text, at=at, slot=1)


def test_a_drafter_without_a_markov_head_is_the_same_with_and_without_its_bias() -> None:
    target = tiny_target()
    for drafter in (tiny_drafter(target, markov_rank=0), tiny_drafter(target, **EAGLE)):
        biased, base = drafters.known_text_acceptance(target, drafter, list(range(10, 24)), first=4)
        assert np.array_equal(biased, base) and ((0 < biased) & (biased <= 1)).all()


# ---- measured rows


def test_files_are_read_together_only_if_measured_alike(tmp_path: Path) -> None:
    frame = rows()
    assert drafters.read_drafters(tmp_path, 1.0).empty
    for arm, part in frame.groupby("arm"):
        write_results(part.drop(columns="arm"), tmp_path / f"drafters-t1-{arm}.parquet")
    assert set(drafters.read_drafters(tmp_path, 1.0)["arm"]) == set(ARMS) and drafters.read_drafters(tmp_path, 0.0).empty
    write_results(rows("dev").query("arm == 'eagle'").drop(columns="arm"), tmp_path / "drafters-t1-eagle.parquet")
    with pytest.raises(ValueError, match="split"):
        drafters.read_drafters(tmp_path, 1.0)


def test_a_missing_results_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder .*elsewhere: leave results empty"):
        drafters.read_drafters(tmp_path / "elsewhere", 1.0)


def test_the_gain_of_the_reference_comes_with_an_interval_over_prompts() -> None:
    gains = drafters.tau_gains(rows()).set_index("drafter")
    assert gains.loc["dspark", "code"] == pytest.approx(2.1) and gains.loc["dflash", "mean"] == pytest.approx(1.7)
    low, gain, high = gains.loc["dflash", ["low", "gain", "high"]]
    assert gain == pytest.approx(2.1 / 1.7 - 1) and low <= gain <= high and gains.loc["dspark", "gain"] == 0


def test_positions_are_pooled_by_their_counts_and_drawn_per_drafter() -> None:
    positions = drafters.pooled_positions(rows(), ["dspark", "dflash", "eagle"])
    assert set(positions["drafter"]) == {"dspark", "dflash", "eagle"}
    first = positions[positions["drafter"] == "dspark"]
    assert first["n"].tolist() == [60, 48, 24] and first["acceptance"].tolist() == [0.8, 0.5, 0.25]
    of_few = pd.DataFrame({"drafter": "dspark", "position": [1, 2], "n": 2, "acceptance": [0.1, 0.9], "error": 0.4})
    bars = drafters.acceptance_figure(of_few, "a test").axes[0].collections[0].get_segments()
    assert np.array(bars)[:, :, 1] == pytest.approx(np.array([[0, 0.5], [0.5, 1]]))
    assert first["error"].iloc[1] == pytest.approx(1.959964 * (0.25 / 48) ** 0.5)
    figure = drafters.acceptance_figure(positions, "n = 6 prompts")
    lines = figure.axes[0].lines
    assert [(line.get_label(), line.get_color(), line.get_linestyle()) for line in lines] == list(drafters.LOOKS.values())
    assert "n = 6 prompts" in figure.get_supxlabel() and "DSpark 80% → 25%" in " ".join(figure.get_suptitle().split())


def trained() -> pd.DataFrame:
    """Training records of five drafters and of another head."""
    shapes = [(name, layers, block, tau) for name, (tau, layers, block) in ARMS.items()] + [("gated", 2, 5, 2.05)]
    return pd.DataFrame(shapes, columns=["drafter", "layers", "block_size", "held_out_tau"]).assign(steps=9, machine="a machine")


def test_depth_and_block_size_are_compared_at_the_base_of_the_other() -> None:
    by_layers, by_block = (drafters.size_figure(trained(), field).axes[0].lines for field in ("layers", "block_size"))
    assert [list(line.get_xdata()) for line in by_layers] == [[2], [2, 4]]
    assert [list(line.get_xdata()) for line in by_block] == [[5, 8], [5]]
    assert list(by_block[0].get_ydata()) == [2.0, 2.2]
    with pytest.raises(ValueError, match="--only dspark"):
        drafters.size_figure(trained().query("drafter != 'dspark'"), "layers")


def test_the_published_gain_is_that_of_the_published_numbers() -> None:
    assert f"{published.gain('dflash'):+.0%}" == "+16%" and published.TAU["Qwen3-4B", "DSpark"][6] == 3.64


def test_training_curves_grow_with_the_records() -> None:
    held = {"loss": 2.0, "tau": 1.2, "acceptance": [0.3, 0.2]}
    records = [{"step": 1, "loss": 3.0, "tau": 1.1}, {"step": 2, "loss": 2.5, "tau": 1.2, "held_out": held}]
    begun, later = (drafters.training_curves(records[:n], steps=9) for n in (1, 2))
    names = [{line.get_label() for panel in figure.axes for line in panel.lines} for figure in (begun, later)]
    assert names == [{"training batch"}, {"training batch", "held-out rows", "position 1", "position 2"}]
    losses = {line.get_label(): list(line.get_ydata()) for line in later.axes[0].lines}
    assert losses == {"training batch": [3.0, 2.5], "held-out rows": [2.0]} and "n = 2 of 9 steps" in later.get_supxlabel()
