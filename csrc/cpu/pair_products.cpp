#include "pair_products.h"

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

namespace pytorch_ext {

bool multiplies_pairs(Dtype dtype) {
    return on_tiles(dtype) || (dtype == Dtype::bfloat16 && current_isa() >= Isa::avx512_bf16);
}

#ifndef PYTORCH_EXT_EMULATE_PAIRS

bool on_tiles(Dtype dtype) {
    if (current_isa() != Isa::amx || dtype == Dtype::float32) return false;
    // An AMX without fp16 computes nonsense from it, and says nothing.
    static const bool has_float16 = at::native::cpublas::could_pack(at::kHalf);
    return dtype == Dtype::bfloat16 || has_float16;
}

namespace {

template <class T>
void multiply_tiles(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, ptrdiff_t lda, ptrdiff_t ldb, ptrdiff_t ldc,
                    bool accumulate, const void* a, const void* b, float* c) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, static_cast<const T*>(a),
                                static_cast<const T*>(b), c, true);
}

}  // namespace

void release_tiles() { at::native::cpublas::brgemm_release(true); }

#else  // dot products instead, so that tests reach what stands around the matrix unit on a machine without one

bool on_tiles(Dtype dtype) { return current_isa() == Isa::amx && dtype != Dtype::float32; }

namespace {

template <class T>
void multiply_tiles(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, ptrdiff_t lda, ptrdiff_t ldb, ptrdiff_t ldc,
                    bool accumulate, const void* a, const void* b, float* c) {
    TORCH_CHECK(m > 0 && n > 0 && k > 0, "brgemm of ", m, " x ", n, " x ", k);
    const Dtype dtype = std::is_same_v<T, at::Half> ? Dtype::float16 : Dtype::bfloat16;
    PYTORCH_EXT_CALL(dot_pairs, dtype, m, n, k, a, lda / 2, 1, b, ldb, c, ldc, accumulate);
}

}  // namespace

void release_tiles() {}

#endif

void multiply_pairs(Dtype dtype, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, ptrdiff_t lda, ptrdiff_t ldb,
                    ptrdiff_t ldc, bool accumulate, const void* a, const void* b, float* c) {
    if (!on_tiles(dtype))
        return PYTORCH_EXT_CALL(dot_pairs, dtype, m, n, k, a, lda / 2, 1, b, ldb, c, ldc, accumulate);
    const auto whole = [](ptrdiff_t size) { return (size + TILE - 1) / TILE * TILE; };
    const auto multiply = dtype == Dtype::float16 ? multiply_tiles<at::Half> : multiply_tiles<at::BFloat16>;
    multiply(whole(m), n, whole(k), lda, ldb, ldc, accumulate, a, b, c);
}

}  // namespace pytorch_ext
