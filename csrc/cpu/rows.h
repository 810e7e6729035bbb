#pragma once

// Layer normalisation of single rows and its gradient, for every op that has one inside. For files in isa/ alone.
//
// A row is read from memory once: what is read again by the next pass comes from the cache.

#include "dtypes.h"
#include "vec.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {

#define PX_LAMBDA __attribute__((always_inline))

// How many lanes of a vector count: all of them, or as a ptrdiff_t the first few.
struct All {};

template <class T>
PX_INLINE F load(const T* p, All) {
    return load(p);
}

template <class T>
PX_INLINE void store(T* p, F x, All) {
    store(p, x);
}

PX_INLINE F only(F x, All) { return x; }

PX_INLINE F only(F x, ptrdiff_t n) {
    I lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane < (int)n ? x : F{};
}

// Calls `body(i, lanes, k)` for the vectors of n elements; k counts from 0 to UNROLL - 1, for sums side by side.
template <int UNROLL = 4, class Body>
PX_INLINE void along(ptrdiff_t n, const Body& body) {
    ptrdiff_t i = 0;
    for (; i + UNROLL * W <= n; i += UNROLL * W) {
#pragma GCC unroll 4
        for (int k = 0; k < UNROLL; ++k) body(i + k * W, All(), k);
    }
    if constexpr (UNROLL > 1)
        for (; i + W <= n; i += W) body(i, All(), 0);
    if (i < n) body(i, n - i, 0);
}

struct Sums {
    F of[4] = {};

    PX_INLINE float total() const { return sum((of[0] + of[1]) + (of[2] + of[3])); }
};

struct Moments {
    float mean, rstd;
};

template <class T>
PX_INLINE float mean_of(const T* x, ptrdiff_t n) {
    Sums sums;
    along(n, [&](ptrdiff_t i, auto lanes, int k) PX_LAMBDA { sums.of[k] += load(x + i, lanes); });
    return sums.total() / (float)n;
}

// `about` is the mean, but for rounding: what is left of it is small and sums exactly enough.
template <class T>
PX_INLINE Moments moments(const T* x, ptrdiff_t n, float about, float eps) {
    Sums first, second;
    along(n, [&](ptrdiff_t i, auto lanes, int k) PX_LAMBDA {
        const F d = only(load(x + i, lanes) - about, lanes);
        first.of[k] += d;
        second.of[k] += d * d;
    });
    const float rest = first.total() / (float)n;
    const float variance = second.total() / (float)n - rest * rest;
    return {about + rest, 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps)};
}

PX_INLINE F x_hat(F x, Moments m) { return (x - m.mean) * m.rstd; }

// weight may be null. The product is rounded before anything is added: fused with the subtraction of its own mean it
// would leave its rounding where there should be nothing, as in a row of one column.
template <class Lanes>
PX_INLINE F scaled(F x, const float* weight, ptrdiff_t i, Lanes lanes) {
    return weight ? rounded(x * load(weight + i, lanes)) : x;
}

// weight and bias may be null.
template <class Lanes>
PX_INLINE F scaled_and_shifted(F x, const float* weight, const float* bias, ptrdiff_t i, Lanes lanes) {
    if (weight) x = x * load(weight + i, lanes);
    if (bias) x = x + load(bias + i, lanes);
    return x;
}

// The gradient of ROWS neighbouring rows, handed to `use(i, lanes, dx)` with a dx for each row. Adds to dweight and
// dbias, which are read and written once for all the rows together. weight may be null.
template <int ROWS, class Y, class X, class Use>
PX_INLINE void gradients(const Y* dy, const X* x, ptrdiff_t cols, const float* mean, const float* rstd,
                         const float* weight, float* dweight, float* dbias, const Use& use) {
    // x_hat has mean 0 and variance 1, so the gradient may move it neither along 1 nor along itself.
    float along_one[ROWS], along_x_hat[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        const Moments m{mean[r], rstd[r]};
        Sums one, other;
        along(cols, [&](ptrdiff_t i, auto lanes, int k) PX_LAMBDA {
            const F dx_hat = scaled(load(dy + r * cols + i, lanes), weight, i, lanes);
            one.of[k] += dx_hat;
            other.of[k] += dx_hat * x_hat(load(x + r * cols + i, lanes), m);
        });
        along_one[r] = one.total() / (float)cols;
        along_x_hat[r] = other.total() / (float)cols;
    }
    along<1>(cols, [&](ptrdiff_t i, auto lanes, int) PX_LAMBDA {
        F dw{}, db{}, dx[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const F y = load(dy + r * cols + i, lanes),
                    h = x_hat(load(x + r * cols + i, lanes), {mean[r], rstd[r]});
            dw += y * h;
            db += y;
            dx[r] = (scaled(y, weight, i, lanes) - along_one[r] - h * along_x_hat[r]) * rstd[r];
        }
        store(dweight + i, load(dweight + i, lanes) + dw, lanes);
        store(dbias + i, load(dbias + i, lanes) + db, lanes);
        use(i, lanes, dx);
    });
}

template <int N>
struct Rows {
    static constexpr int COUNT = N;
};

// Calls `work(row, Rows<4>())` for every four rows, and `work(row, Rows<1>())` for each that is left.
template <class Work>
inline void by_fours(ptrdiff_t first, ptrdiff_t rows, const Work& work) {
    ptrdiff_t row = first;
    for (; row + 4 <= first + rows; row += 4) work(row, Rows<4>());
    for (; row < first + rows; ++row) work(row, Rows<1>());
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
