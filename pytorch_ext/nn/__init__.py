"""Modules over :mod:`pytorch_ext.ops`, with the constructors, parameter names and state of those they stand in for."""

from .dropout_add_layer_norm import DropoutAddLayerNorm
from .feed_forward import FeedForward
from .gelu import GELU
from .layer_norm import LayerNorm
from .multihead_attention import MultiheadAttention
from .transformer import Transformer
from .transformer_decoder import TransformerDecoder
from .transformer_decoder_layer import TransformerDecoderLayer
from .transformer_encoder import TransformerEncoder
from .transformer_encoder_layer import TransformerEncoderLayer

__all__ = [
    "GELU",
    "DropoutAddLayerNorm",
    "FeedForward",
    "LayerNorm",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
