#pragma once

// Elementary functions on vectors, to within a few units in the last place. For files in isa/ alone.

#include "vec.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {

// e^x between -88 and 88.3; 0 at -88.
PX_INLINE F exp_within(F x) {
    // x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const F shifted = x * 1.44269504f + 12582912.0f;
    const F n = shifted - 12582912.0f;
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    F p = r * 0.00139336555f + 0.00836318357f;
    p = p * r + 0.0416664649f;
    p = p * r + 0.16666577f;
    p = p * r + 0.500000001f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * bits<F>((bits<I>(shifted) + 127) << 23);
}

// e^x; 0 below -87.3 (where the result would be subnormal) and for -inf, inf above 88.3 (a little early), NaN for NaN.
PX_INLINE F exp(F x) {
    const F y = exp_within(min(max(x, set(-87.3f)), set(88.3f)));
    const F inside = x < -87.3f ? F{} : y;
    return x > 88.3f ? x * __builtin_huge_valf() : x == x ? inside : x;
}

// e^x for x <= 0, or NaN; 0 where the exponent would be below that of any number that is not subnormal.
PX_INLINE F exp_of_negative(F x) { return exp_within(max(set(-88.0f), x)); }  // in this order NaN stays

// 2^(x power) between -127 and 127; 0 at -127.
PX_INLINE F exp2_within(F x, float power) {
    // x power = n + r with |r| <= 1/2: adding 1.5 * 2^23 rounds to an integer and leaves n + 127 in the low bits.
    constexpr float ROUND = 12582912.0f + 127.0f;
    const F shifted = x * power + ROUND;
    const F r = x * power - (shifted - ROUND);
    // In pairs: one after another each would wait for the one before.
    const F s = r * r;
    const F high = (r * 0.00133988739f + 0.00961843692f) + s * 0.00015353362f;
    const F middle = r * 0.0555033237f + 0.240226477f;
    const F p = (high * s + middle) * s + (r * 0.693147182f + 1.0f);
    return p * bits<F>(bits<I>(shifted) << 23);
}

// 2^(x power) for x <= 0, or NaN; 0 where the exponent would be below that of any number that is not subnormal.
PX_INLINE F exp2_of_negative(F x, float power) {
    return exp2_within(max(set(-127.0f / power), x), power);  // in this order NaN stays
}

// x, but no further from 0 than the bound; NaN where x is NaN.
PX_INLINE F clamp(F x, float bound) {
    x = x > bound ? set(bound) : x;
    return x < -bound ? set(-bound) : x;
}

PX_INLINE F abs(F x) { return bits<F>(bits<U>(x) & 0x7fffffff); }

// x (c + P(x^2) / Q(x^2)), each of N coefficients, the lowest first: what odd functions are approximated by. c is near
// the quotient's mean, so that what is left for the quotient is small, and with it the rounding.
template <int N>
PX_INLINE F odd_ratio(F x, float c, const float (&p)[N], const float (&q)[N]) {
    const F s = x * x;
    F above = set(p[N - 1]), below = set(q[N - 1]);
    for (int i = N - 2; i >= 0; --i) {
        above = above * s + p[i];
        below = below * s + q[i];
    }
    return x * c + x * (above / below);
}

// The coefficients were fitted to the smallest largest error, and again after each was rounded to float.

// The normal distribution function, to within 1e-7: (1 + erf(x / sqrt(2))) / 2.
PX_INLINE F normal_cdf(F x) {
    constexpr float END = 5.54f;  // from here on 1
    constexpr float P[] = {0.273942232f,     0.00255267508f,   0.00109378679f,
                           -6.61631784e-05f, -2.92315781e-06f, -1.26291226e-07f};
    constexpr float Q[] = {1.0f,           0.252033859f,    0.0287603233f,
                           0.00189548905f, 7.42040138e-05f, 1.19035724e-06f};
    const F y = odd_ratio(clamp(x, END), 0.125f, P, Q);
    return x > END ? set(1.0f) : x < -END ? F{} : 0.5f + y;
}

PX_INLINE F gelu(F x) { return x * normal_cdf(x); }

// It is odd around (0, 1/2), so that one ratio stands for both its error function and its exponential.
PX_INLINE F gelu_grad(F x) {
    constexpr float END = 5.8f;  // from here on 1
    constexpr float P[] = {0.672884583f,    -0.072074905f,    0.00982518215f,   -0.000483945099f,
                           1.52251641e-05f, -7.98836709e-07f, -2.74814993e-09f, -5.93947225e-10f};
    constexpr float Q[] = {1.0f,
                           0.288142473f,
                           0.0395589843f,
                           0.0034077859f,
                           0.000203430711f,
                           8.72520559e-06f,
                           2.60863857e-07f,
                           5.48499379e-09f};
    const F y = odd_ratio(clamp(x, END), 0.125f, P, Q);
    return x > END ? set(1.0f) : x < -END ? F{} : 0.5f + y;
}

// x (1 + tanh(y)) / 2 = x / (1 + e^-2y) with y = sqrt(2 / pi) (x + 0.044715 x^3), and no cancellation.
constexpr float TWO_Y[] = {1.59576912f, 0.0713548163f};  // 2y = x (TWO_Y[0] + TWO_Y[1] x^2)

PX_INLINE F gelu_tanh(F x) { return x / (1.0f + exp(-x * (TWO_Y[0] + TWO_Y[1] * x * x))); }

PX_INLINE F gelu_tanh_grad(F x) {
    x = clamp(x, 12.0f);  // where the derivative has long been 0 or 1, and nothing overflows
    const F s = x * x;
    // By e^-2|y|, which is at most 1: the sigmoid of 2y is 1 / (1 + e), or e / (1 + e) where y is negative.
    const F e = exp(-abs(x) * (TWO_Y[0] + TWO_Y[1] * s));
    const F r = 1.0f / (1.0f + e);
    const F slope = x * (TWO_Y[0] + 3.0f * TWO_Y[1] * s) * (e * r * r);
    return (x < 0.0f ? e : set(1.0f)) * r + slope;
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
