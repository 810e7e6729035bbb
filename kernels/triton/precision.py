"""What is loaded is widened, what is computed is float32, what is stored is rounded: this does both ends.

They hide two defects of Triton's interpreter, which takes bfloat16 for integers in arithmetic and cuts off bits where
it should round.
"""

import os

import triton
import triton.language as tl

# Triton reads the switch when a kernel is decorated, so it cannot change later.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRET = tl.constexpr(INTERPRETED)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """``x`` (float32) in ``dtype``, rounded to the nearest, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        even = tl.where(x != x, 0x7FC00000, even)
        return (even >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def stored(ptr, x, mask):
    """Stores ``x`` (float32) in the dtype behind ``ptr``."""
    tl.store(ptr, narrowed(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def loaded(ptr, mask):
    """What is behind ``ptr`` as float32, zero where ``mask`` is not."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def product(a, b, acc):
    """``acc + a @ b``: operands of one dtype, accumulated in float32; float32 itself is not rounded to TF32."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
