"""Transformer modules: those of ``pytorch_ext.nn``, on the backend and by the padding rule of ``optimize``."""

from torch import Tensor

from ... import nn
from ...nn.multihead_attention import ATTENTIONS
from ...nn.transformer import transform
from ...nn.transformer_encoder import encode
from .._swap import options_of, scope


class FusedMultiheadAttention(nn.MultiheadAttention):
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "is_causal": is_causal}
        weights = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
        with scope(self):
            return super().forward(query, key, value, **masks, **weights)


ATTENTIONS.add(FusedMultiheadAttention)


class FusedTransformerEncoderLayer(nn.TransformerEncoderLayer):
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        with scope(self):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)


class PaddingFreeTransformerEncoder(nn.TransformerEncoder):
    removes_padding = True

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        options = options_of(self)
        rule = options.remove_padding, options.kept_because, options.recorder
        with scope(self):
            return encode(self, src, mask, src_key_padding_mask, is_causal, *rule)


class FusedTransformerDecoderLayer(nn.TransformerDecoderLayer):
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        with scope(self):
            return super().forward(tgt, memory, *masks, tgt_is_causal, memory_is_causal)


class FusedTransformerDecoder(nn.TransformerDecoder):
    calls_modules = True

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        with scope(self):
            return super().forward(tgt, memory, *masks, tgt_is_causal, memory_is_causal)


class FusedTransformer(nn.Transformer):
    calls_modules = True

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        masks = (src_mask, tgt_mask, memory_mask)
        padding = (src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask)
        hints = (src_is_causal, tgt_is_causal, memory_is_causal)
        with scope(self):
            return transform(self, src, tgt, masks, padding, hints, options_of(self).remove_padding)
