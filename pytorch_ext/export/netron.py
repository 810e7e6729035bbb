"""``view``: Netron on a model's graph, on this machine alone."""

from __future__ import annotations

import copy
import html
import os
import shutil
import tempfile
import webbrowser
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..dropin import optimize, revert
from ._errors import ExportError, first_line, optional
from ._page import Panel, page
from ._process import Server
from .onnx import to_onnx

BEFORE = "as it comes", "Hugging Face models: with their eager attention, which shows the formula"
AFTER = "optimised", "what it computes; inference removes the padding too"


class View:
    """What ``view`` serves: ``url``, until ``stop()`` or the end of this process. A notebook shows it inline.

    Attributes:
        url: of the page, on the loopback interface.
        graphs: the URLs of the Netrons in it.
        nodes: of each graph, how many nodes of each type it has.
    """

    def __init__(self, folder: Path, servers: list[Server], nodes: list[Counter[str]]):
        self._folder, self._servers = folder, servers
        self.nodes = nodes
        self.url = servers[-1].url
        self.graphs = [server.url for server in servers[: len(nodes)]]

    def wait(self) -> None:
        """Until the server ends, or Ctrl-C."""
        try:
            self._servers[-1].wait()
        except KeyboardInterrupt:
            pass
        finally:
            self.stop()

    def stop(self) -> None:
        for server in self._servers:
            server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> View:
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"View({self.url})"

    def _repr_html_(self) -> str:
        return f'<iframe src="{html.escape(self.url)}" width="100%" height="800" frameborder="0"></iframe>'


def view(
    model: nn.Module | str | os.PathLike,
    args: Any = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    compare: bool = False,
    port: int = 0,
    browse: bool = True,
) -> View:
    """Shows a graph in Netron, on the loopback interface, and returns at once.

    Args:
        model: a module, which is exported by :func:`to_onnx` without its outputs being compared; or an ``.onnx`` file.
        args, kwargs: example inputs of a module.
        compare: beside each other a copy of the module before ``optimize`` and one after.
        port: of the page; 0 is any that is free.
        browse: open it in the browser.

    Raises:
        ExportError: a file that is not there or holds no graph, a module that cannot be exported, a port in use.
        TypeError: ``model`` is neither.
        ValueError: ``compare`` with a file.
    """
    optional("netron")
    if not isinstance(model, (nn.Module, str, os.PathLike)):
        raise TypeError(f"model: expected a torch.nn.Module or a path, got {type(model).__name__}")
    if compare and not isinstance(model, nn.Module):
        raise ValueError("compare: expected a module to compare with its optimised self, got a file")
    folder, servers = Path(tempfile.mkdtemp(prefix="pytorch-ext-view-")), []
    try:
        panels = []
        for name, note, file, nodes in _graphs(model, args, kwargs, compare, folder):
            servers.append(Server("netron", file))
            panels.append(Panel(name, note, servers[-1].url, nodes))
        web = folder / "page"
        web.mkdir()
        (web / "index.html").write_text(page(panels[0].title, panels), encoding="utf-8")
        servers.append(Server("page", web, port))
    except BaseException:
        for server in servers:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shown = View(folder, servers, [panel.nodes for panel in panels])
    if browse:
        webbrowser.open(shown.url)
    return shown


def _graphs(
    model: nn.Module | str | os.PathLike,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    compare: bool,
    folder: Path,
) -> list[tuple[str, str, Path, Counter[str]]]:
    """Title, note, file and counts of each graph."""
    if not isinstance(model, nn.Module):
        file = Path(model)
        return [(file.name, str(file), file.resolve(), _counted(file))]
    name = type(model).__name__
    if not compare:
        file = folder / f"{name}.onnx"
        made = to_onnx(model, args, file, kwargs=kwargs, check_outputs=False)
        return [(name, "", file, made.nodes)]
    graphs = []
    for (what, note), change in ((BEFORE, _textbook), (AFTER, optimize)):
        own = copy.deepcopy(model)
        revert(own)
        change(own)
        file = folder / f"{name}-{what.split()[0]}.onnx"
        made = to_onnx(own, args, file, kwargs=kwargs, check_outputs=False)
        graphs.append((f"{name} {what}", note, file, made.nodes))
    return graphs


def _textbook(model: nn.Module) -> None:
    """Attention as its formula: the exporter writes SDPA as a single node too."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")


def _counted(file: Path) -> Counter[str]:
    if not file.is_file():
        raise ExportError(f"model: there is no file {file}")
    onnx = optional("onnx")
    try:
        graph = onnx.load(file, load_external_data=False)
        onnx.checker.check_model(graph)
    except Exception as error:  # protobuf's and onnx's own, which share no class
        raise ExportError(f"model: {file.name} is no ONNX model: {first_line(error)}") from error
    return Counter(node.op_type for node in graph.graph.node)
