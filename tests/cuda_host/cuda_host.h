#pragma once

// CUDA's execution model for g++: what csrc/cuda/launch.cuh includes in place of CUDA's own headers.
//
// A fiber per thread, one block after another. A warp runs until all its lanes wait for the block, then the next warp;
// CUDA_HOST_ORDER (ascending, descending, shuffled) says in which order warps, lanes and blocks have their turns, so
// that a missing barrier shows in one of them. What CUDA leaves undefined is an error here that names the kernel, the
// block and the thread. docs/cuda-host.md says what a run on the CPU cannot show.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// --- Types ------------------------------------------------------------------------------------------------------

struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct uint3 {
    uint32_t x, y, z;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct dim3 {
    uint32_t x, y, z;
    constexpr dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;

// Of the thread whose turn it is.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// --- The machine ------------------------------------------------------------------------------------------------

namespace cuda_host {

constexpr int WARP = 32;

// Runs every thread of a grid; the kernel's address is for error messages. An error is raised as a RuntimeError.
void run_grid(void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

void* shared_memory();

// Ends the kernel: what the running thread does is an error. Does not return.
[[noreturn]] void fail(const std::string& what);

// Where in the source a thread waits. Threads that meet must be at one place.
struct Place {
    const char* what;
    const char* file;
    int line;
};

// All threads of the block wait for one another; whether any of them says yes.
bool meet_block(Place place, bool yes = false);

// The lanes of `mask` wait for one another. The last to come calls `together(theirs)`, in which `theirs` are what the
// lanes brought, null for those that are not in the mask.
void meet_warp(uint32_t mask, Place place, void* mine, void (*together)(void* (&theirs)[WARP]));

// What a shuffle does: each lane gets the value of the lane that `from` names, of its own where there is none.
template <class T>
T shuffle(uint32_t mask, T value, int from, Place place) {
    static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    struct Part {
        T value, result;
        int from;
    } part{value, value, from};
    meet_warp(mask, place, &part, [](void*(&theirs)[WARP]) {
        for (void* own : theirs) {
            if (own == nullptr) continue;
            Part& part = *static_cast<Part*>(own);
            if (theirs[part.from] == nullptr) fail("a shuffle from a lane that takes no part");
            part.result = static_cast<Part*>(theirs[part.from])->value;
        }
    });
    return part.result;
}

// Which lanes of the mask say yes.
uint32_t ballot(uint32_t mask, bool yes, Place place);

int lane();

// Fails if what an instruction takes from shared memory is elsewhere.
void check_shared(const void* at, size_t bytes, const char* what);

// --- cp.async: a copy is made when it is waited for, and until then what it will overwrite is no number ----------

void async_copy(void* to, const void* from, int bytes, int filled);  // the bytes behind `bytes` are zero
void async_commit();
void async_wait(int groups_left);  // all but so many of the latest groups

}  // namespace cuda_host

// --- CUDA's functions -------------------------------------------------------------------------------------------

#define CUDA_HOST_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_HOST_PLACE) { cuda_host::meet_block({"__syncthreads", file, line}); }
inline int __syncthreads_or(int yes, CUDA_HOST_PLACE) {
    return cuda_host::meet_block({"__syncthreads_or", file, line}, yes);
}

inline void __syncwarp(uint32_t mask = 0xffffffff, CUDA_HOST_PLACE) {
    cuda_host::meet_warp(mask, {"__syncwarp", file, line}, &mask, [](void*(&)[cuda_host::WARP]) {});
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, CUDA_HOST_PLACE) {
    const int lane = cuda_host::lane();
    return cuda_host::shuffle(mask, value, lane / width * width + source % width,
                              {"__shfl_sync", file, line});
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int distance, int width = 32, CUDA_HOST_PLACE) {
    const int lane = cuda_host::lane(), other = lane ^ distance;
    const int from = other / width > lane / width ? lane : other;
    return cuda_host::shuffle(mask, value, from, {"__shfl_xor_sync", file, line});
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, int distance, int width = 32, CUDA_HOST_PLACE) {
    const int lane = cuda_host::lane();
    const int from = lane % width + distance < width ? lane + distance : lane;
    return cuda_host::shuffle(mask, value, from, {"__shfl_down_sync", file, line});
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, int distance, int width = 32, CUDA_HOST_PLACE) {
    const int lane = cuda_host::lane();
    const int from = lane % width >= distance ? lane - distance : lane;
    return cuda_host::shuffle(mask, value, from, {"__shfl_up_sync", file, line});
}

inline uint32_t __ballot_sync(uint32_t mask, int yes, CUDA_HOST_PLACE) {
    return cuda_host::ballot(mask, yes, {"__ballot_sync", file, line});
}
inline int __any_sync(uint32_t mask, int yes, CUDA_HOST_PLACE) {
    return cuda_host::ballot(mask, yes, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(uint32_t mask, int yes, CUDA_HOST_PLACE) {
    return cuda_host::ballot(mask, yes, {"__all_sync", file, line}) == mask;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
template <class T>
T __ldg(const T* p) {
    return *p;
}
#define rsqrtf(x) (1.0f / std::sqrt(static_cast<float>(x)))  // newer C libraries have a function of that name
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
// The compiler would fuse a plain product with the sum that it becomes part of.
inline float __fmul_rn(float a, float b) {
    float product = a * b;
    asm("" : "+m"(product));
    return product;
}
using std::max;
using std::min;
