"""One call of a model, watched: a histogram of what each module returns, and the weights of each attention.

Shapes: B batch, H heads, L queries, S keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ._inputs import Inputs
from ._trace import inference, run
from ._values import Values, values

_aten = torch.ops.aten
_SOFTMAX = {_aten._softmax.default, _aten._safe_softmax.default}
_PRODUCT = {_aten.bmm.default}
# What may stand between the softmax and the product: casts, copies, masks, a dropout that does nothing.
_ON_THE_WAY = {
    _aten._to_copy.default,
    _aten.clone.default,
    _aten.masked_fill.Scalar,
    _aten.mul.Tensor,
    _aten.nan_to_num.default,
    _aten.where.self,
}
_SILENT = (nn.Dropout, nn.Identity)  # in inference they return what came


@dataclass
class Observed:
    """Attributes:
    activations: what each module without children returned, in the order of the calls.
    attention: for each attention its module's name and, for the first sequence, ``(H, L, S)``.
    """

    activations: list[Values] = field(default_factory=list)
    attention: list[tuple[str, Tensor]] = field(default_factory=list)


def observe(model: nn.Module, inputs: Inputs) -> Observed:
    """Calls ``model`` once, for inference.

    Attention weights are the result of a softmax over the last of at least three dimensions which is then multiplied
    with something, so any way to write attention is seen. What PyTorch would run as one kernel runs as its formula,
    and for a kernel of ours the formula is worked out beside it, from the same queries and keys.

    Raises:
        ExportError: the call fails.
    """
    found = Observed()
    running: list[tuple[str, nn.Module]] = []
    batch = inputs.tensors[0].shape[0] if inputs.tensors[0].dim() else 1

    def attended(weights: Tensor) -> None:
        name, module = running[-1] if running else ("", model)
        found.attention.append((name, _first_sequence(weights, batch, module)))

    with inference(model), _hooks(model, running, found), _formula(), _Softmax(attended):
        run(model, inputs)
    return found


def _first_sequence(weights: Tensor, batch: int, module: nn.Module) -> Tensor:
    if weights.dim() == 3:  # (B · H, L, S)
        heads = getattr(module, "num_heads", None) or weights.shape[0] // max(batch, 1)
        weights = weights[: heads or 1]
    return weights.reshape(-1, *weights.shape[-3:])[0].detach().cpu()


class _Softmax(TorchDispatchMode):
    """Calls ``attended`` with each softmax that is multiplied with something."""

    def __init__(self, attended: Any):
        super().__init__()
        self._attended = attended
        self._waiting: dict[int, Tensor] = {}  # by their memory, of which a product sees a view

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _OURS:
            self._attended(_OURS[func](*args))
        elif func in _SOFTMAX:
            dims = args[0].dim()
            if dims >= 3 and args[1] in (-1, dims - 1):
                self._waiting[_memory(out)] = out
        elif func in _ON_THE_WAY:
            if any(_memory(t) in self._waiting for t in args if isinstance(t, Tensor)):
                self._waiting[_memory(out)] = out
        elif func in _PRODUCT:
            weights = self._waiting.pop(_memory(args[0]), None)
            if weights is not None:
                self._attended(weights)
        return out


def _dense(query, key, value, attn_mask, rng, dropout_p, is_causal, scale, backend) -> Tensor:
    """What ours was given (B, H, L, D) -> the weights, in float32 at least."""
    query, key, value = (t if t.dtype == torch.float64 else t.float() for t in (query, key, value))
    if attn_mask is not None:  # the formula adds it, whatever it is
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.to(query.dtype)
    groups = query.shape[1] != key.shape[1]
    formula = _aten._scaled_dot_product_attention_math
    return formula(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=groups)[1]


def _varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, *rest) -> Tensor:
    """Of the first sequence (L, H, D)."""
    ends = cu_seqlens_q[1], cu_seqlens_k[1], cu_seqlens_k[1]
    first = (t[:end].transpose(0, 1)[None] for t, end in zip((query, key, value), ends, strict=True))
    return _dense(*first, None, *rest)


_ours = torch.ops.pytorch_ext
_OURS = {_ours.scaled_dot_product_attention_fwd.default: _dense, _ours.varlen_attention_fwd.default: _varlen}


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


@contextlib.contextmanager
def _formula() -> Iterator[None]:
    """Attention without kernels that keep its weights to themselves."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _hooks(model: nn.Module, running: list[tuple[str, nn.Module]], found: Observed) -> Iterator[None]:
    """Notes which modules are running, and what those without children return."""

    def before(name: str, module: nn.Module) -> Any:
        return module.register_forward_pre_hook(lambda *_: running.append((name, module)))

    def after(name: str, module: nn.Module) -> Any:
        leaf = not isinstance(module, _SILENT) and next(module.children(), None) is None

        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            running.pop()
            first = output[0] if isinstance(output, tuple) and output else output
            if leaf and isinstance(first, Tensor):
                found.activations.append(values(name, first))

        return module.register_forward_hook(hook, always_call=True)

    handles = []
    try:
        for name, module in model.named_modules():
            handles += before(name, module), after(name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
