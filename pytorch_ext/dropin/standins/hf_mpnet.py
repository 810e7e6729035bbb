"""MPNet (Song et al. 2020, arXiv 2004.09297) adds a learned bias of the distance to every score, and so needs more than
varlen attention: see ``_attention.py``."""

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet import modeling_mpnet as mpnet

from .._embeddings import fused_embeddings, plain_embeddings, positions_after_padding
from .._encoder import added_mask, has_foreign_layers, original_layer, run_layers
from .._padding import Packed
from .._post_norm import PostNormParts, Sublayer, fused_layer
from . import hf_attention  # noqa: F401  (registers the mask function)


class PaddingFreeMPNetEncoder(mpnet.MPNetEncoder):
    removes_padding = True
    recomputes = True
    reads_padding_mask = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = False,
        **kwargs,
    ) -> BaseModelOutput | tuple:
        if output_attentions or has_foreign_layers(self.layer):
            mask = added_mask(attention_mask, hidden_states)
            return super().forward(
                hidden_states, mask, output_attentions, output_hidden_states, return_dict, **kwargs
            )
        all_hidden_states = [hidden_states] if output_hidden_states else None
        bias = self.compute_position_bias(hidden_states[:1])
        last = run_layers(self, self.layer, hidden_states, attention_mask, all_hidden_states, bias=bias)
        if all_hidden_states is not None:
            all_hidden_states = tuple(all_hidden_states)
        if not return_dict:
            return (last,) if all_hidden_states is None else (last, all_hidden_states)
        return BaseModelOutput(last_hidden_state=last, hidden_states=all_hidden_states)


def _parts(layer: nn.Module) -> PostNormParts:
    attention, intermediate, output = layer.attention, layer.intermediate, layer.output
    inner = attention.attn
    return PostNormParts(
        containers=(attention, inner, intermediate, output),
        query=inner.q,
        key=inner.k,
        value=inner.v,
        head_dim=inner.attention_head_size,
        attention_dropout=inner.dropout,
        attention_output=Sublayer(inner.o, attention.dropout, attention.LayerNorm),
        up=intermediate.dense,
        activation=intermediate.intermediate_act_fn,
        output=Sublayer(output.dense, output.dropout, output.LayerNorm),
    )


class FusedMPNetLayer(mpnet.MPNetLayer):
    containers = (mpnet.MPNetAttention, mpnet.MPNetSelfAttention, mpnet.MPNetIntermediate, mpnet.MPNetOutput)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        packed: Packed | None = None,
        **kwargs,
    ) -> tuple[Tensor, ...]:
        if not output_attentions:
            out = fused_layer(self, _parts, hidden_states, attention_mask, packed, position_bias)
            if out is not None:
                return (out,)
        return original_layer(
            self,
            super().forward,
            hidden_states,
            attention_mask,
            packed,
            position_bias,
            output_attentions,
            as_mask=added_mask,
            **kwargs,
        )


class FusedMPNetEmbeddings(mpnet.MPNetEmbeddings):
    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        if input_ids is None or inputs_embeds is not None or not plain_embeddings(self):
            return super().forward(input_ids, position_ids, inputs_embeds, **kwargs)
        if position_ids is None:
            position_ids = positions_after_padding(input_ids, self.padding_idx)
        return fused_embeddings(self, input_ids, None, position_ids)
