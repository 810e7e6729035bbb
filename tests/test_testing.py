"""The judge is judged: what is right passes, and every kind of error that was planted is found."""

import functools

import pytest
import torch
import torch.nn.functional as F

from pytorch_ext.testing import SEEDS, assert_contract, compare, compare_all, cumulative, normal, padding_mask

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make(generator):
    return {"input": normal(generator, 8, 64), "weight": normal(generator, 64)}


def eager(input, weight):
    return F.layer_norm(input, (64,), weight)


def in_float32(input, weight):
    return F.layer_norm(input.float(), (64,), weight.float()).to(input.dtype)


@DTYPES
def test_what_is_as_good_as_eager_passes(dtype):
    assert_contract(eager, eager, make, dtype)
    if dtype != torch.float32:
        assert_contract(in_float32, eager, make, dtype)


def failures(ours, dtype=torch.float32, eager=eager, make=make, **options):
    return "\n".join(compare(ours, eager, make, dtype, **options).failures())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_wrong_variance(dtype):
    """Unbiased instead of biased: with 64 columns a factor of 1.008, finer than bfloat16 can tell apart."""

    def unbiased(input, weight):
        wide = input.double()
        out = (
            (wide - wide.mean(-1, keepdim=True))
            / (wide.var(-1, keepdim=True) + 1e-5).sqrt()
            * weight.double()
        )
        return out.to(input.dtype)

    assert "output 0: rms error" in failures(unbiased, dtype)


class DropsATerm(torch.autograd.Function):
    """Layer normalisation whose backward forgets that the mean moves too."""

    @staticmethod
    def forward(ctx, input, weight):
        ctx.save_for_backward(input, weight)
        return eager(input, weight)

    @staticmethod
    def backward(ctx, dout):
        input, weight = (t.double() for t in ctx.saved_tensors)
        rstd = (input.var(-1, keepdim=True, correction=0) + 1e-5).rsqrt()
        x_hat = (input - input.mean(-1, keepdim=True)) * rstd
        dx_hat = dout.double() * weight
        dinput = (dx_hat - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True)) * rstd
        return dinput.to(dout.dtype), (dout * x_hat).sum(0).to(dout.dtype)


@DTYPES
def test_a_dropped_term(dtype):
    found = failures(lambda input, weight: DropsATerm.apply(input, weight), dtype)
    assert "gradient of input: rms error" in found and "gradient of input: largest error" in found
    assert "output 0" not in found and "gradient of weight" not in found


def changed(change):
    """``eager`` with its result changed, and the gradient left as it is."""

    def call(input, weight):
        out = eager(input, weight)
        return out + (change(out.detach().clone()) - out.detach())

    return call


def one_far_off(out):
    out[3, 4] += 1e-4
    return out


def one_nan(out):
    out[3, 4] = torch.nan
    return out


def one_inf(out):
    out[3, 4] = torch.inf
    return out


def test_one_value_that_is_off():
    found = failures(changed(one_far_off))
    assert "output 0: largest error" in found


def test_all_values_slightly_off():
    found = failures(changed(lambda out: out * (1 + 2e-6)))
    assert "output 0: rms error" in found


@pytest.mark.parametrize("change", [one_nan, one_inf])
def test_what_is_not_finite(change):
    assert "values are finite on one side alone" in failures(changed(change))


def test_zeros_where_eager_is_not_a_number():
    def log(input, weight):
        return input.log()

    assert failures(lambda input, weight: input.log().nan_to_num(0.0), eager=log, gradients=False)
    assert not failures(log, eager=log, gradients=False)


def test_a_wrong_shape():
    with pytest.raises(AssertionError, match=r"expected shape \(8, 64\), got \(8, 1\)"):
        failures(lambda input, weight: eager(input, weight)[:, :1])


def test_a_missing_output():
    with pytest.raises(AssertionError, match=r"expected output 0, output 1, .* got output 0, gradient"):
        failures(eager, eager=lambda input, weight: (eager(input, weight), input))


def test_a_gradient_that_does_not_flow():
    assert "gradient of weight" in failures(lambda input, weight: eager(input, weight.detach()))


def test_every_seed_counts():
    assert len(SEEDS) >= 4
    calls = []

    def wrong_once(input, weight):
        calls.append(1)
        return changed(one_far_off)(input, weight) if len(calls) == 3 else eager(input, weight)

    assert "output 0: largest error" in failures(wrong_once)
    assert len(calls) == len(SEEDS)


def test_what_is_exact_may_be_given():
    """A wrong reference cannot pass itself off: where eager is wrong too, say what is right."""
    wrong = functools.partial(F.layer_norm, normalized_shape=(64,), eps=0.5)
    both_wrong = lambda input, weight: wrong(input=input, weight=weight)  # noqa: E731
    assert not failures(both_wrong, eager=both_wrong)
    found = compare(both_wrong, both_wrong, make, torch.float32, exact=eager)
    assert found.ours["output 0"].rms > 1e-2


def test_all_three_see_the_same_numbers():
    seen = []

    def watch(input, weight):
        seen.append(input.detach())
        return eager(input, weight)

    compare(watch, watch, make, torch.bfloat16, seeds=[0], exact=watch)
    exact, ours, eagers = seen
    assert exact.dtype == torch.float64 and ours.dtype == eagers.dtype == torch.bfloat16
    assert torch.equal(exact, ours.double()) and torch.equal(ours, eagers)


def test_integers_stay_as_they_are():
    def embedding(ids, table):
        assert ids.dtype == torch.int64
        return F.embedding(ids, table)

    make = lambda g: {"ids": torch.randint(5, (3,), generator=g), "table": normal(g, 5, 4)}  # noqa: E731
    assert_contract(embedding, embedding, make, torch.bfloat16)


def test_makers():
    g = torch.Generator().manual_seed(0)
    assert normal(g).shape == () and normal(g, 2, 3, offset=1e3, scale=1e-3).mean() > 999
    assert cumulative([3, 0, 2]).tolist() == [0, 3, 3, 5] and cumulative([]).tolist() == [0]
    assert cumulative([1]).dtype == torch.int32
    assert padding_mask([2, 0], 3).tolist() == [[True, True, False], [False] * 3]


def test_several_at_once_are_judged_as_each_by_itself():
    wrong = lambda input, weight: eager(input, weight) * 1.001  # noqa: E731
    functions = {"right": eager, "wrong": wrong}
    together = compare_all(functions, eager, make, torch.float32)
    for name, function in functions.items():
        assert together[name] == compare(function, eager, make, torch.float32)
    assert not together["right"].failures()
    assert together["wrong"].failures()
