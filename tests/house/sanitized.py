"""Runs every op of a compiled `_cpu` over odd shapes, forward and backward, with every instruction set there is here.

    python sanitized.py path/to/_cpu.so

`test_sanitizers.py` gives it a library that ends the process at the first access out of bounds. What comes out of the
ops is not looked at.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from instead import load
from torch import Tensor

from pytorch_ext import backends, ops
from pytorch_ext.testing import cumulative

SIZES = (0, 1, 3, 7, 8, 9, 15, 17, 33, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS, KEY_HEADS = 4, 2


def dense(*shape: int) -> Tensor:
    return torch.randn(shape)


def every_other(*shape: int) -> Tensor:
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


def transposed(*shape: int) -> Tensor:
    return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))


def shapes() -> Iterator[tuple[int, int]]:
    """Rows and columns: each odd size as both, as one and as the other."""
    yield from ((n, n) for n in SIZES)
    yield from ((5, n) for n in SIZES)
    yield from ((n, 24) for n in SIZES)


# --- One generator for each op: of calls with `rows` tokens of `cols` features, made of tensors by `make` ---


def gelu(make, rows, cols):
    for approximate in ("none", "tanh"):
        yield ops.gelu(make(rows, cols), approximate)


def bias_gelu(make, rows, cols):
    for approximate in ("none", "tanh"):
        yield ops.bias_gelu(make(rows, cols), make(cols), approximate)


def layer_norm(make, rows, cols):
    yield ops.layer_norm(make(rows, cols), (cols,), make(cols), make(cols))
    yield ops.layer_norm(make(2, rows, cols), (cols,))


def dropout_add_layer_norm(make, rows, cols):
    inputs = (make(rows, cols), make(rows, cols), make(cols))
    yield ops.dropout_add_layer_norm(*inputs)
    options = {"input_bias": make(cols), "dropout_p": 0.1, "prenorm": True}
    yield ops.dropout_add_layer_norm(*inputs, make(cols), **options)


def embedding_layer_norm(make, rows, cols):
    word, position, token_type = make(11, cols), make(max(rows, 1), cols), make(2, cols)
    ids, types = torch.randint(11, (2, rows)), torch.randint(2, (2, rows))
    norm = (make(cols), make(cols))
    yield ops.embedding_layer_norm(
        ids, types, torch.arange(rows), word, position, token_type, *norm, eps=1e-12
    )
    some = {"padding_idx": 0, "dropout_p": 0.1}
    yield ops.embedding_layer_norm(ids, None, None, word, None, None, *norm, eps=1e-12, **some)


def linear(make, rows, cols):
    for out, activation in ((1, None), (19, None), (17, "relu"), (32, "gelu"), (rows, "gelu_tanh")):
        yield ops.linear(make(rows, cols), make(out, cols), make(out) if out > 1 else None, activation)


def scaled_dot_product_attention(make, rows, cols):
    query = make(2, HEADS, rows, cols)
    for keys, options in (
        (rows, {"is_causal": True}),
        (rows + 2, {"attn_mask": torch.rand(2, 1, 1, rows + 2) > 0.3, "dropout_p": 0.1}),
        (7, {"attn_mask": torch.rand(rows, 7) > 0.5}),
    ):
        key, value = make(2, KEY_HEADS, keys, cols), make(2, KEY_HEADS, keys, cols)
        yield ops.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


def varlen_attention(make, rows, cols):
    for lengths, options in (([rows, 0, 2], {}), ([1, rows], {"is_causal": True, "dropout_p": 0.1})):
        query, key, value = (make(sum(lengths), heads, cols) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
        ends = cumulative(lengths)
        yield ops.varlen_attention(query, key, value, ends, ends, max(lengths), max(lengths), **options)


# --- Running them ---


def run(op: str, layout: Callable[..., Tensor], dtype: torch.dtype, rows: int, cols: int) -> int:
    """Runs forward and backward of one op at one shape; says how many calls that were."""

    def make(*shape: int) -> Tensor:
        return layout(*shape).to(dtype).requires_grad_()

    count = 0
    for result in globals()[op](make, rows, cols):
        outputs = result if isinstance(result, tuple) else (result,)
        torch.autograd.backward(outputs, [layout(*out.shape).to(dtype) for out in outputs])
        count += 1
    return count


def main(file: str) -> None:
    library = load(file)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    counts = Counter()
    with backends.use("cpu"):
        there = [op for op in backends._registry.ops() if not backends.why_not("cpu", op)]
        layouts = (dense, every_other, transposed)
        for isa, op, dtype, layout in itertools.product(library.isas(), there, DTYPES, layouts):
            library.set_isa(isa)
            print("running", isa, op, dtype, layout.__name__, file=sys.stderr)
            for rows, cols in shapes():
                counts[op] += run(op, layout, dtype, rows, cols)
    print("calls:", dict(counts))


if __name__ == "__main__":
    main(sys.argv[1])
