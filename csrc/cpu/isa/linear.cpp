#include "linear.h"

#include "dtypes.h"
#include "engine.h"
#include "math.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {
namespace {

static_assert(PANEL_STEP % NR == 0 && BLOCK_ROWS % MR == 0 && BLOCK_K == LONGEST_SUM);

template <Activation ACTIVATION>
PX_INLINE F activate(F x) {
    if (ACTIVATION == Activation::relu) return x < 0.0f ? F{} : x;  // NaN stays NaN
    if (ACTIVATION == Activation::gelu) return gelu(x);
    if (ACTIVATION == Activation::gelu_tanh) return gelu_tanh(x);
    return x;
}

template <Activation ACTIVATION>
PX_INLINE F slope(F x) {
    if (ACTIVATION == Activation::relu) return x > 0.0f ? set(1.0f) : F{};
    if (ACTIVATION == Activation::gelu) return gelu_grad(x);
    if (ACTIVATION == Activation::gelu_tanh) return gelu_tanh_grad(x);
    return set(1.0f);
}

template <Activation A>
struct Is {
    static constexpr Activation value = A;
};

template <class Work>
void visit_activation(Activation activation, const Work& work) {
    switch (activation) {
        case Activation::none: return work(Is<Activation::none>());
        case Activation::relu: return work(Is<Activation::relu>());
        case Activation::gelu: return work(Is<Activation::gelu>());
        case Activation::gelu_tanh: return work(Is<Activation::gelu_tanh>());
    }
}

// Calls `step(j, lanes)` for each vector of a row; only the last may have fewer lanes than W.
template <class Step>
PX_INLINE void each_vector(ptrdiff_t n, const Step& step) {
    ptrdiff_t j = 0;
    for (; j + W <= n; j += W) step(j, (ptrdiff_t)W);
    if (j < n) step(j, n - j);
}

template <class T>
PX_INLINE F load_some(const T* p, ptrdiff_t lanes) {
    return lanes == W ? load(p) : load(p, lanes);
}

template <class T>
PX_INLINE void store_some(T* p, F x, ptrdiff_t lanes) {
    lanes == W ? store(p, x) : store(p, x, lanes);
}

template <class T, Activation ACTIVATION>
void finish(const Epilogue& epilogue, const float* sums, ptrdiff_t ld, ptrdiff_t i, ptrdiff_t rows,
            ptrdiff_t j, ptrdiff_t cols) {
    const float* bias = epilogue.bias ? epilogue.bias + j : nullptr;
    for (ptrdiff_t r = 0; r < rows; ++r, sums += ld) {
        T* out = (T*)epilogue.out + (i + r) * epilogue.row + j;
        T* before =
            epilogue.preactivation ? (T*)epilogue.preactivation + (i + r) * epilogue.row + j : nullptr;
        each_vector(cols, [&](ptrdiff_t c, ptrdiff_t lanes) {
            F x = load(sums + c);
            if (bias) x += load_some(bias + c, lanes);
            if (before) store_some(before + c, x, lanes);
            store_some(out + c, activate<ACTIVATION>(x), lanes);
        });
    }
}

template <class T>
void widen(float* to, const T* from, ptrdiff_t n) {
    each_vector(n,
                [&](ptrdiff_t c, ptrdiff_t lanes) { store_some(to + c, load_some(from + c, lanes), lanes); });
}

// The left block as float: rows i to i + rows of the columns k to k + depth. What already lies as it should is not
// copied; a transposed matrix stays transposed, but loses a stride whose powers of two would meet in one cache set.
Matrix left_block(const Matrix& left, ptrdiff_t i, ptrdiff_t rows, ptrdiff_t k, ptrdiff_t depth,
                  float* copy) {
    const bool transposed = left.col != 1;
    Matrix block{copy, Dtype::float32, transposed ? 1 : depth, transposed ? rows : 1};
    visit(left.dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        const T* from = (const T*)left.data + i * left.row + k * left.col;
        if (left.dtype == Dtype::float32 && !transposed)
            block = {from, Dtype::float32, left.row, 1};
        else if (transposed)
            for (ptrdiff_t p = 0; p < depth; ++p) widen(copy + p * rows, from + p * left.col, rows);
        else
            for (ptrdiff_t r = 0; r < rows; ++r) widen(copy + r * depth, from + r * left.row, depth);
    });
    return block;
}

void multiply_block(const Matrix& left, const float* panels, ptrdiff_t panel, ptrdiff_t m, ptrdiff_t n,
                    ptrdiff_t k, float* c, ptrdiff_t ldc, bool accumulate) {
    const float* a = (const float*)left.data;
    if (left.col == 1)
        multiply_strided<true>(a, left.row, 1, panels, panel, m, n, k, c, ldc, accumulate);
    else
        multiply_strided<false>(a, 1, left.col, panels, panel, m, n, k, c, ldc, accumulate);
}

template <class T>
void lay_out(T* panels, const T* from, ptrdiff_t row, ptrdiff_t col, ptrdiff_t k, ptrdiff_t n, ptrdiff_t j,
             ptrdiff_t cols) {
    for (const ptrdiff_t end = j + cols; j < end; j += NR) {
        T* to = panels + j * k;
        for (ptrdiff_t p = 0; p < k; ++p)
            for (ptrdiff_t c = 0; c < NR; ++c) *to++ = j + c < n ? from[p * row + (j + c) * col] : T{};
    }
}

}  // namespace

void lay_out_panels(void* panels, Dtype dtype, const Matrix& right, ptrdiff_t k, ptrdiff_t n, ptrdiff_t j,
                    ptrdiff_t cols) {
    visit(right.dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        const T* from = (const T*)right.data;
        const ptrdiff_t width = j + cols < n ? cols : n - j;
        if (dtype != Dtype::float32)
            lay_out((T*)panels, from, right.row, right.col, k, n, j, cols);
        else if (right.col == 1)
            FloatEngine::pack((float*)panels + j * k, from + j, right.row, k, width);
        else
            FloatEngine::pack_transposed((float*)panels + j * k, from + j * right.col, right.col, k, width);
    });
}

void product_block(const Product& product, ptrdiff_t i, ptrdiff_t rows, ptrdiff_t j, ptrdiff_t cols,
                   float* scratch) {
    float* sums = scratch;  // [rows][ld]
    float* left_copy = scratch + BLOCK_ROWS * BLOCK_COLS;
    float* wide_panel = left_copy + BLOCK_ROWS * BLOCK_K;
    const ptrdiff_t ld = round_up(cols, NR), k = product.k;
    for (ptrdiff_t p = 0; p < k; p += BLOCK_K) {
        const ptrdiff_t depth = k - p < BLOCK_K ? k - p : BLOCK_K;
        const Matrix left = left_block(product.left, i, rows, p, depth, left_copy);
        if (product.right_dtype == Dtype::float32) {
            const float* panels = (const float*)product.right + j * k + p * NR;
            multiply_block(left, panels, k * NR, rows, cols, depth, sums, ld, p > 0);
            continue;
        }
        visit(product.right_dtype, [&](auto* type) {
            using T = PX_TYPE(type);
            for (ptrdiff_t c = 0; c < cols; c += NR) {
                widen(wide_panel, (const T*)product.right + (j + c) * k + p * NR, depth * NR);
                multiply_block(left, wide_panel, 0, rows, NR, depth, sums + c, ld, p > 0);
            }
        });
    }
    if (k == 0)
        for (ptrdiff_t c = 0; c < rows * ld; ++c) sums[c] = 0.0f;
    finish_tile(product.epilogue, sums, ld, i, rows, j, cols);
}

void finish_tile(const Epilogue& epilogue, const float* sums, ptrdiff_t ld, ptrdiff_t i, ptrdiff_t rows,
                 ptrdiff_t j, ptrdiff_t cols) {
    visit(epilogue.dtype, [&](auto* type) {
        visit_activation(epilogue.activation, [&](auto activation) {
            finish<PX_TYPE(type), decltype(activation)::value>(epilogue, sums, ld, i, rows, j, cols);
        });
    });
}

void linear_gradient(const Gradient& gradient, ptrdiff_t i, ptrdiff_t rows, float* column_sums) {
    const ptrdiff_t cols = gradient.cols;
    visit(gradient.dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        visit(gradient.dz_dtype, [&](auto* dz_type) {
            using Z = PX_TYPE(dz_type);
            visit_activation(gradient.activation, [&](auto activation) {
                for (const ptrdiff_t end = i + rows; i < end; ++i) {
                    const T *dout = (const T*)gradient.dout + i * cols,
                            *before = (const T*)gradient.preactivation + i * cols;
                    Z* dz = gradient.dz ? (Z*)gradient.dz + i * cols : nullptr;
                    each_vector(cols, [&](ptrdiff_t c, ptrdiff_t lanes) {
                        F x = load_some(dout + c, lanes);
                        if (dz) {
                            x *= slope<decltype(activation)::value>(load_some(before + c, lanes));
                            store_some(dz + c, x, lanes);
                        }
                        if (column_sums)
                            store_some(column_sums + c, load_some(column_sums + c, lanes) + x, lanes);
                    });
                }
            });
        });
    });
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
