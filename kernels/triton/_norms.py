"""Normalisation of rows and its gradients, as math on loaded values: what every op with a LayerNorm in it shares."""

import triton
import triton.language as tl

from .precision import loaded


@triton.jit
def moments(x, mask, cols, eps):
    """Of rows ``x`` (R, C), zero where ``mask`` is not: mean (R,), rstd (R,) and ``x - mean`` (R, C)."""
    mean = tl.sum(x, 1) / cols
    # A mean far from zero is rounded in its last bit; what is left over is small and sums exactly enough.
    mean += tl.sum(tl.where(mask, x - mean[:, None], 0.0), 1) / cols
    centred = tl.where(mask, x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 1) / cols + eps), centred


@triton.jit
def moments_from_sums(rough_mean, total, squares, cols, eps):
    """The same from what was summed block by block: ``x - rough_mean`` and its squares, each (R, C)."""
    left = tl.sum(total, 1) / cols
    # What is left over of the mean is a rounding error, so nothing cancels here.
    variance = tl.maximum(tl.sum(squares, 1) / cols - left * left, 0.0)
    return rough_mean + left, tl.rsqrt(variance + eps)


@triton.jit
def scale_and_shift(x_hat, w_ptr, b_ptr, col_offs, col_mask):
    if w_ptr is not None:
        x_hat = x_hat * loaded(w_ptr + col_offs, col_mask)[None, :]
    if b_ptr is not None:
        x_hat = x_hat + loaded(b_ptr + col_offs, col_mask)[None, :]
    return x_hat


@triton.jit
def scaled(dy, w_ptr, col_offs, col_mask):
    """The gradient of the normalised row from that of the output."""
    if w_ptr is not None:
        dy = dy * loaded(w_ptr + col_offs, col_mask)[None, :]
    return dy


@triton.jit
def input_gradient(dx_hat, x_hat, along_one, along_x_hat, rstd):
    """``along_one`` and ``along_x_hat`` are the means of ``dx_hat`` and ``dx_hat * x_hat`` in each row (R,).

    ``x_hat`` has mean 0 and variance 1, so the gradient may move it neither along 1 nor along itself.
    """
    return (dx_hat - along_one[:, None] - x_hat * along_x_hat[:, None]) * rstd[:, None]


@triton.jit
def store_partial(partial_ptr, which, total, cols, col_offs, col_mask):
    """Leaves this program's sum over its rows, ``total`` (R, C), in ``partial`` (sums, programs, cols)."""
    row = which * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial_ptr + row.to(tl.int64) * cols + col_offs, tl.sum(total, 0), mask=col_mask)
