"""What bench_bert times: one model with the same weights for every contender, and batches as a tokenizer makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

BASELINE = "eager"
SHAPES = {
    "base": {"hidden": 768, "layers": 12, "heads": 12, "intermediate": 3072},
    "large": {"hidden": 1024, "layers": 24, "heads": 16, "intermediate": 4096},
    "minilm": {"hidden": 384, "layers": 6, "heads": 12, "intermediate": 1536},
    "vit-base": {"hidden": 768, "layers": 12, "heads": 12, "intermediate": 3072, "family": "vit"},
}
VOCABULARY = 30522
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

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
    family: str = "bert"  # or vit: pictures of 196 patches, which have no padding

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
        if self.family == "vit":
            inputs = {"pixel_values": torch.randn(self.batch, 3, 224, 224, generator=draw).to(self.dtype)}
        else:
            inputs = self._texts(draw)
        if self.training:
            inputs["labels"] = torch.randint(2, (self.batch,), generator=draw)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _texts(self, draw: torch.Generator) -> dict[str, torch.Tensor]:
        lengths = torch.tensor(self.lengths)[:, None]
        at = torch.arange(self.seq)[None]
        mask = at < lengths
        return {
            "input_ids": torch.randint(1000, VOCABULARY, (self.batch, self.seq), generator=draw) * mask,
            "token_type_ids": ((at >= lengths // 2) & mask).long(),  # two segments, as for pairs of texts
            "attention_mask": mask.long(),
        }


def autocast(case: Case) -> torch.autocast:
    """Training in half precision: fp32 weights under autocast. Inference has its weights in the dtype."""
    half = case.training and case.dtype != torch.float32
    return torch.autocast(torch.device(case.device).type, dtype=case.dtype if half else None, enabled=half)


def hugging_face(
    case: Case, *, attention: str = "sdpa", dropout: float = 0.0, dtype: torch.dtype | None = None
) -> nn.Module:
    """Hugging Face's model with random weights, the same for every contender."""
    import transformers

    sizes = {
        "hidden_size": case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "intermediate_size": case.intermediate,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "num_labels": 2,
        "attn_implementation": attention,
    }
    torch.manual_seed(case.seed)
    if case.family == "vit":
        config = transformers.ViTConfig(**sizes)
        whole, bare = transformers.ViTForImageClassification, transformers.ViTModel
    else:
        more = {"vocab_size": VOCABULARY, "max_position_embeddings": max(512, case.seq)}
        config = transformers.BertConfig(**sizes, **more)
        whole, bare = transformers.BertForSequenceClassification, transformers.BertModel
    with torch.device(case.device):  # drawn where they are used: on a GPU in no time
        model = whole(config) if case.training else bare(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases start as zeros and norms as ones, which would hide an error in them.
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    if dtype is None:
        dtype = torch.float32 if case.training else case.dtype
    return model.to(case.device, dtype).train(case.training)


Builder = Callable[[Case, float], nn.Module]


def contenders(case: Case) -> dict[str, tuple[str, Builder]]:
    """Those that can run it. Name -> (what it is, how it is built for a dropout probability); the baseline is first."""
    from .contenders import everyone

    return {one.name: (one.what, one.build) for one in everyone() if not one.why_not(case)}


def precision(name: str) -> str:
    """In which a contender computes, where that is not the case's."""
    from .contenders import everyone

    return next((one.precision for one in everyone() if one.name == name), "")


def left_out(case: Case) -> dict[str, str]:
    """Those that cannot run it, and why not."""
    from .contenders import everyone

    return {one.name: why for one in everyone() if (why := one.why_not(case))}


def default_names(case: Case) -> list[str]:
    """All but the ones that are asked for by name: the reference, and what takes minutes to compile."""
    from .contenders import everyone

    return [one.name for one in everyone() if one.usual and not one.why_not(case)]
