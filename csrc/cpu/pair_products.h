#pragma once

// Matrix products of 16-bit elements by units that multiply them in pairs: the matrix unit (AMX), through the kernels
// that PyTorch makes with oneDNN, and the dot products of AVX512_BF16. No ATen here: files in isa/ call these.

#include <cstddef>

#include "isa.h"

namespace pytorch_ext {

// Whether there is such a unit for this dtype: the processor has it, and the instruction set in use is not capped below.
bool multiplies_pairs(Dtype dtype);

// Whether it is the matrix unit, which multiplies whole tiles: it reads and writes TILE rows at a time, and TILE of k.
bool on_tiles(Dtype dtype);
constexpr ptrdiff_t TILE = 32;

// c[m][n] = a[m][k] b[k][n], or added to it. `b` is in pairs of rows, [k / 2][ldb][2] (VNNI), zeros behind the last row
// where k is odd, and n a multiple of 32. On tiles m and k are rounded up to TILE: all of these rows of a and c and these
// columns of a are there, and what stands in a behind k is zeros. Every new (m, n, k, lda, ldb, ldc) costs about 150 us
// and 40 KB there, so callers keep to a few.
void multiply_pairs(Dtype dtype, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, ptrdiff_t lda, ptrdiff_t ldb,
                    ptrdiff_t ldc, bool accumulate, const void* a, const void* b, float* c);

// Frees the tiles of this thread, after its last product of a parallel region.
void release_tiles();

// The same product without tiles. The pair (2p, 2p + 1) of row i of `a` stands at element 2 * (i * row + p * step), so
// that a matrix of pairs of rows can be read as its transpose.
PYTORCH_EXT_KERNEL(dot_pairs, Dtype dtype, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const void* a,
                   ptrdiff_t row, ptrdiff_t step, const void* b, ptrdiff_t ldb, float* c, ptrdiff_t ldc,
                   bool accumulate)

// Lays right[k][n] of 16-bit elements out in pairs of rows, in blocks of `cols` columns, [n / cols][depth / 2][cols][2],
// depth even; zeros behind the last row and the last column. Of the strides, in elements, one is 1.
PYTORCH_EXT_KERNEL(pack_pairs, void* blocks, ptrdiff_t cols, ptrdiff_t depth, const void* right,
                   ptrdiff_t row, ptrdiff_t col, ptrdiff_t k, ptrdiff_t n)

}  // namespace pytorch_ext
