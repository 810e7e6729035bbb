#pragma once

// Elements of a row, 16 bytes at a time: what one instruction moves, and what memory is fastest with.

#include "dtypes.cuh"

namespace pytorch_ext::cuda {

template <class T>
constexpr int VEC = 16 / sizeof(T);  // elements of a chunk

// The chunk from p on, of which `count` elements are there, none if it is 0 or less; those that are not are zero.
// Where rows do not begin at multiples of 16 bytes (`aligned` is of all rows, so threads do not part), one by one.
template <class T>
__device__ inline uint4 load_chunk(const T* p, int count, bool aligned) {
    if (aligned && count >= VEC<T>) return *reinterpret_cast<const uint4*>(p);
    T elements[VEC<T>];
#pragma unroll
    for (int i = 0; i < VEC<T>; ++i) elements[i] = i < count ? p[i] : T(0.0f);
    return bits<uint4>(elements);
}

template <class T>
__device__ inline void store_chunk(T* p, uint4 chunk, int count, bool aligned) {
    if (aligned && count >= VEC<T>) {
        *reinterpret_cast<uint4*>(p) = chunk;
        return;
    }
    T elements[VEC<T>];
    memcpy(elements, &chunk, sizeof(chunk));
#pragma unroll
    for (int i = 0; i < VEC<T>; ++i)
        if (i < count) p[i] = elements[i];
}

template <class T>
__device__ inline void widen(float (&out)[VEC<T>], const uint4& chunk) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            out[i] = bits<float>(words[i]);
        } else {
            const float2 pair = unpack<T>(words[i]);
            out[2 * i] = pair.x;
            out[2 * i + 1] = pair.y;
        }
    }
}

template <class T>
__device__ inline uint4 narrow(const float* x) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4)
            words[i] = bits<uint32_t>(x[i]);
        else
            words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    }
    return {words[0], words[1], words[2], words[3]};
}

}  // namespace pytorch_ext::cuda
