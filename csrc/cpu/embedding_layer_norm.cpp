// embedding_layer_norm: dropout(layer_norm(word[ids] + token_type[...] + position[...])), and its gradients.

#include "embedding_layer_norm.h"

#include <ATen/ExpandUtils.h>

#include "direct.h"
#include "rng.h"
#include "row_work.h"

namespace pytorch_ext {
namespace {

// A table and the ids that look it up, one for each row.
struct Lookup {
    Tensor table, ids;

    Lookup(const OptionalTensor& table_, const OptionalTensor& ids_, at::IntArrayRef rows,
           at::ScalarType dtype) {
        if (!table_ || !table_->defined()) return;
        table = table_->to(dtype).contiguous();
        ids = ids_->expand(rows).to(at::kLong).contiguous();
    }
    const void* data() const { return table.defined() ? table.const_data_ptr() : nullptr; }
    const int64_t* id() const { return table.defined() ? ids.const_data_ptr<int64_t>() : nullptr; }
};

// In which the tables are added up: under autocast they may be of two.
at::ScalarType widest(const Tensor& word, const OptionalTensor& position, const OptionalTensor& token_type) {
    auto dtype = word.scalar_type();
    for (const OptionalTensor& table : {position, token_type})
        if (table && table->defined()) dtype = at::promote_types(dtype, table->scalar_type());
    return dtype;
}

// Everything that forward and backward have in common. It keeps alive what `embeddings` points to.
struct Inputs {
    at::ScalarType dtype;
    Lookup word, token_type, position;
    std::optional<Dropout> dropout;
    Embeddings embeddings;

    Inputs(const Tensor& input_ids, const OptionalTensor& token_type_ids, const OptionalTensor& position_ids,
           const Tensor& word_, const OptionalTensor& position_, const OptionalTensor& token_type_,
           const std::optional<Dropout>& dropout_)
        : dtype(widest(word_, position_, token_type_)),
          word(word_, input_ids, input_ids.sizes(), dtype),
          token_type(token_type_, token_type_ids, input_ids.sizes(), dtype),
          position(position_, position_ids, input_ids.sizes(), dtype),
          dropout(dropout_),
          embeddings{word.data(),
                     token_type.data(),
                     position.data(),
                     word.id(),
                     token_type.id(),
                     position.id(),
                     dropout ? &*dropout : nullptr,
                     word_.size(1),
                     dtype_of(word.table)} {}
    Inputs(const Inputs&) = delete;
};

// `mask` gets dropout's, where it is defined.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input_ids, const OptionalTensor& token_type_ids,
                                           const OptionalTensor& position_ids, const Tensor& word,
                                           const OptionalTensor& position, const OptionalTensor& token_type,
                                           const Tensor& weight, const OptionalTensor& bias,
                                           const std::optional<Dropout>& dropout, const Tensor& mask,
                                           double eps) {
    const int64_t cols = word.size(1);
    auto shape = input_ids.sizes().vec();
    const Tensor mean = at::empty(shape, word.options().dtype(at::kFloat)),
                 rstd = at::empty(mean.sizes(), mean.options());
    shape.push_back(cols);
    const Inputs inputs(input_ids, token_type_ids, position_ids, word, position, token_type, dropout);
    const Tensor out = at::empty(shape, word.options().dtype(inputs.dtype));
    const Tensor w = as_floats(weight), b = as_floats(bias);
    const EmbeddingLayerNorm a{inputs.embeddings,
                               out.mutable_data_ptr(),
                               mean.mutable_data_ptr<float>(),
                               rstd.mutable_data_ptr<float>(),
                               floats(w),
                               floats(b),
                               mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr,
                               static_cast<float>(eps)};
    parallel_rows(mean.numel(), cols, [&](int64_t first, int64_t rows) {
        const std::unique_ptr<float[]> scratch(new float[cols]);
        PYTORCH_EXT_CALL(embedding_layer_norm_rows, a, first, rows, scratch.get());
    });
    return {out.to(word.scalar_type()), mean, rstd};
}

// For each entry the rows that looked it up, as a list in rising order, and from that its gradient: nothing depends on
// the order in which threads come. The entry `without` gets zeros.
Tensor gradient_of(const OptionalTensor& table, const Lookup& lookup, const Tensor& dx,
                   int64_t without = -1) {
    if (!lookup.table.defined()) return at::empty({0}, dx.options());
    const Tensor out = at::zeros(table->sizes(), table->options());
    const int64_t cols = out.size(1);
    const int64_t entries = out.size(0), rows = lookup.ids.numel();
    // A table of words is long, and few of its entries are looked up: a new list of all would be new pages each time.
    auto* const first = reinterpret_cast<int64_t*>(thread_scratch(2 * entries));
    std::fill_n(first, entries, -1);
    std::vector<int64_t> next(rows), found;
    for (int64_t row = rows - 1; row >= 0; --row) {
        const int64_t entry = lookup.id()[row];
        if (entry == without) continue;
        if (first[entry] < 0) found.push_back(entry);
        next[row] = std::exchange(first[entry], row);
    }
    const TableGradient a{dx.const_data_ptr<float>(), found.data(), first,        next.data(),
                          out.mutable_data_ptr(),     cols,         dtype_of(out)};
    parallel_rows(found.size(), cols,
                  [&](int64_t begin, int64_t count) { PYTORCH_EXT_CALL(table_gradient, a, begin, count); });
    return out;
}

// `mask` as forward wrote it, or undefined.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const Tensor& input_ids, const OptionalTensor& token_type_ids,
    const OptionalTensor& position_ids, const Tensor& word, const OptionalTensor& position,
    const OptionalTensor& token_type, const Tensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& rstd, const std::optional<Dropout>& dropout, const Tensor& mask, int64_t padding_idx) {
    const int64_t cols = word.size(1);
    const Inputs inputs(input_ids, token_type_ids, position_ids, word, position, token_type, dropout);
    const Tensor dy = dout.to(inputs.dtype).contiguous(), w = as_floats(weight);
    const Tensor means = mean.contiguous(), rstds = rstd.contiguous();
    const Tensor dx = at::empty(dy.sizes(), dy.options().dtype(at::kFloat));
    const bool few_token_types = inputs.token_type.table.defined() && token_type->size(0) <= 8;
    const EmbeddingLayerNormGradient a{inputs.embeddings,
                                       dy.const_data_ptr(),
                                       dx.mutable_data_ptr<float>(),
                                       floats(means),
                                       floats(rstds),
                                       floats(w),
                                       mask.defined() ? mask.const_data_ptr<uint8_t>() : nullptr,
                                       few_token_types};
    const RowSums sums(means.numel(), few_token_types ? 2 + token_type->size(0) : 2, cols);
    sums.add(8 * cols, [&](int64_t first, int64_t rows, float* partial, float* scratch) {
        PYTORCH_EXT_CALL(embedding_layer_norm_gradient, a, first, rows, partial, scratch);
    });
    return {gradient_of(word, inputs.word, dx, padding_idx), gradient_of(position, inputs.position, dx),
            few_token_types ? sums.of(2, token_type, dout) : gradient_of(token_type, inputs.token_type, dx),
            sums.of(0, weight, dout), sums.of(1, bias, dout)};
}

std::tuple<Tensor, Tensor, Tensor> embedding_layer_norm_fwd(
    const Tensor& input_ids, const OptionalTensor& token_type_ids, const OptionalTensor& position_ids,
    const Tensor& word, const OptionalTensor& position, const OptionalTensor& token_type,
    const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& rng, double dropout_p,
    double eps) {
    return forward(input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias,
                   make_dropout(rng, dropout_p), Tensor(), eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embedding_layer_norm_bwd(
    const Tensor& dout, const Tensor& input_ids, const OptionalTensor& token_type_ids,
    const OptionalTensor& position_ids, const Tensor& word, const OptionalTensor& position,
    const OptionalTensor& token_type, const Tensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& rstd, const OptionalTensor& rng, double dropout_p, int64_t padding_idx) {
    return backward(dout, input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias,
                    mean, rstd, make_dropout(rng, dropout_p), Tensor(), padding_idx);
}

// Dropout's mask is saved, a bit for each element, because to draw it again costs as much as the rest of backward.
Tensors differentiate(const Backward& node) {
    const auto& [saved, gradients, constants, wants] = node;
    const Tensor &position = saved[4], &token_type = saved[5], &bias = saved[7], &mask = saved[10];
    std::optional<Dropout> dropout;
    if (mask.defined()) dropout = make_dropout(constants[0].toDouble());
    const auto [dword, dposition, dtoken_type, dweight, dbias] =
        backward(gradients[0], saved[0], saved[1], saved[2], saved[3], position, token_type, saved[6], bias,
                 saved[8], saved[9], dropout, mask, constants[1].toInt());
    return {dword, defined_like(position, dposition), defined_like(token_type, dtoken_type), dweight,
            defined_like(bias, dbias)};
}

constexpr Formula FORMULA{"EmbeddingLayerNormBackward", differentiate};

Tensor embedding_layer_norm_grad(const Tensor& input_ids, const OptionalTensor& token_type_ids,
                                 const OptionalTensor& position_ids, const Tensor& word,
                                 const OptionalTensor& position, const OptionalTensor& token_type,
                                 const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& rng,
                                 double dropout_p, double eps, int64_t padding_idx) {
    const auto dropout = make_dropout(rng, dropout_p);
    const Tensor mask =
        dropout ? at::empty({input_ids.numel(), mask_bytes(word.size(1))}, at::kByte) : Tensor();
    const auto [out, mean, rstd] = below_autograd([&] {
        return forward(input_ids, token_type_ids, position_ids, word, position, token_type, weight, bias,
                       dropout, mask, eps);
    });
    const Tensor p = or_undefined(position), t = or_undefined(token_type), b = or_undefined(bias);
    record(FORMULA, {word, p, t, weight, b}, {out},
           {input_ids, or_undefined(token_type_ids), or_undefined(position_ids), word, p, t, weight, b, mean,
            rstd, mask},
           {dropout_p, padding_idx});
    return out;
}

bool are_ids(const Argument& ids) {
    return ids.given() && (ids->scalar_type() == at::kLong || ids->scalar_type() == at::kInt);
}

template <class Id>
bool all_below(const Tensor& ids, int64_t entries) {
    const Id *const first = ids.const_data_ptr<Id>(), *const last = first + ids.numel();
    return std::all_of(first, last, [=](Id id) { return static_cast<uint64_t>(id) < uint64_t(entries); });
}

bool are_rows_of(const Tensor& table, const Tensor& ids) {
    const Tensor dense = ids.contiguous();
    return ids.scalar_type() == at::kInt ? all_below<int>(dense, table.size(0))
                                         : all_below<int64_t>(dense, table.size(0));
}

// Both absent, or `ids` that broadcast to `input_ids` beside a table like that of words.
bool is_lookup(const Argument& ids, const Argument& table, const Argument& input_ids, const Argument& word) {
    if (!ids.given() && !table.given()) return true;
    return are_ids(ids) && table.given() && table.like(word) && table->dim() == 2 &&
           table->size(1) == word->size(1) && at::is_expandable_to(ids->sizes(), input_ids->sizes()) &&
           are_rows_of(*table, *ids);
}

std::optional<Tensor> embedding_layer_norm_direct(const Argument& word, const Argument& input_ids,
                                                  const Argument& token_type_ids,
                                                  const Argument& position_ids, const Argument& position,
                                                  const Argument& token_type, const Argument& weight,
                                                  const Argument& bias, Number eps,
                                                  std::optional<int64_t> padding_idx, Number dropout_p,
                                                  bool training) {
    if (!usual({&input_ids, &token_type_ids, &position_ids, &word, &position, &token_type, &weight, &bias}) ||
        !word.floating() || word->dim() != 2 || !are_ids(input_ids) || !is_probability(dropout_p))
        return {};
    const int64_t entries = word->size(0), row = padding_idx.value_or(0);
    const auto hidden = word->sizes().slice(1);
    if (!weight.given() || !is_norm_parameter(weight, word, hidden) ||
        !is_norm_parameter(bias, word, hidden) || row < -entries || row >= std::max<int64_t>(entries, 1) ||
        !are_rows_of(*word, *input_ids) || !is_lookup(token_type_ids, token_type, input_ids, word) ||
        !is_lookup(position_ids, position, input_ids, word))
        return {};
    const double p = training ? dropout_p.value : 0.0;
    return compute([&] {
        const auto call = [&](auto function, auto... more) {
            return function(*input_ids, token_type_ids.optional(), position_ids.optional(), *word,
                            position.optional(), token_type.optional(), *weight, bias.optional(), draw_rng(p),
                            p, eps, more...);
        };
        if (!wants_grad({&word, &position, &token_type, &weight, &bias}))
            return std::get<0>(call(embedding_layer_norm_fwd));
        return call(embedding_layer_norm_grad, !padding_idx ? -1 : row < 0 ? row + entries : row);
    });
}

const Definition definition([](pybind11::module_& m) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("embedding_layer_norm_fwd", embedding_layer_norm_fwd, release());
    m.def("embedding_layer_norm_bwd", embedding_layer_norm_bwd, release());
    m.def("embedding_layer_norm_grad", released(embedding_layer_norm_grad));
    define_direct(m, "embedding_layer_norm_direct", embedding_layer_norm_direct);
});

}  // namespace
}  // namespace pytorch_ext
