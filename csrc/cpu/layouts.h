#pragma once

#include <functional>

#include "module.h"

namespace pytorch_ext {

// `make()`, remembered for `weight` until the weight changes or dies. A weight is known by its identity, address, dtype,
// sizes, strides and version, and by a sample of its values, because fused optimisers, edits through `.data` and FSDP
// change values without a new version. An edit of single elements can pass between the samples: for that there is
// drop_layouts. To be called only where the weight takes no gradient.
Tensor laid_out(const Tensor& weight, const std::function<Tensor()>& make);

}  // namespace pytorch_ext
