"""GPT-2: its blocks without padding where no cache of keys and values is filled, so in training rather than generation.

``GPT2Model`` runs its blocks itself, and its class has to stay: so each block takes the padding out for itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.pytorch_utils import Conv1D

from ... import ops
from ...backends import choose
from .. import _bypass as bypass
from .._blocks import needs_grad
from .._encoder import undisturbed
from .._layouts import can_lay_out, laid_out
from .._padding import note
from .._pre_norm import pre_norm_layer, where_tokens_are
from .._swap import scope
from .hf_attention import weights_recorded


class FusedGPT2Block(gpt2.GPT2Block):
    removes_padding = True
    one_of_many = True  # layers that do so each for itself
    reads_padding_mask = True
    containers = (gpt2.GPT2Attention, gpt2.GPT2MLP)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs,
    ) -> Tensor:
        attn, mlp = self.attn, self.mlp
        leaves = (self.ln_1, attn.c_attn, attn.c_proj, self.ln_2, mlp.c_fc, mlp.act, mlp.c_proj)
        dropouts = (attn.attn_dropout, attn.resid_dropout, mlp.dropout)
        if past_key_values is not None:
            note(self, "dense: it fills a cache of keys and values")
        with scope(self):
            if (
                past_key_values is not None
                or encoder_hidden_states is not None
                or weights_recorded()
                or not undisturbed((attn, mlp), self.containers, dropouts, leaves)
            ):
                return super().forward(
                    hidden_states,
                    past_key_values,
                    attention_mask,
                    encoder_hidden_states,
                    encoder_attention_mask,
                    use_cache,
                    **kwargs,
                )
            first = attn.layer_idx == 0
            packed, mask = where_tokens_are(self, hidden_states, attention_mask, kwargs, first=first)

            def project(x: Tensor) -> tuple[Tensor, ...]:
                return _conv(attn.c_attn, None, x).unflatten(-1, (3, -1, attn.head_dim)).unbind(-3)

            return pre_norm_layer(
                hidden_states,
                project,
                lambda x: _conv(mlp.c_fc, mlp.act, x),
                norm=self.ln_1,
                out=(attn.c_proj, attn.resid_dropout, self.ln_2),
                down=(mlp.c_proj, mlp.dropout),
                mask=mask,
                packed=packed,
                dropout_p=attn.attn_dropout.p if attn.training else 0.0,
                # A 4-D mask says what comes before already.
                causal=attention_mask is None or attention_mask.dim() == 2,
                scale=attn.scaling,
            )


def _conv(conv: nn.Module, activation: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    """``activation(conv(x))`` of a linear layer that holds its weight as ``(in, out)``."""
    name = None if activation is None else bypass.activation_name(activation)
    if type(conv) is Conv1D and (name is not None or activation is None):
        weight, bias = conv.weight, conv.bias
        if choose("linear", x) == "native":
            return ops.linear(x, weight.t(), bias, name)
        # A kernel of ours lays a weight out once; it has to be the same tensor in each call.
        if not needs_grad(x, weight, bias) and not torch.compiler.is_compiling() and can_lay_out(weight):
            (transposed,) = laid_out(conv, "transposed", (weight,), lambda w: (w.t().contiguous(),))
            return ops.linear(x, transposed, bias, name)
    x = conv(x)
    return x if activation is None else activation(x)
