#pragma once

// From a Dtype to the element type that it names. For files in isa/ alone.

#include "isa.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {

// Calls `work` with a null pointer to the element type: `visit(dtype, [&](auto* type) { ... })`.
template <class Work>
inline void visit(Dtype dtype, const Work& work) {
    switch (dtype) {
        case Dtype::float32: return work((float*)nullptr);
        case Dtype::bfloat16: return work((bfloat16*)nullptr);
        case Dtype::float16: return work((float16*)nullptr);
    }
}

template <class Pointer>
struct Pointee;
template <class T>
struct Pointee<T*> {
    using type = T;
};

// The element type of the pointer that `visit` hands out.
#define PX_TYPE(pointer) typename Pointee<decltype(pointer)>::type

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
