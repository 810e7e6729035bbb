"""ONNX Runtime on the CPU, with its fusions for BERT."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bert_contenders import Case, hugging_face
from . import contender


class Textbook(nn.Module):
    """Hugging Face's eager attention, with the mask that ONNX Runtime's fusions look for."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.bert = hugging_face(case, attention="eager", dtype=torch.float32).eval()

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        x = self.bert.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -10000.0
        return self.bert.encoder(x, attention_mask=mask).last_hidden_state


class OnnxRuntime(nn.Module):
    """A session with a dynamic batch and length; `fused` counts the fused nodes by their kind."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        import onnxruntime
        from onnxruntime.transformers import optimizer

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "bert.onnx")
            _export(case, file)
            # Its own passes first would join what the fusions look for.
            model = optimizer.optimize_model(
                str(file), model_type="bert", num_heads=case.heads, hidden_size=case.hidden, opt_level=0
            )
            self.fused = {kind: n for kind, n in model.get_fused_operator_statistics().items() if n}
            model.save_model_to_file(str(file), use_external_data_format=True)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            # Its threads would go on spinning and take the cores from whoever comes next.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            self.session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        self.names = [one.name for one in self.session.get_inputs()]

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        found = self.session.run(None, {name: inputs[name].numpy() for name in self.names})
        return torch.from_numpy(found[0])


def _export(case: Case, file: Path) -> None:
    """Writes the graph in the shape in which ONNX Runtime knows attention: scores / sqrt(d) + mask."""
    import onnx

    inputs = case.inputs()
    shapes = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")} for name in inputs}
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Textbook(case),
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(inputs),
            verbose=False,
        )
    program.save(file, external_data=False)
    model = onnx.load(file)
    _as_the_fusions_know_it(model.graph)
    onnx.save(model, file, save_as_external_data=True, location="weights")


def _as_the_fusions_know_it(graph: Any) -> None:
    """Two unsqueezed axes one by one, and scores divided by a root: the exporter joins the one and turns the other."""
    import numpy as np
    from onnx import helper, numpy_helper

    made = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    place, row = next(
        (at, node)
        for at, node in enumerate(graph.node)
        if node.op_type == "Unsqueeze" and node.input[0] == "attention_mask"
    )
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "second_axis"))
    row.input[:] = ["mask_row", "second_axis"]
    graph.node.insert(place, helper.make_node("Unsqueeze", ["attention_mask", "second_axis"], ["mask_row"]))
    for node in list(graph.node):
        scores = made.get(node.input[0]) if node.op_type == "Softmax" else None
        scaled = made.get(scores.input[0]) if scores is not None else None
        if scaled is None or scaled.op_type != "Mul":
            continue
        factor = numpy_helper.to_array(weights[scaled.input[1]])
        name = f"{scaled.output[0]}_root"
        graph.initializer.append(numpy_helper.from_array((1.0 / factor).astype(factor.dtype), name))
        scaled.op_type, scaled.input[1] = "Div", name


@contender(
    "onnxruntime",
    "ONNX Runtime, exported from Hugging Face's eager attention, with its BERT fusions",
    package="onnxruntime",
    devices=("cpu",),
    dtypes=("fp32",),
    families=("bert",),
    trains=False,
)
def onnx_runtime(case: Case, dropout: float) -> nn.Module:
    return OnnxRuntime(case)
