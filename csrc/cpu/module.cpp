// The Python module pytorch_ext._cpu: facts about the library here, and every op from its own file.

#include <cstdlib>
#include <string>
#include <vector>

#include "module.h"

namespace pytorch_ext {

std::vector<void (*)(pybind11::module_&)>& definitions() {
    static std::vector<void (*)(pybind11::module_&)> all;
    return all;
}

namespace {

// backends/cpu.py looks for this in the file: under another torch it must not load it, so it cannot ask.
[[gnu::used]] const char BUILT_WITH[] = "pytorch_ext::_cpu was built with torch " PYTORCH_EXT_TORCH_VERSION;

constexpr const char* NAMES[] = {"plain", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int COUNT = std::size(NAMES);

bool processor_has(Isa isa) {
#ifndef PYTORCH_EXT_ONLY_PLAIN
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == Isa::avx2) return avx2;
    if (isa == Isa::avx512) return avx512;
#ifdef PYTORCH_EXT_EMULATE_PAIRS
    if (isa > Isa::avx512) return avx2;
#endif
    if (isa == Isa::avx512_bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
    if (isa == Isa::amx) return avx512 && at::native::cpublas::could_pack(at::kBFloat16);
#endif
    return isa == Isa::plain;
}

Isa best_up_to(Isa cap) {
    int best = static_cast<int>(cap);
    while (!processor_has(static_cast<Isa>(best))) --best;
    return static_cast<Isa>(best);
}

Isa named(const std::string& name) {
    for (int i = 0; i < COUNT; ++i)
        if (name == NAMES[i]) return static_cast<Isa>(i);
    throw pybind11::value_error("isa: expected plain, avx2, avx512, avx512_bf16 or amx, got '" + name + "'");
}

Isa first_choice() {
    const char* cap = std::getenv("PYTORCH_EXT_CPU_ISA");
    return best_up_to(cap && *cap ? named(cap) : Isa::amx);
}

std::atomic<Isa> in_use{Isa::plain};

}  // namespace

Isa current_isa() { return in_use.load(std::memory_order_relaxed); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    in_use = first_choice();
    m.attr("torch_version") = PYTORCH_EXT_TORCH_VERSION;
    m.def("isa", [] { return NAMES[static_cast<int>(current_isa())]; }, "The instruction set in use.");
    m.def(
        "isas",
        [] {
            std::vector<std::string> names;
            for (int i = 0; i < COUNT; ++i)
                if (processor_has(static_cast<Isa>(i))) names.emplace_back(NAMES[i]);
            return names;
        },
        "The instruction sets that this processor can run, the best last.");
    m.def(
        "set_isa",
        [](const std::string& name) {
            const Isa wanted = named(name);
            if (!processor_has(wanted))
                throw pybind11::value_error("isa: expected one that this processor has, got '" + name + "'");
            in_use = wanted;
        },
        "For tests: lets every kernel run with this instruction set from now on.");
    for (auto define : definitions()) define(m);
}

}  // namespace pytorch_ext
