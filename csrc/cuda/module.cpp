// The library as a Python module, for every Python from 3.11 on. Its ops are reached through torch.ops, where each .cu
// file registers its own; here it says what it was built for.

#include <Python.h>

#ifndef PYTORCH_EXT_CUDA_ARCHITECTURES
#define PYTORCH_EXT_CUDA_ARCHITECTURES "unknown architectures"
#endif

namespace {

// Also found by a look at the file, which tells it where the library cannot be loaded.
const char* const BUILT_FOR = "pytorch_ext::_cuda was built for " PYTORCH_EXT_CUDA_ARCHITECTURES;

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_cuda", BUILT_FOR, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&definition); }
