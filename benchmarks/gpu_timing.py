"""Times on a GPU by its own clock, apart from the host's: with a cold L2, with a warm one, and as a CUDA graph replays.

Events are read after the last round, so no call waits for the one before it; a kernel in front of each timed call keeps
the GPU busy until the host has launched it. Inputs rotate among copies, and none are zeros. These figures say what
kernels take; what a user waits for is the host's wall-clock, which stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import timing

FLUSHED_BYTES = 256 << 20  # larger than the L2 of any GPU today
AHEAD_CYCLES = 200_000  # about 0.1 ms
COPIES = 4
COLD, WARM, GRAPH = "cold L2", "warm L2", "CUDA graph"
Call = Callable[[int], object]  # takes the number of the copy of its inputs


class Gpu:
    """What the timing asks of the device; tests have one with a clock of its own."""

    device = "cuda"

    def __init__(self) -> None:
        self._buffer = torch.empty(FLUSHED_BYTES // 4, device="cuda")

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def flush(self) -> None:
        """Fill the L2 with something else; takes longer than a launch."""
        self._buffer.normal_()

    def stall(self) -> None:
        torch.cuda._sleep(AHEAD_CYCLES)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def captured(self, call: Call) -> Call:
        """A graph of one call on each copy."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(0)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for copy in range(COPIES):
                call(copy)
        return lambda _: graph.replay()


def measure(calls: Mapping[str, Call], how: str, *, rounds: int, gpu: Any) -> timing.Timings:
    """Seconds of each contender, turn by turn; `how` is COLD, WARM or, for calls that `captured` made, GRAPH."""
    names = list(calls)
    pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for round_ in range(-1, rounds):  # the first one warms up
        for name in timing.balanced(names, max(round_, 0)):
            copy = round_ % COPIES
            if how == WARM:
                calls[name](copy)
            (gpu.flush if how == COLD else gpu.stall)()
            start, end = gpu.event(), gpu.event()
            start.record()
            calls[name](copy)
            end.record()
            if round_ >= 0:
                pairs[name].append((start, end))
    gpu.synchronize()
    each = 1e3 * (COPIES if how == GRAPH else 1)  # events tell milliseconds
    return timing.Timings({name: [a.elapsed_time(b) / each for a, b in own] for name, own in pairs.items()})
