// The Gaussian error linear unit and its gradient, element by element.

#include "gelu.cuh"

#include "tensors.h"
#include "vec.cuh"

namespace pytorch_ext::cuda {
namespace {

// --- Kernels ----------------------------------------------------------------------------------------------------

constexpr int THREADS = 256;

// Threads walk over (count,) elements in strides of the grid, a chunk at a time.
// Plan: at most 32 registers, for as many threads as a processor holds.
template <class T, bool TANH>
__global__ void __launch_bounds__(THREADS) gelu_fwd_kernel(const T* x, T* out, int64_t count, bool aligned) {
    constexpr int V = VEC<T>;
    const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS * V;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * V; i < count; i += step) {
        const int left = count - i < V ? count - i : V;
        float chunk[V];
        widen<T>(chunk, load_chunk(x + i, left, aligned));
#pragma unroll
        for (int k = 0; k < V; ++k) chunk[k] = gelu<TANH>(chunk[k]);
        store_chunk(out + i, narrow<T>(chunk), left, aligned);
    }
}

// Plan: at most 40 registers, for six blocks at once.
template <class T, bool TANH>
__global__ void __launch_bounds__(THREADS)
    gelu_bwd_kernel(const T* dout, const T* x, T* dx, int64_t count, bool aligned) {
    constexpr int V = VEC<T>;
    const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS * V;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * V; i < count; i += step) {
        const int left = count - i < V ? count - i : V;
        const uint4 dout_chunk = load_chunk(dout + i, left, aligned),
                    x_chunk = load_chunk(x + i, left, aligned);
        float dy[V], chunk[V];
        widen<T>(dy, dout_chunk);
        widen<T>(chunk, x_chunk);
#pragma unroll
        for (int k = 0; k < V; ++k) dy[k] *= gelu_derivative<TANH>(chunk[k]);
        store_chunk(dx + i, narrow<T>(dy), left, aligned);
    }
}

// --- Launchers --------------------------------------------------------------------------------------------------

// Grid: as many blocks as run at once, or fewer where there is less to do.
template <class T>
Launch over(const Tensor& x) {
    const int64_t blocks = std::min<int64_t>(cdiv<int64_t>(x.numel(), THREADS * VEC<T>), processors() * 8);
    return Launch{static_cast<unsigned>(blocks), THREADS, 0, current_stream(x)};
}

Tensor gelu_fwd(const Tensor& input, const Word& approximate) {
    const OnDevice device(input);
    const Tensor x = dense(input), out = new_empty(x, x.sizes());
    if (x.numel() == 0) return out;
    with_form(x.scalar_type(), approximate, [&](auto t, auto tanh) {
        using T = typename decltype(t)::type;
        launch(gelu_fwd_kernel<T, decltype(tanh)::value>, over<T>(x), data<const T>(x), data<T>(out),
               x.numel(), at_16_bytes(x.data_ptr()));
    });
    return out;
}

Tensor gelu_bwd(const Tensor& dout, const Tensor& input, const Word& approximate) {
    const OnDevice device(input);
    const Tensor x = dense(input), dy = dense(cast(dout, x.scalar_type())), dx = new_empty(x, x.sizes());
    if (x.numel() == 0) return dx;
    with_form(x.scalar_type(), approximate, [&](auto t, auto tanh) {
        using T = typename decltype(t)::type;
        launch(gelu_bwd_kernel<T, decltype(tanh)::value>, over<T>(x), data<const T>(dy), data<const T>(x),
               data<T>(dx), x.numel(), at_16_bytes(x.data_ptr()) && at_16_bytes(dy.data_ptr()));
    });
    return dx;
}

}  // namespace

// --- Registration -----------------------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_FRAGMENT(PYTORCH_EXT_OPS, m) {
    m.def("gelu_fwd(Tensor input, str approximate) -> Tensor");
    m.def("gelu_bwd(Tensor dout, Tensor input, str approximate) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(PYTORCH_EXT_OPS, PYTORCH_EXT_KEY, m) {
    m.impl("gelu_fwd", TORCH_BOX(&gelu_fwd));
    m.impl("gelu_bwd", TORCH_BOX(&gelu_bwd));
}

}  // namespace pytorch_ext::cuda
