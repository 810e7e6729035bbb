#pragma once

// What kernels have to know of a dropout. No ATen: files in isa/ include it.

#include <cstdint>

namespace pytorch_ext {

struct Dropout {
    uint64_t seed;
    uint32_t offset;     // its lower word, which is all that counters have room for
    uint64_t threshold;  // words below it drop their element: 0 to 2^32
    float scale;         // of what is kept
};

}  // namespace pytorch_ext
