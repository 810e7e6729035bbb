"""``unpad_inputs=True`` without flash-attn: sentence-transformers then lays the texts of a batch end to end.

By itself it does so for flash-attn alone, which has to be asked for by name and runs on GPUs. Nothing of this is kept
in the module: what it held when it was loaded is what it holds after ``revert``.
"""

import copyreg

from sentence_transformers.base.modules import transformer
from transformers import DataCollatorWithFlattening

from .._huggingface import NAME


class _FirstPosition:
    """The position id of a text's first token, unless the module has one of its own."""

    def __get__(self, module, owner=None) -> int:
        return module._infer_flatten_position_offset()


class _SavedAsOriginal(type(transformer.Transformer)):
    """``save_pretrained`` writes down where a module's class is from, and loads no class that is from elsewhere.

    So the class says that it is from where its original is. A pickle, which would look for it there, calls a function.
    """


class FlatteningTransformer(transformer.Transformer, metaclass=_SavedAsOriginal):
    __module__ = transformer.Transformer.__module__
    calls_modules = True
    data_collator = DataCollatorWithFlattening(
        return_position_ids=True, return_seq_idx=True, return_flash_attn_kwargs=True
    )
    _flatten_position_offset = _FirstPosition()

    @property
    def can_flatten_inputs(self) -> bool:
        # Only where it was asked for: a flattened batch has no attention mask, which output_value="token_embeddings"
        # and modules of a user's own may read, and a padded one loses its padding in the encoder anyway.
        return (bool(self._unpad_inputs) and _attends_flattened(self)) or self.__dict__["can_flatten_inputs"]

    @can_flatten_inputs.setter
    def can_flatten_inputs(self, value: bool) -> None:
        # What is kept outlives revert, so it is never what our attention alone makes true.
        self.__dict__["can_flatten_inputs"] = value and not _attends_flattened(self)

    def _can_flatten_inputs(self) -> bool:
        return _attends_flattened(self) or super()._can_flatten_inputs()


def _attends_flattened(module: transformer.Transformer) -> bool:
    """Whether the model attends by our implementation, and nothing else that it does needs one row per text."""
    model = module.model
    return (
        module.config._attn_implementation == NAME
        and module.transformer_task in ("feature-extraction", "fill-mask")
        and "text" in module.modality_config
        and all(call["method"] == "forward" for call in module.modality_config.values())
        and module.model_forward_params is None  # else where the texts begin would not reach the attention
        and getattr(model, "is_backend_compatible", bool)()
    )


def _standin() -> type[FlatteningTransformer]:
    return FlatteningTransformer


copyreg.pickle(_SavedAsOriginal, lambda cls: (_standin, ()))
