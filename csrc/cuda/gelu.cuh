#pragma once

// The Gaussian error linear unit (Hendrycks & Gimpel 2016, arXiv 1606.08415), exact and by tanh, and its derivative.

#include <cmath>
#include <string>

#include "dtypes.cuh"

namespace pytorch_ext::cuda {

// (1 - tanh(|u|)) / 2 for u = sqrt(2 / pi) (x + 0.044715 x^3), which is the logistic function of -2 |u|: it keeps its
// digits in the tail, where 1 + tanh(u) has lost them, and overflows nowhere. The argument is computed in the order of
// the formula: factored otherwise, its constants' rounding doubles the error of the whole.
__device__ inline float logistic_tail(float x) {
    const float twice = 1.5957691216057308f * (x + 0.044715f * (x * x * x));
    const float e = expf(-fabsf(twice));
    return e / (1.0f + e);
}

template <bool TANH>
__device__ inline float gelu(float x) {
    if constexpr (TANH) {
        const float tail = logistic_tail(x);
        return x * (x < 0.0f ? tail : 1.0f - tail);
    } else {
        return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    }
}

template <bool TANH>
__device__ inline float gelu_derivative(float x) {
    if constexpr (TANH) {
        const float tail = logistic_tail(x);
        const float slope = 1.5957691216057308f * (1.0f + 0.134145f * (x * x));  // derivative of the argument
        // For large x the product is 0 * inf: the derivative has reached 0 or 1 long before.
        const float rest = fabsf(x) > 20.0f ? 0.0f : x * tail * (1.0f - tail) * slope;
        return (x < 0.0f ? tail : 1.0f - tail) + rest;
    } else {
        const float density = expf(-0.5f * x * x) * 0.3989422804014327f;
        return 0.5f * (1.0f + erff(x * 0.7071067811865476f)) + x * density;
    }
}

// Calls `work(element type, whether by tanh)`.
template <class Work>
void with_form(ScalarType dtype, const std::string& approximate, const Work& work) {
    visit(dtype, [&](auto t) {
        if (approximate == "tanh") return work(t, std::true_type());
        return work(t, std::false_type());
    });
}

}  // namespace pytorch_ext::cuda
