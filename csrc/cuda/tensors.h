#pragma once

// What launchers do with tensors before a kernel sees pointers: layouts, outputs, parameters. Host code alone.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dtypes.cuh"
#include "philox.cuh"

// The ops live in a namespace of their own: pytorch_ext::<op> chooses among backends, and calls these. Tests load the
// same sources, compiled for the CPU, beside this library.
#if defined(PYTORCH_EXT_OPS)
#elif defined(PYTORCH_EXT_CUDA_HOST)
#define PYTORCH_EXT_OPS pytorch_ext_cuda_host
#else
#define PYTORCH_EXT_OPS pytorch_ext_cuda
#endif

namespace pytorch_ext::cuda {

using torch::stable::new_empty;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;
using torch::headeronly::IntHeaderOnlyArrayRef;

// A str among the arguments of an op. PyTorch's conversion to std::string (2.11 to 2.13) loses one in each call.
struct Word : std::string {
    using std::string::string;
};

// Rows that are wider go to another backend: csrc/cuda keeps a row in registers.
constexpr int64_t WIDEST = 8192;

template <class Integer>
constexpr Integer cdiv(Integer a, Integer b) {
    return (a + b - 1) / b;
}

inline Sizes sizes_of(const Tensor& x) { return Sizes(x.sizes().begin(), x.sizes().end()); }

inline int64_t product(IntHeaderOnlyArrayRef sizes) {
    int64_t n = 1;
    for (int64_t size : sizes) n *= size;
    return n;
}

// The current device is that of x while this lives; nobody else sees to that in front of an op.
struct OnDevice {
#ifdef PYTORCH_EXT_CUDA_HOST
    explicit OnDevice(const Tensor&) {}
#else
    torch::stable::accelerator::DeviceGuard guard;
    explicit OnDevice(const Tensor& x) : guard(x.get_device_index()) {}
#endif
};

// How many multiprocessors the current device has.
inline int processors() {
#ifdef PYTORCH_EXT_CUDA_HOST
    return 2;
#else
    int device = 0, count = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
#endif
}

// The width of rows, if they fit in registers.
inline int row_width(IntHeaderOnlyArrayRef sizes) {
    const int64_t cols = product(sizes);
    STD_TORCH_CHECK(cols <= WIDEST, "backend 'cuda': expected rows of at most ", WIDEST, " elements, got ",
                    cols);
    return static_cast<int>(cols);
}

template <class T>
T* data(const Tensor& x) {
    return static_cast<T*>(x.data_ptr());
}

inline float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Tensor cast(const Tensor& x, ScalarType dtype) {
    return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

inline Tensor filled(const Tensor& x, double value) { return torch::stable::fill_(x, value); }

// Of float32, bfloat16 and float16.
inline ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

inline bool at_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Rows as kernels take them.
template <class T>
struct Rows {
    T* data;
    int64_t stride;
    __device__ T* operator[](int64_t row) const { return data + row * stride; }
};

// A tensor as rows of `cols` elements that lie side by side, however far the rows are from one another; where the
// leading dimensions do not collapse to one stride, a copy. It owns what it points to.
struct Matrix {
    Tensor tensor;
    int64_t stride;
    bool aligned;  // every row begins at a multiple of 16 bytes

    Matrix(const Tensor& x, int64_t cols) : tensor(x), stride(cols) {
        if (!x.is_contiguous()) {
            tensor = torch::stable::reshape(x, Sizes{-1, cols});
            if (cols > 1 && tensor.stride(1) != 1) tensor = torch::stable::contiguous(tensor);
            stride = tensor.stride(0);
        }
        aligned = at_16_bytes(tensor.data_ptr()) && stride * tensor.element_size() % 16 == 0;
    }
    template <class T>
    Rows<T> rows() const {
        return {static_cast<T*>(tensor.data_ptr()), stride};
    }
};

// A weight or bias as kernels take it: in the rows' own dtype or in float32, or null.
struct Parameter {
    const void* data;
    bool is_float;
};

// The same with what it points to, which may be a copy: its elements side by side, in one of the two dtypes.
struct OwnedParameter {
    OptionalTensor tensor;
    bool aligned = true;

    OwnedParameter(const OptionalTensor& parameter, ScalarType rows_dtype) {
        if (!parameter) return;
        const bool fits =
            parameter->scalar_type() == rows_dtype || parameter->scalar_type() == ScalarType::Float;
        tensor = dense(fits ? *parameter : cast(*parameter, ScalarType::Float));
        aligned = at_16_bytes(tensor->data_ptr());
    }
    operator Parameter() const {
        if (!tensor) return {nullptr, true};
        return {tensor->data_ptr(), tensor->scalar_type() == ScalarType::Float};
    }
};

// The gradient of a parameter before it is filled: of no elements where there is no parameter.
inline Tensor gradient_of(const OptionalTensor& parameter, const Tensor& like) {
    if (!parameter) return new_empty(like, Sizes{0}, like.scalar_type());
    return new_empty(like, parameter->sizes(), parameter->scalar_type());
}

// The mask of a dropout as kernels take it, with the generator that it is drawn from; none without rng.
struct Mask {
    OptionalTensor rng;
    Dropout dropout;

    Mask(const OptionalTensor& given, double p) : dropout{nullptr, 0, 1.0f} {
        if (!given) return;
        rng = dense(*given);
        dropout = make_dropout(static_cast<const int64_t*>(rng->data_ptr()), p);
    }
};

template <class... Parts>
bool all_aligned(const Parts&... parts) {
    return (parts.aligned && ...);
}

}  // namespace pytorch_ext::cuda

template <>
struct torch::stable::detail::ToImpl<pytorch_ext::cuda::Word> {
    static pytorch_ext::cuda::Word call(StableIValue value, uint64_t, bool) {
        const auto handle = to<StringHandle>(value);
        size_t length = 0;
        const char* text = nullptr;
        TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
        TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
        const pytorch_ext::cuda::Word word(text, length);
        TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
        return word;
    }
};
