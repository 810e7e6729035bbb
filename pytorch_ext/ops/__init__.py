"""The public functions: checked arguments, one backend chosen, one autograd formula each."""

from . import encoder_layer as _encoder_layer  # noqa: F401  (defines its raw op, and has no public function)
from .attention import scaled_dot_product_attention
from .bias_gelu import bias_gelu
from .dropout_add_layer_norm import dropout_add_layer_norm
from .embedding_layer_norm import embedding_layer_norm
from .gelu import gelu
from .layer_norm import layer_norm
from .linear import linear
from .padding import pad_input, unpad_input
from .varlen_attention import varlen_attention

__all__ = [
    "bias_gelu",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "gelu",
    "layer_norm",
    "linear",
    "pad_input",
    "scaled_dot_product_attention",
    "unpad_input",
    "varlen_attention",
]
