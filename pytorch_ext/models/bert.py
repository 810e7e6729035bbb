"""BERT in plain PyTorch (Devlin et al. 2018, arXiv 1810.04805), one class per block, read top to bottom.

Module tree, parameter names and arithmetic are those of Hugging Face's BERT, so weights load both ways. There
are no kernels of this package in here: this is the model as people write it.

Shapes: B batch, S seqlen, D hidden_size, H heads, d = D / H, F intermediate_size, V vocab_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bert_config import ACTIVATIONS, BertConfig
from .checkpoint import BertPreTrainedModel
from .input_checks import check_bert_inputs
from .outputs import BertModelOutput, EncoderOutput


class BertEmbeddings(nn.Module):
    """Sum of word, token type and position embeddings, LayerNorm, dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        position_ids = torch.arange(config.max_position_embeddings).unsqueeze(0)
        self.register_buffer("position_ids", position_ids, persistent=False)  # (1, max_position_embeddings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """``input_ids`` (B, S) or ``inputs_embeds`` (B, S, D), the others (B, S) or (1, S) -> (B, S, D)"""
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if position_ids is None:
            position_ids = self.position_ids[:, : inputs_embeds.shape[1]]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))


class BertSelfAttention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, H, S, d), for as many heads as ``x`` has: with tensor parallelism a part of them"""
        heads = x.shape[-1] // self.attention_head_size
        return x.view(*x.shape[:2], heads, self.attention_head_size).transpose(1, 2)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the context (B, S, D) and, if asked for, the attention weights (B, H, S, S), else None.

        ``attention_mask`` is 4-D as ``prepare_attention_mask`` makes it. A query without any key gives zeros.
        """
        query = self.split_heads(self.query(hidden_states))
        key = self.split_heads(self.key(hidden_states))
        value = self.split_heads(self.value(hidden_states))
        if output_attentions:
            weights = self.dropout(attention_weights(query, key, attention_mask))
            context = weights @ value
        else:
            weights = None
            dropout_p = self.dropout.p if self.training else 0.0
            context = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout_p)
        return context.transpose(1, 2).flatten(2), weights


def attention_weights(query: Tensor, key: Tensor, attention_mask: Tensor | None) -> Tensor:
    """softmax(Q Kᵀ / √d + mask) for query and key (B, H, S, d); rows without any key are zero, not NaN."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # (B, H, S, S)
    if attention_mask is None:
        return scores.softmax(dim=-1)
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    else:
        scores = scores + attention_mask
    # Filled before the softmax too: masking its NaN afterwards would leave NaN in the gradients.
    no_key = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(no_key, 0.0).softmax(dim=-1).masked_fill(no_key, 0.0)


class BertSelfOutput(nn.Module):
    """Linear, dropout, residual, LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """(B, S, D), residual (B, S, D) -> (B, S, D)"""
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertAttention(nn.Module):
    """Self-attention and its output block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """As ``BertSelfAttention.forward``."""
        context, weights = self.self(hidden_states, attention_mask, output_attentions)
        return self.output(context, hidden_states), weights


class BertIntermediate(nn.Module):
    """Linear from D to F, activation."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACTIVATIONS[config.hidden_act]()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, F)"""
        return self.intermediate_act_fn(self.dense(hidden_states))


class BertOutput(nn.Module):
    """Linear from F to D, dropout, residual, LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """(B, S, F), residual (B, S, D) -> (B, S, D)"""
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertLayer(nn.Module):
    """One encoder layer: attention, then the feed-forward block, each with its residual and LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) -> (B, S, D) and the attention weights (B, H, S, S), None unless asked for.

        ``attention_mask`` is the 4-D mask that ``BertEncoder`` has prepared.
        """
        attended, weights = self.attention(hidden_states, attention_mask, output_attentions)
        return self.output(self.intermediate(attended), attended), weights


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> EncoderOutput:
        """(B, S, D) and the mask as the user gave it, 2-D or 4-D (see ``BertModel.forward``)."""
        mask = prepare_attention_mask(attention_mask, hidden_states.dtype)
        all_hidden_states = (hidden_states,) if output_hidden_states else None
        all_attentions = () if output_attentions else None
        for layer in self.layer:
            hidden_states, weights = layer(hidden_states, mask, output_attentions)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            if output_attentions:
                all_attentions += (weights,)
        return EncoderOutput(hidden_states, all_hidden_states, all_attentions)


def prepare_attention_mask(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """From the user's mask to the one that ``F.scaled_dot_product_attention`` takes.

    A 2-D mask, 1 = real, becomes bool (B, 1, 1, S); a 4-D bool mask stays; a 4-D additive one gets ``dtype``.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        return (attention_mask != 0)[:, None, None, :]
    return attention_mask if attention_mask.dtype == torch.bool else attention_mask.to(dtype)


class BertPooler(nn.Module):
    """Linear and tanh on the first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, D) -> (B, D)"""
        return self.activation(self.dense(hidden_states[:, 0]))


class BertModel(BertPreTrainedModel):
    """The encoder with its embeddings and pooler.

    Args:
        config: sizes and rates.
        add_pooling_layer: without it ``pooler`` and ``pooler_output`` are None.
    """

    architecture = "BertModel"
    encoder_prefix = ""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.apply(self._init_weights)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BertModelOutput:
        """Encode a batch.

        Args:
            input_ids: (B, S) int64 or int32, from 0 to V - 1.
            attention_mask: (B, S) bool, int or float, 1 for real tokens, 0 for padding; or 4-D, broadcastable
                to (B, H, S, S), bool (True: attend) or float (added to the scores). None: everything is real.
            token_type_ids: (B, S) or (1, S) int; None is all 0.
            position_ids: (B, S) or (1, S) int; None is 0 to S - 1.
            inputs_embeds: (B, S, D), instead of ``input_ids``.
            output_hidden_states: also return the embeddings and every layer's output.
            output_attentions: also return the attention weights, computed by a plain softmax.
                Both are also switched on by the fields of the same name in the configuration.

        Returns:
            ``last_hidden_state`` (B, S, D), ``pooler_output`` (B, D), ``hidden_states``, ``attentions``.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``; a wrong shape; S is larger
                than max_position_embeddings and no ``position_ids`` are given.
            TypeError: a wrong dtype.
            IndexError: an id out of range, on the CPU in eager mode only: elsewhere the check costs a wait.
        """
        # The table may have grown since the config was made.
        vocab_size = self.embeddings.word_embeddings.num_embeddings
        check_bert_inputs(
            self.config, vocab_size, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encoder(
            hidden_states,
            attention_mask,
            output_hidden_states=output_hidden_states or self.config.output_hidden_states,
            output_attentions=output_attentions or self.config.output_attentions,
        )
        return BertModelOutput(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=None if self.pooler is None else self.pooler(encoded.last_hidden_state),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
