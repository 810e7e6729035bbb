"""Activations computed once more: the gradients of a model that keeps all, from less memory."""

import copy
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

import pytorch_ext
from pytorch_ext import backends
from pytorch_ext.benchmarks.bench_recompute import kept_bytes
from pytorch_ext.dropin._recompute import _policy
from pytorch_ext.training import recompute, selective_contexts

KINDS = ["layers", "selective"]
FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default


@pytest.fixture
def gradients(make_batch):
    """Of a model's loss on a batch with padding, with dropout drawn from one seed."""
    batch = make_batch()
    labels = torch.randint(0, 61, batch.real.shape, generator=batch.generator)
    batch.inputs["labels"] = labels.masked_fill(~batch.real, -100)

    def gradients(model, *, backend="auto"):
        model.train().zero_grad()
        torch.manual_seed(0)
        with backends.use(backend):
            loss = model(**batch.inputs).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    gradients.batch = batch.inputs
    return gradients


class Counted(TorchDispatchMode):
    """How often products and attention are computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("pytorch_ext::linear_fwd", "pytorch_ext::varlen_attention_fwd")
        return func(*args, **(kwargs or {}))


def assert_equal(got, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", ["px.BertForMaskedLM", "hf.BertForMaskedLM", "hf.AlbertForMaskedLM"])
def test_gradients_stay_what_they_were(make_pair, gradients, calls, name, backend):
    _, fast = make_pair(name, dropout=0.3, backend=backend)
    expected = gradients(fast)
    layers = calls.packed
    for kind in KINDS:
        recompute(fast, kind)
        calls.packed = calls.dense = 0
        assert_equal(gradients(fast), expected)
        assert (calls.packed, calls.dense) == (2 * layers, 0), "twice, without padding"


def test_what_is_dear_is_kept(make_pair, gradients):
    _, fast = make_pair("px.BertForMaskedLM", dropout=0.3, backend="reference")
    counts, kept = [], []
    for kind in (None, *KINDS):
        kept.append(kept_bytes(recompute(fast, kind).train(), gradients.batch))
        with Counted() as counted:
            gradients(fast)
        counts.append(counted.count)
    whole, once_more, chosen = counts
    # Per layer six products and attention, of which the last product's result is needed by nobody a second time.
    assert once_more >= whole + 2 * 6 and chosen == whole
    assert kept[1] < kept[2] < 0.8 * kept[0], kept
    assert kept_bytes(recompute(fast, None), gradients.batch) == kept[0]


def test_what_draws_is_computed_once_more():
    """It moves PyTorch's generator, from which later dropout draws."""
    tensors = (torch.empty(0),) * 3
    assert _policy(None, FLASH, *tensors, 0.0) is CheckpointPolicy.MUST_SAVE
    assert _policy(None, FLASH, *tensors, 0.1) is CheckpointPolicy.PREFER_RECOMPUTE
    assert _policy(None, FLASH, *tensors) is CheckpointPolicy.MUST_SAVE
    assert _policy(None, torch.ops.aten.add.Tensor, *tensors) is CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_time_runs_on_the_backend_of_the_first(make_pair, gradients, kind):
    """``reference`` and ``native`` draw different masks, and the backward pass runs outside of ``use``."""
    _, fast = make_pair("px.BertForMaskedLM", dropout=0.3)
    expected = gradients(fast, backend="reference")
    assert_equal(gradients(recompute(fast, kind), backend="reference"), expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("hf.BertForMaskedLM", "native"),
        ("hf.BertForMaskedLM", "reference"),
        ("hf.ModernBertForMaskedLM", "reference"),
    ],
)
def test_hugging_faces_checkpointing_takes_the_contexts(make_pair, gradients, name, backend):
    _, fast = make_pair(name, dropout=0.3, backend=backend)
    if "Modern" in name:
        gradients.batch.pop("token_type_ids")
    else:
        fast.bert.embeddings.dropout.p = 0.0  # it sets a hook there, and what is not fused draws other bits
    expected = gradients(fast)
    fast.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": selective_contexts})
    assert_equal(gradients(fast), expected)


def test_gradients_of_parts_of_a_batch_add_up(make_pair, make_batch):
    """Accumulated, as Trainer does: each part's mean counts by its labels."""
    _, fast = make_pair("px.BertForMaskedLM")
    batch = make_batch()
    labels = batch.inputs["input_ids"].masked_fill(~batch.real, -100)
    recompute(fast.train(), "selective")
    found = []
    for parts in (1, 2, 4):
        fast.zero_grad()
        for part in range(parts):
            inputs = {name: x[part::parts] for name, x in batch.inputs.items()}
            share = batch.real[part::parts].sum().item() / batch.real.sum().item()
            (fast(**inputs, labels=labels[part::parts]).loss * share).backward()
        found.append({name: p.grad.clone() for name, p in fast.named_parameters()})
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


@pytest.fixture
def compiled():
    """Compiles a model, and tells after a step which ops its forward and backward graph call, and what waits."""

    def compiled(model):
        torch._dynamo.reset()
        found = {}

        def keep(name):
            def compiler(graph, inputs):
                found[name] = Counter(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
                found[name]["results"] = len(graph.graph.output_node().args[0])
                return make_boxed_func(graph.forward)

            return compiler

        backend = aot_autograd(
            fw_compiler=keep("forward"),
            bw_compiler=keep("backward"),
            partition_fn=min_cut_rematerialization_partition,
        )
        return torch.compile(model, backend=backend, fullgraph=True, dynamic=True), found

    yield compiled
    torch._dynamo.reset()


@pytest.mark.long
def test_a_compiler_divides_the_graph_accordingly(make_pair, gradients, compiled):
    """Dropout draws the same elements the second time there, too."""
    _, fast = make_pair("px.BertForMaskedLM", dropout=0.3, backend="reference", num_hidden_layers=1)
    graphs, found = [], []
    for kind in (None, *KINDS):
        model, graph = compiled(recompute(fast, kind))
        got = gradients(model)
        found.append({name.removeprefix("_orig_mod."): gradient for name, gradient in got.items()})
        graphs.append(graph)
        assert_equal(found[-1], found[0])
    for name, whole, once_more, chosen in [
        ("linear_fwd", 0, 6, 0),
        ("varlen_attention_fwd", 0, 1, 0),
        ("dropout_add_layer_norm_fwd", 0, 2, 2),
        ("linear_bwd", 7, 7, 7),
    ]:
        name = f"pytorch_ext.{name}.default"
        assert [g["backward"][name] for g in graphs] == [whole, once_more, chosen], name
        assert len({g["forward"][name] for g in graphs}) == 1, name
    kept, least, less = (g["forward"]["results"] for g in graphs)
    assert least < less < kept


def test_it_stays_until_it_is_told_otherwise(make_pair, gradients):
    original, fast = make_pair("px.BertForMaskedLM")
    least = kept_bytes(recompute(fast, "layers"), gradients.batch)
    again = pytorch_ext.optimize(copy.deepcopy(fast))
    assert kept_bytes(again, gradients.batch) == least
    anew = pytorch_ext.optimize(pytorch_ext.revert(again))
    assert kept_bytes(anew, gradients.batch) > least
    with pytest.raises(ValueError, match="what: expected 'layers', 'selective' or None, got 'all'"):
        recompute(fast, "all")
    with pytest.raises(ValueError, match="model: expected an optimised encoder of BERT's kind, got BertFor"):
        recompute(original)
