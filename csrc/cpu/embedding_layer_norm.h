#pragma once

#include <cstddef>
#include <cstdint>

#include "dropout.h"
#include "isa.h"

namespace pytorch_ext {

// What is normalised: word[word_ids] + token_type[token_type_ids] + position[position_ids], by tables (entries, cols)
// and an id for each row. A table may be null.
struct Embeddings {
    const void *word, *token_type, *position;
    const int64_t *word_ids, *token_type_ids, *position_ids;
    const Dropout* dropout;  // null: none
    ptrdiff_t cols;
    Dtype dtype;
};

struct EmbeddingLayerNorm {
    Embeddings embeddings;
    void* out;                   // (rows, cols)
    float *mean, *rstd;          // (rows)
    const float *weight, *bias;  // (cols); bias may be null
    unsigned char* mask;         // (rows, mask_bytes(cols)), to be written; null: not asked for
    float eps;
};

struct EmbeddingLayerNormGradient {
    Embeddings embeddings;
    const void* dout;           // (rows, cols)
    float* dx;                  // (rows, cols): of the sum of the embeddings
    const float *mean, *rstd;   // (rows)
    const float* weight;        // (cols)
    const unsigned char* mask;  // as forward wrote it; null: to be drawn again
    bool sums_token_types;
};

// The gradient of a table: in each of its rows the sum of those of dx that looked it up.
struct TableGradient {
    const float* dx;
    const int64_t* entries;  // of the table, which some row looked up
    const int64_t* first;    // for each entry of the table the first row that looked it up
    const int64_t* next;     // for each row the next one with the same entry, or -1
    void* out;
    ptrdiff_t cols;
    Dtype dtype;
};

// Of scratch it needs (1, cols).
PYTORCH_EXT_KERNEL(embedding_layer_norm_rows, const EmbeddingLayerNorm&, ptrdiff_t first, ptrdiff_t rows,
                   float* scratch)

// Adds to the sums of dweight and dbias, (2, cols), and with sums_token_types to those of the gradient of token_type,
// which follow: a table of few entries, each with many rows, would be a pass over dx of its own. Of scratch it needs
// (8, cols).
PYTORCH_EXT_KERNEL(embedding_layer_norm_gradient, const EmbeddingLayerNormGradient&, ptrdiff_t first,
                   ptrdiff_t rows, float* sums, float* scratch)

// Makes the rows of `count` of the entries, from `first` on.
PYTORCH_EXT_KERNEL(table_gradient, const TableGradient&, ptrdiff_t first, ptrdiff_t count)

}  // namespace pytorch_ext
