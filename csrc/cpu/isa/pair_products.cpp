#include "pair_products.h"

#include "dtypes.h"
#include "gemm.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {
namespace {

using Bits = unsigned short;

// Pairs of rows, element by element: [n][2] from two rows, or from one and zeros.
void pair_rows(Bits* to, const Bits* first, const Bits* second, ptrdiff_t n) {
    ptrdiff_t j = 0;
    for (; j + W <= n; j += W) {
        H a, b{};
        __builtin_memcpy(&a, first + j, sizeof a);
        if (second) __builtin_memcpy(&b, second + j, sizeof b);
        const U both = __builtin_convertvector(a, U) | __builtin_convertvector(b, U) << 16;
        __builtin_memcpy(to + 2 * j, &both, sizeof both);
    }
    for (; j < n; ++j) {
        to[2 * j] = first[j];
        to[2 * j + 1] = second ? second[j] : 0;
    }
}

// A transposed matrix has its pairs side by side already: they are moved as numbers of 32 bits, W pairs of W columns at a
// time. What is left over goes one by one.
void pair_columns(Bits* to, ptrdiff_t cols, const Bits* from, ptrdiff_t col, ptrdiff_t k, ptrdiff_t n) {
    const auto one_by_one = [&](ptrdiff_t c, ptrdiff_t end, ptrdiff_t first) {
        for (; c < end; ++c)
            for (ptrdiff_t p = first; p < k; p += 2) {
                Bits* pair = to + (p / 2 * cols + c) * 2;
                pair[0] = from[c * col + p];
                pair[1] = p + 1 < k ? from[c * col + p + 1] : 0;
            }
    };
    ptrdiff_t c = 0;
    for (; c + W <= n; c += W) {
        ptrdiff_t p = 0;
        for (; p + 2 * W <= k; p += 2 * W) {
            F rows[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) __builtin_memcpy(rows + i, from + (c + i) * col + p, sizeof(F));
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
                __builtin_memcpy(to + ((p / 2 + i) * cols + c) * 2, rows + i, sizeof(F));
        }
        one_by_one(c, c + W, p);
    }
    one_by_one(c, n, 0);
}

#if defined(__AVX512F__)

// Of a file for AVX-512 these functions alone use what AVX512_BF16 adds: whoever calls them has asked for it.
#define PX_BF16 __attribute__((target("avx512bf16")))

// M x 32 sums in registers, as `micro` in gemm.h.
template <int M>
PX_BF16 PX_INLINE void dot_micro(const Bits* a, ptrdiff_t row, ptrdiff_t step, const Bits* b, ptrdiff_t ldb,
                                 ptrdiff_t pairs, float* c, ptrdiff_t ldc, bool accumulate) {
    __m512 left[M], right[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) left[i] = right[i] = _mm512_setzero_ps();
    for (ptrdiff_t p = 0; p < pairs; ++p, a += 2 * step, b += 2 * ldb) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 2 * W);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            int pair;
            __builtin_memcpy(&pair, a + 2 * i * row, sizeof pair);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            left[i] = _mm512_dpbf16_ps(left[i], x, b0);
            right[i] = _mm512_dpbf16_ps(right[i], x, b1);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i, c += ldc) {
        store(c, accumulate ? load(c) + (F)left[i] : (F)left[i]);
        store(c + W, accumulate ? load(c + W) + (F)right[i] : (F)right[i]);
    }
}

// dot_micro of m < MR rows.
template <int M = MR - 1>
PX_BF16 PX_INLINE void dot_micro_of(ptrdiff_t m, const Bits* a, ptrdiff_t row, ptrdiff_t step, const Bits* b,
                                    ptrdiff_t ldb, ptrdiff_t pairs, float* c, ptrdiff_t ldc,
                                    bool accumulate) {
    if constexpr (M > 0) {
        if (m == M) return dot_micro<M>(a, row, step, b, ldb, pairs, c, ldc, accumulate);
        dot_micro_of<M - 1>(m, a, row, step, b, ldb, pairs, c, ldc, accumulate);
    }
}

template <bool ROWS>  // the left matrix lies in rows: step is 1
PX_BF16 PX_NOINLINE void dot_strided(ptrdiff_t m, ptrdiff_t n, ptrdiff_t pairs, const Bits* a, ptrdiff_t row,
                                     ptrdiff_t step, const Bits* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc,
                                     bool accumulate) {
    if (ROWS)
        step = 1;
    else
        row = 1;
    for (ptrdiff_t j = 0; j < n; j += NR, b += 2 * NR) {
        ptrdiff_t i = 0;
        for (; i + MR <= m; i += MR)
            dot_micro<MR>(a + 2 * i * row, row, step, b, ldb, pairs, c + i * ldc + j, ldc, accumulate);
        dot_micro_of(m - i, a + 2 * i * row, row, step, b, ldb, pairs, c + i * ldc + j, ldc, accumulate);
    }
}

#endif

// For tests: any dtype, on any processor.
template <class T>
void dot_plain(ptrdiff_t m, ptrdiff_t n, ptrdiff_t pairs, const T* a, ptrdiff_t row, ptrdiff_t step,
               const T* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc, bool accumulate) {
    for (ptrdiff_t i = 0; i < m; ++i)
        for (ptrdiff_t j = 0; j < n; ++j) {
            float sum = accumulate ? c[i * ldc + j] : 0.0f;
            for (ptrdiff_t p = 0; p < pairs; ++p)
                for (ptrdiff_t half = 0; half < 2; ++half)
                    sum += load_one(a + 2 * (i * row + p * step) + half) *
                           load_one(b + 2 * (p * ldb + j) + half);
            c[i * ldc + j] = sum;
        }
}

}  // namespace

void dot_pairs(Dtype dtype, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const void* a, ptrdiff_t row,
               ptrdiff_t step, const void* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc, bool accumulate) {
    const ptrdiff_t pairs = (k + 1) / 2;
#if defined(__AVX512F__)
    if (dtype == Dtype::bfloat16) {
        const auto dot = step == 1 ? dot_strided<true> : dot_strided<false>;
        return dot(m, n, pairs, (const Bits*)a, row, step, (const Bits*)b, ldb, c, ldc, accumulate);
    }
#endif
    visit(dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        dot_plain(m, n, pairs, (const T*)a, row, step, (const T*)b, ldb, c, ldc, accumulate);
    });
}

void pack_pairs(void* blocks, ptrdiff_t cols, ptrdiff_t depth, const void* right, ptrdiff_t row,
                ptrdiff_t col, ptrdiff_t k, ptrdiff_t n) {
    Bits* to = (Bits*)blocks;
    for (ptrdiff_t j = 0; j < n; j += cols, to += depth * cols) {
        const ptrdiff_t width = n - j < cols ? n - j : cols;
        const Bits* from = (const Bits*)right + j * col;
        if (depth && (width < cols || k < depth)) __builtin_memset(to, 0, depth * cols * sizeof(Bits));
        if (col != 1) {
            pair_columns(to, cols, from, col, k, width);
            continue;
        }
        for (ptrdiff_t p = 0; p < k; p += 2)
            pair_rows(to + p * cols, from + p * row, p + 1 < k ? from + (p + 1) * row : nullptr, width);
    }
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
