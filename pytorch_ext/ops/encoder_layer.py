"""A whole layer of an encoder as one op, for inference: where a backend has it, the host pays for one call.

No other backend needs it, and there is no backward: who calls it (:mod:`pytorch_ext.nn`) can run the layer op by op.
"""

from torch import Tensor

from ..backends import offered, why_not
from ._direct import direct
from ._raw import call, define


def backend_of(tokens: Tensor, heads: int, head_dim: int) -> str | None:
    """The backend that would run a layer on ``tokens`` ``(total_tokens, hidden)`` as one op; None if none would."""
    backend = offered("encoder_layer", tokens)
    if backend is None:
        return None
    like = tokens.new_empty(tokens.shape[0], heads, head_dim)
    return None if why_not(backend, "varlen_attention", like, like, like) else backend


def encoder_layer(*arguments: Tensor | list[Tensor] | str | float | None) -> Tensor:
    """One layer on unpadded tokens; the arguments are those of the raw op, which say what they are by their names.

    The last is the backend, as :func:`backend_of` found it. ``in_weights`` and ``in_biases`` are three, of Q, K and V,
    or one, with the rows of all.
    """
    return call(encoder_layer_fwd, *arguments)


def encoder_layer_direct(
    tokens: Tensor, *arguments: Tensor | list[Tensor] | str | float | None
) -> Tensor | None:
    """The same without the backend, and with all checks; None where there is no short way for it.

    ``tokens`` may be ``(batch, seqlen, hidden)``: without ``cu_seqlens`` all sequences have ``max_seqlen`` tokens.
    """
    return direct("encoder_layer", tokens, *arguments)


def _fwd_fake(input, *others):
    return input.new_empty(input.shape)


encoder_layer_fwd = define(
    "encoder_layer_fwd(Tensor input, Tensor[] in_weights, Tensor[] in_biases, Tensor out_weight, Tensor out_bias,"
    " Tensor norm1_weight, Tensor? norm1_bias, Tensor up_weight, Tensor up_bias, Tensor down_weight, Tensor down_bias,"
    " Tensor norm2_weight, Tensor? norm2_bias, Tensor cu_seqlens, SymInt max_seqlen, int heads, str activation,"
    " bool is_causal, float scale, float eps1, float eps2, str backend) -> Tensor",
    _fwd_fake,
)
