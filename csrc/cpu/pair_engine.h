#pragma once

// The engine (see engine.h) of 16-bit elements that are multiplied in pairs. For files in isa/ alone.

#include "engine.h"
#include "pair_products.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {

template <class T>
inline constexpr Dtype DTYPE = Dtype::float32;
template <>
inline constexpr Dtype DTYPE<bfloat16> = Dtype::bfloat16;
template <>
inline constexpr Dtype DTYPE<float16> = Dtype::float16;

template <class T>
struct PairEngine {
    using Left = T;
    using Right = unsigned short;
    static constexpr ptrdiff_t M_STEP = TILE, N_STEP = 32, K_STEP = TILE;
    static constexpr bool READS_TRANSPOSED = false;
    static constexpr ptrdiff_t COLS = 64;  // of a block of the laid-out matrix

    static ptrdiff_t right_size(ptrdiff_t k, ptrdiff_t n) { return round_up(k, K_STEP) * round_up(n, COLS); }

    static void pack(Right* dst, const T* src, ptrdiff_t ld, ptrdiff_t k, ptrdiff_t n) {
        pack_pairs(dst, COLS, round_up(k, K_STEP), src, ld, 1, k, n);
    }

    static void pack_transposed(Right* dst, const T* src, ptrdiff_t ld, ptrdiff_t k, ptrdiff_t n) {
        pack_pairs(dst, COLS, round_up(k, K_STEP), src, 1, ld, k, n);
    }

    static void multiply(const T* a, ptrdiff_t lda, const Right* b, ptrdiff_t packed_k, ptrdiff_t,
                         ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, float* c, ptrdiff_t ldc, bool accumulate) {
        for (ptrdiff_t j = 0; j < n; j += COLS, b += round_up(packed_k, K_STEP) * COLS)
            multiply_pairs(DTYPE<T>, m, n - j > N_STEP ? COLS : N_STEP, k, lda, COLS, ldc, accumulate, a, b,
                           c + j);
    }

    static void transpose_left(T* dst, ptrdiff_t dst_ld, const T* src, ptrdiff_t ld, ptrdiff_t rows,
                               ptrdiff_t cols) {
        for (ptrdiff_t j = 0; j < cols; ++j, dst += dst_ld) {
            for (ptrdiff_t i = 0; i < rows; ++i) dst[i] = src[i * ld + j];
            for (ptrdiff_t i = rows; i < round_up(rows, K_STEP); ++i) dst[i] = T{};
        }
    }
};

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
