"""PyTorch's own removal of padding."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..bert_contenders import Case, hugging_face
from . import contender


@contender("nested", "nn.TransformerEncoder, nested-tensor fast path", families=("bert",), trains=False)
def nested(case: Case, dropout: float) -> nn.Module:
    return NestedEncoder(case)


class NestedEncoder(nn.Module):
    """PyTorch's own removal of padding: nn.TransformerEncoder, which takes nested tensors in inference.

    The embeddings are Hugging Face's; the layers hold copies of the same weights.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        bert = hugging_face(case)
        self.embeddings = bert.embeddings
        layer = nn.TransformerEncoderLayer(
            case.hidden,
            case.heads,
            case.intermediate,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=bert.config.layer_norm_eps,
            batch_first=True,
            device=case.device,
            dtype=case.dtype,
        )
        self.encoder = nn.TransformerEncoder(layer, case.layers, enable_nested_tensor=True).eval()
        with torch.no_grad():
            for mine, theirs in zip(self.encoder.layers, bert.encoder.layer, strict=True):
                mine.load_state_dict(_as_torch_layer(theirs))

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        embedded = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*nested tensors is in prototype stage.*")
            return self.encoder(embedded, src_key_padding_mask=attention_mask == 0)


def _as_torch_layer(layer: Any) -> dict[str, torch.Tensor]:
    """A BertLayer's weights under the names of nn.TransformerEncoderLayer."""
    attention = layer.attention.self
    projections = (attention.query, attention.key, attention.value)
    named = {
        "self_attn.out_proj": layer.attention.output.dense,
        "norm1": layer.attention.output.LayerNorm,
        "linear1": layer.intermediate.dense,
        "linear2": layer.output.dense,
        "norm2": layer.output.LayerNorm,
    }
    state = {
        f"{name}.{part}": getattr(module, part)
        for name, module in named.items()
        for part in ("weight", "bias")
    }
    state["self_attn.in_proj_weight"] = torch.cat([projection.weight for projection in projections])
    state["self_attn.in_proj_bias"] = torch.cat([projection.bias for projection in projections])
    return state
