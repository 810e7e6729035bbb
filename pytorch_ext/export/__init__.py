"""A model as a file for others, ONNX and ``.pt2``, and as pictures: of its graph in Netron, of its weights on a page.

Everything here needs the extra ``export``, when it is called.
"""

from ._errors import ExportError
from ._translation import translation_table
from .netron import View, view
from .onnx import Exported, to_onnx, to_pt2
from .report import to_html

__all__ = ["ExportError", "Exported", "View", "to_html", "to_onnx", "to_pt2", "translation_table", "view"]
