"""`optimize(cuda_graphs=True)`: on the CPU by a recorder that repeats, on a GPU by real graphs."""

import contextlib
import copy
import dataclasses
import threading

import pytest
import torch
from torch import nn

import pytorch_ext
from pytorch_ext.dropin import _swap

FAMILIES = ["hf.BertModel", "px.BertModel", "hf.ElectraModel", "hf.AlbertModel", "hf.DistilBertModel"]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Repeats:
    """Records by keeping the work; what nobody copied in since is NaN."""

    recorded = 0

    def __init__(self, device):
        pass

    @staticmethod
    def why_not(x):
        return None

    def turn(self):
        return contextlib.nullcontext()

    def record(self, work, tokens, where):
        out = work(tokens, where)
        Repeats.recorded += 1

        def replay():
            out.copy_(work(tokens, where))
            tokens.fill_(torch.nan)

        tokens.fill_(torch.nan)
        return out, replay

    def finish(self):
        pass


def with_recorder(model, recorder=Repeats):
    for _, module in _swap.all_swapped(model):
        _swap.reconfigure(module, dataclasses.replace(_swap.options_of(module), recorder=recorder))
    return model


def notes(model):
    return [
        line.partition("last forward ")[2] for line in pytorch_ext.explain(model).padding if "last" in line
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_families(make_pair, make_batch, assert_same, name):
    original, fast = make_pair(name)
    with_recorder(fast)
    types = "DistilBert" not in name
    before = Repeats.recorded
    for kind in ("right", "full", "none", "holes", "right"):
        assert_same(original, fast, make_batch(kind, types=types))
        assert notes(fast)[0].endswith("; by a CUDA graph")
    assert Repeats.recorded == before + 3  # of 16, 32 and 48 tokens
    for kind in ("left", "4-D bool"):
        assert_same(original, fast, make_batch(kind, types=types))
        assert "graph" not in notes(fast)[0]
    assert_same(original, fast, make_batch(types=types), backward=True)
    assert notes(fast)[0].endswith("; no CUDA graph: gradients are enabled")
    assert Repeats.recorded == before + 3


def test_a_bias_of_distances_needs_the_padded_batch(make_pair, make_batch, assert_same):
    original, fast = make_pair("hf.MPNetModel", attention="eager")
    before = Repeats.recorded
    assert_same(original, with_recorder(fast), make_batch(types=False))
    assert "no CUDA graph" in notes(fast)[0] and Repeats.recorded == before


def test_hidden_states_and_refresh(make_pair, make_batch, assert_same):
    original, fast = make_pair()
    with_recorder(fast)
    batch = make_batch()
    assert_same(original, fast, batch)
    before = Repeats.recorded
    batch.inputs["output_hidden_states"] = True
    assert_same(original, fast, batch)
    assert "graph" not in notes(fast)[0]
    del batch.inputs["output_hidden_states"]
    pytorch_ext.refresh(fast)
    assert_same(original, fast, batch)
    assert Repeats.recorded == before + 1
    assert_same(original, copy.deepcopy(fast), batch)
    assert Repeats.recorded == before + 2
    assert_same(original, pytorch_ext.revert(fast), batch)
    assert Repeats.recorded == before + 2


# --- On a GPU ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["hf.BertModel", "nn.TransformerEncoder"])
def on_gpu(request, make_model):
    """A model on a GPU, a copy with graphs, and what takes inputs and gives a tensor."""
    if request.param.startswith("hf"):
        plain = make_model(request.param, dtype=torch.float32).cuda().requires_grad_(False)

        def call(model, lengths):
            g = torch.Generator().manual_seed(sum(lengths))
            ids = torch.randint(1, 61, (len(lengths), max(lengths)), generator=g)
            real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            return model(ids.cuda(), attention_mask=real.long().cuda()).last_hidden_state[real.cuda()]
    else:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        plain = plain.cuda().eval().requires_grad_(False)

        def call(model, lengths):
            g = torch.Generator().manual_seed(sum(lengths))
            x = torch.randn(len(lengths), max(lengths), 32, generator=g).cuda()
            x = x.to(next(model.parameters()).dtype)
            real = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).cuda()
            return model(x, src_key_padding_mask=~real)[real]

    plain = pytorch_ext.optimize(plain, backend="native")
    fast = pytorch_ext.optimize(copy.deepcopy(plain), backend="native", cuda_graphs=True)
    return plain, fast, call


BATCHES = ([11, 5, 1, 8], [9, 2, 7, 11], [16], [3], [11, 11])


def check(plain, fast, call, batches=BATCHES, tolerance=1e-5):
    for lengths in batches:
        torch.testing.assert_close(call(fast, lengths), call(plain, lengths), rtol=tolerance, atol=tolerance)
        assert notes(fast)[0].endswith("; by a CUDA graph"), notes(fast)


@pytest.mark.parametrize("case", [pytest.param(None, marks=gpu)])
def test_real_graphs(on_gpu, case):
    plain, fast, call = on_gpu
    check(*on_gpu)
    with torch.inference_mode():
        check(*on_gpu)
    kept = call(fast, [9, 4])
    copied = kept.clone()
    call(fast, [8, 5])
    assert torch.equal(kept, copied)
    # Values that change in place are seen, weights that are replaced are too.
    for model in (plain, fast):
        for p in model.parameters():
            p.mul_(0.9)
    check(*on_gpu)
    for model in (plain, fast):
        for p in model.parameters():
            p.data = p.data * 1.1
    check(*on_gpu)
    check(plain.half(), fast.half(), call, tolerance=1e-2)
    check(plain.float(), fast.float(), call)


@pytest.mark.parametrize("case", [pytest.param(None, marks=gpu)])
def test_streams_and_threads_take_turns(on_gpu, case):
    plain, fast, call = on_gpu
    expected = {tuple(lengths): call(plain, lengths) for lengths in BATCHES}
    wrong = []

    def work(lengths):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(20):
                got = call(fast, lengths)
                stream.synchronize()
                if not torch.allclose(got, expected[tuple(lengths)], rtol=1e-5, atol=1e-5):
                    wrong.append(lengths)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(lengths,)) for lengths in BATCHES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("case", [pytest.param(None, marks=gpu)])
def test_a_layer_that_reads_from_the_device_runs_without(on_gpu, case):
    plain, fast, call = on_gpu
    layers = {"BertModel": lambda m: m.encoder.layer}.get(type(fast).__name__, lambda m: m.layers)

    class Reads(nn.Module):
        def forward(self, x):
            return torch.relu(x) if x.sum().item() == 0 else torch.tanh(x)

    for model in (plain, fast):
        layer = layers(model)[1]
        if hasattr(layer, "intermediate"):
            layer.intermediate.intermediate_act_fn = Reads()
        else:
            layer.activation = Reads()
    for _ in range(2):
        torch.testing.assert_close(call(fast, [5, 3]), call(plain, [5, 3]), rtol=1e-5, atol=1e-5)
        assert "no CUDA graph" in notes(fast)[0]
