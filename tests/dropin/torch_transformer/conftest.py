"""Small encoders of PyTorch's, with random weights, and what it means that two of them do the same."""

import copy

import pytest
import torch
from torch import nn

import pytorch_ext

SEQLEN, SIZE, HEADS = 7, 16, 4
LENGTHS = (7, 2, 4)


@pytest.fixture(scope="session")
def randomised():
    """Biases and LayerNorms too: with the zeros and ones that they start from, a wrong one would not show."""
    return _randomised


@pytest.fixture(scope="session")
def make_encoder():
    """As tutorials make it, nested tensors included: float64, no dropout."""

    def make(layers=2, nested=True, **options):
        options = {"activation": "gelu", "batch_first": True, **options}
        layer = nn.TransformerEncoderLayer(SIZE, HEADS, 24, 0.0, **options)
        stack = nn.TransformerEncoder(layer, layers, nn.LayerNorm(SIZE), enable_nested_tensor=nested)
        return _randomised(stack.double()).eval()

    return make


@pytest.fixture
def pair(make_encoder):
    original = make_encoder()
    return original, pytorch_ext.optimize(copy.deepcopy(original))


@pytest.fixture(scope="session")
def make_tokens():
    """``(x, padding)``: activations (N, S, E), and a bool mask (N, S) that is True at padding."""

    def make(lengths=LENGTHS, seqlen=SEQLEN):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(len(lengths), seqlen, SIZE, generator=generator, dtype=torch.float64)
        return x, torch.arange(seqlen) >= torch.tensor(lengths)[:, None]

    return make


@pytest.fixture(scope="session")
def last_forward():
    def last(model):
        (line,) = [line for line in pytorch_ext.explain(model).padding if "last forward" in line]
        return line.partition("last forward ")[2]

    return last


@pytest.fixture(scope="session")
def assert_alike():
    """That ``fast`` gives what ``original`` gives in training: real outputs, gradients of input and parameters."""

    def check(original, fast, x, padding, *, training=True, **keywords):
        for grad in (True, False):
            expected = _results(original.train(), x, padding, grad, keywords)
            got = _results(fast.train(training), x, padding, grad, keywords)
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)

    return check


def _randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise.to(parameter.dtype))
    return model


def _results(model, x, padding, grad, keywords):
    model.zero_grad()
    x = x.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        out = model(x, src_key_padding_mask=padding, **keywords)
        out = out if padding is None else out[~padding]
    if not grad:
        return [out]
    out.sin().sum().backward()
    return [out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
