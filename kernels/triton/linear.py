"""``activation(input @ weight.T + bias)`` and its gradients: one product whose ends are fused.

Forward adds the bias, stores the pre-activation only where a gradient needs it, and applies the activation before the
tile leaves the registers. Backward's first product takes the activation's derivative into its left operand; its first
column of programs leaves that operand behind for the second product, which adds up the bias's gradient on its way. Sums
run in a fixed order: a program has a tile of the result, and all of the dimension that is summed over.
"""

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Configs, cdiv, size_class
from .gelu import gelu, gelu_derivative
from .launch import launch
from .precision import loaded, narrowed, product, stored
from .rows import matrix, vector
from .sizes import Sizes

# --- Math on loaded values --------------------------------------------------------------------------------------


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        # Not tl.maximum, which loses NaN.
        return tl.where(x < 0.0, 0.0, x)
    if ACTIVATION == "gelu":
        return gelu(x, False)
    if ACTIVATION == "gelu_tanh":
        return gelu(x, True)
    return x


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    if ACTIVATION == "gelu":
        return gelu_derivative(x, False)
    return gelu_derivative(x, True)


@triton.jit
def tile_of(rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Which tile of a (rows, cols) result is this program's.

    GROUP rows of tiles are walked column by column, so that what neighbours read stays in the L2 cache.
    """
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % height, within // height


# --- Kernels ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _linear_fwd_kernel(
    x_ptr,  # (rows, depth)
    w_ptr,  # (cols, depth)
    b_ptr,  # (cols,) or None
    out_ptr,  # (rows, cols), contiguous
    pre_ptr,  # (rows, cols), contiguous, or None
    x_row_stride,
    x_col_stride,
    w_row_stride,
    w_col_stride,
    rows,
    cols,
    depth,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each program makes one tile (BLOCK_M, BLOCK_N) of the output."""
    tile_m, tile_n = tile_of(rows, cols, BLOCK_M, BLOCK_N, GROUP)
    row_offs = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col_offs = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_offs = tl.arange(0, BLOCK_K)
    # What lies outside is read from the start again and not stored: the loop needs no mask for it.
    x_ptrs = x_ptr + (row_offs % rows)[:, None] * x_row_stride + k_offs[None, :].to(tl.int64) * x_col_stride
    w_ptrs = w_ptr + (col_offs % cols)[None, :] * w_row_stride + k_offs[:, None].to(tl.int64) * w_col_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)  # (M, K), (K, N)
        else:
            x = tl.load(x_ptrs, mask=(k_offs < depth - k)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k_offs < depth - k)[:, None], other=0.0)
        acc = product(x, w, acc)
        x_ptrs += BLOCK_K * tl.cast(x_col_stride, tl.int64)
        w_ptrs += BLOCK_K * tl.cast(w_col_stride, tl.int64)
    if b_ptr is not None:
        acc += loaded(b_ptr + col_offs, col_offs < cols)[None, :]
    offs = row_offs[:, None] * cols + col_offs[None, :]
    mask = (row_offs < rows)[:, None] & (col_offs < cols)[None, :]
    if pre_ptr is not None:
        stored(pre_ptr + offs, acc, mask)
    stored(out_ptr + offs, activated(acc, ACTIVATION), mask)


@triton.jit(do_not_specialize=["rows"])
def _linear_bwd_input_kernel(
    dout_ptr,  # (rows, depth)
    pre_ptr,  # (rows, depth), contiguous, or None
    w_ptr,  # (depth, cols)
    dx_ptr,  # (rows, cols), contiguous
    dz_ptr,  # (rows, depth), contiguous, or None: dout times the activation's derivative
    dout_row_stride,
    dout_col_stride,
    w_row_stride,
    w_col_stride,
    rows,
    cols,
    depth,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each program makes one tile (BLOCK_M, BLOCK_N) of ``dx = dz @ w``; those of the first column store ``dz``."""
    tile_m, tile_n = tile_of(rows, cols, BLOCK_M, BLOCK_N, GROUP)
    row_offs = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col_offs = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_offs = tl.arange(0, BLOCK_K)
    inside = row_offs % rows
    dout_ptrs = dout_ptr + inside[:, None] * dout_row_stride + k_offs[None, :].to(tl.int64) * dout_col_stride
    w_ptrs = w_ptr + k_offs[:, None].to(tl.int64) * w_row_stride + (col_offs % cols)[None, :] * w_col_stride
    dz_offs = inside[:, None] * depth + k_offs[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        k_mask = k_offs < depth - k
        if EVEN_K:
            dz, w = tl.load(dout_ptrs), tl.load(w_ptrs)  # (M, K), (K, N)
        else:
            dz = tl.load(dout_ptrs, mask=k_mask[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=k_mask[:, None], other=0.0)
        if pre_ptr is not None:
            pre = loaded(pre_ptr + dz_offs + k, k_mask[None, :])
            dz = narrowed(dz.to(tl.float32) * activation_derivative(pre, ACTIVATION), w_ptr.dtype.element_ty)
            if tile_n == 0:
                tl.store(dz_ptr + dz_offs + k, dz, mask=(row_offs < rows)[:, None] & k_mask[None, :])
        acc = product(dz, w, acc)
        dout_ptrs += BLOCK_K * tl.cast(dout_col_stride, tl.int64)
        w_ptrs += BLOCK_K * tl.cast(w_row_stride, tl.int64)
    mask = (row_offs < rows)[:, None] & (col_offs < cols)[None, :]
    stored(dx_ptr + row_offs[:, None] * cols + col_offs[None, :], acc, mask)


@triton.jit(do_not_specialize=["depth"])
def _linear_bwd_weight_kernel(
    dz_ptr,  # (depth, rows)
    x_ptr,  # (depth, cols)
    dw_ptr,  # (rows, cols), contiguous
    db_ptr,  # (rows,) or None
    dz_row_stride,
    dz_col_stride,
    x_row_stride,
    x_col_stride,
    rows,
    cols,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each program makes one tile of ``dw = dz.T @ x``; those of the first column add up ``db`` beside it."""
    tile_m, tile_n = tile_of(rows, cols, BLOCK_M, BLOCK_N, GROUP)
    row_offs = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col_offs = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_offs = tl.arange(0, BLOCK_K).to(tl.int64)
    dz_ptrs = dz_ptr + k_offs[None, :] * dz_row_stride + (row_offs % rows)[:, None] * dz_col_stride
    x_ptrs = x_ptr + k_offs[:, None] * x_row_stride + (col_offs % cols)[None, :] * x_col_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, depth, BLOCK_K):
        k_mask = k_offs < depth - k
        dz = tl.load(dz_ptrs, mask=k_mask[None, :], other=0.0)  # (M, K)
        x = tl.load(x_ptrs, mask=k_mask[:, None], other=0.0)  # (K, N)
        acc = product(dz, x, acc)
        if db_ptr is not None:
            if tile_n == 0:
                db += tl.sum(dz.to(tl.float32), 1)
        dz_ptrs += BLOCK_K * tl.cast(dz_row_stride, tl.int64)
        x_ptrs += BLOCK_K * tl.cast(x_row_stride, tl.int64)
    row_mask = row_offs < rows
    offs = row_offs[:, None] * cols + col_offs[None, :]
    stored(dw_ptr + offs, acc, row_mask[:, None] & (col_offs < cols)[None, :])
    if db_ptr is not None:
        if tile_n == 0:
            stored(db_ptr + row_offs, db, row_mask)


# --- Configurations ---------------------------------------------------------------------------------------------


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, "num_warps": warps, "num_stages": stages}


# A tile of 128 × 256 would suit sm_90 and sm_100 better without an activation; with GELU it spills registers.
# By how many tiles of 128 × 128 the result has, and the size of an element: small results get small tiles, so that
# every multiprocessor has one. float32 is multiplied without the matrix unit, which would round it.
_FLOAT32 = _tile(64, 64, 16, 4, 3)


def _table(small: dict, middle: dict, large: dict) -> list:
    return [((16, 2), small), ((128, 2), middle), ((None, 2), large), ((None, None), _FLOAT32)]


_FORWARD = {
    "sm_80": _table(_tile(32, 64, 64, 4, 4), _tile(64, 128, 32, 4, 4), _tile(128, 128, 32, 8, 4)),
    "sm_90": _table(_tile(64, 64, 64, 4, 5), _tile(64, 128, 64, 4, 4), _tile(128, 128, 64, 8, 4)),
    "sm_100": _table(_tile(64, 64, 64, 4, 5), _tile(128, 64, 64, 4, 4), _tile(128, 128, 64, 8, 4)),
}
# The derivative's operand goes through registers, which leaves fewer of them for the tile.
_BACKWARD_INPUT = {
    "sm_80": _table(_tile(32, 64, 64, 4, 3), _tile(64, 128, 32, 8, 3), _tile(128, 128, 32, 8, 3)),
    "sm_90": _table(_tile(64, 64, 64, 4, 3), _tile(64, 128, 64, 4, 3), _tile(128, 128, 64, 8, 3)),
    "sm_100": _table(_tile(64, 64, 64, 4, 3), _tile(64, 128, 64, 8, 3), _tile(128, 128, 64, 8, 3)),
}
_BACKWARD_WEIGHT = {
    "sm_80": _table(_tile(32, 64, 64, 4, 4), _tile(64, 64, 64, 4, 4), _tile(128, 128, 32, 8, 4)),
    "sm_90": _table(_tile(64, 64, 64, 4, 5), _tile(64, 64, 64, 4, 5), _tile(128, 128, 64, 8, 4)),
    "sm_100": _table(_tile(64, 64, 64, 4, 5), _tile(64, 64, 64, 4, 5), _tile(128, 128, 64, 8, 4)),
}


def _fits(constants: dict[str, int], sizes: tuple[int, ...]) -> bool:
    """A thread holds at most 128 elements of the tile (64 where they are float32 products), and the stages fit."""
    tile = constants["BLOCK_M"] * constants["BLOCK_N"]
    stage = (constants["BLOCK_M"] + constants["BLOCK_N"]) * constants["BLOCK_K"] * sizes[-1]
    per_thread = tile // (32 * constants["num_warps"])
    return 8 <= per_thread <= (128 if sizes[-1] == 2 else 64) and stage * constants["num_stages"] <= 200 * 1024


def _configs(name: str, table: dict, kernel: Callable) -> Configs:
    return Configs(
        name,
        by=("tiles", "itemsize"),
        table=table,
        wider={
            "BLOCK_M": (32, 64, 128),
            "BLOCK_N": (64, 128, 256),
            "BLOCK_K": (32, 64),
            "GROUP": (8,),
            "num_warps": (4, 8),
            "num_stages": (3, 4),
        },
        kernels=lambda: [kernel],
        fits=_fits,
    )


FORWARD = _configs("linear_fwd", _FORWARD, _linear_fwd_kernel)
BACKWARD_INPUT = _configs("linear_bwd_input", _BACKWARD_INPUT, _linear_bwd_input_kernel)
BACKWARD_WEIGHT = _configs("linear_bwd_weight", _BACKWARD_WEIGHT, _linear_bwd_weight_kernel)


def _chosen(configs: Configs, like: Tensor, rows: int, cols: int) -> tuple[dict[str, int], tuple[int]]:
    """The configuration for a (rows, cols) result, and the grid: its tiles."""
    tiles = size_class(cdiv(rows, 128) * cdiv(cols, 128), least=1)
    constants = configs.of(like, tiles, like.element_size())
    return constants, (cdiv(rows, constants["BLOCK_M"]) * cdiv(cols, constants["BLOCK_N"]),)


# --- The ops ----------------------------------------------------------------------------------------------------


def linear_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    keep_preactivation: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    cols, depth = weight.shape
    rows = math.prod(input.shape[:-1])
    out = input.new_empty(*input.shape[:-1], cols)
    preactivation = torch.empty_like(out) if keep_preactivation else input.new_empty(0)
    if out.numel() == 0:
        return out, preactivation
    x, *x_strides = (input, 0, 0) if depth == 0 else matrix(input, depth)
    constants, grid = _chosen(FORWARD, input, rows, cols)
    # Grid: tiles of the output.
    launch(
        _linear_fwd_kernel,
        grid,
        x,
        weight,
        vector(bias),
        out,
        preactivation if keep_preactivation else None,
        *x_strides,
        *weight.stride(),
        rows,
        cols,
        depth,
        ACTIVATION=activation,
        EVEN_K=depth % constants["BLOCK_K"] == 0,
        **constants,
    )
    return out, preactivation


def linear_bwd(
    dout: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    preactivation: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    cols, depth = weight.shape
    rows = math.prod(input.shape[:-1])
    dinput, dweight = input.new_empty(input.shape), weight.new_empty(weight.shape)
    dbias = dout.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    if rows == 0 or cols == 0 or depth == 0:
        if bias is not None and rows and cols:
            dbias.copy_(_bias_alone(dout, preactivation, activation).reshape(-1, cols).sum(0))
        else:
            dbias.zero_()
        return dinput.zero_(), dweight.zero_(), dbias
    dz, *dz_strides = matrix(dout, cols)
    fused = activation != "none"
    kept = preactivation.contiguous() if fused else None
    into = torch.empty_like(kept) if fused else None
    constants, grid = _chosen(BACKWARD_INPUT, input, rows, depth)
    # Grid: tiles of the input's gradient.
    launch(
        _linear_bwd_input_kernel,
        grid,
        dz,
        kept,
        weight,
        dinput,
        into,
        *dz_strides,
        *weight.stride(),
        rows,
        depth,
        cols,
        ACTIVATION=activation,
        EVEN_K=cols % constants["BLOCK_K"] == 0,
        **constants,
    )
    if fused:
        dz, dz_strides = into, (cols, 1)
    x, *x_strides = matrix(input, depth)
    constants, grid = _chosen(BACKWARD_WEIGHT, input, cols, depth)
    # Grid: tiles of the weight's gradient.
    launch(
        _linear_bwd_weight_kernel,
        grid,
        dz,
        x,
        dweight,
        None if bias is None else dbias,
        *dz_strides,
        *x_strides,
        cols,
        depth,
        rows,
        **constants,
    )
    return dinput, dweight, dbias


def _bias_alone(dout: Tensor, preactivation: Tensor, activation: str) -> Tensor:
    """``dz`` where there is nothing to multiply: an input without features."""
    if activation == "none":
        return dout.float()
    if activation == "relu":
        return dout.float() * (preactivation > 0)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(dout.float(), preactivation.float(), approximate=approximate)


# --- What to compile ahead of time, and to tune -----------------------------------------------------------------


def calls(sizes: Sizes, empty: Callable[..., Tensor]) -> Iterator[tuple[Configs, Callable]]:
    x = empty(sizes.tokens, sizes.hidden, dtype=sizes.dtype)
    weight = empty(sizes.intermediate, sizes.hidden, dtype=sizes.dtype)
    bias = empty(sizes.intermediate, dtype=sizes.dtype)
    dout, kept = (empty(sizes.tokens, sizes.intermediate, dtype=sizes.dtype) for _ in range(2))
    for activation in ("none", "gelu"):
        keep = activation != "none"
        yield FORWARD, lambda a=activation, keep=keep: linear_fwd(x, weight, bias, a, keep, False)
        for configs in (BACKWARD_INPUT, BACKWARD_WEIGHT):
            yield configs, lambda a=activation: linear_bwd(dout, x, weight, bias, kept, a)


AHEAD = [
    Sizes(),
    Sizes(batch=1, seqlen=128, hidden=256, intermediate=512),
    Sizes(batch=4, seqlen=128, intermediate=768),
    Sizes(batch=16, seqlen=512, hidden=2048, intermediate=8192),
    Sizes(dtype=torch.float32),
]
