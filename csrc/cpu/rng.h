#pragma once

#include <cmath>
#include <limits>

#include "dropout.h"
#include "module.h"

namespace pytorch_ext {

// The threshold is rounded as Python's round() does, half to even.
inline Dropout make_dropout(double p) {
    return {0, 0, static_cast<uint64_t>(std::nearbyint(p * 4294967296.0)),
            p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f};
}

// rng: int64, (seed, offset); none where there is no dropout.
inline std::optional<Dropout> make_dropout(const OptionalTensor& rng, double p) {
    if (!rng || !rng->defined()) return std::nullopt;
    const Tensor words = rng->contiguous();
    const auto* word = words.const_data_ptr<int64_t>();
    Dropout dropout = make_dropout(p);
    dropout.seed = static_cast<uint64_t>(word[0]);
    dropout.offset = static_cast<uint32_t>(word[1]);
    return dropout;
}

// As ops/_raw.py draws it, from PyTorch's generator; none where there is no dropout.
inline OptionalTensor draw_rng(double p) {
    if (p <= 0.0) return std::nullopt;
    return at::randint(std::numeric_limits<int64_t>::max(), {2}, at::kLong);
}

}  // namespace pytorch_ext
