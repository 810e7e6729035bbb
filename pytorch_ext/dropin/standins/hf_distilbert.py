from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert as distilbert

from .._blocks import NO_DROPOUT
from .._embeddings import fused_embeddings, plain_embeddings
from .._encoder import has_foreign_layers, original_layer, run_layers
from .._huggingface import config_of, wanted
from .._padding import Packed
from .._padding import attention_mask as four_dimensional
from .._post_norm import PostNormParts, Sublayer, fused_layer
from . import hf_attention  # noqa: F401  (registers the attention implementation)


class PaddingFreeTransformer(distilbert.Transformer):
    removes_padding = True
    recomputes = True
    reads_padding_mask = True

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        config = config_of(self)
        if wanted("output_attentions", config, kwargs) or has_foreign_layers(self.layer):
            return super().forward(hidden_states, four_dimensional(attention_mask), **kwargs)
        padded_layers = wanted("output_hidden_states", config, kwargs)
        last = run_layers(
            self, self.layer, hidden_states, attention_mask, padded_layers=padded_layers, handed_down=kwargs
        )
        return BaseModelOutput(last_hidden_state=last)


def _parts(layer: nn.Module) -> PostNormParts:
    attention, ffn = layer.attention, layer.ffn
    return PostNormParts(
        containers=(attention, ffn),
        query=attention.q_lin,
        key=attention.k_lin,
        value=attention.v_lin,
        head_dim=attention.attention_head_size,
        attention_dropout=attention.dropout,
        attention_output=Sublayer(attention.out_lin, NO_DROPOUT, layer.sa_layer_norm),
        up=ffn.lin1,
        activation=ffn.activation,
        output=Sublayer(ffn.lin2, ffn.dropout, layer.output_layer_norm),
    )


class FusedTransformerBlock(distilbert.TransformerBlock):
    containers = (distilbert.DistilBertSelfAttention, distilbert.FFN)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed: Packed | None = None,
        **kwargs,
    ) -> Tensor:
        if not wanted("output_attentions", self.attention.config, kwargs):
            out = fused_layer(self, _parts, hidden_states, attention_mask, packed)
            if out is not None:
                return out
        return original_layer(self, super().forward, hidden_states, attention_mask, packed, **kwargs)


class FusedDistilBertEmbeddings(distilbert.Embeddings):
    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if input_ids is None or not plain_embeddings(self):
            return super().forward(input_ids, inputs_embeds, position_ids)
        if position_ids is None:
            position_ids = self.position_ids[:, : input_ids.shape[1]]
        return fused_embeddings(self, input_ids, None, position_ids)
