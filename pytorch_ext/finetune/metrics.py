"""How well a classifier does: accuracy, F1 and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .data import UNSEEN


def report(actual: Sequence[int], predicted: Sequence[int], classes: list[str]) -> dict[str, Any]:
    """Figures of a held-out part.

    A label that training never saw cannot be predicted: such a row counts as wrong, and has a row of its own, the last,
    in the confusion matrix.

    Returns:
        ``accuracy``; ``f1``, the mean over the classes that occur or were predicted; ``classes``, a row each with
        ``precision``, ``recall``, ``f1`` and ``rows``; ``confusion``, rows by actual and columns by predicted class;
        ``unseen``, how many rows had a label that training never saw.
    """
    count = len(classes)
    confusion = [[0] * count for _ in range(count + 1)]
    for a, p in zip(actual, predicted, strict=True):
        confusion[count if a == UNSEEN else a][p] += 1
    rows = []
    for number, name in enumerate(classes):
        right = confusion[number][number]
        occurs, said = sum(confusion[number]), sum(row[number] for row in confusion)
        rows.append(
            {
                "name": name,
                "rows": occurs,
                "precision": right / said if said else 0.0,
                "recall": right / occurs if occurs else 0.0,
                "f1": 2 * right / (occurs + said) if occurs + said else None,
            }
        )
    scores = [row["f1"] for row in rows if row["f1"] is not None]
    unseen = sum(confusion[count])
    return {
        "rows": len(actual),
        "accuracy": sum(confusion[n][n] for n in range(count)) / max(len(actual), 1),
        "f1": sum(scores) / max(len(scores), 1),
        "unseen": unseen,
        "classes": rows,
        "confusion": confusion if unseen else confusion[:count],
    }
