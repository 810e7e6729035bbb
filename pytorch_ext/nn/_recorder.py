"""Who captures an encoder's layers in a graph."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Uncapturable(Exception):
    """What was to be recorded cannot be; the message says why."""


class Recorder(Protocol):
    """Records work, to repeat it on the same tensors; made for one device and one encoder."""

    def __init__(self, device: torch.device): ...

    @staticmethod
    def why_not(x: Tensor) -> str | None:
        """Why nothing can be recorded or repeated for a batch now; None if it can."""

    def turn(self) -> contextlib.AbstractContextManager:
        """What is asked for inside begins when all is over that was asked for in the turns before."""

    def record(self, work: Callable[..., Tensor], *inputs: Any) -> tuple[Tensor, Callable[[], None]]:
        """The tensor that ``work(*inputs)`` gives, and what computes it anew from what the inputs then hold.

        Raises:
            Uncapturable: ``work`` does what cannot be repeated so, and what it does has come to nothing.
        """

    def finish(self) -> None:
        """Waits until all turns are over, before what they work on is let go."""


class CudaRecorder:
    """By ``torch.cuda.CUDAGraph``, in one pool: what a graph computes on the way may lie where that of another lies."""

    def __init__(self, device: torch.device):
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
            self._over = torch.cuda.Event()

    @staticmethod
    def why_not(x: Tensor) -> str | None:
        if not x.is_cuda:
            return f"the batch is on {x.device.type}"
        return "another one is being captured" if torch.cuda.is_current_stream_capturing() else None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._over)
            try:
                yield
            finally:
                self._over.record(stream)

    def record(self, work: Callable[..., Tensor], *inputs: Any) -> tuple[Tensor, Callable[[], None]]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Whatever happens at first use alone, such as compiling and tuning, cannot happen in a capture.
            work(*inputs)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating memory meanwhile.
        how = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            # A capture that fails would leave its stream the current one.
            with torch.cuda.stream(current), torch.cuda.graph(graph, **how):
                out = work(*inputs)
        except RuntimeError as error:
            raise Uncapturable(str(error).partition("\n")[0]) from error
        return out, graph.replay

    def finish(self) -> None:
        self._over.synchronize()
