#pragma once

#include <cstddef>

#include "isa.h"

namespace pytorch_ext {

struct LayerNorm {
    const void* input;  // (rows, cols)
    void* out;
    float *mean, *rstd;          // (rows)
    const float *weight, *bias;  // (cols); null: none
    ptrdiff_t cols;
    float eps;
    Dtype dtype;
};

struct LayerNormGradient {
    const void *dout, *input;  // (rows, cols)
    void* dinput;
    const float *mean, *rstd;  // (rows)
    const float* weight;       // (cols); null: none
    ptrdiff_t cols;
    Dtype dtype;
};

PYTORCH_EXT_KERNEL(layer_norm_rows, const LayerNorm&, ptrdiff_t first, ptrdiff_t rows)

// Adds to the sums of dweight and dbias, (2, cols).
PYTORCH_EXT_KERNEL(layer_norm_gradient, const LayerNormGradient&, ptrdiff_t first, ptrdiff_t rows,
                   float* sums)

}  // namespace pytorch_ext
