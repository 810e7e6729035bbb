// What makes a call usual: direct.h.

#include "direct.h"

#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

namespace pytorch_ext {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

// Of a dense tensor on the CPU that is what it seems.
constexpr DispatchKeySet PLAIN({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU,
                                DispatchKey::ADInplaceOrView});

bool within(DispatchKeySet keys, DispatchKeySet allowed) { return !(keys.raw_repr() & ~allowed.raw_repr()); }

bool is_plain(const Tensor& t) {
    if (!within(t.key_set(), PLAIN)) return false;
    switch (t.scalar_type()) {
        case at::kFloat:
        case at::kBFloat16:
        case at::kHalf:
        case at::kInt:
        case at::kLong:
        case at::kBool: return true;
        default: return false;
    }
}

bool nobody_looks_on() {
    const auto state = c10::impl::tls_local_dispatch_key_set();
    return within(state.included_, c10::default_included_set) &&  // modes, transforms and tracing are in here
           !at::autocast::is_autocast_enabled(at::kCPU) && !at::hasCallbacks() &&
           !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

}  // namespace

bool usual(std::initializer_list<const Argument*> arguments) {
    for (const Argument* argument : arguments)
        if (!argument->usual) return false;
    return nobody_looks_on();
}

bool wants_grad(std::initializer_list<const Argument*> inputs) {
    if (!at::GradMode::is_enabled()) return false;
    for (const Argument* input : inputs)
        if (input->given() && (*input)->requires_grad()) return true;
    return false;
}

}  // namespace pytorch_ext

bool pybind11::detail::type_caster<pytorch_ext::Argument>::load(handle source, bool) {
    if (source.is_none()) return true;
    if (THPVariable_CheckExact(source.ptr())) value.tensor = THPVariable_Unpack(source.ptr());
    value.usual = value.given() && pytorch_ext::is_plain(value.tensor);
    return true;
}

bool pybind11::detail::type_caster<pytorch_ext::Number>::load(handle source, bool) {
    if (!PyFloat_Check(source.ptr()) && !PyLong_Check(source.ptr())) return false;
    value.value = PyFloat_AsDouble(source.ptr());
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();  // an int that no float can hold
    return false;
}
