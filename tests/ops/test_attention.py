import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from pytorch_ext import backends, ops
from pytorch_ext.ops.attention import scaled_dot_product_attention_bwd, scaled_dot_product_attention_fwd
from pytorch_ext.testing import normal, padding_mask

OP = "scaled_dot_product_attention"
sdpa, eager_sdpa = ops.scaled_dot_product_attention, F.scaled_dot_product_attention


def inputs(generator, batch=(2,), heads=3, key_heads=None, q_len=5, k_len=9, dim=16, value_dim=None):
    key_heads = heads if key_heads is None else key_heads
    return {
        "query": normal(generator, *batch, heads, q_len, dim),
        "key": normal(generator, *batch, key_heads, k_len, dim),
        "value": normal(generator, *batch, key_heads, k_len, dim if value_dim is None else value_dim),
    }


def of(function, **options):
    return lambda **tensors: function(**tensors, **options)


def leaves_of(made, device, dtype=torch.float32):
    return {name: t.to(device, dtype).requires_grad_() for name, t in made.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 40, 96, 256])
def test_head_sizes(backend, dim, dtype, check_contract):
    check_contract(backend, sdpa, eager_sdpa, lambda g: inputs(g, dim=dim), dtype)


test_head_sizes.full_in_interpreter = lambda dtype: dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 5), (3, 32)])
def test_values_of_another_size(backend, dim, value_dim, dtype, check_contract):
    check_contract(backend, sdpa, eager_sdpa, lambda g: inputs(g, dim=dim, value_dim=value_dim), dtype)


# One query or key, sizes around those of a kernel's tile, more keys than queries and the other way round.
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 9), (9, 1), (3, 130), (130, 3), (64, 65)])
def test_lengths(backend, q_len, k_len, is_causal, check_contract):
    make = lambda g: inputs(g, q_len=q_len, k_len=k_len, heads=2)  # noqa: E731
    check_contract(
        backend, of(sdpa, is_causal=is_causal), of(eager_sdpa, is_causal=is_causal), make, torch.float32
    )


def test_causal_is_upper_left(backend, device_of):
    """Query i sees keys 0 to i, also where there are more keys than queries (flash-attn aligns the other corner)."""
    value = torch.eye(5, device=device_of(backend))[None, None]
    q = k = torch.zeros(1, 1, 5, 4, device=value.device)
    with backends.use(backend):
        out = sdpa(q[:, :, :3], k, value, is_causal=True)[0, 0]
    assert out.tolist() == [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [pytest.approx(1 / 3)] * 3 + [0, 0]]


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize("batch", [(), (2,), (2, 2)], ids=str)
def test_grouped_queries(backend, batch, heads, key_heads, check_contract):
    make = lambda g: inputs(g, batch=batch, heads=heads, key_heads=key_heads)  # noqa: E731
    check_contract(backend, of(sdpa, enable_gqa=True), of(eager_sdpa, enable_gqa=True), make, torch.float32)


test_grouped_queries.full_in_interpreter = lambda batch: len(batch) == 2


@pytest.mark.parametrize("scale", [1.0, 0.01, -0.5, 0.0])
def test_scale(backend, scale, check_contract):
    check_contract(backend, of(sdpa, scale=scale), of(eager_sdpa, scale=scale), inputs, torch.float32)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 2), (1, 2, 1, 2)], ids=str)
def test_leading_dimensions(backend, shape, check_contract):
    """From ``(length, dim)`` to six dimensions."""

    def make(g):
        sizes = {"query": (5, 8), "key": (7, 8), "value": (7, 8)}
        return {name: normal(g, *shape, *size) for name, size in sizes.items()}

    check_contract(backend, sdpa, eager_sdpa, make, torch.float32)


@pytest.mark.parametrize("broadcast", ["query", "key", "value"])
def test_a_batch_that_broadcasts(backend, broadcast, check_contract):
    def make(g):
        made = inputs(g)
        return made | {broadcast: made[broadcast][:1]}

    check_contract(backend, sdpa, eager_sdpa, make, torch.float32)


EMPTY = [
    {"batch": (0,)},
    {"heads": 0},
    {"q_len": 0},
    {"k_len": 0},
    {"q_len": 0, "k_len": 0},
    {"dim": 0},
    {"value_dim": 0},
]


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"dropout_p": 0.5}, {"attn_mask": True}], ids=str
)
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_no_elements(backend, sizes, options, device_of):
    tensors = leaves_of(inputs(torch.Generator().manual_seed(0), **sizes), device_of(backend))
    q, k, v = tensors.values()
    if "attn_mask" in options:
        options = {"attn_mask": torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)}
    with backends.use(backend):
        out = sdpa(q, k, v, **options)
    assert out.shape == (*q.shape[:-1], v.shape[-1])
    if not k.shape[-2]:
        assert torch.equal(out, torch.zeros_like(out)), "a query that may attend nothing gets zeros"
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(g.isfinite().all() and g.shape == t.shape for g, t in zip(gradients, (q, k, v), strict=True))


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "dropout": {"dropout_p": 0.3},
    "bool mask": {"attn_mask": torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)},
    "causal dropout": {"is_causal": True, "dropout_p": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("key_heads", [2, 1], ids=["heads", "gqa"])
def test_gradcheck(options, key_heads, fixed_rng):
    fixed_rng(1, 2)
    made = inputs(
        torch.Generator().manual_seed(0), heads=2, key_heads=key_heads, q_len=3, k_len=4, dim=3, value_dim=2
    )
    call = lambda *values: sdpa(*values, **OPTIONS[options], enable_gqa=True)  # noqa: E731
    with backends.use("reference"):
        assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in made.values()])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 1, 4), (2, 2, 3, 4), (1, 2, 3, 1), (4,)], ids=str)
def test_gradcheck_of_a_float_mask(shape, dropout_p, fixed_rng):
    fixed_rng(1, 2)
    g = torch.Generator().manual_seed(0)
    made = [*inputs(g, heads=2, q_len=3, k_len=4, dim=3).values(), normal(g, *shape)]
    call = lambda *values: sdpa(*values, dropout_p=dropout_p)  # noqa: E731
    with backends.use("reference"):
        assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in made])


@pytest.mark.parametrize("options", ["plain", "bool mask", "float mask", "causal dropout"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(kernel_backend, layout, options, device_of):
    device = device_of(kernel_backend)
    made = inputs(torch.Generator().manual_seed(0), heads=2, q_len=3, k_len=4, dim=8).values()
    q, k, v = (t.to(device, torch.float32) for t in made)
    dout = torch.randn(2, 2, 3, 8, device=device)
    mask = {
        "bool mask": torch.rand(2, 1, 3, 4, device=device) > 0.3,
        "float mask": torch.randn(3, 4, device=device),
    }
    mask = mask.get(options)
    if mask is not None and mask.dim() < 4:
        mask = mask[None, None]
    if (
        layout == "transposed"
    ):  # (batch, length, heads, dim) in memory, as linear layers make them; masks the other way
        q, k, v, dout = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, dout))
        mask = None if mask is None else mask.mT.contiguous().mT
    dropping = options == "causal dropout"
    constants = (
        torch.tensor([1, 2], device=device) if dropping else None,
        0.5 if dropping else 0.0,
        dropping,
        0.3,
    )
    torch.library.opcheck(scaled_dot_product_attention_fwd, (q, k, v, mask, *constants, kernel_backend))
    out, lse = scaled_dot_product_attention_fwd(q, k, v, mask, *constants, kernel_backend)
    need_dmask = options == "float mask"
    backward = (dout, q, k, v, mask, out, lse, *constants, need_dmask, kernel_backend)
    torch.library.opcheck(scaled_dot_product_attention_bwd, backward)


def test_what_a_kernel_saves(kernel_backend, device_of):
    """The output lies in memory as the next linear layer reads it; lse is float32, a natural logarithm."""
    device = device_of(kernel_backend)
    q, k, v = (
        t.to(device, torch.bfloat16) for t in inputs(torch.Generator().manual_seed(0), k_len=100).values()
    )
    mask = padding_mask((100, 0), 100, device)[:, None, None]
    out, lse = scaled_dot_product_attention_fwd(q, k, v, mask, None, 0.0, False, 0.25, kernel_backend)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.dtype == torch.float32 and lse.shape == (2, 3, 5)
    exact = torch.logsumexp(q[0].double() @ k[0].double().mT * 0.25, -1)
    torch.testing.assert_close(lse[0].double(), exact, rtol=1e-5, atol=1e-5)
    assert (lse[1] == -torch.inf).all(), "nothing to attend"


def test_one_compilation_serves_every_shape(backend, device_of):
    """Of one head size: the scale is made from it, and is a constant to the compiler."""
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(sdpa, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    with backends.use(backend), torch.no_grad():
        for seed, sizes in enumerate([{}, {"q_len": 8}, {"k_len": 17}, {"batch": (5,), "heads": 2}]):
            made = inputs(torch.Generator().manual_seed(seed), **sizes)
            function(*(t.to(device_of(backend), torch.float32) for t in made.values()))
            counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


@given(
    sizes=st.fixed_dictionaries(
        {
            "q_len": st.integers(1, 20),
            # Of one key the gradients are zero, the difference of two numbers that a kernel may round differently.
            "k_len": st.integers(2, 20),
            "dim": st.integers(1, 20),
            "heads": st.integers(1, 4),
        }
    ),
    is_causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(backend, check_contract, sizes, is_causal, seed):
    options = {"is_causal": is_causal}
    make = lambda g: inputs(g, **sizes)  # noqa: E731
    seeds = range(seed, seed + 4)
    check_contract(backend, of(sdpa, **options), of(eager_sdpa, **options), make, torch.float32, seeds=seeds)


test_any_shape.full_in_interpreter = True


q, k, v = (t.float() for t in inputs(torch.Generator().manual_seed(0)).values())  # (2, 3, 5 or 9, 16)
mask = torch.ones(5, 9, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, k, v), {}, TypeError, "query: expected a torch.Tensor, got NoneType"),
        ((q, [1], v), {}, TypeError, "key: expected a torch.Tensor, got list"),
        ((q, k, 3), {}, TypeError, "value: expected a torch.Tensor, got int"),
        ((q.int(), k, v), {}, RuntimeError, "query: expected a floating-point tensor, got dtype torch.int32"),
        (
            (q[0, 0, 0], k, v),
            {},
            RuntimeError,
            r"query: expected at least 2 dimensions .*, got shape \(16,\)",
        ),
        (
            (q, k.half(), v),
            {},
            RuntimeError,
            "key: expected the dtype of query, torch.float32, got torch.float16",
        ),
        (
            (q, k, v.double()),
            {},
            RuntimeError,
            "value: expected the dtype of query, torch.float32, got torch.float64",
        ),
        ((q, k.to("meta"), v), {}, RuntimeError, "key: expected the device of query, cpu, got meta"),
        (
            (q, k[0], v),
            {},
            RuntimeError,
            r"key: expected as many dimensions as query, 4, got shape \(3, 9, 16\)",
        ),
        (
            (q, k[..., 1:], v),
            {},
            RuntimeError,
            r"key: expected head_dim 16 as query has, got shape \(2, 3, 9, 15\)",
        ),
        (
            (q, k, v[:, :, 1:]),
            {},
            RuntimeError,
            r"value: expected k_len 9 as key has, got shape \(2, 3, 8, 16\)",
        ),
        (
            (q, k[:, :1], v[:, :1]),
            {},
            RuntimeError,
            r"key: expected 3 heads as query has, .* \(enable_gqa=False\)",
        ),
        (
            (q, k[:, :2], v[:, :2]),
            {"enable_gqa": True},
            RuntimeError,
            "key: expected a number of heads that divides 3",
        ),
        (
            (q, k, v[:, :2]),
            {"enable_gqa": True},
            RuntimeError,
            "value: expected 3 heads as key has, got shape",
        ),
        ((q, k, v, [[True]]), {}, TypeError, "attn_mask: expected a torch.Tensor, got list"),
        (
            (q, k, v, mask.int()),
            {},
            RuntimeError,
            "attn_mask: expected dtype torch.bool or torch.float32, got .*int32",
        ),
        (
            (q, k, v, mask.double()),
            {},
            RuntimeError,
            "attn_mask: expected dtype torch.bool or .*, got torch.float64",
        ),
        ((q, k, v, mask[:4]), {}, RuntimeError, r"attn_mask: .* broadcasts to \(2, 3, 5, 9\), got \(4, 9\)"),
        (
            (q, k, v, mask.expand(3, 1, 5, 9)),
            {},
            RuntimeError,
            r"broadcasts to \(2, 3, 5, 9\), got \(3, 1, 5, 9\)",
        ),
        (
            (q, k, v, mask.expand(2, 2, 3, 5, 9)),
            {},
            RuntimeError,
            "attn_mask: expected a shape that broadcasts",
        ),
        (
            (q, k, v, mask.to("meta")),
            {},
            RuntimeError,
            "attn_mask: expected the device of query, cpu, got meta",
        ),
        (
            (q, k, v, mask),
            {"is_causal": True},
            RuntimeError,
            "is_causal: expected False beside an attn_mask, got True",
        ),
        (
            (q, k, v),
            {"dropout_p": 1.5},
            ValueError,
            "dropout_p: expected a probability between 0 and 1, got 1.5",
        ),
        (
            (q, k, v),
            {"dropout_p": -1},
            ValueError,
            "dropout_p: expected a probability between 0 and 1, got -1",
        ),
        ((q, k, v), {"dropout_p": float("nan")}, ValueError, "dropout_p: expected a probability .*, got nan"),
        (
            (q, k[:1].expand(4, 3, 9, 16), v),
            {},
            RuntimeError,
            "key, value: expected leading dimensions that .*, got shapes",
        ),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        sdpa(*arguments, **options)
