"""Gaussian error linear unit (Hendrycks & Gimpel 2016, arXiv 1606.08415), exact and by tanh, and its derivative."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Configs, cdiv
from .launch import launch
from .precision import loaded, stored
from .sizes import Sizes

# --- Math on loaded values --------------------------------------------------------------------------------------


@triton.jit
def gelu(x, TANH: tl.constexpr):
    if TANH:
        tail = _logistic_tail(x)
        return x * tl.where(x < 0.0, tail, 1.0 - tail)
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x, TANH: tl.constexpr):
    if TANH:
        tail = _logistic_tail(x)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * (x * x))  # derivative of the argument
        # For large x the product is 0 * inf: the derivative has reached 0 or 1 long before.
        rest = tl.where(tl.abs(x) > 20.0, 0.0, x * tail * (1.0 - tail) * slope)
        return tl.where(x < 0.0, tail, 1.0 - tail) + rest
    density = tl.exp(-0.5 * x * x) * 0.3989422804014327
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density


@triton.jit
def _logistic_tail(x):
    """``(1 - tanh(|u|)) / 2`` for ``u = sqrt(2 / pi) (x + 0.044715 x^3)``: the logistic function of ``-2 |u|``.

    It keeps its digits in the tail, where ``1 + tanh(u)`` has lost them, and overflows nowhere. The argument is
    computed in the order of the formula: factored otherwise, its constants' rounding doubles the error of the whole.
    """
    twice = 1.5957691216057308 * (x + 0.044715 * (x * x * x))
    e = tl.exp(-tl.abs(twice))
    return e / (1.0 + e)


# --- Kernels ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize_on_alignment=["count"])
def _gelu_fwd_kernel(
    x_ptr,  # (count,)
    out_ptr,  # (count,)
    count,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes BLOCK elements."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    stored(out_ptr + offs, gelu(loaded(x_ptr + offs, mask), TANH), mask)


@triton.jit(do_not_specialize_on_alignment=["count"])
def _gelu_bwd_kernel(
    dout_ptr,  # (count,)
    x_ptr,  # (count,)
    dx_ptr,  # (count,)
    count,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes BLOCK elements."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    dx = loaded(dout_ptr + offs, mask) * gelu_derivative(loaded(x_ptr + offs, mask), TANH)
    stored(dx_ptr + offs, dx, mask)


# --- Configurations ---------------------------------------------------------------------------------------------

# Eight 16-bit or four 32-bit elements per thread and load, two loads under way.
_ROWS = [((2,), {"BLOCK": 2048, "num_warps": 4}), ((None,), {"BLOCK": 1024, "num_warps": 4})]


def _configs(name: str, kernel: Callable) -> Configs:
    return Configs(
        name,
        by=("itemsize",),
        table=dict.fromkeys(("sm_80", "sm_90", "sm_100"), _ROWS),
        wider={"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)},
        kernels=lambda: [kernel],
    )


FORWARD = _configs("gelu_fwd", _gelu_fwd_kernel)
BACKWARD = _configs("gelu_bwd", _gelu_bwd_kernel)


# --- The ops ----------------------------------------------------------------------------------------------------


def gelu_fwd(input: Tensor, approximate: str) -> Tensor:
    out = input.new_empty(input.shape)
    if count := input.numel():
        constants = FORWARD.of(input, input.element_size())
        # Grid: blocks of elements.
        grid = (cdiv(count, constants["BLOCK"]),)
        launch(_gelu_fwd_kernel, grid, input.contiguous(), out, count, TANH=approximate == "tanh", **constants)
    return out


def gelu_bwd(dout: Tensor, input: Tensor, approximate: str) -> Tensor:
    dinput = input.new_empty(input.shape)
    if count := input.numel():
        constants = BACKWARD.of(input, input.element_size())
        # Grid: blocks of elements.
        launch(
            _gelu_bwd_kernel,
            (cdiv(count, constants["BLOCK"]),),
            dout.contiguous(),
            input.contiguous(),
            dinput,
            count,
            TANH=approximate == "tanh",
            **constants,
        )
    return dinput


# --- What to compile ahead of time, and to tune -----------------------------------------------------------------


def calls(sizes: Sizes, empty: Callable[..., Tensor]) -> Iterator[tuple[Configs, Callable]]:
    x, dout = (empty(sizes.tokens, sizes.intermediate, dtype=sizes.dtype) for _ in range(2))
    for approximate in ("none", "tanh"):
        yield FORWARD, lambda approximate=approximate: gelu_fwd(x, approximate)
        yield BACKWARD, lambda approximate=approximate: gelu_bwd(dout, x, approximate)


AHEAD = [Sizes(), Sizes(dtype=torch.float32)]
