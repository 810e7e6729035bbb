"""What training asks for beside ``optimize``.

``parallel`` shares an optimised model out over devices, ``recompute`` gives time for memory, ``pretraining`` makes
batches of masked sentence pairs. The engines stay PyTorch's and Hugging Face's.
"""

from .parallel import PipelinePart, sequence_parallel, tensor_parallel
from .recompute import recompute, selective_contexts

__all__ = ["PipelinePart", "recompute", "selective_contexts", "sequence_parallel", "tensor_parallel"]
