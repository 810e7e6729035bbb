// dropout_add_layer_norm: layer_norm(residual + dropout(input + input_bias)), and its gradient.

#include "dropout_add_layer_norm.h"

#include "rng.h"
#include "row_work.h"

namespace pytorch_ext {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_fwd(
    const Tensor& input, const Tensor& residual, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& input_bias, const OptionalTensor& rng, double dropout_p, double eps) {
    const auto dtype = at::promote_types(input.scalar_type(), residual.scalar_type());
    const Tensor out = at::empty(input.sizes(), input.options().dtype(dtype)), sum = at::empty_like(out);
    const auto outer = input.sizes().slice(0, input.dim() - 1);
    const Tensor mean = at::empty(outer, input.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
    const Tensor x = input.contiguous(), y = residual.contiguous();
    const Tensor w = as_floats(weight), b = as_floats(bias), c = as_floats(input_bias);
    const auto dropout = make_dropout(rng, dropout_p);
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
                                dtype_of(out)};
    parallel_rows(mean.numel(), cols, [&](int64_t first, int64_t rows) {
        PYTORCH_EXT_CALL(dropout_add_layer_norm_rows, a, first, rows);
    });
    return {out, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_bwd(
    const Tensor& dout, const OptionalTensor& dsum, const Tensor& sum, const Tensor& input,
    const Tensor& residual, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& input_bias, const Tensor& mean, const Tensor& rstd, const OptionalTensor& rng,
    double dropout_p) {
    const Tensor dinput = at::empty(input.sizes(), input.options());
    const Tensor dresidual = at::empty(residual.sizes(), residual.options());
    const auto dtype = sum.scalar_type();
    const Tensor dy = dout.to(dtype).contiguous(), x = sum.contiguous(), w = as_floats(weight);
    const Tensor dx = dsum && dsum->defined() ? dsum->to(dtype).contiguous() : Tensor();
    const Tensor means = mean.contiguous(), rstds = rstd.contiguous();
    const auto dropout = make_dropout(rng, dropout_p);
    const int64_t cols = input.size(-1);
    const DropoutAddLayerNormGradient a{dy.const_data_ptr(),
                                        dx.defined() ? dx.const_data_ptr() : nullptr,
                                        x.const_data_ptr(),
                                        dinput.mutable_data_ptr(),
                                        dresidual.mutable_data_ptr(),
                                        floats(means),
                                        floats(rstds),
                                        floats(w),
                                        dropout ? &*dropout : nullptr,
                                        cols,
                                        dtype_of(input),
                                        dtype_of(residual),
                                        dtype_of(sum)};
    const RowSums sums(means.numel(), 3, cols);
    sums.add(dropout ? 4 * cols : 0, [&](int64_t first, int64_t rows, float* partial, float* scratch) {
        PYTORCH_EXT_CALL(dropout_add_layer_norm_gradient, a, first, rows, partial, scratch);
    });
    return {dinput, dresidual, sums.of(0, weight, dout), sums.of(1, bias, dout),
            sums.of(2, input_bias, dout)};
}

const Definition definition([](pybind11::module_& m) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("dropout_add_layer_norm_fwd", dropout_add_layer_norm_fwd, release());
    m.def("dropout_add_layer_norm_bwd", dropout_add_layer_norm_bwd, release());
});

}  // namespace
}  // namespace pytorch_ext
