// dropout_add_layer_norm: layer_norm(residual + dropout(input + input_bias)), and its gradient.

#include "dropout_add_layer_norm.h"

#include "direct.h"
#include "rng.h"
#include "row_work.h"

namespace pytorch_ext {
namespace {

// `mask` gets dropout's, where it is defined.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& residual,
                                                   const Tensor& weight, const OptionalTensor& bias,
                                                   const OptionalTensor& input_bias,
                                                   const std::optional<Dropout>& dropout, const Tensor& mask,
                                                   double eps) {
    const auto dtype = at::promote_types(input.scalar_type(), residual.scalar_type());
    const Tensor out = at::empty(input.sizes(), input.options().dtype(dtype)), sum = at::empty_like(out);
    const auto outer = input.sizes().slice(0, input.dim() - 1);
    const Tensor mean = at::empty(outer, input.options().dtype(at::kFloat)),
                 rstd = at::empty(mean.sizes(), mean.options());
    const Tensor x = input.contiguous(), y = residual.contiguous();
    const Tensor w = as_floats(weight), b = as_floats(bias), c = as_floats(input_bias);
    const int64_t cols = input.size(-1);
    const DropoutAddLayerNorm a{x.const_data_ptr(),
                                y.const_data_ptr(),
                                out.mutable_data_ptr(),
                                sum.mutable_data_ptr(),
                                mean.mutable_data_ptr<float>(),
                                rstd.mutable_data_ptr<float>(),
                                floats(w),
                                floats(b),
                                floats(c),
                                dropout ? &*dropout : nullptr,
                                cols,
                                static_cast<float>(eps),
                                dtype_of(x),
                                dtype_of(y),
                                dtype_of(out),
                                mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr};
    parallel_rows(mean.numel(), cols, [&](int64_t first, int64_t rows) {
        PYTORCH_EXT_CALL(dropout_add_layer_norm_rows, a, first, rows);
    });
    return {out, sum, mean, rstd};
}

// Of `input` and `residual` their dtypes are all that it has to know. `mask` as forward wrote it, or undefined.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const OptionalTensor& dsum, const Tensor& sum, at::ScalarType input_dtype,
    at::ScalarType residual_dtype, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& input_bias, const Tensor& mean, const Tensor& rstd,
    const std::optional<Dropout>& dropout, const Tensor& mask) {
    const Tensor dinput = at::empty(sum.sizes(), sum.options().dtype(input_dtype));
    const Tensor dresidual = at::empty(sum.sizes(), sum.options().dtype(residual_dtype));
    const auto dtype = sum.scalar_type();
    const Tensor dy = dout.to(dtype).contiguous(), x = sum.contiguous(), w = as_floats(weight);
    const Tensor dx = dsum && dsum->defined() ? dsum->to(dtype).contiguous() : Tensor();
    const Tensor means = mean.contiguous(), rstds = rstd.contiguous();
    const int64_t cols = sum.size(-1);
    const DropoutAddLayerNormGradient a{dy.const_data_ptr(),
                                        dx.defined() ? dx.const_data_ptr() : nullptr,
                                        x.const_data_ptr(),
                                        dinput.mutable_data_ptr(),
                                        dresidual.mutable_data_ptr(),
                                        floats(means),
                                        floats(rstds),
                                        floats(w),
                                        dropout ? &*dropout : nullptr,
                                        mask.defined() ? mask.const_data_ptr<uint8_t>() : nullptr,
                                        cols,
                                        dtype_of(dinput),
                                        dtype_of(dresidual),
                                        dtype_of(sum)};
    const RowSums sums(means.numel(), 3, cols);
    const int64_t scratch_bytes = dropout && !mask.defined() ? 4 * mask_bytes(cols) : 0;
    sums.add(scratch_bytes / sizeof(float), [&](int64_t first, int64_t rows, float* partial, float* scratch) {
        PYTORCH_EXT_CALL(dropout_add_layer_norm_gradient, a, first, rows, partial,
                         reinterpret_cast<unsigned char*>(scratch));
    });
    return {dinput, dresidual, sums.of(0, weight, dout), sums.of(1, bias, dout),
            sums.of(2, input_bias, dout)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_fwd(
    const Tensor& input, const Tensor& residual, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& input_bias, const OptionalTensor& rng, double dropout_p, double eps) {
    return forward(input, residual, weight, bias, input_bias, make_dropout(rng, dropout_p), Tensor(), eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_bwd(
    const Tensor& dout, const OptionalTensor& dsum, const Tensor& sum, const Tensor& input,
    const Tensor& residual, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& input_bias, const Tensor& mean, const Tensor& rstd, const OptionalTensor& rng,
    double dropout_p) {
    return backward(dout, dsum, sum, input.scalar_type(), residual.scalar_type(), weight, bias, input_bias,
                    mean, rstd, make_dropout(rng, dropout_p), Tensor());
}

// What it was made of is not saved: a layer would keep two more activations alive, for nothing but their dtypes. Dropout's
// mask is, a bit for each element, because to draw it again costs as much as the rest of backward.
Tensors differentiate(const Backward& node) {
    const auto& [saved, gradients, constants, wants] = node;
    const Tensor &sum = saved[0], &weight = saved[1], &bias = saved[2], &input_bias = saved[3];
    const Tensor &mean = saved[4], &rstd = saved[5], &mask = saved[6];
    const auto input_dtype = static_cast<at::ScalarType>(constants[0].toInt());
    const auto residual_dtype = static_cast<at::ScalarType>(constants[1].toInt());
    const Tensor dsum = gradients.size() > 1 ? gradients[1] : Tensor();
    const Tensor dout = gradients[0].defined() ? gradients[0] : at::zeros_like(sum);
    if (!dsum.defined() && !input_bias.defined() && !mask.defined() && input_dtype == residual_dtype) {
        // Both summands have the gradient of the sum: one tensor for both, as from PyTorch's addition.
        const auto [dinput, dweight, dbias] =
            layer_norm_bwd(dout, sum, {sum.size(-1)}, weight, bias, mean, rstd);
        return {dinput, dinput, dweight, defined_like(bias, dbias), Tensor()};
    }
    std::optional<Dropout> dropout;
    if (mask.defined()) dropout = make_dropout(constants[2].toDouble());
    const auto [dinput, dresidual, dweight, dbias, dinput_bias] = backward(
        dout, dsum, sum, input_dtype, residual_dtype, weight, bias, input_bias, mean, rstd, dropout, mask);
    return {dinput, dresidual, dweight, defined_like(bias, dbias), defined_like(input_bias, dinput_bias)};
}

constexpr Formula FORMULA{"DropoutAddLayerNormBackward", differentiate, true};

std::tuple<Tensor, Tensor> dropout_add_layer_norm_grad(const Tensor& input, const Tensor& residual,
                                                       const Tensor& weight, const OptionalTensor& bias,
                                                       const OptionalTensor& input_bias,
                                                       const OptionalTensor& rng, double dropout_p,
                                                       double eps, bool prenorm) {
    const auto dropout = make_dropout(rng, dropout_p);
    const int64_t cols = input.size(-1);
    const Tensor mask =
        dropout ? at::empty({cols ? input.numel() / cols : 0, mask_bytes(cols)}, at::kByte) : Tensor();
    const auto [out, sum, mean, rstd] = below_autograd(
        [&] { return forward(input, residual, weight, bias, input_bias, dropout, mask, eps); });
    const Tensor b = or_undefined(bias), c = or_undefined(input_bias);
    record(
        FORMULA, {input, residual, weight, b, c}, prenorm ? Tensors{out, sum} : Tensors{out},
        {sum, weight, b, c, mean, rstd, mask},
        {static_cast<int64_t>(input.scalar_type()), static_cast<int64_t>(residual.scalar_type()), dropout_p});
    return {out, sum};
}

std::optional<std::tuple<Tensor, Tensor>> dropout_add_layer_norm_direct(
    const Argument& input, const Argument& residual, const Argument& weight, const Argument& bias,
    const Argument& input_bias, Number dropout_p, bool training, Number eps, bool prenorm) {
    if (!usual({&input, &residual, &weight, &bias, &input_bias}) || !input.floating() || !input->dim() ||
        !is_parameter(residual, input, input->sizes()) || !is_probability(dropout_p))
        return {};
    const auto hidden = input->sizes().slice(input->dim() - 1);
    if (!weight.given() || !is_norm_parameter(weight, input, hidden) ||
        !is_norm_parameter(bias, input, hidden) ||
        (input_bias.given() && !is_parameter(input_bias, input, hidden)))
        return {};
    const double p = training ? dropout_p.value : 0.0;
    return compute([&] {
        const OptionalTensor b = bias.optional(), c = input_bias.optional(), rng = draw_rng(p);
        if (wants_grad({&input, &residual, &weight, &bias, &input_bias}))
            return dropout_add_layer_norm_grad(*input, *residual, *weight, b, c, rng, p, eps, prenorm);
        const auto [out, sum, mean, rstd] =
            dropout_add_layer_norm_fwd(*input, *residual, *weight, b, c, rng, p, eps);
        return std::tuple(out, sum);
    });
}

const Definition definition([](pybind11::module_& m) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("dropout_add_layer_norm_fwd", dropout_add_layer_norm_fwd, release());
    m.def("dropout_add_layer_norm_bwd", dropout_add_layer_norm_bwd, release());
    m.def("dropout_add_layer_norm_grad", released(dropout_add_layer_norm_grad));
    define_direct(m, "dropout_add_layer_norm_direct", dropout_add_layer_norm_direct);
});

}  // namespace
}  // namespace pytorch_ext
