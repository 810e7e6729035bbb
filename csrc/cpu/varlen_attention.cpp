// Attention over sequences laid end to end: what comes from Python and goes back to it.

#include <numeric>

#include "attention_call.h"

namespace pytorch_ext {
namespace {

// A call, with what it points to.
struct Call {
    Attention a{};
    Tensor q_ends, k_ends, lse;
    std::optional<Dropout> dropout;
    std::vector<int> order;
    double products = 0.0;

    Call(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
         const Tensor& cu_seqlens_k, const Tensor& out, const Tensor& lse, const OptionalTensor& rng,
         double dropout_p, bool is_causal, double scale)
        : q_ends(cu_seqlens_q.contiguous()),
          k_ends(cu_seqlens_k.contiguous()),
          lse(lse.contiguous()),
          dropout(make_dropout(rng, dropout_p)) {
        a.dtype = dtype_of(query);
        a.pairs = multiplies_pairs(a.dtype);
        a.batch = cu_seqlens_q.size(0) - 1;
        a.heads = query.size(1);
        a.key_heads = key.size(1);
        a.head_dim = query.size(2);
        a.value_dim = value.size(2);
        a.q_ends = q_ends.const_data_ptr<int>();
        a.k_ends = k_ends.const_data_ptr<int>();
        a.query = heads_of(query);
        a.key = heads_of(key);
        a.value = heads_of(value);
        a.out = heads_of(out);
        a.lse = const_cast<float*>(this->lse.const_data_ptr<float>());
        a.lse_head = this->lse.stride(0);
        a.dropout = dropout ? &*dropout : nullptr;
        a.causal = is_causal;
        a.scale = static_cast<float>(scale);
        a.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
        measure();
    }

    Call(const Call&) = delete;

    // Tokens behind the last sequence.
    Tensor behind_queries(const Tensor& t, int64_t dim) const { return behind(t, dim, a.q_ends); }
    Tensor behind_keys(const Tensor& t) const { return behind(t, 0, a.k_ends); }

private:
    int64_t work(int sequence) const {
        return int64_t(a.q_ends[sequence + 1] - a.q_ends[sequence]) *
               (a.k_ends[sequence + 1] - a.k_ends[sequence]);
    }

    void measure() {
        for (int i = 0; i < a.batch; ++i) {
            a.q_len = std::max<ptrdiff_t>(a.q_len, a.q_ends[i + 1] - a.q_ends[i]);
            a.k_len = std::max<ptrdiff_t>(a.k_len, a.k_ends[i + 1] - a.k_ends[i]);
            products += double(work(i)) * a.heads;
        }
        if (a.threads == 1) return;
        order.resize(a.batch);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return work(x) > work(y); });
        a.order = order.data();
    }

    Tensor behind(const Tensor& t, int64_t dim, const int* ends) const {
        return t.narrow(dim, ends[a.batch], t.size(dim) - ends[a.batch]);
    }
};

void zero_if_any(const Tensor& t) {
    if (t.numel()) t.zero_();
}

}  // namespace

void attend_packed(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
                   const Tensor& cu_seqlens_k, const OptionalTensor& rng, double dropout_p, bool is_causal,
                   double scale, const Tensor& out, const Tensor& lse, bool inference) {
    const Tensor q = with_dense_rows(query), k = with_dense_rows(key), v = with_dense_rows(value);
    Call call(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, rng, dropout_p, is_causal, scale);
    call.a.inference = inference;
    if (call.a.q_ends[call.a.batch] < query.size(0)) {
        call.behind_queries(out, 0).zero_();
        call.behind_queries(lse, 1).fill_(-INFINITY);
    }
    PYTORCH_EXT_CALL(plan_attention_forward, call.a);
    run_items(call.a, call.products, [&](int64_t item, float* scratch) {
        PYTORCH_EXT_CALL(attention_forward, call.a, item, scratch);
    });
}

bool are_ends(const Argument& cu_seqlens, int64_t tokens, int64_t longest) {
    if (!cu_seqlens.given() || cu_seqlens->scalar_type() != at::kInt || cu_seqlens->dim() != 1 ||
        cu_seqlens->numel() < 1 || !cu_seqlens->is_contiguous())
        return false;
    const int* const ends = cu_seqlens->const_data_ptr<int>();
    const int64_t batch = cu_seqlens->numel() - 1;
    for (int64_t i = 0; i < batch; ++i)
        if (ends[i + 1] < ends[i] || int64_t(ends[i + 1]) - ends[i] > longest) return false;
    return ends[0] == 0 && ends[batch] == tokens;
}

namespace {

std::tuple<Tensor, Tensor> varlen_attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                                const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                int64_t, int64_t, const OptionalTensor& rng, double dropout_p,
                                                bool is_causal, double scale) {
    const Tensor out = at::empty({query.size(0), query.size(1), value.size(2)}, query.options());
    const Tensor lse = at::empty({query.size(1), query.size(0)}, query.options().dtype(at::kFloat));
    if (lse.numel() > 0)
        attend_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, rng, dropout_p, is_causal, scale, out,
                      lse);
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_bwd(
    const Tensor& dout, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t, int64_t,
    const OptionalTensor& rng, double dropout_p, bool is_causal, double scale) {
    const Tensor dquery = at::empty(query.sizes(), query.options());
    const Tensor dkey = at::empty(key.sizes(), key.options()),
                 dvalue = at::empty(value.sizes(), value.options());
    if (lse.numel() == 0) return {dquery, dkey.zero_(), dvalue.zero_()};
    const Tensor q = with_dense_rows(query), k = with_dense_rows(key), v = with_dense_rows(value);
    const Tensor rows = with_dense_rows(dout), o = with_dense_rows(out);
    Call call(q, k, v, cu_seqlens_q, cu_seqlens_k, o, lse, rng, dropout_p, is_causal, scale);
    Attention& a = call.a;
    zero_if_any(call.behind_queries(dquery, 0));
    zero_if_any(call.behind_keys(dkey));
    zero_if_any(call.behind_keys(dvalue));
    PYTORCH_EXT_CALL(plan_attention_backward, a);
    Tensor sums;
    if (a.k_len > a.pass_keys) sums = at::zeros({a.parts, dquery.numel()}, query.options().dtype(at::kFloat));
    const AttentionGradients g{heads_of(rows),
                               heads_of(dquery),
                               heads_of(dkey),
                               heads_of(dvalue),
                               sums.defined() ? sums.mutable_data_ptr<float>() : nullptr,
                               dquery.numel(),
                               nullptr};
    run_items(a, call.products, [&](int64_t item, float* scratch) {
        PYTORCH_EXT_CALL(attention_backward, a, g, item, scratch);
    });
    if (sums.defined()) dquery.view({-1}).copy_(a.parts > 1 ? sums.sum(0) : sums[0]);
    return {dquery, dkey, dvalue};
}

Tensors varlen_attention_backward(const Backward& node) {
    const auto& [saved, gradients, constants, wants] = node;
    const auto [dquery, dkey, dvalue] = varlen_attention_bwd(
        gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], 0, 0, saved[7],
        constants[0].toDouble(), constants[1].toBool(), constants[2].toDouble());
    return {dquery, dkey, dvalue};
}

constexpr Formula FORMULA{"VarlenAttentionBackward", varlen_attention_backward};

Tensor varlen_attention_grad(const Tensor& query, const Tensor& key, const Tensor& value,
                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                             int64_t max_seqlen_k, const OptionalTensor& rng, double dropout_p,
                             bool is_causal, double scale) {
    const auto [out, lse] = below_autograd([&] {
        return varlen_attention_fwd(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                    rng, dropout_p, is_causal, scale);
    });
    record(FORMULA, {query, key, value}, {out},
           {query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, or_undefined(rng)},
           {dropout_p, is_causal, scale});
    return out;
}

std::optional<Tensor> varlen_attention_direct(const Argument& query, const Argument& key,
                                              const Argument& value, const Argument& cu_seqlens_q,
                                              const Argument& cu_seqlens_k, int64_t max_seqlen_q,
                                              int64_t max_seqlen_k, Number dropout_p, bool is_causal,
                                              std::optional<Number> scale) {
    if (!usual({&query, &key, &value, &cu_seqlens_q, &cu_seqlens_k}) || !query.floating() ||
        !is_probability(dropout_p))
        return {};
    for (const Argument* t : {&query, &key, &value})
        if (!t->given() || !t->like(query) || (*t)->dim() != 3) return {};
    const int64_t heads = query->size(1), key_heads = key->size(1), head_dim = query->size(2);
    if (key->size(2) != head_dim || value->size(0) != key->size(0) || value->size(1) != key_heads ||
        !(heads == key_heads || divides(key_heads, heads)) ||
        !are_ends(cu_seqlens_q, query->size(0), max_seqlen_q) ||
        !are_ends(cu_seqlens_k, key->size(0), max_seqlen_k) || !cu_seqlens_k.has(cu_seqlens_q->sizes()))
        return {};
    return compute([&] {
        const auto call = [&](auto function) {
            return function(*query, *key, *value, *cu_seqlens_q, *cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                            draw_rng(dropout_p), dropout_p, is_causal, scale_of(scale, head_dim));
        };
        return wants_grad({&query, &key, &value}) ? call(varlen_attention_grad)
                                                  : std::get<0>(call(varlen_attention_fwd));
    });
}

const Definition definition([](pybind11::module_& m) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("varlen_attention_fwd", varlen_attention_fwd, release());
    m.def("varlen_attention_bwd", varlen_attention_bwd, release());
    m.def("varlen_attention_grad", released(varlen_attention_grad));
    define_direct(m, "varlen_attention_direct", varlen_attention_direct);
});

}  // namespace
}  // namespace pytorch_ext
