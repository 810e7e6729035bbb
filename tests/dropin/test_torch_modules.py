"""LayerNorm and GELU of PyTorch, and the activations of Hugging Face, in any model."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pytorch_ext
from pytorch_ext import models, ops
from pytorch_ext.testing import assert_contract, normal


class Block(nn.Module):
    """Pre-norm, as in a vision transformer."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, bias=False)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).mT)).mean(1))


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(
            *(nn.Conv2d(3, 8, 3), nn.LayerNorm([8, 14, 14]), nn.GELU("tanh"), nn.BatchNorm2d(8)),
            *(nn.Flatten(), nn.LayerNorm(1568, elementwise_affine=False), nn.Linear(1568, 5)),
        )


class Scaled(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


MODELS = {"transformer": Vision, "convolutions": Convolutions}


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5, 0.3)
    return model.double()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name, backend, training):
    original = randomised(MODELS[name]()).train(training)
    fast = pytorch_ext.optimize(copy.deepcopy(original), backend=backend)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for model in (original, fast):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        out.sin().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in model.parameters())])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    assert not any(type(m) in (nn.LayerNorm, nn.GELU) for m in fast.modules())
    assert list(fast.state_dict()) == list(original.state_dict())
    pytorch_ext.revert(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in original.modules()]


def test_subclasses_are_left_alone():
    model = nn.Sequential(Scaled(8), nn.LayerNorm(8))
    x = torch.randn(3, 8)
    expected = model(x)
    pytorch_ext.optimize(model)
    assert type(model[0]) is Scaled
    torch.testing.assert_close(model(x), expected)
    assert [row.was for row in pytorch_ext.explain(model).left] == ["Scaled"]


def test_stand_ins_are_what_they_stand_in_for():
    for module in (nn.LayerNorm(8), nn.GELU("tanh")):
        fast = pytorch_ext.optimize(copy.deepcopy(module))
        assert isinstance(fast, type(module))
        assert fast.extra_repr() == module.extra_repr()
        assert fast.state_dict().keys() == module.state_dict().keys()
        other = pickle.loads(pickle.dumps(fast))
        torch.testing.assert_close(other(torch.ones(2, 8)), module(torch.ones(2, 8)))


def test_hooks_on_stand_ins_fire():
    model = pytorch_ext.optimize(nn.Sequential(nn.LayerNorm(8), nn.GELU()))
    seen = []
    for module in model:
        module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    model(torch.ones(2, 8))
    assert seen == [(2, 8), (2, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_numerical_contract(backend, dtype):
    norm, gelu = pytorch_ext.optimize(nn.ModuleList([nn.LayerNorm(40), nn.GELU()]), backend=backend)

    def make(generator):
        return {"x": normal(generator, 5, 40), "weight": normal(generator, 40), "bias": normal(generator, 40)}

    def ours(x, weight, bias):
        return gelu(torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,)))

    def eager(x, weight, bias):
        return F.gelu(F.layer_norm(x, (40,), weight, bias))

    assert_contract(ours, eager, make, dtype)


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_pytorch_tanh", "gelu_python", "gelu_new", "gelu_10", "quick_gelu"]
)
def test_activations_of_hugging_face(transformers, monkeypatch, name):
    original = transformers.activations.ACT2FN[name]
    model = nn.Sequential(copy.deepcopy(original))
    pytorch_ext.optimize(model)
    calls = []
    gelu = ops.gelu
    monkeypatch.setattr(ops, "gelu", lambda *arguments: calls.append(arguments[1:]) or gelu(*arguments))
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(model(x), original(x), rtol=1e-12, atol=1e-14)
    expected = {"gelu": [()], "gelu_pytorch_tanh": [("tanh",)], "gelu_new": [("tanh",)]}
    assert calls == expected.get(name, [])
    assert type(pytorch_ext.revert(model)[0]) is type(original)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_activations_of_hugging_face_are_fused_into_layers(make_pair, make_batch, monkeypatch, act):
    _, fast = make_pair("hf.BertForMaskedLM", hidden_act=act)
    activations = []
    linear = ops.linear

    def noting(input, weight, bias=None, activation=None):
        activations.append(activation)
        return linear(input, weight, bias, activation)

    monkeypatch.setattr(ops, "linear", noting)
    fast(**make_batch().inputs)
    assert activations.count("gelu" if act == "gelu" else "gelu_tanh") == 3


@pytest.mark.parametrize("act", ["gelu", "relu", "silu"])
def test_nn_transformer_layers_stay_right(act):
    """PyTorch's own, in whose fused path for inference no module is called."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, getattr(F, act), batch_first=True)
    original = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False).double()
    fast = pytorch_ext.optimize(copy.deepcopy(original))
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    padding = torch.arange(7) >= torch.tensor([[7], [3], [5]])
    for training in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected = original.train(training)(x, src_key_padding_mask=padding)
                got = fast.train(training)(x, src_key_padding_mask=padding)
            torch.testing.assert_close(got[~padding], expected[~padding], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_model_from_a_tutorial(make_batch, assert_same, activation, norm_first):
    original = models.TransformerClassifier(
        61, 3, 32, 2, 4, 48, 24, activation=activation, dropout=0.0, norm_first=norm_first
    )
    fast = pytorch_ext.optimize(copy.deepcopy(randomised(original)))
    for kind in ("right", "left", "none", "all padding"):
        batch = make_batch(kind, types=False)
        assert_same(original.eval(), fast.eval(), batch)
        assert_same(original.train(), fast.train(), batch, backward=True)
