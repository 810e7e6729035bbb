#pragma once

// Attention: softmax(query key^T scale + mask) value, and its gradients, for dense batches and for sequences laid end
// to end. An item of work is a sequence, a key head and, forward, a part of the queries, backward of the keys.

#include <cstddef>

#include "isa.h"

namespace pytorch_ext {

struct Dropout;

// Heads of tokens by their strides, in elements; the last dimension is dense. Of sequences laid end to end `batch`
// is 0.
struct Heads {
    void* data;
    ptrdiff_t batch, head, token;
};

enum class MaskKind { none, boolean, floats };

// (batch, heads, queries, keys) by strides in elements, 0 where it broadcasts.
struct Mask {
    MaskKind kind;
    Dtype dtype;  // of floats
    const void* data;
    ptrdiff_t batch, head, query, key;
};

// In one pass over the keys at most this many are laid out and multiplied.
constexpr ptrdiff_t LONGEST_PASS = 512;

// What both directions take.
struct Attention {
    Dtype dtype;
    bool pairs;  // multiplied in pairs (see pair_products.h)
    ptrdiff_t batch, heads, key_heads, head_dim, value_dim;
    ptrdiff_t q_len, k_len;      // the longest
    const int *q_ends, *k_ends;  // the running sums of the lengths; null in a dense batch
    const int* order;            // the sequences, those with the most work first; null: as they come
    Heads query, key, value, out;
    float* lse;
    ptrdiff_t lse_batch, lse_head;
    Mask mask;
    const Dropout* dropout;  // null: none
    bool causal;
    float scale;
    // Nothing will be differentiated: forward need not take the very powers that backward takes, and leaves lse.
    bool inference;
    ptrdiff_t threads;

    // Set by the plan.
    ptrdiff_t items, scratch;     // how many; floats that each needs while it runs
    ptrdiff_t parts, part_units;  // forward: of the blocks of queries; backward: of the passes over the keys
    ptrdiff_t pass_keys;
};

PYTORCH_EXT_KERNEL(plan_attention_forward, Attention& attention)
PYTORCH_EXT_KERNEL(attention_forward, const Attention& attention, ptrdiff_t item, float* scratch)

struct AttentionGradients {
    Heads dout, dquery, dkey, dvalue;
    // Where there is more than one pass over the keys, the gradients of queries gather here: for each part one tensor
    // of dquery_size elements laid out as dquery, zeros at first. dquery itself is then not written.
    float* dquery_sums;
    ptrdiff_t dquery_size;
    float*
        dscores;  // the mask's gradient before it is summed, (batch, heads, q_len, k_len), zeros at first; or null
};

PYTORCH_EXT_KERNEL(plan_attention_backward, Attention& attention)
PYTORCH_EXT_KERNEL(attention_backward, const Attention& attention, const AttentionGradients& gradients,
                   ptrdiff_t item, float* scratch)

}  // namespace pytorch_ext
