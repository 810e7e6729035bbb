#pragma once

// How kernels that work row by row hold a row: in the registers of a warp, or of a whole block where it is wider. Sums
// over rows are made without atomics: each block leaves its own, and a second kernel adds those up in order.

#include "philox.cuh"
#include "reduce.cuh"
#include "tensors.h"
#include "vec.cuh"

namespace pytorch_ext::cuda {

// --- How a row is shared out ------------------------------------------------------------------------------------

// ELEMENTS of a row per thread, in chunks of 16 bytes; neighbours have neighbouring chunks.
template <class Element, int ELEMENTS, bool IN_WARP>
struct Layout {
    using T = Element;
    static constexpr int E = ELEMENTS, V = VEC<T>, CHUNKS = E / V;
    static constexpr bool WARP_PER_ROW = IN_WARP;
    static constexpr int THREADS = IN_WARP ? 128 : 512;        // of a block, at most
    static constexpr int ROWS = IN_WARP ? THREADS / WARP : 1;  // of a block, at once
};

// BERT's widths, 768 and 1024, take one warp: it needs no exchange through shared memory.
template <class Work>
void with_layout(ScalarType dtype, int64_t cols, const Work& work) {
    visit(dtype, [&](auto t) {
        using T = typename decltype(t)::type;
        if (cols <= 16 * WARP) return work(Layout<T, 16, true>());
        if (cols <= 32 * WARP) return work(Layout<T, 32, true>());
        return work(Layout<T, 16, false>());
    });
}

template <class L>
unsigned row_blocks(int64_t rows) {
    return cdiv<int64_t>(rows, L::ROWS);
}

template <class L>
unsigned threads_for(int64_t cols) {
    return L::WARP_PER_ROW ? L::THREADS : cdiv<int64_t>(cols, L::E * WARP) * WARP;
}

// How many blocks share the rows where each leaves partial sums behind. Enough to hide the latency of memory; with
// few rows fewer, since each is a partial sum more to write and to read.
template <class L>
unsigned blocks_for_sums(int64_t rows, int64_t cols) {
    const int64_t least = processors(),
                  most = least * (L::WARP_PER_ROW ? 3 : L::THREADS / threads_for<L>(cols));
    const int64_t of_rows = row_blocks<L>(rows);
    return std::min({of_rows, most, std::max(least, of_rows / 4)});
}

// --- On the device ----------------------------------------------------------------------------------------------

// Which rows a thread works on, from `row` on in steps, and which columns of them.
template <class L>
struct Place {
    int lane, width, warp;  // lane of so many that share a row
    int64_t row, step;

    __device__ Place() {
        warp = threadIdx.x / WARP;
        lane = L::WARP_PER_ROW ? threadIdx.x % WARP : threadIdx.x;
        width = L::WARP_PER_ROW ? WARP : blockDim.x;
        row = static_cast<int64_t>(blockIdx.x) * L::ROWS + (L::WARP_PER_ROW ? warp : 0);
        step = static_cast<int64_t>(gridDim.x) * L::ROWS;
    }
    __device__ int col(int chunk) const { return (chunk * width + lane) * L::V; }
};

// The c-th chunk of a row in registers.
template <class L>
__device__ inline auto chunk_of(float (&row)[L::E], int c) -> float (&)[L::V] {
    return reinterpret_cast<float (&)[L::V]>(row[c * L::V]);
}

template <class L>
__device__ inline void load_row(uint4 (&chunks)[L::CHUNKS], const typename L::T* row, const Place<L>& at,
                                int cols, bool aligned) {
#pragma unroll
    for (int c = 0; c < L::CHUNKS; ++c) chunks[c] = load_chunk(row + at.col(c), cols - at.col(c), aligned);
}

template <class L>
__device__ inline void widen_row(float (&row)[L::E], const uint4 (&chunks)[L::CHUNKS]) {
#pragma unroll
    for (int c = 0; c < L::CHUNKS; ++c) widen<typename L::T>(chunk_of<L>(row, c), chunks[c]);
}

template <class L>
__device__ inline void store_row(typename L::T* row, const float (&values)[L::E], const Place<L>& at,
                                 int cols, bool aligned) {
#pragma unroll
    for (int c = 0; c < L::CHUNKS; ++c)
        store_chunk(row + at.col(c), narrow<typename L::T>(values + c * L::V), cols - at.col(c), aligned);
}

// Two sums over the threads that share a row, which each of them gets.
template <class L>
__device__ inline float2 row_sum(float2 x) {
    if constexpr (L::WARP_PER_ROW)
        return {warp_sum(x.x), warp_sum(x.y)};
    else
        return block_sum(x, shared_memory<float2>());
}

// A chunk of a weight or bias that is there.
template <class T>
__device__ inline void load_parameter(float (&out)[VEC<T>], const Parameter& p, int col, int cols,
                                      bool aligned) {
    if constexpr (sizeof(T) == 2) {
        if (p.is_float) {
#pragma unroll
            for (int i = 0; i < VEC<T>; i += 4) {
                const int at = col + i;
                widen<float>(reinterpret_cast<float (&)[4]>(out[i]),
                             load_chunk(static_cast<const float*>(p.data) + at, cols - at, aligned));
            }
            return;
        }
    }
    widen<T>(out, load_chunk(static_cast<const T*>(p.data) + col, cols - col, aligned));
}

// Dropout of a chunk that begins at column `col`, a multiple of 4.
template <class T>
__device__ inline void drop(float (&x)[VEC<T>], int col, int64_t row, const Philox& philox,
                            const Dropout& dropout) {
#pragma unroll
    for (int i = 0; i < VEC<T>; i += 4) {
        const uint4 words = philox.words((col + i) / 4, static_cast<uint32_t>(row),
                                         static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32));
        x[i] = dropped(x[i], words.x, dropout);
        x[i + 1] = dropped(x[i + 1], words.y, dropout);
        x[i + 2] = dropped(x[i + 2], words.z, dropout);
        x[i + 3] = dropped(x[i + 3], words.w, dropout);
    }
}

template <class L>
__device__ inline void drop_row(float (&x)[L::E], const Place<L>& at, int64_t row, int cols,
                                const Dropout& dropout) {
    const Philox philox(dropout.rng);
#pragma unroll
    for (int c = 0; c < L::CHUNKS; ++c)
        if (at.col(c) < cols) drop<typename L::T>(chunk_of<L>(x, c), at.col(c), row, philox, dropout);
}

// --- Sums over rows ---------------------------------------------------------------------------------------------

// The row of `partials` (blocks, cols) that is this block's; null if that is.
__device__ inline float* own_partial(float* partials, int cols) {
    return partials ? partials + static_cast<int64_t>(blockIdx.x) * cols : nullptr;
}

// Leaves the block's sums of its columns in `partial` (cols,), unless that is null. Where warps have rows of their own,
// one after another adds what it has in shared memory, which has room for a row of floats.
template <class L>
__device__ inline void store_partial(float* partial, const float (&total)[L::E], const Place<L>& at,
                                     int cols) {
    if (partial == nullptr) return;
    float* room = shared_memory<float>();
#pragma unroll
    for (int turn = 0; turn < L::ROWS; ++turn) {
        if (L::ROWS == 1 || at.warp == turn) {
            float* to = turn == L::ROWS - 1 ? partial : room;
#pragma unroll
            for (int e = 0; e < L::E; ++e) {
                const int col = at.col(e / L::V) + e % L::V;
                if (col < cols) to[col] = turn == 0 ? total[e] : room[col] + total[e];
            }
        }
        if (L::ROWS > 1) __syncthreads();
    }
}

struct Sum {
    const float* partials;  // (count, cols)
    void* out;              // (cols,)
    ScalarType dtype;
};

// Block (j, i) adds up columns 32 j and on of the i-th sum; its threads are 32 columns wide, and share the parts.
// Plan: at most 32 registers, for as many threads as a processor holds.
static __global__ void sum_partials_kernel(Sum first, Sum second, Sum third, int count, int cols) {
    const Sum sum = blockIdx.y == 0 ? first : blockIdx.y == 1 ? second : third;
    const int col = blockIdx.x * WARP + threadIdx.x;
    float* room = shared_memory<float>();  // (blockDim.y, 32)
    float total = 0.0f;
    if (col < cols)
        for (int part = threadIdx.y; part < count; part += blockDim.y)
            total += sum.partials[static_cast<int64_t>(part) * cols + col];
    room[threadIdx.y * WARP + threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y > 0 || col >= cols) return;
    for (int y = 1; y < static_cast<int>(blockDim.y); ++y) total += room[y * WARP + threadIdx.x];
    switch (sum.dtype) {
        case ScalarType::BFloat16: static_cast<bfloat16*>(sum.out)[col] = total; break;
        case ScalarType::Half: static_cast<float16*>(sum.out)[col] = total; break;
        default: static_cast<float*>(sum.out)[col] = total;
    }
}

// The gradients of parameters while they are summed up: `count` blocks leave their partial sums, `finish` adds them up.
class ParameterSums {
public:
    ParameterSums(const std::vector<Tensor>& gradients, int64_t count, int cols)
        : count_(count), cols_(cols) {
        const int64_t sums = std::count_if(gradients.begin(), gradients.end(),
                                           [](const Tensor& gradient) { return gradient.numel() > 0; });
        if (sums > 0) partials_ = new_empty(gradients[0], Sizes{sums, count, cols}, ScalarType::Float);
        for (size_t i = 0; i < gradients.size(); ++i) {
            if (gradients[i].numel() == 0) continue;
            places_[i] = floats(*partials_) + n_ * count * cols;
            sums_[n_++] = {places_[i], gradients[i].data_ptr(), gradients[i].scalar_type()};
        }
    }

    // Where the kernel leaves the partial sums (count, cols) of the i-th gradient; null if that is empty.
    float* operator[](size_t i) const { return places_[i]; }

    void finish(cudaStream_t stream) const {
        if (n_ == 0) return;
        constexpr unsigned HIGH = 8;
        // Grid: blocks of 32 columns × sums.
        launch(sum_partials_kernel,
               Launch{dim3(cdiv(cols_, WARP), n_), dim3(WARP, HIGH), WARP * HIGH * sizeof(float), stream},
               sums_[0], sums_[1], sums_[2], static_cast<int>(count_), cols_);
    }

private:
    int64_t count_;
    int cols_;
    unsigned n_ = 0;
    OptionalTensor partials_;
    float* places_[3] = {};
    Sum sums_[3] = {};
};

}  // namespace pytorch_ext::cuda
