"""What stands in for the encoders and layers of Hugging Face that have BERT's shape, under whatever class names.

A family's stand-in inherits from one of these and from the class it stands in for: ``super().forward`` is the original.
"""

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .. import _encoder
from .._blocks import fused_head_transform
from .._embeddings import fused_embeddings, plain_embeddings, positions_after_padding
from .._encoder import has_foreign_layers, run_layers
from .._huggingface import wanted
from .._padding import Packed
from .._padding import attention_mask as four_dimensional
from .._post_norm import bert_parts, fused_layer
from . import hf_attention  # noqa: F401  (registers the attention implementation)


def containers(modeling, prefix: str) -> tuple[type, ...]:
    """The exact classes of the blocks of a layer, whose own ``forward`` a fused layer does not call."""
    blocks = ("Attention", "SelfAttention", "SelfOutput", "Intermediate", "Output")
    return tuple(getattr(modeling, prefix + block) for block in blocks)


class PaddingFreeEncoder:
    removes_padding = True
    recomputes = True
    reads_padding_mask = True  # which Hugging Face hands down only to an attention implementation of ours

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        if (
            encoder_hidden_states is not None
            or past_key_values is not None
            or wanted("output_attentions", self.config, kwargs)
            or has_foreign_layers(self.layer)
        ):
            return super().forward(
                hidden_states,
                four_dimensional(attention_mask),
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values,
                use_cache,
                **kwargs,
            )
        # Hidden states are recorded by hooks on the layers, which must then be called with padded tensors.
        padded_layers = wanted("output_hidden_states", self.config, kwargs)
        last = run_layers(
            self, self.layer, hidden_states, attention_mask, padded_layers=padded_layers, handed_down=kwargs
        )
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last)


class FusedLayer:
    containers: tuple[type, ...]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values=None,
        packed: Packed | None = None,
        **kwargs,
    ) -> Tensor:
        asked_for_more = (
            encoder_hidden_states is not None
            or past_key_values is not None
            or wanted("output_attentions", self.attention.self.config, kwargs)
        )
        if not asked_for_more:
            out = fused_layer(self, bert_parts, hidden_states, attention_mask, packed)
            if out is not None:
                return out
        return _encoder.original_layer(
            self,
            super().forward,
            hidden_states,
            attention_mask,
            packed,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )


class FusedEmbeddings:
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        if input_ids is None or inputs_embeds is not None or not plain_embeddings(self):
            return super().forward(
                input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length
            )
        if position_ids is None:
            position_ids = self.default_positions(input_ids, past_key_values_length)
        return fused_embeddings(self, input_ids, token_type_ids, position_ids)

    def default_positions(self, input_ids: Tensor, before: int) -> Tensor:
        return self.position_ids[:, before : before + input_ids.shape[1]]


class FusedEmbeddingsAfterPadding(FusedEmbeddings):
    """RoBERTa's, whose positions count the tokens that are no padding."""

    def default_positions(self, input_ids: Tensor, before: int) -> Tensor:
        return positions_after_padding(input_ids, self.padding_idx, before)


class FusedHeadTransform:
    def forward(self, hidden_states: Tensor) -> Tensor:
        return fused_head_transform(self, self.dense, self.transform_act_fn, self.LayerNorm, hidden_states)
