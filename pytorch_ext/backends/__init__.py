"""Who computes an op: five backends with one meaning, and the choice between them.

A module or package of this folder whose name has no leading underscore is a backend. It holds

- ``DESCRIPTION``: one line;
- ``kernels()``: its table, from ``"<op>_fwd"`` and ``"<op>_bwd"`` (``native``: from ``"<op>"``) to callables; of ops
  that not all backends have (``offered``), ``"<op>_fwd"`` alone; ``"<op>_grad"`` where it differentiates by itself;
- ``why_not(op, *tensors)``: the reasons, as sentences, why it cannot run ``op`` on ``tensors``; empty if it can.
  ``torch.compile`` traces it: plain Python over what the tensors say of themselves, and, where it asks the machine,
  functions marked with ``_requirements.fact``;
- if it lays weights out for inference, ``drop_layouts(weights)`` and ``layout_bytes(weights)``.
"""

from ._choice import BackendError, choose, offered, requested, use
from ._exporting import exporting, portable
from ._registry import available, drop_layouts, explain, kernel, layout_bytes, names, why_not

__all__ = [
    "BackendError",
    "available",
    "choose",
    "drop_layouts",
    "explain",
    "exporting",
    "kernel",
    "layout_bytes",
    "names",
    "offered",
    "portable",
    "requested",
    "use",
    "why_not",
]
