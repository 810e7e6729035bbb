"""Lets the tests in tests/ops run the backend ``cuda`` on CPU tensors: `pytest -p plugin`, this folder on the path.

Of what is collected, the tests of that backend are left. CUDA_HOST_STEMS names the files of csrc/cuda to load.
"""

import os

import torch

import build
from pytorch_ext.backends import cuda

for stem in os.environ["CUDA_HOST_STEMS"].split():
    torch.ops.load_library(str(build.build(stem)))
loaded = cuda.table(build.NAMESPACE)
cuda.kernels = lambda: loaded
cuda.on_device = cuda.capability = lambda *_: []


def pytest_collection_modifyitems(config, items):
    for plugin in config.pluginmanager.get_plugins():
        if hasattr(plugin, "_device_of"):
            plugin._device_of = lambda backend: "cpu"
    parameters = [getattr(item, "callspec", None) for item in items]
    items[:] = [i for i, p in zip(items, parameters, strict=True) if p and "cuda" in list(p.params.values())]
