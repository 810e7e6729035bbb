// layer_norm: layer normalisation over the last dimensions, and its gradient.

#include "layer_norm.h"

#include "direct.h"
#include "row_work.h"

namespace pytorch_ext {
namespace {

int64_t product(at::IntArrayRef sizes) { return c10::multiply_integers(sizes); }

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& input,
                                                  const std::vector<int64_t>& normalized_shape,
                                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                                  double eps) {
    const auto outer = input.sizes().slice(0, input.dim() - normalized_shape.size());
    const Tensor out = at::empty(input.sizes(), input.options());
    const Tensor mean = at::empty(outer, input.options().dtype(at::kFloat)),
                 rstd = at::empty(mean.sizes(), mean.options());
    const Tensor x = input.contiguous(), w = as_floats(weight), b = as_floats(bias);
    const int64_t cols = product(normalized_shape);
    const LayerNorm a{x.const_data_ptr(),
                      out.mutable_data_ptr(),
                      mean.mutable_data_ptr<float>(),
                      rstd.mutable_data_ptr<float>(),
                      floats(w),
                      floats(b),
                      cols,
                      static_cast<float>(eps),
                      dtype_of(x)};
    parallel_rows(mean.numel(), cols,
                  [&](int64_t first, int64_t rows) { PYTORCH_EXT_CALL(layer_norm_rows, a, first, rows); });
    return {out, mean, rstd};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dout, const Tensor& input,
                                                  const std::vector<int64_t>& normalized_shape,
                                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                                  const Tensor& mean, const Tensor& rstd) {
    const Tensor dinput = at::empty(input.sizes(), input.options());
    const Tensor dy = dout.contiguous(), x = input.contiguous(), w = as_floats(weight);
    const Tensor means = mean.contiguous(), rstds = rstd.contiguous();
    const int64_t cols = product(normalized_shape);
    const LayerNormGradient a{dy.const_data_ptr(),
                              x.const_data_ptr(),
                              dinput.mutable_data_ptr(),
                              floats(means),
                              floats(rstds),
                              floats(w),
                              cols,
                              dtype_of(x)};
    const RowSums sums(means.numel(), 2, cols);
    sums.add(0, [&](int64_t first, int64_t rows, float* partial, float*) {
        PYTORCH_EXT_CALL(layer_norm_gradient, a, first, rows, partial);
    });
    return {dinput, sums.of(0, weight, dout), sums.of(1, bias, dout)};
}

namespace {

Tensors layer_norm_backward(const Backward& node) {
    const Tensor& input = node.saved[0];
    const auto shape = input.sizes().slice(input.dim() - node.constants[0].toInt()).vec();
    auto [dinput, dweight, dbias] = layer_norm_bwd(node.gradients[0], input, shape, node.saved[1],
                                                   node.saved[2], node.saved[3], node.saved[4]);
    return {dinput, defined_like(node.saved[1], dweight), defined_like(node.saved[2], dbias)};
}

constexpr Formula FORMULA{"LayerNormBackward", layer_norm_backward};

Tensor layer_norm_grad(const Tensor& input, const std::vector<int64_t>& normalized_shape,
                       const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
    const auto [out, mean, rstd] =
        below_autograd([&] { return layer_norm_fwd(input, normalized_shape, weight, bias, eps); });
    const Tensor w = or_undefined(weight), b = or_undefined(bias);
    record(FORMULA, {input, w, b}, {out}, {input, w, b, mean, rstd},
           {static_cast<int64_t>(normalized_shape.size())});
    return out;
}

// An int or a sequence of ints; nothing if it is none, or empty.
std::vector<int64_t> sizes_of(pybind11::handle shape) {
    if (PyLong_CheckExact(shape.ptr())) return {shape.cast<int64_t>()};
    std::vector<int64_t> sizes;
    if (!PyTuple_Check(shape.ptr()) && !PyList_Check(shape.ptr())) return {};
    for (const pybind11::handle size : shape) {
        if (!PyLong_CheckExact(size.ptr())) return {};
        sizes.push_back(size.cast<int64_t>());
    }
    return sizes;
}

std::optional<Tensor> layer_norm_direct(const Argument& input, pybind11::handle normalized_shape,
                                        const Argument& weight, const Argument& bias, Number eps) {
    if (!usual({&input, &weight, &bias}) || !input.floating()) return {};
    const auto shape = sizes_of(normalized_shape);
    const int64_t outer = input->dim() - static_cast<int64_t>(shape.size());
    if (shape.empty() || outer < 0 || input->sizes().slice(outer) != shape ||
        !is_norm_parameter(weight, input, shape) || !is_norm_parameter(bias, input, shape))
        return {};
    return compute([&] {
        const OptionalTensor w = weight.optional(), b = bias.optional();
        return wants_grad({&input, &weight, &bias}) ? layer_norm_grad(*input, shape, w, b, eps)
                                                    : std::get<0>(layer_norm_fwd(*input, shape, w, b, eps));
    });
}

const Definition definition([](pybind11::module_& m) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("layer_norm_fwd", layer_norm_fwd, release());
    m.def("layer_norm_bwd", layer_norm_bwd, release());
    m.def("layer_norm_grad", released(layer_norm_grad));
    define_direct(m, "layer_norm_direct", layer_norm_direct);
});

}  // namespace
}  // namespace pytorch_ext
