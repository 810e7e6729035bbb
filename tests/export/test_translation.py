"""Graphs that hold our raw ops, translated by the table into standard ones."""

import pytest
import torch
from torch import nn

import pytorch_ext
from pytorch_ext import export, ops
from pytorch_ext.testing import assert_contract, normal

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


class Varlen(nn.Module):
    def forward(self, query, key, cu_seqlens_q, cu_seqlens_k):
        lengths = (cu_seqlens_q, cu_seqlens_k, 9, 9)
        causal = ops.varlen_attention(query, key, key, *lengths, is_causal=True)
        return causal, ops.varlen_attention(query, key, key, *lengths)


@pytest.mark.parametrize("opset", [23, pytest.param(18, marks=pytest.mark.full)])
def test_causal_is_counted_within_each_sequence(opset):
    ends = ([0, 4, 6, 9], [0, 3, 12, 14])  # queries and keys of other lengths, and behind them two of neither
    cu_seqlens = [torch.tensor(e, dtype=torch.int32) for e in ends]

    def make(generator):
        query, key = (normal(generator, e[-1] + 2, 4, 8) for e in ends)
        return {"query": query, "key": key}

    def by(backend):
        def call(query, key):
            with pytorch_ext.backends.use(backend), torch.no_grad():
                real = Varlen()(query[: ends[0][-1]], key[: ends[1][-1]], *cu_seqlens)
            return tuple(nn.functional.pad(out, (0, 0, 0, 0, 0, 2)) for out in real)

        return call

    args = (*(t.float() for t in make(torch.Generator()).values()), *cu_seqlens)
    with pytorch_ext.backends.use("reference"), torch.no_grad():
        program = torch.export.export(Varlen(), args, strict=False)
    assert any("varlen_attention_fwd" in str(node.target) for node in program.graph.nodes)
    table = export.translation_table(opset)
    made = torch.onnx.export(program, verbose=False, opset_version=opset, custom_translation_table=table)
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString())
    names = [declared.name for declared in session.get_inputs()]

    def ours(query, key):
        tensors = (query, key, *cu_seqlens)
        found = session.run(None, {name: t.numpy() for name, t in zip(names, tensors, strict=True)})
        return tuple(map(torch.from_numpy, found))

    exact = by("reference")
    assert_contract(ours, by("native"), make, torch.float32, gradients=False, exact=exact)


class Masked(nn.Module):
    def forward(self, query, mask):
        return nn.functional.scaled_dot_product_attention(query, query, query, mask)


def test_nobody_to_attend_is_zeros(tmp_path):
    query = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 3, 3)
    mask[..., 1, :] = mask[..., 2, 2] = -torch.inf
    for opset in (18, 23):
        made = export.to_onnx(Masked(), (query, mask), tmp_path / "m.onnx", opset=opset, dynamic=False)
        assert made.nodes["Softmax" if opset == 18 else "Attention"] == 1
        session = onnxruntime.InferenceSession(made.path)
        names = [declared.name for declared in session.get_inputs()]
        (found,) = session.run(None, dict(zip(names, (query.numpy(), mask.numpy()), strict=True)))
        assert not found[:, :, 1].any() and found[:, :, 2].any()
