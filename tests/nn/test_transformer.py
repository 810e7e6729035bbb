"""The decoder, the whole Transformer, and what all modules of the family share: constructors, state, copies."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pytorch_ext
from pytorch_ext.nn._padding import last_forward

N, L, S, E, H = 3, 5, 7, 16, 4
FAMILY = [
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerEncoder",
    "TransformerDecoderLayer",
    "TransformerDecoder",
    "Transformer",
]

CONSTRUCTORS = st.fixed_dictionaries(
    {
        "activation": st.sampled_from(["relu", "gelu", nn.GELU("tanh"), F.silu]),
        "layer_norm_eps": st.sampled_from([1e-5, 1e-2]),
        "batch_first": st.booleans(),
        "norm_first": st.booleans(),
        "bias": st.booleans(),
    }
)
MASKS = st.sampled_from([None, "bool", "float", "float per head", "causal", "bool causal"])
PADDINGS = st.sampled_from([None, "bool", "bool", "float"])
CALLS = st.fixed_dictionaries(
    {
        "batched": st.sampled_from([True, True, True, False]),
        "training": st.booleans(),
        "src": st.tuples(MASKS, PADDINGS, st.sampled_from([None, False, True])),
        "tgt": st.tuples(MASKS, PADDINGS, st.sampled_from([None, False, True])),
        "memory": st.tuples(MASKS, PADDINGS, st.sampled_from([False, False, True])),
    }
)


def call_of(call, batch_first):
    """``(src, tgt)`` and the nine keywords of ``nn.Transformer.forward``."""
    generator = torch.Generator().manual_seed(1)
    batched = call["batched"]
    heads = (N if batched else 1) * H

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def mask(kind, rows, columns):
        if kind is None:
            return None
        if kind == "bool":
            return torch.rand(rows, columns, generator=generator) < 0.4
        if kind.endswith("causal"):
            ahead = torch.ones(rows, columns, dtype=torch.bool).triu(1)
            return (
                ahead
                if kind.startswith("bool")
                else torch.zeros(rows, columns).double().masked_fill_(ahead, -torch.inf)
            )
        return tensor(*((heads,) if kind == "float per head" else ()), rows, columns).requires_grad_()

    def padding(kind, length):
        if kind is None:
            return None
        found = tensor(N, length)
        if kind == "bool":
            found = torch.arange(length) >= torch.tensor([length, 2, 4])[:, None]
        return found if batched else found[1]

    def activations(length):
        if not batched:
            return tensor(length, E).requires_grad_()
        return tensor(*((N, length) if batch_first else (length, N)), E).requires_grad_()

    sizes = {"src": (S, S), "tgt": (L, L), "memory": (L, S)}
    keywords = {}
    for name, (rows, columns) in sizes.items():
        kind, padded, hint = call[name]
        keywords[f"{name}_mask"] = mask(kind, rows, columns)
        keywords[f"{name}_key_padding_mask"] = padding(padded, columns)
        keywords[f"{name}_is_causal"] = hint
    return (activations(S), activations(L)), keywords


@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:enable_nested_tensor")
@settings(max_examples=120)
@given(options=CONSTRUCTORS, call=CALLS)
def test_a_transformer(make_pair, assert_alike, options, call):
    """Where the decoder sees all of the encoder's output, the encoder keeps the padding."""
    sizes = {"num_encoder_layers": 1, "num_decoder_layers": 2, "dim_feedforward": 24, "dropout": 0.0}
    pair = make_pair(nn.Transformer, pytorch_ext.nn.Transformer, E, H, **sizes, **options)
    args, keywords = call_of(call, options["batch_first"])
    theirs, ours = (module.train(call["training"]) for module in pair)
    assert_alike(theirs, ours, *args, **keywords)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=120)
@given(options=CONSTRUCTORS, call=CALLS)
def test_a_decoder_layer(make_pair, assert_alike, options, call):
    classes = (nn.TransformerDecoderLayer, pytorch_ext.nn.TransformerDecoderLayer)
    theirs, ours = make_pair(*classes, E, H, 24, 0.0, **options)
    (memory, tgt), keywords = call_of(call, options["batch_first"])
    keywords = {name: t for name, t in keywords.items() if not name.startswith("src")}
    keywords["tgt_is_causal"] = bool(keywords["tgt_is_causal"])
    assert_alike(theirs, ours, tgt, memory, **keywords)
    with torch.no_grad():
        assert_alike_without_grad(theirs, ours.eval(), tgt, memory, **keywords)


def assert_alike_without_grad(theirs, ours, *args, **keywords):
    try:
        expected = theirs(*args, **keywords)
    except (AssertionError, RuntimeError) as error:
        with pytest.raises(type(error)):
            ours(*args, **keywords)
        return
    torch.testing.assert_close(ours(*args, **keywords), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("memory", ["the same", "an equal one", "one that hides more", "less", "float", None])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_padding_is_removed_where_the_decoder_cannot_see_it(make_pair, assert_alike, memory):
    theirs, ours = make_pair(nn.Transformer, pytorch_ext.nn.Transformer, E, H, 2, 2, 24, 0.0)
    call = {"batched": True, "src": (None, "bool", None), "tgt": ("causal", None, None)}
    args, keywords = call_of(call | {"memory": (None, None, False)}, False)
    padding = keywords["src_key_padding_mask"]
    keywords["memory_key_padding_mask"] = {
        "the same": padding,
        "an equal one": padding.clone(),
        "one that hides more": padding | (torch.arange(S) == 1),
        "less": padding & (torch.arange(S) != 5),
        "float": torch.zeros(N, S).double().masked_fill_(padding, -torch.inf),
        None: None,
    }[memory]
    assert_alike(theirs, ours, *args, **keywords)
    expected = "without padding: 13 of 21 positions were real tokens"
    if memory in ("less", "float", None):
        expected = "dense: memory_key_padding_mask lets the decoder attend its padding"
    assert last_forward(ours.encoder) == expected


@pytest.mark.parametrize(
    "place", ["dropout", "dropout1", "dropout2", "dropout3", "self_attn", "multihead_attn"]
)
@pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "norm last"])
def test_where_dropout_acts_in_a_decoder(make_pair, place, norm_first):
    classes = (nn.TransformerDecoderLayer, pytorch_ext.nn.TransformerDecoderLayer)
    pair = make_pair(*classes, E, H, 24, 0.0, norm_first=norm_first)
    tgt, memory = torch.randn(L, N, E, dtype=torch.float64), torch.randn(S, N, E, dtype=torch.float64)
    results = []
    for module in pair:
        dropout = getattr(module, place)
        setattr(dropout, "p" if isinstance(dropout, nn.Dropout) else "dropout", 1.0)
        results.append(module.train()(tgt, memory))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", FAMILY)
def test_constructors_signatures_and_state_are_pytorchs(name):
    theirs, ours = getattr(nn, name), getattr(pytorch_ext.nn, name)
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)
    names = [inspect.signature(cls.forward).parameters for cls in (ours, theirs)]
    assert [(p.name, p.kind, p.default) for p in names[0].values()] == [
        (p.name, p.kind, p.default) for p in names[1].values()
    ]
    one, other = make(ours), make(theirs)
    assert repr(one) == repr(other)
    assert {n: t.shape for n, t in one.state_dict().items()} == {
        n: t.shape for n, t in other.state_dict().items()
    }
    assert vars(one).keys() == vars(other).keys()


def make(cls, **options):
    layers = {
        "TransformerEncoder": nn.TransformerEncoderLayer,
        "TransformerDecoder": nn.TransformerDecoderLayer,
    }
    if cls.__name__ in layers:
        layer = layers[cls.__name__](E, H, 24, dropout=0.0, batch_first=True, **options)
        return cls(layer, 2, nn.LayerNorm(E, **options))
    if cls.__name__ == "Transformer":
        return cls(E, H, 1, 1, 24, dropout=0.0, batch_first=True, **options)
    middle = () if cls.__name__ == "MultiheadAttention" else (24,)
    return cls(E, H, *middle, dropout=0.0, batch_first=True, **options)


def inputs_of(name, **options):
    x, y = torch.randn(N, L, E, **options), torch.randn(N, S, E, **options)
    return {"MultiheadAttention": (x, y, y)}.get(name, (x,) if "Encoder" in name else (x, y))


@pytest.mark.parametrize("name", FAMILY)
def test_everything_within_is_ours(name):
    """And what a user gave is what it was."""
    module = make(getattr(pytorch_ext.nn, name))
    last = getattr(module, "norm", None)
    for path, child in module.named_modules():
        mine = getattr(pytorch_ext.nn, type(child).__name__, None)
        assert mine is None or type(child) is mine or child is last, path
    given = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H), 1, enable_nested_tensor=False)
    custom = pytorch_ext.nn.Transformer(E, H, 1, 1, custom_encoder=given)
    assert type(custom.encoder) is nn.TransformerEncoder
    assert type(custom.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(custom.decoder) is pytorch_ext.nn.TransformerDecoder


@pytest.mark.parametrize("name", FAMILY)
def test_copies_and_pickles(name):
    module, inputs = make(getattr(pytorch_ext.nn, name)), inputs_of(name)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        torch.testing.assert_close(other(*inputs), module(*inputs))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", FAMILY)
def test_device_and_dtype(name, device):
    module = make(getattr(pytorch_ext.nn, name), device=device, dtype=torch.bfloat16)
    out = module(*inputs_of(name, device=device, dtype=torch.bfloat16))
    out = out[0] if isinstance(out, tuple) else out
    assert (out.shape, out.device.type, out.dtype) == ((N, out.shape[1], E), device, torch.bfloat16)


@pytest.mark.parametrize(
    ("make_call", "error"),
    [
        (lambda m, src, tgt: m(src, tgt[:2]), "the batch number of src and tgt must be equal"),
        (
            lambda m, src, tgt: m(src[..., :8], tgt),
            "the feature number of src and tgt must be equal to d_model",
        ),
    ],
)
def test_errors_of_a_transformer(make_call, error):
    module = make(pytorch_ext.nn.Transformer)
    with pytest.raises(RuntimeError, match=error):
        make_call(module, torch.randn(N, S, E), torch.randn(N, L, E))
