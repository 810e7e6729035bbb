// Weights laid out for inference: copies in a side table of the process, never in a module or a tensor.

#include "layouts.h"

#include <array>
#include <cstring>
#include <mutex>
#include <unordered_map>

namespace pytorch_ext {
namespace {

constexpr int64_t SAMPLES = 64;

struct Key {
    Isa isa;  // which decides how a layout looks
    const void* data;
    at::ScalarType dtype;
    std::vector<int64_t> sizes, strides;
    int64_t version;
    std::array<uint64_t, SAMPLES> samples;

    bool operator==(const Key&) const = default;
};

struct Entry {
    c10::weak_intrusive_ptr<at::TensorImpl>
        weight;  // so that the address cannot be another tensor's meanwhile
    Key key;
    Tensor layout;
};

std::mutex lock;
// Never destroyed: at the end of the process tensors outlive what static destructors may touch.
auto& table = *new std::unordered_map<const at::TensorImpl*, Entry>;

Key key_of(const Tensor& weight) {
    Key key{current_isa(),
            weight.const_data_ptr(),
            weight.scalar_type(),
            weight.sizes().vec(),
            weight.strides().vec(),
            weight.is_inference() ? 0 : weight._version(),
            {}};
    const int64_t bytes = weight.element_size(), n = weight.numel();
    const auto* data = static_cast<const char*>(key.data);
    // An odd step walks through the columns as well as the rows.
    const int64_t step = std::max<int64_t>(n / SAMPLES, 1) | 1;
    for (int64_t at = 0, s = 0; data && at < n && s < SAMPLES; at += step, ++s)
        std::memcpy(&key.samples[s], data + at * bytes, bytes);
    return key;
}

void forget_the_dead() {
    std::erase_if(table, [](const auto& item) { return item.second.weight.expired(); });
}

void drop_layouts(const std::vector<Tensor>& weights) {
    const std::lock_guard<std::mutex> guard(lock);
    for (const Tensor& weight : weights) table.erase(weight.unsafeGetTensorImpl());
    forget_the_dead();
}

int64_t layout_bytes(const std::vector<Tensor>& weights) {
    const std::lock_guard<std::mutex> guard(lock);
    int64_t bytes = 0;
    for (const Tensor& weight : weights) {
        const auto found = table.find(weight.unsafeGetTensorImpl());
        if (found != table.end() && !found->second.weight.expired())
            bytes += static_cast<int64_t>(found->second.layout.nbytes());
    }
    return bytes;
}

const Definition definition([](pybind11::module_& m) {
    m.def("drop_layouts", drop_layouts, "Forgets what was laid out for these weights.");
    m.def("layout_bytes", layout_bytes, "The size of what is laid out for these weights, in bytes.");
});

}  // namespace

Tensor laid_out(const Tensor& weight, const std::function<Tensor()>& make) {
    // Before the copy: a weight that changes meanwhile then looks changed, not current.
    Key key = key_of(weight);
    const at::TensorImpl* const identity = weight.unsafeGetTensorImpl();
    {
        const std::lock_guard<std::mutex> guard(lock);
        const auto found = table.find(identity);
        if (found != table.end() && !found->second.weight.expired() && found->second.key == key)
            return found->second.layout;
    }
    Tensor layout = make();
    const std::lock_guard<std::mutex> guard(lock);
    forget_the_dead();
    table.insert_or_assign(identity, Entry{c10::weak_intrusive_ptr<at::TensorImpl>(weight.getIntrusivePtr()),
                                           std::move(key), layout});
    return layout;
}

}  // namespace pytorch_ext
