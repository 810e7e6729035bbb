#pragma once

// Dropout masks from Philox4x32-10, bit for bit those of kernels/reference/philox.py. For files in isa/ alone.

#include "dropout.h"
#include "vec.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {

// One 32-bit word in each 64-bit lane. Whatever stands in the upper half of a lane is never looked at: products are of
// the lower halves, and the rest of a round carries nothing from the upper half to the lower but a product's own.
using L = uint64_t __attribute__((vector_size(W * 4)));

PX_INLINE L multiply_words(L a, uint32_t b) {
#if defined(__AVX512F__)
    // (By maskz, because g++ 12 warns of its own header otherwise.)
    return (L)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (L)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (L)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & 0xffffffff) * b;
#endif
}

// The words of the 4 W columns from 4 * group on, which are W groups: two vectors of them side by side, because each
// product waits for the one before.
PX_INLINE void philox(U (&words)[4], uint32_t group, uint32_t middle1, uint32_t middle2, const Dropout& d) {
    L lane{}, even{}, odd{};
    for (int i = 0; i < W / 2; ++i) {
        // Lanes 0, 2, ... are the first half of the groups, so that the words come into order by unpacking.
        lane[i] = (uint64_t)(i / 2 + i % 2 * (W / 4));
        even[i] = (uint64_t)(i / 2 * 2 + i % 2 * (W / 2));
        odd[i] = even[i] + 1;
    }
    L c0[2] = {lane + group, lane + (group + W / 2)}, c1[2] = {L{} + middle1, L{} + middle1};
    L c2[2] = {L{} + middle2, L{} + middle2}, c3[2] = {L{} + d.offset, L{} + d.offset};
    uint32_t k0 = (uint32_t)d.seed, k1 = (uint32_t)(d.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            const L p0 = multiply_words(c0[v], 0xD2511F53), p1 = multiply_words(c2[v], 0xCD9E8D57);
            c0[v] = (p1 >> 32) ^ (c1[v] ^ k0);
            c1[v] = p1;
            c2[v] = (p0 >> 32) ^ (c3[v] ^ k1);
            c3[v] = p0;
        }
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
        const L left = (c0[v] & 0xffffffff) | (c1[v] << 32), right = (c2[v] & 0xffffffff) | (c3[v] << 32);
        words[2 * v] = bits<U>(__builtin_shuffle(left, right, even));
        words[2 * v + 1] = bits<U>(__builtin_shuffle(left, right, odd));
    }
}

// What dropout multiplies columns `first` to `first + n` with, 0 or the scale; first is a multiple of 4. The middle
// words of the counter say which row it is: of rows its number's lower and upper word, of attention query and head.
inline void dropout_factors(float* out, ptrdiff_t n, uint32_t first, uint32_t middle1, uint32_t middle2,
                            const Dropout& d) {
    const bool all = d.threshold >> 32;  // are dropped
    const U threshold = U{} + (uint32_t)d.threshold;
    const F scale = set(all ? 0.0f : d.scale);
    for (ptrdiff_t i = 0; i < n; i += 4 * W) {
        U words[4];
        philox(words, (first + (uint32_t)i) / 4, middle1, middle2, d);
        for (int k = 0; k < 4; ++k) {
            const ptrdiff_t at = i + k * W;
            const F factor = words[k] >= threshold ? scale : F{};
            if (at + W <= n)
                store(out + at, factor);
            else if (at < n)
                store(out + at, factor, n - at);
        }
    }
}

// Zero where the factor is zero, also of what is infinite or no number.
PX_INLINE F dropped(F x, F factor) { return factor > 0.0f ? x * factor : F{}; }

// --- Of the rows of a matrix, by masks of bits (see dropout.h) ---

// The lanes that are set, as the low W bits.
PX_INLINE uint64_t lane_bits(I set) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)set);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)set);
#elif defined(__SSE2__)
    return (uint32_t)_mm_movemask_ps((__m128)set);
#else
    uint64_t found = 0;
    for (int i = 0; i < W; ++i) found |= (uint64_t)(set[i] & 1) << i;
    return found;
#endif
}

// Of columns `first` to `first + n` of a row; first is a multiple of 64, and `mask` begins with its bit.
inline void draw_mask(unsigned char* mask, ptrdiff_t n, ptrdiff_t first, ptrdiff_t row, const Dropout& d) {
    const U threshold = U{} + (uint32_t)d.threshold;
    const uint64_t any = d.threshold >> 32 ? 0 : ~0ull;  // is kept
    for (ptrdiff_t i = 0; i < n; i += 4 * W) {
        U words[4];
        philox(words, ((uint32_t)first + (uint32_t)i) / 4, (uint32_t)row, (uint32_t)((uint64_t)row >> 32), d);
        uint64_t found = 0;
        for (int k = 0; k < 4; ++k) found |= lane_bits((I)(words[k] >= threshold)) << (k * W);
        found &= any;
        __builtin_memcpy(mask + i / 8, &found, W / 2);
    }
}

// x * scale in columns i to i + W where the mask keeps them, and else 0, also of what is infinite or no number.
PX_INLINE F dropped(F x, const unsigned char* mask, ptrdiff_t i, float scale) {
    I bit;
    for (int k = 0; k < W; ++k) bit[k] = 1 << k;
    int bits = 0;
    __builtin_memcpy(&bits, mask + i / 8, W < 8 ? 1 : W / 8);
    if constexpr (W < 8) bits >>= i % 8;
    return ((I{} + bits) & bit) != 0 ? x * scale : F{};
}

// Calls `work(first, n, mask)` for parts of a row of `cols` columns, with the mask that they get if there is dropout. It
// is written to `kept`, where that is not null.
template <class Work>
inline void in_blocks(ptrdiff_t row, ptrdiff_t cols, const Dropout* dropout, unsigned char* kept,
                      const Work& work) {
    constexpr ptrdiff_t BLOCK = 1024;
    unsigned char own[mask_bytes(BLOCK)];
    for (ptrdiff_t first = 0; first < cols; first += BLOCK) {
        const ptrdiff_t n = cols - first < BLOCK ? cols - first : BLOCK;
        unsigned char* const mask = kept ? kept + row * mask_bytes(cols) + first / 8 : own;
        if (dropout) draw_mask(mask, n, first, row, *dropout);
        work(first, n, mask);
    }
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
