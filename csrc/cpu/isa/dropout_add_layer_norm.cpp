#include "dropout_add_layer_norm.h"

#include "philox.h"
#include "rows.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {
namespace {

// sum = residual + dropout(input + input_bias) of one row, and its mean but for rounding.
template <class In, class Residual, class Out>
inline float add_row(const DropoutAddLayerNorm& a, ptrdiff_t row) {
    const ptrdiff_t at = row * a.cols;
    Sums sums;
    const bool drops = a.dropout;
    const float scale = drops ? a.dropout->scale : 0.0f;
    in_blocks(row, a.cols, a.dropout, a.mask, [&](ptrdiff_t block, ptrdiff_t n, const unsigned char* mask) {
        const In* const input = (const In*)a.input + at + block;
        const Residual* const residual = (const Residual*)a.residual + at + block;
        Out* const sum = (Out*)a.sum + at + block;
        const float* const input_bias = a.input_bias ? a.input_bias + block : nullptr;
        along(n, [&](ptrdiff_t i, auto lanes, int k) PX_LAMBDA {
            F x = load(input + i, lanes);
            if (input_bias) x = x + load(input_bias + i, lanes);
            if (drops) x = dropped(x, mask, i, scale);
            x = load(residual + i, lanes) + x;
            store(sum + i, x, lanes);
            sums.of[k] += x;
        });
    });
    return sums.total() / (float)a.cols;
}

template <class In, class Residual, class Out>
inline void forward(const DropoutAddLayerNorm& a, ptrdiff_t first, ptrdiff_t rows) {
    const float *const weight = a.weight, *const bias = a.bias;  // no store can change these
    for (ptrdiff_t row = first; row < first + rows; ++row) {
        const float about = add_row<In, Residual, Out>(a, row);
        // The statistics are of the sum as it is stored, which is all that backward will see of it.
        const Out* const sum = (const Out*)a.sum + row * a.cols;
        const Moments m = moments(sum, a.cols, about, a.eps);
        a.mean[row] = m.mean;
        a.rstd[row] = m.rstd;
        Out* const out = (Out*)a.out + row * a.cols;
        along(a.cols, [&](ptrdiff_t i, auto lanes, int) PX_LAMBDA {
            store(out + i, scaled_and_shifted(x_hat(load(sum + i, lanes), m), weight, bias, i, lanes), lanes);
        });
    }
}

template <class In, class Residual, class Out>
inline void backward(const DropoutAddLayerNormGradient& a, ptrdiff_t first, ptrdiff_t rows, float* sums,
                     unsigned char* scratch) {
    const ptrdiff_t stride = mask_bytes(a.cols);
    const float scale = a.dropout ? a.dropout->scale : 0.0f;
    float* const dinput_bias = sums + 2 * a.cols;
    by_fours(first, rows, [&](ptrdiff_t row, auto count) {
        constexpr int ROWS = decltype(count)::COUNT;
        const ptrdiff_t at = row * a.cols;
        const Out* const dsum = a.dsum ? (const Out*)a.dsum + at : nullptr;
        In* const dinput = (In*)a.dinput + at;
        Residual* const dresidual = (Residual*)a.dresidual + at;
        if (a.dropout && !a.mask)
            for (int r = 0; r < ROWS; ++r) draw_mask(scratch + r * stride, a.cols, 0, row + r, *a.dropout);
        const unsigned char* const mask = a.mask ? a.mask + row * stride : scratch;
        const auto use = [&](ptrdiff_t i, auto lanes, const F(&dx)[ROWS]) PX_LAMBDA {
            F total{};
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const ptrdiff_t to = r * a.cols + i;
                F d = dx[r];
                if (dsum) d = d + load(dsum + to, lanes);
                store(dresidual + to, d, lanes);
                if (a.dropout) d = dropped(d, mask + r * stride, i, scale);
                store(dinput + to, d, lanes);
                total += d;
            }
            store(dinput_bias + i, load(dinput_bias + i, lanes) + total, lanes);
        };
        gradients<ROWS>((const Out*)a.dout + at, (const Out*)a.sum + at, a.cols, a.mean + row, a.rstd + row,
                        a.weight, sums, sums + a.cols, use);
    });
}

// Calls `work` with null pointers to the types of input, residual and out, which is the wider one of those.
template <class Args, class Work>
inline void visit_types(const Args& a, const Work& work) {
    visit(a.input_dtype, [&](auto* input) {
        if (a.residual_dtype == a.input_dtype) return work(input, input, input);
        visit(a.residual_dtype, [&](auto* residual) { work(input, residual, (float*)nullptr); });
    });
}

}  // namespace

void dropout_add_layer_norm_rows(const DropoutAddLayerNorm& a, ptrdiff_t first, ptrdiff_t rows) {
    visit_types(a, [&](auto* input, auto* residual, auto* out) {
        forward<PX_TYPE(input), PX_TYPE(residual), PX_TYPE(out)>(a, first, rows);
    });
}

void dropout_add_layer_norm_gradient(const DropoutAddLayerNormGradient& a, ptrdiff_t first, ptrdiff_t rows,
                                     float* sums, unsigned char* scratch) {
    visit_types(a, [&](auto* input, auto* residual, auto* out) {
        backward<PX_TYPE(input), PX_TYPE(residual), PX_TYPE(out)>(a, first, rows, sums, scratch);
    });
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
