"""Ours: each backend by itself, without the removal of padding too, and what `auto` makes of them."""

from __future__ import annotations

from typing import Any

from torch import nn

import pytorch_ext
from pytorch_ext import backends

from ..bert_contenders import Builder, Case, hugging_face
from . import contender


def _optimized(**how: Any) -> Builder:
    def build(case: Case, dropout: float) -> nn.Module:
        return pytorch_ext.optimize(hugging_face(case, dropout=dropout), **how)

    return build


def _absent(backend: str, case: Case) -> str:
    return "; ".join(backends.why_not(backend, "layer_norm"))


def _only_ours(case: Case) -> str:
    ours = set(backends.available()) - {"reference", "native"}
    return "" if ours else "no backend but native runs here, and that stands beside it"


for _name in backends.names():
    _usual = _name != "reference"
    contender(
        _name,
        f"pytorch_ext.optimize(backend={_name!r})",
        usual=_usual,
        unless=lambda case, name=_name: _absent(name, case),
    )(_optimized(backend=_name))
    # What the kernels gain without the removal of padding.
    contender(
        f"{_name}-padded",
        f"pytorch_ext.optimize(backend={_name!r}, remove_padding=False)",
        usual=_usual and _name != "native",
        unless=lambda case, name=_name: (
            _absent(name, case) or ("" if case.fill != "100" else f"the batch has no padding: it is {name}")
        ),
    )(_optimized(backend=_name, remove_padding=False))
contender("auto", "pytorch_ext.optimize()", unless=_only_ours)(_optimized())
