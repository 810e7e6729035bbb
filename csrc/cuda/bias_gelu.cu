// gelu(input + bias) and its gradients; that of the bias is added up in a fixed order, in two steps.

#include "gelu.cuh"
#include "rows.cuh"

namespace pytorch_ext::cuda {
namespace {

// --- Kernels ----------------------------------------------------------------------------------------------------

// A warp has one chunk per lane of a row's columns, those of the block's blockIdx.y, and walks down the rows.
template <class T>
using Band = Layout<T, VEC<T>, true>;

template <class T>
constexpr int BAND = WARP * VEC<T>;  // columns

// Plan: at most 40 registers, for twelve blocks at once.
template <class T, bool TANH>
__global__ void __launch_bounds__(Band<T>::THREADS)
    bias_gelu_fwd_kernel(Rows<const T> x, Parameter bias, Rows<T> out, int64_t rows, int cols, bool aligned) {
    const Place<Band<T>> at;
    const int col = blockIdx.y * BAND<T> + at.col(0);
    float shift[VEC<T>];
    load_parameter<T>(shift, bias, col, cols, aligned);
    for (int64_t row = at.row; row < rows; row += at.step) {
        float chunk[VEC<T>];
        widen<T>(chunk, load_chunk(x[row] + col, cols - col, aligned));
#pragma unroll
        for (int i = 0; i < VEC<T>; ++i) chunk[i] = gelu<TANH>(chunk[i] + shift[i]);
        store_chunk(out[row] + col, narrow<T>(chunk), cols - col, aligned);
    }
}

// Plan: at most 72 registers, for seven blocks at once: sm_100 takes that many, the others 64 or fewer.
template <class T, bool TANH>
__global__ void __launch_bounds__(Band<T>::THREADS)
    bias_gelu_bwd_kernel(Rows<const T> dout, Rows<const T> x, Parameter bias, Rows<T> dx, float* partial,
                         int64_t rows, int cols, bool aligned) {
    const Place<Band<T>> at;
    const int first = blockIdx.y * BAND<T>, col = first + at.col(0);
    float shift[VEC<T>], dbias[VEC<T>] = {};
    load_parameter<T>(shift, bias, col, cols, aligned);
    for (int64_t row = at.row; row < rows; row += at.step) {
        const uint4 dout_chunk = load_chunk(dout[row] + col, cols - col, aligned);
        const uint4 x_chunk = load_chunk(x[row] + col, cols - col, aligned);
        float dy[VEC<T>], chunk[VEC<T>];
        widen<T>(dy, dout_chunk);
        widen<T>(chunk, x_chunk);
#pragma unroll
        for (int i = 0; i < VEC<T>; ++i) {
            dy[i] *= gelu_derivative<TANH>(chunk[i] + shift[i]);
            dbias[i] += dy[i];
        }
        store_chunk(dx[row] + col, narrow<T>(dy), cols - col, aligned);
    }
    store_partial<Band<T>>(own_partial(partial, cols) + first, dbias, at, cols - first);
}

// --- Launchers --------------------------------------------------------------------------------------------------

// Grid: blocks that share the rows × bands of columns.
template <class T>
Launch over(const Tensor& x, int64_t rows, int cols) {
    const unsigned bands = cdiv(cols, BAND<T>);
    const int64_t sharing =
        std::min(cdiv<int64_t>(rows, Band<T>::ROWS), cdiv<int64_t>(processors() * 8, bands));
    const unsigned shared_bytes = BAND<T> * sizeof(float);
    return Launch{dim3(static_cast<unsigned>(sharing), bands), Band<T>::THREADS, shared_bytes,
                  current_stream(x)};
}

Tensor bias_gelu_fwd(const Tensor& input, const Tensor& bias, const Word& approximate) {
    const OnDevice device(input);
    const ScalarType dtype = input.scalar_type();
    const Tensor out = new_empty(input, input.sizes(), dtype);
    if (out.numel() == 0) return out;
    const int cols = bias.numel();
    const int64_t rows = out.numel() / cols;
    const Matrix x(input, cols), into(out, cols);
    const OwnedParameter b(bias, dtype);
    with_form(dtype, approximate, [&](auto t, auto tanh) {
        using T = typename decltype(t)::type;
        launch(bias_gelu_fwd_kernel<T, decltype(tanh)::value>, over<T>(input, rows, cols), x.rows<const T>(),
               b, into.rows<T>(), rows, cols, all_aligned(x, into, b));
    });
    return out;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& dout, const Tensor& input, const Tensor& bias,
                                         const Word& approximate) {
    const OnDevice device(input);
    const ScalarType dtype = input.scalar_type();
    const Tensor dinput = new_empty(input, input.sizes(), dtype), dbias = gradient_of(bias, dout);
    if (dinput.numel() == 0) return {dinput, filled(dbias, 0.0)};
    const int cols = bias.numel();
    const int64_t rows = dinput.numel() / cols;
    const Matrix dy(cast(dout, dtype), cols), x(input, cols), into(dinput, cols);
    const OwnedParameter b(bias, dtype);
    with_form(dtype, approximate, [&](auto t, auto tanh) {
        using T = typename decltype(t)::type;
        const Launch grid = over<T>(input, rows, cols);
        const ParameterSums sums({dbias}, grid.grid.x, cols);
        launch(bias_gelu_bwd_kernel<T, decltype(tanh)::value>, grid, dy.rows<const T>(), x.rows<const T>(), b,
               into.rows<T>(), sums[0], rows, cols, all_aligned(dy, x, into, b));
        sums.finish(grid.stream);
    });
    return {dinput, dbias};
}

}  // namespace

// --- Registration -----------------------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_FRAGMENT(PYTORCH_EXT_OPS, m) {
    m.def("bias_gelu_fwd(Tensor input, Tensor bias, str approximate) -> Tensor");
    m.def(
        "bias_gelu_bwd(Tensor dout, Tensor input, Tensor bias, str approximate) -> (Tensor dinput, Tensor "
        "dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(PYTORCH_EXT_OPS, PYTORCH_EXT_KEY, m) {
    m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
    m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
}

}  // namespace pytorch_ext::cuda
