#include "product.h"

#include "pair_products.h"

namespace pytorch_ext {
namespace {

// Of 16-bit elements in pairs: columns of a block of the right matrix, and how much of k one product takes.
constexpr int64_t PAIR_COLS = 64, PAIR_DEPTH = 1024;

int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }

at::ScalarType scalar_type(Dtype dtype) {
    return dtype == Dtype::float32 ? at::kFloat : dtype == Dtype::bfloat16 ? at::kBFloat16 : at::kHalf;
}

// How a result is cut into blocks: enough of them for every thread, and about equal.
struct Blocks {
    int64_t rows, cols, down, across;
};

Blocks blocks_of(int64_t m, int64_t n, int64_t k, int64_t row_step, int64_t col_step) {
    const int64_t threads = at::get_num_threads();
    Blocks blocks{};
    blocks.down = ceil_div(m, BLOCK_ROWS);
    blocks.across = ceil_div(n, BLOCK_COLS);
    // Several for each thread, so that none waits long for the last one; 50 us of work are worth a block, and where that
    // leaves a thread idle, 10.
    const int64_t work = m * n * k;
    const int64_t wanted = threads == 1 ? 1
                                        : std::max({int64_t{1}, std::min(8 * threads, work / 2'000'000),
                                                    std::min(3 * threads, work / 500'000)});
    if (blocks.down * blocks.across < wanted)
        blocks.across = std::min(ceil_div(wanted, blocks.down), ceil_div(n, col_step));
    blocks.rows = std::min(round_up(ceil_div(m, blocks.down), row_step), BLOCK_ROWS);
    blocks.cols = std::min(round_up(ceil_div(n, blocks.across), col_step), BLOCK_COLS);
    blocks.down = ceil_div(m, blocks.rows);
    blocks.across = ceil_div(n, blocks.cols);
    return blocks;
}

// One block on the matrix unit, TILE rows at a time: few shapes, because PyTorch compiles a kernel for each. What TILE does
// not divide is copied, with zeros behind it.
void tile_block(const Product& product, int64_t i, int64_t rows, int64_t j, int64_t cols, float* scratch) {
    const Matrix& left = product.left;
    const int64_t k = product.k, depth = round_up(k, TILE), ld = round_up(cols, PAIR_COLS);
    float* sums = scratch;
    auto* copy = reinterpret_cast<unsigned short*>(scratch + BLOCK_ROWS * BLOCK_COLS);
    const auto* right = static_cast<const unsigned short*>(product.right);
    for (int64_t r = 0; r < rows; r += TILE) {
        const int64_t some = std::min<int64_t>(TILE, rows - r);
        const auto* a = static_cast<const unsigned short*>(left.data) + (i + r) * left.row;
        int64_t lda = left.row;
        if (some < TILE || depth != k) {
            std::fill_n(copy, TILE * depth, 0);
            for (int64_t row = 0; row < some; ++row) std::copy_n(a + row * lda, k, copy + row * depth);
            a = copy;
            lda = depth;
        }
        for (int64_t c = 0; c < cols; c += PAIR_COLS)
            for (int64_t p = 0; p < depth; p += PAIR_DEPTH)
                multiply_pairs(left.dtype, TILE, PAIR_COLS, std::min(PAIR_DEPTH, depth - p), lda, PAIR_COLS,
                               ld, p > 0, a + p, right + (j + c) * depth + p * PAIR_COLS, sums + r * ld + c);
    }
    PYTORCH_EXT_CALL(finish_tile, product.epilogue, sums, ld, i, rows, j, cols);
}

// One block by dot products, all of its rows at a time: what is read of the right matrix then stays near. Pairs lie in
// the rows of the left matrix; if it is transposed, or its rows are of odd length, they are laid out.
void dot_block(const Product& product, int64_t i, int64_t rows, int64_t j, int64_t cols, float* scratch) {
    const Matrix& left = product.left;
    const int64_t k = product.k, depth = round_up(k, TILE), ld = round_up(cols, PAIR_COLS);
    float* sums = scratch;
    auto* copy = reinterpret_cast<unsigned short*>(scratch + BLOCK_ROWS * BLOCK_COLS);
    const auto* right = static_cast<const unsigned short*>(product.right);
    for (int64_t p = 0; p < k; p += PAIR_DEPTH) {
        const int64_t part = std::min(PAIR_DEPTH, k - p);
        const auto* a = static_cast<const unsigned short*>(left.data) + i * left.row + p * left.col;
        int64_t row = left.row / 2, step = 1;
        if (left.col != 1 || left.row % 2 || part % 2) {
            PYTORCH_EXT_CALL(pack_pairs, copy, BLOCK_ROWS, round_up(part, 2), a, left.col, left.row, part,
                             rows);
            a = copy;
            row = 1;
            step = BLOCK_ROWS;
        }
        for (int64_t c = 0; c < cols; c += PAIR_COLS)
            PYTORCH_EXT_CALL(dot_pairs, left.dtype, rows, PAIR_COLS, part, a, row, step,
                             right + (j + c) * depth + p * PAIR_COLS, PAIR_COLS, sums + c, ld, p > 0);
    }
    PYTORCH_EXT_CALL(finish_tile, product.epilogue, sums, ld, i, rows, j, cols);
}

}  // namespace

Matrix matrix_of(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t), t.size(1), 1}; }

Matrix transposed(const Matrix& matrix) { return {matrix.data, matrix.dtype, matrix.col, matrix.row}; }

Tensor lay_out_right(const Matrix& right, int64_t k, int64_t n, bool keep) {
    const bool pairs = multiplies_pairs(right.dtype);
    const Dtype dtype = pairs || keep ? right.dtype : Dtype::float32;
    const int64_t step = pairs ? PAIR_COLS : PANEL_STEP, depth = pairs ? round_up(k, TILE) : k;
    const Tensor layout = at::empty({round_up(n, step) * depth}, at::TensorOptions(scalar_type(dtype)));
    void* to = layout.mutable_data_ptr();
    const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, step * depth));
    at::parallel_for(0, ceil_div(n, step), grain, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin * step; j < end * step; j += step) {
            if (pairs)
                PYTORCH_EXT_CALL(pack_pairs, static_cast<unsigned short*>(to) + j * depth, step, depth,
                                 static_cast<const unsigned short*>(right.data) + j * right.col, right.row,
                                 right.col, k, std::min(step, n - j));
            else
                PYTORCH_EXT_CALL(lay_out_panels, to, dtype, right, k, n, j, step);
        }
    });
    return layout;
}

ProductOnce::ProductOnce(const Matrix& left, const Matrix& right, int64_t m, int64_t n, int64_t k,
                         const Epilogue& epilogue, float* left_sums)
    : product_{left, nullptr, Dtype::float32, m, n, k, epilogue, left_sums}, right_(right) {
    if (m == 0 || n == 0) return;
    // So many columns of BLOCK_K rows fill half of a second cache of 512 KB. A transposed left matrix is copied for every
    // item, which costs more than reading the columns from the third.
    const int64_t most = left.col == 1 ? 192 : BLOCK_COLS, threads = at::get_num_threads();
    across_ = round_up(ceil_div(n, most), threads);  // as many for each
    cols_ = round_up(ceil_div(n, across_), PANEL_STEP);
    across_ = ceil_div(n, cols_);
    // Laying out takes as long as multiplying with some ten rows.
    constexpr int64_t FEW = 4 * BLOCK_ROWS;
    down_ = std::clamp<int64_t>(threads / across_, 1, ceil_div(m, FEW));
    rows_ = round_up(ceil_div(m, down_), BLOCK_ROWS);
    down_ = ceil_div(m, rows_);
}

bool ProductOnce::is_worth_it() const {
    constexpr int64_t MANY = 2048;
    return !multiplies_pairs(product_.left.dtype) && product_.k > 0 && product_.m <= MANY &&
           items() >= at::get_num_threads();
}

void ProductOnce::run(int64_t item) const {
    const int64_t j = item % across_ * cols_, i = item / across_ * rows_;
    const int64_t cols = std::min(cols_, product_.n - j), rows = std::min(rows_, product_.m - i);
    PYTORCH_EXT_CALL(product_once, product_, right_, i, rows, j, cols,
                     thread_scratch(once_scratch(rows, cols, product_.k)));
}

void multiply_once(const Matrix& left, const Matrix& right, int64_t m, int64_t n, int64_t k,
                   const Epilogue& epilogue, float* left_sums) {
    if (m == 0 || n == 0) return;
    const ProductOnce product(left, right, m, n, k, epilogue, left_sums);
    if (!product.is_worth_it())
        return multiply(left, lay_out_right(right, k, n, false), m, n, k, epilogue, left_sums);
    parallel_items(product.items(), [&](int64_t item) { product.run(item); });
}

void multiply(const Matrix& left, const Tensor& right, int64_t m, int64_t n, int64_t k,
              const Epilogue& epilogue, float* left_sums) {
    if (m == 0 || n == 0) return;
    const Product product{left, right.const_data_ptr(), dtype_of(right), m, n, k, epilogue, left_sums};
    const bool tiles = on_tiles(left.dtype) && k > 0, dots = !tiles && multiplies_pairs(left.dtype) && k > 0;
    const size_t needed = tiles  ? BLOCK_ROWS * BLOCK_COLS + TILE * round_up(k, TILE) / 2
                          : dots ? BLOCK_ROWS * BLOCK_COLS + BLOCK_ROWS * PAIR_DEPTH / 2
                                 : BLOCK_SCRATCH;
    const Blocks blocks = blocks_of(m, n, k, tiles ? TILE : 12, tiles || dots ? PAIR_COLS : PANEL_STEP);
    parallel_items(
        blocks.down * blocks.across,
        [&](int64_t item) {
            // Neighbours share the rows of the left matrix, and all of the right one passes by.
            const int64_t i = item / blocks.across * blocks.rows, j = item % blocks.across * blocks.cols;
            const int64_t rows = std::min(blocks.rows, m - i), cols = std::min(blocks.cols, n - j);
            float* scratch = thread_scratch(needed);
            if (tiles)
                tile_block(product, i, rows, j, cols, scratch);
            else if (dots)
                dot_block(product, i, rows, j, cols, scratch);
            else
                PYTORCH_EXT_CALL(product_block, product, i, rows, j, cols, scratch);
        },
        [&] {
            if (tiles) release_tiles();
        });
}

}  // namespace pytorch_ext
