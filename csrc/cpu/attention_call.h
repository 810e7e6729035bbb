#pragma once

// What the ATen sides of dense and of packed attention share.

#include "attention.h"
#include "direct.h"
#include "pair_products.h"
#include "rng.h"

namespace pytorch_ext {

// varlen_attention's forward pass, in varlen_attention.cpp. `out` is (tokens, heads, value_dim), `lse` (heads, tokens).
// `inference`: see Attention.
void attend_packed(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
                   const Tensor& cu_seqlens_k, const OptionalTensor& rng, double dropout_p, bool is_causal,
                   double scale, const Tensor& out, const Tensor& lse, bool inference = false);

// Whether `cu_seqlens` are 0, then the running sum of lengths up to `tokens`, none of them above `longest`.
bool are_ends(const Argument& cu_seqlens, int64_t tokens, int64_t longest);

inline Tensor with_dense_rows(const Tensor& t) {
    return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous();
}

// Whether `key_heads` may stand for so many more heads of queries.
inline bool divides(int64_t key_heads, int64_t heads) { return key_heads && heads % key_heads == 0; }

// The scale that the wrapper takes where none is given.
inline double scale_of(std::optional<double> scale, int64_t head_dim) {
    return scale ? *scale : std::pow(std::max<int64_t>(head_dim, 1), -0.5);
}

// Of (batch, heads, tokens, dim), or of (tokens, heads, dim).
inline Heads heads_of(const Tensor& t) {
    void* data = const_cast<void*>(t.const_data_ptr());
    if (t.dim() == 4) return {data, t.stride(0), t.stride(1), t.stride(2)};
    return {data, 0, t.stride(1), t.stride(0)};
}

// Runs the items of a planned call; `products` is how many pairs of query and key they look at.
template <class Work>
void run_items(const Attention& a, double products, const Work& work) {
    constexpr double WORTH_A_THREAD = 1e5;  // multiplications
    const auto one = [&](int64_t item) { work(item, thread_scratch(a.scratch)); };
    const auto done = [&] {
        if (on_tiles(a.dtype)) release_tiles();
    };
    if (products * (a.head_dim + a.value_dim) >= WORTH_A_THREAD) return parallel_items(a.items, one, done);
    for (int64_t item = 0; item < a.items; ++item) one(item);
    done();
}

}  // namespace pytorch_ext
