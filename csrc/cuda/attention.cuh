#pragma once

// What both ops of attention share: what they are asked, on the host and on the device, and the softmax's power of two.

#include "attention_tiles.cuh"
#include "philox.cuh"
#include "tensors.h"

namespace pytorch_ext::cuda {

// --- Math -------------------------------------------------------------------------------------------------------

// Shared memory of a block of which sm_80 holds two, and which sm_86 and sm_89 can launch at all: of 164 and of 99 KiB,
// one for the system in each block.
constexpr unsigned ROOM_FOR_TWO = (164 / 2 - 1) * 1024;

constexpr float LOG2_E = 1.44269504088896341f;

// 2 ** x on the units that multiply and add, for x below 127, to 3e-6 of it; 0 below -126.5. The integer nearest to x
// goes into the exponent, a polynomial fitted to the least relative error has the rest, from -1/2 to 1/2. What is no
// number stays none.
__device__ inline float exp2_polynomial(float x) {
    constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2 ** 23: has no bits for fractions
    x = larger_or_nan(x, -127.0f);
    const float shifted = x + TO_INTEGER;
    const float rest = x - (shifted - TO_INTEGER);
    float y = 0.00957010221f;
    y = y * rest + 0.0559178591f;
    y = y * rest + 0.240247443f;
    y = y * rest + 0.693121791f;
    y = y * rest + 0.999999285f;
    return y * bits<float>((bits<uint32_t>(shifted) << 23) + 0x3f800000);
}

// --- On the device ----------------------------------------------------------------------------------------------

// Heads as kernels take them: rows of elements side by side. Strides in elements.
template <class T>
struct Heads {
    T* data;
    int64_t of_batch, of_head, of_row;
    __device__ T* at(int sequence, int head, int64_t row) const {
        return data + sequence * of_batch + head * of_head + row * of_row;
    }
};

struct Problem {
    const int32_t *cu_q, *cu_k;   // (sequences + 1), or null: all sequences are as long
    int sequences, heads, group;  // so many query heads share a key head
    int64_t q_len, k_len;         // of each sequence, or all tokens
    int blocks;                   // of the longest sequence
    const uint8_t* mask;          // of keys: (B, H, S), 0 where hidden; or null
    int64_t mask_of_batch, mask_of_head, mask_of_key;
    bool causal;
    float scale;  // of the scores, never 0: the scores may be infinite
    Dropout dropout;
};

// What a block of threads works on: one of the blocks of a head of a sequence.
struct Work {
    int block, head, sequence, q_len, k_len;
    int64_t first_q, first_k;  // tokens, where sequences are laid end to end
    bool behind;               // no sequence, but the tokens behind the last one

    // The grid is blocks × heads × sequences. `heavy_first`: of all heads the last blocks come first, which have the
    // most keys to look at under a causal mask; else those that share keys are neighbours.
    __device__ Work(const Problem& p, int heads, bool heavy_first) {
        const int pairs = heads * (p.sequences + (p.cu_q != nullptr)), i = blockIdx.x;
        block = heavy_first ? p.blocks - 1 - i / pairs : i % p.blocks;
        const int pair = heavy_first ? i % pairs : i / p.blocks;
        head = pair % heads;
        sequence = pair / heads;
        behind = sequence == p.sequences;
        first_q = first_k = 0;
        q_len = static_cast<int>(p.q_len);
        k_len = static_cast<int>(p.k_len);
        if (p.cu_q == nullptr) return;
        first_q = p.cu_q[sequence];
        first_k = p.cu_k[sequence];
        q_len = static_cast<int>((behind ? p.q_len : p.cu_q[sequence + 1]) - first_q);
        k_len = static_cast<int>((behind ? p.k_len : p.cu_k[sequence + 1]) - first_k);
    }
};

// The keys of a head that its queries may attend, as far as that does not differ from query to query.
struct Keys {
    const uint8_t* mask;
    int64_t stride;
    int end, plain;  // none is visible from `end` on, and all are before `plain`

    __device__ bool visible(int key) const {
        return key < plain || (key < end && mask != nullptr && mask[key * stride]);
    }

    // Padding given as a mask becomes a length, so a warp looks once at the mask.
    __device__ Keys(const Problem& p, const Work& at, int head) : mask(nullptr), stride(p.mask_of_key) {
        end = plain = at.k_len;
        if (p.mask == nullptr) return;
        mask = p.mask + at.sequence * p.mask_of_batch + head * p.mask_of_head;
        end = plain = 0;
#pragma unroll 4
        for (int first = 0; first < at.k_len; first += WARP) {
            const int key = first + threadIdx.x % WARP;
            const uint32_t seen = __ballot_sync(ALL_LANES, key < at.k_len && mask[key * stride]);
            if (plain == first) plain += seen == ALL_LANES ? WARP : __ffs(~seen) - 1;
            if (seen) end = first + WARP - __clz(seen);
        }
    }
};

// The keys of a head and their values, tile by tile in two stages of shared memory.
template <class T, int D, int ROWS, int THREADS>
struct KeyTiles {
    T* room;
    const T *k_rows, *v_rows;
    int64_t k_stride, v_stride;
    Keys seen;

    __device__ KeyTiles(T* room, const Heads<const T>& k, const Heads<const T>& v, const Problem& p,
                        const Work& at)
        : room(room), k_stride(k.of_row), v_stride(v.of_row), seen(p, at, at.head) {
        k_rows = k.at(at.sequence, at.head / p.group, at.first_k);
        v_rows = v.at(at.sequence, at.head / p.group, at.first_k);
    }
    __device__ Tile<T, D, ROWS> k(int i) const { return {room + i % 2 * 2 * ROWS * D}; }
    __device__ Tile<T, D, ROWS> v(int i) const { return {k(i).data + ROWS * D}; }

    // Starts the copy of tile i, a group of its own. Where a mask hides a key there are zeros.
    __device__ void copy(int i) const {
        const auto there = [&](int row) { return seen.visible(i * ROWS + row); };
        const int64_t first = static_cast<int64_t>(i) * ROWS;
        copy_rows<THREADS>(k(i), k_rows + first * k_stride, k_stride, there);
        copy_rows<THREADS>(v(i), v_rows + first * v_stride, v_stride, there);
        end_copy_group();
    }
    // The key of element i of a pair in the lane's n-th part of a tile, as `multiply_by_rows` deals them.
    __device__ int key(int tile, int n, int i) const {
        return tile * ROWS + n / 2 * 16 + threadIdx.x % 4 * 4 + n % 2 * 2 + i;
    }
};

// Zeros in every row from `first` on, by all blocks of a head together.
template <int THREADS, int D, class T>
__device__ inline void zero_rows(const Heads<T>& heads, const Problem& p, const Work& at, int64_t first,
                                 int rows) {
    constexpr int CHUNKS = D / 8;
    for (int i = at.block * THREADS + threadIdx.x; i < rows * CHUNKS; i += p.blocks * THREADS)
        reinterpret_cast<uint4*>(heads.at(at.sequence, at.head, first + i / CHUNKS))[i % CHUNKS] = {0, 0, 0,
                                                                                                    0};
}

// The output of tokens behind the last sequence, by all blocks of a head together.
template <int THREADS, int D, class T>
__device__ inline void nothing_behind(const Heads<T>& out, const Heads<float>& lse, const Problem& p,
                                      const Work& at) {
    zero_rows<THREADS, D>(out, p, at, at.first_q, at.q_len);
    for (int i = at.block * THREADS + threadIdx.x; i < at.q_len; i += p.blocks * THREADS)
        *lse.at(at.sequence, at.head, at.first_q + i) = -INFINITY;
}

// --- On the host ------------------------------------------------------------------------------------------------

// A tensor as heads: (B, H, L, D), or of tokens (L, H, D). Its rows begin at multiples of 16 bytes, else it is a copy.
struct OwnedHeads {
    Tensor tensor;
    int64_t of_batch = 0, of_head = 0, of_row = 0;

    explicit OwnedHeads(const Tensor& x) : tensor(x) {
        if (read_strides()) return;
        tensor = new_empty(x, x.sizes());
        torch::stable::copy_(tensor, x);
        read_strides();
    }
    template <class T>
    operator Heads<T>() const {
        return {static_cast<T*>(tensor.data_ptr()), of_batch, of_head, of_row};
    }

private:
    bool read_strides() {
        const bool batched = tensor.dim() == 4;
        // Of a dimension of one element the stride means nothing.
        const auto stride = [&](int64_t d) { return tensor.size(d) > 1 ? tensor.stride(d) : 0; };
        of_batch = batched ? stride(0) : 0;
        of_head = stride(1);
        of_row = stride(batched ? 2 : 0);
        const int64_t all = of_batch | of_head | of_row;
        return tensor.stride(tensor.dim() - 1) == 1 && all % 8 == 0 && at_16_bytes(tensor.data_ptr());
    }
};

// A softmax over minus infinity makes no numbers of a scale of zero: with the smallest there is, it makes what it should.
inline float score_scale(double scale) {
    constexpr double LEAST = 0x1p-126;
    return static_cast<float>(std::copysign(std::max(std::abs(scale), LEAST), scale));
}

// Even where every sequence is empty there is a block, which fills what is behind them.
inline int blocks_of(int64_t longest, int rows) {
    return static_cast<int>(cdiv<int64_t>(std::max<int64_t>(longest, 1), rows));
}

// Blocks × heads × sequences, and one more sequence for tokens behind the last one.
inline unsigned grid_of(const Problem& p, int64_t heads) {
    const int64_t blocks = p.blocks * heads * (p.sequences + (p.cu_q != nullptr));
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "backend 'cuda': expected less than 2 ** 31 blocks, got ",
                    blocks);
    return static_cast<unsigned>(blocks);
}

struct AttentionCall {
    Problem problem;  // but for `blocks`
    int64_t longest_q, longest_k;
    double scale;
    OwnedHeads q, k, v;
    Tensor out, lse;  // lse (B, H, L), or of tokens (H, L), contiguous
};

// Both are in attention_kernels.cuh, which attention.cu alone compiles.
void attend(const AttentionCall& call);
void differentiate(const AttentionCall& call, const Tensor& dout, const Tensor& dq, const Tensor& dk,
                   const Tensor& dv);

}  // namespace pytorch_ext::cuda
