"""GPT-2 of Hugging Face's transformers: ``GPT2Model`` and all its heads."""

from torch import nn

from .._encoder import LAYER_OPS
from .._swap import Rule
from ._bert_shaped import asks_for_attentions

_MODELS = "transformers.models.gpt2.modeling_gpt2"

# The second reads the last position where it is told no other.
WEIGH_POSITIONS = [f"{_MODELS}.GPT2ForQuestionAnswering", f"{_MODELS}.GPT2DoubleHeadsModel"]


def _block_unfit(block: nn.Module) -> str | None:
    config = block.attn.config
    if config.add_cross_attention:
        return "it has cross attention"
    if config.reorder_and_upcast_attn:
        return "its config asks for attention by a formula of its own"
    return asks_for_attentions(config)


RULES = [
    Rule(
        target=f"{_MODELS}.GPT2Block",
        standin="pytorch_ext.dropin.standins.hf_gpt2:FusedGPT2Block",
        does="padding removed in each block where no cache is filled; linear + activation, residual + LayerNorm",
        ops=LAYER_OPS,
        unfit=_block_unfit,
    ),
]
