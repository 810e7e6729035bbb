"""Linear layers without and with GELU behind them, against eager PyTorch and torch.compile.

    python -m benchmarks.bench_linear
    python -m benchmarks.bench_linear --quick --table

Without gradients a backend may keep the weight laid out for it from the second call on; that is what is timed.
"""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

from pytorch_ext import ops
from pytorch_ext.testing import normal

from . import op_bench
from .op_bench import Case, Tensors

# (in, out): projections, Q K V as one, and the way back from the feed-forward width.
PLAIN = (
    *((128, 128), (512, 128)),
    *((256, 256), (1024, 256)),
    *((384, 384), (1536, 384)),
    *((768, 768), (768, 2304), (3072, 768)),
    *((1024, 1024), (4096, 1024)),
)
ACTIVATED = ((128, 512), (256, 1024), (384, 1536), (768, 3072), (1024, 4096))
TOKENS = (256, 1092, 4096)
QUICK_PLAIN, QUICK_ACTIVATED, QUICK_TOKENS = ((384, 384), (768, 768)), ((384, 1536),), (256,)


def linear(tokens: int, sizes: tuple[int, int], activation: str | None) -> Case:
    inward, outward = sizes

    def make(generator: torch.Generator) -> Tensors:
        return {
            "input": normal(generator, tokens, inward),
            "weight": normal(generator, outward, inward, scale=inward**-0.5),
            "bias": normal(generator, outward),
        }

    def eager(input, weight, bias) -> torch.Tensor:
        out = F.linear(input, weight, bias)
        return out if activation is None else F.gelu(out)

    row, column, matrix = tokens * inward, tokens * outward, inward * outward
    products = 2 * tokens * inward * outward
    return Case(
        "linear",
        "linear" if activation is None else "linear, gelu",
        f"{tokens} x {inward} -> {outward}",
        lambda input, weight, bias: ops.linear(input, weight, bias, activation),
        eager,
        make,
        # Input and weight to output; upstream gradient (and what GELU was applied to), input, weight to gradients.
        elements=(row + matrix + column, (1 if activation is None else 2) * column + 2 * row + 2 * matrix),
        flops=(products, 2 * products),
    )


def cases(quick: bool) -> list[Case]:
    plain, activated, tokens = (
        (QUICK_PLAIN, QUICK_ACTIVATED, QUICK_TOKENS) if quick else (PLAIN, ACTIVATED, TOKENS)
    )
    kinds = [*((sizes, None) for sizes in plain), *((sizes, "gelu") for sizes in activated)]
    return [linear(count, *kind) for kind in kinds for count in tokens]


def large_cases() -> list[Case]:
    """What fills a GPU; the first says most."""
    kinds = [((768, 3072), "gelu"), ((768, 2304), None), ((3072, 768), None), ((1024, 4096), "gelu")]
    return [linear(16384, *kind) for kind in kinds]


def main(argv: list[str] | None = None) -> int:
    return op_bench.main("bench_linear", __doc__.splitlines()[0], cases, argv)


if __name__ == "__main__":
    sys.exit(main())
