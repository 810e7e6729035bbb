"""GELU and GELU of a sum with a bias, against eager PyTorch and torch.compile.

    python -m benchmarks.bench_gelu
    python -m benchmarks.bench_gelu --quick --dtype fp32,bf16 --table

The GELU is the one by the error function, as BERT has it.
"""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

from pytorch_ext import ops
from pytorch_ext.testing import normal

from . import op_bench
from .op_bench import Case, Tensors

FEATURES = (512, 1024, 1536, 3072, 4096)  # four times the hidden size: 128 to 1024
TOKENS = (256, 1092, 4096)
QUICK_FEATURES, QUICK_TOKENS = (512, 3072), (1092,)


def gelu(tokens: int, features: int) -> Case:
    return Case(
        "gelu",
        "gelu",
        f"{tokens} x {features}",
        lambda input: ops.gelu(input),
        lambda input: F.gelu(input),
        lambda generator: {"input": normal(generator, tokens, features)},
        # Input to output; upstream gradient and input to gradient.
        elements=(2 * tokens * features, 3 * tokens * features),
    )


def bias_gelu(tokens: int, features: int) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        return {"input": normal(generator, tokens, features), "bias": normal(generator, features)}

    return Case(
        "bias_gelu",
        "bias_gelu",
        f"{tokens} x {features}",
        lambda input, bias: ops.bias_gelu(input, bias),
        lambda input, bias: F.gelu(input + bias),
        make,
        elements=(2 * tokens * features, 3 * tokens * features),
    )


def cases(quick: bool) -> list[Case]:
    features, tokens = (QUICK_FEATURES, QUICK_TOKENS) if quick else (FEATURES, TOKENS)
    return [op(count, width) for op in (gelu, bias_gelu) for width in features for count in tokens]


def large_cases() -> list[Case]:
    """What fills a GPU; the first says most."""
    return [op(16384, width) for width in (3072, 4096) for op in (gelu, bias_gelu)]


def main(argv: list[str] | None = None) -> int:
    return op_bench.main("bench_gelu", __doc__.splitlines()[0], cases, argv)


if __name__ == "__main__":
    sys.exit(main())
