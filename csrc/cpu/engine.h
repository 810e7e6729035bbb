#pragma once

// How the tiles of attention and of linear layers are multiplied, behind one interface:
//
//   Left, Right             element types of the left matrix (rows) and of the laid-out right one
//   M_STEP, N_STEP, K_STEP  the left matrix has round_up(m, M_STEP) rows that may be read and round_up(k, K_STEP)
//                           columns, zeros behind the last; c has round_up(m, M_STEP) rows of at least
//                           round_up(n, N_STEP) columns, and all of it may be written
//   right_size(k, n)        elements of a laid-out right matrix
//   pack(dst, src, ld, k, n)             from src[k][n], rows ld elements apart
//   pack_transposed(dst, src, ld, k, n)  from src[n][k]
//   multiply(a, lda, b, packed_k, packed_n, m, n, k, c, ldc, accumulate)
//                                        c[m][n] = a[m][k] b[k][n], or added to it: the first k rows and n columns of
//                                        what was laid out as packed_k rows of packed_n columns
//   READS_TRANSPOSED                     whether multiply_transposed(...) is there, the same with a[k][m]; if not,
//   transpose_left(dst, dst_ld, src, ld, rows, cols)  writes dst[cols][rows], padded as a left matrix
//
// For files in isa/ alone.

#include "gemm.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {

// A sum in a tile of attention is built from sums of this length: of 256 products in one, the error is 1.5 times that of
// PyTorch's.
constexpr ptrdiff_t LONGEST_TILE_SUM = 128;

// Any dtype, multiplied in float.
struct FloatEngine {
    using Left = float;
    using Right = float;
    static constexpr ptrdiff_t M_STEP = 1, N_STEP = NR, K_STEP = 1;
    static constexpr bool READS_TRANSPOSED = true;

    static ptrdiff_t right_size(ptrdiff_t k, ptrdiff_t n) { return k * round_up(n, NR); }

    template <class T>
    static void pack(float* dst, const T* src, ptrdiff_t ld, ptrdiff_t k, ptrdiff_t n) {
        for (ptrdiff_t j = 0; j < n; j += NR) {
            const ptrdiff_t width = n - j < NR ? n - j : NR;
            const T* row = src + j;
            if (width == NR)
                for (ptrdiff_t p = 0; p < k; ++p, row += ld, dst += NR) {
                    store(dst, load(row));
                    store(dst + W, load(row + W));
                }
            else
                for (ptrdiff_t p = 0; p < k; ++p, row += ld, dst += NR) {
                    store(dst, width < W ? load(row, width) : load(row));
                    store(dst + W, width > W ? load(row + W, width - W) : F{});
                }
        }
    }

    template <class T>
    static void pack_transposed(float* dst, const T* src, ptrdiff_t ld, ptrdiff_t k, ptrdiff_t n) {
        for (ptrdiff_t j = 0; j < n; j += NR) {
            for (ptrdiff_t half = 0; half < NR; half += W)
                for (ptrdiff_t p = 0; p < k; p += W)
                    transpose_block(dst + p * NR + half, src + (j + half) * ld + p, ld, n - j - half, k - p);
            dst += k * NR;
        }
    }

    static void multiply(const float* a, ptrdiff_t lda, const float* b, ptrdiff_t packed_k,
                         ptrdiff_t packed_n, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, float* c, ptrdiff_t ldc,
                         bool accumulate) {
        for (ptrdiff_t p = 0; p < k; p += LONGEST_TILE_SUM) {
            const ptrdiff_t part = k - p < LONGEST_TILE_SUM ? k - p : LONGEST_TILE_SUM;
            multiply_strided<true>(a + p, lda, MR * lda, b + p * NR, packed_k * NR, m, n, part, c, ldc,
                                   accumulate || p > 0);
        }
    }

    static void multiply_transposed(const float* a, ptrdiff_t lda, const float* b, ptrdiff_t packed_k,
                                    ptrdiff_t packed_n, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, float* c,
                                    ptrdiff_t ldc, bool accumulate) {
        for (ptrdiff_t p = 0; p < k; p += LONGEST_TILE_SUM) {
            const ptrdiff_t part = k - p < LONGEST_TILE_SUM ? k - p : LONGEST_TILE_SUM;
            multiply_strided<false>(a + p * lda, lda, MR, b + p * NR, packed_k * NR, m, n, part, c, ldc,
                                    accumulate || p > 0);
        }
    }

private:
    // dst[p][i] = src[i][p] for W x W elements; what lies past `rows` or `cols` is zero, or not written.
    template <class T>
    static void transpose_block(float* dst, const T* src, ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t cols) {
        F lines[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
            lines[i] = i >= rows ? F{} : cols < W ? load(src + i * ld, cols) : load(src + i * ld);
        transpose(lines);
#pragma GCC unroll 16
        for (int p = 0; p < W; ++p)
            if (p < cols) store(dst + p * NR, lines[p]);
    }
};

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
