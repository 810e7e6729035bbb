"""``view``: Netron on a model's graph, on this machine alone."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
import tempfile
import webbrowser
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..dropin import optimize, revert
from ._errors import ExportError, first_line, optional
from ._page import Panel, page
from ._process import Server, free
from .onnx import to_onnx
from .report import report, sentence

WEIGHTS = "weights.html"
BEFORE = "as it comes", "Hugging Face models: with their eager attention, which shows the formula"
AFTER = "optimised", "what it computes; inference removes the padding too"


class View:
    """What ``view`` serves: ``url``, until ``stop()``, the end of a ``with``, or that of this process.

    Attributes:
        url: of the page, on the loopback interface.
        graphs: the URLs of the Netrons in it.
        nodes: of each graph, how many nodes of each type it has.
        weights: the URL of the page of weights and attention; None if nobody asked for it.
    """

    def __init__(self, folder: Path, servers: list[Server], nodes: list[Counter[str]], weights: bool):
        self._folder, self._servers = folder, servers
        self.nodes = nodes
        self.url = servers[-1].url
        self.weights = f"{self.url}/{WEIGHTS}" if weights else None
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


def view(
    model: nn.Module | str | os.PathLike,
    args: Any = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    compare: bool = False,
    weights: bool = False,
    text: str | None = None,
    tokenizer: Any = None,
    port: int = 0,
    browse: bool = True,
) -> View:
    """Shows a graph in Netron, on the loopback interface, and returns at once.

    Args:
        model: a module, which is exported by :func:`to_onnx` without its outputs being compared; or a file of ``.onnx``
            or ``.pt2``.
        args, kwargs: example inputs of a module; without any, ``text``.
        compare: beside each other a copy of the module before ``optimize`` and one after.
        weights: beside the graph the page that :func:`to_html` writes.
        text, tokenizer: a sentence for that page, whose attention is then shown.
        port: of the page; 0 is any that is free.
        browse: open it in the browser; in a notebook, show it there.

    Raises:
        ExportError: a file that is not there or holds no graph, a module that cannot be exported, a port in use.
        TypeError: ``model`` is neither.
        ValueError: ``compare``, ``weights`` or ``text`` with a file; ``text`` without ``tokenizer``.
    """
    optional("netron")
    weights = weights or text is not None
    if not isinstance(model, (nn.Module, str, os.PathLike)):
        raise TypeError(f"model: expected a torch.nn.Module or a path, got {type(model).__name__}")
    if compare and not isinstance(model, nn.Module):
        raise ValueError("compare: expected a module to compare with its optimised self, got a file")
    if weights and not isinstance(model, nn.Module):
        raise ValueError("weights: expected a module, got a file")
    free(port)
    folder, servers = Path(tempfile.mkdtemp(prefix="pytorch-ext-view-")), []
    try:
        web = folder / "page"
        web.mkdir()
        if text is not None and not kwargs and args == ():
            kwargs = sentence(model, text, tokenizer)[0]
        if weights:
            drawn = report(model, args, kwargs, text, tokenizer, '<p><a href="index.html">The graph</a></p>')
            (web / WEIGHTS).write_text(drawn, encoding="utf-8")
        panels = []
        for name, note, file, nodes in _graphs(model, args, kwargs, compare, folder):
            servers.append(Server("netron", file))
            panels.append(Panel(name, note, servers[-1].url, nodes))
        link = f'<a href="{WEIGHTS}">Weights and attention</a>' if weights else ""
        (web / "index.html").write_text(page(panels[0].title, panels, link), encoding="utf-8")
        servers.append(Server("page", web, port))
    except BaseException:
        for server in servers:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shown = View(folder, servers, [panel.nodes for panel in panels], weights)
    if browse:
        _open(shown.weights or shown.url)
    return shown


def _open(url: str) -> None:
    """In the notebook, if this is one; else in the browser."""
    ipython = sys.modules.get("IPython")  # who runs in a notebook has imported it
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and "IPKernelApp" in shell.config:
        ipython.display.display(ipython.display.IFrame(url, "100%", 800))
    else:
        webbrowser.open(url)


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
    if file.suffix == ".pt2":
        return _ops(file)
    onnx = optional("onnx")
    try:
        graph = onnx.load(file, load_external_data=False)
        onnx.checker.check_model(graph)
    except Exception as error:  # protobuf's and onnx's own, which share no class
        raise ExportError(f"model: {file.name} is no ONNX model: {first_line(error)}") from error
    return Counter(node.op_type for node in graph.graph.node)


def _ops(file: Path) -> Counter[str]:
    """The nodes of a ``.pt2`` file by op, from its text: nothing of it is run or unpickled."""
    try:
        with zipfile.ZipFile(file) as archive:
            graphs = [name for name in archive.namelist() if re.search(r"(^|/)models/[^/]+\.json$", name)]
            programs = [json.loads(archive.read(name)) for name in graphs]
        nodes = [node for program in programs for node in program["graph_module"]["graph"]["nodes"]]
        if not programs:
            raise ValueError("it holds no exported program")
        # torch.ops.aten.linear.default, or operator.add
        paths = [node["target"].split(".") for node in nodes]
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"model: {file.name} is no .pt2 of torch.export: {first_line(error)}") from error
    return Counter(path[3] if path[:2] == ["torch", "ops"] else path[-1] for path in paths)
