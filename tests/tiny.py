"""What the tests share: the tiny random models of the proof, a disk without room, and a run that is cut off."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from dspark.bench.results import Ledger
from dspark.proof.tiny import tiny_drafter, tiny_target

__all__ = ["full_disk", "interrupted", "tiny_drafter", "tiny_target"]


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


def interrupted(run: Callable[[], object], after: int) -> list[str]:
    """Ctrl-C in a run that keeps a ledger, once it has finished so many pieces. Returns their keys."""
    keep, kept = Ledger.add, []

    def add(self: Ledger, key: str, rows: list) -> None:
        if len(kept) == after:
            raise KeyboardInterrupt
        kept.append(key)
        keep(self, key, rows)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Ledger, "add", add)
        run()
    return kept
