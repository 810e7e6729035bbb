#include "gelu.h"

#include "math.h"
#include "rows.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {

void gelu_elements(const Gelu& a, ptrdiff_t first, ptrdiff_t count) {
    visit(a.dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        const T* const x = (const T*)a.input + first;
        T* const out = (T*)a.out + first;
        if (a.by_tanh)
            along(count, [&](ptrdiff_t i, auto lanes, int)
                             PX_LAMBDA { store(out + i, gelu_tanh(load(x + i, lanes)), lanes); });
        else
            along(count, [&](ptrdiff_t i, auto lanes, int)
                             PX_LAMBDA { store(out + i, gelu(load(x + i, lanes)), lanes); });
    });
}

void gelu_gradient(const Gelu& a, ptrdiff_t first, ptrdiff_t count) {
    visit(a.dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        const T *const x = (const T*)a.input + first, *const dy = (const T*)a.dout + first;
        T* const dx = (T*)a.out + first;
        if (a.by_tanh)
            along(count, [&](ptrdiff_t i, auto lanes, int) PX_LAMBDA {
                store(dx + i, load(dy + i, lanes) * gelu_tanh_grad(load(x + i, lanes)), lanes);
            });
        else
            along(count, [&](ptrdiff_t i, auto lanes, int) PX_LAMBDA {
                store(dx + i, load(dy + i, lanes) * gelu_grad(load(x + i, lanes)), lanes);
            });
    });
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
