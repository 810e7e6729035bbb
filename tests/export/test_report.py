"""The page of a model: its numbers are the model's, its attention is what the model attends."""

import copy
import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pytorch_ext
from pytorch_ext import export, models, ops
from pytorch_ext.cli import app
from pytorch_ext.export._inputs import inputs_of
from pytorch_ext.export._observe import observe
from pytorch_ext.export._values import parts, values, weights
from pytorch_ext.export.samples import SAMPLES, Words
from pytorch_ext.testing import assert_contract, normal, padding_mask

pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32}


def attended(model: nn.Module, *args, **kwargs) -> torch.Tensor:
    """(layers, heads, queries, keys), as it was seen in a call."""
    return torch.stack([one for _, one in observe(model, inputs_of(model, args, kwargs, False)).attention])


def bert(kind: str, eager: nn.Module) -> nn.Module:
    if kind.startswith("px"):
        model = models.BertModel(models.BertConfig(**SIZES, **TEXT)).eval()
        model.load_state_dict(eager.state_dict())
    else:
        model = copy.deepcopy(eager)
        if "eager" not in kind:
            model.set_attn_implementation("sdpa")
    return pytorch_ext.optimize(model) if "optimised" in kind else model


def tokens(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (2, 8), generator=generator)
    return {"input_ids": ids, "attention_mask": padding_mask([5, 8], 8).long()}


@pytest.mark.parametrize("kind", ["eager", "sdpa", "optimised", "eager optimised", "px", "px optimised"])
def test_attention_of_bert_is_what_its_eager_self_returns(kind):
    torch.manual_seed(0)
    eager = transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT)).eval()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.mul_(4)  # else all attend all alike
    model = bert(kind, eager)

    def returned(of):
        def call(**inputs):
            with torch.no_grad():
                return torch.stack([one[0] for one in of(**inputs, output_attentions=True).attentions])

        return call

    ours = lambda **inputs: attended(model, **inputs)  # noqa: E731
    exact = returned(copy.deepcopy(eager).double())
    assert_contract(ours, returned(eager), tokens, torch.float32, gradients=False, exact=exact)


@pytest.mark.parametrize("optimised", [False, True])
def test_attention_of_pytorchs_encoder_is_what_its_modules_return(optimised):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    original = copy.deepcopy(model)
    if optimised:
        pytorch_ext.optimize(model)
    padding = ~padding_mask([5, 8], 8)

    def returned(of):
        def call(src):
            found = []
            with torch.no_grad():
                for one in of.layers:
                    asked = {"key_padding_mask": padding, "average_attn_weights": False}
                    found.append(one.self_attn(src, src, src, **asked)[1][0, :, :5])
                    src = one(src, src_key_padding_mask=padding)
            return torch.stack(found)

        return call

    # Of real tokens: what PyTorch's fast path makes of padding is its own affair.
    ours = lambda src: attended(model, src, src_key_padding_mask=padding)[..., :5, :]  # noqa: E731
    make = lambda generator: {"src": normal(generator, 2, 8, 32)}  # noqa: E731
    exact = returned(copy.deepcopy(original).double())
    assert_contract(ours, returned(original), make, torch.float32, gradients=False, exact=exact)


class Alone(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def test_attention_of_our_functions():
    generator = torch.Generator().manual_seed(0)
    q, k = normal(generator, 9, 4, 8).float(), normal(generator, 9, 2, 8).float()
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    ahead = torch.ones(4, 4, dtype=torch.bool).triu(1)
    first = (t[:4].transpose(0, 1).double() for t in (q, k.repeat_interleave(2, 1)))
    expected = (next(first) @ next(first).mT * 8**-0.5).masked_fill(ahead, -torch.inf).softmax(-1)

    varlen = Alone(lambda q, k, ends: ops.varlen_attention(q, k, k, ends, ends, 5, 5, is_causal=True))
    options = {"is_causal": True, "enable_gqa": True}
    dense = Alone(lambda q, k: ops.scaled_dot_product_attention(q, k, k, **options))
    by_head = (t[:4].transpose(0, 1)[None] for t in (q, k))
    for found in (attended(varlen, q, k, ends), attended(dense, *by_head)):
        assert found.shape == (1, 4, 4, 4)
        assert (found[0] - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_small_models_attend_as_often_as_they_have_layers():
    for name, layers in {"bert": 12, "vit": 12, "transformer": 6, "cnn": 0}.items():
        model, args, kwargs = SAMPLES[name]()
        found = observe(model, inputs_of(model, args, kwargs, False))
        assert len(found.attention) == layers and len(found.activations) > 10
        for _, one in found.attention:
            assert torch.allclose(one.sum(-1), torch.ones(()))
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        assert not any(hooks) and torch.backends.mha.get_fastpath_enabled()


def test_values_and_parts():
    x = torch.tensor([0.0, 1.0, 2.0, 4.0, torch.nan, torch.inf])
    found = values("x", x)
    assert (found.low, found.high, found.mean, found.wrong) == (0.0, 4.0, 1.75, 2)
    assert sum(found.shares) == 1 and found.shares == [0.25, 0, 0.25, 0, 0.25, 0, 0, 0.25]
    assert values("x", torch.full((3,), 2.0)).shares == [1.0]
    assert not values("x", torch.ones(3, dtype=torch.int64)).shares

    model = nn.Module()
    model.embeddings, model.head = nn.Embedding(10, 4), nn.Linear(4, 10)
    model.head.weight = model.embeddings.weight
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3))
    found = {part.name: (part.parameters, part.bytes) for part in parts(model)}
    layer = {f"layers.{i}": (28, 112) for i in range(3)}
    assert found == {"embeddings": (40, 160), "head": (10, 40), **layer}
    assert len(weights(model)) == 2 + 3 * 4
    assert len(parts(SAMPLES["bert"]()[0], most=6)) <= 6


def test_the_page_of_a_sentence_and_the_page_of_a_cnn(tmp_path):
    sizes = {**SIZES, "num_hidden_layers": 1}
    model = pytorch_ext.optimize(models.BertModel(models.BertConfig(**sizes, **TEXT)).eval())
    asked = {"text": "a <b> & c", "tokenizer": Words(50)}
    text = export.to_html(model, (), tmp_path / "m.html", **asked).read_text()
    assert 'alt="attention of 1 layers and 4 heads"' in text and "a &lt;b&gt; &amp; c" in text
    assert f"<b>{sum(p.numel() for p in model.parameters()):,}</b>" in text
    assert text.count("<svg") == 3 and "encoder.layer.*.attention.self.query" in text
    # It needs nothing else.
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text) and "@import" not in text

    cnn, args, _ = SAMPLES["cnn"]()
    with torch.no_grad():
        cnn[0].bias[0] = torch.nan
    text = export.to_html(cnn, args, tmp_path / "m.html").read_text()
    assert "There is no attention in this call" in text and "<img" not in text
    assert "Every parameter: 1 with infinities or NaN" in text
    assert "was not called" in export.to_html(nn.Linear(2, 2), (), tmp_path / "m.html").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["m.html"]


@pytest.mark.full
def test_the_command(tmp_path):
    file = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["view", "bert", "--text", "words of no model", "--out", str(file)])
    assert done.exit_code == 0 and done.output.strip() == f"wrote {file}"
    assert 'alt="attention of 12 layers and 12 heads"' in file.read_text()


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"text": "word " * 33, "tokenizer": Words(50)}, export.ExportError, "at most 32 tokens, got 33"),
        ({"text": "", "tokenizer": Words(50)}, export.ExportError, "at least one token"),
        ({"text": "a text"}, ValueError, "tokenizer: expected"),
        ({"kwargs": {"input_ids": torch.full((1, 2), 99)}}, export.ExportError, "fails on inputs"),
    ],
)
def test_bad_input(asked, error, message, tmp_path):
    model = models.BertModel(models.BertConfig(**{**SIZES, "num_hidden_layers": 1}, **TEXT)).eval()
    with pytest.raises(error, match=message) as raised:
        export.to_html(model, (), tmp_path / "m.html", **asked)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())
