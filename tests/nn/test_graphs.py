"""Which batches share a graph, how one is filled up, and when graphs are made anew: by a recorder that needs no GPU."""

import contextlib
import gc
import itertools
import random
import threading
import weakref

import pytest
import torch
from torch import nn

from pytorch_ext import nn as px
from pytorch_ext.nn import _graphs
from pytorch_ext.nn._graphs import MOST_GRAPHS, MOST_TOKENS, ends, replayed, size_for
from pytorch_ext.nn._padding import last_forward, pack
from pytorch_ext.nn.transformer_encoder import encode
from pytorch_ext.testing import padding_mask


class Repeats:
    """Records by keeping the work, repeats by doing it again; what nobody copied in is NaN in each replay."""

    def __init__(self, device):
        self.recorded = 0
        Repeats.last = self

    @staticmethod
    def why_not(x):
        return None

    @contextlib.contextmanager
    def turn(self):
        yield

    def record(self, work, tokens, where):
        out = work(tokens, where)
        self.recorded += 1

        def replay():
            out.copy_(work(tokens, where))
            tokens.fill_(torch.nan)

        tokens.fill_(torch.nan)
        return out, replay

    def finish(self):
        pass


class Encoder(px.TransformerEncoder):
    def forward(self, src, mask=None, src_key_padding_mask=None):
        return encode(self, src, mask, src_key_padding_mask, None, recorder=Repeats)


class Own(nn.MultiheadAttention):
    pass


def make(norm_first=False):
    torch.manual_seed(0)
    layer = px.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first, dropout=0.0)
    encoder = Encoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    return encoder.double().eval().requires_grad_(False)


def batch(lengths, seqlen=None):
    seqlen = seqlen or max(lengths)
    g = torch.Generator().manual_seed(sum(lengths))
    return torch.randn(len(lengths), seqlen, 16, generator=g, dtype=torch.float64), ~padding_mask(
        lengths, seqlen
    )


@pytest.fixture
def check():
    """That a batch gives what it does without graphs, and returns how often something was recorded so far."""

    def check(encoder, lengths, seqlen=None, mask=None):
        x, padding = batch(lengths, seqlen)
        expected = px.TransformerEncoder.forward(encoder, x, mask, padding)
        got = encoder(x, mask, padding)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert not got[padding].any()
        return Repeats.last.recorded

    return check


def test_a_size_holds_its_batch():
    draw = random.Random(0)
    for _ in range(2000):
        longest = draw.choice([1, 3, 16, 17, 128, 500])
        lengths = [draw.randint(0, longest) for _ in range(draw.choice([1, 2, 5, 31, 64]))]
        lengths[0] = max(lengths[0], 1)
        total, size = sum(lengths), size_for(lengths)
        found = ends(lengths, size)
        assert found[: len(lengths) + 1] == [0, *itertools.accumulate(lengths)]
        assert found[-1] == size.tokens >= total and len(found) == size.sequences + 1
        assert all(0 <= b - a <= size.longest for a, b in itertools.pairwise(found))
        assert size.tokens <= max(total + max(total / 8, 7), 16)


def test_sizes_are_few():
    sizes = {size_for([n]).tokens for n in range(1, MOST_TOKENS + 1)}
    assert len(sizes) <= 7 + 7 * 8 and max(sizes) == MOST_TOKENS
    assert size_for([128]) == (128, 1, 128)
    assert size_for([100]) == (104, 2, 128)
    assert size_for([1]) == (16, 2, 16)


@pytest.mark.parametrize("norm_first", [False, True])
def test_batches_of_one_size_share_a_graph(check, norm_first):
    encoder = make(norm_first)
    assert check(encoder, [11, 5, 1, 8]) == 1
    assert check(encoder, [9, 2, 7, 11]) == 1
    assert last_forward(encoder) == "without padding: 29 of 44 positions were real tokens; by a CUDA graph"
    assert check(encoder, [7, 7, 7, 7]) == 1  # no padding
    assert check(encoder, [40, 2]) == 2
    assert check(encoder, [11, 5, 1, 8], mask=torch.ones(11, 11, dtype=torch.bool).triu(1)) == 3


def test_results_outlive_the_next_replay(check):
    encoder = make()
    for lengths in ([5, 3], [5, 5]):
        x, padding = batch(lengths)
        first = encoder(x, None, padding)
        kept = first.clone()
        encoder(-x, None, padding)
        assert torch.equal(first, kept)


def test_weights_that_change(check):
    encoder = make()
    assert check(encoder, [5, 3]) == 1
    with torch.no_grad():
        encoder.layers[1].linear1.weight.mul_(2)
    encoder.layers[0].norm1.bias.data.add_(1)
    assert check(encoder, [5, 3]) == 1 and Repeats.last.recorded == 1
    before = Repeats.last
    encoder.layers[0].linear2.weight.data = torch.randn(16, 24, dtype=torch.float64)
    assert check(encoder, [5, 3]) == 2
    encoder.layers[1].norm2.weight = nn.Parameter(torch.randn(16, dtype=torch.float64), requires_grad=False)
    assert check(encoder, [5, 3]) == 3
    encoder.layers[1] = make().layers[0]
    assert check(encoder, [5, 3]) == 4
    assert Repeats.last is before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e.train(), "it is in training mode"),
        (lambda e: e.layers[1].dropout.train(), "it is in training mode"),
        (lambda e: e.requires_grad_(), "gradients are enabled"),
        (
            lambda e: e.layers[0].linear1.register_forward_hook(lambda *_: None),
            "a hook on its layers.0.linear1",
        ),
        (lambda e: setattr(e.layers[0], "forward", e.layers[0].forward), "there is a hook on its layers.0"),
    ],
    ids=["training", "part in training", "gradients", "hook", "forward"],
)
def test_what_no_graph_can_do(check, change, reason):
    encoder = make()
    assert check(encoder, [5, 3]) == 1
    change(encoder)
    for _ in range(2):
        assert check(encoder, [5, 3]) == 1
        assert reason in last_forward(encoder)


def test_a_layer_that_has_to_see_the_padded_batch(check):
    """It would mix sequences, if it were shown what a graph has."""
    encoder = make()
    encoder.layers[1].self_attn = Own(16, 2, batch_first=True).double().eval().requires_grad_(False)
    for _ in range(2):
        assert check(encoder, [5, 3]) == 0
        assert last_forward(encoder).endswith("no CUDA graph: a layer has to see the padded batch")


def test_batches_that_get_no_graph(monkeypatch):
    encoder, calls = make(), []

    def layers(tokens, where):
        calls.append(tokens.shape[0])
        return tokens * 2

    def run(x, **handed_down):
        pack(encoder, x, None)
        return replayed(encoder, Repeats, layers, x, None, handed_down), last_forward(encoder)

    x = torch.randn(2, 8, 16)
    assert torch.equal(run(x)[0], x * 2)
    assert run(x.new_zeros(0, 8, 16))[0] is None
    with torch.autograd.forward_ad.dual_level():
        assert run(x)[1].endswith("something traces or transforms the call")
    assert run(x.new_zeros(1, MOST_TOKENS + 1, 16))[1].endswith(
        f"9216 tokens, and the largest has {MOST_TOKENS}"
    )
    assert "handed position_ids" in run(x, position_ids=torch.arange(8))[1]
    assert run(x, causal=False)[0] is not None and Repeats.last.recorded == 2
    monkeypatch.setattr(_graphs, "MOST_GRAPHS", 2)
    assert run(x, causal=True)[1].endswith("2 of other sizes are there already")
    assert MOST_GRAPHS > 2 and run(x)[0] is not None


def test_modes_have_graphs_of_their_own(check):
    encoder = make()
    assert check(encoder, [5, 3]) == 1
    with torch.inference_mode():
        assert check(encoder, [5, 4]) == 1
    with torch.autocast("cpu", torch.bfloat16):
        x, padding = batch([5, 3])
        encoder.float()
        got = encoder(x.float(), None, padding)
        assert got.dtype == px.TransformerEncoder.forward(encoder, x.float(), None, padding).dtype
    recorded = Repeats.last.recorded
    encoder(x.float(), None, padding)
    assert Repeats.last.recorded == recorded + 1


def test_graphs_go_with_their_encoder(monkeypatch):
    encoder = make()
    x, padding = batch([5, 3])
    # What was captured needs its work no more.
    monkeypatch.setattr(Repeats, "record", lambda self, work, *inputs: (work(*inputs), lambda: None))
    encoder(x, None, padding)
    first, gone = Repeats.last, weakref.ref(encoder)
    _graphs.forget(encoder)
    encoder(x, None, padding)
    assert Repeats.last is not first
    del encoder
    gc.collect()
    assert gone() is None


def test_threads_take_turns():
    encoder = make()
    batches = [batch([n, 9]) for n in (3, 5, 6, 8)]
    expected = [px.TransformerEncoder.forward(encoder, x, None, padding) for x, padding in batches]
    wrong = []

    def work(at):
        for _ in range(8):
            x, padding = batches[at]
            with torch.no_grad():
                if not torch.allclose(encoder(x, None, padding), expected[at], rtol=1e-12):
                    wrong.append(at)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
