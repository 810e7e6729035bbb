// The machine behind cuda_host.h: fibers, their turns and where they meet. Linked to each .cu file under test.

#include "cuda_host.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/headeronly/util/Exception.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {
namespace {

// --- Fibers -----------------------------------------------------------------------------------------------------

constexpr size_t PAGE = 4096, STACK = 256 * 1024;  // sanitizers make frames large

#if defined(__x86_64__)

// Keeps what a call must not change on the stack that it leaves, and takes it from the one that it goes to. The C
// library's swapcontext asks the kernel for the signal mask at each switch, which takes fifty times as long.
__attribute__((naked, noinline)) void switch_stack(void** /*leave*/, void* /*enter*/) {
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

struct Context {
    void* top = nullptr;
    void begin(char* stack, void (*function)()) {
        void** end = reinterpret_cast<void**>(stack + STACK);
        *--end = nullptr;  // where a call would return to: keeps the stack aligned as a call does
        *--end = reinterpret_cast<void*>(function);
        end -= 6;
        std::fill(end, end + 6, nullptr);
        top = end;
    }
    void leave_for(Context& other) { switch_stack(&top, other.top); }
};

#else

struct Context {
    ucontext_t context;
    void begin(char* stack, void (*function)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK;
        context.uc_link = nullptr;
        makecontext(&context, function, 0);
    }
    void leave_for(Context& other) { swapcontext(&context, &other.context); }
};

#endif

struct Copy {
    void* to;
    const void* from;
    int bytes, filled;
    bool committed;
};

enum class State { ready, at_warp, at_block, done };

struct Fiber {
    Context context;
    char* stack = nullptr;
    State state = State::done;
    uint3 index{};
    Place place{};
    bool yes = false;  // of it where it waits for the block, then of any thread
    std::vector<Copy> copies;
    std::vector<size_t> groups;  // how many copies each group that is not waited for yet has
    void* fake_stack = nullptr;  // of AddressSanitizer
};

struct Meeting {
    uint32_t mask = 0, here = 0;
    Place place{};
    void* theirs[WARP] = {};
};

// --- The block that runs, of the kernel that runs ---------------------------------------------------------------

enum class Order { ascending, descending, shuffled };

std::mutex one_kernel;
std::vector<Fiber> fibers;                   // kept for the next kernel, for their stacks
std::vector<std::vector<Meeting>> meetings;  // of each warp
Context scheduler;
[[maybe_unused]] void* scheduler_fake_stack;
[[maybe_unused]] const void* scheduler_stack;
[[maybe_unused]] size_t scheduler_stack_size;
int running, threads, waiting_for_block;
const std::function<void()>* body;
void* kernel_address;
char* shared;
size_t shared_size;
std::string failure;
std::mt19937 random_numbers;

constexpr size_t GUARD = 4096;          // behind shared memory
constexpr unsigned char POISON = 0xff;  // NaN in every element type

// The loader knows no names of an anonymous namespace; what -g1 leaves in the file does.
std::string kernel_name() {
    Dl_info info{};
    if (!dladdr(kernel_address, &info)) return "a kernel";
    std::ostringstream command;
    // A sanitizer that was preloaded is for this process alone.
    command << "env -u LD_PRELOAD addr2line -Cfe '" << info.dli_fname << "' " << std::showbase << std::hex
            << static_cast<char*>(kernel_address) - static_cast<char*>(info.dli_fbase) << " 2>/dev/null";
    std::string name;
    if (FILE* answer = popen(command.str().c_str(), "r")) {
        for (int c = std::fgetc(answer); c != EOF && c != '\n'; c = std::fgetc(answer))
            name += static_cast<char>(c);
        pclose(answer);
    }
    return name.empty() || name[0] == '?' ? "a kernel" : name;
}

std::string where(const uint3& thread) {
    const auto triple = [](const uint3& i) {
        return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
    };
    return kernel_name() + ", block " + triple(blockIdx) + ", thread " + triple(thread);
}

std::string in_words(const Place& place) {
    const char* slash = std::strrchr(place.file, '/');
    return std::string(place.what) + " (" + (slash ? slash + 1 : place.file) + ":" +
           std::to_string(place.line) + ")";
}

bool same(const Place& a, const Place& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// A fiber's turn is over.
void leave(bool for_good = false) {
    Fiber& fiber = fibers[running];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, scheduler_stack,
                                   scheduler_stack_size);
#endif
    (void)for_good;
    fiber.context.leave_for(scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    (*body)();
    Fiber& fiber = fibers[running];
    if (!fiber.copies.empty()) fail("it ends before it has waited for its cp.async");
    fiber.state = State::done;
    leave(true);
}

void resume(int thread) {
    Fiber& fiber = fibers[thread];
    running = thread;
    threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, STACK);
#endif
    scheduler.leave_for(fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

Order order() {
    const char* asked = std::getenv("CUDA_HOST_ORDER");
    const std::string name = asked ? asked : "ascending";
    if (name == "ascending") return Order::ascending;
    if (name == "descending") return Order::descending;
    STD_TORCH_CHECK(name == "shuffled", "CUDA_HOST_ORDER: expected ascending, descending or shuffled, got ",
                    name);
    return Order::shuffled;
}

std::vector<int> turns(int count, Order order) {
    std::vector<int> found(count);
    std::iota(found.begin(), found.end(), 0);
    if (order == Order::descending) std::reverse(found.begin(), found.end());
    if (order == Order::shuffled) std::shuffle(found.begin(), found.end(), random_numbers);
    return found;
}

// AddressSanitizer ends the process at the access itself, where it is used.
void watch_guard([[maybe_unused]] bool on) {
#if defined(__SANITIZE_ADDRESS__)
    if (on)
        __asan_poison_memory_region(shared + shared_size, GUARD);
    else
        __asan_unpoison_memory_region(shared + shared_size, GUARD);
#endif
}

void begin_block(dim3 block, size_t shared_bytes) {
    std::memset(shared, POISON, shared_bytes + GUARD);
    waiting_for_block = 0;
    for (auto& of_warp : meetings) of_warp.clear();
    for (int thread = 0; thread < threads; ++thread) {
        Fiber& fiber = fibers[thread];
        const uint32_t i = thread;
        fiber.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        fiber.state = State::ready;
        fiber.copies.clear();
        fiber.groups.clear();
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(fiber.stack,
                                      STACK);  // the frames that the last one never returned from
#endif
        fiber.context.begin(fiber.stack, run_thread);
    }
}

// Threads that wait where nobody will come.
void report_deadlock() {
    for (int thread = 0; thread < threads; ++thread) {
        const Fiber& fiber = fibers[thread];
        if (fiber.state == State::done) continue;
        failure = where(fiber.index) + " waits in " + in_words(fiber.place) + ", and not all come there";
        return;
    }
}

void run_block(Order order) {
    const int warps = (threads + WARP - 1) / WARP;
    for (bool over = false; !over;) {
        over = true;
        for (int warp : turns(warps, order)) {
            const int first = warp * WARP, lanes = std::min(WARP, threads - first);
            const std::vector<int> lane_turns = turns(lanes, order);
            for (bool moved = true; moved;) {
                moved = false;
                for (int lane : lane_turns) {
                    if (fibers[first + lane].state != State::ready) continue;
                    resume(first + lane);
                    if (!failure.empty()) return;
                    moved = true;
                    over = false;
                }
            }
        }
    }
    for (int thread = 0; thread < threads; ++thread)
        if (fibers[thread].state != State::done) return report_deadlock();
    watch_guard(false);
    for (size_t i = 0; i < GUARD; ++i)
        if (static_cast<unsigned char>(shared[shared_size + i]) != POISON) {
            failure = where({}) + " or another of the block wrote " + std::to_string(i) +
                      " bytes behind its shared memory";
            return;
        }
}

void prepare(dim3 block, size_t shared_bytes) {
    threads = block.x * block.y * block.z;
    STD_TORCH_CHECK(threads >= 1 && threads <= 1024, "a block of ", threads, " threads");
    STD_TORCH_CHECK(shared_bytes <= 227 * 1024, "a block with ", shared_bytes, " bytes of shared memory");
    for (int thread = fibers.size(); thread < threads; ++thread) {
        Fiber& fiber = fibers.emplace_back();
        void* memory =
            mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        STD_TORCH_CHECK(memory != MAP_FAILED, "no memory for the stack of a fiber");
        mprotect(memory, PAGE, PROT_NONE);  // a stack that overflows ends the process
        fiber.stack = static_cast<char*>(memory) + PAGE;
    }
    meetings.resize((threads + WARP - 1) / WARP);
    shared_size = shared_bytes;
    shared = static_cast<char*>(std::aligned_alloc(1024, (shared_bytes + GUARD + 1023) / 1024 * 1024));
}

}  // namespace

void run_grid(void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
    const std::lock_guard lock(one_kernel);
    const Order order = cuda_host::order();
    random_numbers.seed(0);
    prepare(block, shared_bytes);
    kernel_address = kernel;
    body = &thread;
    failure.clear();
    gridDim = grid;
    blockDim = block;
    const int blocks = grid.x * grid.y * grid.z;
    for (int number : turns(blocks, order)) {
        const uint32_t i = number;
        blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        begin_block(block, shared_bytes);
        watch_guard(true);
        run_block(order);
        watch_guard(false);
        if (!failure.empty()) break;
    }
    std::free(shared);
    STD_TORCH_CHECK(failure.empty(), failure);
}

void* shared_memory() { return shared; }

int lane() { return running % WARP; }

void fail(const std::string& what) {
    failure = where(threadIdx) + ": " + what;
    leave(true);
    std::abort();  // it has no turn again
}

bool meet_block(Place place, bool yes) {
    Fiber& fiber = fibers[running];
    for (int thread = 0; waiting_for_block > 0 && thread < threads; ++thread)
        if (fibers[thread].state == State::at_block) {
            if (!same(fibers[thread].place, place))
                fail("it waits in " + in_words(place) + ", and another thread in " +
                     in_words(fibers[thread].place));
            break;
        }
    fiber.place = place;
    fiber.state = State::at_block;
    fiber.yes = yes;
    if (++waiting_for_block == threads) {
        waiting_for_block = 0;
        for (int thread = 0; thread < threads; ++thread) yes |= fibers[thread].yes;
        for (int thread = 0; thread < threads; ++thread) {
            fibers[thread].state = State::ready;
            fibers[thread].yes = yes;
        }
    }
    leave();  // the last one too, so that it has no head start
    return fiber.yes;
}

void meet_warp(uint32_t mask, Place place, void* mine, void (*together)(void* (&theirs)[WARP])) {
    const int lane = running % WARP, first = running - lane;
    if (!(mask >> lane & 1)) fail(in_words(place) + " with a mask that its own lane is not in");
    auto& open = meetings[running / WARP];
    auto meeting = std::find_if(open.begin(), open.end(), [&](const Meeting& m) { return m.mask == mask; });
    if (meeting == open.end()) {
        open.push_back({mask, 0, place});
        meeting = open.end() - 1;
    }
    if (!same(meeting->place, place))
        fail("it waits in " + in_words(place) + ", and another lane in " + in_words(meeting->place));
    meeting->here |= 1u << lane;
    meeting->theirs[lane] = mine;
    Fiber& fiber = fibers[running];
    fiber.place = place;
    if (meeting->here != mask) {
        fiber.state = State::at_warp;
        return leave();
    }
    together(meeting->theirs);
    for (int other = 0; other < WARP; ++other)
        if (mask >> other & 1) fibers[first + other].state = State::ready;
    open.erase(meeting);
}

uint32_t ballot(uint32_t mask, bool yes, Place place) {
    struct Part {
        bool yes;
        uint32_t result;
    } part{yes, 0};
    meet_warp(mask, place, &part, [](void*(&theirs)[WARP]) {
        uint32_t result = 0;
        for (int lane = 0; lane < WARP; ++lane)
            if (theirs[lane] && static_cast<Part*>(theirs[lane])->yes) result |= 1u << lane;
        for (void* own : theirs)
            if (own) static_cast<Part*>(own)->result = result;
    });
    return part.result;
}

void check_shared(const void* at, size_t bytes, const char* what) {
    const char* first = static_cast<const char*>(at);
    if (first < shared || first + bytes > shared + shared_size)
        fail(std::string(what) + " of what is not the block's shared memory");
}

void async_copy(void* to, const void* from, int bytes, int filled) {
    if (reinterpret_cast<uintptr_t>(to) % filled || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % filled))
        fail("a cp.async of " + std::to_string(filled) +
             " bytes to or from an address that is no multiple of them");
    check_shared(to, filled, "cp.async");
    std::memset(to, POISON, filled);
    fibers[running].copies.push_back({to, from, bytes, filled, false});
}

void async_commit() {
    Fiber& fiber = fibers[running];
    size_t of_earlier = 0;
    for (size_t count : fiber.groups) of_earlier += count;
    fiber.groups.push_back(fiber.copies.size() - of_earlier);
}

void async_wait(int groups_left) {
    Fiber& fiber = fibers[running];
    while (fiber.groups.size() > static_cast<size_t>(groups_left)) {
        const size_t count = fiber.groups.front();
        for (size_t i = 0; i < count; ++i) {
            const Copy& copy = fiber.copies[i];
            if (copy.bytes > 0)
                std::memcpy(copy.to, copy.from, copy.bytes);  // of nothing there is no address
            std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.filled - copy.bytes);
        }
        fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + count);
        fiber.groups.erase(fiber.groups.begin());
    }
}

}  // namespace cuda_host
