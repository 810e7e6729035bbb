#pragma once

// The gradient of an embedding table: the sum, for each entry, of the gradients of the tokens that looked it up.
// Deterministic, without atomics and without a look at the ids by the host. The ids are sorted (stably, on the device),
// so that the tokens of one entry are a run. A first kernel adds up chunks of sorted tokens: a run that lies within a
// chunk goes straight into the table; what a run has in other chunks is left at their edges. A second one adds up the
// edges of such runs in order. An entry that every token uses is thus shared by many blocks, and so is the whole.

#include <array>

#include "tensors.h"
#include "vec.cuh"

namespace pytorch_ext::cuda {

constexpr int TOKENS = 16;     // of a chunk
constexpr int COLUMNS = 4;     // of a thread
constexpr int ACROSS = 64;     // threads
constexpr int EDGES_HIGH = 8;  // threads that share the edges of a run

// Tokens in the order of their ids.
struct Sorted {
    const int64_t* ids;
    const int64_t* order;  // which token each of them is of
    int64_t tokens;
};

template <class T>
struct TableGradient {
    T* data;  // (entries, cols)
    int64_t entries, skipped;
    int cols;

    // An entry that is skipped, or not in the table at all, gets nothing.
    __device__ void set(int64_t entry, int col, const float (&total)[COLUMNS]) const {
        if (entry < 0 || entry >= entries || entry == skipped) return;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i)
            if (col + i < cols) data[entry * cols + col + i] = T(total[i]);
    }
};

// What runs have at the edges of chunks: (2, chunks, cols), of one that began before the chunk, and of one that goes on
// behind it.
struct Edges {
    float* data;
    int64_t chunks;
    __device__ float* began(int64_t chunk, int cols) const { return data + chunk * cols; }
    __device__ float* goes_on(int64_t chunk, int cols) const { return data + (chunks + chunk) * cols; }
};

__device__ inline void add_columns(float (&total)[COLUMNS], const float* row, int col, int cols,
                                   bool aligned) {
    float x[COLUMNS];
    widen<float>(x, load_chunk(row + col, cols - col, aligned));
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) total[i] += x[i];
}

// Block (i, j) adds up the runs in chunk i, in the columns of block j.
// Plan: at most 32 registers, for as many threads as a processor holds.
template <class T>
__global__ void __launch_bounds__(ACROSS)
    table_chunks_kernel(const float* dx, Sorted sorted, TableGradient<T> table, Edges edges, bool aligned) {
    const int cols = table.cols, col = (blockIdx.y * ACROSS + threadIdx.x) * COLUMNS;
    const int64_t chunk = blockIdx.x, first = chunk * TOKENS;
    const int64_t last = first + TOKENS < sorted.tokens ? first + TOKENS : sorted.tokens;
    bool began_before = first > 0 && sorted.ids[first - 1] == sorted.ids[first];  // of the run at hand
    float total[COLUMNS] = {};
    for (int64_t i = first; i < last; ++i) {
        const int64_t entry = sorted.ids[i];
        add_columns(total, dx + sorted.order[i] * cols, col, cols, aligned);
        if (i + 1 < last && sorted.ids[i + 1] == entry) continue;
        const bool goes_on = i + 1 == last && last < sorted.tokens && sorted.ids[last] == entry;
        if (began_before)
            store_chunk(edges.began(chunk, cols) + col, narrow<float>(total), cols - col, aligned);
        else if (goes_on)
            store_chunk(edges.goes_on(chunk, cols) + col, narrow<float>(total), cols - col, aligned);
        else
            table.set(entry, col, total);
        began_before = false;
#pragma unroll
        for (float& part : total) part = 0.0f;
    }
}

// Block (i, j) adds up the run that begins in chunk i and goes on behind it, if there is one.
// Plan: at most 32 registers, for as many threads as a processor holds.
template <class T>
__global__ void __launch_bounds__(ACROSS* EDGES_HIGH)
    table_edges_kernel(Sorted sorted, TableGradient<T> table, Edges edges, bool aligned) {
    const int cols = table.cols, col = (blockIdx.y * ACROSS + threadIdx.x) * COLUMNS;
    const int64_t chunk = blockIdx.x, first = chunk * TOKENS, behind = first + TOKENS;
    if (behind >= sorted.tokens) return;
    const int64_t entry = sorted.ids[behind - 1];
    if (sorted.ids[behind] != entry) return;
    // A run that is older than the chunk fills it, and belongs to an earlier block.
    if (first > 0 && sorted.ids[first - 1] == entry) return;
    int64_t low = behind, high = sorted.tokens;  // the run ends between them
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (sorted.ids[middle] == entry)
            low = middle + 1;
        else
            high = middle;
    }
    const int64_t end = (low - 1) / TOKENS + 1;  // of its chunks
    float total[COLUMNS] = {};
    if (threadIdx.y == 0) add_columns(total, edges.goes_on(chunk, cols), col, cols, aligned);
    for (int64_t at = chunk + 1 + threadIdx.y; at < end; at += EDGES_HIGH)
        add_columns(total, edges.began(at, cols), col, cols, aligned);
    float* room = shared_memory<float>();  // (EDGES_HIGH, COLUMNS, ACROSS)
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) room[(threadIdx.y * COLUMNS + i) * ACROSS + threadIdx.x] = total[i];
    __syncthreads();
    if (threadIdx.y > 0) return;
    for (int y = 1; y < EDGES_HIGH; ++y)
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) total[i] += room[(y * COLUMNS + i) * ACROSS + threadIdx.x];
    table.set(entry, col, total);
}

// --- Launchers --------------------------------------------------------------------------------------------------

inline std::tuple<Tensor, Tensor> stably_sorted(const Tensor& ids) {
    using torch::stable::detail::from, torch::stable::detail::to;
    std::array<StableIValue, 4> stack{from(ids), from(std::optional<bool>(true)), from(int64_t{0}),
                                      from(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// The gradient of `table` (entries, cols) from dx (tokens, cols), float32, contiguous, and the tokens' ids (tokens,).
// The row `skipped` stays zero.
inline Tensor table_gradient(const Tensor& dx, const Tensor& ids, const Tensor& table, int64_t skipped) {
    const int64_t tokens = ids.numel(), chunks = cdiv<int64_t>(tokens, TOKENS);
    const int cols = table.size(1);
    const Tensor gradient = torch::stable::new_zeros(table, table.sizes());
    const auto [sorted_ids, order] = stably_sorted(cast(ids, ScalarType::Long));
    const Tensor edge_rows = new_empty(dx, Sizes{2, chunks, cols});
    const Sorted sorted{data<const int64_t>(sorted_ids), data<const int64_t>(order), tokens};
    const Edges edges{floats(edge_rows), chunks};
    const bool aligned = cols % COLUMNS == 0;
    // Grid, of both: chunks of tokens × blocks of columns.
    const dim3 grid(static_cast<unsigned>(chunks), cdiv(cols, ACROSS * COLUMNS));
    const cudaStream_t stream = current_stream(dx);
    visit(table.scalar_type(), [&](auto t) {
        using T = typename decltype(t)::type;
        const TableGradient<T> into{data<T>(gradient), table.size(0), skipped, cols};
        launch(table_chunks_kernel<T>, Launch{grid, ACROSS, 0, stream}, floats(dx), sorted, into, edges,
               aligned);
        constexpr unsigned ROOM = EDGES_HIGH * COLUMNS * ACROSS * sizeof(float);
        launch(table_edges_kernel<T>, Launch{grid, dim3(ACROSS, EDGES_HIGH), ROOM, stream}, sorted, into,
               edges, aligned);
    });
    return gradient;
}

}  // namespace pytorch_ext::cuda
