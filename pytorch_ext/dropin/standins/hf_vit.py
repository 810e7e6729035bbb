from torch import Tensor
from transformers.models.vit import modeling_vit as vit

from .._blocks import linear_activation, query_key_value
from .._encoder import undisturbed
from .._huggingface import wanted
from .._padding import attention_mask as four_dimensional
from .._pre_norm import pre_norm_layer
from .._swap import scope


class FusedViTLayer(vit.ViTLayer):
    containers = (vit.ViTAttention, vit.ViTMLP)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        attention, mlp = self.attention, self.mlp
        three = (attention.q_proj, attention.k_proj, attention.v_proj)
        norms = (self.layernorm_before, self.layernorm_after)
        leaves = (*three, *norms, attention.o_proj, mlp.fc1, mlp.activation_fn, mlp.fc2)
        fits = undisturbed((attention, mlp), self.containers, (self.dropout,), leaves)
        with scope(self):
            if not fits or wanted("output_attentions", attention.config, kwargs):
                return super().forward(hidden_states, attention_mask, **kwargs)
            return pre_norm_layer(
                hidden_states,
                lambda x: query_key_value(self, three, attention.head_dim, x),
                lambda x: linear_activation(mlp.fc1, mlp.activation_fn, x),
                norm=self.layernorm_before,
                out=(attention.o_proj, self.dropout, self.layernorm_after),
                down=(mlp.fc2, self.dropout),
                mask=four_dimensional(attention_mask),
                dropout_p=attention.attention_dropout if attention.training else 0.0,
                scale=attention.scaling,
            )
