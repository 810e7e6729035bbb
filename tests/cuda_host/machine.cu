// Kernels that test the machine itself: what they do right must come out, and what they do wrong must be an error. And
// what no op shows by itself.

#include "attention.cuh"

namespace pytorch_ext::cuda {
namespace {

// out (16, 8) = a (16, 16) b (16, 8), in one warp; b lies in shared memory as it is, or transposed (8, 16).
__global__ void product_kernel(const bfloat16* a, const bfloat16* b, float* out, bool transposed) {
    bfloat16* a_tile = shared_memory<bfloat16>();
    bfloat16* b_tile = a_tile + 16 * 16;
    const int lane = threadIdx.x, matrix = lane / 8, row = lane % 8;
    copy_async(a_tile + lane * 8, a + lane * 8, true);
    copy_async(b_tile + lane % 16 * 8, b + lane % 16 * 8, true);
    end_copy_group();
    wait_for_copies<0>();
    __syncthreads();
    uint32_t a_part[4], b_part[4];
    load_matrices(a_part, a_tile + (matrix % 2 * 8 + row) * 16 + matrix / 2 * 8);
    if (transposed)  // rows of b are columns of the tile
        load_matrices(b_part, b_tile + row * 16 + matrix % 2 * 8);
    else
        load_matrices_transposed(b_part, b_tile + (matrix % 2 * 8 + row) * 8);
    float sum[4] = {};
    add_product<bfloat16>(sum, a_part, b_part[0], b_part[1]);
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

Tensor product_of(const Tensor& a, const Tensor& b, bool transposed) {
    const Tensor out = new_empty(a, Sizes{16, 8}, ScalarType::Float);
    launch(product_kernel, Launch{1, WARP, (16 * 16 + 16 * 8) * 2, current_stream(a)},
           static_cast<const bfloat16*>(a.data_ptr()), static_cast<const bfloat16*>(b.data_ptr()),
           floats(out), transposed);
    return out;
}

enum Fault { NONE, NO_BARRIER, DIVERGENT_BARRIER, LANE_AWAY, NO_WAIT, BEHIND_SHARED, NOT_ALIGNED };

// out[i] = x[n - 1 - i], through shared memory.
__global__ void reverse_kernel(const float* x, float* out, int n, int fault) {
    float* tile = shared_memory<float>();
    const int i = threadIdx.x;
    if (i % 4 == 0) copy_async(tile + i + (fault == NOT_ALIGNED ? 1 : 0), x + i, true);
    end_copy_group();
    if (fault != NO_WAIT) wait_for_copies<0>();
    if (fault == BEHIND_SHARED && i == 0) tile[n] = 1.0f;
    if (fault == DIVERGENT_BARRIER && i / WARP == 1) return;
    if (fault == LANE_AWAY && i == 5) return;
    if (fault == LANE_AWAY) __shfl_xor_sync(ALL_LANES, i, 1);
    if (fault != NO_BARRIER) __syncthreads();
    out[i] = tile[n - 1 - i];
}

Tensor reversed(const Tensor& x, int64_t fault) {
    const int n = static_cast<int>(x.numel());
    const Tensor out = new_empty(x, x.sizes());
    launch(reverse_kernel, Launch{1, static_cast<unsigned>(n), n * sizeof(float), current_stream(x)},
           floats(x), floats(out), n, static_cast<int>(fault));
    return out;
}

// Whether any x is negative, which each thread is told.
__global__ void any_negative_kernel(const float* x, bool* out) {
    const int i = threadIdx.x;
    out[i] = __syncthreads_or(x[i] < 0.0f) != 0;
}

Tensor any_negative(const Tensor& x) {
    const Tensor out = new_empty(x, x.sizes(), ScalarType::Bool);
    launch(any_negative_kernel, Launch{1, static_cast<unsigned>(x.numel()), 0, current_stream(x)}, floats(x),
           static_cast<bool*>(out.data_ptr()));
    return out;
}

__global__ void power_kernel(const float* x, float* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = exp2_polynomial(x[i]);
}

Tensor power(const Tensor& x) {
    const int n = static_cast<int>(x.numel());
    const Tensor out = new_empty(x, x.sizes());
    launch(power_kernel, Launch{cdiv(n, 128), 128, 0, current_stream(x)}, floats(x), floats(out), n);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(PYTORCH_EXT_OPS, m) {
    m.def("machine_product(Tensor a, Tensor b, bool transposed) -> Tensor");
    m.def("machine_reversed(Tensor x, int fault) -> Tensor");
    m.def("machine_any_negative(Tensor x) -> Tensor");
    m.def("machine_power(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(PYTORCH_EXT_OPS, PYTORCH_EXT_KEY, m) {
    m.impl("machine_product", TORCH_BOX(&product_of));
    m.impl("machine_reversed", TORCH_BOX(&reversed));
    m.impl("machine_any_negative", TORCH_BOX(&any_negative));
    m.impl("machine_power", TORCH_BOX(&power));
}

}  // namespace pytorch_ext::cuda
