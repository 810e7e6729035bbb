"""Word, position and token-type embeddings, summed, normalised and dropped out."""

import torch
from torch import Tensor

from ..backends import choose
from ..backends.native.embedding_layer_norm import embedding_layer_norm as native
from . import _checks as check
from ._autocast import raised
from ._direct import direct
from ._raw import (
    apply,
    call,
    define,
    draw_rng,
    first_order,
    like_or_empty,
    none_if_absent,
    statistics_dtype,
    wants_grad,
)


def embedding_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``dropout(layer_norm(word[input_ids] + position[position_ids] + token_type[token_type_ids]))``.

    The first block of BERT (Devlin et al. 2018, arXiv 1810.04805).

    Args:
        input_ids: ``(batch, seqlen)`` or ``(total_tokens,)``, int64 or int32.
        token_type_ids, position_ids: ids that broadcast to ``input_ids``; None together with their table.
        word, position, token_type: tables ``(entries, hidden)`` of one dtype.
        weight, bias: ``(hidden,)``, of the normalisation.
        padding_idx: the row of ``word`` that gets no gradient.
        dropout_p: the probability of zeroing an element; ignored unless ``training``.

    Returns:
        ``(*input_ids.shape, hidden)`` in the dtype of ``word``.

    Raises:
        IndexError: an id outside its table (looked for on the CPU alone: a GPU would have to be waited for).
        ValueError: ``dropout_p`` outside [0, 1], ids without a table or a table without ids.
        RuntimeError: a shape, dtype or device that does not fit.
    """
    ids = (input_ids, token_type_ids, position_ids)
    options = (eps, padding_idx, dropout_p, training)
    out = direct("embedding_layer_norm", word, *ids, position, token_type, weight, bias, *options)
    if out is not None:
        return out
    check.floating("word", word)
    check.dims("word", word, 2, "(entries, hidden)")
    check.ids("input_ids", input_ids, "word", word)
    _check_table("token_type", token_type_ids, token_type, input_ids, word)
    _check_table("position", position_ids, position, input_ids, word)
    hidden = word.shape[-1:]
    check.tensor("weight", weight)
    check.norm_parameter("word", word, "weight", weight, hidden)
    check.norm_parameter("word", word, "bias", bias, hidden)
    check.probability("dropout_p", dropout_p)
    if padding_idx is not None and not -word.shape[0] <= padding_idx < word.shape[0]:
        raise ValueError(f"padding_idx: expected a row of word, which has {word.shape[0]}, got {padding_idx}")
    if not training:
        dropout_p = 0.0
    backend = choose("embedding_layer_norm", word, position, token_type, weight, bias)
    arguments = (*ids, word, position, token_type, weight, bias)
    if backend == "native":
        if torch.compiler.is_compiling():
            return native(*arguments, eps, padding_idx, dropout_p)
        try:
            return native(*arguments, eps, padding_idx, dropout_p)
        except IndexError:  # PyTorch looks at every id anyway, but does not say whose it was
            _check_values(*arguments[:6])
            raise
    _check_values(*arguments[:6])
    word, position, token_type, weight, bias = raised(word, position, token_type, weight, bias)
    rng = draw_rng(word) if dropout_p > 0.0 else None
    inputs = (
        input_ids,
        token_type_ids,
        position_ids,
        word,
        position,
        token_type,
        weight,
        bias,
        rng,
        dropout_p,
        eps,
    )
    if wants_grad(word, position, token_type, weight, bias):
        row = -1 if padding_idx is None else padding_idx % word.shape[0]
        return apply(EmbeddingLayerNormFunction, "embedding_layer_norm", *inputs, row, backend)
    return call(embedding_layer_norm_fwd, *inputs, backend)[0]


def _check_values(input_ids, token_type_ids, position_ids, word, position, token_type) -> None:
    check.ids_within("input_ids", input_ids, "word", word)
    if token_type is not None:
        check.ids_within("token_type_ids", token_type_ids, "token_type", token_type)
    if position is not None:
        check.ids_within("position_ids", position_ids, "position", position)


def _check_table(
    name: str, ids: Tensor | None, table: Tensor | None, input_ids: Tensor, word: Tensor
) -> None:
    if ids is None and table is None:
        return
    if ids is None or table is None:
        there, missing = (f"{name}_ids", name) if table is None else (name, f"{name}_ids")
        raise ValueError(f"{missing}: expected a tensor beside {there}, got None")
    check.floating(name, table)
    if not check.fits(table, word, (*table.shape[:1], *word.shape[1:])):
        check.shape(name, table, (table.shape[0] if table.dim() else 0, word.shape[1]))
        check.same_device("word", word, name, table)
        check.same_dtype("word", word, name, table)
    check.ids(f"{name}_ids", ids, name, table)
    if ids.shape == input_ids.shape:
        return
    # By hand: torch.broadcast_shapes takes tens of microseconds.
    fits = ids.dim() <= input_ids.dim() and all(
        size in (1, wanted)
        for size, wanted in zip(reversed(ids.shape), reversed(input_ids.shape), strict=False)
    )
    if not fits:
        expected = f"a shape that broadcasts to that of input_ids, {tuple(input_ids.shape)}"
        raise RuntimeError(f"{name}_ids: expected {expected}, got {tuple(ids.shape)}")


def _fwd_fake(
    input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias, rng, dropout_p, eps
):
    mean = word.new_empty(input_ids.shape, dtype=statistics_dtype(word))
    return word.new_empty(*input_ids.shape, word.shape[1]), mean, torch.empty_like(mean)


def _bwd_fake(
    dout,
    input_ids,
    token_type_ids,
    position_ids,
    word,
    position,
    token_type,
    weight,
    bias,
    mean,
    rstd,
    rng,
    dropout_p,
    padding_idx,
):
    tables = (like_or_empty(table, dout) for table in (word, position, token_type))
    return *tables, like_or_empty(weight, dout), like_or_empty(bias, dout)


embedding_layer_norm_fwd = define(
    "embedding_layer_norm_fwd(Tensor input_ids, Tensor? token_type_ids, Tensor? position_ids, Tensor word,"
    " Tensor? position, Tensor? token_type, Tensor weight, Tensor? bias, Tensor? rng, float dropout_p, float eps,"
    " str backend) -> (Tensor out, Tensor mean, Tensor rstd)",
    _fwd_fake,
)
embedding_layer_norm_bwd = define(
    "embedding_layer_norm_bwd(Tensor dout, Tensor input_ids, Tensor? token_type_ids, Tensor? position_ids,"
    " Tensor word, Tensor? position, Tensor? token_type, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " Tensor? rng, float dropout_p, int padding_idx, str backend)"
    " -> (Tensor dword, Tensor dposition, Tensor dtoken_type, Tensor dweight, Tensor dbias)",
    _bwd_fake,
)


class EmbeddingLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *inputs, dropout_p, eps, padding_idx, backend = args
        out, mean, rstd = call(embedding_layer_norm_fwd, *inputs, dropout_p, eps, backend)
        *tables, rng = inputs
        ctx.save_for_backward(*tables, mean, rstd, rng)
        ctx.dropout_p, ctx.padding_idx, ctx.backend = dropout_p, padding_idx, backend
        return out

    @staticmethod
    @first_order
    def backward(ctx, dout):
        saved = ctx.saved_tensors
        gradients = call(embedding_layer_norm_bwd, dout, *saved, ctx.dropout_p, ctx.padding_idx, ctx.backend)
        inputs = saved[3:8]  # that have gradients
        return None, None, None, *map(none_if_absent, gradients, inputs), None, None, None, None, None
