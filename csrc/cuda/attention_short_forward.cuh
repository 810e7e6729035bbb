#pragma once

// Attention forward over short sequences. A block owns a head: its keys and values come to shared memory once, and the
// scores of a query with all of them stay in registers, so that there is one look for the largest, one pass of powers, and
// nothing to correct of what was summed up before.

#include "attention_short.cuh"

namespace pytorch_ext::cuda {
namespace {

// Occupancy: keys and values take 64, 32 or 16 KiB, a warp's queries 2 more. Of 256 keys a lane has 128 scores, and two
// blocks of four warps fill the registers; of 128 it has 64, for three blocks; of 64 keys, 32. There a block has but two
// warps, since a sequence of 20 tokens would leave more idle, and eight blocks run at once (on sm_80 seven, by their room).
template <class Element, int DIM, int MOST_KEYS>
struct ShortForwardShape {
    using T = Element;
    static constexpr int D = DIM, KEYS = MOST_KEYS, PARTS = KEYS / PART;
    static constexpr int THREADS = KEYS > 64 ? 128 : 64, ROWS = THREADS / WARP * 16;
    static constexpr int BLOCKS = KEYS > 128 ? 2 : KEYS > 64 ? 3 : 8;  // at once
    static constexpr unsigned SHARED = (2 * KEYS + ROWS) * D * sizeof(T);
    static constexpr int POLYNOMIAL_QUARTERS = 1;  // as in ForwardShape
    static_assert(SHARED <= ROOM_FOR_TWO);
};

// Plan: at most 255 registers, for two blocks of 128 threads at once.
template <class S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS)
    attention_short_fwd_kernel(Problem p, Heads<const typename S::T> q, Heads<const typename S::T> k,
                               Heads<const typename S::T> v, Heads<typename S::T> out, Heads<float> lse) {
    using T = typename S::T;
    constexpr int D = S::D, KEYS = S::KEYS, PARTS = S::PARTS;
    const Work at(p, p.heads, false);
    if (at.behind) return nothing_behind<S::THREADS, D>(out, lse, p, at);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (at.block * S::ROWS >= at.q_len) return;
    T* const room = shared_memory<T>();
    const Tile<T, D, KEYS> k_tile{room}, v_tile{room + KEYS * D};
    const Tile<T, D, 16> q_tile{room + (2 * KEYS + warp * 16) * D};  // the warp's own
    const auto copy_queries = [&](int first) {
        copy_rows<WARP>(q_tile, q.at(at.sequence, at.head, at.first_q + first), q.of_row,
                        [&](int row) { return first + row < at.q_len; });
        end_copy_group();
    };
    int first = at.block * S::ROWS + warp * 16;
    if (first < at.q_len) copy_queries(first);
    const Keys keys(p, at, at.head);
    const auto visible = [&](int key) { return keys.visible(key); };
    copy_parts<S::THREADS>(k_tile, k.at(at.sequence, at.head / p.group, at.first_k), k.of_row, keys.end,
                           visible);
    copy_parts<S::THREADS>(v_tile, v.at(at.sequence, at.head / p.group, at.first_k), v.of_row, keys.end,
                           visible);
    end_copy_group();
    wait_for_copies<0>();
    __syncthreads();  // from here on warps go their own ways

    const float unit = fabsf(p.scale);
    const uint32_t sign = p.scale < 0.0f ? 0x80008000 : 0;  // the largest score is to be the largest product
    const Philox philox(p.dropout.rng);
    const uint32_t head_of_all = at.sequence * p.heads + at.head;
    for (; first < at.q_len; first += p.blocks * S::ROWS) {
        uint32_t q_parts[D / 16][4];
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            load_left(q_parts[d], q_tile, d, [](int row) { return row; });
#pragma unroll
            for (int i = 0; i < 4; ++i) q_parts[d][i] ^= sign;
        }
        __syncwarp();  // the next queries come to where these are
        if (first + p.blocks * S::ROWS < at.q_len) copy_queries(first + p.blocks * S::ROWS);

        // Of 256 keys what is theirs for every query would not fit into registers beside the scores.
        const int own = as_if_new(lane % 4 * 4);  // the first of the lane's four keys of sixteen
        const auto query = [&](int half) { return first + half * 8 + lane / 4; };
        const int end = p.causal ? min(keys.end, first + 16) : keys.end;
        const int plain = p.causal ? min(keys.plain, first + 1) : keys.plain;  // to all queries of the warp
        float x[PARTS][1][PART / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            if (part * PART >= end) continue;
            multiply_by_rows<1>(x[part], part_of<PART>(k_tile, part * PART),
                                [&](uint32_t (&a)[4], int, int d) {
#pragma unroll
                                    for (int i = 0; i < 4; ++i) a[i] = q_parts[d][i];
                                });
            if (part * PART + PART > plain) {
                const uint32_t seen = __ballot_sync(ALL_LANES, keys.visible(part * PART + lane)) >> own;
#pragma unroll
                for (int n = 0; n < PART / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int key = n / 2 * 16 + n % 2 * 2 + e % 2;  // of the part, from `own` on
                        if (!(seen >> key & 1) || (p.causal && part * PART + key > query(e / 2) - own))
                            x[part][0][n][e] = -INFINITY;
                    }
            }
#pragma unroll
            for (int n = 0; n < PART / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) largest[e / 2] = fmaxf(largest[e / 2], x[part][0][n][e]);
        }
        float shift[2], sum[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            largest[half] = largest_of_four(largest[half]);
            // As in the kernel for long sequences: nothing is shifted by infinity, and products are rounded first.
            shift[half] = largest[half] == -INFINITY ? 0.0f : __fmul_rn(largest[half], unit);
        }
        float acc[1][D / 8][4] = {};
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            if (part * PART >= end) continue;
#pragma unroll
            for (int n = 0; n < PART / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& one = x[part][0][n][e];
                    one = (__fmul_rn(one, unit) - shift[e / 2]) * LOG2_E;
                    const bool by_polynomial = (2 * n + e % 2) % 4 < S::POLYNOMIAL_QUARTERS;
                    one = by_polynomial ? exp2_polynomial(one) : exp2_approximately(one);
                    sum[e / 2] += one;
                }
            if (p.dropout.rng != nullptr)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int n = 0; n < PART / 8; n += 2) {
                        const uint4 words =
                            philox.words((part * PART + n * 8 + own) / 4, query(half), head_of_all);
                        if (!kept(words.x, p.dropout)) x[part][0][n][2 * half] = 0.0f;
                        if (!kept(words.y, p.dropout)) x[part][0][n][2 * half + 1] = 0.0f;
                        if (!kept(words.z, p.dropout)) x[part][0][n + 1][2 * half] = 0.0f;
                        if (!kept(words.w, p.dropout)) x[part][0][n + 1][2 * half + 1] = 0.0f;
                    }
            uint32_t weights[1][PART / 16][4];
            pack_weights<T>(weights, x[part]);
            const auto values = part_of<PART>(v_tile, part * PART);
            if (p.causal && part * PART + PART > plain)
                multiply_rows<true>(acc, weights, values,
                                    [&](int, int half, int row) { return part * PART + row <= query(half); });
            else
                multiply_rows<false>(acc, weights, values, 0);
        }

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = sum_of_four(sum[half]);
            const bool nothing = total == 0.0f, there = query(half) < at.q_len;
            const int64_t row = at.first_q + query(half);
            // What dropout keeps is scaled once, here.
            store_half<T, D>(out.at(at.sequence, at.head, row), acc[0], half,
                             nothing ? 0.0f : p.dropout.scale / total, there);
            if (there && lane % 4 == 0)
                *lse.at(at.sequence, at.head, row) = nothing ? -INFINITY : shift[half] + logf(total);
        }
        wait_for_copies<0>();
        __syncwarp();
    }
}

// Grid: heads × sequences, and one more sequence for tokens behind the last one. Where that leaves parts of a GPU
// without work, so many blocks share a head as have queries of their own.
template <class S>
void launch_short_forward(const AttentionCall& call, const Heads<float>& lse) {
    using T = typename S::T;
    constexpr int ENOUGH = 256;  // two blocks on each of a larger GPU's processors
    Problem p = call.problem;
    p.blocks = p.heads * p.sequences < ENOUGH ? blocks_of(call.longest_q, S::ROWS) : 1;
    launch(attention_short_fwd_kernel<S>,
           Launch{grid_of(p, p.heads), S::THREADS, S::SHARED, current_stream(call.out)}, p,
           Heads<const T>(call.q), Heads<const T>(call.k), Heads<const T>(call.v),
           Heads<T>(OwnedHeads(call.out)), lse);
}

}  // namespace
}  // namespace pytorch_ext::cuda
