// Attention over dense batches: what comes from Python and goes back to it.

#include <ATen/ExpandUtils.h>

#include "attention_call.h"

namespace pytorch_ext {
namespace {

Mask mask_of(const OptionalTensor& t) {
    if (!t || !t->defined()) return {MaskKind::none};
    const auto stride = [&](int64_t d) { return t->size(d) == 1 ? 0 : t->stride(d); };
    const bool boolean = t->scalar_type() == at::kBool;
    return {boolean ? MaskKind::boolean : MaskKind::floats,
            boolean ? Dtype::float32 : dtype_of(*t),
            t->const_data_ptr(),
            stride(0),
            stride(1),
            stride(2),
            stride(3)};
}

Attention attention_of(const Tensor& query, const Tensor& key, const Tensor& value,
                       const OptionalTensor& mask, const Tensor& out, const Tensor& lse,
                       const std::optional<Dropout>& dropout, bool is_causal, double scale) {
    Attention a{};
    a.dtype = dtype_of(query);
    a.pairs = multiplies_pairs(a.dtype);
    a.batch = query.size(0);
    a.heads = query.size(1);
    a.key_heads = key.size(1);
    a.head_dim = query.size(3);
    a.value_dim = value.size(3);
    a.q_len = query.size(2);
    a.k_len = key.size(2);
    a.query = heads_of(query);
    a.key = heads_of(key);
    a.value = heads_of(value);
    a.out = heads_of(out);
    a.lse = const_cast<float*>(lse.const_data_ptr<float>());
    a.lse_batch = lse.stride(0);
    a.lse_head = lse.stride(1);
    a.mask = mask_of(mask);
    a.dropout = dropout ? &*dropout : nullptr;
    a.causal = is_causal;
    a.scale = static_cast<float>(scale);
    a.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    return a;
}

double products(const Attention& a) { return double(a.batch) * a.heads * a.q_len * a.k_len; }

std::tuple<Tensor, Tensor> scaled_dot_product_attention_fwd(const Tensor& query, const Tensor& key,
                                                            const Tensor& value,
                                                            const OptionalTensor& attn_mask,
                                                            const OptionalTensor& rng, double dropout_p,
                                                            bool is_causal, double scale) {
    const int64_t batch = query.size(0), heads = query.size(1), q_len = query.size(2);
    const Tensor out = at::empty({batch, q_len, heads, value.size(3)}, query.options()).transpose(1, 2);
    const Tensor lse = at::empty({batch, heads, q_len}, query.options().dtype(at::kFloat));
    if (lse.numel() == 0) return {out, lse};
    const Tensor q = with_dense_rows(query), k = with_dense_rows(key), v = with_dense_rows(value);
    const auto dropout = make_dropout(rng, dropout_p);
    Attention a = attention_of(q, k, v, attn_mask, out, lse, dropout, is_causal, scale);
    PYTORCH_EXT_CALL(plan_attention_forward, a);
    run_items(a, products(a),
              [&](int64_t item, float* scratch) { PYTORCH_EXT_CALL(attention_forward, a, item, scratch); });
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scaled_dot_product_attention_bwd(
    const Tensor& dout, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& attn_mask, const Tensor& out, const Tensor& lse, const OptionalTensor& rng,
    double dropout_p, bool is_causal, double scale, bool need_dmask) {
    const Tensor dquery = at::empty(query.sizes(), query.options());
    const Tensor dkey = at::empty(key.sizes(), key.options()),
                 dvalue = at::empty(value.sizes(), value.options());
    const auto floats = query.options().dtype(at::kFloat);
    const Tensor dscores =
        need_dmask ? at::zeros({query.size(0), query.size(1), query.size(2), key.size(2)}, floats) : Tensor();
    const auto dmask = [&] {
        if (!need_dmask) return at::empty({0}, dout.options());
        return dscores.sum_to_size(attn_mask->sizes()).to(attn_mask->scalar_type()).contiguous();
    };
    if (lse.numel() == 0) return {dquery, dkey.zero_(), dvalue.zero_(), dmask()};

    const Tensor q = with_dense_rows(query), k = with_dense_rows(key), v = with_dense_rows(value);
    const Tensor rows = with_dense_rows(dout), o = with_dense_rows(out), l = lse.contiguous();
    const auto dropout = make_dropout(rng, dropout_p);
    Attention a = attention_of(q, k, v, attn_mask, o, l, dropout, is_causal, scale);
    PYTORCH_EXT_CALL(plan_attention_backward, a);
    Tensor sums;
    if (a.k_len > a.pass_keys) sums = at::zeros({a.parts, dquery.numel()}, floats);
    const AttentionGradients g{heads_of(rows),
                               heads_of(dquery),
                               heads_of(dkey),
                               heads_of(dvalue),
                               sums.defined() ? sums.mutable_data_ptr<float>() : nullptr,
                               dquery.numel(),
                               need_dmask ? dscores.mutable_data_ptr<float>() : nullptr};
    run_items(a, products(a), [&](int64_t item, float* scratch) {
        PYTORCH_EXT_CALL(attention_backward, a, g, item, scratch);
    });
    if (sums.defined()) dquery.view({-1}).copy_(a.parts > 1 ? sums.sum(0) : sums[0]);
    return {dquery, dkey, dvalue, dmask()};
}

Tensors attention_backward(const Backward& node) {
    const auto& [saved, gradients, constants, wants] = node;
    const bool need_dmask = wants(3);
    const auto [dquery, dkey, dvalue, dmask] = scaled_dot_product_attention_bwd(
        gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6],
        constants[0].toDouble(), constants[1].toBool(), constants[2].toDouble(), need_dmask);
    return {dquery, dkey, dvalue, need_dmask ? dmask : Tensor()};
}

constexpr Formula FORMULA{"ScaledDotProductAttentionBackward", attention_backward};

Tensor scaled_dot_product_attention_grad(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const OptionalTensor& attn_mask, const OptionalTensor& rng,
                                         double dropout_p, bool is_causal, double scale) {
    const auto [out, lse] = below_autograd([&] {
        return scaled_dot_product_attention_fwd(query, key, value, attn_mask, rng, dropout_p, is_causal,
                                                scale);
    });
    const Tensor mask = or_undefined(attn_mask);
    record(FORMULA, {query, key, value, mask}, {out}, {query, key, value, mask, out, lse, or_undefined(rng)},
           {dropout_p, is_causal, scale});
    return out;
}

// Four dimensions everywhere, and nothing that has to be broadcast but the mask.
std::optional<Tensor> scaled_dot_product_attention_direct(const Argument& query, const Argument& key,
                                                          const Argument& value, const Argument& attn_mask,
                                                          Number dropout_p, bool is_causal,
                                                          std::optional<Number> scale, bool enable_gqa) {
    if (!usual({&query, &key, &value, &attn_mask}) || !query.floating() || query->dim() != 4 ||
        !is_probability(dropout_p))
        return {};
    const int64_t batch = query->size(0), heads = query->size(1), head_dim = query->size(3);
    for (const Argument* other : {&key, &value})
        if (!other->given() || !other->like(query) || (*other)->dim() != 4 || (*other)->size(0) != batch)
            return {};
    const int64_t key_heads = key->size(1);
    if (key->size(3) != head_dim || value->size(1) != key_heads || value->size(2) != key->size(2) ||
        !(heads == key_heads || (enable_gqa && divides(key_heads, heads))))
        return {};
    if (attn_mask.given()) {
        const bool known = attn_mask->scalar_type() == at::kBool || attn_mask->scalar_type() == at::kFloat ||
                           attn_mask.like(query);
        if (is_causal || !known ||
            !at::is_expandable_to(attn_mask->sizes(), {batch, heads, query->size(2), key->size(2)}))
            return {};
    }
    return compute([&] {
        Tensor mask = *attn_mask;
        while (mask.defined() && mask.dim() < 4) mask = mask.unsqueeze(0);
        const auto call = [&](auto function) {
            return function(*query, *key, *value, mask.defined() ? OptionalTensor(mask) : std::nullopt,
                            draw_rng(dropout_p), dropout_p, is_causal, scale_of(scale, head_dim));
        };
        return wants_grad({&query, &key, &value, &attn_mask})
                   ? call(scaled_dot_product_attention_grad)
                   : std::get<0>(call(scaled_dot_product_attention_fwd));
    });
}

const Definition definition([](pybind11::module_& m) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("scaled_dot_product_attention_fwd", scaled_dot_product_attention_fwd, release());
    m.def("scaled_dot_product_attention_bwd", scaled_dot_product_attention_bwd, release());
    m.def("scaled_dot_product_attention_grad", released(scaled_dot_product_attention_grad));
    define_direct(m, "scaled_dot_product_attention_direct", scaled_dot_product_attention_direct);
});

}  // namespace
}  // namespace pytorch_ext
