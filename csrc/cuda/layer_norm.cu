// Layer normalisation (Ba et al. 2016, arXiv 1607.06450) and its gradient.

#include "norms.cuh"

namespace pytorch_ext::cuda {
namespace {

// --- Kernels ----------------------------------------------------------------------------------------------------

// Plan: at most 64 registers, for eight blocks of 128 threads at once.
template <class L>
__global__ void __launch_bounds__(L::THREADS)
    layer_norm_fwd_kernel(Rows<const typename L::T> x, Parameter w, Parameter b, Rows<typename L::T> out,
                          float* mean, float* rstd, int64_t rows, int cols, float eps, bool aligned) {
    const Place<L> at;
    if (at.row >= rows) return;
    uint4 chunks[L::CHUNKS];
    load_row(chunks, x[at.row], at, cols, aligned);
    float row[L::E];
    widen_row<L>(row, chunks);
    const Moments m = moments<L>(row, at, cols, eps);
    normalize<L>(row, m, w, b, at, cols, aligned);
    store_row<L>(out[at.row], row, at, cols, aligned);
    if (at.lane == 0) {
        mean[at.row] = m.mean;
        rstd[at.row] = m.rstd;
    }
}

// Each block takes every gridDim.x-th group of rows, and leaves its sums of their parameters' gradients behind.
// Plan: at most 208 registers, for two blocks of 128 threads, which is as many as are started.
template <class L>
__global__ void __launch_bounds__(L::THREADS)
    layer_norm_bwd_kernel(Rows<const typename L::T> dout, Rows<const typename L::T> x, Parameter w,
                          const float* mean, const float* rstd, Rows<typename L::T> dx, float* dw_partial,
                          float* db_partial, int64_t rows, int cols, bool aligned) {
    const Place<L> at;
    float dw[L::E] = {}, db[L::E] = {};
    for (int64_t row = at.row; row < rows; row += at.step) {
        uint4 dy_chunks[L::CHUNKS], x_chunks[L::CHUNKS];
        load_row(dy_chunks, dout[row], at, cols, aligned);
        load_row(x_chunks, x[row], at, cols, aligned);
        float dy[L::E], x_hat[L::E];
        widen_row<L>(dy, dy_chunks);
        widen_row<L>(x_hat, x_chunks);
        normalize_backward<L>(dy, x_hat, dw, db, {mean[row], rstd[row]}, w, at, cols, aligned);
        store_row<L>(dx[row], dy, at, cols, aligned);
    }
    store_partial<L>(own_partial(dw_partial, cols), dw, at, cols);
    store_partial<L>(own_partial(db_partial, cols), db, at, cols);
}

// --- Launchers --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& input, const Sizes& normalized_shape,
                                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                                  double eps) {
    const OnDevice device(input);
    const ScalarType dtype = input.scalar_type();
    const IntHeaderOnlyArrayRef leading(input.sizes().data(), input.dim() - normalized_shape.size());
    const int64_t rows = product(leading);
    const int cols = row_width(normalized_shape);
    const Tensor out = new_empty(input, input.sizes(), dtype);
    const Tensor mean = new_empty(input, leading, ScalarType::Float), rstd = new_empty(mean, leading);
    if (rows == 0) return {out, mean, rstd};
    if (cols == 0) return {out, filled(mean, NAN), filled(rstd, NAN)};
    const Matrix x(input, cols), into(out, cols);
    const OwnedParameter w(weight, dtype), b(bias, dtype);
    with_layout(dtype, cols, [&](auto layout) {
        using L = decltype(layout);
        using T = typename L::T;
        // Grid: blocks of rows.
        launch(
            layer_norm_fwd_kernel<L>,
            Launch{row_blocks<L>(rows), threads_for<L>(cols), shared_for_row_sum<L>(), current_stream(input)},
            x.rows<const T>(), w, b, into.rows<T>(), floats(mean), floats(rstd), rows, cols, eps,
            all_aligned(x, into, w, b));
    });
    return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dout, const Tensor& input,
                                                  const Sizes& normalized_shape, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, const Tensor& mean,
                                                  const Tensor& rstd) {
    const OnDevice device(input);
    const ScalarType dtype = input.scalar_type();
    const int64_t rows = mean.numel();
    const int cols = row_width(normalized_shape);
    const Tensor dinput = new_empty(input, input.sizes(), dtype);
    const Tensor dweight = gradient_of(weight, dout), dbias = gradient_of(bias, dout);
    if (rows == 0 || cols == 0) return {dinput, filled(dweight, 0.0), filled(dbias, 0.0)};
    const Matrix dy(cast(dout, dtype), cols), x(input, cols), into(dinput, cols);
    const OwnedParameter w(weight, dtype);
    const Tensor means = dense(mean), rstds = dense(rstd);
    with_layout(dtype, cols, [&](auto layout) {
        using L = decltype(layout);
        using T = typename L::T;
        const unsigned blocks = blocks_for_sums<L>(rows, cols);
        const ParameterSums sums({dweight, dbias}, blocks, cols);
        // Grid: as many blocks as share the rows.
        launch(layer_norm_bwd_kernel<L>,
               Launch{blocks, threads_for<L>(cols), shared_for_sums<L>(cols), current_stream(input)},
               dy.rows<const T>(), x.rows<const T>(), w, floats(means), floats(rstds), into.rows<T>(),
               sums[0], sums[1], rows, cols, all_aligned(dy, x, into, w));
        sums.finish(current_stream(input));
    });
    return {dinput, dweight, dbias};
}

}  // namespace

// --- Registration -----------------------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_FRAGMENT(PYTORCH_EXT_OPS, m) {
    m.def(
        "layer_norm_fwd(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor out, Tensor mean, Tensor rstd)");
    m.def(
        "layer_norm_bwd(Tensor dout, Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias,"
        " Tensor mean, Tensor rstd) -> (Tensor dinput, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(PYTORCH_EXT_OPS, PYTORCH_EXT_KEY, m) {
    m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
    m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
}

}  // namespace pytorch_ext::cuda
