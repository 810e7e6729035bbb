import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pytorch_ext import backends, ops
from pytorch_ext.ops.embedding_layer_norm import embedding_layer_norm_bwd, embedding_layer_norm_fwd
from pytorch_ext.testing import normal

OP = "embedding_layer_norm"
TABLES = ("word", "position", "token_type")


def inputs(generator, ids=(3, 7), hidden=24, tables=TABLES, bias=True):
    made = {"input_ids": torch.randint(11, ids, generator=generator), "word": normal(generator, 11, hidden)}
    if "position" in tables:
        made |= {"position_ids": torch.arange(ids[-1]), "position": normal(generator, ids[-1] + 2, hidden)}
    if "token_type" in tables:
        made["token_type_ids"] = torch.randint(2, ids, generator=generator)
        made["token_type"] = normal(generator, 2, hidden)
    made["weight"] = normal(generator, hidden)
    return made | ({"bias": normal(generator, hidden)} if bias else {})


def ours(eps=1e-5, **given):
    names = (
        "input_ids",
        "token_type_ids",
        "position_ids",
        *("word", "position", "token_type"),
        "weight",
        "bias",
    )
    options = {name: value for name, value in given.items() if name not in names}
    return ops.embedding_layer_norm(*(given.get(name) for name in names), eps=eps, **options)


def eager(input_ids, word, weight, bias=None, padding_idx=None, eps=1e-5, **tables):
    x = F.embedding(input_ids, word, padding_idx)
    for name in ("token_type", "position"):
        if name in tables:
            x = x + F.embedding(tables[f"{name}_ids"], tables[name])
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def of(function, **options):
    return lambda **tensors: function(**tensors, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "tables", [("word",), ("word", "position"), ("word", "token_type"), TABLES], ids="+".join
)
def test_tables(backend, tables, dtype, check_contract):
    check_contract(backend, ours, eager, lambda g: inputs(g, tables=tables), dtype)


@pytest.mark.parametrize(
    ("ids", "hidden"), [((5,), 24), ((1, 1), 1), ((2, 3), 65), ((2, 2, 3), 8), ((1, 2), 768)], ids=str
)
def test_shapes(backend, ids, hidden, check_contract):
    check_contract(backend, ours, eager, lambda g: inputs(g, ids, hidden, bias=False), torch.float32)


@pytest.mark.parametrize("padding_idx", [0, 10, -1, -11])
def test_the_row_of_padding_gets_no_gradient(backend, padding_idx, check_contract):
    def make(g):  # with the padding's id among the others, also where it is counted from the end
        return inputs(g) | {"input_ids": torch.arange(21).view(3, 7) % 11}

    check_contract(
        backend, of(ours, padding_idx=padding_idx), of(eager, padding_idx=padding_idx), make, torch.float32
    )


def test_ids_that_repeat_add_up(backend, check_contract):
    """All 200 gradients in two rows, one after the other: nothing is lost, and nothing added in any order."""

    def make(g):
        return inputs(g, (4, 50)) | {"input_ids": torch.randint(2, (4, 50), generator=g)}

    check_contract(backend, ours, eager, make, torch.float32)


def test_int32_ids_and_ids_that_broadcast(backend, check_contract):
    def narrow(**given):
        given["input_ids"] = given["input_ids"].int()
        given["token_type_ids"] = given["token_type_ids"][:1].int()  # one row of ids for every sequence
        return ours(**given)

    def make(g):
        made = inputs(g)
        return made | {"token_type_ids": made["token_type_ids"][:1].expand(3, 7)}

    check_contract(backend, narrow, eager, make, torch.float32)


@pytest.mark.parametrize("ids", [(0, 5), (2, 0), (0,)], ids=str)
def test_no_tokens(backend, ids, device_of):
    made = inputs(torch.Generator().manual_seed(0), ids)
    tensors = {
        n: t.to(device_of(backend), torch.float32).requires_grad_()
        if t.is_floating_point()
        else t.to(device_of(backend))
        for n, t in made.items()
    }
    with backends.use(backend):
        out = ours(**tensors, dropout_p=0.5)
    leaves = [t for t in tensors.values() if t.requires_grad]
    assert out.shape == (*ids, 24)
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_eval_drops_nothing(backend, check_contract):
    check_contract(backend, of(ours, dropout_p=0.5, training=False), eager, inputs, torch.float32)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"dropout_p": 0.4}], ids=str)
@pytest.mark.parametrize("tables", [("word",), TABLES], ids="+".join)
def test_gradcheck(tables, options, fixed_rng):
    fixed_rng(1, 2)
    made = inputs(torch.Generator().manual_seed(0), (2, 4), 5, tables)
    made["input_ids"] = torch.tensor([[0, 3, 3, 9], [1, 2, 3, 0]])
    floats = [name for name, t in made.items() if t.is_floating_point()]
    row = options.get("padding_idx")
    before = made["word"].clone()

    def call(*values):
        given = made | dict(zip(floats, values, strict=True))
        if row is not None:  # what gradcheck moves in that row must not move the result
            given["word"] = given["word"].clone()
            given["word"][row] = before[row]
        return ours(**given, **options)

    with backends.use("reference"):
        assert torch.autograd.gradcheck(call, [made[name].requires_grad_() for name in floats])


@pytest.mark.parametrize("full", [True, False], ids=["full", "plain"])
@pytest.mark.parametrize(
    "layout", [lambda t: t, lambda t: t.t().contiguous().t()], ids=["contiguous", "transposed"]
)
def test_opcheck(kernel_backend, layout, full, device_of):
    device = device_of(kernel_backend)
    ids = layout(torch.randint(6, (2, 4), device=device))
    word, position, token_type = (layout(torch.randn(6, 8, device=device)) for _ in range(3))
    w, b = torch.randn(2, 8, device=device).unbind()
    type_ids, position_ids = layout(torch.randint(6, (2, 4), device=device)), torch.arange(4, device=device)
    rng, p, row = torch.tensor([3, 4], device=device), 0.5, 2
    if not full:
        type_ids = position_ids = position = token_type = b = rng = None
        p, row = 0.0, -1
    tables = (ids, type_ids, position_ids, word, position, token_type, w, b)
    torch.library.opcheck(embedding_layer_norm_fwd, (*tables, rng, p, 1e-5, kernel_backend))
    out, mean, rstd = embedding_layer_norm_fwd(*tables, rng, p, 1e-5, kernel_backend)
    dout = torch.randn_like(out)
    torch.library.opcheck(embedding_layer_norm_bwd, (dout, *tables, mean, rstd, rng, p, row, kernel_backend))


@given(batch=st.integers(1, 4), seqlen=st.integers(1, 6), hidden=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_shape(backend, check_contract, batch, seqlen, hidden, seed):
    make = lambda g: inputs(g, (batch, seqlen), hidden)  # noqa: E731
    check_contract(backend, ours, eager, make, torch.float32, seeds=range(seed, seed + 4))


test_any_shape.full_in_interpreter = True

good = {n: t.float() if t.is_floating_point() else t for n, t in inputs(torch.Generator()).items()}
ids = good["input_ids"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_ids": None}, TypeError, "input_ids: expected a torch.Tensor, got NoneType"),
        ({"word": None}, TypeError, "word: expected a torch.Tensor, got NoneType"),
        ({"weight": None}, TypeError, "weight: expected a torch.Tensor, got NoneType"),
        (
            {"input_ids": ids.float()},
            RuntimeError,
            "input_ids: expected dtype torch.int64 or torch.int32, got .*32",
        ),
        ({"input_ids": ids.bool()}, RuntimeError, "input_ids: expected dtype torch.int64 .*, got torch.bool"),
        (
            {"input_ids": ids + 5},
            IndexError,
            r"input_ids: expected ids from 0 to 10 \(the rows of word\), got 1\d",
        ),
        ({"input_ids": ids - 11}, IndexError, r"input_ids: expected ids from 0 to 10 .*, got -\d"),
        ({"token_type_ids": ids * 0 + 2}, IndexError, "token_type_ids: expected ids from 0 to 1 .*, got 2"),
        (
            {"position_ids": torch.arange(7) + 3},
            IndexError,
            "position_ids: expected ids from 0 to 8 .*, got 9",
        ),
        (
            {"position_ids": torch.arange(6)},
            RuntimeError,
            r"position_ids: .* broadcasts to .* \(3, 7\), got \(6,\)",
        ),
        ({"position_ids": None}, ValueError, "position_ids: expected a tensor beside position, got None"),
        ({"token_type": None}, ValueError, "token_type: expected a tensor beside token_type_ids, got None"),
        (
            {"word": good["word"][0]},
            RuntimeError,
            r"word: expected 2 dimensions \(entries, hidden\), got shape \(24,\)",
        ),
        (
            {"word": good["word"].int()},
            RuntimeError,
            "word: expected a floating-point tensor, got dtype torch.int32",
        ),
        (
            {"position": good["position"][:, 1:]},
            RuntimeError,
            r"position: expected shape \(9, 24\), got \(9, 23\)",
        ),
        (
            {"position": good["position"].half()},
            RuntimeError,
            "position: expected the dtype of word, torch.float32, got",
        ),
        ({"weight": good["weight"][1:]}, RuntimeError, r"weight: expected shape \(24,\), got \(23,\)"),
        (
            {"weight": good["weight"].half()},
            RuntimeError,
            "weight: expected the dtype of word, torch.float32, got",
        ),
        ({"bias": good["bias"].to("meta")}, RuntimeError, "bias: expected the device of word, cpu, got meta"),
        (
            {"input_ids": ids.to("meta")},
            RuntimeError,
            "input_ids: expected the device of word, cpu, got meta",
        ),
        (
            {"position": good["position"].to("meta")},
            RuntimeError,
            "position: expected the device of word, cpu, got meta",
        ),
        ({"padding_idx": 11}, ValueError, "padding_idx: expected a row of word, which has 11, got 11"),
        ({"padding_idx": -12}, ValueError, "padding_idx: expected a row of word, which has 11, got -12"),
        ({"dropout_p": 2}, ValueError, "dropout_p: expected a probability between 0 and 1, got 2"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        ours(**(good | changes))
