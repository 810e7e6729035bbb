"""What sentence-transformers wraps a Hugging Face model in; the model itself goes by the rules of its own family."""

from torch import nn

from .._swap import Rule


def _unfit(module: nn.Module) -> str | None:
    return None if module.backend == "torch" else f"its model runs on {module.backend}, not on PyTorch"


RULES = [
    Rule(
        target="sentence_transformers.base.modules.transformer.Transformer",
        standin="pytorch_ext.dropin.standins.sentence_transformers:FlatteningTransformer",
        does="lays texts end to end where unpad_inputs=True asks for it",
        unfit=_unfit,
    ),
]
