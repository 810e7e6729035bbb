#pragma once

// Dropout masks from Philox4x32-10 (Salmon et al. 2011), bit for bit those of kernels/reference/philox.py.

#include <cmath>
#include <cstdint>

#include "launch.cuh"

namespace pytorch_ext::cuda {

// What the host knows of a dropout. The seed stays on the device, so that a CUDA graph draws anew at each replay.
struct Dropout {
    const int64_t* rng;  // (seed, offset), or null: nothing is dropped
    uint32_t threshold;  // words below it drop their element
    float scale;  // of what is kept; 0 where everything is dropped, for which no threshold is high enough
};

// The threshold is rounded as Python's round() does, half to even.
inline Dropout make_dropout(const int64_t* rng, double p) {
    const double threshold = std::nearbyint(p * 4294967296.0);
    if (threshold >= 4294967296.0) return {rng, 0, 0.0f};
    return {rng, static_cast<uint32_t>(threshold), static_cast<float>(1.0 / (1.0 - p))};
}

// The generator of one mask. One counter gives four neighbouring columns their words, the x to w of `words`.
struct Philox {
    uint32_t key0, key1, offset;

    // Without a generator of any use where rng is null: nobody asks for its words.
    __device__ explicit Philox(const int64_t* rng) : key0(0), key1(0), offset(0) {
        if (rng == nullptr) return;
        key0 = static_cast<uint32_t>(rng[0]);
        key1 = static_cast<uint32_t>(static_cast<uint64_t>(rng[0]) >> 32);
        offset = static_cast<uint32_t>(rng[1]);
    }

    // Columns 4 group to 4 group + 3. The middle words say which row it is: of the rows of a matrix the number's lower
    // and upper word, of attention the query and the head (b * query_heads + h).
    __device__ uint4 words(uint32_t group, uint32_t middle1, uint32_t middle2) const {
        uint4 c{group, middle1, middle2, offset};
        uint32_t k0 = key0, k1 = key1;
#pragma unroll
        for (int round = 0; round < 10; ++round) {
            const uint64_t p0 = static_cast<uint64_t>(c.x) * 0xD2511F53,
                           p1 = static_cast<uint64_t>(c.z) * 0xCD9E8D57;
            c = {static_cast<uint32_t>(p1 >> 32) ^ c.y ^ k0, static_cast<uint32_t>(p1),
                 static_cast<uint32_t>(p0 >> 32) ^ c.w ^ k1, static_cast<uint32_t>(p0)};
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        return c;
    }
};

__device__ inline bool kept(uint32_t word, const Dropout& dropout) {
    return word >= dropout.threshold && dropout.scale > 0.0f;
}

// Zero where it is dropped, also of what is infinite or no number.
__device__ inline float dropped(float x, uint32_t word, const Dropout& dropout) {
    return kept(word, dropout) ? x * dropout.scale : 0.0f;
}

}  // namespace pytorch_ext::cuda
