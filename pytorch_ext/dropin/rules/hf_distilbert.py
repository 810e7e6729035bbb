"""DistilBERT of Hugging Face's transformers: ``DistilBertModel`` and all its heads."""

from torch import nn

from .._encoder import layers_fit
from .._huggingface import config_of
from ._bert_shaped import asks_for_attentions, post_norm_rules

_MODELS = "transformers.models.distilbert.modeling_distilbert"
_STANDINS = "pytorch_ext.dropin.standins.hf_distilbert"

WEIGH_POSITIONS = [f"{_MODELS}.DistilBertForQuestionAnswering"]


def _encoder_unfit(encoder: nn.Module) -> str | None:
    unfit = asks_for_attentions(config_of(encoder)) or layers_fit(f"{_MODELS}.TransformerBlock")(encoder)
    return unfit or next(filter(None, map(_layer_unfit, encoder.layer)), None)


def _layer_unfit(layer: nn.Module) -> str | None:
    return "its config chunks the feed-forward block" if layer.ffn.chunk_size_feed_forward else None


RULES = post_norm_rules(
    _MODELS,
    _STANDINS,
    ("Transformer", "PaddingFreeTransformer"),
    ("TransformerBlock", "FusedTransformerBlock"),
    ("Embeddings", "FusedDistilBertEmbeddings"),
    encoder_unfit=_encoder_unfit,
    layer_unfit=_layer_unfit,
)
