import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from pytorch_ext import backends, ops
from pytorch_ext.ops.varlen_attention import varlen_attention_bwd, varlen_attention_fwd
from pytorch_ext.testing import cumulative, normal, padding_mask

OP = "varlen_attention"


def inputs(generator, lengths_q, lengths_k, heads=4, key_heads=4, dim=16, value_dim=16):
    return {
        "query": normal(generator, sum(lengths_q), heads, dim),
        "key": normal(generator, sum(lengths_k), key_heads, dim),
        "value": normal(generator, sum(lengths_k), key_heads, value_dim),
    }


def ours(lengths_q, lengths_k=None, slack=0, **options):
    """The op on sequences of these lengths; without ``lengths_k`` self-attention, one tensor of lengths for both."""

    def call(query, key, value):
        cu_q = cumulative(lengths_q, query.device)
        cu_k = cu_q if lengths_k is None else cumulative(lengths_k, query.device)
        longest = (
            max(n, default=0) + slack for n in (lengths_q, lengths_q if lengths_k is None else lengths_k)
        )
        return ops.varlen_attention(query, key, value, cu_q, cu_k, *longest, **options)

    return call


def eager(lengths_q, lengths_k=None, **options):
    lengths_k = lengths_q if lengths_k is None else lengths_k

    def call(query, key, value):
        pieces = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
        outs = [query.new_empty(0, query.shape[1], value.shape[2])]
        for piece in pieces:
            q, k, v = (t.transpose(0, 1)[None] for t in piece)
            outs.append(
                F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)[0].transpose(0, 1)
            )
        return torch.cat(outs)

    return call


LENGTHS = [[1], [5], [3, 1, 9], [0, 4, 0, 2, 0], [64, 3], [1] * 20]


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_self_attention(backend, lengths, dtype, is_causal, check_contract):
    make = lambda g: inputs(g, lengths, lengths)  # noqa: E731
    check_contract(
        backend, ours(lengths, is_causal=is_causal), eager(lengths, is_causal=is_causal), make, dtype
    )


test_self_attention.long_in_interpreter = lambda lengths, dtype: len(lengths) > 10 and dtype != torch.float32
test_self_attention.full_in_interpreter = lambda lengths, dtype: (
    len(lengths) > 10 or dtype == torch.float16 or (dtype == torch.bfloat16 and len(lengths) > 3)
)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [([3, 1], [5, 7]), ([9, 2], [1, 6]), ([4], [70]), ([2, 0], [3, 4])]
)
def test_cross_attention(backend, lengths_q, lengths_k, is_causal, check_contract):
    """Causal is upper-left within each sequence, also where queries and keys differ in number."""
    make = lambda g: inputs(g, lengths_q, lengths_k)  # noqa: E731
    options = {"is_causal": is_causal}
    call, reference = ours(lengths_q, lengths_k, **options), eager(lengths_q, lengths_k, **options)
    check_contract(backend, call, reference, make, torch.float32)


@pytest.mark.parametrize("dim", [1, 7, 40, 96, 256])
def test_head_sizes(backend, dim, check_contract):
    make = lambda g: inputs(g, [5, 3], [5, 3], dim=dim, value_dim=dim)  # noqa: E731
    check_contract(backend, ours([5, 3]), eager([5, 3]), make, torch.bfloat16)


@pytest.mark.parametrize("sizes", [{"key_heads": 2}, {"key_heads": 1}, {"value_dim": 5}], ids=str)
def test_fewer_key_heads_and_other_values(backend, sizes, check_contract):
    make = lambda g: inputs(g, [5, 3], [5, 3], **sizes)  # noqa: E731
    check_contract(backend, ours([5, 3]), eager([5, 3]), make, torch.float32)


def test_scale_and_a_longer_max_seqlen(backend, check_contract):
    make = lambda g: inputs(g, [5, 3], [5, 3])  # noqa: E731
    check_contract(backend, ours([5, 3], slack=4, scale=0.3), eager([5, 3], scale=0.3), make, torch.float32)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.5}], ids=str)
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [([], []), ([0], [0]), ([0, 0], [0, 3]), ([3, 2], [0, 0])]
)
def test_no_elements(backend, lengths_q, lengths_k, options, device_of):
    made = inputs(torch.Generator().manual_seed(0), lengths_q, lengths_k)
    q, k, v = (t.to(device_of(backend), torch.float32).requires_grad_() for t in made.values())
    with backends.use(backend):
        out = ours(lengths_q, lengths_k, **options)(q, k, v)
    assert out.shape == q.shape
    assert not out.any(), "a query of a sequence without keys gets zeros"
    assert not any(g.any() for g in torch.autograd.grad(out.square().sum(), (q, k, v)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_sequence_without_keys_beside_others(backend, compiled, device_of):
    made = inputs(torch.Generator().manual_seed(0), [3, 2, 4], [2, 0, 5])
    q, k, v = (t.to(device_of(backend), torch.float32).requires_grad_() for t in made.values())
    call = ours([3, 2, 4], [2, 0, 5])
    if compiled:
        cu = cumulative([3, 2, 4], q.device), cumulative([2, 0, 5], q.device)
        compiled_op = torch.compile(ops.varlen_attention, fullgraph=True, dynamic=True, backend="aot_eager")
        call = lambda *tensors: compiled_op(*tensors, *cu, 4, 5)  # noqa: E731
    with backends.use(backend):
        out = call(q, k, v)
    assert not out[3:5].any() and out[:3].all() and out[5:].all()
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not dq[3:5].any() and all(g.isfinite().all() for g in (dq, dk, dv))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_sequence_sees_another(backend, bad, compiled, device_of):
    lengths, at = [3, 4, 2], slice(3, 7)
    cu = cumulative(lengths, device_of(backend))
    made = inputs(torch.Generator().manual_seed(0), lengths, lengths)
    clean = [t.to(device_of(backend), torch.float32) for t in made.values()]
    spoiled = [t.clone() for t in clean]
    for t in spoiled:
        t[at] = bad
    call = ops.varlen_attention
    if compiled:
        call = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for tensors in (clean, spoiled):
        leaves = [t.requires_grad_() for t in tensors]
        with backends.use(backend):
            out = call(*leaves, cu, cu, 4, 4)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        others = torch.ones(9, dtype=torch.bool, device=one.device)
        others[at] = False
        torch.testing.assert_close(one[others], other[others])


def test_equals_the_padded_batch(backend, check_contract):
    """What removing padding promises: at real positions the same as with a padding mask."""
    lengths = [7, 1, 4]
    real = padding_mask(lengths, 7)

    def make(g):
        return {name: normal(g, 3, 4, 7, 16) for name in ("query", "key", "value")}

    def packed(query, key, value):
        rows = real.to(query.device)
        return ours(lengths)(*(t.transpose(1, 2)[rows] for t in (query, key, value)))

    def padded(query, key, value):
        rows = real.to(query.device)
        out = F.scaled_dot_product_attention(query, key, value, rows[:, None, None])
        return out.transpose(1, 2)[rows]

    check_contract(backend, packed, padded, make, torch.float32)


@pytest.mark.full
def test_inductor_over_native(check_contract):
    """Compiled, `native` takes another way than eagerly: it pads."""
    lengths_q, lengths_k = [3, 0, 5], [4, 6, 1]
    op = torch.compile(ops.varlen_attention, fullgraph=True, dynamic=True)

    def call(query, key, value):
        cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
        return op(query, key, value, cu_q, cu_k, 5, 6, is_causal=True)

    make = lambda g: inputs(g, lengths_q, lengths_k, key_heads=2)  # noqa: E731
    check_contract("native", call, eager(lengths_q, lengths_k, is_causal=True), make, torch.float32)


def test_one_compilation_serves_every_batch(backend, device_of):
    counter = CompileCounterWithBackend("aot_eager")
    op = torch.compile(ops.varlen_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    with backends.use(backend), torch.no_grad():
        for lengths in ([3, 5], [4, 2], [7, 2, 3], [6, 6, 2, 1]):
            made = inputs(torch.Generator().manual_seed(0), lengths, lengths).values()
            q, k, v = (t.to(device_of(backend), torch.float32) for t in made)
            cu = cumulative(lengths, q.device)
            op(q, k, v, cu, cu, max(lengths), max(lengths))
            counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


OPTIONS = {"plain": {}, "causal": {"is_causal": True}, "scale": {"scale": 0.3}, "dropout": {"dropout_p": 0.3}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", [([2, 0, 3], None), ([2, 1, 3], [3, 0, 2])], ids=["self", "cross"])
def test_gradcheck(lengths, options, fixed_rng):
    fixed_rng(1, 2)
    lengths_q, lengths_k = lengths
    made = inputs(torch.Generator().manual_seed(0), lengths_q, lengths_k or lengths_q, 2, 1, 3, 2)
    with backends.use("reference"):
        call = ours(lengths_q, lengths_k, **OPTIONS[options])
        assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in made.values()])


@pytest.mark.parametrize("full", [True, False], ids=["full", "plain"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(kernel_backend, layout, full, device_of):
    device = device_of(kernel_backend)
    made = inputs(torch.Generator().manual_seed(0), [3, 0, 2], [2, 1, 4], 2, 2, 8, 8).values()
    q, k, v = (t.to(device, torch.float32) for t in made)
    dout = torch.randn(5, 2, 8, device=device)
    if layout == "transposed":  # (heads, tokens, dim) in memory
        q, k, v, dout = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v, dout))
    lengths = (cumulative([3, 0, 2], device), cumulative([2, 1, 4], device), 3, 4)
    constants = (
        torch.tensor([1, 2], device=device) if full else None,
        0.5 if full else 0.0,
        full,
        0.3,
        kernel_backend,
    )
    torch.library.opcheck(varlen_attention_fwd, (q, k, v, *lengths, *constants))
    out, lse = varlen_attention_fwd(q, k, v, *lengths, *constants)
    assert lse.shape == (2, 5) and lse.dtype == torch.float32
    torch.library.opcheck(varlen_attention_bwd, (dout, q, k, v, out, lse, *lengths, *constants))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=4),
    is_causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_lengths(backend, check_contract, lengths, is_causal, seed):
    lengths_q, lengths_k = map(list, zip(*lengths, strict=True))
    make = lambda g: inputs(g, lengths_q, lengths_k)  # noqa: E731
    options, seeds = {"is_causal": is_causal}, range(seed, seed + 4)
    call, reference = ours(lengths_q, lengths_k, **options), eager(lengths_q, lengths_k, **options)
    check_contract(backend, call, reference, make, torch.float32, seeds=seeds)


test_any_lengths.full_in_interpreter = True


q, k, v = (t.float() for t in inputs(torch.Generator().manual_seed(0), [3, 2], [3, 2], 4, 4, 8, 8).values())
cu = cumulative([3, 2])


def arguments(query=q, key=k, value=v, cu_q=cu, cu_k=None, max_q=3, max_k=3, **options):
    return (query, key, value, cu_q, cu_q if cu_k is None else cu_k, max_q, max_k), options


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (arguments(query=None), TypeError, "query: expected a torch.Tensor, got NoneType"),
        (arguments(value=[v]), TypeError, "value: expected a torch.Tensor, got list"),
        (arguments(cu_q=[0, 3, 5]), TypeError, "cu_seqlens_q: expected a torch.Tensor, got list"),
        (
            arguments(query=q.long()),
            RuntimeError,
            "query: expected a floating-point tensor, got dtype torch.int64",
        ),
        (
            arguments(query=q[None]),
            RuntimeError,
            r"query: expected 3 dimensions \(total_q, query_heads, head_dim\), got",
        ),
        (arguments(key=k[:, 0]), RuntimeError, r"key: expected 3 dimensions .*, got shape \(5, 8\)"),
        (
            arguments(key=k.half()),
            RuntimeError,
            "key: expected the dtype of query, torch.float32, got torch.float16",
        ),
        (arguments(value=v.to("meta")), RuntimeError, "value: expected the device of query, cpu, got meta"),
        (
            arguments(key=k[..., 1:]),
            RuntimeError,
            r"key: expected head_dim 8 as query has, got shape \(5, 4, 7\)",
        ),
        (
            arguments(value=v[1:]),
            RuntimeError,
            r"value: expected shape \(\*\(5, 4\), value_dim\), got \(4, 4, 8\)",
        ),
        (
            arguments(key=k[:, 1:], value=v[:, 1:]),
            RuntimeError,
            "key: expected a number of heads that divides 4, got",
        ),
        (
            arguments(cu_q=cu.long()),
            RuntimeError,
            r"cu_seqlens_q: expected torch.int32 .*, got torch.int64 of shape \(3,\)",
        ),
        (
            arguments(cu_k=cu.float()),
            RuntimeError,
            "cu_seqlens_k: expected torch.int32 .*, got torch.float32",
        ),
        (
            arguments(cu_q=cu[:0]),
            RuntimeError,
            r"cu_seqlens_q: expected torch.int32 of shape \(batch \+ 1,\), got .*\(0,\)",
        ),
        (
            arguments(cu_q=cu[None]),
            RuntimeError,
            r"cu_seqlens_q: expected torch.int32 of shape .*, got .*\(1, 3\)",
        ),
        (
            arguments(cu_q=cu.to("meta")),
            RuntimeError,
            "cu_seqlens_q: expected the device of query, cpu, got meta",
        ),
        (
            arguments(cu_k=cumulative([3, 1, 1])),
            RuntimeError,
            r"cu_seqlens_k: expected shape \(3,\), got \(4,\)",
        ),
        (
            arguments(cu_q=cu + 1),
            ValueError,
            "cu_seqlens_q: expected values from 0 to 5, the tokens in query, got 1 to 6",
        ),
        (
            arguments(cu_q=cumulative([3, 3])),
            ValueError,
            "cu_seqlens_q: expected values from 0 to 5, .*, got 0 to 6",
        ),
        (
            arguments(cu_k=cumulative([3, 1])),
            ValueError,
            "cu_seqlens_k: expected values from 0 to 5, the tokens in key",
        ),
        (
            arguments(cu_q=cumulative([6, -1]), max_q=9),
            ValueError,
            "cu_seqlens_q: .* never decrease, got 6 then 5",
        ),
        (arguments(max_q=2), ValueError, "max_seqlen_q: expected at least the longest length, 3, got 2"),
        (arguments(max_k=2), ValueError, "max_seqlen_k: expected at least the longest length, 3, got 2"),
        (arguments(dropout_p=7), ValueError, "dropout_p: expected a probability between 0 and 1, got 7"),
        (arguments(dropout_p=float("nan")), ValueError, "dropout_p: expected a probability .*, got nan"),
    ],
)
def test_bad_arguments(call, error, message):
    values, options = call
    with pytest.raises(error, match=message):
        ops.varlen_attention(*values, **options)
