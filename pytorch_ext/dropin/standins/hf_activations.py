from torch import Tensor
from transformers import activations

from ... import ops
from .._swap import scope


class FusedGELUActivation(activations.GELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        with scope(self):
            return ops.gelu(input)


class FusedGELUTanh(activations.GELUTanh):
    def forward(self, input: Tensor) -> Tensor:
        with scope(self):
            return ops.gelu(input, "tanh")


class FusedNewGELUActivation(activations.NewGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        with scope(self):
            return ops.gelu(input, "tanh")
