#pragma once

// The kernels of attention, and which of them a call takes.

#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "attention_short_backward.cuh"
#include "attention_short_forward.cuh"

namespace pytorch_ext::cuda {
namespace {

// Not all of them where that would take minutes: on the CPU, and in tests that look at machine code.
template <class T, int D>
#if defined(PYTORCH_EXT_ONLY_HEAD)
constexpr bool COMPILED = D == PYTORCH_EXT_ONLY_HEAD;
#elif defined(PYTORCH_EXT_CUDA_HOST)
constexpr bool COMPILED = D == 32 || (D < 128 && std::is_same_v<T, bfloat16>);
#else
constexpr bool COMPILED = true;
#endif

template <class Element, int DIM>
struct Head {
    using T = Element;
    static constexpr int D = DIM;
};

template <class T, int D, class Work>
bool try_head(int64_t dim, const Work& work) {
    if constexpr (COMPILED<T, D>)
        if (dim == D) work(Head<T, D>());
    return dim == D && COMPILED<T, D>;
}

template <class T, class Work>
void with_head_of(int64_t dim, const Work& work) {
    const bool known = try_head<T, 32>(dim, work) || try_head<T, 64>(dim, work) ||
                       try_head<T, 96>(dim, work) || try_head<T, 128>(dim, work);
    STD_TORCH_CHECK(known, "backend 'cuda': expected heads of 32, 64, 96 or 128 elements, got ", dim);
}

// Calls `work` with the type and the size of heads.
template <class Work>
void with_head(const Tensor& x, const Work& work) {
    const int64_t dim = x.size(x.dim() - 1);
    switch (x.scalar_type()) {
#ifndef PYTORCH_EXT_ONLY_BFLOAT16
        case ScalarType::Half: return with_head_of<float16>(dim, work);
#endif
        case ScalarType::BFloat16: return with_head_of<bfloat16>(dim, work);
        default: STD_TORCH_CHECK(false, "backend 'cuda': expected heads of bfloat16 or float16");
    }
}

Heads<float> heads_of(const Tensor& statistics) {
    const bool batched = statistics.dim() == 3;
    const int64_t rows = statistics.size(statistics.dim() - 1);
    return {floats(statistics), batched ? statistics.size(1) * rows : 0, rows, 1};
}

}  // namespace

void attend(const AttentionCall& call) {
    with_head(call.out, [&](auto head) {
        using T = typename decltype(head)::T;
        constexpr int D = decltype(head)::D;
        const Heads<float> lse = heads_of(call.lse);
        // Twice as many queries for each key that is read, where there are as many and registers allow it: of wider heads
        // they do not, and of 32 ptxas spills for sm_100.
        if constexpr (D == 64) {
            if (is_short(call))
                return with_keys_of(call, [&](auto keys) {
                    launch_short_forward<ShortForwardShape<T, D, decltype(keys)::value>>(call, lse);
                });
            if (call.longest_q > 64) return launch_forward<ForwardShape<T, D, 2>>(call, lse);
        }
        launch_forward<ForwardShape<T, D, 1>>(call, lse);
    });
}

void differentiate(const AttentionCall& call, const Tensor& dout, const Tensor& dq, const Tensor& dk,
                   const Tensor& dv) {
    with_head(call.out, [&](auto head) {
        using T = typename decltype(head)::T;
        constexpr int D = decltype(head)::D;
        const OwnedHeads dout_rows(dout);
        const Heads<float> lse = heads_of(call.lse);
        if constexpr (D == 64)
            if (is_short(call))
                return with_keys_of(call, [&](auto keys) {
                    using Shape = ShortBackwardShape<T, D, decltype(keys)::value>;
                    launch_short_backward<Shape>(call, dout_rows, lse, dq, dk, dv);
                });
        const Tensor delta = new_empty(call.lse, call.lse.sizes());
        launch_backward<BackwardShape<T, D>>(call, dout_rows, lse, heads_of(delta), dq, dk, dv);
    });
}

}  // namespace pytorch_ext::cuda
