"""An encoder from a folder, and inputs to trace it with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._errors import ExportError, first_line, optional

LENGTH = 16


def loaded(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The Hugging Face encoder in ``folder``, for inference, and a batch of two: ids ``(2, seqlen)`` with their mask.

    Raises:
        ExportError: no such folder, no checkpoint in it, or a model that takes no tokens.
    """
    transformers = optional("transformers")
    if not folder.is_dir():
        raise ExportError(f"FOLDER: there is no folder {folder}")
    if not (folder / "config.json").exists():
        raise ExportError(f"FOLDER: {folder} holds no checkpoint: it has no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(folder).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"FOLDER: {folder} cannot be loaded: {first_line(error)}") from error
    if not hasattr(config, "vocab_size"):
        raise ExportError(f"FOLDER: expected a model of tokens, got {type(model).__name__}")
    return model, _example(config)


def small_bert() -> tuple[nn.Module, dict[str, Tensor]]:
    """A BERT of twelve narrow layers with random weights: its graph is that of BERT-base."""
    transformers = optional("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 96}
    config = transformers.BertConfig(vocab_size=100, max_position_embeddings=64, **sizes)
    return transformers.BertModel(config).eval(), _example(config)


def _example(config: Any) -> dict[str, Tensor]:
    length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH))
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}
