"""A model as a file for others, ONNX and ``.pt2``, and as a picture of its graph in Netron.

Everything here needs the extra ``export``, when it is called.
"""

from ._errors import ExportError
from ._translation import translation_table
from .netron import View, view
from .onnx import Exported, to_onnx, to_pt2

__all__ = ["ExportError", "Exported", "View", "to_onnx", "to_pt2", "translation_table", "view"]
