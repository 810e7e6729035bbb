#pragma once

// How the ATen side of ops on rows spreads them over threads.

#include <memory>

#include "column_sums.h"
#include "module.h"

namespace pytorch_ext {

constexpr int64_t ENOUGH = 16384;  // elements for a thread to be worth waking

// The least number of things, of `size` elements each, to give to one thread.
inline int64_t grain(int64_t size) { return std::max<int64_t>(1, ENOUGH / std::max<int64_t>(1, size)); }

// `work(first, rows)` on parts of `rows` rows.
template <class Work>
void parallel_rows(int64_t rows, int64_t cols, const Work& work) {
    at::parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) { work(begin, end - begin); });
}

// `vectors` sums of `cols` columns over rows. Their chunks depend on the sizes alone, so that the sums are always the
// same ones, however many threads there are.
class RowSums {
public:
    RowSums(int64_t rows, int64_t vectors, int64_t cols)
        : rows_(rows),
          cols_(cols),
          stride_(vectors * cols),
          size_(std::max<int64_t>(32, (rows + 63) / 64)),
          chunks_((rows + size_ - 1) / size_),
          partial_(at::empty({chunks_ * stride_}, at::kFloat)) {}

    // `work(first, rows, sums, scratch)` for each chunk, with its sums (vectors, cols), zeros at first, and memory for
    // `scratch` floats.
    template <class Work>
    void add(int64_t scratch, const Work& work) const {
        float* const partial = partial_.mutable_data_ptr<float>();
        at::parallel_for(0, chunks_, grain(size_ * cols_), [&](int64_t begin, int64_t end) {
            const std::unique_ptr<float[]> memory(scratch ? new float[scratch] : nullptr);
            for (int64_t c = begin; c < end; ++c) {
                float* const sums = partial + c * stride_;
                std::fill_n(sums, stride_, 0.0f);
                work(c * size_, std::min(size_, rows_ - c * size_), sums, memory.get());
            }
        });
    }

    // The sums of the vectors from `first` on, as many as the parameter has, in its shape and dtype. If there is none:
    // empty, and otherwise `like` another.
    Tensor of(int64_t first, const OptionalTensor& parameter, const Tensor& like) const {
        if (!parameter || !parameter->defined()) return at::empty({0}, like.options());
        const Tensor out = at::empty(parameter->sizes(), parameter->options());
        const float* const partial = partial_.const_data_ptr<float>() + first * cols_;
        at::parallel_for(0, out.numel(), 4 * grain(chunks_), [&](int64_t begin, int64_t end) {
            PYTORCH_EXT_CALL(sum_columns, partial, chunks_, stride_, begin, end - begin,
                             out.mutable_data_ptr(), dtype_of(out));
        });
        return out;
    }

private:
    int64_t rows_, cols_, stride_, size_, chunks_;
    Tensor partial_;
};

// layer_norm's backward pass, in layer_norm.cpp.
std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dout, const Tensor& input,
                                                  const std::vector<int64_t>& normalized_shape,
                                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                                  const Tensor& mean, const Tensor& rstd);

}  // namespace pytorch_ext
