#pragma once

// Matrix products on the threads of PyTorch: the right matrix laid out, the result in blocks of rows and columns.

#include <string>

#include "linear.h"
#include "module.h"

namespace pytorch_ext {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// right[k][n] as products want it: in panels, or in blocks of pairs where its dtype is multiplied in pairs. A layout that
// is kept stays in the weight's own dtype; one for a single product is widened to float, which is then done once.
Tensor lay_out_right(const Matrix& right, int64_t k, int64_t n, bool keep);

// A weight (n, k) as `multiply` wants its transpose, remembered for as long as it stays as it is (see layouts.h).
Tensor laid_out_for_inference(const Tensor& weight);

std::optional<Activation> known_activation(const std::string& name);
Activation activation_of(const std::string& name);  // or an error

// left[m][k] right[k][n] with its epilogue, `right` from lay_out_right. On tiles (see pair_products.h) the left matrix has
// to lie in rows. For `left_sums` see Product.
void multiply(const Matrix& left, const Tensor& right, int64_t m, int64_t n, int64_t k,
              const Epilogue& epilogue, float* left_sums = nullptr);

// A product whose right matrix is used this once, as it is, cut into items that need nothing of each other: each lays the
// columns out that it is about to multiply with, which then lie in its own thread's cache.
class ProductOnce {
public:
    ProductOnce(const Matrix& left, const Matrix& right, int64_t m, int64_t n, int64_t k,
                const Epilogue& epilogue, float* left_sums = nullptr);

    int64_t items() const { return across_ * down_; }
    void run(int64_t item) const;

    // Where it is not worth it one `multiply` is: for elements that are multiplied in pairs, for so many rows that laying
    // out all of the right matrix first is nothing beside them, and for more threads than items.
    bool is_worth_it() const;

private:
    Product product_;  // all of it, but for the right matrix laid out
    Matrix right_;
    int64_t cols_ = 0, rows_ = 0, across_ = 0, down_ = 0;  // of an item; how many items
};

void multiply_once(const Matrix& left, const Matrix& right, int64_t m, int64_t n, int64_t k,
                   const Epilogue& epilogue, float* left_sums = nullptr);

// A tensor of two dimensions, contiguous, as a matrix or as its transpose.
Matrix matrix_of(const Tensor& t);
Matrix transposed(const Matrix& matrix);

}  // namespace pytorch_ext
