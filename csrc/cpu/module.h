#ifndef PYTORCH_EXT_MODULE_H  // and no pragma: g++ compiles this header by itself, and warns of one there
#define PYTORCH_EXT_MODULE_H

// What the ATen side of every op shares: how it enters the Python module, and how tensors become pointers.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <utility>
#include <vector>

#include "isa.h"

namespace pytorch_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An op's file adds its functions to the module by one static Definition, so that no list has to know them.
std::vector<void (*)(pybind11::module_&)>& definitions();

struct Definition {
    explicit Definition(void (*define)(pybind11::module_&)) { definitions().push_back(define); }
};

inline Dtype dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kFloat: return Dtype::float32;
        case at::kBFloat16: return Dtype::bfloat16;
        case at::kHalf: return Dtype::float16;
        default: TORCH_CHECK(false, "expected float32, bfloat16 or float16, got ", t.scalar_type());
    }
}

// A parameter as contiguous float32: itself where it is that already. Undefined where there is none.
inline Tensor as_floats(const OptionalTensor& t) {
    if (!t || !t->defined()) return Tensor();
    if (t->scalar_type() == at::kFloat)
        return t->contiguous();  // `to` is slow to find that it has nothing to do
    return t->to(at::kFloat).contiguous();
}

inline const float* floats(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// Memory without a purpose, kept from one time to the next, until more of it is asked for.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    float* of(size_t floats) {
        if (floats > floats_) {
            std::free(std::exchange(data_, nullptr));
            floats_ = 0;
            data_ = std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
            TORCH_CHECK(data_, "out of memory for ", floats, " floats of scratch");
            floats_ = floats;
        }
        return static_cast<float*>(data_);
    }

private:
    void* data_ = nullptr;
    size_t floats_ = 0;
};

// Room for `n` floats that belongs to the calling thread.
inline float* thread_scratch(size_t n) {
    static thread_local Scratch memory;
    return memory.of(n);
}

// Runs `work(item)` for items 0 to n - 1 on the threads of PyTorch, each as soon as a thread is free, and on every thread
// `done()` behind its last one. Items that take long come first; what one computes must not depend on who runs it.
template <class Work, class Done>
void parallel_items(int64_t n, const Work& work, const Done& done) {
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), n);
    if (threads <= 1 || at::in_parallel_region()) {
        for (int64_t i = 0; i < n; ++i) work(i);
        return done();
    }
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin)
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
        done();
    });
}

template <class Work>
void parallel_items(int64_t n, const Work& work) {
    parallel_items(n, work, [] {});
}

}  // namespace pytorch_ext

#endif
