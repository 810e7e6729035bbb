#pragma once

// Attention forward in FlashAttention-2's manner (Dao 2023, arXiv 2307.08691): a block owns queries of one head, which
// stay in registers, and goes over the keys tile by tile with a softmax that is corrected as larger scores come (Milakov &
// Gimelshein 2018, arXiv 1805.02867). The next tile is on its way while one is worked on.

#include "attention.cuh"

namespace pytorch_ext::cuda {
namespace {

template <class Element, int DIM, int M_TILES>
struct ForwardShape {
    using T = Element;
    // A warp owns M times 16 queries: with two, each key and value that it reads from shared memory is used twice, and
    // reading them takes less time than multiplying them.
    static constexpr int D = DIM, M = M_TILES, THREADS = 128, ROWS = THREADS / WARP * 16 * M, KEYS = 64;
    static constexpr unsigned SHARED = 2 * 2 * KEYS * D * sizeof(T);  // two stages of keys and values
    // Of a head of 64 the exponential unit has as much to do as the tensor cores. A quarter of the powers takes as long on
    // the units that multiply and add, beside what those do anyway, as three quarters there.
    static constexpr int POLYNOMIAL_QUARTERS = D <= 64 ? 1 : 0;
    static_assert(ROWS <= 2 * KEYS, "the queries come through the second stage");
    static_assert(SHARED <= ROOM_FOR_TWO);
};

// Scores become weights, and `factor` of what was summed up before is left.
template <class S>
__device__ inline void take_softmax(float (&x)[S::KEYS / 8][4], int half, float& largest, float& sum,
                                    float& factor, float unit) {
    float most = largest;
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; ++n) most = fmaxf(most, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
    most = largest_of_four(most);
    // A row that has met nothing yet is shifted by nothing: infinity minus infinity is no number. Products are rounded
    // before they are shifted, here and in backward: of large scores the weights then are the same in both.
    const float shift = most == -INFINITY ? 0.0f : __fmul_rn(most, unit);
    factor = exp2_approximately((__fmul_rn(largest, unit) - shift) * LOG2_E);
    largest = most;
    sum *= factor;
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float& one = x[n][2 * half + i];
            one = (__fmul_rn(one, unit) - shift) * LOG2_E;
            const bool by_polynomial = (2 * n + i) % 4 < S::POLYNOMIAL_QUARTERS;
            one = by_polynomial ? exp2_polynomial(one) : exp2_approximately(one);
            sum += one;
        }
}

// Plan: at most 255 registers, for two blocks of 128 threads at once.
template <class S>
__global__ void __launch_bounds__(S::THREADS)
    attention_fwd_kernel(Problem p, Heads<const typename S::T> q, Heads<const typename S::T> k,
                         Heads<const typename S::T> v, Heads<typename S::T> out, Heads<float> lse) {
    using T = typename S::T;
    constexpr int D = S::D, M = S::M, KEYS = S::KEYS;
    const Work at(p, p.heads, p.causal);
    const int first = at.block * S::ROWS, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (at.behind) return nothing_behind<S::THREADS, D>(out, lse, p, at);
    if (first >= at.q_len) return;
    T* const room = shared_memory<T>();
    const Tile<T, D, S::ROWS> q_tile{room + 2 * KEYS * D};
    copy_rows<S::THREADS>(q_tile, q.at(at.sequence, at.head, at.first_q + first), q.of_row,
                          [&](int row) { return first + row < at.q_len; });
    end_copy_group();
    const KeyTiles<T, D, KEYS, S::THREADS> keys(room, k, v, p, at);
    const int end = p.causal ? min(keys.seen.end, first + S::ROWS) : keys.seen.end;
    const int plain =
        p.causal ? min(keys.seen.plain, first + 1) : keys.seen.plain;  // to all queries of the block
    keys.copy(0);

    wait_for_copies<1>();
    __syncthreads();
    uint32_t q_parts[M][D / 16][4];
    const uint32_t sign = p.scale < 0.0f ? 0x80008000 : 0;  // the largest score is to be the largest product
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            load_left(q_parts[m][d], q_tile, d, [&](int row) { return (warp * M + m) * 16 + row; });
#pragma unroll
            for (int i = 0; i < 4; ++i) q_parts[m][d][i] ^= sign;
        }
    const auto q_part = [&](uint32_t (&a)[4], int m, int d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = q_parts[m][d][i];
    };

    const float unit = fabsf(p.scale);
    const Philox philox(p.dropout.rng);
    const uint32_t head_of_all = at.sequence * p.heads + at.head;
    const auto query = [&](int m, int half) { return first + (warp * M + m) * 16 + half * 8 + lane / 4; };
    float acc[M][D / 8][4] = {}, largest[M][2], sum[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; ++m) largest[m][0] = largest[m][1] = -INFINITY;
    for (int tile = 0; tile * KEYS < end; ++tile) {
        wait_for_copies<0>();
        __syncthreads();  // the tile is there, and nobody looks at the one before any more
        if ((tile + 1) * KEYS < end) keys.copy(tile + 1);
        float x[M][KEYS / 8][4] = {};
        multiply_by_rows<M>(x, keys.k(tile), q_part);
        const bool looks = tile * KEYS + KEYS > plain;
        if (looks) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int key = keys.key(tile, n, i);
                    const bool visible = keys.seen.visible(key);
#pragma unroll
                    for (int m = 0; m < M; ++m)
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                            if (!visible || (p.causal && key > query(m, half)))
                                x[m][n][2 * half + i] = -INFINITY;
                }
        }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float factor;
                take_softmax<S>(x[m], half, largest[m][half], sum[m][half], factor, unit);
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    acc[m][n][2 * half] *= factor;
                    acc[m][n][2 * half + 1] *= factor;
                }
                if (p.dropout.rng == nullptr) continue;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n += 2) {
                    const uint4 words = philox.words(keys.key(tile, n, 0) / 4, query(m, half), head_of_all);
                    if (!kept(words.x, p.dropout)) x[m][n][2 * half] = 0.0f;
                    if (!kept(words.y, p.dropout)) x[m][n][2 * half + 1] = 0.0f;
                    if (!kept(words.z, p.dropout)) x[m][n + 1][2 * half] = 0.0f;
                    if (!kept(words.w, p.dropout)) x[m][n + 1][2 * half + 1] = 0.0f;
                }
            }
        uint32_t weights[M][KEYS / 16][4];
        pack_weights<T>(weights, x);
        if (looks && p.causal)
            multiply_rows<true>(acc, weights, keys.v(tile), [&](int m, int half, int row) {
                return tile * KEYS + row <= query(m, half);
            });
        else
            multiply_rows<false>(acc, weights, keys.v(tile), 0);
    }
    wait_for_copies<0>();  // also of a tile that nobody may attend

#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = sum_of_four(sum[m][half]);
            const bool nothing = total == 0.0f, there = query(m, half) < at.q_len;
            const int64_t row = at.first_q + query(m, half);
            // What dropout keeps is scaled once, here.
            store_half<T, D>(out.at(at.sequence, at.head, row), acc[m], half,
                             nothing ? 0.0f : p.dropout.scale / total, there);
            if (there && lane % 4 == 0)
                *lse.at(at.sequence, at.head, row) =
                    nothing ? -INFINITY : __fmul_rn(largest[m][half], unit) + logf(total);
        }
}

// Grid: blocks × heads × sequences, and one more sequence for tokens behind the last one.
template <class S>
void launch_forward(const AttentionCall& call, const Heads<float>& lse) {
    using T = typename S::T;
    Problem p = call.problem;
    p.blocks = blocks_of(call.longest_q, S::ROWS);
    launch(attention_fwd_kernel<S>,
           Launch{grid_of(p, p.heads), S::THREADS, S::SHARED, current_stream(call.out)}, p,
           Heads<const T>(call.q), Heads<const T>(call.k), Heads<const T>(call.v),
           Heads<T>(OwnedHeads(call.out)), lse);
}

}  // namespace
}  // namespace pytorch_ext::cuda
