// Attention, forward: the online softmax of Dao et al. 2022 (FlashAttention, arXiv 2205.14135) over passes of keys. Of
// up to LONGEST_PASS keys all scores of a query are there at once.

#include "attention_tiles.h"
#include "philox.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {
namespace {

// Queries of a block. Their scores stay in the first two levels of cache.
template <class Engine>
constexpr ptrdiff_t ROWS = Engine::M_STEP > 1 ? Engine::M_STEP : 4 * MR;

// Of more keys than one pass takes, the blocks of a part keep their state from pass to pass; so there are few.
template <class Engine>
constexpr ptrdiff_t MOST_UNITS = LONGEST_PASS / ROWS<Engine>;

constexpr float LOG2_OF_E = 1.44269504f;

// Between them neither a power nor what it is divided by is out of range.
constexpr float SMALLEST_SCALE = 1e-30f, LARGEST_SCALE = 1e30f;

template <class T, class Engine>
struct ForwardTiles {
    using Left = typename Engine::Left;
    using Right = typename Engine::Right;

    ptrdiff_t ld, sums_ld;
    Right *keys, *values;
    Left* queries;
    float* scores;
    Left* weights;                  // [ROWS][ld], over the scores where both are float
    float *sums, *largest, *total;  // by unit: [ROWS][sums_ld], [ROWS], [ROWS]
    float *mask, *factors;
    T* finite;

    ForwardTiles(const Attention& a, Arena& arena) {
        const ptrdiff_t units = a.k_len > a.pass_keys ? a.part_units : 1;
        ld = spread_rows(a.pass_keys);
        sums_ld = round_up(a.value_dim, most(NR, Engine::N_STEP));
        keys = arena.take<Right>(Engine::right_size(a.head_dim, a.pass_keys));
        values = arena.take<Right>(Engine::right_size(a.pass_keys, a.value_dim));
        queries = arena.take<Left>(LeftTile<T, Engine>::size(ROWS<Engine>, a.head_dim));
        scores = arena.take(ROWS<Engine> * ld);
        weights = sizeof(Left) == 4 ? (Left*)scores : arena.take<Left>(ROWS<Engine> * ld);
        sums = arena.take(units * ROWS<Engine> * sums_ld);
        largest = arena.take(units * ROWS<Engine>);
        total = arena.take(units * ROWS<Engine>);
        mask = arena.take(LONGEST_PASS + W);
        factors = arena.take(a.dropout ? LONGEST_PASS + W : 0);
        finite = arena.take<T>(a.causal || a.mask.kind != MaskKind::none ? a.pass_keys * a.value_dim : 0);
    }
};

// weights[j] = e^(score - shift), and with dropout that times factors[j]; returns the sum without dropout. Behind the n
// keys that the row may look at there are others to `end`, forbidden.
template <bool MASKED, class Left>
PX_INLINE float exponentials(Left* weights, const float* products, const float* mask, const float* factors,
                             ptrdiff_t n, ptrdiff_t end, float scale, float shift) {
    F total{};
    each_score(n, [&](ptrdiff_t j, I live) {
        const F x = scores_at<MASKED>(products, mask, j, set(scale), live) - shift;
        F weight = exp_of_negative(x);
        total += live ? weight : F{};
        if (factors) weight *= load(factors + j);
        store(weights + j, live ? weight : set(FORBIDDEN));
    });
    for (ptrdiff_t j = round_up(n, W); j < end; ++j) store(weights + j, set(FORBIDDEN), 1);
    return sum(total);
}

// weights[i][j] = power_of(products[i][j]) for N rows that lie `ld` apart, and their sums.
template <int N, class Left, class Power>
PX_INLINE void powers(Left* weights, const float* products, ptrdiff_t ld, ptrdiff_t n, ptrdiff_t end,
                      const Power& power_of, float* sums) {
    F total[N]{};
    each_score(n, [&](ptrdiff_t j, I live) {
        F weight[N];
#pragma GCC unroll 2
        for (int i = 0; i < N; ++i) weight[i] = power_of(load(products + i * ld + j));
#pragma GCC unroll 2
        for (int i = 0; i < N; ++i) {
            total[i] += live ? weight[i] : F{};
            store(weights + i * ld + j, live ? weight[i] : set(FORBIDDEN));
        }
    });
    for (int i = 0; i < N; ++i, weights += ld) {
        for (ptrdiff_t j = round_up(n, W); j < end; ++j) store(weights + j, set(FORBIDDEN), 1);
        sums[i] = sum(total[i]);
    }
}

PX_INLINE float largest_product(const float* products, ptrdiff_t n) {
    F largest[4];
    for (F& x : largest) x = set(-INFINITE);
    ptrdiff_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) largest[i] = max(largest[i], load(products + j + i * W));
    each_score(n - j, [&](ptrdiff_t i, I live) {
        largest[0] = max(largest[0], live ? load(products + j + i) : set(-INFINITE));
    });
    return max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}

// --- Scores near 0 ---

// No score is further from 0 than the length of its query times that of its key. Where for a whole block that is near,
// the powers are taken of the scores as they are: none needs the difference to the largest, nor the largest. (A length
// that is NaN counts as none: all scores of its row are NaN, by whatever way.)

constexpr float NEAR = 60.0f;             // as a power of 2
constexpr ptrdiff_t FEWEST_BOUNDED = 64;  // keys: of fewer, to find the bound costs what it saves
// With these as the largest value, and of LONGEST_PASS keys, no sum of products is out of range, nor subnormal.
constexpr float SMALLEST_VALUE = 0x1p-40f, LARGEST_VALUE = 0x1p50f;

template <class T>
PX_INLINE float longest_row(const T* src, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t cols) {
    float longest = 0.0f;
    for (ptrdiff_t i = 0; i < rows; ++i, src += row) {
        F squares{};
        ptrdiff_t p = 0;
        for (; p + W <= cols; p += W) squares += load(src + p) * load(src + p);
        if (p < cols) squares += load(src + p, cols - p) * load(src + p, cols - p);
        const float length = sum(squares);
        if (length > longest) longest = length;
    }
    return __builtin_sqrtf(longest);
}

// Of a right matrix laid out as floats, k rows of n columns.
PX_INLINE float longest_column(const float* panels, ptrdiff_t k, ptrdiff_t n) {
    F longest{};
    for (ptrdiff_t j = 0; j < n; j += NR) {
        F left{}, right{};
        for (ptrdiff_t p = 0; p < k; ++p, panels += NR) {
            left += load(panels) * load(panels);
            right += load(panels + W) * load(panels + W);
        }
        longest = max(left, max(right, longest));
    }
    return __builtin_sqrtf(max(longest));
}

PX_INLINE float largest_magnitude(const float* x, ptrdiff_t n) {
    F left{}, right{};
    for (ptrdiff_t i = 0; i < n; i += NR) {
        left = max(abs(load(x + i)), left);
        right = max(abs(load(x + i + W)), right);
    }
    return max(max(left, right));
}

template <class T, class Engine>
class ForwardItem {
public:
    ForwardItem(const Attention& a, ptrdiff_t item, float* scratch)
        : a_(a), arena_(scratch), t_(a, arena_), s_(a, item / a.key_heads % a.batch) {
        key_head_ = item % a.key_heads;
        group_ = a.heads / a.key_heads;
        blocks_ = (s_.q_len + ROWS<Engine> - 1) / ROWS<Engine>;
        // Causal queries look at more keys the later they come: those first.
        const ptrdiff_t part = a.parts - 1 - item / (a.batch * a.key_heads);
        first_unit_ = part * a.part_units;
        end_unit_ = least(first_unit_ + a.part_units, blocks_ * group_);
    }

    void run() {
        if (first_unit_ >= end_unit_) return;
        const Visible visible(a_, s_, key_head_ * group_, group_, t_.mask);
        masked_ = visible.masked;
        plain_ = !masked_ && !a_.dropout && a_.scale > SMALLEST_SCALE && a_.scale < LARGEST_SCALE;
        if (visible.keys == 0) {
            for (ptrdiff_t unit = first_unit_; unit < end_unit_; ++unit) write_zeros(unit);
            return;
        }
        const bool one_pass = visible.keys <= a_.pass_keys;
        bounded_ = plain_ && one_pass && visible.keys >= FEWEST_BOUNDED;
        for (ptrdiff_t first = 0; first < visible.keys; first += a_.pass_keys) {
            first_ = first;
            keys_ = least(a_.pass_keys, visible.keys - first);
            const T* values = lay_out();
            for (ptrdiff_t unit = first_unit_; unit < end_unit_; ++unit) {
                const ptrdiff_t q = unit % blocks_ * ROWS<Engine>, rows = least(ROWS<Engine>, s_.q_len - q);
                const ptrdiff_t end = a_.causal ? least(visible.keys, q + rows) : visible.keys;
                if (end <= first) continue;
                const ptrdiff_t state = one_pass ? 0 : unit - first_unit_;
                block(key_head_ * group_ + unit / blocks_, q, rows, end - first, values, state);
                if (end <= first + keys_) write(key_head_ * group_ + unit / blocks_, q, rows, state);
            }
        }
    }

private:
    // Returns the values as they are where some are not finite and a mask may forbid them, else null.
    const T* lay_out() {
        const T* keys = s_.keys<T>(a_.key, key_head_, first_);
        const T* values = s_.keys<T>(a_.value, key_head_, first_);
        const Finite<T> finite(values, a_.value.token, keys_, a_.value_dim, masked_ || a_.causal, t_.finite);
        Engine::pack_transposed(t_.keys, keys, a_.key.token, a_.head_dim, keys_);
        Engine::pack(t_.values, finite.data, finite.row, keys_, a_.value_dim);
        if constexpr (sizeof(typename Engine::Left) == 4) {
            const float value =
                bounded_ ? largest_magnitude(t_.values, keys_ * round_up(a_.value_dim, NR)) : 0.0f;
            reach_ = value >= SMALLEST_VALUE && value <= LARGEST_VALUE
                         ? a_.scale * LOG2_OF_E * longest_column(t_.keys, a_.head_dim, keys_)
                         : INFINITE;
        }
        return finite.changed ? values : nullptr;
    }

    // `end` keys of this pass may be looked at by some of the rows.
    void block(ptrdiff_t head, ptrdiff_t q, ptrdiff_t rows, ptrdiff_t end, const T* not_finite,
               ptrdiff_t state) {
        end = least(end, keys_);
        const LeftTile<T, Engine> queries(s_.queries<T>(a_.query, head, q), a_.query.token, rows, a_.head_dim,
                                          t_.queries);
        multiply<Engine>(queries.data, queries.ld, t_.keys, a_.head_dim, keys_, rows, end, a_.head_dim,
                         t_.scores, t_.ld, false);
        float* sums = t_.sums + state * ROWS<Engine> * t_.sums_ld;
        if (reach_ < INFINITE && longest_row(queries.data, queries.ld, rows, a_.head_dim) * reach_ <= NEAR)
            softmax_near_0(q, rows, end);
        else if (plain_)
            softmax_of_block(q, rows, end, state * ROWS<Engine>, sums);
        else
            for (ptrdiff_t i = 0; i < rows; ++i)
                softmax(head, q + i, keys_of(q + i, end), end, i, state * ROWS<Engine> + i,
                        sums + i * t_.sums_ld);
        multiply<Engine>(t_.weights, t_.ld, t_.values, keys_, a_.value_dim, rows, a_.value_dim, end, sums,
                         t_.sums_ld, first_ > 0);
        if (not_finite)
            add_not_finite(t_.weights, t_.weights, t_.ld, 1, not_finite, a_.value.token, rows, end,
                           a_.value_dim, sums, t_.sums_ld);
    }

    // Row i of the tile: scores to weights, and the row's state to that after this pass.
    void softmax(ptrdiff_t head, ptrdiff_t query, ptrdiff_t n, ptrdiff_t end, ptrdiff_t i, ptrdiff_t state,
                 float* sums) {
        const float* products = t_.scores + i * t_.ld;
        typename Engine::Left* weights = t_.weights + i * t_.ld;
        end = round_up(end, Engine::K_STEP);
        float& largest = t_.largest[state];
        float& total = t_.total[state];
        if (masked_) mask_row(a_.mask, s_.batch, head, query, first_, n, t_.mask);
        float* factors = nullptr;
        if (a_.dropout) {
            factors = t_.factors;
            dropout_factors(factors, n, first_, query, s_.index * a_.heads + head, *a_.dropout);
        }
        float now = masked_ ? largest_score<true>(products, t_.mask, n, a_.scale)
                            : largest_score<false>(products, nullptr, n, a_.scale);
        if (first_ > 0 && !(now > largest)) now = largest;
        const float shift = now == -INFINITE ? 0.0f : now;
        const float sum =
            masked_ ? exponentials<true>(weights, products, t_.mask, factors, n, end, a_.scale, shift)
                    : exponentials<false>(weights, products, nullptr, factors, n, end, a_.scale, shift);
        if (first_ > 0 && now != largest) rescale(exp(set(largest - shift)), total, sums);
        total = first_ > 0 ? total + sum : sum;
        largest = now;
    }

    // The same for all rows of a tile where nothing is added to the scores and none is dropped. Row by row each would
    // wait for its own largest before its first power; so all of those come first. In inference the powers are of 2, and
    // `largest` is of the products. (Backward takes powers of e: with others in forward, gradients of keys had 2.2 times
    // eager's largest error.)
    void softmax_of_block(ptrdiff_t q, ptrdiff_t rows, ptrdiff_t end, ptrdiff_t state, float* sums) {
        float now[ROWS<Engine>];
        const float scale = a_.scale, power = scale * LOG2_OF_E;
        for (ptrdiff_t i = 0; i < rows; ++i) {
            now[i] = largest_product(t_.scores + i * t_.ld, keys_of(q + i, end));
            if (!a_.inference) now[i] *= scale;
        }
        for (ptrdiff_t i = 0; i < rows; ++i, ++state, sums += t_.sums_ld) {
            float &largest = t_.largest[state], &total = t_.total[state];
            if (first_ > 0 && !(now[i] > largest)) now[i] = largest;
            const float shift = now[i] == -INFINITE ? 0.0f : now[i];
            float sum;
            if (a_.inference)
                rows_powers<1>(q, i, end, [&](F x) { return exp2_of_negative(x - shift, power); }, &sum);
            else
                rows_powers<1>(
                    q, i, end, [&](F x) { return exp_of_negative(rounded(x * scale) - shift); }, &sum);
            if (first_ > 0 && now[i] != largest)
                rescale(a_.inference ? exp2_of_negative(set(largest - shift), power)
                                     : exp_of_negative(set(largest - shift)),
                        total, sums);
            total = first_ > 0 ? total + sum : sum;
            largest = now[i];
        }
    }

    void softmax_near_0(ptrdiff_t q, ptrdiff_t rows, ptrdiff_t end) {
        const float scale = a_.scale, power = scale * LOG2_OF_E;
        fill(t_.largest, rows, 0.0f);
        if (a_.inference)
            near_powers(q, rows, end, [&](F x) { return exp2_within(x, power); });
        else
            near_powers(q, rows, end, [&](F x) { return exp_within(rounded(x * scale)); });
    }

    template <class Power>
    PX_INLINE void near_powers(ptrdiff_t q, ptrdiff_t rows, ptrdiff_t end, const Power& power_of) {
        ptrdiff_t i = 0;
        // (Two rows at a time: 1 to 4 % of the op.)
        for (; i + 2 <= rows && !a_.causal; i += 2) rows_powers<2>(q, i, end, power_of, t_.total + i);
        for (; i < rows; ++i) rows_powers<1>(q, i, end, power_of, t_.total + i);
    }

    // From row i of the block on, which may all look at the same keys.
    template <int N, class Power>
    PX_INLINE void rows_powers(ptrdiff_t q, ptrdiff_t i, ptrdiff_t end, const Power& power_of, float* sums) {
        powers<N>(t_.weights + i * t_.ld, t_.scores + i * t_.ld, t_.ld, keys_of(q + i, end),
                  round_up(end, Engine::K_STEP), power_of, sums);
    }

    // How many of the `end` keys of this pass a query may look at.
    ptrdiff_t keys_of(ptrdiff_t query, ptrdiff_t end) const {
        return a_.causal ? most(0, least(end, query + 1 - first_)) : end;
    }

    // What was summed up in the passes before.
    void rescale(F factor, float& total, float* sums) {
        float before;
        store(&before, factor, 1);
        total *= before;
        store_row(sums, sums, a_.value_dim, before);
    }

    void write(ptrdiff_t head, ptrdiff_t q, ptrdiff_t rows, ptrdiff_t state) {
        float* lse = s_.lse(a_, head, q);
        T* out = s_.queries<T>(a_.out, head, q);
        const float* sums = t_.sums + state * ROWS<Engine> * t_.sums_ld;
        for (ptrdiff_t i = 0; i < rows; ++i, sums += t_.sums_ld, out += a_.out.token) {
            const float total = t_.total[state * ROWS<Engine> + i];
            if (total == 0.0f && !attends_any(head, q + i)) {
                lse[i] = -INFINITE;
                fill(out, a_.value_dim, 0.0f);
                continue;
            }
            if (!a_.inference) lse[i] = t_.largest[state * ROWS<Engine> + i] + __builtin_logf(total);
            store_row(out, sums, a_.value_dim, 1.0f / total);
        }
    }

    bool attends_any(ptrdiff_t head, ptrdiff_t query) {
        if (!masked_) return true;
        for (ptrdiff_t first = 0; first < s_.k_len; first += LONGEST_PASS) {
            const ptrdiff_t n = least(LONGEST_PASS, s_.k_len - first);
            mask_row(a_.mask, s_.batch, head, query, first, n, t_.mask);
            for (ptrdiff_t j = 0; j < n; ++j)
                if (t_.mask[j] != -INFINITE) return true;
        }
        return false;
    }

    void write_zeros(ptrdiff_t unit) {
        const ptrdiff_t head = key_head_ * group_ + unit / blocks_, q = unit % blocks_ * ROWS<Engine>;
        for (ptrdiff_t i = q; i < least(q + ROWS<Engine>, s_.q_len); ++i) {
            fill(s_.queries<T>(a_.out, head, i), a_.value_dim, 0.0f);
            *s_.lse(a_, head, i) = -INFINITE;
        }
    }

    const Attention& a_;
    Arena arena_;
    ForwardTiles<T, Engine> t_;
    Sequence s_;
    ptrdiff_t key_head_, group_, blocks_, first_unit_, end_unit_;
    ptrdiff_t first_ = 0, keys_ = 0;  // of this pass
    bool masked_ = false, plain_ = false;
    bool bounded_ = false;    // whether to look for a bound of the scores
    float reach_ = INFINITE;  // of a query of length 1 that bound, as a power of 2
};

template <class T, class Engine>
void plan(Attention& a) {
    const ptrdiff_t pairs = a.batch * a.key_heads, rows = ROWS<Engine>;
    const ptrdiff_t units = (a.q_len + rows - 1) / rows * (a.key_heads ? a.heads / a.key_heads : 0);
    a.pass_keys = most(1, least(a.k_len, LONGEST_PASS));
    // Every part lays the keys out anew; so no more parts than keep the threads busy.
    const ptrdiff_t wanted =
        a.threads == 1 || pairs >= 2 * a.threads ? 1 : (2 * a.threads - 1) / most(pairs, 1) + 1;
    a.part_units = most(1, (units + wanted - 1) / wanted);
    if (a.k_len > a.pass_keys) a.part_units = least(a.part_units, MOST_UNITS<Engine>);
    a.parts = (units + a.part_units - 1) / a.part_units;
    a.items = pairs * a.parts;
    Arena arena(nullptr);
    ForwardTiles<T, Engine> tiles(a, arena);
    a.scratch = arena.used();
}

}  // namespace

void plan_attention_forward(Attention& a) {
    visit_engine(a, [&](auto* type, auto* engine) { plan<PX_TYPE(type), PX_TYPE(engine)>(a); });
}

void attention_forward(const Attention& a, ptrdiff_t item, float* scratch) {
    visit_engine(a, [&](auto* type, auto* engine) {
        ForwardItem<PX_TYPE(type), PX_TYPE(engine)>(a, item, scratch).run();
    });
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
