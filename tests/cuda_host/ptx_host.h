#pragma once

// What stands in csrc/cuda/ptx.cuh, in plain C++.

namespace pytorch_ext::cuda {

inline void copy_async(void* to, const void* from, bool there) {
    cuda_host::async_copy(to, from, there ? 16 : 0, 16);
}

inline void copy_word_async(void* to, const void* from, bool there) {
    cuda_host::async_copy(to, from, there ? 4 : 0, 4);
}

inline void end_copy_group() { cuda_host::async_commit(); }

template <int LEFT>
void wait_for_copies() {
    cuda_host::async_wait(LEFT);
}

struct MatrixPart {
    uint32_t* out;
    const void* row;
};

template <bool TRANSPOSED>
void load_matrices_together(void* (&theirs)[cuda_host::WARP]) {
    uint16_t matrices[4][8][8];
    for (int lane = 0; lane < cuda_host::WARP; ++lane) {
        const void* row = static_cast<MatrixPart*>(theirs[lane])->row;
        if (reinterpret_cast<uintptr_t>(row) % 16)
            cuda_host::fail("ldmatrix of a row that begins at no multiple of 16 bytes");
        cuda_host::check_shared(row, 16, "ldmatrix");
        memcpy(matrices[lane / 8][lane % 8], row, 16);
    }
    for (int lane = 0; lane < cuda_host::WARP; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, col = lane % 4 * 2;
            const auto& m = matrices[i];
            const uint32_t first = TRANSPOSED ? m[col][row] : m[row][col],
                           second = TRANSPOSED ? m[col + 1][row] : m[row][col + 1];
            static_cast<MatrixPart*>(theirs[lane])->out[i] = first | second << 16;
        }
}

inline void load_matrices(uint32_t (&out)[4], const void* row, CUDA_HOST_PLACE) {
    MatrixPart part{out, row};
    cuda_host::meet_warp(0xffffffff, {"ldmatrix", file, line}, &part, load_matrices_together<false>);
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row, CUDA_HOST_PLACE) {
    MatrixPart part{out, row};
    cuda_host::meet_warp(0xffffffff, {"ldmatrix.trans", file, line}, &part, load_matrices_together<true>);
}

struct ProductPart {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
};

template <class T>
void add_product_together(void* (&theirs)[cuda_host::WARP]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < cuda_host::WARP; ++lane) {
        const auto& part = *static_cast<ProductPart*>(theirs[lane]);
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) {
            const float2 two = unpack<T>(part.a[i]);
            float* at = &a[group + i % 2 * 8][pair + i / 2 * 8];
            at[0] = two.x;
            at[1] = two.y;
        }
        for (int i = 0; i < 2; ++i) {
            const float2 two = unpack<T>(part.b[i]);
            b[pair + i * 8][group] = two.x;
            b[pair + i * 8 + 1][group] = two.y;
        }
    }
    float product[16][8] = {};
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) product[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < cuda_host::WARP; ++lane)
        for (int i = 0; i < 4; ++i)
            static_cast<ProductPart*>(theirs[lane])->sum[i] +=
                product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

template <class T>
void add_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUDA_HOST_PLACE) {
    ProductPart part{sum, a, {b0, b1}};
    cuda_host::meet_warp(0xffffffff, {"mma", file, line}, &part, add_product_together<T>);
}

inline float exp2_approximately(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}

inline int as_if_new(int x) { return x; }

inline float larger_or_nan(float a, float b) { return a != a || b != b ? NAN : std::max(a, b); }

}  // namespace pytorch_ext::cuda
