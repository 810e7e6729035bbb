"""OpenVINO on the CPU, in the precision of the case and in 8-bit integers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import sys
import warnings
from typing import Any

import torch
from torch import nn

from ..bert_contenders import Case, hugging_face
from . import contender

CALIBRATION = 8  # batches


@contender(
    "openvino",
    "OpenVINO, converted from the default",
    package="openvino",
    devices=("cpu",),
    families=("bert",),
    trains=False,
)
def openvino(case: Case, dropout: float) -> nn.Module:
    return OpenVino(case)


class OpenVino(nn.Module):
    """Hugging Face's BERT converted to OpenVINO, with dynamic batch and length, as its users run it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        # OpenVINO and NNCF report their use to their maker wherever they find this package, and do without it.
        sys.modules.setdefault("openvino_telemetry", None)
        import openvino

        precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[case.dtype]
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        settings |= {"NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        graph = self.graph(case)
        self.request = openvino.compile_model(graph, "CPU", settings).create_infer_request()

    def graph(self, case: Case) -> Any:
        import openvino

        bert = hugging_face(case, dtype=torch.float32)
        example = case.inputs()
        bert.config.return_dict = False
        shapes = [(name, openvino.PartialShape([-1, -1])) for name in example]
        # SDPA as one node of the graph is what its compiler fuses.
        with (
            warnings.catch_warnings()
        ):  # tracing tells what it takes for constant; the comparison would show it
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return openvino.convert_model(bert, example_input=example, input=shapes)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        found = self.request.infer({name: t.numpy() for name, t in inputs.items()}, share_inputs=True)
        return torch.from_numpy(found[0])


class Int8(OpenVino):
    """Weights and activations in 8 bits, calibrated on other batches than the one that is timed."""

    def graph(self, case: Case) -> Any:
        import nncf

        others = [dataclasses.replace(case, seed=case.seed + step) for step in range(1, CALIBRATION + 1)]
        batches = [{name: t.numpy() for name, t in other.inputs().items()} for other in others]
        nncf.set_log_level("ERROR")
        with contextlib.redirect_stdout(io.StringIO()):  # bars of its own
            return nncf.quantize(
                super().graph(case),
                nncf.Dataset(batches),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=CALIBRATION,
            )


@contender(
    "openvino-int8",
    "OpenVINO, quantized by NNCF: another precision, held to a cosine instead of rounding",
    package="nncf",
    devices=("cpu",),
    families=("bert",),
    precision="int8",
    trains=False,
    usual=False,
    unless=lambda case: "" if importlib.util.find_spec("openvino") else "openvino is not installed",
)
def int8(case: Case, dropout: float) -> nn.Module:
    return Int8(case)
