"""What training asks for beside ``optimize``: ``parallel`` shares an optimised model out over devices.

The engines stay PyTorch's and Hugging Face's.
"""

from .parallel import PipelinePart, tensor_parallel

__all__ = ["PipelinePart", "tensor_parallel"]
