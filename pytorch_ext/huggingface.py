"""``import pytorch_ext.huggingface``: Hugging Face's models then take ``attn_implementation="pytorch_ext"``.

For who wants our attention and nothing else: ``AutoModel.from_pretrained(folder, attn_implementation="pytorch_ext")``,
or ``model.set_attn_implementation("pytorch_ext")``. It computes what ``"sdpa"`` does, and takes flattened batches
(``DataCollatorWithFlattening``) on the CPU too. ``pytorch_ext.optimize`` does this and more by itself.
"""

from .dropin._huggingface import NAME
from .dropin.standins import hf_attention  # noqa: F401  (registers it and its mask function)

__all__ = ["NAME"]
