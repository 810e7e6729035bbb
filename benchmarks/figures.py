"""The README's tables of speed-ups, out of the records under benchmarks/results.

python -m benchmarks.figures
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import runs
from .bert_contenders import SHAPES

RESULTS = Path(__file__).resolve().parent / "results"
FILLS = {"sorted": "95 %, sorted by length", "27": "27 %", "60": "60 %", "100": "100 %"}
TABLES = {  # the columns
    "amd-epyc-avx512-2-threads": ("compile", "openvino", "native", "auto"),
    "amd-epyc-avx2-2-threads": ("compile", "openvino", "nested", "native", "auto"),
}
WHOLE_MODELS = ("bert-", "train-", "full-")  # so begin the names of their records
CASE = ("mode", "family", "hidden", "layers", "batch", "seq", "fill")
MODELS = {"base": "", "large": "BERT-large", "minilm": "MiniLM", "vit-base": "ViT-B"}
FAMILIES = {
    "Bert": "BERT",
    "Roberta": "RoBERTa",
    "XLMRoberta": "XLM-RoBERTa",
    "Camembert": "CamemBERT",
    "Electra": "ELECTRA",
    "DistilBert": "DistilBERT",
    "Albert": "ALBERT",
    "ModernBert": "ModernBERT",
    "GPT2": "GPT-2, without a cache",
    "nn.TransformerEncoder": "`nn.TransformerEncoder`, over its nested tensors in inference",
    "ViT": "ViT, which has no padding",
    "SentenceTransformer": "SentenceTransformer over BERT",
    "DebertaV2": "DeBERTa-v2, whose attention and padding stay",
}


def bert_rows(device: str) -> list[str]:
    """A row for each case of a whole model that was timed on `device`, of BERT-base where it names none."""
    cases: dict[tuple[Any, ...], dict[str, runs.Series]] = {}
    for file in sorted((RESULTS / device).glob("*.json")):
        if file.name.startswith(WHOLE_MODELS):
            for one in runs.load(file).series:
                if runs.IN_BATCHES not in one.case:
                    key = (one.dtype, *(one.facts.get(name) for name in CASE))
                    cases.setdefault(key, {}).setdefault(one.contender, one)
    rows = []
    for found in cases.values():
        ratios = [digits(found[name].speedup["median"]) if name in found else "" for name in TABLES[device]]
        ratios[-1] = ratios[-1] and f"**{ratios[-1]}**"
        one = next(iter(found.values()))
        rows.append(row([label(one), FILLS[one.facts["fill"]], *ratios]))
    return rows


def label(one: runs.Series) -> str:
    """Model, mode, dtype, and what is not as usual."""
    facts = one.facts
    same = lambda shape: all(facts.get(k, v) == v for k, v in shape.items() if k != "layers")  # noqa: E731
    family = {"family": "bert"}
    shape, name = next(
        (SHAPES[known], written) for known, written in MODELS.items() if same(family | SHAPES[known])
    )
    train = facts["mode"] == "train"
    words = [*([name] if name else []), "training step" if train else "inference"]
    words += [one.dtype + (" autocast" if train and one.dtype != "fp32" else "")]
    if facts["layers"] != shape["layers"]:
        words.append(f"{facts['layers']} layers")
    if facts["seq"] not in (256, 197):
        words.append(f"{facts['batch']} × {facts['seq']}")
    return ", ".join(words)


def family_rows(device: str) -> list[str]:
    """A row for each family: inference, and training where that was timed."""
    found: dict[str, dict[str, float]] = {}
    for file in sorted((RESULTS / device).glob("bench_families*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        for case in record["cases"]:
            if "optimized" in case.get("speedup", {}):
                ratio = case["speedup"]["optimized"]["median"]
                found.setdefault(case["family"], {})[record["mode"]] = ratio
    return [
        row(
            [
                FAMILIES.get(name, name),
                *(digits(own[mode], 1) if mode in own else "" for mode in ("infer", "train")),
            ]
        )
        for name, own in found.items()
    ]


def digits(ratio: float, places: int = 2) -> str:
    """Two digits behind the point below 1.5 and, with `places` of 2, below 10; one elsewhere."""
    return f"{ratio:.{2 if ratio < 1.5 or (places == 2 and ratio < 10) else 1}f} ×"


def row(cells: list[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def main() -> None:
    for device in TABLES:
        print(
            f"{device}: {', '.join(TABLES[device])}", *bert_rows(device), *family_rows(device), "", sep="\n"
        )


if __name__ == "__main__":
    main()
