// bias_gelu: gelu(input + bias), and its gradients.

#include "bias_gelu.h"

#include <string>

#include "direct.h"
#include "row_work.h"

namespace pytorch_ext {
namespace {

Tensor bias_gelu_fwd(const Tensor& input, const Tensor& bias, const std::string& approximate) {
    const Tensor out = at::empty(input.sizes(), input.options());
    const Tensor x = input.contiguous(), b = as_floats(bias);
    const int64_t cols = input.size(-1);
    const BiasGelu a{nullptr, x.const_data_ptr(),    floats(b),  out.mutable_data_ptr(),
                     cols,    approximate == "tanh", dtype_of(x)};
    parallel_rows(cols ? x.numel() / cols : 0, cols,
                  [&](int64_t first, int64_t rows) { PYTORCH_EXT_CALL(bias_gelu_rows, a, first, rows); });
    return out;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& dout, const Tensor& input, const Tensor& bias,
                                         const std::string& approximate) {
    const Tensor dinput = at::empty(input.sizes(), input.options());
    const Tensor dy = dout.contiguous(), x = input.contiguous(), b = as_floats(bias);
    const int64_t cols = input.size(-1);
    const BiasGelu a{dy.const_data_ptr(),   x.const_data_ptr(), floats(b), dinput.mutable_data_ptr(), cols,
                     approximate == "tanh", dtype_of(x)};
    const RowSums sums(cols ? x.numel() / cols : 0, 1, cols);
    sums.add(0, [&](int64_t first, int64_t rows, float* partial, float*) {
        PYTORCH_EXT_CALL(bias_gelu_gradient, a, first, rows, partial);
    });
    return {dinput, sums.of(0, bias, dout)};
}

Tensors bias_gelu_backward(const Backward& node) {
    const auto [dinput, dbias] =
        bias_gelu_bwd(node.gradients[0], node.saved[0], node.saved[1], node.constants[0].toStringRef());
    return {dinput, dbias};
}

constexpr Formula FORMULA{"BiasGeluBackward", bias_gelu_backward};

Tensor bias_gelu_grad(const Tensor& input, const Tensor& bias, const std::string& approximate) {
    const Tensor out = below_autograd([&] { return bias_gelu_fwd(input, bias, approximate); });
    record(FORMULA, {input, bias}, {out}, {input, bias}, {approximate});
    return out;
}

std::optional<Tensor> bias_gelu_direct(const Argument& input, const Argument& bias,
                                       const std::string& approximate) {
    if (!usual({&input, &bias}) || !input.floating() || !input->dim() || !is_approximation(approximate) ||
        !is_parameter(bias, input, input->sizes().slice(input->dim() - 1)))
        return {};
    return compute([&] {
        return wants_grad({&input, &bias}) ? bias_gelu_grad(*input, *bias, approximate)
                                           : bias_gelu_fwd(*input, *bias, approximate);
    });
}

const Definition definition([](pybind11::module_& m) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("bias_gelu_fwd", bias_gelu_fwd, release());
    m.def("bias_gelu_bwd", bias_gelu_bwd, release());
    m.def("bias_gelu_grad", released(bias_gelu_grad));
    define_direct(m, "bias_gelu_direct", bias_gelu_direct);
});

}  // namespace
}  // namespace pytorch_ext
