#include "bias_gelu.h"

#include "math.h"
#include "rows.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {
namespace {

template <class T, class Function>
inline void forward(const BiasGelu& a, ptrdiff_t first, ptrdiff_t rows, const Function& function) {
    for (ptrdiff_t row = first; row < first + rows; ++row) {
        const T* const x = (const T*)a.input + row * a.cols;
        T* const out = (T*)a.out + row * a.cols;
        along(a.cols, [&](ptrdiff_t i, auto lanes, int) PX_LAMBDA {
            store(out + i, function(load(x + i, lanes) + load(a.bias + i, lanes)), lanes);
        });
    }
}

template <class T, class Function>
inline void backward(const BiasGelu& a, ptrdiff_t first, ptrdiff_t rows, float* sums,
                     const Function& derivative) {
    by_fours(first, rows, [&](ptrdiff_t row, auto count) {
        constexpr int ROWS = decltype(count)::COUNT;
        const ptrdiff_t at = row * a.cols;
        const T *const x = (const T*)a.input + at, *const dy = (const T*)a.dout + at;
        T* const dx = (T*)a.out + at;
        along<1>(a.cols, [&](ptrdiff_t i, auto lanes, int) PX_LAMBDA {
            const F bias = load(a.bias + i, lanes);
            F total{};
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const ptrdiff_t to = r * a.cols + i;
                const F d = load(dy + to, lanes) * derivative(load(x + to, lanes) + bias);
                store(dx + to, d, lanes);
                total += d;
            }
            store(sums + i, load(sums + i, lanes) + total, lanes);
        });
    });
}

}  // namespace

void bias_gelu_rows(const BiasGelu& a, ptrdiff_t first, ptrdiff_t rows) {
    visit(a.dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        if (a.by_tanh)
            forward<T>(a, first, rows, [](F x) PX_LAMBDA { return gelu_tanh(x); });
        else
            forward<T>(a, first, rows, [](F x) PX_LAMBDA { return gelu(x); });
    });
}

void bias_gelu_gradient(const BiasGelu& a, ptrdiff_t first, ptrdiff_t rows, float* sums) {
    visit(a.dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        if (a.by_tanh)
            backward<T>(a, first, rows, sums, [](F x) PX_LAMBDA { return gelu_tanh_grad(x); });
        else
            backward<T>(a, first, rows, sums, [](F x) PX_LAMBDA { return gelu_grad(x); });
    });
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
