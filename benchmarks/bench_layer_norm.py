"""LayerNorm, alone and with what stands before it in BERT, against eager PyTorch and torch.compile.

    python -m benchmarks.bench_layer_norm
    python -m benchmarks.bench_layer_norm --quick --dtype fp32,bf16 --table

Dropout is compared at a probability of 0, because each contender draws its own, and timed in training alone.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch.nn import functional as F

from pytorch_ext import ops
from pytorch_ext.testing import normal

from . import op_bench
from .bert_contenders import VOCABULARY
from .op_bench import Case, Tensors

HIDDEN = (128, 256, 384, 768, 1024, 4096)
EMBEDDED = (128, 384, 768, 1024)  # the table of words is 30522 rows of it, and gets a gradient as large
TOKENS = (256, 1092, 4096)  # 1092: what 16 sequences of at most 256 hold at a fill of 27 %
QUICK_HIDDEN, QUICK_EMBEDDED, QUICK_TOKENS = (128, 768), (128,), (1092,)
POSITIONS = 512
EPS = 1e-12  # BERT's
DROPOUT = 0.1


def parameters(generator: torch.Generator, hidden: int) -> Tensors:
    return {"weight": normal(generator, hidden) + 1.0, "bias": normal(generator, hidden)}


def layer_norm(tokens: int, hidden: int) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        return {"input": normal(generator, tokens, hidden), **parameters(generator, hidden)}

    return Case(
        "layer_norm",
        "layer_norm",
        f"{tokens} x {hidden}",
        lambda input, weight, bias: ops.layer_norm(input, (hidden,), weight, bias, EPS),
        lambda input, weight, bias: F.layer_norm(input, (hidden,), weight, bias, EPS),
        make,
        # Input to output; upstream gradient and input to gradient. The parameters are one row.
        elements=(2 * tokens * hidden, 3 * tokens * hidden),
    )


def add_layer_norm(tokens: int, hidden: int, dropout_p: float) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        rows = {name: normal(generator, tokens, hidden) for name in ("input", "residual")}
        return {**rows, "input_bias": normal(generator, hidden), **parameters(generator, hidden)}

    def ours(p: float, input, residual, input_bias, weight, bias) -> torch.Tensor:
        return ops.dropout_add_layer_norm(
            input, residual, weight, bias, input_bias=input_bias, dropout_p=p, eps=EPS
        )

    def eager(p: float, input, residual, input_bias, weight, bias) -> torch.Tensor:
        x = input + input_bias
        if p > 0.0:
            x = F.dropout(x, p)
        return F.layer_norm(residual + x, (hidden,), weight, bias, EPS)

    with_dropout = tuple(functools.partial(function, dropout_p) for function in (ours, eager))
    return Case(
        "dropout_add_layer_norm",
        f"dropout_add_layer_norm, p = {dropout_p:g}",
        f"{tokens} x {hidden}",
        functools.partial(ours, 0.0),
        functools.partial(eager, 0.0),
        make,
        # Input and residual to output; upstream gradient and sum to one gradient, or with dropout to two.
        elements=(3 * tokens * hidden, (4 if dropout_p > 0.0 else 3) * tokens * hidden),
        training=with_dropout if dropout_p > 0.0 else None,
    )


def embedding_layer_norm(tokens: int, hidden: int) -> Case:
    tables = {"word": VOCABULARY, "position": POSITIONS, "token_type": 2}

    def make(generator: torch.Generator) -> Tensors:
        return {
            "input_ids": torch.randint(VOCABULARY, (tokens,), generator=generator),
            "token_type_ids": torch.randint(2, (tokens,), generator=generator),
            "position_ids": torch.arange(tokens) % min(POSITIONS, 256),
            **{name: normal(generator, rows, hidden) for name, rows in tables.items()},
            **parameters(generator, hidden),
        }

    def eager(
        input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias
    ) -> torch.Tensor:
        x = F.embedding(input_ids, word) + F.embedding(token_type_ids, token_type)
        x = x + F.embedding(position_ids, position)
        return F.layer_norm(x, (hidden,), weight, bias, EPS)

    return Case(
        "embedding_layer_norm",
        "embedding_layer_norm",
        f"{tokens} x {hidden}",
        lambda **tensors: ops.embedding_layer_norm(**tensors, eps=EPS),
        eager,
        make,
        # Rows of words to output (the other tables stay in the cache); upstream gradient and rows to dense gradients.
        elements=(2 * tokens * hidden, (2 * tokens + sum(tables.values())) * hidden),
    )


def cases(quick: bool) -> list[Case]:
    tokens = QUICK_TOKENS if quick else TOKENS
    shapes = [(count, hidden) for hidden in (QUICK_HIDDEN if quick else HIDDEN) for count in tokens]
    embedded = [(count, hidden) for hidden in (QUICK_EMBEDDED if quick else EMBEDDED) for count in tokens]
    return [
        *(layer_norm(*shape) for shape in shapes),
        *(add_layer_norm(*shape, p) for p in (0.0, DROPOUT) for shape in shapes),
        *(embedding_layer_norm(*shape) for shape in embedded),
    ]


def large_cases() -> list[Case]:
    """What fills a GPU; the first says most."""
    return [
        *(layer_norm(32768, hidden) for hidden in (768, 1024)),
        *(add_layer_norm(16384, 768, p) for p in (DROPOUT, 0.0)),
        *(layer_norm(tokens, hidden) for tokens, hidden in ((32768, 4096), (16384, 8192))),
        embedding_layer_norm(16384, 768),
        add_layer_norm(16384, 1024, DROPOUT),
        layer_norm(3152, 768),  # what 16 pictures are for ViT-B
    ]


def main(argv: list[str] | None = None) -> int:
    return op_bench.main("bench_layer_norm", __doc__.splitlines()[0], cases, argv)


if __name__ == "__main__":
    sys.exit(main())
