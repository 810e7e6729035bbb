#pragma once

// Which instruction set runs, and how a kernel that is compiled once for each of them is declared and called.
// No ATen and no STL: the files in isa/ include this, and what they inline must be theirs alone.

namespace pytorch_ext {

// In rising order. avx512_bf16 and amx are the code of avx512 beside products of 16-bit elements in pairs.
enum class Isa { plain, avx2, avx512, avx512_bf16, amx };

// The one in use: the best that the processor has and PYTORCH_EXT_CPU_ISA allows.
Isa current_isa();

#ifdef PYTORCH_EXT_ONLY_PLAIN

#define PYTORCH_EXT_KERNEL(name, ...) \
    namespace plain {                 \
    void name(__VA_ARGS__);           \
    }
#define PYTORCH_EXT_CALL(name, ...) ::pytorch_ext::plain::name(__VA_ARGS__)

#else

// Declares `void name(...)` in the namespace of every instruction set; isa/<op>.cpp defines it.
#define PYTORCH_EXT_KERNEL(name, ...) \
    namespace plain {                 \
    void name(__VA_ARGS__);           \
    }                                 \
    namespace avx2 {                  \
    void name(__VA_ARGS__);           \
    }                                 \
    namespace avx512 {                \
    void name(__VA_ARGS__);           \
    }

// For tests: what stands around the units that multiply pairs, on processors that have AVX2 alone.
#ifdef PYTORCH_EXT_EMULATE_PAIRS
#define PYTORCH_EXT_HAS_AVX512 (::pytorch_ext::current_isa() == ::pytorch_ext::Isa::avx512)
#define PYTORCH_EXT_HAS_AVX2 (::pytorch_ext::current_isa() >= ::pytorch_ext::Isa::avx2)
#else
#define PYTORCH_EXT_HAS_AVX512 (::pytorch_ext::current_isa() >= ::pytorch_ext::Isa::avx512)
#define PYTORCH_EXT_HAS_AVX2 (::pytorch_ext::current_isa() == ::pytorch_ext::Isa::avx2)
#endif

// Calls the one of the instruction set in use.
#define PYTORCH_EXT_CALL(name, ...)                                    \
    (PYTORCH_EXT_HAS_AVX512 ? ::pytorch_ext::avx512::name(__VA_ARGS__) \
     : PYTORCH_EXT_HAS_AVX2 ? ::pytorch_ext::avx2::name(__VA_ARGS__)   \
                            : ::pytorch_ext::plain::name(__VA_ARGS__))

#endif

// The element types of tensors. Kernels compute in float whatever they load and store.
enum class Dtype { float32, bfloat16, float16 };

struct bfloat16 {
    unsigned short bits;
};

struct float16 {
    unsigned short bits;
};

}  // namespace pytorch_ext
