"""ModernBERT (Warner et al. 2024, arXiv 2412.13663): rotary positions, windows in most layers, a gated feed-forward.

``ModernBertModel`` runs its layers itself, and its class has to stay: so each layer takes the padding out for itself.
"""

from torch import Tensor
from transformers.models.modernbert import modeling_modernbert as modernbert

from .._blocks import NO_DROPOUT, linear_activation
from .._encoder import undisturbed
from .._huggingface import wanted
from .._pre_norm import at_tokens, pre_norm_layer, rotated, where_tokens_are
from .._swap import scope
from . import hf_attention  # noqa: F401  (registers the attention implementation)


class FusedModernBertEncoderLayer(modernbert.ModernBertEncoderLayer):
    removes_padding = True
    one_of_many = True  # layers that do so each for itself
    reads_padding_mask = True
    containers = (modernbert.ModernBertAttention, modernbert.ModernBertMLP)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        attn, mlp = self.attn, self.mlp
        fits = position_embeddings is not None and undisturbed(
            (attn, mlp),
            self.containers,
            (attn.out_drop,),
            (self.attn_norm, attn.Wqkv, attn.Wo, self.mlp_norm, mlp.Wi, mlp.act, mlp.drop, mlp.Wo),
        )
        with scope(self):
            if not fits or wanted("output_attentions", self.config, kwargs):
                return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)
            first = self.config.layer_types.index(self.attention_type) == self.layer_idx
            packed, mask = where_tokens_are(self, hidden_states, attention_mask, kwargs, first=first)
            # A 4-D mask says what lies within the window already.
            said = attention_mask is not None and attention_mask.dim() != 2
            window = None if said or attn.sliding_window is None else attn.sliding_window - 1
            cos, sin = (at_tokens(t, packed, hidden_states)[..., None, None, :] for t in position_embeddings)

            def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                qkv = linear_activation(attn.Wqkv, None, x).unflatten(-1, (3, -1, attn.head_dim))
                return (*rotated(qkv[..., :2, :, :], cos, sin).unbind(-3), qkv[..., 2, :, :])

            def feed_forward(x: Tensor) -> Tensor:
                up, gate = linear_activation(mlp.Wi, None, x).chunk(2, -1)
                return mlp.drop(mlp.act(up) * gate)

            return pre_norm_layer(
                hidden_states,
                project,
                feed_forward,
                norm=self.attn_norm,
                out=(attn.Wo, attn.out_drop, self.mlp_norm),
                down=(mlp.Wo, NO_DROPOUT),
                mask=mask,
                packed=packed,
                dropout_p=attn.attention_dropout if attn.training else 0.0,
                window=window,
            )


class FusedModernBertPredictionHead(modernbert.ModernBertPredictionHead):
    def forward(self, hidden_states: Tensor) -> Tensor:
        with scope(self):
            return self.norm(linear_activation(self.dense, self.act, hidden_states))
