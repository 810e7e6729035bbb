// Attention over sequences laid end to end and told apart by cu_seqlens (Dao 2023, arXiv 2307.08691), and its gradients,
// by the kernels of attention.cu. Tokens behind the last sequence get zeros.

#include "attention.cuh"
// On the CPU each file becomes a library of its own.
#if defined(PYTORCH_EXT_CUDA_HOST) && !defined(PYTORCH_EXT_ONLY_HEAD)
#define PYTORCH_EXT_ONLY_BFLOAT16
#define PYTORCH_EXT_ONLY_HEAD 32
#include "attention_kernels.cuh"
#endif

namespace pytorch_ext::cuda {
namespace {

// --- Launchers --------------------------------------------------------------------------------------------------

// With what it points to.
struct Lengths {
    Tensor cu_q, cu_k;
    int64_t longest_q, longest_k;
};

AttentionCall call_of(const Tensor& query, const Tensor& key, const Tensor& value, const Lengths& lengths,
                      const Tensor& out, const Tensor& lse, const Mask& drops, bool is_causal, double scale) {
    Problem p{};
    p.cu_q = static_cast<const int32_t*>(lengths.cu_q.data_ptr());
    p.cu_k = static_cast<const int32_t*>(lengths.cu_k.data_ptr());
    p.sequences = static_cast<int>(lengths.cu_q.numel() - 1);
    p.heads = static_cast<int>(query.size(1));
    p.group = static_cast<int>(query.size(1) / key.size(1));
    p.q_len = query.size(0);
    p.k_len = key.size(0);
    p.causal = is_causal;
    p.scale = score_scale(scale);
    p.dropout = drops.dropout;
    const OwnedHeads q(query), k(key), v(value);
    return {p, lengths.longest_q, lengths.longest_k, scale, q, k, v, out, lse};
}

std::tuple<Tensor, Tensor> varlen_attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                                const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                const OptionalTensor& rng, double dropout_p, bool is_causal,
                                                double scale) {
    const OnDevice device(query);
    const int64_t total = query.size(0), heads = query.size(1);
    const Tensor out = new_empty(query, Sizes{total, heads, value.size(2)});
    const Tensor lse = new_empty(query, Sizes{heads, total}, ScalarType::Float);
    if (lse.numel() > 0) {
        const Lengths lengths{dense(cu_seqlens_q), dense(cu_seqlens_k), max_seqlen_q, max_seqlen_k};
        attend(call_of(query, key, value, lengths, out, lse, Mask(rng, dropout_p), is_causal, scale));
    }
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_bwd(
    const Tensor& dout, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, const OptionalTensor& rng, double dropout_p, bool is_causal, double scale) {
    const OnDevice device(query);
    const Tensor dq = new_empty(query, query.sizes()), dk = new_empty(key, key.sizes());
    const Tensor dv = new_empty(value, value.sizes());
    if (lse.numel() > 0) {
        const Lengths lengths{dense(cu_seqlens_q), dense(cu_seqlens_k), max_seqlen_q, max_seqlen_k};
        const Mask drops(rng, dropout_p);
        differentiate(call_of(query, key, value, lengths, out, dense(lse), drops, is_causal, scale), dout, dq,
                      dk, dv);
    } else {
        for (const Tensor& gradient : {dk, dv}) filled(gradient, 0.0);
    }
    return {dq, dk, dv};
}

}  // namespace

// --- Registration -----------------------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_FRAGMENT(PYTORCH_EXT_OPS, m) {
    m.def(
        "varlen_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor "
        "cu_seqlens_k,"
        " SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? rng, float dropout_p, bool is_causal, float "
        "scale)"
        " -> (Tensor out, Tensor lse)");
    m.def(
        "varlen_attention_bwd(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
        " Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? rng,"
        " float dropout_p, bool is_causal, float scale) -> (Tensor dquery, Tensor dkey, Tensor dvalue)");
}

STABLE_TORCH_LIBRARY_IMPL(PYTORCH_EXT_OPS, PYTORCH_EXT_KEY, m) {
    m.impl("varlen_attention_fwd", TORCH_BOX(&varlen_attention_fwd));
    m.impl("varlen_attention_bwd", TORCH_BOX(&varlen_attention_bwd));
}

}  // namespace pytorch_ext::cuda
