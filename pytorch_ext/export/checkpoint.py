"""An encoder from a folder, its tokenizer, and inputs to trace it with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._errors import ExportError, first_line, optional

LENGTH = 16


def loaded(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The Hugging Face encoder in ``folder``, for inference, and a batch of two: of ids with their mask, or of images.

    Raises:
        ExportError: no such folder, no checkpoint in it, or a model of something else.
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
    inputs = example(config)
    if not inputs:
        raise ExportError(f"FOLDER: expected a model of tokens or images, got {type(model).__name__}")
    return model, inputs


def tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer in ``folder``.

    Raises:
        ExportError: there is none.
    """
    try:
        return optional("transformers").AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"FOLDER: {folder} has no tokenizer for a text: {first_line(error)}") from error


def example(config: Any) -> dict[str, Tensor]:
    """Inputs for a model of this configuration; none if it takes neither tokens nor images."""
    generator = torch.Generator().manual_seed(0)
    if hasattr(config, "vocab_size"):
        length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH))
        ids = torch.randint(config.vocab_size, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        return {"input_ids": ids, "attention_mask": mask}
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return {"pixel_values": torch.randn(2, config.num_channels, size, size, generator=generator)}
    return {}
