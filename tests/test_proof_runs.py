"""A proof's parts run side by side, and their results are kept exactly as long as what they read stays the same."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from dspark.bench.results import Ledger, configuration_of, discard
from dspark.proof import __main__ as command
from dspark.proof import crossed, enumeration, inputs, killed, planted, sampled, texts
from dspark.proof.branches import enumerate_joined, enumerate_law
from dspark.proof.cases import Case, few_cases, large_cases, served, small_target
from dspark.proof.enumeration import contents
from dspark.proof.workers import side_by_side
from dspark.verify.sampling import Chance

# ---- side by side


def squared(number: int) -> tuple[int, int, int]:
    time.sleep(0.1)
    return number**2, os.getpid(), torch.get_num_threads()


def failed(number: int) -> int:
    raise ValueError(f"piece {number} is bad")


def test_pieces_run_in_other_processes_with_one_thread_each_and_none_is_lost() -> None:
    found = dict(side_by_side(squared, range(6), 2))
    assert {piece: square for piece, (square, _, _) in found.items()} == {n: n * n for n in range(6)}
    assert os.getpid() not in {process for _, process, _ in found.values()}
    assert {threads for _, _, threads in found.values()} == {1}


def test_one_process_is_this_one_and_keeps_the_order() -> None:
    found = list(side_by_side(squared, [3, 1, 2], 1))
    assert [piece for piece, _ in found] == [3, 1, 2]
    assert {process for _, (_, process, _) in found} == {os.getpid()}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_piece_that_fails_ends_the_rest(processes: int) -> None:
    with pytest.raises(ValueError, match="is bad"):
        list(side_by_side(failed, [1, 2], processes))


# ---- joined branches


@pytest.mark.parametrize("case", few_cases()[::3], ids=lambda case: case.name)
def test_joined_branches_give_the_law_and_the_leaves_of_all_of_them(case: Case) -> None:
    joined, walked = enumeration.prove_joined(case), enumeration.prove(case)
    assert joined.law == walked.law == joined.expected
    assert joined.branches == walked.branches
    assert sum(joined.trips.values()) <= sum(walked.trips.values())


def test_states_that_hide_what_decides_bend_the_law_and_whole_states_do_not() -> None:
    """Three coins; what the last shows is the first's. A state that forgets the first coin joins what must stay apart."""
    half = Fraction(1, 2)

    def coins(chance: Chance, forget: bool) -> Iterator[tuple[list[int], Hashable]]:
        first = int(chance.accepts(half, Fraction(1)))
        second = int(chance.accepts(half, Fraction(1)))
        yield [second], second if forget else (first, second)
        yield [second, first], "end" if forget else ("end", first, second)

    law, leaves = enumerate_law(lambda chance: list(coins(chance, False))[-1][0])
    assert enumerate_joined(lambda chance: coins(chance, False)) == (law, leaves) == ({(s, f): half**2 for s in (0, 1) for f in (0, 1)}, 4)
    assert enumerate_joined(lambda chance: coins(chance, True))[0] != law


def test_the_contents_of_a_cache_are_its_valid_rows_to_the_last_bit() -> None:
    target = small_target(2, False)
    one, two = target.new_cache(), target.new_cache()
    target.forward(torch.tensor([[0, 1, 0]]), one)
    target.forward(torch.tensor([[0, 1, 0, 1]]), two)
    assert list(contents(one)) != list(contents(two))
    one.rewind(2)
    two.rewind(2)
    assert [type(piece) for piece in contents(one)] == [type(piece) for piece in contents(two)]
    before = list(contents(one))
    with torch.inference_mode():
        one.layers[0].kv.keys[0, 0, 1, 0] *= 1 + 1e-15
    assert list(contents(one)) != before
    with pytest.raises(TypeError, match="cannot be compared"):
        list(contents(object()))


def test_every_policy_has_a_tree_that_only_joining_can_walk() -> None:
    assert {case.policy for case in large_cases()} == set(served(4))
    assert {case.vocab for case in large_cases()} >= {5} and {case.block_size for case in large_cases()} == {4}


# ---- what a proof has read


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package whose module a imports b at its top and c within a function; d stands alone."""
    folder = tmp_path / "small"
    (folder / "part").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "part" / "__init__.py").write_text("import json\n")
    (folder / "a.py").write_text("from small.part import b\n\ndef f():\n    import small.c\n")
    for name in ("part/b", "c", "d"):
        (folder / f"{name}.py").write_text("x = 1\n")
    monkeypatch.setattr(inputs, "PACKAGE", folder)
    return folder


@pytest.mark.parametrize(("file", "counts"), [("a", True), ("part/b", True), ("part/__init__", True), ("c", True), ("d", False)])
def test_the_digest_changes_with_every_source_that_is_imported_and_no_other(package: Path, file: str, counts: bool) -> None:
    before = inputs.digest(["small.a"])
    (package / f"{file}.py").write_text("import small.part.b, small.c\nx = 2\n")
    assert (inputs.digest(["small.a"]) != before) == counts


@pytest.mark.parametrize(
    ("source", "counts"),
    [
        ('"""New words."""\nx = 1  # and a remark\n', False),
        ('def f():\n    """Says nothing to Python."""\n    "nor does this"\n\n\nx = 1\n', True),
        ('x = "1"\n', True),
    ],
)
def test_the_digest_does_not_change_with_words_for_people(package: Path, source: str, counts: bool) -> None:
    before = inputs.digest(["small.a"])
    (package / "c.py").write_text(source)
    assert (inputs.digest(["small.a"]) != before) == counts


def test_the_digest_changes_with_files_and_versions(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    before = inputs.digest(["small.a"], [file])
    file.write_bytes(b"2")
    after = inputs.digest(["small.a"], [file])
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert len({before, after, inputs.digest(["small.a"], [file])}) == 3


def test_every_part_counts_the_rule_the_loop_and_itself_and_no_picture() -> None:
    for part in (enumeration, crossed, texts, sampled):
        names = {str(path.relative_to(inputs.PACKAGE)) for path in inputs.sources([part.__name__])}
        assert names >= {"verify.py", "decode.py", "rewind.py", "sampling.py", "schedule.py", "target.py", "draft.py"}
        assert f"proof/{Path(part.__file__).name}" in names and not any(name.startswith("lab/") for name in names)
    assert {path.suffix for path in inputs.shipped_files()} >= {".jsonl", ".safetensors"}
    assert len({part.inputs() for part in (enumeration, killed, planted, crossed, texts, sampled)}) == 6


# ---- kept or thrown away


@dataclass
class Part:
    """A part that counts how often it ran."""

    digest: str = "one"
    runs: int = 0

    def inputs(self) -> str:
        return self.digest

    def run(self, out: Path, smoke: bool) -> pd.DataFrame:
        self.runs += 1
        ledger = Ledger(out, {"inputs": self.digest})
        ledger.add("unit", [{"difference": 0.0, "revision": "abc", "inputs": self.digest}])
        return ledger.finish()

    def table(self, frame: pd.DataFrame) -> str:
        return "table"


def test_a_result_is_kept_while_its_inputs_are_the_same_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = Part()
    monkeypatch.setattr(command, "importlib", SimpleNamespace(import_module=lambda name: part))
    for digest, runs, kept in (("one", 1, False), ("one", 1, True), ("two", 2, False), ("two", 2, True), ("one", 3, False)):
        part.digest = digest
        assert command.prove("enumeration", tmp_path)
        assert part.runs == runs
        assert ("kept from abc" in capsys.readouterr().out) == kept
    assert configuration_of(tmp_path / "proof-enumeration.parquet") == {"inputs": "one"}


def test_what_a_killed_run_of_other_inputs_left_is_thrown_away_and_of_the_same_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, out = Part(), tmp_path / "proof-enumeration.parquet"
    monkeypatch.setattr(command, "importlib", SimpleNamespace(import_module=lambda name: part))
    Ledger(out, {"inputs": "other"}).add("old", [{"difference": 1.0, "revision": "abc", "inputs": "other"}])
    assert command.prove("enumeration", tmp_path)
    discard(out)
    Ledger(out, {"inputs": "one"}).add("old", [{"difference": 1.0, "revision": "abc", "inputs": "one"}])
    assert not command.prove("enumeration", tmp_path)
