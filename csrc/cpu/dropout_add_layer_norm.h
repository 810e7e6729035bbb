#pragma once

#include <cstddef>

#include "dropout.h"
#include "isa.h"

namespace pytorch_ext {

// out = layer_norm(sum), sum = residual + dropout(input + input_bias). Matrices are (rows, cols).
struct DropoutAddLayerNorm {
    const void *input, *residual;
    void *out, *sum;
    float *mean, *rstd;                       // (rows)
    const float *weight, *bias, *input_bias;  // (cols); null: none
    const Dropout* dropout;                   // null: none
    ptrdiff_t cols;
    float eps;
    Dtype input_dtype, residual_dtype, out_dtype;
    unsigned char* mask = nullptr;  // (rows, mask_bytes(cols)), to be written; null: not asked for
};

struct DropoutAddLayerNormGradient {
    const void *dout, *dsum, *sum;  // dsum may be null
    void *dinput, *dresidual;
    const float *mean, *rstd;   // (rows)
    const float* weight;        // (cols)
    const Dropout* dropout;     // null: none
    const unsigned char* mask;  // as forward wrote it; null: to be drawn again
    ptrdiff_t cols;
    Dtype input_dtype, residual_dtype, out_dtype;
};

PYTORCH_EXT_KERNEL(dropout_add_layer_norm_rows, const DropoutAddLayerNorm&, ptrdiff_t first, ptrdiff_t rows)

// Adds to the sums of dweight, dbias and dinput_bias, (3, cols). Of scratch it needs 4 rows of a mask, where that is
// to be drawn.
PYTORCH_EXT_KERNEL(dropout_add_layer_norm_gradient, const DropoutAddLayerNormGradient&, ptrdiff_t first,
                   ptrdiff_t rows, float* sums, unsigned char* scratch)

}  // namespace pytorch_ext
