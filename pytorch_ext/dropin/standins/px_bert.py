from torch import Tensor

from ...models import bert, bert_heads
from ...models.outputs import EncoderOutput
from .._blocks import fused_head_transform
from .._embeddings import fused_embeddings, plain_embeddings
from .._encoder import has_foreign_layers, original_layer, run_layers
from .._padding import Packed
from .._post_norm import bert_parts, fused_layer


class PaddingFreeBertEncoder(bert.BertEncoder):
    removes_padding = True
    recomputes = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> EncoderOutput:
        if output_attentions or has_foreign_layers(self.layer):
            return super().forward(hidden_states, attention_mask, output_hidden_states, output_attentions)
        all_hidden_states = [hidden_states] if output_hidden_states else None
        if attention_mask is not None and attention_mask.dim() != 2:
            attention_mask = bert.prepare_attention_mask(attention_mask, hidden_states.dtype)
        last = run_layers(self, self.layer, hidden_states, attention_mask, all_hidden_states)
        return EncoderOutput(last, tuple(all_hidden_states) if output_hidden_states else None, None)


class FusedBertLayer(bert.BertLayer):
    containers = (
        bert.BertAttention,
        bert.BertSelfAttention,
        bert.BertSelfOutput,
        bert.BertIntermediate,
        bert.BertOutput,
    )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        packed: Packed | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if not output_attentions:
            out = fused_layer(self, bert_parts, hidden_states, attention_mask, packed)
            if out is not None:
                return out, None
        forward = super().forward
        return original_layer(self, forward, hidden_states, attention_mask, packed, output_attentions)


class FusedBertEmbeddings(bert.BertEmbeddings):
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        if inputs_embeds is not None or not plain_embeddings(self):
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds)
        if position_ids is None:
            position_ids = self.position_ids[:, : input_ids.shape[1]]
        return fused_embeddings(self, input_ids, token_type_ids, position_ids)


class FusedBertPredictionHeadTransform(bert_heads.BertPredictionHeadTransform):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return fused_head_transform(self, self.dense, self.transform_act_fn, self.LayerNorm, hidden_states)
