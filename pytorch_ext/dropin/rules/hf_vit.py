"""ViT of Hugging Face's transformers: ``ViTModel`` and all its heads. Images have no padding."""

from torch import nn

from .._swap import Rule
from ._bert_shaped import asks_for_attentions

_MODELS = "transformers.models.vit.modeling_vit"


def _layer_unfit(layer: nn.Module) -> str | None:
    return asks_for_attentions(layer.attention.config)


RULES = [
    Rule(
        target=f"{_MODELS}.ViTLayer",
        standin="pytorch_ext.dropin.standins.hf_vit:FusedViTLayer",
        does="fused QKV, linear + activation, bias + dropout + residual + LayerNorm",
        ops=("linear", "scaled_dot_product_attention", "dropout_add_layer_norm"),
        unfit=_layer_unfit,
    ),
]
