"""Hugging Face's model as it comes, with each attention that it and PyTorch have."""

from __future__ import annotations

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..bert_contenders import BASELINE, Case, hugging_face
from . import contender, model_with


@contender(BASELINE, "Hugging Face default (SDPA attention)", package="transformers")
def default(case: Case, dropout: float) -> nn.Module:
    return hugging_face(case, dropout=dropout)


@contender("eager-attention", "Hugging Face, attn_implementation='eager'")
def eager_attention(case: Case, dropout: float) -> nn.Module:
    return hugging_face(case, attention="eager", dropout=dropout)


@contender(
    "flex", "Hugging Face, attn_implementation='flex_attention', which it compiles", trains=False, usual=False
)
def flex(case: Case, dropout: float) -> nn.Module:
    return hugging_face(case, attention="flex_attention", dropout=dropout)


def _forced(kernel: SDPBackend) -> None:
    name = kernel.name.removesuffix("_ATTENTION").lower()
    both = kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)

    @contender(
        f"sdpa-{name}",
        f"Hugging Face default, SDPA's {kernel.name} forced",
        devices=("cpu", "cuda") if both else ("cuda",),
        usual=False,
    )
    def forced(case: Case, dropout: float) -> nn.Module:
        return model_with(hugging_face(case, dropout=dropout), lambda: sdpa_kernel([kernel]))


for _kernel in (
    SDPBackend.MATH,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
):
    _forced(_kernel)
