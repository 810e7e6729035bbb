#pragma once

// Attention backward without atomics, so that it repeats bit for bit: one kernel owns queries and makes their gradient, and
// leaves for each what the gradients of its scores have in common; the other owns keys, and makes theirs and that of the
// values (Dao et al. 2022, arXiv 2205.14135, section 3.1 and appendix B). Both make the weights anew from lse.

#include "attention.cuh"

namespace pytorch_ext::cuda {
namespace {

template <class Element, int DIM>
struct BackwardShape {
    using T = Element;
    static constexpr int D = DIM, THREADS = 128, WARPS = THREADS / WARP;
    // Where the gradients of 32 rows fit into a warp's registers it has as many, and reads half as much from shared
    // memory for each product. Of dropout's draws, which are for four keys, each is then one lane's.
    static constexpr int M = D <= 64 ? 2 : 1, ROWS = WARPS * 16 * M;
    static constexpr int COLS =
        32;  // of a tile: keys, in the kernel that owns queries; queries, in that which owns keys
    // The rows' two inputs, and two stages of tiles of two inputs.
    static constexpr unsigned Q_SHARED = (2 * ROWS + 2 * 2 * COLS) * D * sizeof(T);
    static constexpr unsigned K_SHARED = Q_SHARED + 2 * 2 * COLS * sizeof(float);
    static_assert(K_SHARED <= ROOM_FOR_TWO);
};

// exp(product * scale - lse). The product is rounded as in forward, so that of scores of 1e8 too the largest comes to 1.
__device__ inline float weight_of(float product, float scale, float lse) {
    return exp2_approximately((__fmul_rn(product, scale) - lse) * LOG2_E);
}

// Plan: at most 255 registers, for two blocks of 128 threads at once; spills.
template <class S>
__global__ void __launch_bounds__(S::THREADS)
    attention_bwd_queries_kernel(Problem p, Heads<const typename S::T> q, Heads<const typename S::T> k,
                                 Heads<const typename S::T> v, Heads<const typename S::T> dout,
                                 Heads<const typename S::T> out, Heads<const float> lse, Heads<float> delta,
                                 Heads<typename S::T> dq, float scale) {
    using T = typename S::T;
    constexpr int D = S::D, M = S::M, ROWS = S::ROWS, KEYS = S::COLS;
    const Work at(p, p.heads, p.causal);
    const int first = at.block * ROWS, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (at.behind) return zero_rows<S::THREADS, D>(dq, p, at, at.first_q, at.q_len);
    if (first >= at.q_len) return;
    T* const room = shared_memory<T>();
    const Tile<T, D, ROWS> q_tile{room}, dout_tile{room + ROWS * D};
    const int64_t first_token = at.first_q + first;
    const auto is_query = [&](int row) { return first + row < at.q_len; };
    copy_rows<S::THREADS>(q_tile, q.at(at.sequence, at.head, first_token), q.of_row, is_query);
    copy_rows<S::THREADS>(dout_tile, dout.at(at.sequence, at.head, first_token), dout.of_row, is_query);
    end_copy_group();
    const KeyTiles<T, D, KEYS, S::THREADS> keys(room + 2 * ROWS * D, k, v, p, at);
    const int end = p.causal ? min(keys.seen.end, first + ROWS) : keys.seen.end;
    const int plain = p.causal ? min(keys.seen.plain, first + 1) : keys.seen.plain;
    keys.copy(0);

    const auto own_row = [&](int m, int row) { return (warp * M + m) * 16 + row; };
    const auto query = [&](int m, int half) { return first + own_row(m, half * 8 + lane / 4); };
    const auto left_of = [&](const Tile<T, D, ROWS>& tile) {
        return [&](uint32_t (&a)[4], int m, int d) {
            load_left(a, tile, d, [&](int row) { return own_row(m, row); });
        };
    };
    float lses[M][2] = {}, deltas[M][2] = {}, apart[M][2] = {};
    wait_for_copies<1>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool there = query(m, half) < at.q_len;
            const int64_t row = at.first_q + query(m, half);
            if (there) lses[m][half] = *lse.at(at.sequence, at.head, row);
            // By the same product as those with values, so that of an output that is some key's value it has the same bits.
            const auto* const pairs =
                reinterpret_cast<const uint32_t*>(out.at(at.sequence, at.head, there ? row : at.first_q));
            float with_eight[4] = {};
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                uint32_t gradient[4];
                left_of(dout_tile)(gradient, m, d);
                add_product<T>(with_eight, gradient, pairs[d * 8 + lane % 4], pairs[d * 8 + 4 + lane % 4]);
            }
            // A lane's two columns of eight are those of two rows; its own row's is with one of the four that have it.
            const float own = lane / 4 % 2 ? with_eight[2 * half + 1] : with_eight[2 * half];
            deltas[m][half] = __shfl_sync(ALL_LANES, own, lane / 4 * 4 + lane / 8);
        }

    const Philox philox(p.dropout.rng);
    const uint32_t head_of_all = at.sequence * p.heads + at.head;
    // A row's gradients of scores add up to zero, and what they add up to instead is delta's error: the output was
    // rounded. Where that is much of what tells the values of its keys apart, as it is where those are far from zero and
    // close together, the block runs again without it; otherwise looking for it is all that it costs.
    float acc[M][D / 8][4], missed[M][2] = {};
    for (int run = 1;; ++run) {
#pragma unroll
        for (int i = 0; i < M * D / 8 * 4; ++i) acc[i / (D / 2)][i / 4 % (D / 8)][i % 4] = 0.0f;
        float rest[M][2] = {};
        for (int tile = 0; tile * KEYS < end; ++tile) {
            wait_for_copies<0>();
            __syncthreads();  // the tile is there, and nobody looks at the one before any more
            if ((tile + 1) * KEYS < end) keys.copy(tile + 1);
            float x[M][KEYS / 8][4] = {}, dx[M][KEYS / 8][4] = {};
            multiply_by_rows<M>(x, keys.k(tile), left_of(q_tile));
            multiply_by_rows<M>(dx, keys.v(tile), left_of(dout_tile));
            const bool looks = tile * KEYS + KEYS > plain;
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n += 2) {
                        uint32_t words[4] = {};
                        if (p.dropout.rng) {
                            const uint4 drawn =
                                philox.words(keys.key(tile, n, 0) / 4, query(m, half), head_of_all);
                            words[0] = drawn.x, words[1] = drawn.y, words[2] = drawn.z, words[3] = drawn.w;
                        }
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int part = n + i / 2, e = 2 * half + i % 2;
                            const int key = keys.key(tile, part, i % 2);
                            const bool hidden =
                                looks && (!keys.seen.visible(key) || (p.causal && key > query(m, half)));
                            float& one = dx[m][part][e];
                            if (p.dropout.rng) one = dropped(one, words[i], p.dropout);
                            one -= deltas[m][half];
                            if (n == 0 && !hidden) apart[m][half] = fmaxf(apart[m][half], fabsf(one));
                            one *= weight_of(x[m][part][e], p.scale, lses[m][half]);
                            if (hidden) one = 0.0f;
                            rest[m][half] += one;
                        }
                    }
            uint32_t weights[M][KEYS / 16][4];
            pack_weights<T>(weights, dx);
            if (looks && p.causal)
                multiply_rows<true>(acc, weights, keys.k(tile), [&](int m, int half, int row) {
                    return tile * KEYS + row <= query(m, half);
                });
            else
                multiply_rows<false>(acc, weights, keys.k(tile), 0);
        }
        bool off = false;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = sum_of_four(rest[m][half]), most = largest_of_four(apart[m][half]);
                const float before = missed[m][half];
                if (run == 1 ? fabsf(sum) * 64.0f > most : before != 0.0f && fabsf(sum) * 1024.0f > most) {
                    // Two sums say what the row's weights add up to: one, but for what lse has lost.
                    deltas[m][half] += run == 1 ? sum : sum / (1.0f - sum / before);
                    missed[m][half] = sum;
                    off = true;
                }
            }
        if (run == 3 || !__syncthreads_or(off)) break;
        keys.copy(0);
    }
    wait_for_copies<0>();  // also of a tile that nobody may attend

#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t row = at.first_q + query(m, half);
            const bool there = query(m, half) < at.q_len;
            store_half<T, D>(dq.at(at.sequence, at.head, row), acc[m], half, scale, there);
            if (there && lane % 4 == 0) *delta.at(at.sequence, at.head, row) = deltas[m][half];
        }
}

// Plan: at most 255 registers, for two blocks of 128 threads at once; spills.
template <class S>
__global__ void __launch_bounds__(S::THREADS)
    attention_bwd_keys_kernel(Problem p, Heads<const typename S::T> q, Heads<const typename S::T> k,
                              Heads<const typename S::T> v, Heads<const typename S::T> dout,
                              Heads<const float> lse, Heads<const float> delta, Heads<typename S::T> dk,
                              Heads<typename S::T> dv, float scale) {
    using T = typename S::T;
    constexpr int D = S::D, M = S::M, ROWS = S::ROWS, QUERIES = S::COLS;
    const Work at(p, p.heads / p.group, false);  // under a causal mask the first keys are looked at most
    const int first = at.block * ROWS, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (at.behind) {
        zero_rows<S::THREADS, D>(dk, p, at, at.first_k, at.k_len);
        return zero_rows<S::THREADS, D>(dv, p, at, at.first_k, at.k_len);
    }
    if (first >= at.k_len) return;
    T* const room = shared_memory<T>();
    const Tile<T, D, ROWS> k_tile{room}, v_tile{room + ROWS * D};
    const auto q_tile = [&](int i) {
        return Tile<T, D, QUERIES>{room + (2 * ROWS + i % 2 * 2 * QUERIES) * D};
    };
    const auto dout_tile = [&](int i) { return Tile<T, D, QUERIES>{q_tile(i).data + QUERIES * D}; };
    const auto numbers = [&](int i) {  // lse, then delta
        return reinterpret_cast<float*>(room + (2 * ROWS + 4 * QUERIES) * D) + i % 2 * 2 * QUERIES;
    };

    const Keys keys(p, at, at.head * p.group);
    const auto there = [&](int row) { return keys.visible(first + row); };
    const int64_t first_token = at.first_k + first;
    copy_rows<S::THREADS>(k_tile, k.at(at.sequence, at.head, first_token), k.of_row, there);
    copy_rows<S::THREADS>(v_tile, v.at(at.sequence, at.head, first_token), v.of_row, there);
    // Under a causal mask queries before the first key see none. One after another the tiles of all heads that share keys.
    const int begin = p.causal ? first / QUERIES : 0;
    const int tiles = max((at.q_len + QUERIES - 1) / QUERIES - begin, 0),
              all = first < keys.end ? tiles * p.group : 0;
    const auto copy_tile = [&](int i) {
        const int head = at.head * p.group + i / tiles, from = (begin + i % tiles) * QUERIES;
        const int64_t token = at.first_q + from;
        const auto is_query = [&](int row) { return from + row < at.q_len; };
        copy_rows<S::THREADS>(q_tile(i), q.at(at.sequence, head, token), q.of_row, is_query);
        copy_rows<S::THREADS>(dout_tile(i), dout.at(at.sequence, head, token), dout.of_row, is_query);
        if (threadIdx.x < 2 * QUERIES) {
            const int row = threadIdx.x % QUERIES;
            const Heads<const float>& of = threadIdx.x < QUERIES ? lse : delta;
            copy_word_async(numbers(i) + threadIdx.x,
                            of.at(at.sequence, head, token + (is_query(row) ? row : 0)), is_query(row));
        }
        end_copy_group();
    };
    if (all > 0)
        copy_tile(0);
    else
        end_copy_group();

    // A lane's keys are neighbours: those of dropout's draws, four where a warp has as many for each.
    const auto own_row = [&](int m, int half, int of_eight) {
        return warp * 16 * M + of_eight * 2 * M + 2 * m + half;
    };
    const auto left_of = [&](const Tile<T, D, ROWS>& tile) {
        return [&](uint32_t (&a)[4], int m, int d) {
            load_left(a, tile, d, [&](int row) { return own_row(m, row / 8, row % 8); });
        };
    };
    const auto key = [&](int m, int half) { return first + own_row(m, half, lane / 4); };
    const Philox philox(p.dropout.rng);
    float dk_acc[M][D / 8][4] = {}, dv_acc[M][D / 8][4] = {};
    for (int tile = 0; tile < all; ++tile) {
        wait_for_copies<0>();
        __syncthreads();  // the tile is there, and nobody looks at the one before any more
        if (tile + 1 < all) copy_tile(tile + 1);
        const int from = (begin + tile % tiles) * QUERIES;
        const uint32_t head_of_all = at.sequence * p.heads + at.head * p.group + tile / tiles;
        const bool looks = p.causal && from < first + ROWS - 1;
        const auto seen = [&](int m, int half, int row) { return key(m, half) <= from + row; };
        float x[M][QUERIES / 8][4] = {};
        multiply_by_rows<M>(x, q_tile(tile), left_of(k_tile));
        uint32_t keeps = ~0u;  // of each element whether dropout keeps it
        static_assert(M * QUERIES / 8 * 4 <= 32);
        float kept_x[M][QUERIES / 8][4];
#pragma unroll
        for (int n = 0; n < QUERIES / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = lane % 4 * 4 + n / 2 * 16 + n % 2 * 2 + i;
                const float row_lse = numbers(tile)[row];
                uint32_t words[4] = {};
                if (p.dropout.rng) {
                    const uint4 drawn = philox.words(key(0, 0) / 4, from + row, head_of_all);
                    const bool upper = M == 1 && lane / 4 % 2;
                    words[0] = upper ? drawn.z : drawn.x;
                    words[1] = upper ? drawn.w : drawn.y;
                    words[2] = drawn.z;
                    words[3] = drawn.w;
                }
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float& one = x[m][n][2 * half + i];
                        one = weight_of(one, p.scale, row_lse);
                        if (looks && !seen(m, half, row)) one = 0.0f;
                        const bool keep = p.dropout.rng == nullptr || kept(words[2 * m + half], p.dropout);
                        kept_x[m][n][2 * half + i] = keep ? one : 0.0f;
                        if (!keep) keeps &= ~(1u << ((m * QUERIES / 8 + n) * 4 + 2 * half + i));
                    }
            }
        {
            uint32_t weights[M][QUERIES / 16][4];
            pack_weights<T>(weights, kept_x);
            if (looks)
                multiply_rows<true>(dv_acc, weights, dout_tile(tile), seen);
            else
                multiply_rows<false>(dv_acc, weights, dout_tile(tile), 0);
        }
        float dx[M][QUERIES / 8][4] = {};
        multiply_by_rows<M>(dx, dout_tile(tile), left_of(v_tile));
#pragma unroll
        for (int n = 0; n < QUERIES / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = lane % 4 * 4 + n / 2 * 16 + n % 2 * 2 + i;
                const float row_delta = numbers(tile)[QUERIES + row];
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float& one = dx[m][n][2 * half + i];
                        const bool keep = keeps >> ((m * QUERIES / 8 + n) * 4 + 2 * half + i) & 1;
                        one = x[m][n][2 * half + i] * ((keep ? one * p.dropout.scale : 0.0f) - row_delta);
                        if (looks && !seen(m, half, row)) one = 0.0f;
                    }
            }
        uint32_t weights[M][QUERIES / 16][4];
        pack_weights<T>(weights, dx);
        if (looks)
            multiply_rows<true>(dk_acc, weights, q_tile(tile), seen);
        else
            multiply_rows<false>(dk_acc, weights, q_tile(tile), 0);
    }
    wait_for_copies<0>();  // also of keys that nobody may attend

#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool stored = key(m, half) < at.k_len;
            const int64_t row = at.first_k + key(m, half);
            if (!keys.visible(key(m, half)))  // what was made of zeros
#pragma unroll
                for (int n = 0; n < D / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        dk_acc[m][n][2 * half + i] = dv_acc[m][n][2 * half + i] = 0.0f;
            store_half<T, D>(dk.at(at.sequence, at.head, row), dk_acc[m], half, scale, stored);
            store_half<T, D>(dv.at(at.sequence, at.head, row), dv_acc[m], half, p.dropout.scale, stored);
        }
}

template <class S>
void launch_backward(const AttentionCall& call, const OwnedHeads& dout, const Heads<float>& lse,
                     const Heads<float>& delta, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
    using T = typename S::T;
    const float scale = static_cast<float>(call.scale);
    const Heads<const float> lse_in{lse.data, lse.of_batch, lse.of_head, 1};
    const Heads<const float> delta_in{delta.data, delta.of_batch, delta.of_head, 1};
    Problem p = call.problem;
    p.blocks = blocks_of(call.longest_q, S::ROWS);
    // Grid: blocks of queries × heads × sequences.
    launch(attention_bwd_queries_kernel<S>,
           Launch{grid_of(p, p.heads), S::THREADS, S::Q_SHARED, current_stream(dq)}, p,
           Heads<const T>(call.q), Heads<const T>(call.k), Heads<const T>(call.v), Heads<const T>(dout),
           Heads<const T>(OwnedHeads(call.out)), lse_in, delta, Heads<T>(OwnedHeads(dq)), scale);
    p.blocks = blocks_of(call.longest_k, S::ROWS);
    // Grid: blocks of keys × key heads × sequences.
    launch(attention_bwd_keys_kernel<S>,
           Launch{grid_of(p, p.heads / p.group), S::THREADS, S::K_SHARED, current_stream(dq)}, p,
           Heads<const T>(call.q), Heads<const T>(call.k), Heads<const T>(call.v), Heads<const T>(dout),
           lse_in, delta_in, Heads<T>(OwnedHeads(dk)), Heads<T>(OwnedHeads(dv)), scale);
}

}  // namespace
}  // namespace pytorch_ext::cuda
