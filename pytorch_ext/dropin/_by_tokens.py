"""Sequence parallelism without padding: between the products of a layer each rank has a part of the tokens.

Korthikanti et al. 2022 (arXiv 2205.05198), over the tokens of all sequences laid end to end instead of over positions.
Heads and features are shared out as ``training.tensor_parallel`` shares them; where it sums, parts of the sums are
scattered, and sums, dropout and LayerNorm work on the rank's own tokens. One gather serves queries, keys and values.

Shapes: T tokens of the batch, t of this rank, E hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import ops
from ..nn._blocks import activated
from . import _bypass as bypass
from ._attention import attend
from ._padding import Packed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

    from ._post_norm import PostNormParts, Sublayer

# Encoder -> the devices that share its tokens. A copy or a pickle of the encoder has what tensor parallelism does.
_meshes: WeakKeyDictionary[nn.Module, DeviceMesh] = WeakKeyDictionary()


def share_tokens(encoder: nn.Module, mesh: DeviceMesh) -> None:
    """From now on the ranks of ``mesh`` share the tokens of ``encoder``, whose layers are tensor-parallel over it."""
    _meshes[encoder] = mesh


def shared(
    encoder: nn.Module, x: Tensor, packed: Packed | None, mask: Tensor | None
) -> tuple[Tensor, Packed | None]:
    """This rank's part of the tokens, and where all of them are; what came, where they are not to be shared.

    A batch without padding becomes tokens, too. With a ``mask`` of dense attention, and under a compiler, nothing is
    shared.
    """
    if mask is not None or torch.compiler.is_compiling():
        return x, packed
    mesh = _meshes.get(encoder)
    if mesh is None:
        return x, packed
    if packed is None:
        batch, seqlen, _ = x.shape
        real = torch.ones(batch, seqlen, dtype=torch.bool, device=x.device)
        at = torch.arange(batch * seqlen, device=x.device)
        starts = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=x.device)
        x, packed = x.flatten(0, 1), Packed(real, at, starts, seqlen, [seqlen] * batch)
    packed = Shared(packed, mesh, x.shape[0])
    return packed.part(x), packed


class Shared(Packed):
    """Where the real tokens are, of which this rank has a part; what is padded is whole on every rank."""

    def __init__(self, packed: Packed, mesh: DeviceMesh, total: int) -> None:
        super().__init__(packed.mask, packed.indices, packed.cu_seqlens, packed.max_seqlen, packed.lengths)
        self.mesh, self.total, self.unshared = mesh, total, packed

    def unpad(self, x: Tensor) -> Tensor:
        return self.part(super().unpad(x))

    def pad(self, tokens: Tensor) -> Tensor:
        return super().pad(self.whole(tokens))

    def part(self, x: Tensor) -> Tensor:
        """(T, E), the same on every rank -> (t, E)"""
        from torch.distributed.tensor import Replicate, Shard

        return self._moved(x, Replicate(), Shard(0), Shard(0))

    def whole(self, x: Tensor) -> Tensor:
        """(t, E) -> (T, E), for what every rank does alike."""
        from torch.distributed.tensor import Replicate, Shard

        return self._moved(x, Shard(0), Replicate(), Replicate())

    def gathered(self, x: Tensor) -> Tensor:
        """(t, E) -> (T, E), for products with other weights on each rank: their gradients are summed."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        return self._moved(x, Shard(0), Replicate(), Partial())

    def scattered(self, x: Tensor) -> Tensor:
        """(T, E), of which the sum over the ranks is meant -> (t, E)"""
        from torch.distributed.tensor import Partial, Shard

        return self._moved(x, Partial(), Shard(0), Shard(0))

    def everywhere(self, parameter: Tensor | None) -> Tensor | None:
        """A parameter that is the same on every rank, and meets other tokens on each: its gradients are summed."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if parameter is None:
            return None
        if isinstance(parameter, DTensor):
            parameter = parameter.to_local()
        alike = DTensor.from_local(parameter, self.mesh, [Replicate()], run_check=False)
        return alike.to_local(grad_placements=[Partial()])

    def _moved(self, x: Tensor, before: Placement, after: Placement, gradient: Placement) -> Tensor:
        from torch.distributed.tensor import DTensor

        size = torch.Size((self.total, x.shape[1]))
        # Told the size, because ranks may have unequal parts.
        x = DTensor.from_local(
            x.contiguous(), self.mesh, [before], run_check=False, shape=size, stride=(size[1], 1)
        )
        return x.redistribute(placements=[after]).to_local(grad_placements=[gradient])


def fits(parts: PostNormParts) -> bool:
    """Whether the modules of a layer are as ``tensor_parallel`` left them, so that their weights tell all."""
    columns = (parts.query, parts.key, parts.value, parts.up)
    rows = (parts.attention_output.dense, parts.output.dense)
    return (
        all(_is_split(module, 0) for module in columns)
        and all(_is_split(module, 1) for module in rows)
        and all(map(bypass.plain_norm, (parts.attention_output.norm, parts.output.norm)))
    )


def layer_by_tokens(parts: PostNormParts, x: Tensor, packed: Shared) -> Tensor:
    """One layer on this rank's tokens (t, E) -> (t, E)."""
    tokens = packed.gathered(x)
    three = (parts.query, parts.key, parts.value)
    q, k, v = (_product(m, tokens).unflatten(-1, (-1, parts.head_dim)) for m in three)
    rate = parts.attention_dropout
    context = attend(q, k, v, None, packed.unshared, bypass.dropout_rate(rate) if rate.training else 0.0)
    x = _residual_norm(parts.attention_output, context, x, packed)
    hidden = _product(parts.up, packed.gathered(x), parts.activation)
    return _residual_norm(parts.output, hidden, x, packed)


def _residual_norm(sublayer: Sublayer, x: Tensor, residual: Tensor, packed: Shared) -> Tensor:
    dense, dropout, norm = sublayer
    x = packed.scattered(ops.linear(x, dense.weight.to_local()))
    bias = packed.everywhere(dense.bias)
    rate = bypass.dropout_rate(dropout) if dropout.training else 0.0
    if rate > 0.0:
        x, bias = _dropped(x if bias is None else x + bias, rate, packed.mesh), None
    weight, shift = packed.everywhere(norm.weight), packed.everywhere(norm.bias)
    return ops.dropout_add_layer_norm(x, residual, weight, shift, input_bias=bias, eps=norm.eps)


def _dropped(x: Tensor, rate: float, mesh: DeviceMesh) -> Tensor:
    """Dropout of other elements on each rank, after which the ranks' generators still agree.

    They have unequal numbers of tokens, and go on drawing together.
    """
    seed = int(torch.randint(2**62, ())) + mesh.get_local_rank()
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - rate, generator=generator)
    return x * keep * (1.0 / (1.0 - rate) if rate < 1.0 else 0.0)


def _product(module: nn.Linear, x: Tensor, activation: object = None) -> Tensor:
    bias = None if module.bias is None else module.bias.to_local()
    return activated(x, module.weight.to_local(), bias, activation)


def _is_split(module: nn.Module, dim: int) -> bool:
    placements = getattr(getattr(module, "weight", None), "placements", ())
    return type(module) is nn.Linear and len(placements) == 1 and placements[0].is_shard(dim)
