#include "embedding_layer_norm.h"

#include "philox.h"
#include "rows.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {
namespace {

// Writes the sum of the embeddings of a row, and adds that up.
template <class T>
inline float add_embeddings(const Embeddings& a, ptrdiff_t row, float* out) {
    const T* const word = (const T*)a.word + a.word_ids[row] * a.cols;
    const T* const token_type =
        a.token_type ? (const T*)a.token_type + a.token_type_ids[row] * a.cols : nullptr;
    const T* const position = a.position ? (const T*)a.position + a.position_ids[row] * a.cols : nullptr;
    Sums sums;
    along(a.cols, [&](ptrdiff_t i, auto lanes, int k) PX_LAMBDA {
        F x = load(word + i, lanes);
        if (token_type) x = x + load(token_type + i, lanes);
        if (position) x = x + load(position + i, lanes);
        store(out + i, x, lanes);
        sums.of[k] += x;
    });
    return sums.total();
}

template <class T>
inline void forward_row(const EmbeddingLayerNorm& a, ptrdiff_t row, float* x) {
    const Embeddings& e = a.embeddings;
    const Moments m = moments(x, e.cols, add_embeddings<T>(e, row, x) / (float)e.cols, a.eps);
    a.mean[row] = m.mean;
    a.rstd[row] = m.rstd;
    const float *const weight = a.weight, *const bias = a.bias;  // no store can change these
    const bool drops = e.dropout;
    const float scale = drops ? e.dropout->scale : 0.0f;
    in_blocks(row, e.cols, e.dropout, a.mask, [&](ptrdiff_t block, ptrdiff_t n, const unsigned char* mask) {
        T* const out = (T*)a.out + row * e.cols + block;
        along(n, [&](ptrdiff_t i, auto lanes, int) PX_LAMBDA {
            F y = scaled_and_shifted(x_hat(load(x + block + i, lanes), m), weight, bias, block + i, lanes);
            if (drops) y = dropped(y, mask, i, scale);
            store(out + i, y, lanes);
        });
    });
}

// The gradient of a row before dropout.
template <class T>
inline void undrop(const EmbeddingLayerNormGradient& a, ptrdiff_t row, float* out) {
    const Embeddings& e = a.embeddings;
    const T* const dout = (const T*)a.dout + row * e.cols;
    if (!e.dropout)
        return along(e.cols, [&](ptrdiff_t i, auto lanes, int)
                                 PX_LAMBDA { store(out + i, load(dout + i, lanes), lanes); });
    const auto undrop_part = [&](ptrdiff_t first, ptrdiff_t n, const unsigned char* mask) {
        along(n, [&](ptrdiff_t i, auto lanes, int) PX_LAMBDA {
            store(out + first + i, dropped(load(dout + first + i, lanes), mask, i, e.dropout->scale), lanes);
        });
    };
    if (a.mask) return undrop_part(0, e.cols, a.mask + row * mask_bytes(e.cols));
    in_blocks(row, e.cols, e.dropout, nullptr, undrop_part);
}

inline void add(float* sums, const float* x, ptrdiff_t n) {
    along(n, [&](ptrdiff_t i, auto lanes, int)
                 PX_LAMBDA { store(sums + i, load(sums + i, lanes) + load(x + i, lanes), lanes); });
}

}  // namespace

void embedding_layer_norm_rows(const EmbeddingLayerNorm& a, ptrdiff_t first, ptrdiff_t rows, float* scratch) {
    visit(a.embeddings.dtype, [&](auto* type) {
        for (ptrdiff_t row = first; row < first + rows; ++row) forward_row<PX_TYPE(type)>(a, row, scratch);
    });
}

void embedding_layer_norm_gradient(const EmbeddingLayerNormGradient& a, ptrdiff_t first, ptrdiff_t rows,
                                   float* sums, float* scratch) {
    const ptrdiff_t cols = a.embeddings.cols;
    by_fours(first, rows, [&](ptrdiff_t row, auto count) {
        constexpr int ROWS = decltype(count)::COUNT;
        float *const x = scratch, *const dy = scratch + ROWS * cols, *const dx = a.dx + row * cols;
        visit(a.embeddings.dtype, [&](auto* type) {
            for (int r = 0; r < ROWS; ++r) {
                add_embeddings<PX_TYPE(type)>(a.embeddings, row + r, x + r * cols);
                undrop<PX_TYPE(type)>(a, row + r, dy + r * cols);
            }
        });
        gradients<ROWS>(dy, x, cols, a.mean + row, a.rstd + row, a.weight, sums, sums + cols,
                        [&](ptrdiff_t i, auto lanes, const F(&d)[ROWS]) PX_LAMBDA {
                            for (int r = 0; r < ROWS; ++r) store(dx + r * cols + i, d[r], lanes);
                        });
        if (!a.sums_token_types) return;
        for (int r = 0; r < ROWS; ++r)
            add(sums + (2 + a.embeddings.token_type_ids[row + r]) * cols, dx + r * cols, cols);
    });
}

void table_gradient(const TableGradient& a, ptrdiff_t first, ptrdiff_t count) {
    constexpr ptrdiff_t BLOCK = 1024;
    float total[BLOCK];
    visit(a.dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        for (ptrdiff_t i = first; i < first + count; ++i) {
            const ptrdiff_t e = a.entries[i];
            for (ptrdiff_t begin = 0; begin < a.cols; begin += BLOCK) {
                const ptrdiff_t n = a.cols - begin < BLOCK ? a.cols - begin : BLOCK;
                T* const out = (T*)a.out + e * a.cols + begin;
                ptrdiff_t row = a.first[e];
                __builtin_memcpy(total, a.dx + row * a.cols + begin, n * sizeof(float));
                while ((row = a.next[row]) >= 0) add(total, a.dx + row * a.cols + begin, n);
                along(n, [&](ptrdiff_t i, auto lanes, int)
                             PX_LAMBDA { store(out + i, load(total + i, lanes), lanes); });
            }
        }
    });
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
