"""DeBERTa-v2 and -v3 of Hugging Face's transformers: the blocks around their attention, which stays what it is."""

from .._swap import Rule

_MODELS = "transformers.models.deberta_v2.modeling_deberta_v2"
_STANDINS = "pytorch_ext.dropin.standins.hf_deberta_v2"


def _disentangled(encoder) -> str:
    return "its attention is disentangled, and no op here computes that; so the padding stays"


RULES = [
    Rule(target=f"{_MODELS}.DebertaV2Encoder", standin="", does="", unfit=_disentangled),
    *(
        Rule(
            target=f"{_MODELS}.DebertaV2{block}",
            standin=f"{_STANDINS}:FusedDebertaV2{block}",
            does="linear, bias + dropout + residual + LayerNorm",
            ops=("linear", "dropout_add_layer_norm"),
        )
        for block in ("SelfOutput", "Output")
    ),
    Rule(
        target=f"{_MODELS}.DebertaV2Intermediate",
        standin=f"{_STANDINS}:FusedDebertaV2Intermediate",
        does="linear + activation",
        ops=("linear",),
    ),
]
