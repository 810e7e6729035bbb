// dropout(layer_norm(word[ids] + token_type[...] + position[...])), the first block of a BERT, and its gradients. The
// sum is never stored: backward gathers it again.

#include "norms.cuh"
#include "table_gradient.cuh"

namespace pytorch_ext::cuda {
namespace {

// One of the three tables, or none where `data` is null.
template <class T>
struct Table {
    const T* data;    // (entries, cols)
    const void* ids;  // (outer, inner), by strides
    bool short_ids;   // int32, not int64
    int64_t entries, outer_stride, inner_stride;
};

template <class T>
struct Tables {
    Table<T> word, token_type, position;
    int64_t inner;
};

// --- Kernels ----------------------------------------------------------------------------------------------------

// Adds a table's row for a token. An id that the table does not have gives NaN, and reads nothing.
template <class L>
__device__ inline void look_up(float (&row)[L::E], const Table<typename L::T>& table, int64_t inner,
                               const Place<L>& at, int64_t token, int cols, bool aligned) {
    using T = typename L::T;
    if (table.data == nullptr) return;
    const int64_t place = token / inner * table.outer_stride + token % inner * table.inner_stride;
    const int64_t entry = table.short_ids ? static_cast<const int32_t*>(table.ids)[place]
                                          : static_cast<const int64_t*>(table.ids)[place];
    const bool there = entry >= 0 && entry < table.entries;
    uint4 chunks[L::CHUNKS];
    load_row(chunks, table.data + (there ? entry * cols : 0), at, there ? cols : 0, aligned);
#pragma unroll
    for (int c = 0; c < L::CHUNKS; ++c) {
        float chunk[L::V];
        widen<T>(chunk, chunks[c]);
#pragma unroll
        for (int i = 0; i < L::V; ++i)
            row[c * L::V + i] += there || at.col(c) + i >= cols ? chunk[i] : nanf("");
    }
}

template <class L>
__device__ inline void embed(float (&row)[L::E], const Tables<typename L::T>& tables, const Place<L>& at,
                             int64_t token, int cols, bool aligned) {
#pragma unroll
    for (float& x : row) x = 0.0f;
    look_up<L>(row, tables.word, tables.inner, at, token, cols, aligned);
    look_up<L>(row, tables.token_type, tables.inner, at, token, cols, aligned);
    look_up<L>(row, tables.position, tables.inner, at, token, cols, aligned);
}

// Plan: at most 88 registers, for five blocks of 128 threads at once.
template <class L>
__global__ void __launch_bounds__(L::THREADS)
    embedding_layer_norm_fwd_kernel(Tables<typename L::T> tables, Parameter w, Parameter b, Dropout dropout,
                                    Rows<typename L::T> out, float* mean, float* rstd, int64_t rows, int cols,
                                    float eps, bool aligned) {
    const Place<L> at;
    if (at.row >= rows) return;
    float row[L::E];
    embed(row, tables, at, at.row, cols, aligned);
    const Moments m = moments<L>(row, at, cols, eps);
    normalize<L>(row, m, w, b, at, cols, aligned);
    if (dropout.rng) drop_row(row, at, at.row, cols, dropout);
    store_row<L>(out[at.row], row, at, cols, aligned);
    if (at.lane == 0) {
        mean[at.row] = m.mean;
        rstd[at.row] = m.rstd;
    }
}

// Each block takes every gridDim.x-th group of rows, and leaves its sums of their parameters' gradients behind.
// Plan: at most 208 registers, for two blocks of 128 threads, which is as many as are started.
template <class L>
__global__ void __launch_bounds__(L::THREADS)
    embedding_layer_norm_bwd_kernel(Tables<typename L::T> tables, Rows<const typename L::T> dout, Parameter w,
                                    const float* mean, const float* rstd, Dropout dropout, Rows<float> dx,
                                    float* dw_partial, float* db_partial, int64_t rows, int cols,
                                    bool aligned) {
    const Place<L> at;
    float dw[L::E] = {}, db[L::E] = {};
    for (int64_t row = at.row; row < rows; row += at.step) {
        uint4 dy_chunks[L::CHUNKS];
        load_row(dy_chunks, dout[row], at, cols, aligned);
        float x_hat[L::E], dy[L::E];
        embed(x_hat, tables, at, row, cols, aligned);
        widen_row<L>(dy, dy_chunks);
        if (dropout.rng) drop_row(dy, at, row, cols, dropout);
        normalize_backward<L>(dy, x_hat, dw, db, {mean[row], rstd[row]}, w, at, cols, aligned);
#pragma unroll
        for (int e = 0; e < L::E; e += 4) {
            const int col = at.col(e / L::V) + e % L::V;
            store_chunk(dx[row] + col, narrow<float>(dy + e), cols - col, aligned);
        }
    }
    store_partial<L>(own_partial(dw_partial, cols), dw, at, cols);
    store_partial<L>(own_partial(db_partial, cols), db, at, cols);
}

// --- Launchers --------------------------------------------------------------------------------------------------

// The ids in the shape of input_ids, with a stride of 0 where they broadcast.
Tensor expanded(const Tensor& ids, const Tensor& input_ids) {
    using torch::stable::detail::from, torch::stable::detail::to;
    std::array<StableIValue, 3> stack{from(ids), from(input_ids.sizes()), from(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
}

// The dtype of the tables, or float32 where they have several.
ScalarType common_dtype(const Tensor& word, const OptionalTensor& position,
                        const OptionalTensor& token_type) {
    ScalarType dtype = word.scalar_type();
    for (const OptionalTensor* table : {&position, &token_type})
        if (*table) dtype = promoted(dtype, (*table)->scalar_type());
    return dtype;
}

// A table and its ids as the op is given them, with what the kernels' pointers point to.
struct OwnedTable {
    OptionalTensor given, table, ids;
    bool aligned = true;

    OwnedTable(const OptionalTensor& given, const OptionalTensor& given_ids, const Tensor& input_ids,
               ScalarType dtype)
        : given(given) {
        if (!given) return;
        table = dense(cast(*given, dtype));
        aligned = at_16_bytes(table->data_ptr());
        ids = expanded(*given_ids, input_ids);
        if (ids->dim() > 2) ids = torch::stable::reshape(*ids, Sizes{-1, ids->size(ids->dim() - 1)});
    }
    template <class T>
    Table<T> as() const {
        if (!table) return {nullptr, nullptr, false, 0, 0, 0};
        const int64_t dims = ids->dim();
        return {data<const T>(*table),
                ids->data_ptr(),
                ids->scalar_type() == ScalarType::Int,
                table->size(0),
                dims > 1 ? ids->stride(0) : 0,
                dims > 0 ? ids->stride(dims - 1) : 0};
    }
    // Of the table that was given, or of no elements.
    Tensor gradient(const Tensor& dx, int64_t skipped) const {
        if (!table) return new_empty(dx, Sizes{0});
        return table_gradient(dx, torch::stable::reshape(*ids, Sizes{-1}), *given, skipped);
    }
};

struct OwnedTables {
    OwnedTable word, token_type, position;
    int64_t inner;
    bool aligned;

    OwnedTables(const Tensor& input_ids, const OptionalTensor& token_type_ids,
                const OptionalTensor& position_ids, const Tensor& word_table,
                const OptionalTensor& position_table, const OptionalTensor& token_type_table,
                ScalarType dtype)
        : word(word_table, input_ids, input_ids, dtype),
          token_type(token_type_table, token_type_ids, input_ids, dtype),
          position(position_table, position_ids, input_ids, dtype),
          inner(input_ids.dim() > 0 ? input_ids.size(input_ids.dim() - 1) : 1),
          aligned(all_aligned(word, token_type, position)) {}
    template <class T>
    Tables<T> as() const {
        return {word.as<T>(), token_type.as<T>(), position.as<T>(), inner};
    }
};

std::tuple<Tensor, Tensor, Tensor> embedding_layer_norm_fwd(
    const Tensor& input_ids, const OptionalTensor& token_type_ids, const OptionalTensor& position_ids,
    const Tensor& word, const OptionalTensor& position, const OptionalTensor& token_type,
    const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& rng, double dropout_p,
    double eps) {
    const OnDevice device(word);
    const ScalarType dtype = common_dtype(word, position, token_type);
    const int64_t rows = input_ids.numel();
    const int cols = row_width(word.sizes().slice(1));
    Sizes shape = sizes_of(input_ids);
    shape.push_back(cols);
    const Tensor out = new_empty(word, shape, dtype);
    const Tensor mean = new_empty(word, input_ids.sizes(), ScalarType::Float),
                 rstd = new_empty(mean, mean.sizes());
    if (rows == 0) return {cast(out, word.scalar_type()), mean, rstd};
    if (cols == 0) return {out, filled(mean, NAN), filled(rstd, NAN)};
    const OwnedTables tables(input_ids, token_type_ids, position_ids, word, position, token_type, dtype);
    const Matrix into(out, cols);
    const OwnedParameter w(weight, dtype), b(bias, dtype);
    const Mask mask(rng, dropout_p);
    with_layout(dtype, cols, [&](auto layout) {
        using L = decltype(layout);
        using T = typename L::T;
        // Grid: blocks of rows.
        launch(
            embedding_layer_norm_fwd_kernel<L>,
            Launch{row_blocks<L>(rows), threads_for<L>(cols), shared_for_row_sum<L>(), current_stream(word)},
            tables.as<T>(), w, b, mask.dropout, into.rows<T>(), floats(mean), floats(rstd), rows, cols, eps,
            all_aligned(tables, into, w, b));
    });
    return {cast(out, word.scalar_type()), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embedding_layer_norm_bwd(
    const Tensor& dout, const Tensor& input_ids, const OptionalTensor& token_type_ids,
    const OptionalTensor& position_ids, const Tensor& word, const OptionalTensor& position,
    const OptionalTensor& token_type, const Tensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& rstd, const OptionalTensor& rng, double dropout_p, int64_t padding_idx) {
    const OnDevice device(word);
    const ScalarType dtype = common_dtype(word, position, token_type);
    const int64_t rows = input_ids.numel();
    const int cols = row_width(word.sizes().slice(1));
    const Tensor dweight = gradient_of(weight, dout), dbias = gradient_of(bias, dout);
    if (rows == 0 || cols == 0) {
        return {filled(gradient_of(word, dout), 0.0), filled(gradient_of(position, dout), 0.0),
                filled(gradient_of(token_type, dout), 0.0), filled(dweight, 0.0), filled(dbias, 0.0)};
    }
    const OwnedTables tables(input_ids, token_type_ids, position_ids, word, position, token_type, dtype);
    const Tensor dx = new_empty(word, Sizes{rows, cols}, ScalarType::Float);
    const Matrix dy(cast(dout, dtype), cols), into(dx, cols);
    const OwnedParameter w(weight, dtype);
    const Mask mask(rng, dropout_p);
    const Tensor means = dense(mean), rstds = dense(rstd);
    with_layout(dtype, cols, [&](auto layout) {
        using L = decltype(layout);
        using T = typename L::T;
        const unsigned blocks = blocks_for_sums<L>(rows, cols);
        const ParameterSums sums({dweight, dbias}, blocks, cols);
        // Grid: as many blocks as share the rows.
        launch(embedding_layer_norm_bwd_kernel<L>,
               Launch{blocks, threads_for<L>(cols), shared_for_sums<L>(cols), current_stream(word)},
               tables.as<T>(), dy.rows<const T>(), w, floats(means), floats(rstds), mask.dropout,
               into.rows<float>(), sums[0], sums[1], rows, cols, all_aligned(tables, dy, into, w));
        sums.finish(current_stream(word));
    });
    return {tables.word.gradient(dx, padding_idx), tables.position.gradient(dx, -1),
            tables.token_type.gradient(dx, -1), dweight, dbias};
}

}  // namespace

// --- Registration -----------------------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_FRAGMENT(PYTORCH_EXT_OPS, m) {
    m.def(
        "embedding_layer_norm_fwd(Tensor input_ids, Tensor? token_type_ids, Tensor? position_ids, Tensor "
        "word,"
        " Tensor? position, Tensor? token_type, Tensor weight, Tensor? bias, Tensor? rng, float dropout_p, "
        "float eps)"
        " -> (Tensor out, Tensor mean, Tensor rstd)");
    m.def(
        "embedding_layer_norm_bwd(Tensor dout, Tensor input_ids, Tensor? token_type_ids, Tensor? "
        "position_ids,"
        " Tensor word, Tensor? position, Tensor? token_type, Tensor weight, Tensor? bias, Tensor mean, "
        "Tensor rstd,"
        " Tensor? rng, float dropout_p, int padding_idx)"
        " -> (Tensor dword, Tensor dposition, Tensor dtoken_type, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(PYTORCH_EXT_OPS, PYTORCH_EXT_KEY, m) {
    m.impl("embedding_layer_norm_fwd", TORCH_BOX(&embedding_layer_norm_fwd));
    m.impl("embedding_layer_norm_bwd", TORCH_BOX(&embedding_layer_norm_bwd));
}

}  // namespace pytorch_ext::cuda
