#pragma once

// Attention backward over short sequences, all gradients in one kernel. A block owns a head of keys, each warp 32 of them,
// and goes over the queries: weights and draws of dropout are made once, where the kernels for long sequences make them
// twice. With all keys of a query at hand, what the gradients of its scores have in common is summed up as what it is, and
// the output is not read. The gradients of scores come to shared memory, where the warps share the gradient of the queries
// out among them: each sums up a part of it over all keys, in their order, without atomics.

#include "attention_backward.cuh"
#include "attention_short.cuh"

namespace pytorch_ext::cuda {
namespace {

// Occupancy: a thread for each key and 255 registers for each, so that eight warps run on a processor at once, as one, two
// or four blocks. Values are needed but as each warp's left operand, in registers, and the gradients of scores come to
// where they were.
template <class Element, int DIM, int MOST_KEYS>
struct ShortBackwardShape {
    using T = Element;
    static constexpr int D = DIM, KEYS = MOST_KEYS, THREADS = KEYS, M = 2;
    static constexpr int QUERIES = KEYS > 128 ? 64 : 32;  // of a tile, of which 16 at a time are in registers
    static constexpr int GROUPS = QUERIES / 16, COLS = 32;  // a tile's gradient, as warps share it out
    static_assert(QUERIES <= D);
    static constexpr int SUMS = 2 * 16;  // of a warp: two for each of 16 queries
    // Keys, values, two stages of queries, their output's gradients and lse; two stages of each warp's sums.
    static constexpr unsigned SHARED =
        (2 * KEYS + 2 * 2 * QUERIES) * D * sizeof(T) + 2 * (QUERIES + THREADS / WARP * SUMS) * sizeof(float);
    static_assert(SHARED <= 99 * 1024, "what sm_86 and sm_89 can launch");
};

// 16 x 16 of the left operand, of a tile that lies transposed. Its columns are dealt as `multiply_rows` deals rows.
template <class Tile>
__device__ inline void load_left_transposed(uint32_t (&a)[4], const Tile& tile, int row, int chunk) {
    const int matrix = threadIdx.x % WARP / 8;
    load_matrices_transposed(a, tile.chunk(row + of_sixteen(matrix / 2), chunk + matrix % 2));
}

// Lanes of one row of a fragment have eight numbers each, and then the sum of number lane / 4 over such lanes.
__device__ inline float sum_of_own(float (&x)[8]) {
#pragma unroll
    for (int step = 4; step > 0; step /= 2) {
        const bool upper = threadIdx.x / 4 & step;
#pragma unroll
        for (int i = 0; i < step; ++i) {
            const float got = __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i + step], 4 * step);
            x[i] = (upper ? x[i + step] : x[i]) + got;
        }
    }
    return x[0];
}

// Plan: at most 255 registers, for 256 threads at once.
template <class S>
__global__ void __launch_bounds__(S::THREADS)
    attention_short_bwd_kernel(Problem p, Heads<const typename S::T> q, Heads<const typename S::T> k,
                               Heads<const typename S::T> v, Heads<const typename S::T> dout,
                               Heads<const float> lse, Heads<typename S::T> dq, Heads<typename S::T> dk,
                               Heads<typename S::T> dv, float scale) {
    using T = typename S::T;
    constexpr int D = S::D, M = S::M, KEYS = S::KEYS, QUERIES = S::QUERIES;
    Work at(p, p.heads / p.group, false);
    if (at.behind) {
        Work of_query = at;
        for (int i = 0; i < p.group; ++i) {
            of_query.head = at.head * p.group + i;
            zero_rows<S::THREADS, D>(dq, p, of_query, at.first_q, at.q_len);
        }
        zero_rows<S::THREADS, D>(dk, p, at, at.first_k, at.k_len);
        return zero_rows<S::THREADS, D>(dv, p, at, at.first_k, at.k_len);
    }
    // Nothing outside of the block's room is touched, though a sequence be longer than the longest.
    at.k_len = min(at.k_len, KEYS);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    T* const room = shared_memory<T>();
    const Tile<T, D, KEYS> k_tile{room}, v_tile{room + KEYS * D};
    const Tile<T, QUERIES, KEYS> dx_tile{v_tile.data};  // the gradients of scores, transposed
    const auto q_tile = [&](int i) {
        return Tile<T, D, QUERIES>{room + (2 * KEYS + i % 2 * 2 * QUERIES) * D};
    };
    const auto dout_tile = [&](int i) { return Tile<T, D, QUERIES>{q_tile(i).data + QUERIES * D}; };
    float* const numbers = reinterpret_cast<float*>(room + (2 * KEYS + 4 * QUERIES) * D);
    const auto lses = [&](int i) { return numbers + i % 2 * QUERIES; };
    const auto sums_of = [&](int i, int warp) {
        return numbers + 2 * QUERIES + (i % 2 * (S::THREADS / WARP) + warp) * S::SUMS;
    };

    const Keys keys(p, at, at.head * p.group);
    const auto visible = [&](int key) { return keys.visible(key); };
    copy_parts<S::THREADS>(k_tile, k.at(at.sequence, at.head, at.first_k), k.of_row, keys.end, visible);
    copy_parts<S::THREADS>(v_tile, v.at(at.sequence, at.head, at.first_k), v.of_row, keys.end, visible);
    end_copy_group();
    const int tiles = (at.q_len + QUERIES - 1) / QUERIES, all = tiles * p.group;
    const auto copy_tile = [&](int i) {
        const int head = at.head * p.group + i / tiles, from = i % tiles * QUERIES;
        const auto is_query = [&](int row) { return from + row < at.q_len; };
        copy_rows<S::THREADS>(q_tile(i), q.at(at.sequence, head, at.first_q + from), q.of_row, is_query);
        copy_rows<S::THREADS>(dout_tile(i), dout.at(at.sequence, head, at.first_q + from), dout.of_row,
                              is_query);
        if (threadIdx.x < QUERIES) {
            const bool there = is_query(threadIdx.x);
            const int64_t row = at.first_q + from + (there ? threadIdx.x : 0);
            copy_word_async(lses(i) + threadIdx.x, lse.at(at.sequence, head, row), there);
        }
        end_copy_group();
    };
    if (all > 0) copy_tile(0);

    // A lane's keys are four neighbours, those of a draw of dropout.
    const auto own_row = [&](int m, int half, int of_eight) {
        return warp * WARP + of_eight * 4 + 2 * m + half;
    };
    const auto key = [&](int m, int half) { return own_row(m, half, lane / 4); };
    bool own_visible[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) own_visible[m][half] = keys.visible(key(m, half));
    wait_for_copies<0>();
    __syncthreads();
    uint32_t v_parts[M][D / 16][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int d = 0; d < D / 16; ++d)
            load_left(v_parts[m][d], v_tile, d, [&](int row) { return own_row(m, row / 8, row % 8); });
    const auto k_part = [&](uint32_t (&a)[4], int m, int d) {
        load_left(a, k_tile, d, [&](int row) { return own_row(m, row / 8, row % 8); });
    };
    const auto v_part = [&](uint32_t (&a)[4], int m, int d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = v_parts[m][d][i];
    };

    const Philox philox(p.dropout.rng);
    float dk_acc[M][D / 8][4] = {}, dv_acc[M][D / 8][4] = {};
    for (int tile = 0; tile < all; ++tile) {
        const int head = at.head * p.group + tile / tiles, from = tile % tiles * QUERIES;
        const uint32_t head_of_all = at.sequence * p.heads + head;
        wait_for_copies<0>();
        __syncthreads();  // the tile is there, and nobody looks at the one before any more
        if (tile + 1 < all) copy_tile(tile + 1);
        const int end = p.causal ? min(keys.end, from + QUERIES) : keys.end;
        const bool takes_part = warp * WARP < end;
#pragma unroll 1
        for (int first = 0; first < QUERIES && from + first < at.q_len; first += 16) {
            const auto queries = part_of<16>(q_tile(tile), first);
            const auto gradients = part_of<16>(dout_tile(tile), first);
            const auto seen = [&](int m, int half, int row) { return key(m, half) <= from + first + row; };
            const bool looks = p.causal && from + first < warp * WARP + WARP - 1;
            const auto hidden = [&](int m, int half, int row) {
                return !own_visible[m][half] || (looks && !seen(m, half, row));
            };
            float x[M][2][4] = {}, dx[M][2][4] = {};
            uint32_t keeps = 0;  // of each element whether dropout keeps it
            if (takes_part) {
                multiply_by_rows<M>(x, queries, k_part);
                multiply_by_rows<M>(dx, gradients, v_part);
                // Of the weights of the lane's four queries, and of weights times gradients.
                float sums[8] = {};
#pragma unroll
                for (int of_four = 0; of_four < 4; ++of_four) {
                    const int row = lane % 4 * 4 + of_four;
                    const float row_lse = lses(tile)[first + row];
                    uint32_t words[4] = {};
                    if (p.dropout.rng) {
                        const uint4 drawn = philox.words(key(0, 0) / 4, from + first + row, head_of_all);
                        words[0] = drawn.x, words[1] = drawn.y, words[2] = drawn.z, words[3] = drawn.w;
                    }
#pragma unroll
                    for (int of_keys = 0; of_keys < 4; ++of_keys) {
                        const int m = of_keys / 2, half = of_keys % 2, n = of_four / 2;
                        float &one = x[m][n][2 * half + of_four % 2],
                              &gradient = dx[m][n][2 * half + of_four % 2];
                        one = weight_of(one, p.scale, row_lse);
                        const bool keep = !p.dropout.rng || kept(words[of_keys], p.dropout);
                        keeps |= keep << (of_four * 4 + of_keys);
                        gradient = keep ? gradient * p.dropout.scale : 0.0f;
                        if (hidden(m, half, row)) one = gradient = 0.0f;
                        sums[of_four] += one;
                        sums[4 + of_four] += one * gradient;
                    }
                }
                const float own = sum_of_own(sums);
                sums_of(first / 16, warp)[lane / 16 * 16 + lane % 4 * 4 + lane / 4 % 4] = own;
            }
            __syncthreads();  // the sums are there
            if (!takes_part) continue;
            float sums[2][4] = {};
            for (int other = 0; other * WARP < end; ++other)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float4 more =
                        reinterpret_cast<const float4*>(sums_of(first / 16, other))[4 * i + lane % 4];
                    sums[i][0] += more.x, sums[i][1] += more.y, sums[i][2] += more.z, sums[i][3] += more.w;
                }
            float kept_x[M][2][4];
#pragma unroll
            for (int of_four = 0; of_four < 4; ++of_four) {
                // The weights of scores of 1e6 add up to one but for what lse has lost.
                const float unit = sums[0][of_four] == 0.0f ? 0.0f : 1.0f / sums[0][of_four];
                const float common = sums[1][of_four] * unit;
#pragma unroll
                for (int of_keys = 0; of_keys < 4; ++of_keys) {
                    const int m = of_keys / 2, n = of_four / 2, e = of_keys % 2 * 2 + of_four % 2;
                    const float one = x[m][n][e] * unit;
                    kept_x[m][n][e] = keeps >> (of_four * 4 + of_keys) & 1 ? one : 0.0f;
                    dx[m][n][e] = one * (dx[m][n][e] - common);
                    // Zero times what is no number is none.
                    if (hidden(m, of_keys % 2, lane % 4 * 4 + of_four)) kept_x[m][n][e] = dx[m][n][e] = 0.0f;
                }
            }
            uint32_t weights[M][1][4];
            pack_weights<T>(weights, kept_x);
            if (looks)
                multiply_rows<true>(dv_acc, weights, gradients, seen);
            else
                multiply_rows<false>(dv_acc, weights, gradients, 0);
            pack_weights<T>(weights, dx);
            if (looks)
                multiply_rows<true>(dk_acc, weights, queries, seen);
            else
                multiply_rows<false>(dk_acc, weights, queries, 0);
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    T* const chunk = dx_tile.chunk(key(m, half), first / 8 + lane % 4 / 2);
                    reinterpret_cast<uint2*>(chunk)[lane % 2] = {weights[m][0][half],
                                                                 weights[m][0][2 + half]};
                }
        }
        __syncthreads();  // the gradients of scores are there
#pragma unroll 1
        for (int share = warp; share < S::GROUPS * (D / S::COLS); share += S::THREADS / WARP) {
            const int of_tile = share % S::GROUPS * 16, col = share / S::GROUPS * S::COLS;
            if (from + of_tile >= at.q_len) continue;
            const auto query = [&](int half) { return from + of_tile + half * 8 + lane / 4; };
            float dq_acc[1][S::COLS / 8][4] = {};
#pragma unroll 2
            for (int first = 0; first < end; first += 16) {
                uint32_t weights[1][1][4];
                load_left_transposed(weights[0][0], dx_tile, first, of_tile / 8);
                const PartOf<Tile<T, D, KEYS>, 16, S::COLS> some{k_tile, first, col / 8};
                if (p.causal && first + 15 > from + of_tile)
                    multiply_rows<true>(dq_acc, weights, some,
                                        [&](int, int half, int row) { return first + row <= query(half); });
                else
                    multiply_rows<false>(dq_acc, weights, some, 0);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store_half<T, S::COLS>(dq.at(at.sequence, head, at.first_q + query(half)) + col, dq_acc[0],
                                       half, scale, query(half) < at.q_len);
        }
    }

#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool stored = key(m, half) < at.k_len;
            const int64_t row = at.first_k + key(m, half);
            if (!own_visible[m][half])  // what was made of zeros
#pragma unroll
                for (int n = 0; n < D / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        dk_acc[m][n][2 * half + i] = dv_acc[m][n][2 * half + i] = 0.0f;
            store_half<T, D>(dk.at(at.sequence, at.head, row), dk_acc[m], half, scale, stored);
            store_half<T, D>(dv.at(at.sequence, at.head, row), dv_acc[m], half, p.dropout.scale, stored);
        }
}

// Grid: key heads × sequences, and one more sequence for tokens behind the last one.
template <class S>
void launch_short_backward(const AttentionCall& call, const OwnedHeads& dout, const Heads<float>& lse,
                           const Tensor& dq, const Tensor& dk, const Tensor& dv) {
    using T = typename S::T;
    Problem p = call.problem;
    p.blocks = 1;
    launch(attention_short_bwd_kernel<S>,
           Launch{grid_of(p, p.heads / p.group), S::THREADS, S::SHARED, current_stream(dq)}, p,
           Heads<const T>(call.q), Heads<const T>(call.k), Heads<const T>(call.v), Heads<const T>(dout),
           Heads<const float>{lse.data, lse.of_batch, lse.of_head, 1}, Heads<T>(OwnedHeads(dq)),
           Heads<T>(OwnedHeads(dk)), Heads<T>(OwnedHeads(dv)), static_cast<float>(call.scale));
}

}  // namespace
}  // namespace pytorch_ext::cuda
