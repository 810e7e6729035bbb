#pragma once

// Matrix products in float: tiles of MR x NR sums held in registers (Goto & van de Geijn 2008, "Anatomy of
// High-Performance Matrix Multiplication"). The right matrix is laid out in panels of NR columns, [n / NR][k][NR], zeros
// behind the last column; the left one is read where it lies, by any strides. For files in isa/ alone.

#include "vec.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {

#if defined(__AVX512F__)
constexpr int MR = 12;  // 24 of 32 registers hold sums
#else
constexpr int MR = 6;  // 12 of 16
#endif
constexpr int NR = 2 * W;

// A longer sum of products is built from sums of this length, for the sake of its rounding error.
constexpr ptrdiff_t LONGEST_SUM = 384;

// While a panel is multiplied, so many tiles fetch the next one into the second cache: a weight that lies in memory would
// otherwise be waited for.
constexpr ptrdiff_t TILES_AHEAD = 8;

PX_INLINE ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t step) { return (n + step - 1) / step * step; }

template <int M>
PX_INLINE void micro(const float* a, ptrdiff_t row, ptrdiff_t col, const float* b, ptrdiff_t k, float* c,
                     ptrdiff_t ldc, bool accumulate, const float* ahead) {
    F left[M], right[M];
    if (accumulate)
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) __builtin_prefetch(c + i * ldc);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) left[i] = right[i] = F{};
    const auto step = [&] {
        const F b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const F x = set(a[i * row]);
            left[i] += x * b0;
            right[i] += x * b1;
        }
        a += col;
        b += NR;
    };
    ptrdiff_t p = 0;
    if constexpr (M == MR)
        for (; p + TILES_AHEAD <= k; p += TILES_AHEAD, ahead += NR) {
            __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 8
            for (int q = 0; q < TILES_AHEAD; ++q) step();
        }
    for (; p < k; ++p) step();
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i, c += ldc) {
        store(c, accumulate ? load(c) + left[i] : left[i]);
        store(c + W, accumulate ? load(c + W) + right[i] : right[i]);
    }
}

// micro of m < MR rows.
template <int M = MR - 1>
PX_INLINE void micro_of(ptrdiff_t m, const float* a, ptrdiff_t row, ptrdiff_t col, const float* b,
                        ptrdiff_t k, float* c, ptrdiff_t ldc, bool accumulate, const float* ahead) {
    if constexpr (M > 0) {
        if (m == M) return micro<M>(a, row, col, b, k, c, ldc, accumulate, ahead);
        micro_of<M - 1>(m, a, row, col, b, k, c, ldc, accumulate, ahead);
    }
}

// c[m][n] = a[m][k] b[k][n], or added to it. Element (i, p) of a tile of MR rows is a[i * row + p * col], and tiles lie
// `tile` floats apart. `b` begins at the wanted k within its panels, which lie `panel` floats apart. Whole panels are
// written: ldc >= round_up(n, NR).
template <bool ROWS>  // the left matrix lies in rows: col is 1, otherwise row
PX_NOINLINE void multiply_strided(const float* a, ptrdiff_t stride, ptrdiff_t tile, const float* b,
                                  ptrdiff_t panel, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, float* c,
                                  ptrdiff_t ldc, bool accumulate) {
    const ptrdiff_t row = ROWS ? stride : 1, col = ROWS ? 1 : stride;
    for (ptrdiff_t j = 0; j < n; j += NR, b += panel) {
        const float* const next = j + NR < n ? b + panel : b;
        const float* from = a;
        ptrdiff_t i = 0;
        for (; i + MR <= m; i += MR, from += tile)
            micro<MR>(from, row, col, b, k, c + i * ldc + j, ldc, accumulate,
                      next + i / MR % TILES_AHEAD * (k * NR / TILES_AHEAD));
        micro_of(m - i, from, row, col, b, k, c + i * ldc + j, ldc, accumulate, next);
    }
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
