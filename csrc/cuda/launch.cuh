#pragma once

// How kernels are launched, and what a kernel asks of the machine that nvcc and the CPU's compiler spell differently.
//
// Every .cu file is compiled twice: by nvcc for GPUs, and with PYTORCH_EXT_CUDA_HOST by g++ for tests on the CPU, where
// tests/cuda_host/cuda_host.h stands in for CUDA. So a launch goes through `launch`, shared memory is dynamic and comes
// from `shared_memory`, and instructions without a C++ name stand in ptx.cuh.

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <utility>

#ifdef PYTORCH_EXT_CUDA_HOST
#include "cuda_host.h"
#define PYTORCH_EXT_KEY CPU
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#define PYTORCH_EXT_KEY CUDA

// Weak, because it is in libtorch_cuda: the library loads beside a PyTorch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace pytorch_ext::cuda {

struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
};

#ifdef PYTORCH_EXT_CUDA_HOST

template <class T>
T* shared_memory() {
    return static_cast<T*>(cuda_host::shared_memory());
}

inline cudaStream_t current_stream(const torch::stable::Tensor&) { return nullptr; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& how, Arguments&&... arguments) {
    const auto thread = [&] { kernel(static_cast<Parameters>(arguments)...); };
    cuda_host::run_grid(reinterpret_cast<void*>(kernel), how.grid, how.block, how.shared_bytes, thread);
}

#else

template <class T>
__device__ inline T* shared_memory() {
    extern __shared__ __align__(16) unsigned char pytorch_ext_shared_memory[];
    return reinterpret_cast<T*>(pytorch_ext_shared_memory);
}

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "backend 'cuda': this PyTorch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t error, const char* what, const Launch& how) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next call would find it again
    STD_TORCH_CHECK(false, "backend 'cuda': ", what, " failed: ", cudaGetErrorString(error), " (grid ",
                    how.grid.x, " x ", how.grid.y, " x ", how.grid.z, ", block ", how.block.x, " x ",
                    how.block.y, " x ", how.block.z, ", ", how.shared_bytes, " bytes of shared memory)");
}

// A kernel may use more than 48 KiB of shared memory only once it was told so, on each device.
inline void allow_shared_memory(const void* kernel, const Launch& how) {
    if (how.shared_bytes <= 48 * 1024) return;
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, size_t> allowed;
    int device = 0;
    check_cuda(cudaGetDevice(&device), "asking for the current device", how);
    const std::lock_guard lock(mutex);
    size_t& most = allowed[{kernel, device}];
    if (how.shared_bytes <= most) return;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes),
               "allowing a kernel its shared memory", how);
    most = how.shared_bytes;
}

// The one way to launch. A grid without blocks is no launch.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& how, Arguments&&... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments));
    if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
    const void* function = reinterpret_cast<const void*>(kernel);
    allow_shared_memory(function, how);
    const auto start = [&](Parameters... values) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&values))...};
        return cudaLaunchKernel(function, how.grid, how.block, pointers, how.shared_bytes, how.stream);
    };
    check_cuda(start(static_cast<Parameters>(arguments)...), "the launch of a kernel", how);
}

#endif

}  // namespace pytorch_ext::cuda
