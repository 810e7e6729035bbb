"""What a fused path would bypass: for the stand-ins as for the modules of ``pytorch_ext.nn``."""

from ..nn._bypass import (
    activation_name,
    dropout_rate,
    hooked,
    hooked_everywhere,
    plain_dropout,
    plain_embedding,
    plain_linear,
    plain_norm,
    watched,
)

__all__ = [
    "activation_name",
    "dropout_rate",
    "hooked",
    "hooked_everywhere",
    "plain_dropout",
    "plain_embedding",
    "plain_linear",
    "plain_norm",
    "watched",
]
