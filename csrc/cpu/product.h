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

Activation activation_of(const std::string& name);

// left[m][k] right[k][n] with its epilogue, `right` from lay_out_right. On tiles (see pair_products.h) the left matrix has
// to lie in rows.
void multiply(const Matrix& left, const Tensor& right, int64_t m, int64_t n, int64_t k,
              const Epilogue& epilogue);

// A tensor of two dimensions, contiguous, as a matrix or as its transpose.
Matrix matrix_of(const Tensor& t);
Matrix transposed(const Matrix& matrix);

}  // namespace pytorch_ext
