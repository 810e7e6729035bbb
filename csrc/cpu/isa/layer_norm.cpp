#include "layer_norm.h"

#include "rows.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {

void layer_norm_rows(const LayerNorm& a, ptrdiff_t first, ptrdiff_t rows) {
    visit(a.dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        const float *const weight = a.weight, *const bias = a.bias;  // no store can change these
        for (ptrdiff_t row = first; row < first + rows; ++row) {
            const T* const x = (const T*)a.input + row * a.cols;
            T* const out = (T*)a.out + row * a.cols;
            const Moments m = moments(x, a.cols, mean_of(x, a.cols), a.eps);
            a.mean[row] = m.mean;
            a.rstd[row] = m.rstd;
            along(a.cols, [&](ptrdiff_t i, auto lanes, int) PX_LAMBDA {
                store(out + i, scaled_and_shifted(x_hat(load(x + i, lanes), m), weight, bias, i, lanes),
                      lanes);
            });
        }
    });
}

void layer_norm_gradient(const LayerNormGradient& a, ptrdiff_t first, ptrdiff_t rows, float* sums) {
    visit(a.dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        by_fours(first, rows, [&](ptrdiff_t row, auto count) {
            constexpr int ROWS = decltype(count)::COUNT;
            const ptrdiff_t at = row * a.cols;
            T* const dinput = (T*)a.dinput + at;
            gradients<ROWS>((const T*)a.dout + at, (const T*)a.input + at, a.cols, a.mean + row, a.rstd + row,
                            a.weight, sums, sums + a.cols,
                            [&](ptrdiff_t i, auto lanes, const F(&dx)[ROWS]) PX_LAMBDA {
                                for (int r = 0; r < ROWS; ++r) store(dinput + r * a.cols + i, dx[r], lanes);
                            });
        });
    });
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
