#pragma once

#include <cstddef>

#include "isa.h"

namespace pytorch_ext {

struct BiasGelu {
    const void* dout;   // (rows, cols), of the gradient
    const void* input;  // (rows, cols)
    const float* bias;  // (cols)
    void* out;          // (rows, cols); or dinput
    ptrdiff_t cols;
    bool by_tanh;
    Dtype dtype;
};

PYTORCH_EXT_KERNEL(bias_gelu_rows, const BiasGelu&, ptrdiff_t first, ptrdiff_t rows)

// Adds to the sums of dbias, (cols).
PYTORCH_EXT_KERNEL(bias_gelu_gradient, const BiasGelu&, ptrdiff_t first, ptrdiff_t rows, float* sums)

}  // namespace pytorch_ext
