#pragma once

// Tiles of queries, keys and values in shared memory, and how tensor cores multiply them.
//
// mma deals a tile's columns out in pairs: of eight a lane has 2 (lane % 4) and the next. Here two such tiles are dealt
// as 16 rows of keys or queries of which a lane has four neighbours, 4 (lane % 4) and on. ldmatrix is told where each row
// lies, so it costs nothing, and what is drawn or loaded for four at once (dropout's words, lse) is one lane's own.

#include "ptx.cuh"
#include "reduce.cuh"

namespace pytorch_ext::cuda {

// ROWS rows of D elements. Chunks of 16 bytes are turned about within each row, so that no eight rows that ldmatrix
// asks for together lie in the same banks: eight neighbours, those that `of_sixteen` names, and, of D = 64 and 128,
// every fourth one.
template <class Element, int DIM, int COUNT>
struct Tile {
    using T = Element;
    static constexpr int D = DIM, ROWS = COUNT, CHUNKS = D / 8, ELEMENTS = ROWS * D;
    T* data;

    __device__ T* chunk(int row, int c) const {
        const int turn = (row ^ (row >> 2 & 2) ^ (row >> 4 & 1)) & 7;
        return data + row * D + (c ^ (D % 64 == 0 ? turn : turn >> 1)) * 8;
    }
};

// Starts the copy of rows `from` and on, by all THREADS of the block or of each warp; those that are not there are zero.
template <int THREADS, class Tile, class There>
__device__ inline void copy_rows(const Tile& tile, const typename Tile::T* from, int64_t stride,
                                 const There& there) {
    constexpr int CHUNKS = Tile::CHUNKS;
    static_assert(Tile::ROWS * CHUNKS % THREADS == 0);
#pragma unroll
    for (int i = 0; i < Tile::ROWS * CHUNKS / THREADS; ++i) {
        const int at = i * THREADS + threadIdx.x % THREADS, row = at / CHUNKS, c = at % CHUNKS;
        const bool is = there(row);
        copy_async(tile.chunk(row, c), from + (is ? row : 0) * stride + c * 8, is);
    }
}

// The row of 16 that this lane names of an 8 x 8 matrix, whose rows become the first or second of two tiles' eight.
__device__ inline int of_sixteen(int tile) {
    const int row = threadIdx.x % 8;
    return row / 2 * 4 + row % 2 + tile * 2;
}

// 16 x 16 of the left operand. `row` says which row of the tile is row i of the operand.
template <class Tile, class Row>
__device__ inline void load_left(uint32_t (&a)[4], const Tile& tile, int k, const Row& row) {
    const int matrix = threadIdx.x % WARP / 8;
    load_matrices(a, tile.chunk(row(threadIdx.x % 8 + matrix % 2 * 8), 2 * k + matrix / 2));
}

// sums (16 M x rows) += left (16 M x D) times the tile's rows. `left(a, m, k)` gives the operand's parts. Of 16 rows a
// lane has for its first row of `left` the four in sums[m][2 g][0], [1] and sums[m][2 g + 1][0], [1], for its second
// those in [2], [3].
template <int M, class Tile, class Left>
__device__ inline void multiply_by_rows(float (&sums)[M][Tile::ROWS / 8][4], const Tile& tile,
                                        const Left& left) {
    const int matrix = threadIdx.x % WARP / 8;
#pragma unroll
    for (int k = 0; k < Tile::D / 16; ++k) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) left(a[m], m, k);
#pragma unroll
        for (int g = 0; g < Tile::ROWS / 16; ++g) {
            uint32_t b[4];
            load_matrices(b, tile.chunk(16 * g + of_sixteen(matrix / 2), 2 * k + matrix % 2));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                add_product<typename Tile::T>(sums[m][2 * g], a[m], b[0], b[1]);
                add_product<typename Tile::T>(sums[m][2 * g + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// What `multiply_by_rows` has left, as the left operand of a product with rows.
template <class T, int M, int TILES>
__device__ inline void pack_weights(uint32_t (&weights)[M][TILES / 2][4], const float (&x)[M][TILES][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < TILES * 2; ++i)
            weights[m][i / 4][i % 4] = pack<T>(x[m][i / 2][i % 2 * 2], x[m][i / 2][i % 2 * 2 + 1]);
}

// Whether one of two elements is infinite or no number.
template <class T>
__device__ inline bool any_not_finite(uint32_t pair) {
    constexpr uint32_t EXPONENT = std::is_same_v<T, bfloat16> ? 0x7f80 : 0x7c00;
    return (pair & EXPONENT) == EXPONENT || (pair >> 16 & EXPONENT) == EXPONENT;
}

// acc (16 M x D) += weights (16 M x rows) times the tile's rows. With CHECKED a row that is not finite adds nothing to
// those that may not see it, `seen(m, half, row)`, though a product would multiply it by zero: where there is one, its
// 16 are multiplied one after another.
template <bool CHECKED, int M, class Tile, class Seen>
__device__ inline void multiply_rows(float (&acc)[M][Tile::D / 8][4],
                                     const uint32_t (&weights)[M][Tile::ROWS / 16][4], const Tile& tile,
                                     const Seen& seen) {
    using T = typename Tile::T;
    const int matrix = threadIdx.x % WARP / 8;
#pragma unroll
    for (int g = 0; g < Tile::ROWS / 16; ++g)
#pragma unroll
        for (int c = 0; c < Tile::D / 16; ++c) {
            uint32_t b[4];
            load_matrices_transposed(b, tile.chunk(16 * g + of_sixteen(matrix % 2), 2 * c + matrix / 2));
            if constexpr (CHECKED) {
                const bool bad = any_not_finite<T>(b[0]) || any_not_finite<T>(b[1]) ||
                                 any_not_finite<T>(b[2]) || any_not_finite<T>(b[3]);
                if (__any_sync(ALL_LANES, bad)) {
#pragma unroll 1
                    for (int only = 0; only < 16; ++only) {
                        const uint32_t half = only % 2 ? 0xffff0000 : 0xffff;
                        const uint32_t own = only % 8 / 2 == static_cast<int>(threadIdx.x) % 4 ? half : 0;
                        const uint32_t first = only < 8 ? own : 0, second = own ^ first;
                        const int row = 16 * g + only % 8 / 2 * 4 + only % 2 + only / 8 * 2;
#pragma unroll
                        for (int m = 0; m < M; ++m)
#pragma unroll
                            for (int i = 0; i < 2; ++i) {
                                float part[4] = {};
                                add_product<T>(part, weights[m][g], b[2 * i] & first, b[2 * i + 1] & second);
#pragma unroll
                                for (int e = 0; e < 4; ++e)
                                    if (seen(m, e / 2, row)) acc[m][2 * c + i][e] += part[e];
                            }
                    }
                    continue;
                }
            }
#pragma unroll
            for (int m = 0; m < M; ++m) {
                add_product<T>(acc[m][2 * c], weights[m][g], b[0], b[1]);
                add_product<T>(acc[m][2 * c + 1], weights[m][g], b[2], b[3]);
            }
        }
}

// The sum over the four lanes that share a row.
__device__ inline float sum_of_four(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

__device__ inline float largest_of_four(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// Four lanes hold a row each of a 4 x 4 matrix, and then a column each.
__device__ inline void transpose_in_fours(uint32_t (&words)[4]) {
#pragma unroll
    for (int step = 1; step <= 2; ++step) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const uint32_t got = __shfl_xor_sync(ALL_LANES, upper ? words[i] : words[i + step], step);
            (upper ? words[i] : words[i + step]) = got;
        }
    }
}

// A lane's first (half 0) or second row of 16 x D to memory, 16 bytes at a time, if it is there; all lanes come.
template <class T, int D>
__device__ inline void store_half(T* row, const float (&acc)[D / 8][4], int half, float factor, bool there) {
#pragma unroll
    for (int c = 0; c < D / 8; c += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            words[i] = pack<T>(acc[c + i][2 * half] * factor, acc[c + i][2 * half + 1] * factor);
        transpose_in_fours(words);
        if (there)
            reinterpret_cast<uint4*>(row)[c + threadIdx.x % 4] = {words[0], words[1], words[2], words[3]};
    }
}

}  // namespace pytorch_ext::cuda
