"""A run as one page that needs nothing else: figures, curves and the confusion matrix."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file is written, no window opened

import matplotlib.pyplot as plt

INK, FAINT, MAIN, OTHER = "#26323d", "#5b6770", "#0f9d76", "#d9822b"
MOST_CLASSES = 40  # of which the matrix is drawn; more have no room
STYLE = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.6rem; margin-bottom: 0 }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem }}
p.faint, td.faint, caption {{ color: {FAINT} }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e5e9ed; font-weight: normal }}
th {{ color: {FAINT} }} td:first-child, th:first-child {{ text-align: left }}
.big {{ display: flex; gap: 3rem; flex-wrap: wrap; margin: 1.5rem 0 }}
.big b {{ display: block; font-size: 2rem; line-height: 1.2 }}
.matrix td {{ text-align: center; min-width: 2rem; border: 1px solid #fff }}
.matrix td:first-child {{ text-align: right }}
.wide {{ overflow-x: auto }} svg {{ max-width: 100%; height: auto }}
"""


def page(found: dict[str, Any]) -> str:
    """The HTML of what ``whole`` found."""
    held_out = found["held out"]
    title = f"{found['model']} on {found['data']}"
    big = (
        (f"{held_out['accuracy']:.1%}", f"accuracy on {held_out['rows']:,} held-out texts"),
        (f"{held_out['f1']:.3f}", "F1, the mean over the classes"),
        (f"{found['best step']:,}", f"step of these weights, of {found['steps']:,}"),
    )
    sections = [
        ("How it learned", _figure(_curves, found)),
        ("Class by class", _classes(held_out)),
        ("Which class is taken for which", _matrix(held_out)),
        ("How long the texts are", _figure(_lengths, found["lengths"]) + _fill(found)),
        ("What was run", _facts(found)),
    ]
    body = "".join(f"<h2>{heading}</h2>\n{content}\n" for heading, content in sections)
    numbers = "".join(f"<div><b>{value}</b>{meaning}</div>" for value, meaning in big)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n"
        f'<p class="faint">{len(held_out["classes"])} classes, {found["rows"]["train"]:,} texts to learn from</p>\n'
        f'<div class="big">{numbers}</div>\n{body}</html>\n'
    )


def _figure(draw: Callable, *args: Any) -> str:
    """What ``draw`` draws, as SVG within the page."""
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    # The same page for the same run: no date, no random ids.
    style = {"font.size": 10, "svg.hashsalt": "page", "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context({**style, **dict.fromkeys(inked, INK)}):
        figure = draw(*args)
        figure.tight_layout()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    drawn = file.getvalue()
    return drawn[drawn.index("<svg") :]  # without the declaration of a file of its own


def _curves(found: dict[str, Any]) -> Any:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
    steps, losses, rates = zip(*found["losses"], strict=True) if found["losses"] else ((), (), ())
    left.plot(steps, losses, color=MAIN)
    left.set_title("training loss", loc="left")
    if found["evaluations"]:
        at, accuracy, f1 = zip(*found["evaluations"], strict=True)
        middle.plot(at, accuracy, "o-", ms=3, color=MAIN, label="accuracy")
        middle.plot(at, f1, "o-", ms=3, color=OTHER, label="F1")
        middle.axvline(found["best step"], color=FAINT, lw=0.8, ls=":")
        middle.legend(frameon=False)
    middle.set_title("on the validation texts", loc="left")
    right.plot(steps, rates, color=MAIN)
    right.set_title("learning rate", loc="left")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
    return figure


def _lengths(lengths: Sequence[int]) -> Any:
    figure, axes = plt.subplots(figsize=(11, 2.8))
    axes.hist(lengths, bins=min(60, max(lengths) - min(lengths) + 1), color=MAIN)
    mean = sum(lengths) / len(lengths)
    axes.axvline(mean, color=INK, lw=1, ls="--")
    axes.text(mean, axes.get_ylim()[1], f" mean {mean:.0f}", va="top")
    axes.set_xlabel("tokens")
    axes.set_ylabel("texts")
    return figure


def _fill(found: dict[str, Any]) -> str:
    return (
        f"<p>Were every batch padded to its longest text, {1 - found['fill']:.0%} of the positions would be padding."
        "</p>"
    )


def _classes(held_out: dict[str, Any]) -> str:
    rows = []
    for row in sorted(held_out["classes"], key=lambda row: -row["rows"]):
        score = "–" if row["f1"] is None else f"{row['f1']:.3f}"
        cells = (f"{row['precision']:.1%}", f"{row['recall']:.1%}", score, f"{row['rows']:,}")
        rows.append(_row("td", html.escape(row["name"]), *cells))
    unseen = held_out["unseen"]
    note = (
        f"<p>{unseen:,} rows have a label that training never saw; they count as wrong.</p>" if unseen else ""
    )
    head = _row("th", "class", "precision", "recall", "F1", "texts")
    return f"<table>{head}{''.join(rows)}</table>{note}"


def _matrix(held_out: dict[str, Any]) -> str:
    names = [row["name"] for row in held_out["classes"]]
    if len(names) > MOST_CLASSES:
        return f"<p>With {len(names)} classes it is in report.json.</p>"
    rows = [_row("th", "actual ↓ predicted →", *map(html.escape, names))]
    for name, counts in zip([*names, "(not in training)"], held_out["confusion"], strict=False):
        total = sum(counts) or 1
        cells = (
            f'<td style="background:rgba(15,157,118,{count / total:.2f})">{count or ""}</td>'
            for count in counts
        )
        rows.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
    return f'<div class="wide"><table class="matrix">{"".join(rows)}</table></div>'


def _facts(found: dict[str, Any]) -> str:
    environment, tuned = found["environment"], found["tuned"]
    speed = found["tokens per second"]
    facts = {
        "what learns": ", ".join((tuned["how"], *tuned.get("learn", ())))
        + f": {tuned['weights']:,} of {tuned['of']:,} weights",
        "speed": f"{speed:,.0f} real tokens per second, evaluation left out" if speed else "not measured",
        "device": f"{environment['device']}, {environment['threads']} threads, {found['precision']}",
        "rows": ", ".join(f"{name} {count:,}" for name, count in found["rows"].items()),
        "versions": ", ".join(f"{n} {v}" for n, v in environment["versions"].items() if v),
        "options": ", ".join(f"{n}={v}" for n, v in found["options"].items() if v is not None),
        "date": environment["date"],
    }
    return f"<table>{''.join(_row('td', name, html.escape(value)) for name, value in facts.items())}</table>"


def _row(cell: str, *contents: str) -> str:
    return "<tr>" + "".join(f"<{cell}>{content}</{cell}>" for content in contents) + "</tr>"
