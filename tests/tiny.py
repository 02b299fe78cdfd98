"""What the tests share: the tiny random models of the proof, and a disk without room."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from dspark.proof.tiny import tiny_drafter, tiny_target

__all__ = ["full_disk", "tiny_drafter", "tiny_target"]


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
