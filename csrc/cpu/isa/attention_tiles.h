#pragma once

// What attention's two directions share: where an item lies, what its mask lets through, and tiles of its matrices.

#include "attention.h"
#include "dtypes.h"
#include "engine.h"
#include "math.h"
#include "pair_engine.h"

namespace pytorch_ext::PYTORCH_EXT_ISA {

// Calls `work` with null pointers to the element type and to the engine of a call.
template <class Work>
PX_INLINE void visit_engine(const Attention& a, const Work& work) {
    visit(a.dtype, [&](auto* type) {
#if defined(__AVX512F__) || (defined(PYTORCH_EXT_EMULATE_PAIRS) && defined(__AVX2__))
        if constexpr (sizeof(*type) == 2)
            if (a.pairs) return work(type, (PairEngine<PX_TYPE(type)>*)nullptr);
#endif
        work(type, (FloatEngine*)nullptr);
    });
}

constexpr float INFINITE = __builtin_huge_valf();

PX_INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
PX_INLINE ptrdiff_t most(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }

// Hands out the scratch memory of an item. From a null pointer it counts what is needed.
class Arena {
public:
    explicit Arena(float* begin) : begin_(begin) {}

    template <class T = float>
    T* take(ptrdiff_t n) {
        T* taken = (T*)(begin_ + used_);
        used_ += round_up(n * (ptrdiff_t)sizeof(T), 64) / 4;
        return taken;
    }

    ptrdiff_t used() const { return used_; }

private:
    float* begin_;
    ptrdiff_t used_ = 0;
};

// One sequence of a batch.
struct Sequence {
    ptrdiff_t index, batch, q_start, k_start, q_len, k_len;

    Sequence(const Attention& a, ptrdiff_t at) {
        index = a.order ? a.order[at] : at;
        batch = a.q_ends ? 0 : index;
        q_start = a.q_ends ? a.q_ends[index] : 0;
        k_start = a.k_ends ? a.k_ends[index] : 0;
        q_len = a.q_ends ? a.q_ends[index + 1] - q_start : a.q_len;
        k_len = a.k_ends ? a.k_ends[index + 1] - k_start : a.k_len;
    }

    template <class T>
    T* queries(const Heads& h, ptrdiff_t head, ptrdiff_t i) const {
        return (T*)h.data + batch * h.batch + head * h.head + (q_start + i) * h.token;
    }

    template <class T>
    T* keys(const Heads& h, ptrdiff_t head, ptrdiff_t j) const {
        return (T*)h.data + batch * h.batch + head * h.head + (k_start + j) * h.token;
    }

    float* lse(const Attention& a, ptrdiff_t head, ptrdiff_t i) const {
        return a.lse + batch * a.lse_batch + head * a.lse_head + q_start + i;
    }
};

// --- Masks ---

// What the mask adds to the scores of query i with keys [first, first + n): minus infinity where it forbids.
inline void mask_row(const Mask& m, ptrdiff_t batch, ptrdiff_t head, ptrdiff_t i, ptrdiff_t first,
                     ptrdiff_t n, float* row) {
    const ptrdiff_t start = batch * m.batch + head * m.head + i * m.query + first * m.key;
    if (m.kind == MaskKind::boolean) {
        const unsigned char* p = (const unsigned char*)m.data + start;
        if (m.key == 1)
            for (ptrdiff_t j = 0; j < n; ++j) row[j] = p[j] ? 0.0f : -INFINITE;
        else
            for (ptrdiff_t j = 0; j < n; ++j) row[j] = p[j * m.key] ? 0.0f : -INFINITE;
        return;
    }
    visit(m.dtype, [&](auto* type) {
        using T = PX_TYPE(type);
        const T* p = (const T*)m.data + start;
        for (ptrdiff_t j = 0; j < n; ++j) row[j] = load_one(p + j * m.key);
    });
}

// What an item has to look at: of its keys the first `keys`, and of the mask nothing if it adds 0 to all of those, as a
// padding mask does.
struct Visible {
    ptrdiff_t keys;
    bool masked;

    Visible(const Attention& a, const Sequence& s, ptrdiff_t head, ptrdiff_t group, float* row) {
        keys = a.causal ? least(s.k_len, s.q_len) : s.k_len;
        masked = a.mask.kind != MaskKind::none;
        const bool one_row = (a.mask.query == 0 || s.q_len == 1) && (a.mask.head == 0 || group == 1);
        if (!masked || !one_row) return;
        ptrdiff_t end = 0;  // behind the last key that is allowed
        masked = false;
        for (ptrdiff_t first = 0; first < keys; first += LONGEST_PASS) {
            const ptrdiff_t n = least(LONGEST_PASS, keys - first);
            mask_row(a.mask, s.batch, head, 0, first, n, row);
            for (ptrdiff_t j = 0; j < n; ++j) {
                if (row[j] == -INFINITE) continue;
                masked |= row[j] != 0.0f || end < first + j;
                end = first + j + 1;
            }
        }
        keys = end;
    }
};

// --- Rows of scores ---

// The lanes of a vector that lie before the end of a row.
PX_INLINE I lanes_below(ptrdiff_t n) {
    I lane;
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane < (I{} + (int32_t)n);
}

// Calls `step(j, live)` for each vector of a row of n scores that may be read up to the next vector's end; `live` has
// the lanes that count.
template <class Step>
PX_INLINE void each_score(ptrdiff_t n, const Step& step) {
    ptrdiff_t j = 0;
    for (; j + W <= n; j += W) step(j, I{} - 1);
    if (j < n) step(j, lanes_below(n - j));
}

// A weight that the mask forbids is -0, which no exponential is: so it is told from one that is merely too small.
constexpr float FORBIDDEN = -0.0f;

PX_INLINE I is_forbidden(F weight) { return bits<I>(weight) == bits<I>(set(FORBIDDEN)); }
PX_INLINE bool is_forbidden(float weight) { return bits<uint32_t>(weight) == 0x80000000u; }

// The scores at j, and the lanes that may be looked at. The barrier keeps the product from being fused with what is
// subtracted from it: a score less itself has to be 0, or a single key would not have the weight 1.
template <bool MASKED>
PX_INLINE F scores_at(const float* products, const float* mask, ptrdiff_t j, F scale, I& live) {
    const F x = rounded(load(products + j) * scale);
    if (!MASKED) return x;
    const F added = load(mask + j);
    live &= added != set(-INFINITE);
    return x + added;
}

template <bool MASKED>
PX_INLINE float largest_score(const float* products, const float* mask, ptrdiff_t n, float scale) {
    F largest = set(-INFINITE);
    each_score(n, [&](ptrdiff_t j, I live) {
        const F x = scores_at<MASKED>(products, mask, j, set(scale), live);
        largest = max(largest, live ? x : set(-INFINITE));
    });
    return max(largest);
}

// --- Tiles ---

template <class T>
PX_INLINE void fill(T* p, ptrdiff_t n, float value) {
    for (ptrdiff_t j = 0; j < n; ++j) store(p + j, set(value), 1);
}

PX_INLINE void fill(float* p, ptrdiff_t n, float value) {
    for (ptrdiff_t j = 0; j < n; ++j) p[j] = value;
}

// Rows that lie so that no two of them meet in one set of the cache.
PX_INLINE ptrdiff_t spread_rows(ptrdiff_t n) { return round_up(n, 32) + 16; }

// A left matrix as the engine reads it: where it lies, or a copy.
template <class T, class Engine>
struct LeftTile {
    const typename Engine::Left* data;
    ptrdiff_t ld;

    LeftTile(const T* src, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t cols, typename Engine::Left* copy) {
        if constexpr (sizeof(T) == sizeof(typename Engine::Left)) {
            if (rows % Engine::M_STEP == 0 && cols % Engine::K_STEP == 0) {
                data = (const typename Engine::Left*)src;
                ld = row;
                return;
            }
        }
        ld = round_up(cols, W > Engine::K_STEP ? W : Engine::K_STEP);
        data = copy;
        for (ptrdiff_t i = 0; i < rows; ++i, src += row, copy += ld)
            for (ptrdiff_t p = 0; p < ld; p += W)
                store(copy + p, p + W <= cols ? load(src + p) : p < cols ? load(src + p, cols - p) : F{});
    }

    static ptrdiff_t size(ptrdiff_t rows, ptrdiff_t cols) {
        return round_up(rows, Engine::M_STEP) * round_up(cols, W > Engine::K_STEP ? W : Engine::K_STEP);
    }
};

// c[m][n] = a[m][k] b[k][n], as Engine::multiply, where k may be 0.
template <class Engine>
PX_INLINE void multiply(const typename Engine::Left* a, ptrdiff_t lda, const typename Engine::Right* b,
                        ptrdiff_t packed_k, ptrdiff_t packed_n, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k,
                        float* c, ptrdiff_t ldc, bool accumulate) {
    if (k > 0) return Engine::multiply(a, lda, b, packed_k, packed_n, m, n, k, c, ldc, accumulate);
    for (ptrdiff_t i = 0; i < m && !accumulate; ++i) fill(c + i * ldc, n, 0.0f);
}

// --- Values that are not finite ---

// Where a mask forbids, 0 * NaN must not happen: such values are left out of the product and added one by one.

template <class T>
inline bool all_finite(const T* src, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t cols) {
    F zeros{};
    for (ptrdiff_t i = 0; i < rows; ++i, src += row) {
        ptrdiff_t p = 0;
        for (; p + W <= cols; p += W) zeros += load(src + p) * 0.0f;
        if (p < cols) zeros += load(src + p, cols - p) * 0.0f;
    }
    return sum(zeros) == 0.0f;
}

PX_INLINE bool is_finite(float x) { return x - x == 0.0f; }

// `src`, or its copy with zeros in place of what is not finite.
template <class T>
struct Finite {
    const T* data;
    ptrdiff_t row;
    bool changed;

    Finite(const T* src, ptrdiff_t src_row, ptrdiff_t rows, ptrdiff_t cols, bool check, T* copy)
        : data(src), row(src_row), changed(check && !all_finite(src, src_row, rows, cols)) {
        if (!changed) return;
        data = copy;
        row = cols;
        for (ptrdiff_t i = 0; i < rows; ++i)
            for (ptrdiff_t p = 0; p < cols; ++p)
                copy[i * cols + p] = is_finite(load_one(src + i * src_row + p)) ? src[i * src_row + p] : T{};
    }
};

// c[i] += weights[i][j] * src[j] for the elements of src that are not finite and the j that i may look at.
// `allowed` lies as `weights` does.
template <class Left, class T>
inline void add_not_finite(const Left* weights, const Left* allowed, ptrdiff_t row, ptrdiff_t col,
                           const T* src, ptrdiff_t src_row, ptrdiff_t m, ptrdiff_t k, ptrdiff_t n, float* c,
                           ptrdiff_t ldc) {
    for (ptrdiff_t j = 0; j < k; ++j)
        for (ptrdiff_t p = 0; p < n; ++p) {
            const float x = load_one(src + j * src_row + p);
            if (is_finite(x)) continue;
            for (ptrdiff_t i = 0; i < m; ++i)
                if (!is_forbidden(load_one(allowed + i * row + j * col)))
                    c[i * ldc + p] += load_one(weights + i * row + j * col) * x;
        }
}

// Writes n elements of a row, each times `factor`.
template <class T>
PX_INLINE void store_row(T* dst, const float* src, ptrdiff_t n, float factor) {
    ptrdiff_t p = 0;
    for (; p + W <= n; p += W) store(dst + p, load(src + p) * set(factor));
    if (p < n) store(dst + p, load(src + p) * set(factor), n - p);
}

}  // namespace pytorch_ext::PYTORCH_EXT_ISA
