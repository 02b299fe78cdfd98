"""What only a GPU can do, in one file: CUDA graphs of programs on static buffers, and copies that nobody waits for.

A pass over a few tokens is some hundred small kernels, and calling them one by one takes longer than running them. A CUDA graph calls
them all at once, but reads and writes the same addresses in the same shapes every time. Without graphs programs simply run.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dspark.files import one_line

log = logging.getLogger(__name__)

Program = Callable[[], Any]  # reads and writes static buffers alone, and gives the same when it is run twice
Capture = Callable[[Program], tuple[Program, int]]  # → what replays it, and the bytes of device memory that this takes
SHARE = 0.25  # of the free device memory that graphs may take


def to_host(x: Tensor) -> Tensor:
    """The one place where a static round waits for the device."""
    return x.cpu()


def cuda_graphs(device: torch.device) -> Capture:
    """Captures programs as CUDA graphs, which share their scratch memory: a result is good until the next one is replayed."""
    pool = torch.cuda.graph_pool_handle()

    def capture(program: Program) -> tuple[Program, int]:
        with torch.cuda.device(device):
            before, stream = torch.cuda.memory_reserved(device), torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):  # libraries allocate at their first call, which a graph must not record
                program()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                results = program()

        def replay(keep: Program = program) -> Any:  # the graph reads what the program refers to
            with torch.cuda.device(device):
                graph.replay()
            return results

        return replay, torch.cuda.memory_reserved(device) - before

    return capture


class Graphs:
    """Decides what is captured, for all engines of one target."""

    def __init__(self, new_capture: Callable[[], Capture] | None, memory: float = math.inf) -> None:
        self.new_capture = new_capture  # makes what captures the programs of one engine; None runs everything eagerly
        self.memory = memory  # bytes that graphs may still take; when they are used up, new buckets run eagerly

    def captured(self, capture: Capture | None, program: Program) -> Program:
        """What runs this program from now on: its graph, or the program itself."""
        if capture is None or self.new_capture is None or self.memory <= 0:
            return program
        try:
            replay, taken = capture(program)
        except RuntimeError as error:  # out of memory, or a driver that is too old
            self.new_capture = None
            log.warning("CUDA graphs are off, decoding goes on without them: %s", one_line(error))
            return program
        self.memory -= taken
        if self.memory <= 0:
            log.info("CUDA graphs have used up their memory: further shapes run eagerly")
        return replay


class Buffers:
    """What stays when an engine goes, so that the next one finds its graphs: keys and values, static inputs, programs."""

    def __init__(self, owner: object, layers: list[tuple[Tensor, ...]], graphs: Graphs) -> None:
        self.owner = owner  # whose programs run on them besides the target's (a draft source), None for nobody
        self.layers, self.graphs = layers, graphs  # as in dspark.rewind.SlotCache, the target's first
        self.device = layers[0][0].device
        self.capture = graphs.new_capture() if graphs.new_capture else None
        self.programs: dict[object, Program | None] = {}  # None after the first run, which is eager: what runs once is not worth a graph
        self.static: dict[object, Tensor] = {}
        self.sent: dict[object, torch.cuda.Event] = {}

    @property
    def capacity(self) -> int:
        """Positions of every slot; the last one is nobody's, padding is written there."""
        return self.layers[0][0].shape[2]

    def run(self, key: object, program: Program) -> Any:
        """The program's results. Programs with the same key do the same."""
        if key not in self.programs:
            self.programs[key] = None
            return program()
        if self.programs[key] is None:
            self.programs[key] = self.graphs.captured(self.capture, program)
        return self.programs[key]()

    def tensor(self, key: object, shape: Sequence[int], dtype: torch.dtype, device: object = None) -> Tensor:
        """The static buffer of this name, zeros at first."""
        if key not in self.static:
            where = {"device": self.device} if device is None else {"pin_memory": self.device.type == "cuda"}
            self.static[key] = torch.zeros(*shape, dtype=dtype, **where)
        return self.static[key]

    def upload(self, key: object, numbers: Sequence[Sequence[float]], dtype: torch.dtype = torch.int64) -> Tensor:
        """Fill the static buffer of this name from the host, without waiting. numbers: [rows, columns]."""
        shape = len(numbers), len(numbers[0])
        host, there = self.tensor((key, "host"), shape, dtype, "host"), self.tensor(key, shape, dtype)
        if self.device.type == "cuda":
            event = self.sent.setdefault(key, torch.cuda.Event())
            event.synchronize()  # the copy before this one, which was done long ago
        host.copy_(torch.tensor(numbers, dtype=dtype))
        there.copy_(host, non_blocking=True)
        if self.device.type == "cuda":
            event.record(torch.cuda.current_stream(self.device))
        return there
