#pragma once

// What both directions of attention over short sequences share. Its keys are at most 256, so a block holds all of a
// head's in shared memory, and what is said of a key for one query is at hand for all of them.

#include <cstdlib>
#include <type_traits>

#include "attention.cuh"

namespace pytorch_ext::cuda {
namespace {

// Shorter where all would take minutes to compile: on the CPU, and in tests that look at machine code.
#ifdef PYTORCH_EXT_SHORT_LENGTH
constexpr int SHORT_LENGTH = PYTORCH_EXT_SHORT_LENGTH;
#else
constexpr int SHORT_LENGTH = 256;
#endif
// Keys are copied, and left out behind the last one, so many at once.
constexpr int PART = 32;

// COUNT rows of a tile from `row` on, of which COLS elements from chunk `first_chunk` on.
template <class Whole, int COUNT, int COLS = Whole::D>
struct PartOf {
    using T = typename Whole::T;
    static constexpr int D = COLS, ROWS = COUNT, CHUNKS = D / 8;
    Whole whole;
    int first_row, first_chunk = 0;
    __device__ T* chunk(int row, int c) const { return whole.chunk(first_row + row, first_chunk + c); }
};

template <int COUNT, class Whole>
__device__ inline PartOf<Whole, COUNT> part_of(const Whole& tile, int first_row) {
    return {tile, first_row};
}

// Starts the copy of the rows before `end`, in parts.
template <int THREADS, class Tile, class There>
__device__ inline void copy_parts(const Tile& tile, const typename Tile::T* from, int64_t stride, int end,
                                  const There& there) {
#pragma unroll
    for (int first = 0; first < Tile::ROWS; first += PART)
        if (first < end)
            copy_rows<THREADS>(part_of<PART>(tile, first), from + first * stride, stride,
                               [&](int row) { return there(first + row); });
}

// Calls `work` with how many keys a block has room for.
template <class Work>
void with_keys_of(const AttentionCall& call, const Work& work) {
    if (call.longest_k <= 64) return work(std::integral_constant<int, 64>());
    if constexpr (SHORT_LENGTH > 64) {
        if (call.longest_k <= 128) return work(std::integral_constant<int, 128>());
        work(std::integral_constant<int, 256>());
    }
}

// Whether the kernels for short sequences take a call: PYTORCH_EXT_CUDA_SHORT=0 leaves all calls to the others.
inline bool is_short(const AttentionCall& call) {
    const char* const asked = std::getenv("PYTORCH_EXT_CUDA_SHORT");
    if (asked != nullptr && *asked == '0') return false;
    return std::max(call.longest_q, call.longest_k) <= SHORT_LENGTH;
}

}  // namespace
}  // namespace pytorch_ext::cuda
