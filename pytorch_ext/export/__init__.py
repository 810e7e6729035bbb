"""A model as a file for others: ONNX and ``.pt2``.

Everything here needs the extra ``export``, when it is called.
"""

from ._errors import ExportError
from ._translation import translation_table
from .onnx import Exported, to_onnx, to_pt2

__all__ = ["ExportError", "Exported", "to_onnx", "to_pt2", "translation_table"]
