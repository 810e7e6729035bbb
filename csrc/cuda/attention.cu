// Scaled dot-product attention over dense batches (Vaswani et al. 2017, arXiv 1706.03762), and its gradients.

#if defined(PYTORCH_EXT_CUDA_HOST) && !defined(PYTORCH_EXT_SHORT_LENGTH)
#define PYTORCH_EXT_SHORT_LENGTH 64
#endif
#include "attention_kernels.cuh"

namespace pytorch_ext::cuda {
namespace {

// --- Launchers --------------------------------------------------------------------------------------------------

// A mask of keys, the same for every query: bool, and broadcasting to (B, H, L, S).
void take_mask(Problem& p, const OptionalTensor& mask) {
    if (!mask) return;
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool,
                    "backend 'cuda': attn_mask: expected dtype bool, got another");
    const auto stride = [&](int64_t d) { return mask->size(d) > 1 ? mask->stride(d) : 0; };
    STD_TORCH_CHECK(stride(2) == 0,
                    "backend 'cuda': attn_mask: expected one that is the same for every query");
    STD_TORCH_CHECK(p.group == 1 || stride(1) == 0,
                    "backend 'cuda': attn_mask: expected one that is the same for heads that share keys");
    p.mask = static_cast<const uint8_t*>(mask->data_ptr());
    p.mask_of_batch = stride(0);
    p.mask_of_head = stride(1);
    p.mask_of_key = stride(3);
}

AttentionCall call_of(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
                      const Tensor& out, const Tensor& lse, const Mask& drops, bool is_causal, double scale) {
    const int64_t heads = query.size(1), q_len = query.size(2), k_len = key.size(2);
    Problem p{};
    p.sequences = static_cast<int>(query.size(0));
    p.heads = static_cast<int>(heads);
    p.group = static_cast<int>(heads / key.size(1));
    p.q_len = q_len;
    p.k_len = k_len;
    take_mask(p, mask);
    p.causal = is_causal;
    p.scale = score_scale(scale);
    p.dropout = drops.dropout;
    return {p, q_len, k_len, scale, OwnedHeads(query), OwnedHeads(key), OwnedHeads(value), out, lse};
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const OptionalTensor& attn_mask, const OptionalTensor& rng,
                                         double dropout_p, bool is_causal, double scale) {
    const OnDevice device(query);
    const int64_t batch = query.size(0), heads = query.size(1), q_len = query.size(2);
    const Tensor rows = new_empty(query, Sizes{batch, q_len, heads, value.size(3)});
    const Tensor out = torch::stable::transpose(rows, 1, 2);
    const Tensor lse = new_empty(query, Sizes{batch, heads, q_len}, ScalarType::Float);
    if (lse.numel() > 0)
        attend(call_of(query, key, value, attn_mask, out, lse, Mask(rng, dropout_p), is_causal, scale));
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& query,
                                                         const Tensor& key, const Tensor& value,
                                                         const OptionalTensor& attn_mask, const Tensor& out,
                                                         const Tensor& lse, const OptionalTensor& rng,
                                                         double dropout_p, bool is_causal, double scale,
                                                         bool need_dmask) {
    const OnDevice device(query);
    STD_TORCH_CHECK(!need_dmask, "backend 'cuda': attn_mask: expected one that needs no gradient");
    const Tensor dq = new_empty(query, query.sizes()), dk = new_empty(key, key.sizes());
    const Tensor dv = new_empty(value, value.sizes());
    if (lse.numel() > 0) {
        const Mask drops(rng, dropout_p);
        differentiate(call_of(query, key, value, attn_mask, out, dense(lse), drops, is_causal, scale), dout,
                      dq, dk, dv);
    } else {
        for (const Tensor& gradient : {dk, dv}) filled(gradient, 0.0);
    }
    return {dq, dk, dv, new_empty(dout, Sizes{0})};
}

}  // namespace

// --- Registration -----------------------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_FRAGMENT(PYTORCH_EXT_OPS, m) {
    m.def(
        "scaled_dot_product_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? "
        "rng,"
        " float dropout_p, bool is_causal, float scale) -> (Tensor out, Tensor lse)");
    m.def(
        "scaled_dot_product_attention_bwd(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor? "
        "attn_mask,"
        " Tensor out, Tensor lse, Tensor? rng, float dropout_p, bool is_causal, float scale, bool need_dmask)"
        " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dmask)");
}

STABLE_TORCH_LIBRARY_IMPL(PYTORCH_EXT_OPS, PYTORCH_EXT_KEY, m) {
    m.impl("scaled_dot_product_attention_fwd", TORCH_BOX(&attention_fwd));
    m.impl("scaled_dot_product_attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace pytorch_ext::cuda
