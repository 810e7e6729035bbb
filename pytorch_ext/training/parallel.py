"""An optimised encoder on many devices: its layers by features, or its depth in parts.

``DistributedDataParallel`` and ``fully_shard`` need nothing of this: they take an optimised model as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..dropin._by_tokens import share_tokens

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Of a layer with BERT's names: what comes out of these is split over the devices, and what of those is summed again.
COLUMNS = ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense")
ROWS = ("attention.output.dense", "output.dense")


def encoder_of(model: nn.Module) -> nn.Module:
    """The optimised encoder in ``model``, whose ``layer`` lists its layers.

    Raises:
        ValueError: there is none whose layers have BERT's names.
    """
    for module in model.modules():
        layers = getattr(module, "layer", None)
        if getattr(module, "removes_padding", False) and isinstance(layers, nn.ModuleList) and len(layers):
            names = {name for name, _ in layers[0].named_modules()}
            if names.issuperset(COLUMNS + ROWS):
                return module
    raise ValueError(f"model: expected an optimised encoder with BERT's layers, got {type(model).__name__}")


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shares out each layer's heads and feed-forward features over ``mesh``, in place.

    As Shoeybi et al. 2019 (arXiv 1909.08053). Every rank gets the same batch, and draws the same random numbers (seed
    them alike). Two sums over the ranks per layer and direction. Tokens stay without padding.

    Raises:
        ValueError: no optimised encoder with BERT's layers, or heads that the devices do not divide.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    layers = encoder_of(model).layer
    inner = layers[0].attention.self
    heads = inner.query.out_features // inner.attention_head_size
    if heads % mesh.size():
        raise ValueError(f"mesh: expected a number of devices that divides {heads} heads, got {mesh.size()}")
    plan = {**{name: ColwiseParallel() for name in COLUMNS}, **{name: RowwiseParallel() for name in ROWS}}
    for layer in layers:
        parallelize_module(layer, mesh, plan)
    return model


def sequence_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """:func:`tensor_parallel`, and between the products each rank keeps a part of the tokens, in place.

    As Korthikanti et al. 2022 (arXiv 2205.05198), over the real tokens of the batch: sums, dropout and LayerNorm work
    on a rank's own. Each sum of ``tensor_parallel`` becomes a scattered one and a gather, which move as many bytes.
    Every rank gets the same batch and draws the same random numbers; the encoder's result is whole on every rank.
    With a mask per pair of positions, or padding before position 0, it is as ``tensor_parallel``.

    Raises:
        ValueError: as :func:`tensor_parallel`.
    """
    tensor_parallel(model, mesh)
    share_tokens(encoder_of(model), mesh)
    return model


class PipelinePart(nn.Module):
    """One of ``count`` parts of a sequence classifier's depth, for ``torch.distributed.pipelining.PipelineStage``.

    The first part has the embeddings, the last the pooler and the head. Between them travel padded hidden states, as a
    stage's inputs have one shape; within each the tokens are without padding. It takes over modules of ``model``.

    Args:
        model: optimised, with ``bert`` (``embeddings``, ``encoder``, ``pooler``), ``dropout`` and ``classifier``.
        index, count: which part, of how many.

    Raises:
        ValueError: no optimised encoder with BERT's layers, or fewer layers than parts.
    """

    def __init__(self, model: Any, index: int, count: int) -> None:
        super().__init__()
        layers = encoder_of(model).layer
        if count > len(layers):
            raise ValueError(f"count: expected at most as many parts as layers, {len(layers)}, got {count}")
        self.start, self.end = len(layers) * index // count, len(layers) * (index + 1) // count
        self.embeddings = model.bert.embeddings if index == 0 else None
        self.encoder = model.bert.encoder
        self.encoder.layer = layers[self.start : self.end]
        last = index == count - 1
        self.pooler = model.bert.pooler if last else None
        self.dropout = model.dropout if last else None
        self.classifier = model.classifier if last else None

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Ids ``(batch, seqlen)``, or hidden states ``(batch, seqlen, hidden)`` -> hidden states, or logits."""
        if self.embeddings is not None:
            x = self.embeddings(x)
        x = self.encoder(x, attention_mask=attention_mask).last_hidden_state
        return x if self.classifier is None else self.classifier(self.dropout(self.pooler(x)))

    def whole_names(self, state: dict[str, Any]) -> dict[str, Any]:
        """A ``state_dict`` of this part under the names that the whole model has for it."""
        named = {}
        for name, value in state.items():
            if name.startswith("encoder.layer."):
                number, _, rest = name.removeprefix("encoder.layer.").partition(".")
                name = f"encoder.layer.{int(number) + self.start}.{rest}"
            named[name if name.startswith("classifier.") else f"bert.{name}"] = value
        return named
