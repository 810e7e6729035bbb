from torch import Tensor
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta

from .. import _bypass as bypass
from .._blocks import linear_activation, residual_norm
from .._swap import scope


class _FusedOutput:
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        with scope(self):
            if bypass.hooked_everywhere():
                return super().forward(hidden_states, input_tensor)
            return residual_norm(self.dense, self.dropout, self.LayerNorm, hidden_states, input_tensor)


class FusedDebertaV2SelfOutput(_FusedOutput, deberta.DebertaV2SelfOutput):
    pass


class FusedDebertaV2Output(_FusedOutput, deberta.DebertaV2Output):
    pass


class FusedDebertaV2Intermediate(deberta.DebertaV2Intermediate):
    def forward(self, hidden_states: Tensor) -> Tensor:
        with scope(self):
            if bypass.hooked_everywhere():
                return super().forward(hidden_states)
            return linear_activation(self.dense, self.intermediate_act_fn, hidden_states)
