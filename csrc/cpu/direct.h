#pragma once

// The short way of an op: `<op>_direct` takes what its wrapper in pytorch_ext/ops takes, checks it, computes and records,
// and returns what the wrapper returns; or nothing, where anything about the call is unusual. The wrapper then goes the
// long way, which says what is wrong, casts, and lets others look on. Python that a model's tensors have driven out of
// the cache takes 20 to 40 us for that, LayerNorm of 256 rows half of it.

#include <initializer_list>
#include <string_view>

#include "autograd.h"

namespace pytorch_ext {

// A tensor as it came from Python, or None. Anything but a plain tensor for the kernels is unusual: a subclass, another
// device, layout or dtype, one that is a negative in disguise, and what is no tensor at all.
struct Argument {
    Tensor tensor;  // undefined: None, or unusual
    bool usual = true;

    const Tensor* operator->() const { return &tensor; }
    const Tensor& operator*() const { return tensor; }
    bool given() const { return tensor.defined(); }
    OptionalTensor optional() const { return given() ? OptionalTensor(tensor) : std::nullopt; }
    bool has(at::IntArrayRef sizes) const { return tensor.sizes() == sizes; }
    bool floating() const { return given() && tensor.is_floating_point(); }
    bool like(const Argument& other) const { return tensor.scalar_type() == other->scalar_type(); }
};

// A float or an int, as Python takes either for a number.
struct Number {
    double value = 0.0;
    operator double() const { return value; }
};

// Whether all are usual, and nobody traces, transforms, casts or watches what is called.
bool usual(std::initializer_list<const Argument*> arguments);

// Whether a node has to be made.
bool wants_grad(std::initializer_list<const Argument*> inputs);

// Of a norm beside `input`: absent, or of these sizes, in the dtype of `input` or in float32.
inline bool is_norm_parameter(const Argument& parameter, const Argument& input, at::IntArrayRef sizes) {
    return !parameter.given() ||
           (parameter.has(sizes) && (parameter.like(input) || parameter->scalar_type() == at::kFloat));
}

// A parameter of the sizes and dtype that `input` asks for.
inline bool is_parameter(const Argument& parameter, const Argument& input, at::IntArrayRef sizes) {
    return parameter.usual && parameter.given() && parameter.has(sizes) && parameter.like(input);
}

inline bool is_probability(double p) { return p >= 0.0 && p <= 1.0; }

inline bool is_approximation(std::string_view name) { return name == "none" || name == "tanh"; }

// Runs what has been checked, without the GIL.
template <class Work>
auto compute(const Work& work) {
    const pybind11::gil_scoped_release no_gil;
    return work();
}

// Adds `function` to the module: with the exceptions that come out of Python, and for arguments of other types with
// another function, which leaves the call to the wrapper.
template <class Function>
void define_direct(pybind11::module_& m, const char* name, Function function) {
    m.def(name, torch::wrap_pybind_function(function));
    m.def(name, [](const pybind11::args&) { return pybind11::none(); });
}

}  // namespace pytorch_ext

namespace pybind11::detail {

template <>
struct type_caster<pytorch_ext::Argument> {
    PYBIND11_TYPE_CASTER(pytorch_ext::Argument, const_name("torch.Tensor | None"));
    bool load(handle source, bool);
};

template <>
struct type_caster<pytorch_ext::Number> {
    PYBIND11_TYPE_CASTER(pytorch_ext::Number, const_name("float"));
    bool load(handle source, bool);
};

}  // namespace pybind11::detail
