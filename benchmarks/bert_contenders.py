"""What bench_bert compares: one BERT with the same weights, run in every way a user would try."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import pytorch_ext

BASELINE = "eager"
SHAPES = {
    "base": {"hidden": 768, "layers": 12, "heads": 12, "intermediate": 3072},
    "large": {"hidden": 1024, "layers": 24, "heads": 16, "intermediate": 4096},
    "minilm": {"hidden": 384, "layers": 6, "heads": 12, "intermediate": 1536},
}
VOCABULARY = 30522

# Real tokens in each of 16 sequences of at most 256. "sorted" is what batching by length leaves.
LENGTHS: dict[str, tuple[int, ...]] = {
    "27": (256, 40, 22, 70, 130, 18, 30, 55, 90, 25, 33, 12, 180, 44, 60, 28),
    "60": (143, 256, 61, 198, 224, 8, 172, 112, 248, 92, 186, 24, 236, 129, 211, 158),
    "sorted": (256, 254, 253, 251, 250, 248, 246, 245, 243, 241, 239, 237, 235, 233, 231, 229),
    "100": (256,) * 16,
}


@dataclass(frozen=True)
class Case:
    """One measurement: the model's shape, the batch, the dtype and the mode."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    batch: int
    seq: int
    fill: str
    dtype: torch.dtype
    mode: str  # infer, train
    device: str
    seed: int = 0

    @property
    def training(self) -> bool:
        return self.mode == "train"

    @property
    def lengths(self) -> list[int]:
        """Real tokens per sequence: the table above, repeated and stretched to this batch."""
        table = LENGTHS[self.fill]
        return [max(1, round(table[row % len(table)] * self.seq / 256)) for row in range(self.batch)]

    def inputs(self) -> dict[str, torch.Tensor]:
        """A batch as a tokenizer makes it; the ids are drawn once, with the seed. Training adds labels."""
        draw = torch.Generator().manual_seed(self.seed)
        lengths = torch.tensor(self.lengths)[:, None]
        at = torch.arange(self.seq)[None]
        mask = at < lengths
        inputs = {
            "input_ids": torch.randint(1000, VOCABULARY, (self.batch, self.seq), generator=draw) * mask,
            "token_type_ids": ((at >= lengths // 2) & mask).long(),  # two segments, as for pairs of texts
            "attention_mask": mask.long(),
        }
        if self.training:
            inputs["labels"] = torch.randint(2, (self.batch,), generator=draw)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}


def autocast(case: Case) -> torch.autocast:
    """Training in half precision: fp32 weights under autocast. Inference has its weights in the dtype."""
    half = case.training and case.dtype != torch.float32
    return torch.autocast(torch.device(case.device).type, dtype=case.dtype if half else None, enabled=half)


def hugging_face(
    case: Case, *, attention: str = "sdpa", dropout: float = 0.0, dtype: torch.dtype | None = None
) -> nn.Module:
    """Hugging Face's BERT with random weights, the same for every contender."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        intermediate_size=case.intermediate,
        max_position_embeddings=max(512, case.seq),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=2,
        attn_implementation=attention,
    )
    torch.manual_seed(case.seed)
    model = (
        BertForSequenceClassification(config) if case.training else BertModel(config, add_pooling_layer=False)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases start as zeros and norms as ones, which would hide an error in them.
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    if dtype is None:
        dtype = torch.float32 if case.training else case.dtype
    return model.to(case.device, dtype).train(case.training)


class NestedEncoder(nn.Module):
    """PyTorch's own removal of padding: nn.TransformerEncoder, which takes nested tensors in inference.

    The embeddings are Hugging Face's; the layers hold copies of the same weights.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        bert = hugging_face(case)
        self.embeddings = bert.embeddings
        layer = nn.TransformerEncoderLayer(
            case.hidden,
            case.heads,
            case.intermediate,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=bert.config.layer_norm_eps,
            batch_first=True,
            device=case.device,
            dtype=case.dtype,
        )
        self.encoder = nn.TransformerEncoder(layer, case.layers, enable_nested_tensor=True).eval()
        with torch.no_grad():
            for mine, theirs in zip(self.encoder.layers, bert.encoder.layer, strict=True):
                mine.load_state_dict(_as_torch_layer(theirs))

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        embedded = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*nested tensors is in prototype stage.*")
            return self.encoder(embedded, src_key_padding_mask=attention_mask == 0)


def _as_torch_layer(layer: Any) -> dict[str, torch.Tensor]:
    """A BertLayer's weights under the names of nn.TransformerEncoderLayer."""
    attention = layer.attention.self
    projections = (attention.query, attention.key, attention.value)
    named = {
        "self_attn.out_proj": layer.attention.output.dense,
        "norm1": layer.attention.output.LayerNorm,
        "linear1": layer.intermediate.dense,
        "linear2": layer.output.dense,
        "norm2": layer.output.LayerNorm,
    }
    state = {
        f"{name}.{part}": getattr(module, part)
        for name, module in named.items()
        for part in ("weight", "bias")
    }
    state["self_attn.in_proj_weight"] = torch.cat([projection.weight for projection in projections])
    state["self_attn.in_proj_bias"] = torch.cat([projection.bias for projection in projections])
    return state


class OpenVino(nn.Module):
    """Hugging Face's BERT converted to OpenVINO, with dynamic batch and length, as its users run it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        import openvino

        bert = hugging_face(case, dtype=torch.float32)
        example = case.inputs()
        bert.config.return_dict = False
        shapes = [(name, openvino.PartialShape([-1, -1])) for name in example]
        # SDPA as one node of the graph is what its compiler fuses.
        graph = openvino.convert_model(bert, example_input=example, input=shapes)
        precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[case.dtype]
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        settings |= {"NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        self.request = openvino.compile_model(graph, "CPU", settings).create_infer_request()

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        found = self.request.infer({name: t.numpy() for name, t in inputs.items()}, share_inputs=True)
        return torch.from_numpy(found[0])


Builder = Callable[[Case, float], nn.Module]


def contenders(case: Case) -> dict[str, tuple[str, Builder]]:
    """Name -> (what it is, how it is built for a dropout probability). The first is the baseline."""
    found: dict[str, tuple[str, Builder]] = {
        BASELINE: ("Hugging Face default (SDPA attention)", lambda c, p: hugging_face(c, dropout=p)),
        "eager-attention": (
            "Hugging Face, attn_implementation='eager'",
            lambda c, p: hugging_face(c, attention="eager", dropout=p),
        ),
        "compile": (
            "torch.compile of the default, mode='default'",
            lambda c, p: torch.compile(hugging_face(c, dropout=p)),
        ),
        "max-autotune": (
            "torch.compile of the default, mode='max-autotune'",
            lambda c, p: torch.compile(hugging_face(c, dropout=p), mode="max-autotune"),
        ),
    }
    if not case.training:
        found["nested"] = ("nn.TransformerEncoder, nested-tensor fast path", lambda c, p: NestedEncoder(c))
        if case.device == "cpu" and importlib.util.find_spec("openvino"):
            found["openvino"] = ("OpenVINO, converted from the default", lambda c, p: OpenVino(c))
    backends = pytorch_ext.backends.available()
    for backend in backends:
        found[backend] = (f"pytorch_ext.optimize(backend={backend!r})", _ours(backend))
        if case.fill != "100":
            # What the kernels gain without the removal of padding.
            found[f"{backend}-padded"] = (
                f"pytorch_ext.optimize(backend={backend!r}, remove_padding=False)",
                _ours(backend, remove_padding=False),
            )
    if len(set(backends) - {"reference", "native"}) > 0:
        found["auto"] = ("pytorch_ext.optimize()", _ours(None))
    return found


def _ours(backend: str | None, remove_padding: str | bool = "auto") -> Builder:
    def build(case: Case, dropout: float) -> nn.Module:
        model = hugging_face(case, dropout=dropout)
        return pytorch_ext.optimize(model, backend=backend, remove_padding=remove_padding)

    return build


def default_names(case: Case) -> list[str]:
    """All but the ones that are asked for by name: the reference, and what takes minutes to compile."""
    unasked = {"max-autotune", "reference", "reference-padded", "native-padded"}
    return [name for name in contenders(case) if name not in unasked]
