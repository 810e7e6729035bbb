"""ALBERT (Lan et al. 2019, arXiv 1909.11942): the layers of a group serve many times."""

from collections.abc import Iterator

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.albert import modeling_albert as albert

from .. import _bypass as bypass
from .._blocks import NO_DROPOUT
from .._embeddings import fused_embeddings, plain_embeddings
from .._encoder import has_foreign_layers, original_layer, run_layers
from .._huggingface import wanted
from .._padding import Packed
from .._padding import attention_mask as four_dimensional
from .._post_norm import PostNormParts, Sublayer, fused_layer
from . import hf_attention  # noqa: F401  (registers the attention implementation)


class PaddingFreeAlbertTransformer(albert.AlbertTransformer):
    removes_padding = True
    recomputes = True
    reads_padding_mask = True

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        groups = self.albert_layer_groups
        usual = all(type(g) is albert.AlbertLayerGroup and not bypass.hooked(g) for g in groups)
        if (
            wanted("output_attentions", self.config, kwargs)
            or not usual
            or bypass.hooked_everywhere()
            or any(has_foreign_layers(group.albert_layers) for group in groups)
        ):
            return super().forward(hidden_states, four_dimensional(attention_mask), **kwargs)
        padded_layers = wanted("output_hidden_states", self.config, kwargs)
        last = run_layers(
            self,
            self._in_turn(),
            self.embedding_hidden_mapping_in(hidden_states),
            attention_mask,
            padded_layers=padded_layers,
            handed_down=kwargs,
        )
        return BaseModelOutput(last_hidden_state=last)

    def _in_turn(self) -> Iterator[nn.Module]:
        times, groups = self.config.num_hidden_layers, self.config.num_hidden_groups
        for i in range(times):
            yield from self.albert_layer_groups[int(i / (times / groups))].albert_layers


def _parts(layer: nn.Module) -> PostNormParts:
    attention = layer.attention
    return PostNormParts(
        containers=(attention,),
        query=attention.query,
        key=attention.key,
        value=attention.value,
        head_dim=attention.attention_head_size,
        attention_dropout=attention.attention_dropout,
        attention_output=Sublayer(attention.dense, attention.output_dropout, attention.LayerNorm),
        up=layer.ffn,
        activation=layer.activation,
        output=Sublayer(layer.ffn_output, NO_DROPOUT, layer.full_layer_layer_norm),
    )


class FusedAlbertLayer(albert.AlbertLayer):
    containers = (albert.AlbertAttention,)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed: Packed | None = None,
        **kwargs,
    ) -> Tensor:
        if not wanted("output_attentions", self.config, kwargs):
            out = fused_layer(self, _parts, hidden_states, attention_mask, packed)
            if out is not None:
                return out
        return original_layer(self, super().forward, hidden_states, attention_mask, packed, **kwargs)


class FusedAlbertEmbeddings(albert.AlbertEmbeddings):
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        if input_ids is None or inputs_embeds is not None or not plain_embeddings(self):
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds)
        if position_ids is None:
            position_ids = self.position_ids[:, : input_ids.shape[1]]
        return fused_embeddings(self, input_ids, token_type_ids, position_ids)
