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
};

struct DropoutAddLayerNormGradient {
    const void *dout, *dsum, *sum;  // dsum may be null
    void *dinput, *dresidual;
    const float *mean, *rstd;  // (rows)
    const float* weight;       // (cols)
    const Dropout* dropout;    // null: none
    ptrdiff_t cols;
    Dtype input_dtype, residual_dtype, out_dtype;
};

PYTORCH_EXT_KERNEL(dropout_add_layer_norm_rows, const DropoutAddLayerNorm&, ptrdiff_t first, ptrdiff_t rows)

// Adds to the sums of dweight, dbias and dinput_bias, (3, cols). Of scratch it needs (4, cols) if there is dropout.
PYTORCH_EXT_KERNEL(dropout_add_layer_norm_gradient, const DropoutAddLayerNormGradient&, ptrdiff_t first,
                   ptrdiff_t rows, float* sums, float* scratch)

}  // namespace pytorch_ext
