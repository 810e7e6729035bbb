#pragma once

// Instructions that C++ has no name for. The layouts of fragments are those of "Matrix multiply-accumulate operation
// using mma instruction" in the PTX manual; lanes are counted in groups of four.

#include "dtypes.cuh"

#ifdef PYTORCH_EXT_CUDA_HOST
#include "ptx_host.h"
#else

namespace pytorch_ext::cuda {

__device__ inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, which are there when their group was waited for; zeros if not `there`.
__device__ inline void copy_async(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}

// The same of 4 bytes.
__device__ inline void copy_word_async(void* to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 4 : 0)
                 : "memory");
}

// The copies of this thread since the last call are a group.
__device__ inline void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all groups of this thread but the latest LEFT are there. Other threads see them behind a barrier.
template <int LEFT>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements. Lanes 8 i to 8 i + 7 name the rows of matrix i; each lane gets of each
// matrix elements 2 (lane % 4) and the next of row lane / 4.
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of the matrices transposed.
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// sum (16 x 8, float) += a (16 x 16) b (16 x 8). Each lane holds of `sum` columns 2 (lane % 4) and the next of rows
// lane / 4 and lane / 4 + 8; of `a` in the same rows columns 2 (lane % 4) and the next, then those 8 further; of `b`
// column lane / 4 in rows 2 (lane % 4) and the next, then those 8 further.
template <class T>
__device__ inline void add_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
            "%9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// 2 ** x on the unit for such functions, to two units in the last place.
__device__ inline float exp2_approximately(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The larger one, and no number if one of them is none.
__device__ inline float larger_or_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// The same number, of which the compiler knows nothing: it makes nothing of it in advance, outside of a loop.
__device__ inline int as_if_new(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

}  // namespace pytorch_ext::cuda

#endif
