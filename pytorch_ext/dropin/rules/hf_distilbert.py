"""DistilBERT of Hugging Face's transformers: ``DistilBertModel`` and all its heads."""

from torch import nn

from .._encoder import ENCODER_OPS, LAYER_OPS, layers_fit
from .._huggingface import config_of
from .._swap import Rule
from ._bert_shaped import EMBEDDINGS_FUSED, LAYER_FUSED, PADDING_REMOVED, asks_for_attentions

_MODELS = "transformers.models.distilbert.modeling_distilbert"
_STANDINS = "pytorch_ext.dropin.standins.hf_distilbert"

WEIGH_POSITIONS = [f"{_MODELS}.DistilBertForQuestionAnswering"]


def _encoder_unfit(encoder: nn.Module) -> str | None:
    unfit = asks_for_attentions(config_of(encoder)) or layers_fit(f"{_MODELS}.TransformerBlock")(encoder)
    return unfit or next(filter(None, map(_layer_unfit, encoder.layer)), None)


def _layer_unfit(layer: nn.Module) -> str | None:
    return "its config chunks the feed-forward block" if layer.ffn.chunk_size_feed_forward else None


RULES = [
    Rule(
        target=f"{_MODELS}.Transformer",
        standin=f"{_STANDINS}:PaddingFreeTransformer",
        does=PADDING_REMOVED,
        ops=ENCODER_OPS,
        unfit=_encoder_unfit,
    ),
    Rule(
        target=f"{_MODELS}.TransformerBlock",
        standin=f"{_STANDINS}:FusedTransformerBlock",
        does=LAYER_FUSED,
        ops=LAYER_OPS,
        unfit=_layer_unfit,
    ),
    Rule(
        target=f"{_MODELS}.Embeddings",
        standin=f"{_STANDINS}:FusedDistilBertEmbeddings",
        does=EMBEDDINGS_FUSED,
        ops=("embedding_layer_norm",),
    ),
]
