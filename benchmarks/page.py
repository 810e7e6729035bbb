"""One self-contained HTML page and its pictures, out of a run."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files are written, no window opened

import matplotlib.pyplot as plt
from PIL import Image

from .batching import BUDGET, COME, SORTED
from .parts import OURS as OURS_NAMES
from .runs import IN_BATCHES, Run, Series
from .suite_table import header

WAYS = (COME, SORTED, BUDGET)
OURS, PEER, INK = "#0f9d76", "#9aa5b1", "#26323d"
PALETTE = ("#0f9d76", "#5579a8", "#d9822b", "#9a5fb5", "#b5485d", "#9aa5b1", "#4aa3a2", "#6f6f6f")
COLOURS = 64
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #26323d; max-width: 1060px; margin: 2em auto; padding: 0 1em }
h1 { margin-bottom: 0 } .machine, figcaption, .notes { color: #5b6770; font-size: 14px }
figure { margin: 2em 0 } img { max-width: 100% } table { border-collapse: collapse; font-size: 14px }
td, th { padding: 2px 10px; text-align: right } td:first-child, th:first-child { text-align: left }
tr.group td { font-weight: bold; padding-top: 10px } tr.ours td { color: #0b7a5b } .red { color: #b3261e }
summary { font-size: 1.5em; font-weight: bold; cursor: pointer }
"""


def write(run: Run, folder: Path) -> Path:
    """Writes the pictures and index.html, which holds them, into `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for name, (draw, caption) in PICTURES.items():
        figure = draw(run)
        if figure is None:
            continue
        file = folder / f"{name}.png"
        figure.savefig(file, dpi=110, bbox_inches="tight")
        plt.close(figure)
        with Image.open(file) as picture:  # few colours take a third of the bytes
            picture.convert("RGB").quantize(COLOURS).save(file, optimize=True)
        data = base64.b64encode(file.read_bytes()).decode()
        shown.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(name)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    page = folder / "index.html"
    page.write_text(_page(run, shown), encoding="utf-8")
    return page


def _page(run: Run, shown: list[str]) -> str:
    text = html.escape
    rows = []
    for group in dict.fromkeys(one.group for one in run.series):
        rows.append(f'<tr class="group"><td colspan="4">{text(group)}</td></tr>')
        for one in (one for one in run.series if one.group == group):
            ratio = one.speedup
            cells = [f"{one.median * 1e3:,.3f}"]
            cells += (
                [f"{ratio['median']:.2f} ×", f"{ratio['low']:.2f}–{ratio['high']:.2f}"] if ratio else ["", ""]
            )
            told = "".join(f"<td>{cell}</td>" for cell in cells)
            rows.append(f'<tr class="{"ours" * one.ours}"><td>{text(one.contender)}</td>{told}</tr>')
    red = "".join(f'<p class="red">{text(sentence)}</p>' for sentence in run.red)
    notes = "".join(f"<li>{text(sentence)}</li>" for sentence in run.notes)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>pytorch-ext bench {text(run.suite)}</title>'
        f"<style>{STYLE}</style><h1>pytorch-ext bench: {text(run.suite)}</h1>"
        f'<p class="machine">{text(header(run))}<br>How it was timed: {text(run.environment["how_timed"])}</p>{red}'
        f"{''.join(shown)}<details><summary>Every series</summary><table>"
        "<tr><th></th><th>ms</th><th>speed-up</th><th>quartiles</th></tr>"
        f'{"".join(rows)}</table></details><h2>Left out</h2><ul class="notes">{notes}</ul></html>\n'
    )


# --- Pictures: each returns a figure, or None where the run has nothing for it ----------------------


def _axes(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _whole(run: Run) -> list[Series]:
    """Whole models on one batch."""
    return [one for one in _models(run) if IN_BATCHES not in one.case]


def _models(run: Run) -> list[Series]:
    return [one for one in run.series if one.suite in ("bert", "train") and one.speedup]


def speedups(run: Run) -> Any:
    """Bars: each contender over the baseline, in the case that has most contenders and, of these, most padding."""
    groups: dict[str, list[Series]] = {}
    for one in _whole(run) or [one for one in run.series if one.speedup]:
        groups.setdefault(one.group, []).append(one)
    if not groups:
        return None
    padding = lambda group: 1.0 - groups[group][0].facts.get("filled", 1.0)  # noqa: E731
    name = max(groups, key=lambda group: (len(groups[group]), padding(group)))
    bars = sorted(groups[name], key=lambda one: one.speedup["median"])
    figure, axes = _axes(9, 0.42 * len(bars) + 1.2)
    for place, one in enumerate(bars):
        ratio = one.speedup
        axes.barh(place, ratio["median"], color=OURS if one.ours else PEER)
        axes.plot([ratio["low"], ratio["high"]], [place, place], color=INK, lw=1.5)
        axes.annotate(
            f"{ratio['median']:.2f} ×",
            (ratio["high"], place),
            (6, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over the line of the baseline
        )
    axes.set_yticks(range(len(bars)), [one.contender for one in bars])
    axes.axvline(1.0, color=INK, lw=0.8, ls=(0, (4, 3)))
    axes.set_title(name, loc="left", fontweight="bold")
    axes.set_xlabel("times as fast as the baseline")
    return figure


def roofline(run: Run) -> Any:
    """Intensity against rate, under what copying and multiplying reached in the same run."""
    points = [one for one in run.series if one.suite == "ops" and one.facts.get("copy_rate")]
    if not points:
        return None
    copy = max(one.facts["copy_rate"] for one in points)
    products = [one.facts["product_rate"] for one in points if one.facts["product_rate"]]
    figure, axes = _axes(9, 5)
    axes.set(xscale="log", yscale="log")  # before anything is drawn: limits of linear axes reach below zero
    names = list(dict.fromkeys(one.contender for one in points))
    for name in names:
        own = [one for one in points if one.contender == name]
        # An op without products is counted as one operation for each float32 it moves.
        work = [one.facts["flops"] or one.facts["bytes"] / 4 for one in own]
        x = [each / one.facts["bytes"] for each, one in zip(work, own, strict=True)]
        y = [each / one.median / 1e9 for each, one in zip(work, own, strict=True)]
        axes.scatter(x, y, s=26, color=PALETTE[names.index(name) % len(PALETTE)], label=name, zorder=3)
    span = [0.1, 1e3]
    axes.plot(span, [each * copy / 1e9 for each in span], color=INK, lw=1, label="copying")
    if products:
        axes.axhline(max(products) / 1e9, color=INK, lw=1, ls=(0, (4, 3)), label="torch.mm")
        axes.set_ylim(top=max(products) / 1e9 * 4)
    axes.set(xlabel="operations per byte", ylabel="billions of operations per second")
    axes.set_title("Single ops under the machine's own rates", loc="left", fontweight="bold")
    axes.legend(frameon=False, ncols=2)
    return figure


def _throughput(run: Run, along: str, label: str) -> Any:
    """Real tokens per second over one property, the others as in most cases."""
    other = "seq" if along == "filled" else "fill"
    points = [one for one in _whole(run) if one.suite == "bert" and "real_tokens" in one.facts]
    if not points:
        return None
    alike = ("hidden", "layers", "batch", other)
    key = lambda one: (one.dtype, *(one.facts[name] for name in alike))  # noqa: E731
    groups: dict[Any, list[Series]] = {}
    for one in points:
        groups.setdefault(key(one), []).append(one)
    own = max(groups.values(), key=lambda group: len({one.facts[along] for one in group}))
    if len({one.facts[along] for one in own}) < 2:
        return None
    figure, axes = _axes(9, 4.5)
    names = list(dict.fromkeys(one.contender for one in own))
    for name in names:
        rates = {
            one.facts[along]: one.facts["real_tokens"] / one.median for one in own if one.contender == name
        }
        line = sorted(rates.items())
        if len(line) > 1:
            axes.plot(
                *zip(*line, strict=True), "o-", color=PALETTE[names.index(name) % len(PALETTE)], label=name
            )
    axes.set_ylim(bottom=0)
    axes.set(xlabel=label, ylabel="real tokens per second")
    axes.set_title(f"Throughput over {label}", loc="left", fontweight="bold")
    axes.legend(frameon=False, ncols=2)
    return figure


def gain(run: Run) -> Any:
    """Three bars for each case: padding removed over native kernels, our kernels over padded batches, both."""
    best = _best(_whole(run))
    parts = {"native": "padding removed", f"{best}-padded": f"{best} kernels, padded", best: "both"}
    found: dict[str, dict[str, Series]] = {}
    for one in _whole(run):
        if one.contender in parts:
            found.setdefault(one.group, {})[one.contender] = one
    found = {group: own for group, own in found.items() if "native" in own and best in own}
    if best is None or not found:
        return None
    figure, axes = _axes(9, 0.8 * len(found) + 1.5)
    for place, own in enumerate(reversed(found.values())):
        for rank, name in enumerate(parts):
            if name in own:
                y, ratio = place + (1 - rank) * 0.26, own[name].speedup["median"]
                axes.barh(
                    y,
                    ratio,
                    0.24,
                    color=PALETTE[rank],
                    label=parts[name] if place == len(found) - 1 else None,
                )
                axes.annotate(
                    f"{ratio:.2f}", (ratio, y), (4, 0), textcoords="offset points", va="center", fontsize=8
                )
    axes.set_yticks(range(len(found)), list(reversed(found)))
    axes.axvline(1.0, color=INK, lw=0.8, ls=(0, (4, 3)))
    axes.set_xlabel("times as fast as the baseline")
    axes.set_title("Where the gain comes from", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.5 / len(found)), ncols=3)
    return figure


def _best(found: list[Series]) -> str | None:
    """The kernels of ours that ran whole models."""
    names = {one.contender.partition(",")[0] for one in found}
    return next((name for name in ("cuda", "triton", "cpu") if name in names), None)


def batches(run: Run) -> Any:
    """Three bars for each contender: the same texts as they come, sorted by length, by tokens."""
    found = [one for one in _models(run) if IN_BATCHES in one.case]
    if not found:
        return None
    group, best = found[0].group, _best(found)
    ratios = {one.contender: one.speedup["median"] for one in found if one.group == group}
    wanted = ("eager", "native", f"{best}-padded", best)
    names = [name for name in wanted if any(key.partition(",")[0] == name for key in ratios)]
    figure, axes = _axes(9, 0.8 * len(names) + 1.5)
    for place, name in enumerate(reversed(names)):
        for rank, how in enumerate(WAYS):
            ratio = ratios.get(name if how == WAYS[0] else f"{name}, {how}")
            if ratio is None:
                continue
            y = place + (1 - rank) * 0.26
            axes.barh(y, ratio, 0.24, color=PALETTE[rank], label=how if place == len(names) - 1 else None)
            axes.annotate(
                f"{ratio:.2f}", (ratio, y), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.axvline(1.0, color=INK, lw=0.8, ls=(0, (4, 3)))
    axes.set_xlabel("times as fast as the baseline on texts as they come")
    axes.set_title(group, loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.5 / len(names)), ncols=3)
    return figure


def memory(run: Run) -> Any:
    """Bars: what a call needs above its weights, in the case that has most contenders."""
    if not run.memory:
        return None
    cases = [one["case"] for one in run.memory]
    case = max(cases, key=cases.count)
    bars = sorted(
        ((one["bytes"] / 1e6, one["contender"]) for one in run.memory if one["case"] == case), reverse=True
    )
    figure, axes = _axes(9, 0.42 * len(bars) + 1.2)
    colours = [OURS if name.removesuffix("-padded") in OURS_NAMES else PEER for _, name in bars]
    axes.barh([name for _, name in bars], [size for size, _ in bars], color=colours)
    axes.set_xlabel("MB")
    axes.set_title(f"Peak memory of one call: {case}", loc="left", fontweight="bold")
    return figure


PICTURES: dict[str, tuple[Callable[[Run], Any], str]] = {
    "speedups": (speedups, "Medians over pairs; the line spans the quartiles. Ours are green."),
    "gain": (gain, "The same batch with its padding removed, with our kernels, and with both."),
    "batches": (
        batches,
        "The same texts in batches as they come, sorted by length, and as many as a number of tokens allows.",
    ),
    "fill": (
        lambda run: _throughput(run, "filled", "share of real tokens"),
        "Real tokens alone are counted.",
    ),
    "length": (lambda run: _throughput(run, "seq", "longest sequence"), "Real tokens alone are counted."),
    "roofline": (
        roofline,
        "Ceilings were measured between the cases. What stays in caches may lie above copying.",
    ),
    "memory": (memory, "In a fresh process, weights apart."),
}
