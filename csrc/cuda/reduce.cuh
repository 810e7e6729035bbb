#pragma once

// Sums over the lanes of a warp and over a block, in an order that does not change from run to run.

#include "launch.cuh"

namespace pytorch_ext::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffff;

// Every lane gets the same bits: lanes that are exchanged add the same two numbers.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// Two sums over the block, which each thread gets. `room` is shared memory for one pair per warp, and is free again
// when the next sum is asked for. Every thread of the block takes part; it is a multiple of WARP threads wide.
__device__ inline float2 block_sum(float2 x, float2* room) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = {warp_sum(x.x), warp_sum(x.y)};
    __syncthreads();  // until all have read what a sum before left here
    if (lane == 0) room[warp] = x;
    __syncthreads();
    x = lane < warps ? room[lane] : float2{0.0f, 0.0f};
    return {warp_sum(x.x), warp_sum(x.y)};
}

}  // namespace pytorch_ext::cuda
