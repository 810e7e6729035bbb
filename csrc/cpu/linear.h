#pragma once

// linear: a blocked matrix product whose last step, on tiles that are still in the cache, adds the bias and applies the
// activation. Its backward is two such products.

#include <cstddef>

#include "isa.h"

namespace pytorch_ext {

enum class Activation { none, relu, gelu, gelu_tanh };

// A matrix by its strides, in elements; one of them is 1.
struct Matrix {
    const void* data;
    Dtype dtype;
    ptrdiff_t row, col;
};

// What happens to a sum on its way out: out = activation(sum + bias). `bias` and `preactivation` may be null.
struct Epilogue {
    const float* bias;
    Activation activation;
    void* out;
    void* preactivation;  // sum + bias, in the dtype and the rows of out
    Dtype dtype;
    ptrdiff_t row;  // elements from one row of out to the next
};

// left[m][k] right[k][n]; `right` in panels (see gemm.h) of float, or of 16 bits that are widened on the way.
struct Product {
    Matrix left;
    const void* right;
    Dtype right_dtype;
    ptrdiff_t m, n, k;
    Epilogue epilogue;
    float* left_sums;  // to which a transposed left matrix adds the sums of its rows, once; or null
};

// Rows i to i + rows and columns j to j + cols of a product, j a multiple of PANEL_STEP. At most BLOCK_ROWS and
// BLOCK_COLS; `scratch` has BLOCK_SCRATCH floats.
constexpr ptrdiff_t BLOCK_ROWS = 96, BLOCK_COLS = 512, BLOCK_K = 384, PANEL_STEP = 32;
constexpr ptrdiff_t BLOCK_LEFT = BLOCK_ROWS * (BLOCK_K + 8);  // a copy of the left matrix
constexpr ptrdiff_t BLOCK_SCRATCH = BLOCK_ROWS * BLOCK_COLS + BLOCK_LEFT + BLOCK_K * PANEL_STEP;
PYTORCH_EXT_KERNEL(product_block, const Product& product, ptrdiff_t i, ptrdiff_t rows, ptrdiff_t j,
                   ptrdiff_t cols, float* scratch)

// The same of any number of rows, of a right matrix that is not laid out yet: BLOCK_K of its rows are at a time.
// `scratch` has once_scratch floats.
PYTORCH_EXT_KERNEL(product_once, const Product& product, const Matrix& right, ptrdiff_t i, ptrdiff_t rows,
                   ptrdiff_t j, ptrdiff_t cols, float* scratch)
constexpr ptrdiff_t once_scratch(ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t k) {
    return BLOCK_LEFT + (BLOCK_K + (k > BLOCK_K ? rows : BLOCK_ROWS)) * (cols + PANEL_STEP);
}

// Lays columns j to j + cols of right[k][n] out in panels of `dtype`: float, or the matrix's own.
PYTORCH_EXT_KERNEL(lay_out_panels, void* panels, Dtype dtype, const Matrix& right, ptrdiff_t k, ptrdiff_t n,
                   ptrdiff_t j, ptrdiff_t cols)

// The epilogue alone, on sums [rows][cols] that lie `ld` apart and belong at (i, j) of out.
PYTORCH_EXT_KERNEL(finish_tile, const Epilogue& epilogue, const float* sums, ptrdiff_t ld, ptrdiff_t i,
                   ptrdiff_t rows, ptrdiff_t j, ptrdiff_t cols)

// dz = dout * activation'(preactivation) over `rows` rows of `cols` columns, laid end to end, and the sum of dz over the
// rows. `dz` is null where there is no activation: the sum is then of dout.
struct Gradient {
    const void *dout, *preactivation;
    Dtype dtype;  // of both
    void* dz;
    Dtype dz_dtype;
    Activation activation;
    ptrdiff_t cols;
};
PYTORCH_EXT_KERNEL(linear_gradient, const Gradient& gradient, ptrdiff_t i, ptrdiff_t rows, float* column_sums)

}  // namespace pytorch_ext
