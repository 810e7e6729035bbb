"""Small models with random weights, by name, to look at without a checkpoint: their graphs are those of large ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._errors import optional
from .checkpoint import example

_SIZES = {"hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 96}


class Words:
    """In place of a tokenizer: a model without training knows no words, so each of a text has an id of its own."""

    def __init__(self, vocabulary: int):
        self._vocabulary = vocabulary
        self._words: list[str] = []

    def __call__(self, text: str, return_tensors: str = "pt") -> dict[str, Tensor]:
        words = re.findall(r"\w+|[^\w\s]", text)
        self._words = list(dict.fromkeys(words))[: self._vocabulary - 1]
        known = {word: place + 1 for place, word in enumerate(self._words)}
        return {"input_ids": torch.tensor([[known.get(word, 0) for word in words]], dtype=torch.int64)}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._words[i - 1] if i else "?" for i in ids]


def bert() -> tuple[nn.Module, tuple, dict[str, Any]]:
    """Twelve layers, as BERT-base has."""
    transformers = optional("transformers")
    config = transformers.BertConfig(vocab_size=100, max_position_embeddings=64, **_SIZES)
    return transformers.BertModel(config).eval(), (), example(config)


def vit() -> tuple[nn.Module, tuple, dict[str, Any]]:
    """Twelve layers, as ViT-base has."""
    transformers = optional("transformers")
    config = transformers.ViTConfig(image_size=32, patch_size=8, **_SIZES)
    return transformers.ViTModel(config).eval(), (), example(config)


def transformer() -> tuple[nn.Module, tuple, dict[str, Any]]:
    """PyTorch's own encoder, of six layers."""
    layer = nn.TransformerEncoderLayer(48, 4, 96, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval(), (_normal(2, 16, 48),), {}


def cnn() -> tuple[nn.Module, tuple, dict[str, Any]]:
    """Three convolutions and a classifier, without attention."""
    layers = []
    for before, after in ((3, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.GELU(), nn.MaxPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*layers).eval(), (_normal(2, 3, 32, 32),), {}


SAMPLES: dict[str, Callable[[], tuple[nn.Module, tuple, dict[str, Any]]]] = {
    "bert": bert,
    "vit": vit,
    "transformer": transformer,
    "cnn": cnn,
}


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
