"""torch.compile of Hugging Face's default, in the modes that a user would try."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..bert_contenders import Case, hugging_face
from . import contender, model_with


@contender("compile", "torch.compile of the default, mode='default'")
def compiled(case: Case, dropout: float) -> nn.Module:
    return torch.compile(hugging_face(case, dropout=dropout))


@contender("max-autotune", "torch.compile of the default, mode='max-autotune'", usual=False)
def max_autotune(case: Case, dropout: float) -> nn.Module:
    return torch.compile(hugging_face(case, dropout=dropout), mode="max-autotune")


@contender(
    "reduce-overhead",
    "torch.compile of the default, mode='reduce-overhead' (CUDA graphs)",
    devices=("cuda",),
    usual=False,
)
def reduce_overhead(case: Case, dropout: float) -> nn.Module:
    return torch.compile(hugging_face(case, dropout=dropout), mode="reduce-overhead")


@contender(
    "compile-frozen",
    "torch.compile of the default with inductor's freezing: weights become constants, laid out for oneDNN",
    devices=("cpu",),
    trains=False,
    usual=False,
)
def frozen(case: Case, dropout: float) -> nn.Module:
    return model_with(torch.compile(hugging_face(case)), _freezing)


@contextlib.contextmanager
def _freezing() -> Iterator[None]:
    from torch._inductor import config

    with config.patch(freezing=True), torch.no_grad():
        yield
