"""OpenVINO on the CPU."""

from __future__ import annotations

import torch
from torch import nn

from ..bert_contenders import Case, hugging_face
from . import contender


@contender(
    "openvino", "OpenVINO, converted from the default", package="openvino", devices=("cpu",), trains=False
)
def openvino(case: Case, dropout: float) -> nn.Module:
    return OpenVino(case)


class OpenVino(nn.Module):
    """Hugging Face's BERT converted to OpenVINO, with dynamic batch and length, as its users run it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        import openvino

        bert = hugging_face(case, dtype=torch.float32)
        example = case.inputs()
        bert.config.return_dict = False
        shapes = [(name, openvino.PartialShape([-1, -1])) for name in example]
        # SDPA as one node of the graph is what its compiler fuses.
        graph = openvino.convert_model(bert, example_input=example, input=shapes)
        precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[case.dtype]
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        settings |= {"NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        self.request = openvino.compile_model(graph, "CPU", settings).create_infer_request()

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        found = self.request.infer({name: t.numpy() for name, t in inputs.items()}, share_inputs=True)
        return torch.from_numpy(found[0])
