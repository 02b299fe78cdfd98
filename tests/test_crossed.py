"""Tiny random models: every prompt with every policy at every block size gives the text of ``model.generate``."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from tiny import WINDOW, interrupted

from dspark.proof import __main__ as command
from dspark.proof import crossed
from dspark.proof.crossed import BLOCK_SIZES, PROMPTS, SITUATIONS, WAYS, Asked, Total, asked, every_piece, few_pieces
from dspark.rewind import FIRST_CAPACITY


def test_every_policy_and_block_size_gives_the_reference_text_in_every_situation_and_a_killed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "crossed.parquet"
    kept = interrupted(partial(crossed.run, out, smoke=True), after=3)
    then, compared = [], crossed.Piece.compared
    monkeypatch.setattr(crossed.Piece, "compared", lambda piece: then.append(piece.key) or compared(piece))
    frame = crossed.run(out, smoke=True)
    assert [*kept, *then] == [piece.key for piece in few_pieces()]
    assert len(frame) == len(few_pieces()) * len(WAYS) and not frame.duplicated(["situation", "policy", "block_size"]).any()
    assert command.PARTS["crossed"].holds(frame), crossed.table(frame)
    by_situation = crossed.summed(frame, "situation")
    assert by_situation.loc["end of text", "ended_inside"] > 0
    assert by_situation.loc["growing cache", "context"] > FIRST_CAPACITY
    assert by_situation.loc["window, eager":"window, sdpa", "context"].min() > 2 * WINDOW
    assert all(name in crossed.table(frame) for name in (*SITUATIONS, *WAYS))


def test_the_full_cross_leaves_nothing_out() -> None:
    assert sum(PROMPTS.values()) >= 100 and list(BLOCK_SIZES) == list(range(1, 9))
    assert {(piece.situation, piece.block_size) for piece in every_piece()} == set(product(SITUATIONS, BLOCK_SIZES))
    assert {piece.block_size for piece in few_pieces()} == set(BLOCK_SIZES)
    assert {piece.situation for piece in few_pieces()} == set(SITUATIONS)


def test_situations_are_what_they_are_called() -> None:
    for i in (0, 7):
        end, limit, turns = asked("end of text", i), asked("limit", i), asked("turns", i)
        assert end.text[-1] in end.target.eos_token_ids and len(end.text) < end.tokens
        assert not limit.target.eos_token_ids and len(limit.text) == 20 - i
        assert [message["role"] for message in turns.prompt][:3] == ["user", "assistant", "user"]
    assert asked("limit", 1).tokens > len(asked("limit", 1).text)  # the context's end came first
    for attention in ("eager", "sdpa"):
        config = asked(f"window, {attention}", 0).target.config
        assert config._attn_implementation == attention and config.sliding_window == WINDOW


@pytest.mark.parametrize(("equal", "accepted", "rejected"), [(1, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_a_text_apart_or_drafts_that_all_fared_alike_do_not_hold(equal: int, accepted: int, rejected: int) -> None:
    good = Total(prompts=2, equal=2, tokens=8, accepted=3, rejected=3).columns
    names = {"situation": "plain", "block_size": 3}
    rows = [names | {"policy": "fixed"} | good, names | {"policy": "mtp1"} | good]
    assert command.PARTS["crossed"].holds(pd.DataFrame(rows))
    rows[1] |= {"equal": equal, "accepted": accepted, "rejected": rejected}
    assert not command.PARTS["crossed"].holds(pd.DataFrame(rows))


def test_every_way_meets_every_source_of_drafts() -> None:
    prompt = asked("plain", 0)
    assert isinstance(prompt, Asked)
    for name, way in WAYS.items():
        if way.copies != "only":
            kinds = [prompt.source(way, 3, turn) for turn in range(3)]
            inner = [getattr(source, "drafter", source) for source in kinds]
            assert [type(source).__name__ for source in inner] == ["Wavering", "Wavering", "Drafter"], name
