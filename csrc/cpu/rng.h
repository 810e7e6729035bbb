#pragma once

#include <cmath>

#include "dropout.h"
#include "module.h"

namespace pytorch_ext {

// rng: int64, (seed, offset). The threshold is rounded as Python's round() does, half to even.
inline Dropout make_dropout(const Tensor& rng, double p) {
    const Tensor words = rng.contiguous();
    const auto* word = words.const_data_ptr<int64_t>();
    return {static_cast<uint64_t>(word[0]), static_cast<uint32_t>(word[1]),
            static_cast<uint64_t>(std::nearbyint(p * 4294967296.0)),
            p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f};
}

inline std::optional<Dropout> make_dropout(const OptionalTensor& rng, double p) {
    if (!rng || !rng->defined()) return std::nullopt;
    return make_dropout(*rng, p);
}

}  // namespace pytorch_ext
