// A layer of an encoder that normalises after each residual sum (Devlin et al. 2018, arXiv 1810.04805), for inference
// over sequences laid end to end, as one op: the host pays for one call, where one by one it would pay for ten.
//
// Products are cuBLAS's, attention and GELU this library's ops. All are called through the dispatcher, which is what the
// stable ABI has for that. They allocate their results, and each is let go of after its last use, so the allocator gives
// its memory to the next: no less than one workspace would, whose parts would cost a call each to name.

#ifdef PYTORCH_EXT_CUDA_HOST  // there the attention that it calls has no other dtype
#define PYTORCH_EXT_ONLY_BFLOAT16
#endif
#include "norms.cuh"

#define PYTORCH_EXT_IN_WORDS(name) #name
#define PYTORCH_EXT_NAME(space, name) PYTORCH_EXT_IN_WORDS(space) "::" name

namespace pytorch_ext::cuda {
namespace {

// --- Kernels ----------------------------------------------------------------------------------------------------

// out = layer_norm(residual + x + x_bias), whose sum is rounded before it is normalised, as where gradients are needed.
// It may lie where x does: a thread writes the chunks that it has read.
// Plan: at most 96 registers, for five blocks of 128 threads at once.
template <class L>
__global__ void __launch_bounds__(L::THREADS)
    encoder_layer_fwd_kernel(Rows<const typename L::T> x, Rows<const typename L::T> residual,
                             Parameter x_bias, Parameter w, Parameter b, Rows<typename L::T> out,
                             int64_t rows, int cols, float eps, bool aligned) {
    using T = typename L::T;
    const Place<L> at;
    if (at.row >= rows) return;
    uint4 x_chunks[L::CHUNKS], residual_chunks[L::CHUNKS];
    load_row(x_chunks, x[at.row], at, cols, aligned);
    load_row(residual_chunks, residual[at.row], at, cols, aligned);
    float row[L::E];
#pragma unroll
    for (int c = 0; c < L::CHUNKS; ++c) {
        auto& chunk = chunk_of<L>(row, c);
        widen<T>(chunk, x_chunks[c]);
        if (x_bias.data) {
            float bias[L::V];
            load_parameter<T>(bias, x_bias, at.col(c), cols, aligned);
#pragma unroll
            for (int i = 0; i < L::V; ++i) chunk[i] += bias[i];
        }
        float others[L::V];
        widen<T>(others, residual_chunks[c]);
#pragma unroll
        for (int i = 0; i < L::V; ++i) chunk[i] = rounded<T>(chunk[i] + others[i]);
    }
    normalize<L>(row, moments<L>(row, at, cols, eps), w, b, at, cols, aligned);
    store_row<L>(out[at.row], row, at, cols, aligned);
}

// --- Launchers --------------------------------------------------------------------------------------------------

template <class T>
StableIValue stable(const T& x) {
    return torch::stable::detail::from(x);
}

// Of an op with one result.
template <size_t COUNT>
Tensor dispatched(const char* name, std::array<StableIValue, COUNT> arguments) {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", arguments.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(arguments[0]);
}

Tensor aten_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    return dispatched<3>("aten::linear", {stable(x), stable(weight), stable(bias)});
}

Tensor up_projection(const Tensor& x, const Tensor& weight, const Tensor& bias, const Word& activation) {
    if (activation == "relu") return dispatched<1>("aten::relu_", {stable(aten_linear(x, weight, bias))});
    const std::string form = activation == "gelu_tanh" ? "tanh" : "none";
    return dispatched<3>(PYTORCH_EXT_NAME(PYTORCH_EXT_OPS, "bias_gelu_fwd"),
                         {stable(aten_linear(x, weight, std::nullopt)), stable(bias), stable(form)});
}

// Columns of a matrix from `first` on as heads (tokens, heads, head_dim). The matrix has to live on.
Tensor columns_as_heads(const Tensor& x, int64_t first, int64_t heads, int64_t width) {
    const int64_t head_dim = width / heads;
    char* data = static_cast<char*>(x.data_ptr()) + first * x.element_size();
    return torch::stable::from_blob(data, Sizes{x.size(0), heads, head_dim}, Sizes{x.stride(0), head_dim, 1},
                                    x.device(), x.scalar_type());
}

Tensor self_attention(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                      const Tensor& cu_seqlens, int64_t max_seqlen, int64_t heads, bool is_causal,
                      double scale) {
    std::vector<Tensor> products, parts;
    for (size_t i = 0; i < weights.size(); ++i) products.push_back(aten_linear(x, weights[i], biases[i]));
    const int64_t width = weights[0].size(0) * weights.size() / 3;
    for (int64_t i = 0; i < 3; ++i)
        parts.push_back(products.size() == 3 ? columns_as_heads(products[i], 0, heads, width)
                                             : columns_as_heads(products[0], i * width, heads, width));
    std::array<StableIValue, 11> arguments{
        stable(parts[0]),   stable(parts[1]),   stable(parts[2]),   stable(cu_seqlens),
        stable(cu_seqlens), stable(max_seqlen), stable(max_seqlen), stable(OptionalTensor()),
        stable(0.0),        stable(is_causal),  stable(scale)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(PYTORCH_EXT_NAME(PYTORCH_EXT_OPS, "varlen_attention_fwd"),
                                                 "", arguments.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(arguments[1]);  // takes the statistics over, to let go of them
    const Tensor context = torch::stable::detail::to<Tensor>(arguments[0]);
    return torch::stable::view(context, Sizes{x.size(0), width});
}

// layer_norm(residual + x weight^T + bias).
Tensor add_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& residual,
                const Tensor& norm_weight, const OptionalTensor& norm_bias, double eps) {
    const Tensor product = aten_linear(x, weight, std::nullopt);
    const int64_t rows = product.size(0);
    const int cols = row_width(product.sizes().slice(1));
    const Matrix into(product, cols), others(residual, cols);
    const ScalarType dtype = product.scalar_type();
    const OwnedParameter x_bias(bias, dtype), w(norm_weight, dtype), b(norm_bias, dtype);
    with_layout(dtype, cols, [&](auto layout) {
        using L = decltype(layout);
        using T = typename L::T;
        // Grid: blocks of rows.
        launch(encoder_layer_fwd_kernel<L>,
               Launch{row_blocks<L>(rows), threads_for<L>(cols), shared_for_row_sum<L>(), current_stream(x)},
               into.rows<const T>(), others.rows<const T>(), x_bias, w, b, into.rows<T>(), rows, cols, eps,
               all_aligned(into, others, x_bias, w, b));
    });
    return product;
}

Tensor encoder_layer_fwd(const Tensor& input, const std::vector<Tensor>& in_weights,
                         const std::vector<Tensor>& in_biases, const Tensor& out_weight,
                         const Tensor& out_bias, const Tensor& norm1_weight, const OptionalTensor& norm1_bias,
                         const Tensor& up_weight, const Tensor& up_bias, const Tensor& down_weight,
                         const Tensor& down_bias, const Tensor& norm2_weight,
                         const OptionalTensor& norm2_bias, const Tensor& cu_seqlens, int64_t max_seqlen,
                         int64_t heads, const Word& activation, bool is_causal, double scale, double eps1,
                         double eps2) {
    const OnDevice device(input);
    const Tensor x = dense(input);
    if (x.numel() == 0) return new_empty(x, x.sizes());
    const Tensor middle =
        add_norm(self_attention(x, in_weights, in_biases, cu_seqlens, max_seqlen, heads, is_causal, scale),
                 out_weight, out_bias, x, norm1_weight, norm1_bias, eps1);
    return add_norm(up_projection(middle, up_weight, up_bias, activation), down_weight, down_bias, middle,
                    norm2_weight, norm2_bias, eps2);
}

}  // namespace

// --- Registration -----------------------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_FRAGMENT(PYTORCH_EXT_OPS, m) {
    m.def(
        "encoder_layer_fwd(Tensor input, Tensor[] in_weights, Tensor[] in_biases, Tensor out_weight, Tensor "
        "out_bias,"
        " Tensor norm1_weight, Tensor? norm1_bias, Tensor up_weight, Tensor up_bias, Tensor down_weight, "
        "Tensor down_bias,"
        " Tensor norm2_weight, Tensor? norm2_bias, Tensor cu_seqlens, SymInt max_seqlen, int heads, str "
        "activation,"
        " bool is_causal, float scale, float eps1, float eps2) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(PYTORCH_EXT_OPS, PYTORCH_EXT_KEY, m) {
    m.impl("encoder_layer_fwd", TORCH_BOX(&encoder_layer_fwd));
}

}  // namespace pytorch_ext::cuda
