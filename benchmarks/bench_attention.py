"""Attention, dense under a padding mask and over packed sequences, against eager PyTorch and torch.compile.

    python -m benchmarks.bench_attention
    python -m benchmarks.bench_attention --quick --table

Dense batches are 60 % full, packed ones are what a batch of a fill of 27 % holds. Eager attention over packed
sequences is one call of PyTorch's function for each of them.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch.nn import functional as F

from pytorch_ext import ops
from pytorch_ext.testing import cumulative, normal, padding_mask

from . import op_bench
from .bert_contenders import LENGTHS
from .op_bench import Case, Tensors

# (batch, heads, length, head_dim): BERT-base has heads of 64, MiniLM of 32.
DENSE = (
    *((16, 12, length, 64) for length in (16, 64, 128, 256)),
    *((1, 12, 128, 64), (4, 12, 512, 64)),
    *((16, 12, length, 32) for length in (16, 64, 128, 256)),
    (4, 12, 512, 32),
)
PACKED = tuple((16, 12, length, dim) for dim in (64, 32) for length in (64, 128, 256, 512))
QUICK_DENSE, QUICK_PACKED = ((16, 12, 64, 64), (16, 12, 128, 32)), ((16, 12, 128, 64),)
# What fills a GPU: 16k tokens, all of them real or 60 %; ViT-B's 197 patches. At 16384 float64 has room for two heads.
LARGE_DENSE = (
    *((16384 // length, 12, length, 64, fill, 0.0) for length in (256, 128, 512) for fill in ("60", "100")),
    *((16384 // length, 12, length, 64, "60", 0.1) for length in (128, 256)),
    (64, 12, 197, 64, "100", 0.0),
    *((16384 // length, 12, length, 64, "100", 0.0) for length in (1024, 64)),
    *((4, 4, 4096, 64, "100", 0.0), (1, 2, 16384, 64, "100", 0.0)),
)
LARGE_PACKED = tuple((64, 12, length, 64) for length in (256, 128, 512))


def lengths_of(batch: int, length: int, fill: str) -> list[int]:
    """Real tokens per sequence: bench_bert's, stretched to this length."""
    table = LENGTHS[fill]
    return [max(1, round(table[row % len(table)] * length / max(table))) for row in range(batch)]


def dense(batch: int, heads: int, length: int, dim: int, fill: str = "60", dropout_p: float = 0.0) -> Case:
    lengths, masked = lengths_of(batch, length, fill), fill != "100"

    def make(generator: torch.Generator) -> Tensors:
        # As a linear layer leaves them: (batch, length, heads, dim), seen by head.
        made = {
            name: normal(generator, batch, length, heads, dim).transpose(1, 2)
            for name in ("query", "key", "value")
        }
        # Without a mask where nothing is padding: with one SDPA would not take its flash kernel on a GPU.
        mask = padding_mask(lengths, length)[:, None, None, :]
        return {**made, "attn_mask": mask} if masked else made

    def ours(p: float, query, key, value, attn_mask=None) -> torch.Tensor:
        return ops.scaled_dot_product_attention(query, key, value, attn_mask, p)

    def eager(p: float, query, key, value, attn_mask=None) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, p)

    with_dropout = tuple(functools.partial(function, dropout_p) for function in (ours, eager))
    every, real = batch * heads * length * dim, sum(lengths) * heads * dim
    products = 4 * length * real  # two products; what is masked need not be computed
    return Case(
        "scaled_dot_product_attention",
        "attention" if dropout_p == 0.0 else f"attention, p = {dropout_p:g}",
        f"{batch} x {heads} x {length} x {dim}" + (f", {fill} %" if fill != "60" else ""),
        functools.partial(ours, 0.0),
        functools.partial(eager, 0.0),
        make,
        # Query and real keys and values to output; those, output and upstream gradient to three gradients.
        elements=(2 * every + 2 * real, 6 * every + 2 * real),
        flops=(products, 2.5 * products),  # five products, one of them the scores once more
        training=with_dropout if dropout_p > 0.0 else None,
        sdpa={"batch": batch, "heads": heads, "length": length, "head_dim": dim, "masked": masked},
    )


def packed(batch: int, heads: int, length: int, dim: int) -> Case:
    lengths = lengths_of(batch, length, "27")
    total, longest = sum(lengths), max(lengths)

    def make(generator: torch.Generator) -> Tensors:
        made = {name: normal(generator, total, heads, dim) for name in ("query", "key", "value")}
        return {**made, "cu_seqlens": cumulative(lengths)}

    def ours(query, key, value, cu_seqlens) -> torch.Tensor:
        return ops.varlen_attention(query, key, value, cu_seqlens, cu_seqlens, longest, longest)

    def eager(query, key, value, cu_seqlens) -> torch.Tensor:
        pieces = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
        by_head = ((t.transpose(0, 1)[None] for t in piece) for piece in pieces)
        outs = [F.scaled_dot_product_attention(*piece)[0].transpose(0, 1) for piece in by_head]
        return torch.cat(outs)

    every = total * heads * dim
    products = 4 * heads * dim * sum(n * n for n in lengths)
    return Case(
        "varlen_attention",
        "varlen_attention",
        f"{batch} x {heads} x {length} x {dim}",
        ours,
        eager,
        make,
        elements=(4 * every, 8 * every),
        flops=(products, 2.5 * products),
        sdpa={"batch": 1, "heads": heads, "length": longest, "head_dim": dim, "masked": False},
    )


def cases(quick: bool) -> list[Case]:
    shapes = (QUICK_DENSE, QUICK_PACKED) if quick else (DENSE, PACKED)
    return [kind(*shape) for kind, of_kind in zip((dense, packed), shapes, strict=True) for shape in of_kind]


def large_cases() -> list[Case]:
    """What fills a GPU; the first says most."""
    padded, unpadded = (
        [kind(*shape) for shape in of_kind]
        for kind, of_kind in ((dense, LARGE_DENSE), (packed, LARGE_PACKED))
    )
    return [*padded[:2], *unpadded[:1], *padded[2:], *unpadded[1:]]


def main(argv: list[str] | None = None) -> int:
    return op_bench.main("bench_attention", __doc__.splitlines()[0], cases, argv)


if __name__ == "__main__":
    sys.exit(main())
