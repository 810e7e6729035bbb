#pragma once

#include <cstddef>

#include "isa.h"

namespace pytorch_ext {

struct Gelu {
    const void* dout;  // of the gradient
    const void* input;
    void* out;  // or dinput
    bool by_tanh;
    Dtype dtype;
};

// Elements `first` to `first + count`.
PYTORCH_EXT_KERNEL(gelu_elements, const Gelu&, ptrdiff_t first, ptrdiff_t count)
PYTORCH_EXT_KERNEL(gelu_gradient, const Gelu&, ptrdiff_t first, ptrdiff_t count)

}  // namespace pytorch_ext
