#pragma once

// How the ops are differentiated. `<op>_grad` takes what `<op>_fwd` takes and returns what its caller wants, as a node of
// PyTorch's graph that runs the kernels of `<op>_bwd`: what a torch.autograd.Function in Python does as well, for several
// times the host's time. autograd.cpp alone includes PyTorch's headers for it, which take long to compile.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/Exceptions.h>

#include <functional>
#include <string>

#include "module.h"

namespace pytorch_ext {

using Tensors = std::vector<Tensor>;
using Constants = std::vector<c10::IValue>;  // numbers and strings

// A node while backward runs through it.
struct Backward {
    Tensors saved, gradients;  // a gradient may be undefined where the formula says so
    Constants constants;
    std::function<bool(size_t)> wants;  // whether somebody asked for the gradient of this input
};

struct Formula {
    const char* name;  // as PyTorch calls a node of its own: LayerNormBackward
    // The gradients of the inputs, in their order; undefined where there is none.
    Tensors (*backward)(const Backward&);
    bool takes_undefined = false;  // else a gradient that nobody has comes as zeros
};

// Makes `outputs`, fresh tensors, results of `inputs`, of which some may be undefined. `saved` are given to the formula
// again; SavedVariable looks after them as after PyTorch's own.
void record(const Formula& formula, const Tensors& inputs, const Tensors& outputs, Tensors saved,
            Constants constants);

inline Tensor or_undefined(const OptionalTensor& t) { return t.value_or(Tensor()); }

// The gradient of what may be absent, and has none then.
inline Tensor defined_like(const Tensor& t, const Tensor& gradient) { return t.defined() ? gradient : t; }

// What has to be off while kernels run: nothing is recorded, and autocast would undo the accumulation in float.
struct KernelsOnly {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKeySet(c10::DispatchKey::AutocastCPU)};
};

template <class Work>
auto below_autograd(const Work& work) {
    const KernelsOnly guard;
    return work();
}

// For pybind11: without the GIL, and with the exceptions that come out of Python, as from the hooks of saved tensors.
template <class Function>
auto released(Function function) {
    return torch::wrap_pybind_function_no_gil(function);
}

}  // namespace pytorch_ext
