"""What bench_families compares: a model of every family that optimize knows, with random weights, and its batch."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .bert_contenders import LENGTHS, VOCABULARY

Inputs = dict[str, torch.Tensor]
IMAGES = 4  # of 224 x 224 pixels, which are 197 tokens each


@dataclass(frozen=True)
class Shape:
    """The size of every model, and of the batch."""

    hidden: int = 384
    layers: int = 6
    heads: int = 12
    intermediate: int = 1536
    batch: int = 16
    seq: int = 256

    @property
    def lengths(self) -> list[int]:
        """Real tokens per sequence, 27 % of all positions: see LENGTHS."""
        table = LENGTHS["27"]
        return [max(1, round(table[row % len(table)] * self.seq / 256)) for row in range(self.batch)]

    @property
    def mask(self) -> torch.Tensor:
        return torch.arange(self.seq) < torch.tensor(self.lengths)[:, None]


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        build: the model in float32, ready to run; equal weights at each call.
        inputs: the batch by the names of the model's arguments.
        output: what is compared and, in training, differentiated, of the model's result: rows of real tokens.
        call: runs the model on the batch.
    """

    name: str
    build: Callable[[Shape], nn.Module]
    inputs: Callable[[Shape], Inputs]
    output: Callable[[Any, Shape], torch.Tensor]
    call: Callable[[nn.Module, Inputs], Any] = lambda model, inputs: model(**inputs)


def families() -> list[Family]:
    text = partial(Family, inputs=_text, output=_hidden)
    found = [text(name, partial(_hugging_face, name)) for name in _CONFIGS if name != "ViT"]
    found.append(
        Family("ViT", partial(_hugging_face, "ViT"), _pixels, lambda out, shape: out[0].flatten(0, 1))
    )
    found.append(Family("nn.TransformerEncoder", _torch, _embedded, lambda out, shape: out[shape.mask]))
    if importlib.util.find_spec("sentence_transformers"):
        found.append(
            text(
                "SentenceTransformer",
                _sentences,
                output=lambda out, shape: out["sentence_embedding"],
                call=lambda model, inputs: model(dict(inputs)),
            )
        )
    return found


# What each family's config calls its sizes, or has besides.
def _usual(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": max(512, shape.seq) + 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _distilbert(shape: Shape) -> dict[str, Any]:
    sizes = {
        "dim": shape.hidden,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "hidden_dim": shape.intermediate,
    }
    return {**sizes, "vocab_size": VOCABULARY, "dropout": 0.0, "attention_dropout": 0.0}


def _gpt2(shape: Shape) -> dict[str, Any]:
    sizes = {
        "n_embd": shape.hidden,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": shape.intermediate,
    }
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
    return {**sizes, **rates, **ids, "use_cache": False}


def _modernbert(shape: Shape) -> dict[str, Any]:
    ids = {f"{name}_token_id": i for i, name in enumerate(("pad", "cls", "bos", "sep", "eos"))}
    # Its feed-forward is gated: two thirds of the width for as many weights.
    return {**_usual(shape), **ids, "intermediate_size": shape.intermediate * 2 // 3}


def _deberta(shape: Shape) -> dict[str, Any]:
    """As version 3 has them."""
    relative = {"relative_attention": True, "position_buckets": 256, "pos_att_type": ["p2c", "c2p"]}
    return {**_usual(shape), **relative, "share_att_key": True, "norm_rel_ebd": "layer_norm"}


_CONFIGS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "Bert": _usual,
    "Roberta": _usual,
    "XLMRoberta": _usual,
    "Camembert": _usual,
    "Electra": lambda shape: {**_usual(shape), "embedding_size": shape.hidden},
    "DistilBert": _distilbert,
    "MPNet": _usual,
    "Albert": lambda shape: {**_usual(shape), "embedding_size": 128},
    "ModernBert": _modernbert,
    "DebertaV2": _deberta,
    "GPT2": _gpt2,
    "ViT": _usual,
}


def _hugging_face(name: str, shape: Shape) -> nn.Module:
    import transformers

    cls = getattr(transformers, f"{name}Model")
    torch.manual_seed(0)
    model = cls(cls.config_class(**_CONFIGS[name](shape)))
    return _filled(model)


def _sentences(shape: Shape) -> nn.Module:
    """A BERT with the mean over each text, as sentence-transformers loads it from a folder."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
        transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
        _hugging_face("Bert", shape).save_pretrained(folder)
        words = Transformer(folder)
    return SentenceTransformer(
        modules=[words, Pooling(shape.hidden, pooling_mode="mean")], device="cpu"
    ).eval()


def _torch(shape: Shape) -> nn.Module:
    torch.manual_seed(0)
    sizes = (shape.hidden, shape.heads, shape.intermediate)
    layer = nn.TransformerEncoderLayer(*sizes, dropout=0.0, activation="gelu", batch_first=True)
    return _filled(nn.TransformerEncoder(layer, shape.layers, enable_nested_tensor=True))


def _filled(model: nn.Module) -> nn.Module:
    """Biases start as zeros and norms as ones, which would hide an error in them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def _text(shape: Shape) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, VOCABULARY, (shape.batch, shape.seq), generator=draw)
    return {"input_ids": torch.where(shape.mask, ids, 1), "attention_mask": shape.mask.long()}


def _pixels(shape: Shape) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(IMAGES, 3, 224, 224, generator=draw)}


def _embedded(shape: Shape) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape.batch, shape.seq, shape.hidden, generator=draw)
    return {"src": x, "src_key_padding_mask": ~shape.mask}


def _hidden(out: Any, shape: Shape) -> torch.Tensor:
    return out.last_hidden_state[shape.mask]
