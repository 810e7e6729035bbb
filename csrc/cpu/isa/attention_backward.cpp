// Attention, backward: the scores are computed again, from them and `lse` the weights. An item owns a key head and a
// range of its keys, so that their gradients are summed by one thread, in one order.

#include "attention_tiles.h"
#include "philox.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {
namespace {

// Queries of a block: more than forward, since so many products make one step of the sums of dkey and dvalue.
template <class Engine>
constexpr ptrdiff_t ROWS = Engine::M_STEP > 1 ? 2 * Engine::M_STEP : 4 * MR;

template <class T, class Engine>
struct BackwardTiles {
    using Left = typename Engine::Left;
    using Right = typename Engine::Right;

    ptrdiff_t ld, dim_ld, value_ld;
    Right *keys_transposed, *values_transposed, *keys, *queries_right, *douts_right;
    Left *queries, *douts;
    float *scores, *dweights;  // [ROWS][ld]
    Left *weights, *dscores;   // over the two above where all are float
    Left* transposed;          // [ld][ROWS], for an engine that wants it so
    float *dqueries, *dkeys, *dvalues;
    float *mask, *factors;
    T *finite_keys, *finite_queries, *finite_douts;

    BackwardTiles(const Attention& a, Arena& arena) {
        const ptrdiff_t d = a.head_dim, dv = a.value_dim, n = a.pass_keys, rows = ROWS<Engine>;
        const bool in_place = sizeof(Left) == 4, checked = a.causal || a.mask.kind != MaskKind::none;
        ld = spread_rows(n);
        dim_ld = round_up(d, most(NR, Engine::N_STEP));
        value_ld = round_up(dv, most(NR, Engine::N_STEP));
        keys_transposed = arena.take<Right>(Engine::right_size(d, n));
        values_transposed = arena.take<Right>(Engine::right_size(dv, n));
        keys = arena.take<Right>(Engine::right_size(n, d));
        queries_right = arena.take<Right>(Engine::right_size(rows, d));
        douts_right = arena.take<Right>(Engine::right_size(rows, dv));
        queries = arena.take<Left>(LeftTile<T, Engine>::size(rows, d));
        douts = arena.take<Left>(LeftTile<T, Engine>::size(rows, dv));
        scores = arena.take(rows * ld);
        dweights = arena.take(rows * ld);
        weights = in_place ? (Left*)scores : arena.take<Left>(rows * ld);
        dscores = in_place ? (Left*)dweights : arena.take<Left>(rows * ld);
        transposed = arena.take<Left>(Engine::READS_TRANSPOSED ? 0 : ld * rows);
        dqueries = arena.take(rows * dim_ld);
        dkeys = arena.take(round_up(n, Engine::M_STEP) * dim_ld);
        dvalues = arena.take(round_up(n, Engine::M_STEP) * value_ld);
        mask = arena.take(LONGEST_PASS + W);
        factors = arena.take(a.dropout ? LONGEST_PASS + W : 0);
        finite_keys = arena.take<T>(checked ? n * d : 0);
        finite_queries = arena.take<T>(checked ? rows * d : 0);
        finite_douts = arena.take<T>(checked ? rows * dv : 0);
    }
};

// One row of a tile. The weights are e^(score - shift), and where the whole row is there that over its sum: so they add
// up to 1 even where `shift`, the logarithm of that sum, has lost digits (all of them, where a mask has added -3e38).
struct Row {
    float *scores, *dweights;  // in: query key^T and dout value^T
    const float *mask, *factors;
    ptrdiff_t n;  // the keys that it may look at
    float scale, shift;
    bool whole;   // all keys of the query are there
    float delta;  // what the gradients of the row's scores have in common, if they are not
    float* out;   // gradients of the mask, or null
};

template <bool MASKED, bool DROPS, class Left>
void row_gradients(const Row& row, Left* weights, Left* dscores) {
    F total{}, common{};
    each_score(row.n, [&](ptrdiff_t j, I live) {
        const F x = scores_at<MASKED>(row.scores, row.mask, j, set(row.scale), live) - row.shift;
        F weight = exp(x), gradient = load(row.dweights + j);
        if (DROPS) {
            gradient *= load(row.factors + j);
            store(row.dweights + j, gradient);
        }
        total += live ? weight : F{};
        common += live ? weight * gradient : F{};
        store(row.scores + j, live ? weight : set(FORBIDDEN));
    });
    const float over_sum = row.whole ? 1.0f / sum(total) : 1.0f;
    const F delta = set(row.whole ? sum(common) * over_sum : row.delta);
    each_score(row.n, [&](ptrdiff_t j, I live) {
        F weight = load(row.scores + j);
        if (MASKED) live &= ~is_forbidden(weight);
        weight *= over_sum;
        const F gradient = weight * (load(row.dweights + j) - delta);
        if (row.out) store(row.out + j, live ? gradient : F{}, least(row.n - j, W));
        store(dscores + j, live ? gradient * row.scale : set(FORBIDDEN));
        if (DROPS) weight *= load(row.factors + j);
        store(weights + j, live ? weight : set(FORBIDDEN));
    });
}

template <class T, class Engine>
class BackwardItem {
public:
    BackwardItem(const Attention& a, const AttentionGradients& g, ptrdiff_t item, float* scratch)
        : a_(a), g_(g), arena_(scratch), t_(a, arena_), s_(a, item / a.key_heads % a.batch) {
        key_head_ = item % a.key_heads;
        group_ = a.heads / a.key_heads;
        part_ = item / (a.batch * a.key_heads);
    }

    void run() {
        const Visible visible(a_, s_, key_head_ * group_, group_, t_.mask);
        masked_ = visible.masked;
        checked_ = masked_ || a_.causal;
        one_pass_ = visible.keys <= a_.pass_keys;
        if (visible.keys == 0 && part_ == 0 && !g_.dquery_sums) write_no_dquery();
        ptrdiff_t first = part_ * a_.part_units * a_.pass_keys;
        const ptrdiff_t end = least(s_.k_len, first + a_.part_units * a_.pass_keys);
        for (; first < end; first += a_.pass_keys) {
            first_ = first;
            keys_ = most(0, least(a_.pass_keys, visible.keys - first));
            if (keys_ > 0) pass(visible.keys);
            write_keys(least(a_.pass_keys, end - first));
        }
    }

private:
    void pass(ptrdiff_t visible) {
        const T* keys = s_.keys<T>(a_.key, key_head_, first_);
        const Finite<T> finite(keys, a_.key.token, keys_, a_.head_dim, checked_, t_.finite_keys);
        Engine::pack_transposed(t_.keys_transposed, keys, a_.key.token, a_.head_dim, keys_);
        Engine::pack_transposed(t_.values_transposed, s_.keys<T>(a_.value, key_head_, first_), a_.value.token,
                                a_.value_dim, keys_);
        Engine::pack(t_.keys, finite.data, finite.row, keys_, a_.head_dim);
        summed_ = false;
        for (ptrdiff_t head = key_head_ * group_; head < (key_head_ + 1) * group_; ++head)
            for (ptrdiff_t q = 0; q < s_.q_len; q += ROWS<Engine>) {
                const ptrdiff_t rows = least(ROWS<Engine>, s_.q_len - q);
                const ptrdiff_t end = least(keys_, (a_.causal ? least(visible, q + rows) : visible) - first_);
                if (end > 0) block(head, q, rows, end, finite.changed ? keys : nullptr);
            }
        if (!summed_) clear_sums();
    }

    void clear_sums() {
        fill(t_.dkeys, keys_ * t_.dim_ld, 0.0f);
        fill(t_.dvalues, keys_ * t_.value_ld, 0.0f);
        summed_ = true;
    }

    void block(ptrdiff_t head, ptrdiff_t q, ptrdiff_t rows, ptrdiff_t end, const T* not_finite_keys) {
        const ptrdiff_t d = a_.head_dim, dv = a_.value_dim;
        const T* query = s_.queries<T>(a_.query, head, q);
        const T* dout = s_.queries<T>(g_.dout, head, q);
        const LeftTile<T, Engine> queries(query, a_.query.token, rows, d, t_.queries);
        const LeftTile<T, Engine> douts(dout, g_.dout.token, rows, dv, t_.douts);
        const Finite<T> query_rows(query, a_.query.token, rows, d, checked_, t_.finite_queries);
        const Finite<T> dout_rows(dout, g_.dout.token, rows, dv, checked_, t_.finite_douts);
        Engine::pack(t_.queries_right, query_rows.data, query_rows.row, rows, d);
        Engine::pack(t_.douts_right, dout_rows.data, dout_rows.row, rows, dv);
        multiply<Engine>(queries.data, queries.ld, t_.keys_transposed, d, keys_, rows, end, d, t_.scores,
                         t_.ld, false);
        multiply<Engine>(douts.data, douts.ld, t_.values_transposed, dv, keys_, rows, end, dv, t_.dweights,
                         t_.ld, false);
        for (ptrdiff_t i = 0; i < rows; ++i) row(head, q + i, i, end);

        multiply<Engine>(t_.dscores, t_.ld, t_.keys, keys_, d, rows, d, end, t_.dqueries, t_.dim_ld, false);
        if (not_finite_keys)
            add_not_finite(t_.dscores, t_.weights, t_.ld, 1, not_finite_keys, a_.key.token, rows, end, d,
                           t_.dqueries, t_.dim_ld);
        write_queries(head, q, rows);

        if (!summed_ && end < keys_) clear_sums();
        sum_over_queries(t_.dscores, t_.queries_right, query_rows.changed ? query : nullptr, a_.query.token,
                         rows, end, d, t_.dkeys, t_.dim_ld);
        sum_over_queries(t_.weights, t_.douts_right, dout_rows.changed ? dout : nullptr, g_.dout.token, rows,
                         end, dv, t_.dvalues, t_.value_ld);
        summed_ = true;
    }

    // Row i of the tile: scores and gradients of the weights to weights and gradients of the scores.
    void row(ptrdiff_t head, ptrdiff_t query, ptrdiff_t i, ptrdiff_t end) {
        typename Engine::Left *weights = t_.weights + i * t_.ld, *dscores = t_.dscores + i * t_.ld;
        Row row{};
        row.scores = t_.scores + i * t_.ld;
        row.dweights = t_.dweights + i * t_.ld;
        row.mask = t_.mask;
        row.factors = t_.factors;
        row.n = a_.causal ? most(0, least(end, query + 1 - first_)) : end;
        row.scale = a_.scale;
        row.shift = *s_.lse(a_, head, query);
        if (row.shift == -INFINITE) row.n = 0;
        const ptrdiff_t padded_end = round_up(end, most(Engine::K_STEP, Engine::M_STEP));
        for (ptrdiff_t j = round_up(row.n, W); j < padded_end; ++j) {
            store(weights + j, set(FORBIDDEN), 1);
            store(dscores + j, set(FORBIDDEN), 1);
        }
        if (row.n == 0) return;
        if (masked_) mask_row(a_.mask, s_.batch, head, query, first_, row.n, t_.mask);
        if (a_.dropout)
            dropout_factors(t_.factors, row.n, first_, query, s_.index * a_.heads + head, *a_.dropout);
        row.whole = one_pass_;
        if (!one_pass_)
            row.delta = dot(s_.queries<T>(g_.dout, head, query), s_.queries<T>(a_.out, head, query));
        if (g_.dscores)
            row.out = g_.dscores + ((s_.index * a_.heads + head) * a_.q_len + query) * a_.k_len + first_;
        if (masked_)
            a_.dropout ? row_gradients<true, true>(row, weights, dscores)
                       : row_gradients<true, false>(row, weights, dscores);
        else
            a_.dropout ? row_gradients<false, true>(row, weights, dscores)
                       : row_gradients<false, false>(row, weights, dscores);
    }

    float dot(const T* x, const T* y) const {
        F total{};
        ptrdiff_t p = 0;
        for (; p + W <= a_.value_dim; p += W) total += load(x + p) * load(y + p);
        if (p < a_.value_dim) total += load(x + p, a_.value_dim - p) * load(y + p, a_.value_dim - p);
        return sum(total);
    }

    // sums[end][cols] += tile[rows][end]^T src[rows][cols], `right` being src laid out.
    void sum_over_queries(const typename Engine::Left* tile, const typename Engine::Right* right,
                          const T* not_finite, ptrdiff_t src_row, ptrdiff_t rows, ptrdiff_t end,
                          ptrdiff_t cols, float* sums, ptrdiff_t ld) {
        if constexpr (Engine::READS_TRANSPOSED) {
            Engine::multiply_transposed(tile, t_.ld, right, rows, cols, end, cols, rows, sums, ld, summed_);
        } else {
            // All rows that the product writes: the sums of keys behind `end` have to stay as they are.
            const ptrdiff_t m = round_up(end, Engine::M_STEP);
            Engine::transpose_left(t_.transposed, ROWS<Engine>, tile, t_.ld, rows, m);
            Engine::multiply(t_.transposed, ROWS<Engine>, right, rows, cols, m, cols, rows, sums, ld,
                             summed_);
        }
        if (not_finite)
            add_not_finite(tile, t_.weights, 1, t_.ld, not_finite, src_row, end, rows, cols, sums, ld);
    }

    void write_queries(ptrdiff_t head, ptrdiff_t q, ptrdiff_t rows) {
        const float* sums = t_.dqueries;
        if (!g_.dquery_sums) {
            T* out = s_.queries<T>(g_.dquery, head, q);
            for (ptrdiff_t i = 0; i < rows; ++i, sums += t_.dim_ld, out += g_.dquery.token)
                store_row(out, sums, a_.head_dim, 1.0f);
            return;
        }
        for (ptrdiff_t i = q; i < q + rows; ++i, sums += t_.dim_ld) {
            float* out = s_.queries<float>(sums_of_part(), head, i);
            for (ptrdiff_t p = 0; p < a_.head_dim; ++p) out[p] += sums[p];
        }
    }

    Heads sums_of_part() const {
        Heads h = g_.dquery;  // of the same strides
        h.data = g_.dquery_sums + part_ * g_.dquery_size;
        return h;
    }

    void write_no_dquery() {
        for (ptrdiff_t head = key_head_ * group_; head < (key_head_ + 1) * group_; ++head)
            for (ptrdiff_t i = 0; i < s_.q_len; ++i)
                fill(s_.queries<T>(g_.dquery, head, i), a_.head_dim, 0.0f);
    }

    // The gradients of this pass's keys, and zeros for those behind them that nothing looks at.
    void write_keys(ptrdiff_t n) {
        for (ptrdiff_t j = 0; j < n; ++j) {
            T* dkey = s_.keys<T>(g_.dkey, key_head_, first_ + j);
            T* dvalue = s_.keys<T>(g_.dvalue, key_head_, first_ + j);
            if (j < keys_) {
                store_row(dkey, t_.dkeys + j * t_.dim_ld, a_.head_dim, 1.0f);
                store_row(dvalue, t_.dvalues + j * t_.value_ld, a_.value_dim, 1.0f);
            } else {
                fill(dkey, a_.head_dim, 0.0f);
                fill(dvalue, a_.value_dim, 0.0f);
            }
        }
    }

    const Attention& a_;
    const AttentionGradients& g_;
    Arena arena_;
    BackwardTiles<T, Engine> t_;
    Sequence s_;
    ptrdiff_t key_head_, group_, part_;
    ptrdiff_t first_ = 0, keys_ = 0;  // of this pass
    bool masked_ = false, checked_ = false, one_pass_ = true;
    bool summed_ = false;  // dkeys and dvalues hold sums
};

template <class T, class Engine>
void plan(Attention& a) {
    const ptrdiff_t pairs = a.batch * a.key_heads;
    // Where there are fewer pairs than threads, these share the keys of each.
    const ptrdiff_t shares = pairs > 0 && pairs < a.threads ? (a.threads + pairs - 1) / pairs : 1;
    a.pass_keys = most(1, least(LONGEST_PASS, round_up((a.k_len + shares - 1) / shares, 64)));
    if (shares == 1) a.pass_keys = most(1, least(a.pass_keys, a.k_len));
    const ptrdiff_t passes = most(1, (a.k_len + a.pass_keys - 1) / a.pass_keys);
    a.parts = least(shares, passes);
    a.part_units = (passes + a.parts - 1) / a.parts;
    a.items = pairs * a.parts;
    Arena arena(nullptr);
    BackwardTiles<T, Engine> tiles(a, arena);
    a.scratch = arena.used();
}

}  // namespace

void plan_attention_backward(Attention& a) {
    visit_engine(a, [&](auto* type, auto* engine) { plan<PX_TYPE(type), PX_TYPE(engine)>(a); });
}

void attention_backward(const Attention& a, const AttentionGradients& g, ptrdiff_t item, float* scratch) {
    visit_engine(a, [&](auto* type, auto* engine) {
        BackwardItem<PX_TYPE(type), PX_TYPE(engine)>(a, g, item, scratch).run();
    });
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
