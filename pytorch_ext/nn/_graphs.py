"""CUDA graphs of an encoder's layers over tokens without padding: one for each size of batch, captured once.

A replay launches the kernels of all layers at once, and no Python runs between them. It works on tensors that stay
where they are: a batch is copied in, its result out. A batch that is smaller than its graph is filled up by sequences
of tokens that are nobody's (:func:`ends`), so that what stands there can be attended by nothing that is read.
"""

import threading
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..backends import requested
from ._padding import Packed, add_note
from ._parts import Parts
from ._recorder import Recorder, Uncapturable

LEAST = 16  # tokens of a graph, and of its longest sequence
MOST_TOKENS = 8192  # the more there are, the less of the time goes to launching
MOST_GRAPHS = 64  # of one encoder: each takes memory, and time to capture

Layers = Callable[[Tensor, Packed], Tensor]


class Size(NamedTuple):
    """Of a graph: batches of up to so many tokens in up to so many sequences of up to so many tokens."""

    tokens: int
    sequences: int
    longest: int


def size_for(lengths: list[int]) -> Size:
    """The size of the graph that runs sequences of these lengths: at most an eighth more tokens, from 64 on.

    There are sequences enough for the tokens that fill it up, none longer than ``longest``.
    """
    total = sum(lengths)
    step = max(_power_of_two(total) // 16, 8)
    tokens = max(-(-total // step) * step, LEAST)
    longest = max(_power_of_two(max(lengths)), LEAST)
    fillers = -(-(tokens - total) // longest)
    return Size(tokens, _power_of_two(len(lengths) + fillers), longest)


def ends(lengths: list[int], size: Size) -> list[int]:
    """The ``cu_seqlens`` of sequences of these lengths in a graph, whose other tokens are shared out evenly."""
    found = [0, *accumulate(lengths)]
    total, others = found[-1], size.sequences - len(lengths)
    rest = size.tokens - total
    return found + [total + rest * i // others for i in range(1, others + 1)]


class Filled(Packed):
    """Where the sequences of a graph are: another place in each replay, so nothing can be padded in one."""

    def unpad(self, x: Tensor) -> Tensor:
        raise Uncapturable("a layer has to see the padded batch")

    pad = attended = unpad

    def gapless(self) -> bool:
        raise Uncapturable("a layer asks how far apart tokens were")


class _Graph(NamedTuple):
    x: Tensor
    cu_seqlens: Tensor
    out: Tensor
    replay: Callable[[], None]


class Graphs:
    """The graphs of one encoder, in one pool of memory.

    They share that memory, so threads take turns: one has the graphs until it has asked for its replay and for the copy
    of its result. On the device the streams they come from take turns too. Weights that change in place are seen, for a
    graph reads them where they are; whatever else changes (:class:`Parts`) drops all graphs.
    """

    def __init__(self, encoder: nn.Module, device: torch.device, recorder: type[Recorder]):
        self.device = device
        self._recorder = recorder(device)
        self._lock = threading.Lock()
        self._parts = Parts(encoder)
        self._graphs: dict[tuple, _Graph | str] = {}

    def run(
        self,
        encoder: nn.Module,
        layers: Layers,
        x: Tensor,
        lengths: list[int],
        read: Callable[[Tensor], Tensor],
        settings: tuple,
    ) -> Tensor | str:
        """``read(layers(x, where the sequences are))`` by a graph, or why there is none for it.

        Args:
            x: ``(total_tokens, hidden)``, sequences of these lengths end to end.
            read: makes a result of tokens that the next replay overwrites.
            settings: what a graph would not see that it has changed.
        """
        with self._lock:
            if not self._parts.unchanged():
                self._drop()
                self._parts = Parts(encoder)
            if torch.is_grad_enabled() and (x.requires_grad or self._parts.need_grad()):
                return "gradients are enabled"
            if self._parts.hindrance is not None:
                return self._parts.hindrance
            size = size_for(lengths)
            if size.tokens > MOST_TOKENS:
                return f"of {size.tokens} tokens, and the largest has {MOST_TOKENS}"
            with self._recorder.turn():
                graph = self._graph((size, x.dtype, *x.shape[1:], *settings), size, layers, x)
                if isinstance(graph, str):
                    return graph
                graph.x[: x.shape[0]].copy_(x)
                graph.cu_seqlens.copy_(
                    torch.tensor(ends(lengths, size), dtype=torch.int32), non_blocking=True
                )
                graph.replay()
                return read(graph.out[: x.shape[0]])

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._recorder.finish()
        self._graphs.clear()

    def _graph(self, key: tuple, size: Size, layers: Layers, x: Tensor) -> _Graph | str:
        found = self._graphs.get(key)
        if found is None:
            if len(self._graphs) >= MOST_GRAPHS:
                return f"{MOST_GRAPHS} of other sizes are there already"
            found = self._graphs[key] = self._captured(size, layers, x)
        return found

    def _captured(self, size: Size, layers: Layers, x: Tensor) -> _Graph | str:
        # Ordinary tensors, which may be written to in every mode that a later call comes in.
        with torch.inference_mode(False), torch.no_grad(), _without_autocast_cache(x):
            tokens = x.new_zeros(size.tokens, *x.shape[1:])
            cu_seqlens = torch.tensor(ends([], size), dtype=torch.int32, device=x.device)
            where = Filled(None, None, cu_seqlens, size.longest)
            try:
                out, replay = self._recorder.record(layers, tokens, where)
            except Uncapturable as reason:
                return str(reason)
            return _Graph(tokens, cu_seqlens, out, replay)


_of_encoders: WeakKeyDictionary[nn.Module, Graphs] = WeakKeyDictionary()
_making = threading.Lock()


def replayed(
    encoder: nn.Module,
    recorder: type[Recorder] | None,
    layers: Layers,
    x: Tensor,
    packed: Packed | None,
    handed_down: dict[str, Any] | None = None,
) -> Tensor | None:
    """What an encoder's layers give for a batch, by a graph; None where there is none for it.

    Args:
        recorder: as ``optimize`` was told; None for no graphs.
        layers: takes tokens ``(total_tokens, hidden)`` and where their sequences are.
        x: ``(total_tokens, hidden)`` beside ``packed``; else ``(batch, seqlen, hidden)`` that needs no mask.
        handed_down: what the layers get besides.

    Returns:
        ``(batch, seqlen, hidden)``, zero at padding, in memory of its own.
    """
    if recorder is None or torch.compiler.is_compiling():
        return None
    result = _looks_on(x) or recorder.why_not(x) or _handed_tensors(handed_down or {})
    if result is None:
        lengths, read = _layout(x, packed)
        if lengths is None or sum(lengths) == 0:
            result = "there are no tokens, or it is not known where"
        else:
            with _making:
                graphs = _of_encoders.get(encoder)
                if graphs is None or graphs.device != x.device:
                    forget(encoder)
                    graphs = _of_encoders[encoder] = Graphs(encoder, x.device, recorder)
            tokens = x.flatten(0, 1) if packed is None else x
            settings = (*_settings(x), *sorted((handed_down or {}).items()))
            result = graphs.run(encoder, layers, tokens, lengths, read, settings)
    if isinstance(result, str):
        add_note(encoder, f"no CUDA graph: {result}")
        return None
    add_note(encoder, "by a CUDA graph")
    return result


def forget(encoder: nn.Module) -> None:
    graphs = _of_encoders.pop(encoder, None)
    if graphs is not None:
        graphs.close()


def _layout(x: Tensor, packed: Packed | None) -> tuple[list[int] | None, Callable[[Tensor], Tensor]]:
    if packed is not None:
        return packed.lengths, packed.pad
    shape = x.shape
    return [shape[1]] * shape[0], lambda tokens: tokens.clone().view(shape)


def _looks_on(x: Tensor) -> str | None:
    looks_on = (
        type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
    return "something traces or transforms the call" if looks_on else None


def _handed_tensors(handed_down: dict[str, Any]) -> str | None:
    for name, value in handed_down.items():
        if not isinstance(value, bool | int | float | str | None):
            return f"the layers are handed {name}, which may be another in each call"
    return None


def _settings(x: Tensor) -> tuple:
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (
        requested(),
        autocast,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _without_autocast_cache(x: Tensor) -> torch.autocast:
    """As it is, but weights are cast within the graph: what a cache holds is gone when the caller's context is."""
    device = x.device.type
    return torch.autocast(
        device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
    )


def _power_of_two(n: int) -> int:
    """The least that is no less than ``n``."""
    return 1 << max(n - 1, 0).bit_length()
