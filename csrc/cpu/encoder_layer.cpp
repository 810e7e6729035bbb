// A layer of an encoder that normalises after each residual sum (Devlin et al. 2018, arXiv 1810.04805), for inference
// over sequences laid end to end: the host pays for one call, where one by one it would pay for ten, and what lies
// between its steps stays in memory that the next layer finds in the cache.

#include <string>

#include "attention_call.h"
#include "dropout_add_layer_norm.h"
#include "product.h"
#include "row_work.h"

namespace pytorch_ext {
namespace {

// Longer batches get memory of their own, so that a thread does not keep the most that it ever needed.
constexpr size_t KEPT_FLOATS = size_t{1} << 24;

// Each part of it begins at a multiple of 64 bytes.
size_t floats_for(int64_t elements, int64_t size) { return (elements * size + 63) / 64 * 16; }

struct Room {
    float* at;

    Tensor take(at::IntArrayRef sizes, const at::TensorOptions& options) {
        float* const from = at;
        at += floats_for(c10::multiply_integers(sizes), options.dtype().itemsize());
        return at::from_blob(from, sizes, options);
    }
};

// to[:, first ...] = activation(x weight^T + bias), `to` (rows, cols).
void multiply_to(const Tensor& to, int64_t first, const Tensor& x, const Tensor& weight,
                 const OptionalTensor& bias, Activation activation) {
    const Tensor layout = laid_out_for_inference(weight), bias_floats = as_floats(bias);
    Epilogue epilogue{floats(bias_floats), activation, nullptr, nullptr, dtype_of(to), to.stride(0)};
    epilogue.out = static_cast<char*>(to.mutable_data_ptr()) + first * to.element_size();
    multiply(matrix_of(x), layout, x.size(0), weight.size(0), weight.size(1), epilogue);
}

// x = layer_norm(residual + x + x_bias), in place.
void add_norm(const Tensor& x, const Tensor& residual, const Tensor& x_bias, const Tensor& weight,
              const OptionalTensor& bias, double eps, const Tensor& statistics) {
    const Tensor w = as_floats(weight), b = as_floats(bias), c = as_floats(x_bias);
    const int64_t rows = x.size(0), cols = x.size(1);
    void* const in_place = x.mutable_data_ptr();
    float* const means = statistics.mutable_data_ptr<float>();
    const Dtype dtype = dtype_of(x);
    const DropoutAddLayerNorm a{in_place,  residual.const_data_ptr(),
                                in_place,  in_place,
                                means,     means + rows,
                                floats(w), floats(b),
                                floats(c), nullptr,
                                cols,      static_cast<float>(eps),
                                dtype,     dtype,
                                dtype};
    parallel_rows(rows, cols, [&](int64_t first, int64_t some) {
        PYTORCH_EXT_CALL(dropout_add_layer_norm_rows, a, first, some);
    });
}

Tensor encoder_layer_fwd(const Tensor& input, const std::vector<Tensor>& in_weights,
                         const std::vector<OptionalTensor>& in_biases, const Tensor& out_weight,
                         const Tensor& out_bias, const Tensor& norm1_weight, const OptionalTensor& norm1_bias,
                         const Tensor& up_weight, const Tensor& up_bias, const Tensor& down_weight,
                         const Tensor& down_bias, const Tensor& norm2_weight,
                         const OptionalTensor& norm2_bias, const Tensor& cu_seqlens, int64_t, int64_t heads,
                         const std::string& activation, bool is_causal, double scale, double eps1,
                         double eps2) {
    const Tensor x = input.contiguous(), out = at::empty(x.sizes(), x.options());
    const int64_t rows = x.size(0), width = x.size(1), inner = up_weight.size(0);
    if (out.numel() == 0) return out;
    const int64_t size = x.element_size();
    const size_t attending = floats_for(rows * 3 * width, size) + floats_for(rows * width, size) +
                             floats_for(rows * heads, sizeof(float));
    const size_t floats = floats_for(rows * width, size) + floats_for(2 * rows, sizeof(float)) +
                          std::max(attending, floats_for(rows * inner, size));
    static thread_local Scratch kept;
    Scratch own;
    Room room{(floats <= KEPT_FLOATS ? kept : own).of(floats)};
    const Tensor middle = room.take({rows, width}, x.options());
    const Tensor statistics = room.take({2 * rows}, x.options().dtype(at::kFloat));
    {
        Room rest = room;
        const Tensor products = rest.take({rows, 3 * width}, x.options());
        const Tensor context = rest.take({rows, heads, width / heads}, x.options());
        const Tensor lse = rest.take({heads, rows}, x.options().dtype(at::kFloat));
        int64_t first = 0;
        for (size_t i = 0; i < in_weights.size(); first += in_weights[i++].size(0))
            multiply_to(products, first, x, in_weights[i], in_biases[i], Activation::none);
        const auto parts = products.view({rows, 3, heads, width / heads}).unbind(1);
        attend_packed(parts[0], parts[1], parts[2], cu_seqlens, cu_seqlens, {}, 0.0, is_causal, scale,
                      context, lse, true);
        multiply_to(middle, 0, context.view({rows, width}), out_weight, {}, Activation::none);
    }
    add_norm(middle, x, out_bias, norm1_weight, norm1_bias, eps1, statistics);
    const Tensor up = room.take({rows, inner}, x.options());  // where attention was
    multiply_to(up, 0, middle, up_weight, up_bias, activation_of(activation));
    multiply_to(out, 0, up, down_weight, {}, Activation::none);
    add_norm(out, middle, down_bias, norm2_weight, norm2_bias, eps2, statistics);
    return out;
}

bool is_matrix(const Argument& weight, const Argument& like, int64_t rows, int64_t cols) {
    return is_parameter(weight, like, {rows, cols});
}

// Ends of sequences of one length.
Argument ends_of_equals(int64_t tokens, int64_t seqlen) {
    if (seqlen < 1 || tokens % seqlen) return {};
    const Tensor ends = at::empty({tokens / seqlen + 1}, at::kInt);
    for (int64_t i = 0; i < ends.numel(); ++i) ends.mutable_data_ptr<int>()[i] = int(i * seqlen);
    return {ends};
}

// The wrapper's caller has looked at what the layer is made of; whether it fits together is looked at here. `input` may
// have any number of dimensions.
std::optional<Tensor> encoder_layer_direct(const Argument& input, const std::vector<Argument>& in_weights,
                                           const std::vector<Argument>& in_biases, const Argument& out_weight,
                                           const Argument& out_bias, const Argument& norm1_weight,
                                           const Argument& norm1_bias, const Argument& up_weight,
                                           const Argument& up_bias, const Argument& down_weight,
                                           const Argument& down_bias, const Argument& norm2_weight,
                                           const Argument& norm2_bias, const Argument& cu_seqlens,
                                           int64_t max_seqlen, int64_t heads, const std::string& activation,
                                           bool is_causal, Number scale, Number eps1, Number eps2) {
    if (!usual({&input, &cu_seqlens}) || !input.floating() || input->dim() < 2 || !input->numel() ||
        wants_grad({&input}))
        return {};
    const int64_t width = input->size(-1), tokens = input->numel() / width;
    const int64_t parts = in_weights.size(), inner = up_bias.given() ? up_bias->numel() : 0;
    const Argument ends = cu_seqlens.given() ? cu_seqlens : ends_of_equals(tokens, max_seqlen);
    if (heads < 1 || width % heads || parts < 1 || (3 * width) % parts ||
        in_biases.size() != in_weights.size() || !known_activation(activation) ||
        !are_ends(ends, tokens, max_seqlen))
        return {};
    std::vector<Tensor> weights;
    std::vector<OptionalTensor> biases;
    for (int64_t i = 0; i < parts; ++i) {
        const Argument &weight = in_weights[i], &bias = in_biases[i];
        if (!is_matrix(weight, input, 3 * width / parts, width) ||
            !is_parameter(bias, input, {3 * width / parts}) || wants_grad({&weight, &bias}))
            return {};
        weights.push_back(*weight);
        biases.push_back(*bias);
    }
    for (const Argument* t : {&out_bias, &norm1_weight, &down_bias, &norm2_weight})
        if (!is_parameter(*t, input, {width})) return {};
    for (const Argument* t : {&norm1_bias, &norm2_bias})
        if (!t->usual || (t->given() && !is_parameter(*t, input, {width}))) return {};
    if (!is_matrix(out_weight, input, width, width) || !is_matrix(up_weight, input, inner, width) ||
        !is_parameter(up_bias, input, {inner}) || !is_matrix(down_weight, input, width, inner) ||
        wants_grad({&out_weight, &out_bias, &norm1_weight, &norm1_bias, &up_weight, &up_bias, &down_weight,
                    &down_bias, &norm2_weight, &norm2_bias}))
        return {};
    return compute([&] {
        return encoder_layer_fwd(input->reshape({-1, width}), weights, biases, *out_weight, *out_bias,
                                 *norm1_weight, norm1_bias.optional(), *up_weight, *up_bias, *down_weight,
                                 *down_bias, *norm2_weight, norm2_bias.optional(), *ends, max_seqlen, heads,
                                 activation, is_causal, scale, eps1, eps2)
            .view(input->sizes());
    });
}

const Definition definition([](pybind11::module_& m) {
    define_direct(m, "encoder_layer_direct", encoder_layer_direct);
    m.def("encoder_layer_fwd", encoder_layer_fwd, pybind11::call_guard<pybind11::gil_scoped_release>());
});

}  // namespace
}  // namespace pytorch_ext
