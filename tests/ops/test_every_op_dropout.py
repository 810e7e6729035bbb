"""The ops that drop out: one mask, defined by the contract, in forward and backward and in every kernel backend."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from pytorch_ext import backends, ops
from pytorch_ext.ops._raw import draw_rng
from pytorch_ext.testing import cumulative, normal, padding_mask

OP = "varlen_attention"  # of the test that is about no single case
P = 0.375
# A seed with its top bit set, and an offset that does not fit into one word.
SEED, OFFSET = -(2**62) - 12345, 2**33 + 77


@dataclass(frozen=True)
class Case:
    """One op on small tensors with dropout, and the same from PyTorch's ops with the mask given."""

    name: str
    op: str
    ours: Callable  # (dropout_p, **tensors)
    eager: Callable  # (keep, **tensors), keep already divided by 1 - p
    make: Callable
    positions: list[tuple[int, int, int]]  # column and the two middle words of each element's counter
    shape: tuple[int, ...]
    linear_in: str  # an input whose multiples the (last) output takes on


def _rows(*shape):
    return [(col, row, 0) for row in range(shape[0] * shape[1]) for col in range(shape[2])]


def _norm_inputs(generator):
    made = {name: normal(generator, 3, 5, 10) for name in ("input", "residual")}
    return made | {name: normal(generator, 10) for name in ("weight", "bias", "input_bias")}


def _eager_norm(keep, input, residual, weight, bias, input_bias):
    sum = residual + (input + input_bias) * keep
    return F.layer_norm(sum, sum.shape[-1:], weight, bias), sum


def _embedding_inputs(generator):
    ids = torch.randint(9, (3, 5), generator=generator)
    return {"ids": ids, "word": normal(generator, 9, 10), "weight": normal(generator, 10)}


def _attention_inputs(generator, dim=8):
    shapes = {"q": (2, 4, 5, dim), "k": (2, 2, 7, dim), "v": (2, 2, 7, dim)}
    return {name: normal(generator, *shape) for name, shape in shapes.items()}


def _eager_attention(keep, q, k, v):
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) * keep) @ v


LENGTHS_Q, LENGTHS_K = (3, 0, 5), (6, 2, 1)


def _varlen_inputs(generator, dim=8):
    shapes = {"q": (8, 4, dim), "k": (9, 2, dim), "v": (9, 2, dim)}
    return {name: normal(generator, *shape) for name, shape in shapes.items()}


def _varlen(dropout_p, q, k, v):
    cu = (cumulative(LENGTHS_Q, q.device), cumulative(LENGTHS_K, q.device))
    return ops.varlen_attention(q, k, v, *cu, 5, 6, dropout_p=dropout_p)


def _eager_varlen(keep, q, k, v):
    outs, start = [], 0
    pieces = zip(q.split(LENGTHS_Q), k.split(LENGTHS_K), v.split(LENGTHS_K), strict=True)
    for one_q, one_k, one_v in pieces:
        one = [t.transpose(0, 1)[None] for t in (one_q, one_k, one_v)]
        count = 4 * len(one_q) * len(one_k)
        one_keep = keep[start : start + count].view(1, 4, len(one_q), len(one_k))
        outs.append(_eager_attention(one_keep, *one)[0].transpose(0, 1))
        start += count
    return torch.cat(outs)


def _attention_positions(lengths_q, lengths_k):
    heads = (
        (b * 4 + h, n, m) for b, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)) for h in range(4)
    )
    return [(j, i, head) for head, n, m in heads for i in range(n) for j in range(m)]


CASES = [
    Case(
        "add_norm",
        "dropout_add_layer_norm",
        lambda p, **t: ops.dropout_add_layer_norm(**t, dropout_p=p, prenorm=True),
        _eager_norm,
        _norm_inputs,
        _rows(3, 5, 10),
        (3, 5, 10),
        "input",
    ),
    Case(
        "embedding",
        "embedding_layer_norm",
        lambda p, ids, word, weight: ops.embedding_layer_norm(
            ids, None, None, word, None, None, weight, None, eps=1e-5, dropout_p=p
        ),
        lambda keep, ids, word, weight: F.layer_norm(F.embedding(ids, word), (10,), weight) * keep,
        _embedding_inputs,
        _rows(3, 5, 10),
        (3, 5, 10),
        "weight",
    ),
    Case(
        "attention",
        "scaled_dot_product_attention",
        lambda p, q, k, v: ops.scaled_dot_product_attention(q, k, v, dropout_p=p, enable_gqa=True),
        _eager_attention,
        _attention_inputs,
        _attention_positions((5, 5), (7, 7)),
        (2, 4, 5, 7),
        "v",
    ),
    Case(
        "varlen",
        "varlen_attention",
        _varlen,
        _eager_varlen,
        _varlen_inputs,
        _attention_positions(LENGTHS_Q, LENGTHS_K),
        (4 * (3 * 6 + 5 * 1),),
        "v",
    ),
]


def tensors_of(case, device, dtype=torch.float32, grad=False):
    made = case.make(torch.Generator().manual_seed(0))
    return {
        name: t.to(device, dtype).requires_grad_(grad) if t.is_floating_point() else t.to(device)
        for name, t in made.items()
    }


def last(out):
    return out[-1] if isinstance(out, tuple) else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mask_of_the_contract(case, kernel_backend, dtype, kept, fixed_rng, check_contract):
    """Outputs and gradients, so one mask in both directions, and that one."""
    fixed_rng(SEED, OFFSET)
    keep = kept(SEED, OFFSET, P, case.positions).view(case.shape)

    def eager(**tensors):
        like = next(t for t in tensors.values() if t.is_floating_point())
        return case.eager(keep.to(like) / (1 - P), **tensors)

    check_contract(kernel_backend, lambda **t: case.ours(P, **t), eager, case.make, dtype)


@pytest.mark.parametrize("above", [0, 1])
def test_a_word_equal_to_the_threshold_is_kept(
    case, kernel_backend, above, philox, kept, fixed_rng, check_contract
):
    """A probability that is some element's word over 2**32: that one element tells >= from >."""
    fixed_rng(SEED, OFFSET)
    key = SEED % 2**32, (SEED >> 32) % 2**32
    words = [philox((col >> 2, x, y, OFFSET % 2**32), key)[col & 3] for col, x, y in case.positions]
    word = min(words, key=lambda word: abs(word - 2**31))
    p = (word + above) / 2**32
    keep = kept(SEED, OFFSET, p, case.positions).view(case.shape)
    assert keep.flatten()[words.index(word)] == (not above)

    def eager(**tensors):
        like = next(t for t in tensors.values() if t.is_floating_point())
        return case.eager(keep.to(like) / (1 - p), **tensors)

    check_contract(
        kernel_backend, lambda **t: case.ours(p, **t), eager, case.make, torch.float32, gradients=False
    )


def test_equal_rng_gives_equal_bits_and_another_one_others(case, kernel_backend, fixed_rng, device_of):
    tensors = tensors_of(case, device_of(kernel_backend))
    outs = {}
    with backends.use(kernel_backend):
        for rng in (
            (SEED, OFFSET),
            (SEED, OFFSET + 2**32),
            (SEED, OFFSET + 1),
            (SEED + 1, OFFSET),
            (SEED + 2**32, OFFSET),
        ):
            fixed_rng(*rng)
            outs[rng] = last(case.ours(P, **tensors))
            assert torch.equal(outs[rng], last(case.ours(P, **tensors)))
    first, same, *others = outs.values()
    assert torch.equal(first, same), "of the offset only the low word counts"
    assert not any(torch.equal(first, other) for other in others)


def test_the_global_seed_decides(case, backend, device_of):
    tensors = tensors_of(case, device_of(backend))

    def draw(seed):
        torch.manual_seed(seed)
        with backends.use(backend):
            return last(case.ours(P, **tensors)), last(case.ours(P, **tensors))

    (first, second), (again, _), (other, _) = draw(0), draw(0), draw(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second), "every call draws a mask of its own"
    assert not torch.equal(first, other)


def test_the_ends_of_the_probability(case, backend, device_of):
    tensors = tensors_of(case, device_of(backend), grad=True)
    ones = torch.ones(case.shape, device=device_of(backend))
    state = torch.get_rng_state()
    with backends.use(backend):
        all_kept, all_dropped = last(case.ours(0.0, **tensors)), last(case.ours(1.0, **tensors))
        no_dropout = last(case.ours(0, **tensors))
    torch.testing.assert_close(all_kept, last(case.eager(ones, **tensors)))
    assert torch.equal(all_kept, no_dropout)
    assert torch.equal(all_dropped, last(case.eager(ones * 0, **tensors)))
    (gradient,) = torch.autograd.grad(all_dropped.sum(), tensors[case.linear_in])
    assert torch.equal(gradient, torch.zeros_like(gradient))
    torch.set_rng_state(state)
    with backends.use(backend):
        case.ours(0.0, **tensors)
    assert torch.equal(torch.get_rng_state(), state), "without dropout nothing is drawn"


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.full)], ids=["eager", "compiled"]
)
def test_backward_uses_the_mask_of_forward(case, backend, compiled, device_of):
    """The output is linear in one input: <gradient, input> is <output, its gradient>, if both saw one mask."""
    dtype = torch.float64 if backend in ("reference", "native") else torch.float32
    tensors = tensors_of(case, device_of(backend), dtype, grad=True)
    if case.op == "dropout_add_layer_norm":  # linear, without what is added
        for name in ("residual", "input_bias"):
            tensors[name] = torch.zeros_like(tensors[name])
    function = lambda **t: case.ours(P, **t)  # noqa: E731
    if compiled:
        function = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with backends.use(backend):
        out = last(function(**tensors))
    state = torch.get_rng_state()
    dout = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, tensors[case.linear_in], dout)
    torch.set_rng_state(state)
    assert (
        (out == 0).any()
        if case.op != "scaled_dot_product_attention" and case.op != "varlen_attention"
        else True
    )
    found, expected = (gradient * tensors[case.linear_in]).sum(), (out * dout).sum()
    # Another mask would move it by as much as it is; float32 rounds the sums.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_varlen_and_dense_attention_drop_the_same(kernel_backend, fixed_rng, device_of):
    """Sequence b of one is batch entry b of the other, whatever its length."""
    if backends.why_not(kernel_backend, "scaled_dot_product_attention"):
        pytest.skip("this backend has no dense attention")
    fixed_rng(SEED, OFFSET)
    lengths, device = (7, 1, 4), device_of(kernel_backend)
    g = torch.Generator().manual_seed(0)
    q, k = (normal(g, 3, 4, 7, 7).to(device, torch.float32) for _ in range(2))
    v = torch.eye(7, device=device).expand(3, 4, 7, 7)  # the output is then the dropped weights themselves
    real = padding_mask(lengths, 7, device)
    with backends.use(kernel_backend):
        dense = ops.scaled_dot_product_attention(q, k, v, real[:, None, None], dropout_p=P).transpose(1, 2)[
            real
        ]
        q, k, v = (t.transpose(1, 2)[real] for t in (q, k, v))
        cu = cumulative(lengths, device)
        packed = ops.varlen_attention(q, k, v, cu, cu, 7, 7, dropout_p=P)
    assert (packed == 0).float().mean() > 0.1
    assert torch.equal(packed == 0, dense == 0)
    torch.testing.assert_close(packed, dense)


def test_what_is_drawn():
    rng = draw_rng(torch.empty(3, dtype=torch.bfloat16))
    assert rng.dtype == torch.int64 and rng.shape == (2,) and (rng >= 0).all()
    assert not torch.equal(rng, draw_rng(rng))
