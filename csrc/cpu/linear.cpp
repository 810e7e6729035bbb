// linear: activation(input @ weight.T + bias) and its gradients.

#include "linear.h"

#include <string>

#include "direct.h"
#include "layouts.h"
#include "pair_products.h"
#include "product.h"

namespace pytorch_ext {

std::optional<Activation> known_activation(const std::string& name) {
    if (name == "none") return Activation::none;
    if (name == "relu") return Activation::relu;
    if (name == "gelu") return Activation::gelu;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    return {};
}

Activation activation_of(const std::string& name) {
    const auto found = known_activation(name);
    TORCH_CHECK_VALUE(found, "activation: expected none, relu, gelu or gelu_tanh, got ", name);
    return *found;
}

Tensor laid_out_for_inference(const Tensor& weight) {
    return laid_out(weight, [&] {
        return lay_out_right(transposed(matrix_of(weight.contiguous())), weight.size(1), weight.size(0),
                             true);
    });
}

namespace {

Epilogue epilogue_to(const Tensor& out, int64_t row) {
    return {nullptr, Activation::none, out.mutable_data_ptr(), nullptr, dtype_of(out), row};
}

std::tuple<Tensor, Tensor> linear_fwd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                      const std::string& activation, bool keep_preactivation, bool frozen) {
    const int64_t n = weight.size(0), k = weight.size(1);
    auto shape = input.sizes().vec();
    shape.back() = n;
    const Tensor out = at::empty(shape, input.options());
    const Tensor preactivation =
        at::empty(keep_preactivation ? shape : std::vector<int64_t>{0}, input.options());
    if (out.numel() == 0) return {out, preactivation};

    const Tensor x = input.contiguous(), bias_floats = as_floats(bias);
    Epilogue epilogue = epilogue_to(out, n);
    epilogue.bias = floats(bias_floats);
    epilogue.activation = activation_of(activation);
    if (keep_preactivation) epilogue.preactivation = preactivation.mutable_data_ptr();
    const Matrix left{x.const_data_ptr(), dtype_of(x), k, 1};
    const int64_t m = out.numel() / n;
    if (frozen)
        multiply(left, laid_out_for_inference(weight), m, n, k, epilogue);
    else
        multiply_once(left, transposed(matrix_of(weight.contiguous())), m, n, k, epilogue);
    return {out, preactivation};
}

// dz = dout * activation'(preactivation) and the sum of its rows in float. Without an activation dz is dout.
std::tuple<Tensor, Tensor> gradient_of_sums(const Tensor& dout, const Tensor& preactivation,
                                            Activation activation, bool with_sums) {
    const int64_t rows = dout.size(0), cols = dout.size(1);
    Tensor dz = dout;
    Gradient gradient{
        dout.const_data_ptr(), nullptr, dtype_of(dout), nullptr, Dtype::float32, activation, cols};
    if (activation != Activation::none) {
        // In float, unless the products that follow want 16 bits.
        dz = at::empty({rows, cols}, dout.options().dtype(
                                         multiplies_pairs(gradient.dtype) ? dout.scalar_type() : at::kFloat));
        gradient.preactivation = preactivation.const_data_ptr();
        gradient.dz = dz.mutable_data_ptr();
        gradient.dz_dtype = dtype_of(dz);
    } else if (!with_sums) {
        return {dz, Tensor()};
    }
    // Sums over few rows at a time, then sums of those: always the same ones, however many threads there are.
    constexpr int64_t CHUNK = 64;
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    const Tensor partial = at::zeros({chunks, cols}, dout.options().dtype(at::kFloat));
    float* const sums = partial.mutable_data_ptr<float>();
    at::parallel_for(
        0, chunks, std::max<int64_t>(1, 32768 / (CHUNK * cols)), [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c)
                PYTORCH_EXT_CALL(linear_gradient, gradient, c * CHUNK, std::min(CHUNK, rows - c * CHUNK),
                                 with_sums ? sums + c * cols : nullptr);
        });
    return {dz, with_sums ? partial.sum(0) : Tensor()};
}

// The matrix unit reads its left matrix by rows. Rows of few different lengths, zeros at their ends, because it has a
// kernel for each length, and batches without padding come in every length.
Tensor transposed_for_tiles(const Tensor& dz) {
    const Tensor columns = at::zeros({dz.size(1), round_up(dz.size(0), 1024)}, dz.options());
    columns.narrow(1, 0, dz.size(0)).copy_(dz.t());
    return columns;
}

// Which gradients somebody asked for; the others stay undefined.
struct Wanted {
    bool dinput = true, dweight = true, dbias = true;
};

std::tuple<Tensor, Tensor, Tensor> differentiate(const Tensor& dout, const Tensor& input,
                                                 const Tensor& weight, const OptionalTensor& bias,
                                                 const Tensor& preactivation, const std::string& activation,
                                                 const Wanted& wanted) {
    const int64_t n = weight.size(0), k = weight.size(1);
    const Tensor dinput = wanted.dinput ? at::empty(input.sizes(), input.options()) : Tensor();
    const Tensor dweight = wanted.dweight ? at::empty({n, k}, weight.options()) : Tensor();
    const bool has_bias = wanted.dbias && bias && bias->defined();
    if (dout.numel() == 0) {
        for (const Tensor& gradient : {dinput, dweight})
            if (gradient.defined()) gradient.zero_();
        return {dinput, dweight, has_bias ? at::zeros({n}, bias->options()) : Tensor()};
    }
    const int64_t m = dout.numel() / n;
    const Tensor x = input.contiguous().view({m, k}), dy = dout.contiguous().view({m, n});
    const Activation kind = activation_of(activation);
    // Where the gradient is one of the products' matrices as it is, the second of them sums it up on its way. (Of one
    // column it lies in rows, and without columns of x there is no product.)
    const bool on_the_way = has_bias && wanted.dweight && kind == Activation::none && n > 1 && k > 0 &&
                            !multiplies_pairs(dtype_of(dout));
    auto [dz, sums] = gradient_of_sums(dy, preactivation, kind, has_bias && !on_the_way);
    if (on_the_way) sums = at::zeros({n}, dout.options().dtype(at::kFloat));
    float* const left_sums = on_the_way ? sums.mutable_data_ptr<float>() : nullptr;

    const Tensor w = weight.contiguous();
    const Matrix rows = matrix_of(dz), columns = transposed(rows);
    if (wanted.dinput && wanted.dweight) {
        const ProductOnce dinputs(rows, matrix_of(w), m, k, n, epilogue_to(dinput, k)),
            dweights(columns, matrix_of(x), n, k, m, epilogue_to(dweight, k), left_sums);
        if (dinputs.is_worth_it() && dweights.is_worth_it()) {
            parallel_items(dinputs.items() + dweights.items(), [&](int64_t item) {
                item < dweights.items() ? dweights.run(item) : dinputs.run(item - dweights.items());
            });
            return {dinput, dweight, has_bias ? sums.to(bias->scalar_type()) : Tensor()};
        }
    }
    if (wanted.dinput) multiply_once(rows, matrix_of(w), m, k, n, epilogue_to(dinput, k));
    if (wanted.dweight && on_tiles(rows.dtype)) {
        const Tensor turned = transposed_for_tiles(dz), inputs = lay_out_right(matrix_of(x), m, k, false);
        multiply(matrix_of(turned), inputs, n, k, round_up(m, TILE), epilogue_to(dweight, k));
    } else if (wanted.dweight) {
        multiply_once(columns, matrix_of(x), n, k, m, epilogue_to(dweight, k), left_sums);
    }
    return {dinput, dweight, has_bias ? sums.to(bias->scalar_type()) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dout, const Tensor& input, const Tensor& weight,
                                              const OptionalTensor& bias, const Tensor& preactivation,
                                              const std::string& activation) {
    auto [dinput, dweight, dbias] = differentiate(dout, input, weight, bias, preactivation, activation, {});
    return {dinput, dweight, dbias.defined() ? dbias : at::empty({0}, dout.options())};
}

// Of frozen weights, as beside LoRA's, no gradient is made.
Tensors linear_backward(const Backward& node) {
    const auto [dinput, dweight, dbias] =
        differentiate(node.gradients[0], node.saved[0], node.saved[1], node.saved[2], node.saved[3],
                      node.constants[0].toStringRef(), {node.wants(0), node.wants(1), node.wants(2)});
    return {dinput, dweight, dbias};
}

constexpr Formula FORMULA{"LinearBackward", linear_backward};

Tensor linear_grad(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const std::string& activation) {
    const auto [out, preactivation] = below_autograd(
        [&] { return linear_fwd(input, weight, bias, activation, activation != "none", false); });
    const Tensor b = or_undefined(bias);
    record(FORMULA, {input, weight, b}, {out}, {input, weight, b, preactivation}, {activation});
    return out;
}

std::optional<Tensor> linear_direct(const Argument& input, const Argument& weight, const Argument& bias,
                                    const std::optional<std::string>& activation) {
    if (!usual({&input, &weight, &bias}) || !input.floating() || !weight.given() || !weight.like(input) ||
        !input->dim() || weight->dim() != 2 || input->size(-1) != weight->size(1) ||
        (bias.given() && !is_parameter(bias, input, weight->sizes().slice(0, 1))))
        return {};
    if (activation && (*activation == "none" || !known_activation(*activation))) return {};
    return compute([&] {
        const OptionalTensor b = bias.optional();
        const std::string name = activation.value_or("none");
        return wants_grad({&input, &weight, &bias})
                   ? linear_grad(*input, *weight, b, name)
                   : std::get<0>(linear_fwd(*input, *weight, b, name, false, true));
    });
}

const Definition definition([](pybind11::module_& m) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("linear_fwd", linear_fwd, release());
    m.def("linear_bwd", linear_bwd, release());
    m.def("linear_grad", released(linear_grad));
    define_direct(m, "linear_direct", linear_direct);
});

}  // namespace
}  // namespace pytorch_ext
