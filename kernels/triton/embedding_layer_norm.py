"""``dropout(layer_norm(word[ids] + position[...] + token_type[...]))``, the first block of a BERT, and its gradients.

The sum is never stored: backward gathers it again. See ``_table_gradient.py`` for the gradients of the tables and
``layer_norm.py`` for how rows are shared out.
"""

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._norms import input_gradient, moments, scale_and_shift, scaled, store_partial
from ._table_gradient import table_gradient
from ._wide_norms import wide_norm_gradients
from .configs import Configs, cdiv
from .dropout_add_layer_norm import dropout_add_layer_norm_fwd
from .launch import launch
from .layer_norm import layer_norm_fwd
from .philox import dropout_arguments, dropped, keep_rows
from .precision import loaded, stored
from .rows import (
    WIDEST_BACKWARD,
    WIDEST_FORWARD,
    block_of,
    matrix,
    parameter_gradients,
    programs,
    sum_partials,
    vector,
)
from .sizes import Sizes

# --- Kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def _looked_up(
    table_ptr,  # (entries, cols)
    ids_ptr,  # (outer, inner), by strides
    entries,
    outer_stride,
    inner_stride,
    row_offs,
    inner,
    cols,
    row_mask,
    col_offs,
):
    """Rows of a table (R, C), in float32. An id that the table does not have gives NaN, and reads nothing."""
    at = (row_offs // inner) * outer_stride + (row_offs % inner) * inner_stride
    entry = tl.load(ids_ptr + at, mask=row_mask, other=0).to(tl.int64)
    there = (entry >= 0) & (entry < entries)
    mask = (row_mask & there)[:, None] & (col_offs < cols)[None, :]
    x = loaded(table_ptr + entry[:, None] * cols + col_offs[None, :], mask)
    return tl.where((row_mask & (there == 0))[:, None], float("nan"), x)


@triton.jit
def _embedded(tables, row_offs, inner, cols, row_mask, mask, col_offs):
    """The sum of the three tables' rows (R, C); the second and the third may be None."""
    word, token_type, position = tables
    x = _looked_up(*word, row_offs, inner, cols, row_mask, col_offs)
    if token_type[0] is not None:
        x += _looked_up(*token_type, row_offs, inner, cols, row_mask, col_offs)
    if position[0] is not None:
        x += _looked_up(*position, row_offs, inner, cols, row_mask, col_offs)
    return tl.where(mask, x, 0.0)


@triton.jit(do_not_specialize=["rows", "inner", "threshold"])
def _embedding_layer_norm_fwd_kernel(
    word_ptr,  # (entries, cols)
    ids_ptr,  # (outer, inner), by strides
    word_entries,
    ids_outer_stride,
    ids_inner_stride,
    token_type_ptr,  # (entries, cols) or None
    type_ids_ptr,  # (outer, inner), by strides, or None
    token_type_entries,
    type_ids_outer_stride,
    type_ids_inner_stride,
    position_ptr,  # (entries, cols) or None
    position_ids_ptr,  # (outer, inner), by strides, or None
    position_entries,
    position_ids_outer_stride,
    position_ids_inner_stride,
    w_ptr,  # (cols,)
    b_ptr,  # (cols,) or None
    rng_ptr,  # (2,), int64, or None
    out_ptr,  # (rows, cols)
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
    inner,
    rows,
    cols,
    threshold,
    scale,
    eps,
    BLOCK_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Each program takes BLOCK_ROWS rows, that is tokens."""
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row_offs < rows
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < cols
    mask = row_mask[:, None] & col_mask[None, :]
    tables = (
        (word_ptr, ids_ptr, word_entries, ids_outer_stride, ids_inner_stride),
        (token_type_ptr, type_ids_ptr, token_type_entries, type_ids_outer_stride, type_ids_inner_stride),
        (position_ptr, position_ids_ptr, position_entries, position_ids_outer_stride, position_ids_inner_stride),
    )
    x = _embedded(tables, row_offs, inner, cols, row_mask, mask, col_offs)
    mean, rstd, centred = moments(x, mask, cols, eps)
    out = scale_and_shift(centred * rstd[:, None], w_ptr, b_ptr, col_offs, col_mask)
    if rng_ptr is not None:
        out = dropped(out, keep_rows(rng_ptr, threshold, scale, row_offs, 0, BLOCK_COLS), scale)
    stored(out_ptr + row_offs[:, None] * cols + col_offs[None, :], out, mask)
    tl.store(mean_ptr + row_offs, mean, mask=row_mask)
    tl.store(rstd_ptr + row_offs, rstd, mask=row_mask)


@triton.jit(do_not_specialize=["rows", "inner", "threshold"])
def _embedding_layer_norm_bwd_kernel(
    word_ptr,  # (entries, cols)
    ids_ptr,  # (outer, inner), by strides
    word_entries,
    ids_outer_stride,
    ids_inner_stride,
    token_type_ptr,  # (entries, cols) or None
    type_ids_ptr,  # (outer, inner), by strides, or None
    token_type_entries,
    type_ids_outer_stride,
    type_ids_inner_stride,
    position_ptr,  # (entries, cols) or None
    position_ids_ptr,  # (outer, inner), by strides, or None
    position_entries,
    position_ids_outer_stride,
    position_ids_inner_stride,
    dout_ptr,  # (rows, cols)
    w_ptr,  # (cols,)
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
    rng_ptr,  # (2,), int64, or None
    dx_ptr,  # (rows, cols), float32: the gradient of the sum
    partial_ptr,  # (sums, programs, cols), float32
    dout_row_stride,
    dout_col_stride,
    inner,
    rows,
    cols,
    threshold,
    scale,
    HAS_BIAS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Each program takes every ``num_programs``-th block of BLOCK_ROWS rows."""
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < cols
    wide_offs = col_offs[None, :].to(tl.int64)
    tables = (
        (word_ptr, ids_ptr, word_entries, ids_outer_stride, ids_inner_stride),
        (token_type_ptr, type_ids_ptr, token_type_entries, type_ids_outer_stride, type_ids_inner_stride),
        (position_ptr, position_ids_ptr, position_entries, position_ids_outer_stride, position_ids_inner_stride),
    )
    dw = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    db = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for start in range(first, rows, tl.num_programs(0) * BLOCK_ROWS):
        row_offs = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = row_offs < rows
        mask = row_mask[:, None] & col_mask[None, :]
        dy = loaded(dout_ptr + row_offs[:, None] * dout_row_stride + wide_offs * dout_col_stride, mask)
        if rng_ptr is not None:
            dy = dropped(dy, keep_rows(rng_ptr, threshold, scale, row_offs, 0, BLOCK_COLS), scale)
        x = _embedded(tables, row_offs, inner, cols, row_mask, mask, col_offs)
        mean = tl.load(mean_ptr + row_offs, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + row_offs, mask=row_mask, other=0.0)
        x_hat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)  # (R, C)
        dx_hat = scaled(dy, w_ptr, col_offs, col_mask)
        along_one, along_x_hat = tl.sum(dx_hat, 1) / cols, tl.sum(dx_hat * x_hat, 1) / cols
        dx = input_gradient(dx_hat, x_hat, along_one, along_x_hat, rstd)
        tl.store(dx_ptr + row_offs[:, None] * cols + col_offs[None, :], dx, mask=mask)
        dw += dy * x_hat
        if HAS_BIAS:
            db += dy
    store_partial(partial_ptr, 0, dw, cols, col_offs, col_mask)
    if HAS_BIAS:
        store_partial(partial_ptr, 1, db, cols, col_offs, col_mask)


# --- Configurations ---------------------------------------------------------------------------------------------

_FORWARD_ROWS = [
    ((256,), {"BLOCK_ROWS": 4, "num_warps": 4}),
    ((1024,), {"BLOCK_ROWS": 1, "num_warps": 2}),
    ((4096,), {"BLOCK_ROWS": 1, "num_warps": 8}),
    ((None,), {"BLOCK_ROWS": 1, "num_warps": 16}),
]
_BACKWARD_ROWS = [
    ((256,), {"BLOCK_ROWS": 4, "num_warps": 4}),
    ((1024,), {"BLOCK_ROWS": 1, "num_warps": 4}),
    ((None,), {"BLOCK_ROWS": 1, "num_warps": 16}),
]


def _configs(name: str, rows: list, kernel: Callable, most: int) -> Configs:
    return Configs(
        name,
        by=("BLOCK_COLS",),
        table=dict.fromkeys(("sm_80", "sm_90", "sm_100"), rows),
        wider={"BLOCK_ROWS": (1, 2, 4), "num_warps": (1, 2, 4, 8, 16)},
        kernels=lambda: [kernel],
        fits=lambda c, sizes: 2 <= c["BLOCK_ROWS"] * sizes[0] // (32 * c["num_warps"]) <= most,
    )


FORWARD = _configs("embedding_layer_norm_fwd", _FORWARD_ROWS, _embedding_layer_norm_fwd_kernel, 32)
BACKWARD = _configs("embedding_layer_norm_bwd", _BACKWARD_ROWS, _embedding_layer_norm_bwd_kernel, 32)


# --- The ops ----------------------------------------------------------------------------------------------------


def embedding_layer_norm_fwd(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = input_ids.numel(), word.shape[1]
    out = word.new_empty(*input_ids.shape, cols)
    mean = word.new_empty(input_ids.shape, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if rows == 0:
        return out, mean, rstd
    if cols == 0:
        return out, mean.fill_(math.nan), rstd.fill_(math.nan)
    tables = ((input_ids, word), (token_type_ids, token_type), (position_ids, position))
    block_cols, whole = block_of(cols, WIDEST_FORWARD)
    if not whole:
        out, mean, rstd = layer_norm_fwd(_sum(tables, input_ids), [cols], weight, bias, eps)
        return _dropped(out, rng, dropout_p).to(word.dtype), mean, rstd
    constants = FORWARD.of(word, block_cols)
    # Grid: blocks of rows.
    launch(
        _embedding_layer_norm_fwd_kernel,
        (cdiv(rows, constants["BLOCK_ROWS"]),),
        *_arguments(tables, input_ids),
        vector(weight),
        vector(bias),
        rng,
        out,
        mean,
        rstd,
        input_ids.shape[-1] if input_ids.dim() else 1,
        rows,
        cols,
        *dropout_arguments(dropout_p),
        eps,
        BLOCK_COLS=block_cols,
        **constants,
    )
    return out, mean, rstd


def embedding_layer_norm_bwd(
    dout: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, cols = input_ids.numel(), word.shape[1]
    tables = ((input_ids, word), (token_type_ids, token_type), (position_ids, position))
    if rows == 0 or cols == 0:
        parameters = (word, position, token_type, weight, bias)
        return tuple(dout.new_empty(0) if p is None else p.new_zeros(p.shape) for p in parameters)
    dx = dout.new_empty((rows, cols), dtype=torch.float32)
    block_cols, whole = block_of(cols, WIDEST_BACKWARD)
    if whole:
        dy, *dy_strides = matrix(dout, cols)
        constants = BACKWARD.of(word, block_cols)
        count = programs(word, cdiv(rows, constants["BLOCK_ROWS"]), constants["num_warps"])
        partials, (dweight, dbias) = parameter_gradients(dout, count, cols, weight, bias)
        # Grid: as many programs as share the rows.
        launch(
            _embedding_layer_norm_bwd_kernel,
            (count,),
            *_arguments(tables, input_ids),
            dy,
            vector(weight),
            mean,
            rstd,
            rng,
            dx,
            partials,
            *dy_strides,
            input_ids.shape[-1] if input_ids.dim() else 1,
            rows,
            cols,
            *dropout_arguments(dropout_p),
            HAS_BIAS=bias is not None,
            BLOCK_COLS=block_cols,
            **constants,
        )
        sum_partials(partials, dweight, dbias)
    else:
        dy, x = _dropped(dout.float(), rng, dropout_p), _sum(tables, input_ids)
        dweight, dbias = wide_norm_gradients(dy, x, weight, bias, mean, rstd, dx, cols)
    dword, dtoken_type, dposition = (
        dout.new_empty(0) if table is None else table_gradient(dx, ids.expand(input_ids.shape), table, skipped)
        for (ids, table), skipped in zip(tables, (padding_idx, -1, -1), strict=True)
    )
    return dword, dposition, dtoken_type, dweight, dbias


def _arguments(tables: tuple, input_ids: Tensor) -> list:
    """Table, ids, entries and the two strides of the ids, for each table."""
    found = []
    for ids, table in tables:
        if table is None:
            found += [None, None, 0, 0, 0]
            continue
        ids = ids.expand(input_ids.shape)  # a stride of 0 where they broadcast: no copy
        if ids.dim() > 2:
            ids = ids.reshape(-1, ids.shape[-1])
        outer, inner = (0, 0, *ids.stride())[-2:]
        found += [table.contiguous(), ids, table.shape[0], outer, inner]
    return found


# Rows wider than a block are rare in embeddings: what is a kernel otherwise is put together from others here.


def _sum(tables: tuple, input_ids: Tensor) -> Tensor:
    word, *others = (
        table.float()[ids.expand(input_ids.shape)] for ids, table in tables if table is not None
    )
    for other in others:
        word = word + other
    return word


def _dropped(x: Tensor, rng: Tensor | None, dropout_p: float) -> Tensor:
    if rng is None:
        return x
    nothing, ones = x.new_zeros(1).expand(x.shape), x.new_ones(x.shape[-1])
    return dropout_add_layer_norm_fwd(x, nothing, ones, None, None, rng, dropout_p, 1.0)[1]


# --- What to compile ahead of time, and to tune -----------------------------------------------------------------


def calls(sizes: Sizes, empty: Callable[..., Tensor]) -> Iterator[tuple[Configs, Callable]]:
    ids = empty(sizes.batch, sizes.seqlen, dtype=torch.int64, below=sizes.vocabulary)
    type_ids = empty(sizes.batch, sizes.seqlen, dtype=torch.int64, below=2)
    position_ids = empty(sizes.seqlen, dtype=torch.int64, below=512)
    word, position, token_type = (
        empty(entries, sizes.hidden, dtype=sizes.dtype) for entries in (sizes.vocabulary, 512, 2)
    )
    weight, bias = (empty(sizes.hidden, dtype=sizes.dtype) for _ in range(2))
    mean, rstd = (empty(sizes.batch, sizes.seqlen, dtype=torch.float32) for _ in range(2))
    dout = empty(sizes.batch, sizes.seqlen, sizes.hidden, dtype=sizes.dtype)
    rng = empty(2, dtype=torch.int64) if sizes.dropout_p else None
    inputs = (ids, type_ids, position_ids, word, position, token_type, weight, bias)
    p = sizes.dropout_p
    yield FORWARD, lambda: embedding_layer_norm_fwd(*inputs, rng, p, 1e-12)
    yield BACKWARD, lambda: embedding_layer_norm_bwd(dout, *inputs, mean, rstd, rng, p, 0)


AHEAD = [
    *(Sizes(hidden=hidden, dropout_p=0.1) for hidden in (256, 768, 4096, 8192)),
    Sizes(hidden=768),
    Sizes(hidden=768, dtype=torch.float32),
]
