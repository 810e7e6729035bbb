"""The activation modules that Hugging Face's models share."""

from torch import nn

from .._swap import Rule


def _is_native(module: nn.Module) -> str | None:
    # A method of the module's own is its Python formula; else the function is PyTorch's.
    own = getattr(module.act, "__self__", None) is module
    return "it computes GELU by a formula of its own" if own else None


RULES = [
    Rule(
        target="transformers.activations.GELUActivation",
        standin="pytorch_ext.dropin.standins.hf_activations:FusedGELUActivation",
        does="gelu",
        ops=("gelu",),
        unfit=_is_native,
    ),
    Rule(
        target="transformers.activations.GELUTanh",
        standin="pytorch_ext.dropin.standins.hf_activations:FusedGELUTanh",
        does="gelu (tanh)",
        ops=("gelu",),
        unfit=_is_native,
    ),
    Rule(
        target="transformers.activations.NewGELUActivation",
        standin="pytorch_ext.dropin.standins.hf_activations:FusedNewGELUActivation",
        does="gelu (tanh), in one pass instead of eight",
        ops=("gelu",),
    ),
]
