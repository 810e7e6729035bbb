#pragma once

// Vectors of floats, as wide as the instruction set that this is compiled for, by the compiler's own vector types:
// `+ - * / < ? :` work on them lane by lane, and a * b + c becomes one fused instruction where there is one.
// For files in isa/ alone.

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes of a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using F = float __attribute__((vector_size(W * 4)));
using I = int32_t __attribute__((vector_size(W * 4)));
using U = uint32_t __attribute__((vector_size(W * 4)));
using H = uint16_t __attribute__((vector_size(W * 2)));

#define PX_INLINE inline __attribute__((always_inline))
#define PX_NOINLINE inline __attribute__((noinline))

// The same bits as another type of the same size.
template <class To, class From>
PX_INLINE To bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    return __builtin_bit_cast(To, x);
}

// (x - 0 is x, also of -0, and costs nothing.)
PX_INLINE F set(float x) { return x - F{}; }

// x, of which the compiler may not make a part of a fused multiply-add.
PX_INLINE F rounded(F x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#else
    asm("" : "+w"(x));
#endif
    return x;
}

// --- Load and store: memory in any of the dtypes, registers in float ---

PX_INLINE F load(const float* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

PX_INLINE F load(const bfloat16* p) {
    // (Where g++ widens by __builtin_convertvector it takes five instructions for one.)
#if defined(__AVX512F__)
    const U u = (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    const U u = (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    H x;
    __builtin_memcpy(&x, p, sizeof x);
    const U u = __builtin_convertvector(x, U);
#endif
    return bits<F>(u << 16);
}

PX_INLINE F load(const float16* p) {
#if defined(__AVX512F__)
    return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    F x;
    for (int i = 0; i < W; ++i) x[i] = (float)bits<_Float16>(p[i].bits);
    return x;
#endif
}

PX_INLINE void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }

PX_INLINE void store(bfloat16* p, F x) {
    const U u = bits<U>(x);
    // To the nearest, ties to even; the addition would turn some NaN into infinities.
    const U nearest = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const U upper = x == x ? nearest : U{} + 0x7fc0;
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i packed = _mm256_packus_epi32((__m256i)upper, (__m256i)upper);  // within each half
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    const H h = __builtin_convertvector(upper, H);
    __builtin_memcpy(p, &h, sizeof h);
#endif
}

PX_INLINE void store(float16* p, F x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < W; ++i) p[i].bits = bits<unsigned short>((_Float16)x[i]);
#endif
}

// The first n lanes, n < W, and zeros behind them: the end of a row, where no more may be touched.
template <class T>
PX_INLINE F load(const T* p, ptrdiff_t n) {
    T lanes[W] = {};
    for (ptrdiff_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
}

template <class T>
PX_INLINE void store(T* p, F x, ptrdiff_t n) {
    T lanes[W];
    store(lanes, x);
    for (ptrdiff_t i = 0; i < n; ++i) p[i] = lanes[i];
}

PX_INLINE float load_one(const float* p) { return *p; }
PX_INLINE float load_one(const bfloat16* p) { return bits<float>((uint32_t)p->bits << 16); }
PX_INLINE float load_one(const float16* p) {
#if defined(__F16C__)
    return _cvtsh_ss(p->bits);
#else
    return (float)bits<_Float16>(p->bits);
#endif
}

// --- Across lanes: always in the same order, so that a sum repeats bit for bit ---

// Each lane beside the one that is STEP behind it.
template <int STEP>
PX_INLINE F ahead(F x) {
    I from;
    for (int i = 0; i < W; ++i) from[i] = (i + STEP) % W;
    return __builtin_shuffle(x, from);
}

template <int STEP = W / 2>
PX_INLINE float sum(F x) {
    x = x + ahead<STEP>(x);
    if constexpr (STEP > 1)
        return sum<STEP / 2>(x);
    else
        return x[0];
}

// The second one where either is NaN. (Of a constant and a variable g++ makes a comparison and a blend.)
#if defined(__AVX512F__)
PX_INLINE F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
PX_INLINE F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
PX_INLINE F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
PX_INLINE F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
#else
PX_INLINE F max(F a, F b) { return a > b ? a : b; }
PX_INLINE F min(F a, F b) { return a < b ? a : b; }
#endif

template <int STEP = W / 2>
PX_INLINE float max(F x) {
    x = max(x, ahead<STEP>(x));
    if constexpr (STEP > 1)
        return max<STEP / 2>(x);
    else
        return x[0];
}

// --- Across vectors ---

// W vectors as the rows of a matrix, transposed: the quarters of STEP x STEP that lie across the diagonal from each other
// change places, then those within the quarters.
template <int STEP = W / 2>
PX_INLINE void transpose(F* rows) {
    I upper, lower;
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        upper[i] = i & STEP ? W + i - STEP : i;
        lower[i] = i & STEP ? W + i : i + STEP;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
        if (!(i & STEP)) {
            const F a = rows[i], b = rows[i + STEP];
            rows[i] = __builtin_shuffle(a, b, upper);
            rows[i + STEP] = __builtin_shuffle(a, b, lower);
        }
    if constexpr (STEP > 1) transpose<STEP / 2>(rows);
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
