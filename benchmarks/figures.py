"""The README's tables of speed-ups, out of the records under benchmarks/results.

python -m benchmarks.figures
"""

from __future__ import annotations

import json
from pathlib import Path

from . import runs

RESULTS = Path(__file__).resolve().parent / "results"
FILLS = {"sorted": "95 %, sorted by length", "27": "27 %", "60": "60 %", "100": "100 %"}
TABLES = {
    "amd-epyc-avx512-2-threads": ("compile", "openvino", "native", "auto"),
    "amd-epyc-avx2-2-threads": ("compile", "nested", "native", "auto"),
}
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
    """A row for each record of a whole BERT that was taken on `device`."""
    rows = []
    records = [runs.load(file).series for file in sorted((RESULTS / device).glob("bert-*.json"))]
    trains = any(one.suite == "train" for series in records for one in series)
    for series in records:
        found = {one.contender: one for one in series}
        case = next(iter(found.values())).facts
        label = "training step" if case["mode"] == "train" else "inference"
        label += (
            f", {case['dtype']}{' autocast' if case['mode'] == 'train' and case['dtype'] != 'fp32' else ''}"
        )
        label += f", {case['layers']} layers" if case["layers"] != 12 else ""
        names = TABLES[device]
        ratios = [digits(found[name].speedup["median"]) if name in found else "" for name in names]
        if not trains:
            label = label.removeprefix("inference, ")  # the heading of such a table says so
        cells = [label, FILLS[case["fill"]], *ratios[:-1], f"**{ratios[-1]}**" if ratios[-1] else ""]
        rows.append(row(cells))
    return rows


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
