"""TransformerEncoderLayer and TransformerEncoder of ours against PyTorch's path for training."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from pytorch_ext import backends, ops
from pytorch_ext.nn import TransformerEncoder, TransformerEncoderLayer
from pytorch_ext.nn._padding import last_forward
from pytorch_ext.testing import assert_contract, normal

N, S, E, H = 3, 6, 16, 4
LENGTHS = {"right": [6, 2, 4], "full": [6, 6, 6], "empty": [6, 0, 3], "left": [6, 2, 4], "holes": [6, 2, 4]}
BACKENDS = ["native", "reference", "cpu"]
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "nn.ReLU": nn.ReLU(),
    "nn.GELU": nn.GELU(),
    "nn.GELU tanh": nn.GELU("tanh"),
    "F.gelu": F.gelu,
    "partial": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "lambda": lambda x: x.tanh() * 2,
    "PReLU": nn.PReLU(),
}

CONSTRUCTORS = st.fixed_dictionaries(
    {
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "layer_norm_eps": st.sampled_from([1e-5, 1e-2]),
        "batch_first": st.booleans(),
        "norm_first": st.booleans(),
        "bias": st.booleans(),
    }
)
CALLS = st.fixed_dictionaries(
    {
        "batched": st.sampled_from([True, True, True, False]),
        "mask": st.sampled_from([None, None, "bool", "float", "float per head", "causal", "bool causal"]),
        "padding": st.sampled_from([None, "float", *LENGTHS, *LENGTHS]),
        "is_causal": st.sampled_from([False, False, None, True]),
        "training": st.booleans(),
    }
)


def padding_of(kind):
    """Bool ``(N, S)``, True at padding."""
    hidden = torch.arange(S) >= torch.tensor(LENGTHS[kind])[:, None]
    if kind == "left":
        return hidden.flip(1)
    return hidden | (torch.arange(S) % 3 == 1) if kind == "holes" else hidden


def call_of(options, call):
    """``(src, masks, real)``: what to call with, and which part of the output counts."""
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batched, heads = call["batched"], (N if call["batched"] else 1) * H
    masks = {
        None: lambda: None,
        "bool": lambda: torch.rand(S, S, generator=generator) < 0.4,
        "float": lambda: tensor(S, S).requires_grad_(),
        "float per head": lambda: tensor(heads, S, S).requires_grad_(),
        "causal": lambda: nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64),
        "bool causal": lambda: torch.ones(S, S, dtype=torch.bool).triu(1),
    }
    src = tensor(N, S, E) if batched else tensor(S, E)
    real = torch.ones(N, S, dtype=torch.bool)
    padding = None
    if call["padding"] == "float":
        padding = tensor(N, S) if batched else tensor(S)
    elif call["padding"] is not None:
        padding = padding_of(call["padding"])
        real = ~padding
        padding = padding if batched else padding[1]
    seq_first = batched and not options["batch_first"]
    if seq_first:
        src = src.transpose(0, 1).contiguous()
    keywords = {
        "mask": masks[call["mask"]](),
        "src_key_padding_mask": padding,
        "is_causal": call["is_causal"],
    }

    def counted(out):
        if not batched:
            return out[real[1]] if padding is not None and padding.dtype == torch.bool else out
        return (out.transpose(0, 1) if seq_first else out)[real]

    return src.requires_grad_(), keywords, counted


def arguments(options):
    return {**options, "activation": ACTIVATIONS[options["activation"]]}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=100)
@given(options=CONSTRUCTORS, call=CALLS)
def test_a_layer(make_pair, assert_alike, options, call):
    """Alone it keeps the padding, and the outputs there are PyTorch's too."""
    pair = make_pair(nn.TransformerEncoderLayer, TransformerEncoderLayer, E, H, 24, 0.0, **arguments(options))
    theirs, ours = (module.train(call["training"]) for module in pair)
    src, keywords, _ = call_of(options, call)
    masks = keywords["mask"], keywords["src_key_padding_mask"], bool(keywords["is_causal"])
    assert_alike(theirs, ours, src, *masks)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=120)
@given(
    options=CONSTRUCTORS, call=CALLS, norm=st.sampled_from([None, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d])
)
def test_an_encoder(make_pair, assert_alike, options, call, norm):
    """At real positions, whether the padding is removed or not."""
    if norm is nn.BatchNorm1d and (not call["batched"] or not options["batch_first"]):
        norm = None
    theirs, ours = encoders(make_pair, options, norm)
    src, keywords, real = call_of(options, call)
    theirs, ours = theirs.train(call["training"]), ours.train(call["training"])
    assert_alike(theirs, ours, src, real=real, **keywords)
    with torch.no_grad():
        try:
            expected = real(theirs.train()(src, **keywords)) if norm is not nn.BatchNorm1d else None
        except (AssertionError, RuntimeError) as error:
            with pytest.raises(type(error)):
                ours.eval()(src, **keywords)
            return
        if expected is not None:  # what PyTorch's fused path for inference would give may differ
            torch.testing.assert_close(real(ours.eval()(src, **keywords)), expected, rtol=1e-9, atol=1e-10)


def encoders(make_pair, options, norm=None, layers=2):
    layer = make_pair(
        nn.TransformerEncoderLayer, TransformerEncoderLayer, E, H, 24, 0.0, **arguments(options)
    )
    last = None if norm is None else (norm(S) if norm is nn.BatchNorm1d else norm(E)).double()
    stacks = (nn.TransformerEncoder, TransformerEncoder)
    return [
        stack(one, layers, copy.deepcopy(last), enable_nested_tensor=False)
        for stack, one in zip(stacks, layer, strict=True)
    ]


@pytest.mark.parametrize(
    ("kind", "mask", "expected"),
    [
        ("right", None, "without padding: 12 of 18 positions were real tokens"),
        ("holes", None, "without padding: 8 of 18 positions were real tokens"),
        ("right", "causal", "without padding: 12 of 18 positions were real tokens"),
        ("right", "bool causal", "without padding: 12 of 18 positions were real tokens"),
        ("full", None, "dense: the batch has no padding"),
        ("left", None, "dense: position 0 of sequence 1 is padding, and heads may read position 0"),
        ("empty", None, "dense: position 0 of sequence 1 is padding, and heads may read position 0"),
        ("right", "float", "dense: there is an attention mask beside it that is not causal, or learns"),
        ("float", None, "dense: the padding mask is additive, which says more than where padding is"),
        (None, None, "dense: no mask was given"),
        (None, "causal", "dense: no mask was given"),
    ],
)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_when_padding_is_removed(make_pair, monkeypatch, training, batch_first, kind, mask, expected):
    options = {"activation": "gelu", "batch_first": batch_first}
    _, ours = encoders(make_pair, options, nn.LayerNorm)
    call = {"batched": True, "mask": mask, "padding": kind, "is_causal": None}
    src, keywords, _ = call_of(options, call)
    rows, linear = [], ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, *rest: rows.append(x[..., 0].numel()) or linear(x, *rest))
    out = ours.train(training)(src, **keywords)
    assert last_forward(ours) == expected
    removed = expected.startswith("without")
    assert set(rows) == {int(expected.split()[2])} if removed else {N * S}
    assert out.is_contiguous()
    if removed:
        padded = (out if batch_first else out.transpose(0, 1))[padding_of(kind)]
        assert padded.numel() and not padded.any()


def test_a_causal_mask_that_learns_gets_its_gradient(make_pair):
    pair = encoders(make_pair, {"activation": "relu", "batch_first": True})
    gradients = []
    for module in pair:
        mask = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64).requires_grad_()
        with pytest.warns(UserWarning, match="mismatched"):
            out = module(torch.ones(N, S, E).double().cumsum(1), mask, padding_of("right"))
        loss = out[~padding_of("right")].sin().sum()
        gradients.append(torch.autograd.grad(loss, mask)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("batch_first", [True, False])
def test_what_stands_at_padding_changes_nothing(make_pair, batch_first):
    _, ours = encoders(make_pair, {"activation": "relu", "batch_first": batch_first})
    call = {"batched": True, "mask": None, "padding": "right", "is_causal": None}
    src, keywords, real = call_of({"batch_first": batch_first}, call)
    expected = real(ours(src, **keywords))
    poisoned = src.detach().clone()
    (poisoned if batch_first else poisoned.transpose(0, 1))[padding_of("right")] = torch.nan
    assert torch.equal(real(ours(poisoned, **keywords)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "norm last"])
def test_the_numerical_contract(norm_first, dtype, backend):
    """For one layer in a stack, at real positions of a padded batch."""
    make = functools.partial(nn.TransformerEncoderLayer, E, H, 24, 0.0, "gelu", norm_first=norm_first)
    theirs = nn.TransformerEncoder(make(batch_first=True), 1, enable_nested_tensor=False)
    ours = TransformerEncoder(make(batch_first=True), 1, enable_nested_tensor=False)
    hidden = padding_of("right")

    def inputs(generator):
        parameters = {n: normal(generator, *p.shape) / E**0.5 for n, p in ours.named_parameters()}
        return parameters | {"src": normal(generator, N, S, E)}

    def call(module):
        def run(src, **parameters):
            return functional_call(module, parameters, (src,), {"src_key_padding_mask": hidden})[~hidden]

        return run

    with backends.use(backend):
        assert_contract(call(ours), call(theirs), inputs, dtype)


@pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "norm last"])
@pytest.mark.parametrize("place", ["dropout", "dropout1", "dropout2", "self_attn"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_dropout_acts(make_pair, assert_alike, backend, place, norm_first):
    """With everything dropped in one place the rest shows which it was."""
    pair = encoders(
        make_pair, {"activation": "gelu", "batch_first": True, "norm_first": norm_first}, layers=1
    )
    src, hidden = torch.randn(N, S, E), padding_of("right")
    results = []
    for module in pair:
        layer = module.float().train().layers[0]
        dropout = getattr(layer, place)
        if isinstance(dropout, nn.Dropout):
            dropout.p = 1.0
        else:
            dropout.dropout = 1.0
        with backends.use(backend):
            results.append(module(src, src_key_padding_mask=hidden)[~hidden])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.2])
def test_dropout_keeps_the_mean(make_pair, backend, p):
    """Of a block whose output nothing normalises: pre-norm, with a feed-forward block that is linear."""
    options = {"activation": lambda x: x, "norm_first": True, "batch_first": True}
    _, ours = make_pair(nn.TransformerEncoderLayer, TransformerEncoderLayer, E, H, 24, p, **options)
    ours = ours.float()
    with torch.no_grad():
        ours.self_attn.out_proj.weight.zero_()  # or the second norm would not be linear
    ours.dropout1.p = 0.0
    src = torch.randn(N, S, E)
    with backends.use(backend), torch.no_grad():
        torch.manual_seed(0)
        draws = torch.stack([ours(src) for _ in range(600)])
        exact = ours.eval()(src)
    deviation = (draws.mean(0) - exact).abs() / draws.std(0).clamp_min(1e-6) * 600**0.5
    assert draws.std(0).min() > 0
    assert deviation.max() < 5


def test_a_layer_of_a_users_class_keeps_the_padding(make_pair, assert_alike):
    class Doubling(nn.TransformerEncoderLayer):
        def forward(self, src, *args, **kwargs):
            return super().forward(2 * src, *args, **kwargs)

    theirs, ours = encoders(make_pair, {"activation": "gelu", "batch_first": True})
    for module in (theirs, ours):
        module.layers[1] = copy.deepcopy(theirs.layers[1])
        module.layers[1].__class__ = Doubling
    src, hidden = torch.randn(N, S, E, dtype=torch.float64), padding_of("right")
    assert_alike(theirs, ours, src, src_key_padding_mask=hidden)
    assert last_forward(ours).startswith("dense: its layer 1 is a ")
    assert last_forward(ours).endswith("Doubling")


@pytest.mark.parametrize("block", ["_sa_block", "_ff_block"])
@pytest.mark.parametrize("where", ["in the class", "in the module"])
def test_a_block_of_a_users_own_is_called(make_pair, assert_alike, block, where):
    theirs, ours = encoders(make_pair, {"activation": "gelu", "batch_first": False})
    for module, base in ((theirs, nn.TransformerEncoderLayer), (ours, TransformerEncoderLayer)):
        layer = module.layers[0]

        def own(self, *args, base=base, **kwargs):
            return 3 * getattr(base, block)(self, *args, **kwargs)

        if where == "in the class":
            layer.__class__ = type("Own", (base,), {block: own})
        else:
            setattr(layer, block, own.__get__(layer))
    src, hidden = torch.randn(S, N, E, dtype=torch.float64), padding_of("right")
    real = ~hidden.T
    assert_alike(theirs, ours, src, src_key_padding_mask=hidden, real=lambda out: out[real])
    assert last_forward(ours).startswith("without padding")


@pytest.mark.parametrize(
    ("shape", "masks"),
    [
        ((N, S, E), {"src_key_padding_mask": torch.zeros(S, N, dtype=torch.bool)}),
        ((N, S, E), {"src_key_padding_mask": torch.zeros(S, dtype=torch.bool)}),
        ((N, S, E), {"mask": torch.zeros(S, S + 1, dtype=torch.bool)}),
        ((N, S, E), {"mask": torch.zeros(S, S, dtype=torch.int64)}),
        ((N, S, E), {"src_key_padding_mask": torch.zeros(N, S, dtype=torch.int64)}),
        ((N, S, E), {"is_causal": True}),
        ((N, S, E), {"is_causal": True, "src_key_padding_mask": padding_of("right")}),
        ((N, S, E + 1), {}),
        ((2, N, S, E), {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [True, False])
def test_what_does_not_fit_raises_what_pytorch_raises(make_pair, grad, shape, masks):
    theirs, ours = encoders(make_pair, {"activation": "gelu", "batch_first": True})
    src = torch.randn(shape, dtype=torch.float64)
    with pytest.raises((AssertionError, RuntimeError)) as raised:
        theirs.train()(src, **masks)
    with torch.set_grad_enabled(grad), pytest.raises(raised.type):
        ours.eval()(src, **masks)
