#pragma once

// What kernels have to know of a dropout. No ATen: files in isa/ include it.

#include <cstddef>
#include <cstdint>

namespace pytorch_ext {

struct Dropout {
    uint64_t seed;
    uint32_t offset;     // its lower word, which is all that counters have room for
    uint64_t threshold;  // words below it drop their element: 0 to 2^32
    float scale;         // of what is kept
};

// A mask is one bit for each element, set where it is kept: bit c % 8 of byte c / 8 of a row. Rows are so many bytes.
constexpr ptrdiff_t mask_bytes(ptrdiff_t cols) { return (cols + 63) / 64 * 8; }

}  // namespace pytorch_ext
