#pragma once

// Normalisation of rows and its gradients, as math on rows in registers: what every op with a LayerNorm in it shares.

#include "rows.cuh"

namespace pytorch_ext::cuda {

struct Moments {
    float mean, rstd;
};

template <class L>
__device__ inline Moments moments(const float (&x)[L::E], const Place<L>& at, int cols, float eps) {
    float2 sums{0.0f, 0.0f};
#pragma unroll
    for (int e = 0; e < L::E; ++e) sums.x += x[e];
    const float rough = row_sum<L>(sums).x / cols;
    // A mean far from zero is rounded in its last bit; what is left over is small and sums exactly enough.
    sums = {0.0f, 0.0f};
#pragma unroll
    for (int e = 0; e < L::E; ++e) {
        const float centred = at.col(e / L::V) + e % L::V < cols ? x[e] - rough : 0.0f;
        sums.x += centred;
        sums.y += centred * centred;
    }
    sums = row_sum<L>(sums);
    const float left = sums.x / cols;
    // What is left is a rounding error, so nothing cancels here.
    const float variance = fmaxf(sums.y / cols - left * left, 0.0f);
    // fmaxf would turn a NaN into 0.
    return {rough + left, 1.0f / sqrtf((sums.y == sums.y ? variance : sums.y) + eps)};
}

// A chunk of the output.
template <class T>
__device__ inline void scale_and_shift(float (&x_hat)[VEC<T>], const Parameter& w, const Parameter& b,
                                       int col, int cols, bool aligned) {
    float parameter[VEC<T>];
    if (w.data) {
        load_parameter<T>(parameter, w, col, cols, aligned);
#pragma unroll
        for (int i = 0; i < VEC<T>; ++i) x_hat[i] *= parameter[i];
    }
    if (b.data) {
        load_parameter<T>(parameter, b, col, cols, aligned);
#pragma unroll
        for (int i = 0; i < VEC<T>; ++i) x_hat[i] += parameter[i];
    }
}

// The row's values in `x` become the normalised ones, scaled and shifted.
template <class L>
__device__ inline void normalize(float (&x)[L::E], const Moments& m, const Parameter& w, const Parameter& b,
                                 const Place<L>& at, int cols, bool aligned) {
#pragma unroll
    for (int c = 0; c < L::CHUNKS; ++c) {
        auto& chunk = chunk_of<L>(x, c);
#pragma unroll
        for (int i = 0; i < L::V; ++i) chunk[i] = (chunk[i] - m.mean) * m.rstd;
        scale_and_shift<typename L::T>(chunk, w, b, at.col(c), cols, aligned);
    }
}

// What a row of x and of dy gives: the gradients of the normalisation's parameters, and in place of dy and x the
// gradient of the row and the normalised row. What a chunk has none of is zero in dy, so nothing comes from it.
template <class L>
__device__ inline void normalize_backward(float (&dy)[L::E], float (&x)[L::E], float (&dw)[L::E],
                                          float (&db)[L::E], const Moments& m, const Parameter& w,
                                          const Place<L>& at, int cols, bool aligned) {
    float2 along{0.0f, 0.0f};  // 1, and the normalised row
#pragma unroll
    for (int c = 0; c < L::CHUNKS; ++c) {
        float scale[L::V];
        if (w.data) load_parameter<typename L::T>(scale, w, at.col(c), cols, aligned);
#pragma unroll
        for (int i = 0; i < L::V; ++i) {
            const int e = c * L::V + i;
            x[e] = (x[e] - m.mean) * m.rstd;
            dw[e] += dy[e] * x[e];
            db[e] += dy[e];
            if (w.data) dy[e] *= scale[i];
            along.x += dy[e];
            along.y += dy[e] * x[e];
        }
    }
    along = row_sum<L>(along);
    along = {along.x / cols, along.y / cols};
    // The normalised row has mean 0 and variance 1, so the gradient may move it neither along 1 nor along itself.
#pragma unroll
    for (int e = 0; e < L::E; ++e) dy[e] = (dy[e] - along.x - x[e] * along.y) * m.rstd;
}

// Shared memory of a kernel that sums up parameters' gradients, or of one that does not.
template <class L>
unsigned shared_for_sums(int64_t cols) {
    return L::WARP_PER_ROW ? cols * sizeof(float) : L::THREADS / WARP * sizeof(float2);
}

template <class L>
unsigned shared_for_row_sum() {
    return L::WARP_PER_ROW ? 0 : L::THREADS / WARP * sizeof(float2);
}

}  // namespace pytorch_ext::cuda
