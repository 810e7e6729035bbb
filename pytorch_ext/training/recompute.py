"""Less memory for more time: activations that are computed once more in the backward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..dropin._recompute import KINDS, selective_contexts
from ..dropin._swap import all_swapped, options_of, reconfigure

if TYPE_CHECKING:
    from torch import nn

__all__ = ["recompute", "selective_contexts"]


def recompute(model: nn.Module, what: str | None = "layers") -> nn.Module:
    """Says what the optimised encoders in ``model`` keep of their layers for the backward pass, from now on.

    Gradients stay what they were, with dropout too: the second time draws the masks of the first. Under
    ``torch.compile`` it says where the compiler divides the graph of both passes; say it before compiling. There
    ``"selective"`` keeps what an activation makes of a product, where a kernel of ours computes both at once.

    Args:
        model: optimised, with an encoder of BERT's kind (BERT, RoBERTa, ELECTRA, DistilBERT, ALBERT, MPNet, …).
        what: ``"layers"``: the input of each layer is kept, and the whole layer runs once more. ``"selective"``:
            results of matrix products and attention are kept too, and what is cheap (norms, activations, dropout,
            sums) runs once more. None: all is kept, as without this call.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown ``what``; no optimised encoder of that kind. Others take
            ``torch.utils.checkpoint`` or Hugging Face's checkpointing, with ``selective_contexts`` for ``context_fn``.
    """
    if what is not None and what not in KINDS:
        raise ValueError(f"what: expected 'layers', 'selective' or None, got {what!r}")
    encoders = [m for _, m in all_swapped(model) if getattr(m, "recomputes", False)]
    if not encoders:
        raise ValueError(f"model: expected an optimised encoder of BERT's kind, got {type(model).__name__}")
    for encoder in encoders:
        reconfigure(encoder, replace(options_of(encoder), recompute=what))
    return model
