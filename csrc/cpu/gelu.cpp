// gelu: the Gaussian error linear unit, exact or by tanh, and its gradient.

#include "gelu.h"

#include <string>

#include "direct.h"
#include "row_work.h"

namespace pytorch_ext {
namespace {

Tensor gelu_fwd(const Tensor& input, const std::string& approximate) {
    const Tensor out = at::empty(input.sizes(), input.options());
    const Tensor x = input.contiguous();
    const Gelu a{nullptr, x.const_data_ptr(), out.mutable_data_ptr(), approximate == "tanh", dtype_of(x)};
    at::parallel_for(0, x.numel(), ENOUGH, [&](int64_t begin, int64_t end) {
        PYTORCH_EXT_CALL(gelu_elements, a, begin, end - begin);
    });
    return out;
}

Tensor gelu_bwd(const Tensor& dout, const Tensor& input, const std::string& approximate) {
    const Tensor dinput = at::empty(input.sizes(), input.options());
    const Tensor dy = dout.contiguous(), x = input.contiguous();
    const Gelu a{dy.const_data_ptr(), x.const_data_ptr(), dinput.mutable_data_ptr(), approximate == "tanh",
                 dtype_of(x)};
    at::parallel_for(0, x.numel(), ENOUGH, [&](int64_t begin, int64_t end) {
        PYTORCH_EXT_CALL(gelu_gradient, a, begin, end - begin);
    });
    return dinput;
}

Tensors gelu_backward(const Backward& node) {
    return {gelu_bwd(node.gradients[0], node.saved[0], node.constants[0].toStringRef())};
}

constexpr Formula FORMULA{"GeluBackward", gelu_backward};

Tensor gelu_grad(const Tensor& input, const std::string& approximate) {
    const Tensor out = below_autograd([&] { return gelu_fwd(input, approximate); });
    record(FORMULA, {input}, {out}, {input}, {approximate});
    return out;
}

std::optional<Tensor> gelu_direct(const Argument& input, const std::string& approximate) {
    if (!usual({&input}) || !input.floating() || !is_approximation(approximate)) return {};
    return compute([&] {
        return wants_grad({&input}) ? gelu_grad(*input, approximate) : gelu_fwd(*input, approximate);
    });
}

const Definition definition([](pybind11::module_& m) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("gelu_fwd", gelu_fwd, release());
    m.def("gelu_bwd", gelu_bwd, release());
    m.def("gelu_grad", released(gelu_grad));
    define_direct(m, "gelu_direct", gelu_direct);
});

}  // namespace
}  // namespace pytorch_ext
