"""MultiheadAttention of ours against PyTorch's path for training, over the arguments that it has."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from pytorch_ext import backends, ops
from pytorch_ext.nn import MultiheadAttention
from pytorch_ext.testing import assert_contract, normal

N, L, S, E, H = 3, 5, 7, 16, 4
BACKENDS = ["native", "reference", "cpu"]

CONSTRUCTORS = st.fixed_dictionaries(
    {
        "bias": st.booleans(),
        "kdim": st.sampled_from([None, None, 12]),
        "vdim": st.sampled_from([None, None, 10]),
        "batch_first": st.booleans(),
        "add_bias_kv": st.sampled_from([False, False, False, True]),
        "add_zero_attn": st.sampled_from([False, False, False, True]),
    }
)
CALLS = st.fixed_dictionaries(
    {
        "same": st.sampled_from(["all", "key and value", "none"]),
        "batched": st.booleans(),
        "attn_mask": st.sampled_from(
            [None, "bool", "float", "bool per head", "float per head", "all", "causal"]
        ),
        "key_padding_mask": st.sampled_from([None, "bool", "float"]),
        "need_weights": st.booleans(),
        "average_attn_weights": st.booleans(),
        "is_causal": st.booleans(),
        "training": st.booleans(),
    }
)


def call_of(options, call):
    """The positional arguments and the keywords of one call."""
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def hidden(*shape):
        mask = torch.rand(shape, generator=generator) < 0.4
        mask[..., 0] = False
        return mask

    def of(length, size):
        if not call["batched"]:
            return tensor(length, size).requires_grad_()
        return tensor(*((N, length) if options["batch_first"] else (length, N)), size).requires_grad_()

    same = call["same"] if options["kdim"] is options["vdim"] is None else "none"
    k_len = L if same == "all" else S
    query = of(L, E)
    key = query if same == "all" else of(S, options["kdim"] or E)
    value = key if same != "none" else of(S, options["vdim"] or E)
    heads = (N if call["batched"] else 1) * H
    masks = {
        None: lambda: None,
        "bool": lambda: hidden(L, k_len),
        "float": lambda: tensor(L, k_len).requires_grad_(),
        "bool per head": lambda: hidden(heads, L, k_len),
        "float per head": lambda: tensor(heads, L, k_len).requires_grad_(),
        "all": lambda: torch.ones(L, k_len, dtype=torch.bool),
        "causal": lambda: torch.ones(L, k_len, dtype=torch.bool).triu(1),
    }
    padding = (N, k_len) if call["batched"] else (k_len,)
    paddings = {None: lambda: None, "bool": lambda: hidden(*padding), "float": lambda: tensor(*padding)}
    keywords = {name: call[name] for name in ("need_weights", "average_attn_weights", "is_causal")}
    keywords["attn_mask"] = masks[call["attn_mask"]]()
    keywords["key_padding_mask"] = paddings[call["key_padding_mask"]]()
    return (query, key, value), keywords


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=200)
@given(options=CONSTRUCTORS, call=CALLS)
def test_outputs_weights_gradients_and_errors(make_pair, assert_alike, options, call):
    theirs, ours = make_pair(nn.MultiheadAttention, MultiheadAttention, E, H, **options)
    args, keywords = call_of(options, call)
    assert_alike(theirs.train(call["training"]), ours.train(call["training"]), *args, **keywords)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=60)
@given(options=CONSTRUCTORS, call=CALLS)
def test_inference_gives_what_training_does(make_pair, options, call):
    """PyTorch's fused path for inference differs from it: a row with nothing to attend, or a lonely is_causal."""
    theirs, ours = make_pair(nn.MultiheadAttention, MultiheadAttention, E, H, **options)
    args, keywords = call_of(options, call)
    try:
        expected = theirs(*args, **keywords)
    except (AssertionError, RuntimeError) as error:
        with torch.no_grad(), pytest.raises(type(error)):
            ours.eval()(*args, **keywords)
        return
    with torch.no_grad():
        got = ours.eval()(*args, **keywords)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("mask", "need_weights"), [(None, False), ("bool", False), ("float", False), ("float", True)], ids=str
)
def test_the_numerical_contract(mask, need_weights, dtype, backend):
    """With and without a mask; the learned one gets its gradient.

    Over many seeds: the largest error of a few is a matter of luck.
    """
    theirs, ours = (cls(E, H, batch_first=True) for cls in (nn.MultiheadAttention, MultiheadAttention))
    length = 40
    hidden = torch.arange(length) >= torch.tensor([[length], [9], [1]])

    def make(generator):
        inputs = {"x": normal(generator, N, length, E)}
        if mask == "float":
            inputs["mask"] = normal(generator, length, length)
        parameters = {n: normal(generator, *p.shape) / E**0.5 for n, p in ours.named_parameters()}
        return inputs | parameters

    def call(module):
        def run(x, mask=mask, **parameters):
            given = {"attn_mask": mask} if isinstance(mask, torch.Tensor) else {}
            if mask == "bool":
                given["key_padding_mask"] = hidden
            out = functional_call(module, parameters, (x, x, x), {"need_weights": need_weights, **given})
            return tuple(t for t in out if t is not None)

        return run

    with backends.use(backend):
        assert_contract(call(ours), call(theirs), make, dtype, seeds=range(16))


def test_self_attention_is_one_product(make_pair, monkeypatch):
    _, ours = make_pair(nn.MultiheadAttention, MultiheadAttention, E, H, batch_first=True)
    shapes, strides = [], []
    linear, attention = ops.linear, ops.scaled_dot_product_attention
    monkeypatch.setattr(ops, "linear", lambda x, w, *rest: shapes.append(w.shape) or linear(x, w, *rest))
    monkeypatch.setattr(
        ops,
        "scaled_dot_product_attention",
        lambda q, *rest: strides.append(q.stride()) or attention(q, *rest),
    )
    x = torch.randn(N, L, E, dtype=torch.float64)
    ours(x, x, x, need_weights=False)
    assert shapes == [(3 * E, E), (E, E)]
    assert strides == [(L * 3 * E, E // H, 3 * E, 1)]  # a view of the product
    ours(x, x.clone(), x.clone(), need_weights=False)
    assert shapes[2:] == [(E, E)] * 4


@pytest.mark.parametrize("same", ["key and value", "none"])
def test_rows_of_the_weight_are_the_same_tensors_at_every_call(make_pair, monkeypatch, same):
    """A kernel remembers by the tensor what it laid out; values that change are seen all the same."""
    theirs, ours = (m.eval() for m in make_pair(nn.MultiheadAttention, MultiheadAttention, E, H))
    x, y = torch.randn(L, N, E, dtype=torch.float64), torch.randn(S, N, E, dtype=torch.float64)
    inputs = (x, y, y if same == "key and value" else y.clone())
    seen, linear = [], ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, w, *rest: seen.append(w) or linear(x, w, *rest))

    def run():
        seen.clear()
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs)[0], theirs(*inputs)[0], rtol=1e-9, atol=1e-10)
        return seen[:-1]

    first = run()
    assert len(first) == (2 if same == "key and value" else 3)
    assert all(one is other for one, other in zip(run(), first, strict=True))
    for module in (theirs, ours):
        module.in_proj_weight.data.mul_(1.5)
    assert all(one is other for one, other in zip(run(), first, strict=True))
    for module in (theirs, ours):
        module.in_proj_weight.data = module.in_proj_weight.data * 0.5
    assert not any(one is other for one, other in zip(run(), first, strict=True))
    seen.clear()
    ours(*inputs)[0].sum().backward()
    assert ours.in_proj_weight.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_laid_out_rows_follow_their_values(dtype):
    """Large enough for a kernel to keep a layout."""
    attention = MultiheadAttention(64, H, batch_first=True, dtype=dtype).eval()
    x, y = torch.randn(2, 40, 64, dtype=dtype), torch.randn(2, 50, 64, dtype=dtype)
    with torch.no_grad(), backends.use("cpu"):
        before = attention(x, y, y, need_weights=False)[0]
        assert torch.equal(attention(x, y, y, need_weights=False)[0], before)
        attention.in_proj_weight.data.mul_(2.0)
        after = attention(x, y, y, need_weights=False)[0]
        fresh = copy.deepcopy(attention)(x, y, y, need_weights=False)[0]
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_acts_on_the_attention_weights(make_pair, backend, need_weights):
    """All of them: what is left is the last bias. A part of them: the others are scaled up."""
    theirs, ours = make_pair(nn.MultiheadAttention, MultiheadAttention, E, H, 1.0, batch_first=True)
    theirs, ours = theirs.float(), ours.float()
    x = torch.randn(N, L, E)
    with backends.use(backend):
        torch.testing.assert_close(
            ours(x, x, x, need_weights=need_weights), theirs(x, x, x, need_weights=need_weights)
        )
        ours.dropout = 0.3
        torch.manual_seed(0)
        draws = torch.stack([ours(x, x, x, need_weights=need_weights)[0] for _ in range(600)])
        exact = ours.eval()(x, x, x, need_weights=need_weights)[0]
    deviation = (draws.mean(0) - exact).abs() / draws.std(0).clamp_min(1e-6) * 600**0.5
    assert draws.std(0).min() > 0
    assert deviation.max() < 5


def test_weights_in_training_are_those_after_dropout(make_pair):
    _, ours = make_pair(nn.MultiheadAttention, MultiheadAttention, E, H, 0.25, batch_first=True)
    x = torch.randn(8, 40, E, dtype=torch.float64)
    weights = ours(x, x, x, average_attn_weights=False)[1]
    assert weights.shape == (8, H, 40, 40)
    assert abs(float((weights == 0).double().mean()) - 0.25) < 5 * (0.25 * 0.75 / weights.numel()) ** 0.5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_nested_tensors_go_to_pytorch(make_pair):
    pair = make_pair(nn.MultiheadAttention, MultiheadAttention, E, H, batch_first=True)
    theirs, ours = (module.eval() for module in pair)
    nested = torch.nested.nested_tensor([torch.randn(n, E, dtype=torch.float64) for n in (5, 2)])
    with torch.no_grad():
        got, expected = (m(nested, nested, nested, need_weights=False)[0] for m in (ours, theirs))
    torch.testing.assert_close(got.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"is_causal": True}, RuntimeError, r"^Need attn_mask .* attn_mask: expected .* got None$"),
        (
            {"attn_mask": torch.zeros(L, L, dtype=torch.int64)},
            AssertionError,
            "only bool and floating types of attn_mask are supported, got torch.int64",
        ),
        (
            {"key_padding_mask": torch.zeros(N, L, dtype=torch.uint8)},
            AssertionError,
            "only bool and floating types of key_padding_mask are supported, got torch.uint8",
        ),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_messages(make_pair, change, error, message, grad):
    _, ours = make_pair(nn.MultiheadAttention, MultiheadAttention, E, H, batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        ours.eval()(x, x, x, **change)


@pytest.mark.parametrize(
    ("shapes", "masks"),
    [
        (((N, L, E), (N, S, E), (N, S + 1, E)), {}),
        (((N, L, E), (N + 1, S, E), (N + 1, S, E)), {}),
        (((N, L, E), (S, E), (S, E)), {}),
        (((N, L, E + 4), (N, S, E), (N, S, E)), {}),
        (((N, L, E), (N, S, E + 4), (N, S, E + 4)), {}),
        (((2, N, L, E),) * 3, {}),
        (((N, L, E),) * 3, {"attn_mask": torch.zeros(L, S)}),
        (((N, L, E),) * 3, {"attn_mask": torch.zeros(N, L, L)}),
        (((N, L, E),) * 3, {"attn_mask": torch.zeros(L)}),
        (((N, L, E),) * 3, {"key_padding_mask": torch.zeros(L, N)}),
        (((N, L, E),) * 3, {"key_padding_mask": torch.zeros(L)}),
        (((L, E),) * 3, {"key_padding_mask": torch.zeros(1, L)}),
        (((L, E),) * 3, {"attn_mask": torch.zeros(N, L, L)}),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_raise_what_pytorch_raises(make_pair, assert_alike, shapes, masks):
    theirs, ours = make_pair(nn.MultiheadAttention, MultiheadAttention, E, H, batch_first=True)
    args = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    masks = {name: mask.double() for name, mask in masks.items()}
    with pytest.raises((AssertionError, RuntimeError)) as raised:
        theirs(*args, **masks)
    with pytest.raises(raised.type):
        ours(*args, **masks)


@pytest.mark.filterwarnings("error:Support for mismatched")
def test_two_kinds_of_masks_warn_as_pytorch_does(make_pair):
    _, ours = make_pair(nn.MultiheadAttention, MultiheadAttention, E, H, batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64)
    masks = {"attn_mask": torch.zeros(L, L).double(), "key_padding_mask": torch.zeros(N, L, dtype=torch.bool)}
    with pytest.raises(UserWarning, match="mismatched key_padding_mask and attn_mask is deprecated"):
        ours(x, x, x, **masks)
