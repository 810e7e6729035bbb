// layer_norm(residual + dropout(input + input_bias)) in one pass, and its gradients. The sum is rounded to the dtype in
// which it is stored before it is normalised: that is all that backward sees of it.

#include "norms.cuh"

namespace pytorch_ext::cuda {
namespace {

// --- Kernels ----------------------------------------------------------------------------------------------------

// Plan: at most 104 registers, for four blocks of 128 threads at once.
template <class L>
__global__ void __launch_bounds__(L::THREADS)
    dropout_add_layer_norm_fwd_kernel(Rows<const typename L::T> x, Rows<const typename L::T> residual,
                                      Parameter w, Parameter b, Parameter x_bias, Dropout dropout,
                                      Rows<typename L::T> out, Rows<typename L::T> sum, float* mean,
                                      float* rstd, int64_t rows, int cols, float eps, bool aligned) {
    using T = typename L::T;
    const Place<L> at;
    if (at.row >= rows) return;
    uint4 x_chunks[L::CHUNKS], residual_chunks[L::CHUNKS];
    load_row(x_chunks, x[at.row], at, cols, aligned);
    load_row(residual_chunks, residual[at.row], at, cols, aligned);
    const Philox philox(dropout.rng);
    float row[L::E];
#pragma unroll
    for (int c = 0; c < L::CHUNKS; ++c) {
        auto& chunk = chunk_of<L>(row, c);
        const int col = at.col(c);
        widen<T>(chunk, x_chunks[c]);
        if (x_bias.data) {
            float bias[L::V];
            load_parameter<T>(bias, x_bias, col, cols, aligned);
#pragma unroll
            for (int i = 0; i < L::V; ++i) chunk[i] += bias[i];
        }
        if (dropout.rng && col < cols) drop<T>(chunk, col, at.row, philox, dropout);
        float others[L::V];
        widen<T>(others, residual_chunks[c]);
#pragma unroll
        for (int i = 0; i < L::V; ++i) chunk[i] += others[i];
        const uint4 stored = narrow<T>(chunk);
        store_chunk(sum[at.row] + col, stored, cols - col, aligned);
        widen<T>(chunk, stored);
    }
    const Moments m = moments<L>(row, at, cols, eps);
    normalize<L>(row, m, w, b, at, cols, aligned);
    store_row<L>(out[at.row], row, at, cols, aligned);
    if (at.lane == 0) {
        mean[at.row] = m.mean;
        rstd[at.row] = m.rstd;
    }
}

// Each block takes every gridDim.x-th group of rows, and leaves its sums of their parameters' gradients behind.
// Plan: at most 255 registers, for two blocks of 128 threads.
template <class L>
__global__ void __launch_bounds__(L::THREADS)
    dropout_add_layer_norm_bwd_kernel(Rows<const typename L::T> dout, Rows<const typename L::T> dsum,
                                      Rows<const typename L::T> sum, Parameter w, const float* mean,
                                      const float* rstd, Dropout dropout, Rows<typename L::T> dx,
                                      Rows<typename L::T> dresidual, float* dw_partial, float* db_partial,
                                      float* dx_bias_partial, int64_t rows, int cols, bool aligned) {
    using T = typename L::T;
    const Place<L> at;
    float dw[L::E] = {}, db[L::E] = {}, dx_bias[L::E] = {};
    for (int64_t row = at.row; row < rows; row += at.step) {
        uint4 dy_chunks[L::CHUNKS], x_chunks[L::CHUNKS];
        load_row(dy_chunks, dout[row], at, cols, aligned);
        load_row(x_chunks, sum[row], at, cols, aligned);
        float dy[L::E], x_hat[L::E];
        widen_row<L>(dy, dy_chunks);
        widen_row<L>(x_hat, x_chunks);
        normalize_backward<L>(dy, x_hat, dw, db, {mean[row], rstd[row]}, w, at, cols, aligned);
        const Philox philox(dropout.rng);  // read anew for each row: from row to row it would take registers
#pragma unroll
        for (int c = 0; c < L::CHUNKS; ++c) {
            auto& chunk = chunk_of<L>(dy, c);
            const int col = at.col(c);
            if (col >= cols) continue;
            if (dsum.data) {
                float more[L::V];
                widen<T>(more, load_chunk(dsum[row] + col, cols - col, aligned));
#pragma unroll
                for (int i = 0; i < L::V; ++i) chunk[i] += more[i];
            }
            store_chunk(dresidual[row] + col, narrow<T>(chunk), cols - col, aligned);
            if (dropout.rng) drop<T>(chunk, col, row, philox, dropout);
            store_chunk(dx[row] + col, narrow<T>(chunk), cols - col, aligned);
#pragma unroll
            for (int i = 0; i < L::V; ++i) dx_bias[c * L::V + i] += chunk[i];
        }
    }
    store_partial<L>(own_partial(dw_partial, cols), dw, at, cols);
    store_partial<L>(own_partial(db_partial, cols), db, at, cols);
    store_partial<L>(own_partial(dx_bias_partial, cols), dx_bias, at, cols);
}

// --- Launchers --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_fwd(
    const Tensor& input, const Tensor& residual, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& input_bias, const OptionalTensor& rng, double dropout_p, double eps) {
    const OnDevice device(input);
    const ScalarType dtype = promoted(input.scalar_type(), residual.scalar_type());
    const IntHeaderOnlyArrayRef leading(input.sizes().data(), input.dim() - 1);
    const int64_t rows = product(leading);
    const int cols = row_width(input.sizes().slice(input.dim() - 1));
    const Tensor out = new_empty(input, input.sizes(), dtype), sum = new_empty(input, input.sizes(), dtype);
    const Tensor mean = new_empty(input, leading, ScalarType::Float), rstd = new_empty(mean, leading);
    if (rows == 0) return {out, sum, mean, rstd};
    if (cols == 0) return {out, sum, filled(mean, NAN), filled(rstd, NAN)};
    const Matrix x(cast(input, dtype), cols), r(cast(residual, dtype), cols), into(out, cols),
        kept(sum, cols);
    const OwnedParameter w(weight, dtype), b(bias, dtype), x_bias(input_bias, dtype);
    const Mask mask(rng, dropout_p);
    with_layout(dtype, cols, [&](auto layout) {
        using L = decltype(layout);
        using T = typename L::T;
        // Grid: blocks of rows.
        launch(
            dropout_add_layer_norm_fwd_kernel<L>,
            Launch{row_blocks<L>(rows), threads_for<L>(cols), shared_for_row_sum<L>(), current_stream(input)},
            x.rows<const T>(), r.rows<const T>(), w, b, x_bias, mask.dropout, into.rows<T>(), kept.rows<T>(),
            floats(mean), floats(rstd), rows, cols, eps, all_aligned(x, r, into, kept, w, b, x_bias));
    });
    return {out, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_bwd(
    const Tensor& dout, const OptionalTensor& dsum, const Tensor& sum, const Tensor& input,
    const Tensor& residual, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& input_bias, const Tensor& mean, const Tensor& rstd, const OptionalTensor& rng,
    double dropout_p) {
    const OnDevice device(input);
    const ScalarType dtype = sum.scalar_type();
    const int64_t rows = mean.numel();
    const int cols = row_width(sum.sizes().slice(sum.dim() - 1));
    const Tensor dweight = gradient_of(weight, dout), dbias = gradient_of(bias, dout);
    const Tensor dinput_bias = gradient_of(input_bias, dout);
    const Tensor dx = new_empty(sum, sum.sizes(), dtype), dr = new_empty(sum, sum.sizes(), dtype);
    if (rows > 0 && cols > 0) {
        const Matrix dy(cast(dout, dtype), cols), kept(sum, cols), into_x(dx, cols), into_r(dr, cols);
        const std::optional<Matrix> ds =
            dsum ? std::optional<Matrix>(Matrix(cast(*dsum, dtype), cols)) : std::nullopt;
        const OwnedParameter w(weight, dtype);
        const Mask mask(rng, dropout_p);
        const Tensor means = dense(mean), rstds = dense(rstd);
        with_layout(dtype, cols, [&](auto layout) {
            using L = decltype(layout);
            using T = typename L::T;
            const unsigned blocks = blocks_for_sums<L>(rows, cols);
            const ParameterSums sums({dweight, dbias, dinput_bias}, blocks, cols);
            // Grid: as many blocks as share the rows.
            launch(dropout_add_layer_norm_bwd_kernel<L>,
                   Launch{blocks, threads_for<L>(cols), shared_for_sums<L>(cols), current_stream(input)},
                   dy.rows<const T>(), ds ? ds->rows<const T>() : Rows<const T>{nullptr, 0},
                   kept.rows<const T>(), w, floats(means), floats(rstds), mask.dropout, into_x.rows<T>(),
                   into_r.rows<T>(), sums[0], sums[1], sums[2], rows, cols,
                   all_aligned(dy, kept, into_x, into_r, w) && (!ds || ds->aligned));
            sums.finish(current_stream(input));
        });
    } else {
        for (const Tensor& gradient : {dweight, dbias, dinput_bias}) filled(gradient, 0.0);
    }
    return {cast(dx, input.scalar_type()), cast(dr, residual.scalar_type()), dweight, dbias, dinput_bias};
}

}  // namespace

// --- Registration -----------------------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_FRAGMENT(PYTORCH_EXT_OPS, m) {
    m.def(
        "dropout_add_layer_norm_fwd(Tensor input, Tensor residual, Tensor weight, Tensor? bias, Tensor? "
        "input_bias,"
        " Tensor? rng, float dropout_p, float eps) -> (Tensor out, Tensor sum, Tensor mean, Tensor rstd)");
    m.def(
        "dropout_add_layer_norm_bwd(Tensor dout, Tensor? dsum, Tensor sum, Tensor input, Tensor residual,"
        " Tensor weight, Tensor? bias, Tensor? input_bias, Tensor mean, Tensor rstd, Tensor? rng, float "
        "dropout_p)"
        " -> (Tensor dinput, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dinput_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(PYTORCH_EXT_OPS, PYTORCH_EXT_KEY, m) {
    m.impl("dropout_add_layer_norm_fwd", TORCH_BOX(&dropout_add_layer_norm_fwd));
    m.impl("dropout_add_layer_norm_bwd", TORCH_BOX(&dropout_add_layer_norm_bwd));
}

}  // namespace pytorch_ext::cuda
