"""ViT has images for its input, and no padding."""

import copy

import pytest
import torch
from torch.func import functional_call

import pytorch_ext
from pytorch_ext.testing import assert_contract, normal

MODELS = ["hf.ViTModel", "hf.ViTForImageClassification", "hf.ViTForMaskedImageModeling"]


@pytest.fixture(scope="session")
def images():
    def make(dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)

    return make


def gradients(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    value = out.loss if getattr(out, "loss", None) is not None else out[0].sin().sum()
    value.backward()
    return out[0].detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(make_pair, images, name, attention, training, qkv_bias):
    original, fast = make_pair(name, attention=attention, qkv_bias=qkv_bias)
    inputs = {"pixel_values": images()}
    if "Masked" in name:
        inputs["bool_masked_pos"] = torch.arange(12).view(3, 4) % 2 == 0
    if "Classification" in name:
        inputs["labels"] = torch.tensor([0, 1, 1])
    expected, got = (gradients(m.train(training), **inputs) for m in (original, fast))
    # Its eager attention takes the softmax in float32, whatever the dtype.
    close = {"rtol": 1e-4, "atol": 1e-6} if attention == "eager" else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(got, expected, **close)
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs)[0], original(**inputs)[0], **close)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_what_a_caller_may_ask_for(make_pair, images, asked):
    original, fast = make_pair("hf.ViTModel", attention="eager")
    with torch.no_grad():
        expected, got = (m(images(), **{asked: True})[-1] for m in (original, fast))
    assert len(got) == len(expected) > 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_numerical_contract(make_pair, images, dtype):
    original, fast = make_pair("hf.ViTModel")

    def make(generator):
        return {n: p + 0.05 * normal(generator, *p.shape) for n, p in original.state_dict().items()}

    def last_hidden_state(model):
        model = copy.deepcopy(model)

        def call(**parameters):
            pixels = images().to(next(iter(parameters.values())).dtype)
            return functional_call(model, parameters, (), {"pixel_values": pixels}).last_hidden_state

        return call

    assert_contract(last_hidden_state(fast), last_hidden_state(original), make, dtype, seeds=range(16))


def test_layers_are_fused_and_reverted(make_pair, images):
    original, fast = make_pair("hf.ViTModel")
    rows = {row.where: row.now for row in pytorch_ext.explain(fast).replaced}
    assert "ViTLayer" in rows["layers.*"]
    pytorch_ext.revert(fast)
    assert {n: type(m) for n, m in fast.named_modules()} == {n: type(m) for n, m in original.named_modules()}
