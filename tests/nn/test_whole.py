"""A layer as one op: taken where that is all that calling its modules would do, by models and by modules."""

import contextlib

import pytest
import torch
from torch import nn

import pytorch_ext
from pytorch_ext import backends
from pytorch_ext import nn as px
from pytorch_ext.models import BertConfig, BertModel
from pytorch_ext.nn import _whole
from pytorch_ext.testing import padding_mask

HIDDEN, HEADS, INNER = 64, 2, 96


@pytest.fixture
def calls(monkeypatch):
    """How the op was called."""
    found, op = [], _whole.encoder_layer

    def call(*arguments):
        found.append(arguments)
        return op(*arguments)

    monkeypatch.setattr(_whole, "encoder_layer", call)
    with backends.use("reference"):
        yield found


@pytest.fixture(params=["bert", "torch", "torch, sequence first"])
def case(request):
    """An encoder, its layers, and what runs it: on a mask of the real positions, or on none."""
    torch.manual_seed(0)
    x = torch.randn(3, 9, HIDDEN, dtype=torch.float64)
    if request.param == "bert":
        sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": INNER}
        config = BertConfig(vocab_size=9, num_hidden_layers=2, **sizes)
        encoder = pytorch_ext.optimize(BertModel(config).encoder)
        layers = encoder.layer

        def run(real):
            return encoder(x.to(layers[0].intermediate.dense.weight.dtype), real).last_hidden_state

    else:
        first = request.param == "torch"
        layer = px.TransformerEncoderLayer(HIDDEN, HEADS, INNER, batch_first=first)
        encoder = px.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        layers = encoder.layers

        def run(real):
            given = x.to(layers[0].linear1.weight.dtype)
            given = given if first else given.transpose(0, 1)
            out = encoder(given, None, None if real is None else ~real)
            return out if first else out.transpose(0, 1)

    encoder.double().eval().requires_grad_(False)
    return encoder, layers, run


@pytest.mark.parametrize("lengths", [[9, 4, 6], [9, 9, 9], None], ids=["padding", "no padding", "no mask"])
def test_models_and_modules_take_it(case, calls, lengths):
    real = None if lengths is None else padding_mask(lengths, 9)
    seen = real if real is not None else torch.ones(3, 9, dtype=torch.bool)
    with backends.use("native"):
        expected = case[2](real)[seen]
    assert not calls
    torch.testing.assert_close(case[2](real)[seen], expected, rtol=1e-9, atol=1e-11)
    assert len(calls) == 2
    remembered = [layer in _whole._known for layer in case[1]]
    assert not any(remembered), "this backend has no short way that could use it"


@pytest.mark.parametrize("change", ["gradients", "dropout", "hook", "dtype", "class", "autocast"])
def test_not_where_it_would_bypass_something(case, calls, change):
    encoder, layers, run = case
    norm = next(m for m in layers[1].modules() if isinstance(m, nn.LayerNorm))
    if change == "gradients":
        encoder.requires_grad_(True)
    if change == "dropout":
        encoder.train()
    if change == "hook":
        norm.register_forward_hook(lambda *_: None)
    if change == "dtype":
        encoder.bfloat16()
        norm.float()
    if change == "class":
        norm.__class__ = type("Another", (nn.LayerNorm,), {})
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        run(padding_mask([9, 4, 6], 9))
    assert len(calls) == (0 if change in ("gradients", "dropout", "autocast") else 1)


def test_what_does_not_fit_is_said_by_the_modules(case, calls):
    _, layers, run = case
    norm = [m for m in layers[0].modules() if isinstance(m, nn.LayerNorm)][-1]
    norm.weight = nn.Parameter(norm.weight[:5], requires_grad=False)
    with pytest.raises(RuntimeError, match="weight: expected shape"):
        run(None)
    assert not calls


def test_auto_takes_it_on_the_cpu(case, calls):
    if reasons := backends.why_not("cpu", "encoder_layer"):
        pytest.skip("; ".join(reasons))
    encoder, _, run = case
    real = padding_mask([9, 4, 6], 9)
    expected = run(real)[real]
    with backends.use("auto"):
        encoder.float()
        got = run(real)
    assert [arguments[-1] for arguments in calls[2:]] == ["cpu", "cpu"]
    torch.testing.assert_close(got[real].double(), expected, rtol=1e-4, atol=1e-4)


def _activation(layers):
    """Another one, where the layer keeps it."""
    if hasattr(layers[1], "linear1"):
        layers[1].activation = nn.functional.gelu
    else:
        layers[1].intermediate.intermediate_act_fn = nn.ReLU()


def _norm(layers):
    return next(m for m in layers[1].modules() if isinstance(m, nn.LayerNorm))


def _linear(layers):
    return next(m for m in layers[1].modules() if isinstance(m, nn.Linear))


CHANGES = {
    "nothing": (lambda layers: None, True),
    "gradients": (lambda layers: _linear(layers).requires_grad_(True), False),
    "a weight in place": (lambda layers: _norm(layers).weight.data.mul_(2.0), True),
    "the data of a weight": (
        lambda layers: setattr(_norm(layers).weight, "data", torch.zeros(HIDDEN)),
        False,
    ),
    "a weight": (lambda layers: setattr(_norm(layers), "weight", _frozen(torch.zeros(HIDDEN))), False),
    "no bias": (lambda layers: setattr(_norm(layers), "bias", None), False),
    "eps": (lambda layers: setattr(_norm(layers), "eps", 10.0), False),
    "an activation": (_activation, False),
    "a hook": (lambda layers: _linear(layers).register_forward_hook(lambda m, i, o: o * 2), False),
    "a hook on all": (None, False),
    "a forward of its own": (lambda layers: setattr(_linear(layers), "forward", lambda x: x), False),
    "a class": (lambda layers: setattr(_norm(layers), "__class__", Doubled), False),
    "a mode": (lambda layers: layers[1].train(), False),
    "autocast": (None, False),
}


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2


def _frozen(t):
    return nn.Parameter(t, requires_grad=False)


@pytest.mark.parametrize("change", CHANGES)
def test_what_it_remembers_is_looked_at_in_each_call(case, monkeypatch, change):
    """``CHANGES``: what is done to the second layer, and whether what was known of it still serves."""
    if reasons := backends.why_not("cpu", "encoder_layer"):
        pytest.skip("; ".join(reasons))
    encoder, layers, run = case
    encoder.float()
    direct, known = _whole.encoder_layer_direct, []
    monkeypatch.setattr(
        _whole, "encoder_layer_direct", lambda *args: known.append(direct(*args)) or known[-1]
    )
    real = padding_mask([9, 4, 6], 9)
    for module in encoder.modules():  # so that in training it can be compared
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    with backends.use("cpu"):
        run(real)
        known.clear()
        run(real)
        assert len(known) == 2 and all(out is not None for out in known), "it was remembered"
        known.clear()
        act, holds = CHANGES[change]
        if act:
            act(layers)
        with contextlib.ExitStack() as stack:
            if change == "autocast":
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if change == "a hook on all":
                handle = nn.modules.module.register_module_forward_hook(
                    lambda m, i, o: o * 2 if isinstance(m, nn.Linear) else None
                )
                stack.callback(handle.remove)
            found = run(real)[real]
            taken = [out is not None for out in known]
            _whole._known.clear()
            monkeypatch.setattr(_whole, "as_one", lambda *args: None)
            for module in ("pytorch_ext.dropin._post_norm", "pytorch_ext.nn.transformer_encoder_layer"):
                monkeypatch.setattr(f"{module}.as_one", lambda *args: None)
            expected = run(real)[real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert taken[:1] == ([True] if act else [])
    assert any(taken[1:]) is holds
