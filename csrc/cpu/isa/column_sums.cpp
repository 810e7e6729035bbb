#include "column_sums.h"

#include "rows.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {

void sum_columns(const float* partial, ptrdiff_t chunks, ptrdiff_t stride, ptrdiff_t first, ptrdiff_t count,
                 void* out, Dtype dtype) {
    visit(dtype, [&](auto* type) {
        along(count, [&](ptrdiff_t i, auto lanes, int) PX_LAMBDA {
            F total{};
            for (ptrdiff_t c = 0; c < chunks; ++c) total += load(partial + c * stride + first + i, lanes);
            store((PX_TYPE(type)*)out + first + i, total, lanes);
        });
    });
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
