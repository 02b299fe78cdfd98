"""A file is written whole or not at all, in place of the old one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import full_disk

from dspark.files import digest, file_sha256, is_hub_id, one_line, write_atomically


def test_a_file_is_written_by_its_bytes_or_by_a_function_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, b"bytes")
    assert path.read_bytes() == b"bytes"
    write_atomically(path, lambda part: part.write_text("text"))
    assert path.read_bytes() == b"text" and list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with full_disk(), pytest.raises(ValueError, match=f"^cannot write {path}: .*Make room") as caught:
        write_atomically(path, bytes(10_000))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted(part: Path) -> None:
        part.write_bytes(b"new")
        raise error

    write_atomically(tmp_path / "file", b"old")
    with pytest.raises(error):
        write_atomically(tmp_path / "file", interrupted)
    assert (tmp_path / "file").read_bytes() == b"old" and list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot write {tmp_path}"):
        write_atomically(tmp_path, b"content")


def test_digests_are_those_of_all_parts_in_order(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"abc")
    assert digest("a", b"bc") == digest("abc") == file_sha256(tmp_path / "file")[:16]
    assert digest("acb") != digest("abc")


@pytest.mark.parametrize(("name", "is_id"), [("org/name", True), ("name", False), ("./name", False), ("~/name", False), ("/a", False)])
def test_a_hub_id_is_never_a_path(name: str, is_id: bool) -> None:
    assert is_hub_id(name) is is_id


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    assert one_line(KeyError()) == "KeyError" and one_line(OSError("\none\ntwo")) == "one"
