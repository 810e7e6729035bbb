"""``to_html``: a model as a page of its sizes, weights, activations and attention."""

from __future__ import annotations

import html
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import _pictures as pictures
from ._errors import ExportError, first_line, optional
from ._files import written
from ._inputs import inputs_of
from ._observe import Observed, observe
from ._values import Part, Values, by_kind, in_units, parts, weights

STYLE = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: {pictures.INK} }}
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.6rem; margin-bottom: 0 }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem }}
p.faint, th {{ color: {pictures.FAINT} }} .wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }}
td, th {{ padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #e5e9ed; font-weight: normal }}
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) {{ text-align: left }}
tr.wrong td {{ color: #b3261e }} svg {{ max-width: 100%; height: auto }} summary {{ cursor: pointer; margin: 1rem 0 }}
.big {{ display: flex; gap: 3rem; flex-wrap: wrap; margin: 1.5rem 0 }}
.big b {{ display: block; font-size: 2rem; line-height: 1.2 }}
"""


def to_html(
    model: nn.Module,
    args: Any,
    path: str | os.PathLike,
    *,
    kwargs: Mapping[str, Any] | None = None,
    text: str | None = None,
    tokenizer: Any = None,
) -> Path:
    """Writes a page that needs nothing else: sizes of parts, histograms of weights, and of one call the histograms of
    activations and the attention weights of each layer and head. The model is called once and left as it was.

    Args:
        model: any module.
        args, kwargs: example inputs; ``()`` and none for weights alone.
        path: what to write.
        text: a sentence to call the model with, in place of ``args`` and ``kwargs``.
        tokenizer: of Hugging Face, for ``text``.

    Returns:
        ``path``.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: ``text`` without ``tokenizer``.
        ExportError: inputs that do not fit, a call that fails, a path that cannot be written to. There is no file then,
            or the one that was there before.
    """
    drawn = report(model, args, kwargs, text, tokenizer)
    path = Path(path)
    with written(path) as temporary:
        try:
            temporary.write_text(drawn, encoding="utf-8")
        except OSError as error:
            raise ExportError(f"path: cannot write to {path}: {error.strerror}") from None
    return path


def report(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    text: str | None,
    tokenizer: Any,
    above: str = "",
) -> str:
    """The HTML of :func:`to_html`, with more of it ``above``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    optional("matplotlib")
    labels = None
    if text is not None:
        kwargs, labels = sentence(model, text, tokenizer)
        args = ()
    called = bool(kwargs) or args != ()
    observed = observe(model, inputs_of(model, args, kwargs, False)) if called else None
    return _page(model, observed, text, labels, above)


def sentence(model: nn.Module, text: str, tokenizer: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The arguments of a call with ``text``, a batch of one, and its tokens.

    Raises:
        ValueError: no tokenizer.
        ExportError: more tokens than the model has positions, or a text that the tokenizer refuses.
    """
    if tokenizer is None:
        raise ValueError("tokenizer: expected that of the model beside a text, got None")
    try:
        encoded = dict(tokenizer(text, return_tensors="pt"))
        labels = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist())
    except Exception as error:  # whatever a tokenizer raises
        raise ExportError(f"text: the tokenizer fails: {first_line(error)}") from error
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and len(labels) > most:
        raise ExportError(f"text: expected at most {most} tokens, got {len(labels)}")
    if not labels:
        raise ExportError("text: expected at least one token, got none")
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in encoded.items() if name in taken}, labels


def _page(
    model: nn.Module, observed: Observed | None, text: str | None, labels: list[str] | None, above: str
) -> str:
    name = html.escape(type(model).__name__)
    own, found = weights(model), parts(model)
    size = sum(part.bytes for part in found)
    dtypes = ", ".join(dict.fromkeys(one.dtype for one in own)) or "no parameters"
    big = [
        (f"{sum(part.parameters for part in found):,}", "parameters, shared ones counted once"),
        (in_units(size), f"of them, {dtypes}"),
        (in_units(sum(b.numel() * b.element_size() for b in model.buffers())), "of buffers"),
    ]
    numbers = "".join(f"<div><b>{value}</b>{meaning}</div>" for value, meaning in big)
    sections = [
        ("Where the parameters are", _sizes(found, size)),
        ("Weights", pictures.histograms(by_kind(own, 2)) + _tensors("Every parameter", own)),
        ("Activations", _activations(observed)),
        ("Attention", _attention(observed, text, labels)),
    ]
    body = "".join(f"<h2>{heading}</h2>\n{content}\n" for heading, content in sections)
    note = (
        "In the histograms a line is a tensor, of all layers from light to dark; the height is the share of the values,"
        " on a logarithmic scale. Red rows hold infinities or NaN."
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>\n'
        f'{above}<h1>{name}</h1>\n<p class="faint">{note}</p>\n<div class="big">{numbers}</div>\n{body}</html>\n'
    )


def _sizes(found: Sequence[Part], size: int) -> str:
    if not size:
        return "<p>There are none.</p>"
    rows = [
        _row(
            "td",
            html.escape(part.name or part.kind),
            html.escape(part.kind),
            f"{part.parameters:,}",
            in_units(part.bytes),
            f"{part.bytes / size:.1%}",
        )
        for part in found
    ]
    head = _row("th", "part", "class", "parameters", "bytes", "share")
    return f"{pictures.bars(found)}<table>{head}{''.join(rows)}</table>"


def _tensors(what: str, found: Sequence[Values]) -> str:
    rows = [
        _row(
            "td",
            html.escape(one.name),
            f"{' × '.join(map(str, one.shape)) or 'one'} {one.dtype}",
            *(_number(value) for value in (one.mean, one.std, one.low, one.high)),
            f"{one.wrong:,}" if one.wrong else "",
            wrong=bool(one.wrong),
        )
        for one in found
    ]
    head = _row("th", "name", "shape", "mean", "std", "lowest", "highest", "Inf, NaN")
    wrong = sum(one.wrong > 0 for one in found)
    warned = f": {wrong} with infinities or NaN" if wrong else ""
    table = f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'
    return f"<details><summary>{what}{warned}</summary>{table}</details>"


def _activations(observed: Observed | None) -> str:
    if observed is None:
        return "<p>No example inputs, so the model was not called.</p>"
    if not observed.activations:
        return "<p>No module without children was called.</p>"
    found = observed.activations
    return pictures.histograms(by_kind(found, 1)) + _tensors("Every output of a module", found)


def _attention(observed: Observed | None, text: str | None, labels: list[str] | None) -> str:
    if observed is None or not observed.attention:
        return "<p>There is no attention in this call: no softmax whose result weighs anything.</p>"
    told = f"“{html.escape(text)}”. " if text is not None else "Of the first example. "
    return (
        f"<p>{told}A row for each attention, a map for each head: how much the token at the left attends to the token"
        f" below. Dark is much.</p>{pictures.attention(observed.attention, labels)}"
    )


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _row(cell: str, *contents: str, wrong: bool = False) -> str:
    cells = "".join(f"<{cell}>{content}</{cell}>" for content in contents)
    return f'<tr class="wrong">{cells}</tr>' if wrong else f"<tr>{cells}</tr>"
