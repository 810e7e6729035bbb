"""Dropout masks from Philox4x32-10 (Salmon et al. 2011), bit for bit those of ``reference``.

One counter gives four neighbouring columns their words, so a block of columns draws a quarter as many counters and
lays the four words beside each other. Counters are uint32: with 64-bit ones ``tl.philox`` is another generator.
"""

import triton
import triton.language as tl


def dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """``(threshold, scale)`` as the kernels take them: a word below the threshold drops its element.

    The threshold is a uint32 in the clothes of an int32, so that its type does not depend on its value. 2**32 does not
    fit; the scale is zero then, which drops everything.
    """
    threshold = round(dropout_p * 2**32)
    if threshold == 2**32:
        return -1, 0.0
    return threshold - 2**32 if threshold >= 2**31 else threshold, 1.0 / (1.0 - dropout_p)


@triton.jit
def keep_rows(rng_ptr, threshold, scale, rows, first_col, BLOCK_COLS: tl.constexpr):
    """Which elements of a matrix dropout keeps: bool ``(len(rows), BLOCK_COLS)``.

    ``first_col`` is a multiple of four, and so is ``BLOCK_COLS``.
    """
    rows = rows.to(tl.int64)
    low = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (rows >> 32).to(tl.uint32)[:, None]
    return _keep(rng_ptr, threshold, scale, first_col, low, high, BLOCK_COLS)


@triton.jit
def keep_attention(rng_ptr, threshold, scale, queries, head, first_key, BLOCK_KEYS: tl.constexpr):
    """Which attention weights dropout keeps: bool ``(len(queries), BLOCK_KEYS)``.

    ``queries`` are counted within their sequence, ``head`` is ``b * query_heads + h``; ``first_key`` is a multiple of
    four, and so is ``BLOCK_KEYS``.
    """
    query = queries.to(tl.uint32)[:, None]
    return _keep(rng_ptr, threshold, scale, first_key, query, query * 0 + head.to(tl.uint32), BLOCK_KEYS)


@triton.jit
def dropped(x, keep, scale):
    """``x / (1 - p)`` where kept, else zero."""
    return tl.where(keep, x * scale, 0.0)


@triton.jit
def _keep(rng_ptr, threshold, scale, first_col, middle_low, middle_high, BLOCK_COLS: tl.constexpr):
    seed = tl.load(rng_ptr)
    offset = (tl.load(rng_ptr + 1) & 0xFFFFFFFF).to(tl.uint32)
    group = ((first_col >> 2) + tl.arange(0, BLOCK_COLS // 4)).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = tl.philox(seed, group, middle_low, middle_high, middle_low * 0 + offset)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words >= threshold.to(tl.uint32, bitcast=True)) & (scale > 0.0)
