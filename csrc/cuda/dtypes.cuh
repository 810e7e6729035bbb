#pragma once

// The element types of kernels, and the ways between them and float, in which everything is computed.

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "launch.cuh"

namespace pytorch_ext::cuda {

using bfloat16 = torch::headeronly::BFloat16;
using float16 = torch::headeronly::Half;
using torch::headeronly::ScalarType;

template <class T>
constexpr ScalarType SCALAR_TYPE = ScalarType::Float;
template <>
inline constexpr ScalarType SCALAR_TYPE<bfloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType SCALAR_TYPE<float16> = ScalarType::Half;

// The same bits as another type of the same size.
template <class To, class From>
__device__ inline To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// Two 16-bit elements in one register, the first in its lower half; rounded to the nearest, ties to even.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
#if defined(__CUDA_ARCH__)
    // One instruction, where two conversions and a permutation would be three.
    if constexpr (std::is_same_v<T, bfloat16>) return bits<uint32_t>(__floats2bfloat162_rn(low, high));
    if constexpr (std::is_same_v<T, float16>) return bits<uint32_t>(__floats2half2_rn(low, high));
#endif
    return bits<uint16_t>(T(low)) | static_cast<uint32_t>(bits<uint16_t>(T(high))) << 16;
}

template <class T>
__device__ inline float2 unpack(uint32_t pair) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        return {bits<float>(pair << 16), bits<float>(pair & 0xffff0000)};
    } else {
        return {float(bits<T>(static_cast<uint16_t>(pair))),
                float(bits<T>(static_cast<uint16_t>(pair >> 16)))};
    }
}

// x as it is read back after it was stored as T.
template <class T>
__device__ inline float rounded(float x) {
    return float(T(x));
}

template <class T>
struct Type {
    using type = T;
};

// Calls `work` with the element type: `visit(dtype, [&](auto t) { using T = typename decltype(t)::type; ... })`.
template <class Work>
auto visit(ScalarType dtype, const Work& work) {
    switch (dtype) {
#ifndef PYTORCH_EXT_ONLY_BFLOAT16  // for tests that look at machine code: a third of it, and of the time
        case ScalarType::Float: return work(Type<float>());
        case ScalarType::Half: return work(Type<float16>());
#endif
        case ScalarType::BFloat16: break;
        default: STD_TORCH_CHECK(false, "backend 'cuda': it has no kernels for this dtype");
    }
    return work(Type<bfloat16>());
}

}  // namespace pytorch_ext::cuda
