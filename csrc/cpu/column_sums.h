#pragma once

// Sums over the rows of a matrix, for the gradients of parameters: over chunks of rows first, then over the chunks.

#include <cstddef>

#include "isa.h"

namespace pytorch_ext {

// out (cols) = the sum over `chunks` rows, `stride` apart, of which columns `first` to `first + count` are made.
PYTORCH_EXT_KERNEL(sum_columns, const float* partial, ptrdiff_t chunks, ptrdiff_t stride, ptrdiff_t first,
                   ptrdiff_t count, void* out, Dtype)

}  // namespace pytorch_ext
