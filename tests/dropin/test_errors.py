"""Arguments that do not fit: one clear error, and nothing changed."""

import pytest
from torch import nn

import pytorch_ext
from pytorch_ext.backends import BackendError


def enter(model, **options):
    with pytorch_ext.optimized(model, **options):
        pass


CALLS = [pytorch_ext.optimize, pytorch_ext.explain, pytorch_ext.revert, pytorch_ext.refresh, enter]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "thing", [None, "model", nn.Linear, lambda x: x], ids=["None", "str", "class", "function"]
)
def test_what_is_no_module(call, thing):
    with pytest.raises(
        TypeError, match=rf"^model: expected a torch\.nn\.Module, got {type(thing).__name__}$"
    ):
        call(thing)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"backend": "cpp"},
            ValueError,
            r"^backend: expected one of auto, reference, native, .*, got 'cpp'$",
        ),
        (
            {"remove_padding": "always"},
            ValueError,
            r"^remove_padding: expected 'auto', True or False, got 'always'$",
        ),
        ({"remove_padding": 1}, ValueError, r"^remove_padding: expected 'auto', True or False, got 1$"),
        ({"remove_padding": None}, ValueError, r"^remove_padding: expected 'auto', True or False, got None$"),
        (
            {"cuda_graphs": True},
            ValueError,
            r"^cuda_graphs: expected False, or a model on a CUDA device, got True and parameters on cpu$",
        ),
        ({"cuda_graphs": "auto"}, ValueError, r"^cuda_graphs: expected True or False, got 'auto'$"),
    ],
)
def test_options(make_model, options, error, message, dry_run):
    model = make_model()
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(error, match=message):
        pytorch_ext.optimize(model, dry_run=dry_run, **options)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert not pytorch_ext.explain(model).replaced


def test_options_go_by_name():
    with pytest.raises(TypeError):
        pytorch_ext.optimize(nn.LayerNorm(3), "native")


def test_a_backend_that_cannot_run_here(monkeypatch):
    """Every reason is in the message, each once."""
    cuda = pytorch_ext.backends._registry.backend("cuda")
    monkeypatch.setattr(cuda, "why_not", lambda op, *tensors: ["there is no GPU", f"{op} is not compiled"])
    model = nn.Sequential(nn.LayerNorm(3))
    with pytest.raises(BackendError, match=r"^backend 'cuda' cannot be used: there is no GPU; ") as caught:
        pytorch_ext.optimize(model, backend="cuda")
    assert str(caught.value).count("there is no GPU") == 1
    assert "layer_norm is not compiled" in str(caught.value)
    assert type(model[0]) is nn.LayerNorm


def test_an_import_that_fails_changes_nothing(make_model, monkeypatch):
    model = make_model()
    before = {name: type(m) for name, m in model.named_modules()}

    def load(rule):
        if rule.target.endswith("BertLayer"):
            raise ImportError("no such stand-in")
        return original(rule)

    rule = type(pytorch_ext.dropin.rules.rule_for(nn.LayerNorm(3)))
    original = rule.load
    monkeypatch.setattr(rule, "load", load)
    with pytest.raises(ImportError, match="no such stand-in"):
        pytorch_ext.optimize(model)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"
