"""The page that frames what Netron shows, with the counts of nodes above each graph."""

from __future__ import annotations

import html
from collections import Counter
from dataclasses import dataclass

_STYLE = """
body { margin: 0; font: 14px/1.45 system-ui, sans-serif; color: #1c2833; background: #fff; }
main { display: flex; gap: 1px; background: #ccd3d8; height: 100vh; }
section { flex: 1; min-width: 0; display: flex; flex-direction: column; background: #fff; }
header { padding: 10px 14px 8px; min-height: 104px; }
h1 { margin: 0 0 2px; font-size: 17px; }
p { margin: 0 0 6px; color: #5d6d7e; }
ul { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: 4px 6px; }
li { padding: 0 8px; border-radius: 9px; background: #eef2f4; }
li.other { background: #ffe3b3; }
iframe { flex: 1; border: 0; border-top: 1px solid #ccd3d8; width: 100%; }
"""


@dataclass(frozen=True)
class Panel:
    """One graph.

    Attributes:
        title: what it is; ``note`` says more in a sentence.
        url: of the Netron that shows it.
        nodes: how many of each type it has.
    """

    title: str
    note: str
    url: str
    nodes: Counter[str]


def page(name: str, panels: list[Panel], below: str = "") -> str:
    """The page of one or two graphs; what differs between two is marked in the counts.

    ``below``: more HTML under the graphs' titles.
    """
    sections = "".join(_section(panel, _differing(panels), below) for panel in panels)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>'
        f"<style>{_STYLE}</style></head><body><main>{sections}</main></body></html>"
    )


def _section(panel: Panel, differing: set[str], below: str) -> str:
    counts = sorted(panel.nodes.items(), key=lambda item: (item[0] not in differing, -item[1], item[0]))
    items = "".join(
        f'<li class="{"other" if kind in differing else "same"}">{count} {html.escape(kind)}</li>'
        for kind, count in counts
    )
    return (
        f"<section><header><h1>{html.escape(panel.title)}: {panel.nodes.total()} nodes</h1>"
        f"<p>{html.escape(panel.note)} {below}</p><ul>{items}</ul></header>"
        f'<iframe src="{html.escape(panel.url)}" title="{html.escape(panel.title)}"></iframe></section>'
    )


def _differing(panels: list[Panel]) -> set[str]:
    if len(panels) < 2:
        return set()
    first, second = (panel.nodes for panel in panels)
    return {kind for kind in first | second if first[kind] != second[kind]}
