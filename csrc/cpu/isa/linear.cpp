#include "linear.h"

#include "dtypes.h"
#include "engine.h"
#include "math.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {
namespace {

static_assert(PANEL_STEP % NR == 0 && BLOCK_ROWS % MR == 0 && BLOCK_K == LONGEST_SUM);

PX_INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

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

// Rows of the left matrix as the product reads them: in rows, or tile by tile (see multiply_strided).
struct LeftBlock {
    const float* data;
    ptrdiff_t stride, tile;
    bool in_rows;
};

// What a vector may write behind the last element of a tile lies before the next one.
constexpr ptrdiff_t tile_size(ptrdiff_t depth) { return MR * depth + W; }
static_assert(BLOCK_ROWS / MR * tile_size(BLOCK_K) <= BLOCK_LEFT);

// copy[tile][p][MR] of from[p][rows], lines `line` elements apart, behind which `behind` more may be read. Left as they
// are the lines of one tile would fill the first cache, of which they use little.
template <class T>
void copy_tiles(float* copy, const T* from, ptrdiff_t line, ptrdiff_t rows, ptrdiff_t behind,
                ptrdiff_t depth) {
    constexpr ptrdiff_t AHEAD = 8;  // lines; too few neighbours for the processor to guess what comes next
    for (ptrdiff_t p = 0; p < depth; ++p, from += line, copy += MR) {
        for (ptrdiff_t r = 0; r < rows; r += 64 / (ptrdiff_t)sizeof(T))
            __builtin_prefetch(from + AHEAD * line + r);
        float* to = copy;
        for (ptrdiff_t r = 0; r < rows; r += MR, to += tile_size(depth))
            for (ptrdiff_t c = 0; c < MR; c += W) {
                const ptrdiff_t lanes = rows + behind - r - c;
                if (lanes > 0) store(to + c, lanes < W ? load(from + r + c, lanes) : load(from + r + c));
            }
    }
}

// Rows i to i + rows and columns k to k + depth as float. What already lies as it should is not copied.
LeftBlock left_block(const Product& product, ptrdiff_t i, ptrdiff_t rows, ptrdiff_t k, ptrdiff_t depth,
                     float* copy) {
    const Matrix& left = product.left;
    LeftBlock block{copy, depth, MR * depth, true};
    visit(left.dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        const T* from = (const T*)left.data + i * left.row + k * left.col;
        if (left.col != 1) {
            block = {copy, MR, tile_size(depth), false};
            copy_tiles(copy, from, left.col, rows, product.m - i - rows, depth);
        } else if (left.dtype == Dtype::float32) {
            block = {(const float*)from, left.row, MR * left.row, true};
        } else {
            for (ptrdiff_t r = 0; r < rows; ++r) widen(copy + r * depth, from + r * left.row, depth);
        }
    });
    return block;
}

// sums[i] += row i of a block in tiles, added up: few elements in a row, for the sake of the sum's rounding error.
void add_up_rows(const LeftBlock& left, ptrdiff_t rows, ptrdiff_t depth, float* sums) {
    constexpr ptrdiff_t CHUNK = 64;
    for (ptrdiff_t r = 0; r < rows; r += MR)
        for (ptrdiff_t c = 0; c < least(MR, rows - r); c += W) {
            const ptrdiff_t lanes = least(W, least(MR, rows - r) - c);
            const float* from = left.data + r / MR * left.tile + c;
            F total = load_some(sums + r + c, lanes);
            for (ptrdiff_t p = 0; p < depth; p += CHUNK) {
                F part[4] = {};
                for (ptrdiff_t q = 0; q < least(CHUNK, depth - p); ++q, from += MR) part[q % 4] += load(from);
                total += (part[0] + part[1]) + (part[2] + part[3]);
            }
            store_some(sums + r + c, total, lanes);
        }
}

void multiply_block(const LeftBlock& left, const float* panels, ptrdiff_t panel, ptrdiff_t m, ptrdiff_t n,
                    ptrdiff_t k, float* c, ptrdiff_t ldc, bool accumulate) {
    if (left.in_rows)
        multiply_strided<true>(left.data, left.stride, left.tile, panels, panel, m, n, k, c, ldc, accumulate);
    else
        multiply_strided<false>(left.data, left.stride, left.tile, panels, panel, m, n, k, c, ldc,
                                accumulate);
}

// Where a block of sums is built: in its place in the result if there is nothing to do on its way out, since what is
// written tile by tile is not waited for, as a block at once would be.
struct Sums {
    float* data;
    ptrdiff_t ld;
    bool in_place;

    Sums(const Product& product, ptrdiff_t i, ptrdiff_t j, ptrdiff_t cols, float* scratch)
        : data(scratch), ld(round_up(cols, NR)) {
        const Epilogue& to = product.epilogue;
        in_place = to.dtype == Dtype::float32 && to.activation == Activation::none && !to.bias &&
                   !to.preactivation && cols % NR == 0 && product.k > 0;
        if (!in_place) return;
        data = (float*)to.out + i * to.row + j;
        ld = to.row;
    }
};

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
    const Sums sums(product, i, j, cols, scratch);
    float* left_copy = scratch + BLOCK_ROWS * BLOCK_COLS;
    float* wide_panel = left_copy + BLOCK_LEFT;
    const ptrdiff_t k = product.k;
    for (ptrdiff_t p = 0; p < k; p += BLOCK_K) {
        const ptrdiff_t depth = least(k - p, BLOCK_K);
        const LeftBlock left = left_block(product, i, rows, p, depth, left_copy);
        if (product.left_sums && j == 0) add_up_rows(left, rows, depth, product.left_sums + i);
        if (product.right_dtype == Dtype::float32) {
            const float* panels = (const float*)product.right + j * k + p * NR;
            multiply_block(left, panels, k * NR, rows, cols, depth, sums.data, sums.ld, p > 0);
            continue;
        }
        visit(product.right_dtype, [&](auto* type) {
            using T = PX_TYPE(type);
            for (ptrdiff_t c = 0; c < cols; c += NR) {
                widen(wide_panel, (const T*)product.right + (j + c) * k + p * NR, depth * NR);
                multiply_block(left, wide_panel, 0, rows, NR, depth, sums.data + c, sums.ld, p > 0);
            }
        });
    }
    if (k == 0)
        for (ptrdiff_t c = 0; c < rows * sums.ld; ++c) sums.data[c] = 0.0f;
    if (!sums.in_place) finish_tile(product.epilogue, sums.data, sums.ld, i, rows, j, cols);
}

void product_once(const Product& product, const Matrix& right, ptrdiff_t i, ptrdiff_t rows, ptrdiff_t j,
                  ptrdiff_t cols, float* scratch) {
    const ptrdiff_t k = product.k, end = i + rows, width = round_up(cols, NR);
    float *left_copy = scratch, *panels = left_copy + BLOCK_LEFT;
    const Sums sums(product, i, j, cols, panels + BLOCK_K * width);
    const ptrdiff_t sums_row = sums.in_place || k > BLOCK_K ? sums.ld : 0;  // of one block of k none are kept
    for (ptrdiff_t p = 0; p < k; p += BLOCK_K) {
        const ptrdiff_t depth = least(k - p, BLOCK_K);
        Matrix part = right;
        visit(right.dtype, [&](auto* type) {
            part.data = (const PX_TYPE(type)*)right.data + p * right.row + j * right.col;
        });
        lay_out_panels(panels, Dtype::float32, part, depth, cols, 0, width);
        for (ptrdiff_t first = i; first < end; first += BLOCK_ROWS) {
            const ptrdiff_t some = least(end - first, BLOCK_ROWS);
            const LeftBlock left = left_block(product, first, some, p, depth, left_copy);
            if (product.left_sums && j == 0) add_up_rows(left, some, depth, product.left_sums + first);
            float* tile = sums.data + (first - i) * sums_row;
            multiply_block(left, panels, depth * NR, some, cols, depth, tile, sums.ld, p > 0);
            if (!sums.in_place && p + depth == k)
                finish_tile(product.epilogue, tile, sums.ld, first, some, j, cols);
        }
    }
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
