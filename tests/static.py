"""Targets whose pass runs on static buffers, and what stands for CUDA graphs where there are none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny import tiny_target
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dspark.target.target import Target
from dspark.verify.graphs import Program
from dspark.verify.static import static_pass

WAITS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique"}


class NoWaiting(TorchFunctionMode):
    """Inside it, whatever would make the host wait for a GPU raises."""

    def __torch_function__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if function.__name__ in WAITS:
            raise AssertionError(f"{function.__name__} waits for the device")
        return function(*args, **(kwargs or {}))


def pretended_graphs() -> Callable[[Program], tuple[Program, int]]:
    """Runs what was captured, as a graph would: always the first program of its key, and a replay ruins the results of the one before."""
    alive: list[Tensor] = []

    def capture(program: Program) -> tuple[Program, int]:
        def replay() -> object:
            for tensor in alive:
                tensor.copy_(torch.full_like(tensor, -torch.inf if tensor.is_floating_point() else -7))
            alive.clear()
            with NoWaiting():
                results = program()
            parts = results if isinstance(results, tuple) else (results,)
            alive.extend(part for part in parts if isinstance(part, Tensor))
            return results

        return replay, 1

    return capture


def static_target(**config: object) -> Target:
    """As :func:`tiny.tiny_target`."""
    target = tiny_target(**config)
    target.verifier = static_pass(target, pretended_graphs)
    return target
