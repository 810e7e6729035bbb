"""MPNet of Hugging Face's transformers: ``MPNetModel`` and all its heads."""

from torch import nn

from .._encoder import ENCODER_OPS, layers_fit
from .._swap import Rule
from ._bert_shaped import EMBEDDINGS_FUSED, LAYER_FUSED, PADDING_REMOVED, asks_for_attentions

_MODELS = "transformers.models.mpnet.modeling_mpnet"
_STANDINS = "pytorch_ext.dropin.standins.hf_mpnet"

WEIGH_POSITIONS = [f"{_MODELS}.MPNetForQuestionAnswering"]


def _encoder_unfit(encoder: nn.Module) -> str | None:
    return asks_for_attentions(encoder.config) or layers_fit(f"{_MODELS}.MPNetLayer")(encoder)


RULES = [
    Rule(
        target=f"{_MODELS}.MPNetEncoder",
        standin=f"{_STANDINS}:PaddingFreeMPNetEncoder",
        does=PADDING_REMOVED,
        ops=ENCODER_OPS,
        unfit=_encoder_unfit,
    ),
    Rule(
        target=f"{_MODELS}.MPNetLayer",
        standin=f"{_STANDINS}:FusedMPNetLayer",
        does=f"{LAYER_FUSED}; attention with its bias of distances, sequence by sequence",
        ops=("linear", "scaled_dot_product_attention", "dropout_add_layer_norm"),
    ),
    Rule(
        target=f"{_MODELS}.MPNetEmbeddings",
        standin=f"{_STANDINS}:FusedMPNetEmbeddings",
        does=EMBEDDINGS_FUSED,
        ops=("embedding_layer_norm",),
    ),
]
