#include "amx.h"

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

// A transposed matrix has its pairs side by side already: they are moved as one number of 32 bits, eight columns at a time
// so that what is written stays together.
void pair_columns(Bits* to, ptrdiff_t cols, const Bits* from, ptrdiff_t col, ptrdiff_t k, ptrdiff_t n) {
    constexpr ptrdiff_t STRIP = 8;
    for (ptrdiff_t j = 0; j < n; j += STRIP) {
        const ptrdiff_t end = n - j < STRIP ? n : j + STRIP;
        for (ptrdiff_t p = 0; p < k; p += 2)
            for (ptrdiff_t c = j; c < end; ++c) {
                Bits* pair = to + (p / 2 * cols + c) * 2;
                pair[0] = from[c * col + p];
                pair[1] = p + 1 < k ? from[c * col + p + 1] : 0;
            }
    }
}

}  // namespace

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
