#pragma once

// Matrix products of 16-bit elements on the matrix unit (AMX), through the kernels that PyTorch makes with oneDNN.
// No ATen here: files in isa/ call these.

#include <cstddef>

#include "isa.h"

namespace pytorch_ext {

// Whether products of this dtype run there: the processor can, and the instruction set in use is not capped below.
bool amx_multiplies(Dtype dtype);

// c[m][n] = a[m][k] b[k][n], or added to it. `b` is in pairs of rows, [k / 2][ldb][2] (VNNI), and k even: another kills
// the process. Every new (m, n, k, lda, ldb, ldc) costs about 150 us and 40 KB, so callers keep to a few.
void brgemm(Dtype dtype, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, ptrdiff_t lda, ptrdiff_t ldb, ptrdiff_t ldc,
            bool accumulate, const void* a, const void* b, float* c);

// Frees the tiles of this thread, after its last product of a parallel region.
void brgemm_release();

// Lays right[k][n] of 16-bit elements out as brgemm wants it, in blocks of `cols` columns, [n / cols][depth / 2][cols][2],
// depth even; zeros behind the last row and the last column. Of the strides, in elements, one is 1.
PYTORCH_EXT_KERNEL(pack_pairs, void* blocks, ptrdiff_t cols, ptrdiff_t depth, const void* right,
                   ptrdiff_t row, ptrdiff_t col, ptrdiff_t k, ptrdiff_t n)

}  // namespace pytorch_ext
