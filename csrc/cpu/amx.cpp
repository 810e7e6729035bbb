#include "amx.h"

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

namespace pytorch_ext {

#ifndef PYTORCH_EXT_EMULATE_AMX

bool amx_multiplies(Dtype dtype) {
    if (current_isa() != Isa::amx || dtype == Dtype::float32) return false;
    // An AMX without fp16 computes nonsense from it, and says nothing.
    static const bool has_float16 = at::native::cpublas::could_pack(at::kHalf);
    return dtype == Dtype::bfloat16 || has_float16;
}

void brgemm(Dtype dtype, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, ptrdiff_t lda, ptrdiff_t ldb, ptrdiff_t ldc,
            bool accumulate, const void* a, const void* b, float* c) {
    if (dtype == Dtype::bfloat16)
        at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, static_cast<const at::BFloat16*>(a),
                                    static_cast<const at::BFloat16*>(b), c, true);
    else
        at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, static_cast<const at::Half*>(a),
                                    static_cast<const at::Half*>(b), c, true);
}

void brgemm_release() { at::native::cpublas::brgemm_release(true); }

#else  // the same in plain loops, so that tests reach what stands around it on a machine without AMX

bool amx_multiplies(Dtype dtype) { return current_isa() == Isa::amx && dtype != Dtype::float32; }

template <class T>
static void multiply(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, ptrdiff_t lda, ptrdiff_t ldb, ptrdiff_t ldc,
                     bool accumulate, const T* a, const T* b, float* c) {
    TORCH_CHECK(m > 0 && n > 0 && k > 0 && k % 2 == 0, "brgemm of ", m, " x ", n, " x ", k);
    for (ptrdiff_t i = 0; i < m; ++i)
        for (ptrdiff_t j = 0; j < n; ++j) {
            float sum = accumulate ? c[i * ldc + j] : 0.0f;
            for (ptrdiff_t p = 0; p < k; ++p)
                sum +=
                    static_cast<float>(a[i * lda + p]) * static_cast<float>(b[(p / 2 * ldb + j) * 2 + p % 2]);
            c[i * ldc + j] = sum;
        }
}

void brgemm(Dtype dtype, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, ptrdiff_t lda, ptrdiff_t ldb, ptrdiff_t ldc,
            bool accumulate, const void* a, const void* b, float* c) {
    if (dtype == Dtype::bfloat16)
        multiply(m, n, k, lda, ldb, ldc, accumulate, static_cast<const at::BFloat16*>(a),
                 static_cast<const at::BFloat16*>(b), c);
    else
        multiply(m, n, k, lda, ldb, ldc, accumulate, static_cast<const at::Half*>(a),
                 static_cast<const at::Half*>(b), c);
}

void brgemm_release() {}

#endif

}  // namespace pytorch_ext
