"""How the raw ops run on parts of tensors: sharding strategies for ``torch.distributed.tensor``.

A strategy names, for one dimension of the device mesh, what each rank holds of every result and argument. Rows (tokens,
sequences, heads) are shared out, what is normalised or attended over is not, and gradients of parameters are partial
sums. With dropout nothing is: the mask of a row is drawn by its place in the whole tensor. Where no strategy fits,
DTensor gathers what is missing. ``_raw.call`` imports this file when it meets the first DTensor.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

Strategy = tuple[list, list]  # placements of the results, and of the arguments
WHOLE = Replicate()
OPS = torch.ops.pytorch_ext


def together(args: tuple) -> list:
    """``args`` with plain tensors (ids, lengths, an ``rng`` that every rank has drawn alike) as replicated ones."""
    mesh = next(a.device_mesh for a in args if isinstance(a, DTensor))
    everywhere = [WHOLE] * mesh.ndim
    return [
        DTensor.from_local(a, mesh, everywhere, run_check=False)
        if isinstance(a, Tensor) and not isinstance(a, DTensor)
        else a
        for a in args
    ]


def _strategies(results: int, args: tuple, found: Iterable[tuple[list, dict[int, Any]]]) -> list[Strategy]:
    """Everything replicated, and what was ``found``: placements of the results, and of arguments by their place.

    Arguments that are not named are replicated; those that are no tensors have no placement.
    """
    tensors = [isinstance(a, torch.distributed.tensor._dtensor_spec.DTensorSpec) for a in args]
    return [
        (outs, [ins.get(i, WHOLE) if is_tensor else None for i, is_tensor in enumerate(tensors)])
        for outs, ins in [([WHOLE] * results, {}), *found]
    ]


def _optional(tensor: Any, placement: Any) -> Any:
    """Of the gradient of an optional tensor, which has no elements where there is none."""
    return WHOLE if tensor is None else placement


@register_sharding([OPS.gelu_fwd.default])
def _gelu_fwd(input, approximate, backend):
    found = (([Shard(d)], {0: Shard(d)}) for d in range(input.ndim))
    return _strategies(1, (input, approximate, backend), found)


@register_sharding([OPS.gelu_bwd.default])
def _gelu_bwd(dout, input, *rest):
    found = (([Shard(d)], {0: Shard(d), 1: Shard(d)}) for d in range(input.ndim))
    return _strategies(1, (dout, input, *rest), found)


@register_sharding([OPS.bias_gelu_fwd.default])
def _bias_gelu_fwd(input, bias, *rest):
    last = input.ndim - 1
    found = [([Shard(d)], {0: Shard(d)}) for d in range(last)]
    found.append(([Shard(last)], {0: Shard(last), 1: Shard(0)}))
    return _strategies(1, (input, bias, *rest), found)


@register_sharding([OPS.bias_gelu_bwd.default])
def _bias_gelu_bwd(dout, input, bias, *rest):
    last = input.ndim - 1
    found = [([Shard(d), Partial()], {0: Shard(d), 1: Shard(d)}) for d in range(last)]
    found.append(([Shard(last), Shard(0)], {0: Shard(last), 1: Shard(last), 2: Shard(0)}))
    return _strategies(2, (dout, input, bias, *rest), found)


@register_sharding([OPS.layer_norm_fwd.default])
def _layer_norm_fwd(input, normalized_shape, *rest):
    rows = range(input.ndim - len(normalized_shape))
    found = (([Shard(d)] * 3, {0: Shard(d)}) for d in rows)
    return _strategies(3, (input, normalized_shape, *rest), found)


@register_sharding([OPS.layer_norm_bwd.default])
def _layer_norm_bwd(dout, input, normalized_shape, weight, bias, *rest):
    parameters = [_optional(weight, Partial()), _optional(bias, Partial())]
    found = (
        ([Shard(d), *parameters], dict.fromkeys((0, 1, 5, 6), Shard(d)))
        for d in range(input.ndim - len(normalized_shape))
    )
    return _strategies(3, (dout, input, normalized_shape, weight, bias, *rest), found)


@register_sharding([OPS.dropout_add_layer_norm_fwd.default])
def _dropout_add_layer_norm_fwd(input, residual, weight, bias, input_bias, rng, *rest):
    rows = range(input.ndim - 1 if rng is None else 0)
    found = (([Shard(d)] * 4, {0: Shard(d), 1: Shard(d)}) for d in rows)
    return _strategies(4, (input, residual, weight, bias, input_bias, rng, *rest), found)


@register_sharding([OPS.dropout_add_layer_norm_bwd.default])
def _dropout_add_layer_norm_bwd(
    dout, dsum, sum, input, residual, weight, bias, input_bias, mean, rstd, rng, *rest
):
    parameters = [Partial(), _optional(bias, Partial()), _optional(input_bias, Partial())]
    found = (
        ([Shard(d), Shard(d), *parameters], dict.fromkeys((0, 1, 2, 3, 4, 8, 9), Shard(d)))
        for d in range(input.ndim - 1 if rng is None else 0)
    )
    args = (dout, dsum, sum, input, residual, weight, bias, input_bias, mean, rstd, rng, *rest)
    return _strategies(5, args, found)


@register_sharding([OPS.linear_fwd.default])
def _linear_fwd(input, weight, bias, activation, keep_preactivation, *rest):
    last = input.ndim - 1

    def outs(placement):
        return [placement, placement if keep_preactivation else WHOLE]

    found = [(outs(Shard(d)), {0: Shard(d)}) for d in range(last)]
    found.append((outs(Shard(last)), {1: Shard(0), 2: Shard(0)}))
    if activation == "none" and not keep_preactivation and bias is None:
        found.append(([Partial(), WHOLE], {0: Shard(last), 1: Shard(1)}))
    return _strategies(2, (input, weight, bias, activation, keep_preactivation, *rest), found)


@register_sharding([OPS.linear_bwd.default])
def _linear_bwd(dout, input, weight, bias, preactivation, activation, *rest):
    last = input.ndim - 1

    def kept(placement):
        return WHOLE if activation == "none" else placement

    found = [
        (
            [Shard(d), Partial(), _optional(bias, Partial())],
            {0: Shard(d), 1: Shard(d), 4: kept(Shard(d))},
        )
        for d in range(last)
    ]
    by_outputs = {0: Shard(last), 2: Shard(0), 3: Shard(0), 4: kept(Shard(last))}
    found.append(([Partial(), Shard(0), _optional(bias, Shard(0))], by_outputs))
    found.append(([Shard(last), Shard(1), WHOLE], {1: Shard(last), 2: Shard(1)}))
    return _strategies(3, (dout, input, weight, bias, preactivation, activation, *rest), found)


def _attention_dims(rng, mask) -> Iterable[tuple[int, dict, Any]]:
    """Batch and heads, as far as they may be shared out, with the mask's placement and that of its gradient."""
    for d in range(2 if rng is None else 0):
        if mask is None:
            yield d, {}, WHOLE
        elif mask.shape[d] > 1:
            yield d, {"mask": Shard(d)}, Shard(d)
        else:
            yield d, {}, Partial()


@register_sharding([OPS.scaled_dot_product_attention_fwd.default])
def _attention_fwd(query, key, value, attn_mask, rng, *rest):
    found = (
        ([Shard(d), Shard(d)], {0: Shard(d), 1: Shard(d), 2: Shard(d), 3: mask.get("mask", WHOLE)})
        for d, mask, _ in _attention_dims(rng, attn_mask)
    )
    return _strategies(2, (query, key, value, attn_mask, rng, *rest), found)


@register_sharding([OPS.scaled_dot_product_attention_bwd.default])
def _attention_bwd(
    dout, query, key, value, attn_mask, out, lse, rng, dropout_p, is_causal, scale, need_dmask, backend
):
    found = (
        (
            [Shard(d), Shard(d), Shard(d), dmask if need_dmask else WHOLE],
            {**dict.fromkeys((0, 1, 2, 3, 5, 6), Shard(d)), 4: mask.get("mask", WHOLE)},
        )
        for d, mask, dmask in _attention_dims(rng, attn_mask)
    )
    args = (
        dout,
        query,
        key,
        value,
        attn_mask,
        out,
        lse,
        rng,
        dropout_p,
        is_causal,
        scale,
        need_dmask,
        backend,
    )
    return _strategies(4, args, found)


@register_sharding([OPS.varlen_attention_fwd.default])
def _varlen_fwd(*args):
    # By heads alone: where the sequences begin is told by the tokens of all of them.
    shared = [([Shard(1), Shard(0)], dict.fromkeys((0, 1, 2), Shard(1)))] if args[7] is None else []
    return _strategies(2, args, shared)


@register_sharding([OPS.varlen_attention_bwd.default])
def _varlen_bwd(*args):
    by_heads = {**dict.fromkeys((0, 1, 2, 3, 4), Shard(1)), 5: Shard(0)}
    shared = [([Shard(1)] * 3, by_heads)] if args[10] is None else []
    return _strategies(3, args, shared)


def _ids_dims(rng, input_ids, *others) -> Iterable[tuple[Any, list]]:
    """The dimensions of the ids, with placements for other ids that broadcast to them."""
    for d in range(input_ids.ndim if rng is None else 0):
        places = []
        for ids in others:
            at = d if ids is None else d - (input_ids.ndim - ids.ndim)
            places.append(WHOLE if ids is None or at < 0 or ids.shape[at] == 1 else Shard(at))
        yield Shard(d), places


@register_sharding([OPS.embedding_layer_norm_fwd.default])
def _embedding_fwd(*args):
    input_ids, token_type_ids, position_ids, rng = args[0], args[1], args[2], args[8]
    found = (
        ([shard] * 3, {0: shard, 1: types, 2: positions})
        for shard, (types, positions) in _ids_dims(rng, input_ids, token_type_ids, position_ids)
    )
    return _strategies(3, args, found)


@register_sharding([OPS.embedding_layer_norm_bwd.default])
def _embedding_bwd(*args):
    _, input_ids, token_type_ids, position_ids, _, position, token_type, _, bias, _, _, rng, *_ = args
    gradients = [Partial(), _optional(position, Partial()), _optional(token_type, Partial())]
    gradients += [Partial(), _optional(bias, Partial())]
    found = (
        (gradients, {0: shard, 1: shard, 2: types, 3: positions, 9: shard, 10: shard})
        for shard, (types, positions) in _ids_dims(rng, input_ids, token_type_ids, position_ids)
    )
    return _strategies(5, args, found)
