"""The pictures of a model's page, drawn with matplotlib: each is text that stands in HTML."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._errors import optional
from ._values import Part, Values, in_units

INK, FAINT, MAIN = "#26323d", "#5b6770", "#0f9d76"
MOST_KINDS = 32  # panels of a picture
MOST_LABELS = 40  # tokens beside a map; more have no room
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, **dict.fromkeys(_INKED, INK)}


def bars(parts: Sequence[Part]) -> str:
    """How large each part is."""
    rows = list(reversed(parts))
    with _style():
        figure = optional("matplotlib.figure").Figure(figsize=(9, 0.26 * len(rows) + 0.5))
        axes = figure.add_subplot()
        axes.barh(range(len(rows)), [part.bytes for part in rows], color=MAIN)
        axes.set_yticks(range(len(rows)), [part.name or part.kind for part in rows])
        for place, part in enumerate(rows):
            axes.text(part.bytes, place, f"\u00a0\u00a0{in_units(part.bytes)}", va="center", fontsize=8)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.margins(y=0.02, x=0.1)
        return _drawn(figure, "bytes of each part")


def histograms(kinds: Mapping[str, Sequence[Values]], columns: int = 4) -> str:
    """A panel for each kind and in it a line for each tensor, the first ones lighter.

    Logarithmic, so that a few values far away are seen.
    """
    shown = {kind: [one for one in own if one.shares] for kind, own in kinds.items()}
    shown = dict([(kind, own) for kind, own in shown.items() if own][:MOST_KINDS])
    if not shown:
        return "<p>There is nothing of a floating dtype.</p>"
    rows = math.ceil(len(shown) / columns)
    collections = optional("matplotlib.collections")
    with _style():
        height = 1.35 * rows
        figure = optional("matplotlib.figure").Figure(figsize=(11, height))
        # By hand: to measure every text takes longer than all the drawing.
        borders = {"left": 0.01, "right": 0.99, "top": 1 - 0.2 / height, "bottom": 0.2 / height}
        figure.subplots_adjust(**borders, hspace=0.55, wspace=0.08)
        colours = optional("matplotlib").colormaps["viridis_r"]
        for place, (kind, own) in enumerate(shown.items()):
            axes = figure.add_subplot(rows, columns, place + 1)
            lines = [_line(one) for one in own]
            shades = [colours(0.15 + 0.85 * i / max(len(own) - 1, 1)) for i in range(len(own))]
            axes.add_collection(collections.LineCollection(lines, colors=shades, linewidths=0.9))
            axes.set_yscale("log")
            axes.autoscale_view()
            axes.set_title(_shortened(kind), fontsize=7.5, loc="left", pad=3)
            axes.tick_params(labelsize=6.5, length=2, pad=1.5)
            axes.tick_params(axis="y", which="both", left=False, labelleft=False)
            axes.locator_params(axis="x", nbins=4)
            axes.spines["left"].set_visible(False)
        note = _left_out(len(kinds), len(shown))
        return _drawn(figure, "histograms", cut=False) + note


def attention(maps: Sequence[tuple[str, Tensor]], labels: Sequence[str] | None) -> str:
    """Rows of maps, one for each attention, and in them one for each head ``(L, S)``: who attends whom."""
    groups: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    for name, weights in maps:
        groups.setdefault(tuple(weights.shape), []).append((name, weights))
    return "".join(_grid(own, labels) for own in groups.values())


def _grid(maps: Sequence[tuple[str, Tensor]], labels: Sequence[str] | None) -> str:
    """As one image with gaps, which is drawn much sooner than an image for each head."""
    heads, queries, keys = maps[0][1].shape
    tall, wide = queries + 1, keys + 1
    image = torch.full((len(maps) * tall - 1, heads * wide - 1), torch.nan)
    for row, (_, weights) in enumerate(maps):
        for head in range(heads):
            top, left = row * tall, head * wide
            image[top : top + queries, left : left + keys] = weights[head]
    cell = min(0.115, 60 / max(image.shape))  # inches
    with _style():
        height, width = (max(cell * size, 1) + 1.2 for size in image.shape)
        figure = optional("matplotlib.figure").Figure(figsize=(width, height))
        axes = figure.add_subplot()
        # Not linear: most weights are small, and a few of them matter.
        scale = optional("matplotlib.colors").PowerNorm(0.5, 0, 1)
        axes.imshow(image.numpy(), cmap="magma_r", norm=scale, aspect="equal", interpolation="nearest")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, pad=1)
        named = labels is not None and queries == keys == len(labels) <= MOST_LABELS
        size = 72 * cell * 0.75
        texts = [_shortened(text, 14) for text in labels] if named else [""] * keys
        columns = [head * wide + i for head in range(heads) for i in range(keys)]
        rows = [row * tall + i for row in range(len(maps)) for i in range(queries)]
        if named:
            axes.set_xticks(columns, texts * heads, rotation=90, fontsize=size)
            axes.set_yticks(rows, texts * len(maps), fontsize=size)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        for head in range(heads):
            axes.text(head * wide + keys / 2 - 0.5, -1.2, f"head {head}", ha="center", fontsize=8)
        left = -1.5 - (0.5 * max(map(len, texts)) if named else 0)
        for row, name in enumerate(_told_apart([name for name, _ in maps])):
            at = (left, row * tall + queries / 2 - 0.5)
            axes.text(
                *at, _shortened(name, max(2 * queries, 8)), ha="right", va="center", fontsize=7, rotation=90
            )
        drawn = _drawn(figure, f"attention of {len(maps)} layers and {heads} heads", "png")
    note = "" if named else f"<p>Positions 0 to {queries - 1} from above, 0 to {keys - 1} from the left.</p>"
    return f'<div class="wide">{drawn}</div>{note}'


def _told_apart(names: list[str]) -> list[str]:
    """``encoder.layer.0.attention.self`` and its like as ``layer.0``."""
    if len(set(names)) < 2:
        return names
    paths = [name.split(".") for name in names]
    first, last = _alike(paths), _alike([path[::-1] for path in paths])
    return [".".join(path[max(first - 1, 0) : len(path) - last]) for path in paths]


def _alike(paths: list[list[str]]) -> int:
    """How many of their first parts are the same in all."""
    same = (len(set(parts)) == 1 for parts in zip(*paths, strict=False))
    return sum(itertools.takewhile(bool, same))


def _line(one: Values) -> list[tuple[float, float]]:
    if len(one.shares) == 1:  # all are equal
        return [(one.low, 1e-3), (one.low, 1.0)]
    least = min(share for share in one.shares if share) / 2  # where there is nothing
    width = (one.high - one.low) / len(one.shares)
    return [(one.low + (i + 0.5) * width, max(share, least)) for i, share in enumerate(one.shares)]


def _shortened(name: str, most: int = 42) -> str:
    """Without its middle; a dollar sign would begin a formula."""
    end = most * 2 // 3
    name = name if len(name) <= most else f"{name[: most - end - 1]}…{name[-end:]}"
    return name.replace("$", r"\$")


def _left_out(all_: int, shown: int) -> str:
    return f"<p>The first {shown} of {all_} kinds; the table has all.</p>" if shown < all_ else ""


def _style() -> Any:
    return optional("matplotlib").rc_context(_STYLE)


def _drawn(figure: Any, what: str, kind: str = "svg", cut: bool = True) -> str:
    file = io.BytesIO()
    # The same page for the same model: no date, no random ids.
    options = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 110}
    style = {"svg.hashsalt": "page", "svg.fonttype": "none"}
    with optional("matplotlib").rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a token that the font lacks there is a box
        figure.savefig(file, format=kind, bbox_inches="tight" if cut else None, **options)
    if kind == "svg":
        drawn = file.getvalue().decode()
        return drawn[drawn.index("<svg") :]  # without the declaration of a file of its own
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(what)}">'
