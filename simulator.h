// simulator.h gives kernels.cu CUDA's execution model on a CPU. g++ compiles the very same file into a shared library:
//
//     #include "simulator.h"
//     #include "kernels.cu"
//     SIMULATOR_EXPORT(rms_norm)    // int rms_norm_launch(grid, block, args), args as cuLaunchKernel takes them
//
// A thread becomes a fibre: a call of the kernel on a stack of its own, which can be left in the middle and gone on with
// later. It runs until it returns or has to wait for others: then its core runs the next one, warp after warp, until none
// can run. If all that have not returned wait in __syncthreads(), it opens. A warp's collectives (shuffle, vote, mma) are
// made of a smaller barrier, for 32 lanes. One core runs a whole block in this way; blocks spread over the cores.
//
// Where a GPU would hang or compute nonsense, this is strict:
//   - All threads of a block that have not returned must wait at the same __syncthreads(), all lanes of a collective's
//     mask must come to it. Errors name kernel, block, thread and line.
//   - cp.async copies at the wait and not before, so that a forgotten wait reads old data.
//   - simulator_shuffle(seed) runs threads in random order, a new one after each barrier, and fills shared memory with
//     NaNs before each block: a result that depends on the seed lacks a barrier or an initialisation.
//   - Built with -fsanitize=address,undefined, it finds accesses outside of shared and global arrays.
// Who waits for another thread in a loop must call relax() there; two blocks of 256 threads or more have a core each.
// To look into a kernel, print from it, or stop in it with gdb (built by a compiler that is told not to optimise):
//     printf '#!/bin/sh\nexec g++ "$@" -O0 -g\n' > debug-g++; chmod +x debug-g++
//     CXX=./debug-g++ gdb -ex 'set breakpoint pending on' -ex 'break rms_norm if threadIdx.x == 3' --args python ...
#define SIMULATOR
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>
#include <link.h>
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define SIMULATOR_ASAN(...) __VA_ARGS__
#define __shared__ static        // AddressSanitizer guards statics but not thread_locals; one core runs all blocks then
#else
#define SIMULATOR_ASAN(...)
#define __shared__ thread_local  // a block runs on one core: its shared memory is that core's copy
#endif

// ======== Keywords, built-in types and functions =====================================================================
#define __global__
#define __device__
#define __launch_bounds__(...)
#define EXPORT(name, value) \
    constexpr int name = value; extern "C" __attribute__((visibility("default"))) const int exported_##name = name
#define DYNAMIC_SHARED(bytes) alignas(1024) __shared__ char dynamic_shared[bytes]
static thread_local struct uint3 { unsigned x, y, z; } threadIdx, blockIdx, blockDim, gridDim;

inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
namespace simulator { inline float half(unsigned word, int k) { return __uint_as_float(word >> k % 2 * 16 << 16); } }
// A bfloat16 is the upper half of a float32. Conversions only: the kernels compute in float32.
struct __nv_bfloat16 { unsigned short bits; };
using bf16 = __nv_bfloat16;
using u64 = unsigned long long;
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
    unsigned word = __float_as_uint(x), rounded = word + 0x7fff + (word >> 16 & 1);    // to nearest, ties to even
    return {static_cast<unsigned short>(x == x ? rounded >> 16 : 0x7fff)};             // (a NaN might become a number)
}

// Macros, because glibc has functions of these names. What is approximate on a GPU is exact here.
#define rsqrtf(x) (1.0f / sqrtf(x))
using std::max, std::min;

// Real atomics, since other cores run other blocks. Each returns the value before. common_type_t: T comes from p alone.
#define SIMULATOR_ATOMIC(name, update)                                                                       \
    template <class T> T name(T* p, std::common_type_t<T> x) {                                               \
        T old = *p, updated;    /* if another core has changed it, old becomes what it is now: try again */  \
        do updated = update;                                                                                 \
        while (!__atomic_compare_exchange(p, &old, &updated, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));     \
        return old;                                                                                          \
    }
SIMULATOR_ATOMIC(atomicAdd, old + x)
SIMULATOR_ATOMIC(atomicInc, old >= x ? 0 : old + 1)
inline unsigned atomic_inc_acq_rel(unsigned* p, unsigned limit) { return atomicInc(p, limit); }

namespace simulator {
// ======== Fibres =====================================================================================================
constexpr int MAX_THREADS = 1024;                // of a block
constexpr size_t STACK_BYTES = 33 * 4096 + 256;  // no multiple of a page: the stacks' tops spread over the cache
struct Copy { void* shared; const void* global; int bytes, group; };
struct Fibre {
    uint3 index;                 // threadIdx
    int line;                    // where it waits for other lanes of its warp,
    unsigned mask, looks;        // for which; how often it has looked in vain for something else,
    void* shown;                 // and the value that it shows them
    struct { std::vector<Copy> copies; int groups; } async;    // issued, not waited for; groups committed so far
    char* stack;                 // its lowest address
    size_t stack_bytes = STACK_BYTES;
    SIMULATOR_ASAN(void* fake_stack = nullptr;)
#if !defined(__x86_64__) || defined(SIMULATOR_UCONTEXT)
    ucontext_t context;
};
inline void switch_stack(Fibre& from, Fibre& to) { swapcontext(&from.context, &to.context); }
inline void prepare_stack(Fibre& fibre, void (*entry)()) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fibre.context, entry, 0);
}
#else
    void** top;                  // its last used address, while it does not run
};

// Called on one stack, returns on another: to where that one called it, or else to the beginning of entry(), see below.
// It keeps the registers that a function must keep, and jumps: of a ret, CPUs expect that it goes back to the latest call.
__attribute__((naked, noinline, noipa)) static void save_and_load(void*** save, void** load) {    // in rdi and rsi
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n popq %rcx\n jmp *%rcx");
}
inline void switch_stack(Fibre& from, Fibre& to) { save_and_load(&from.top, to.top); }
inline void prepare_stack(Fibre& fibre, void (*entry)()) {
    // As if entry() had been about to start when the fibre was left, called by nobody, as gdb will see.
    fibre.top = reinterpret_cast<void**>(fibre.stack + STACK_BYTES) - 8;
    memset(fibre.top, 0, 64);
    fibre.top[6] = reinterpret_cast<void*>(entry);
}
#endif

inline void switch_fibre(Fibre& from, Fibre& to, [[maybe_unused]] bool for_good = false) {
    SIMULATOR_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);)
    switch_stack(from, to);
    SIMULATOR_ASAN(__sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);)
}

// ======== A block: its threads run until all wait or have returned ===================================================
struct Launch {
    const char* name;
    uint3 grid, block;
    std::function<void()> call;     // the kernel with its arguments
    size_t blocks = size_t(grid.x) * grid.y * grid.z, threads = block.x * block.y * block.z;
    std::atomic<unsigned> next{0};  // the first block that no core has taken
    std::atomic<bool> failed{false};
};

struct Block {                      // one for each core, used for one block after the other
    struct Warp { unsigned runnable, at_barrier, at_collective, relaxing; };    // a bit a lane; in none: it has returned
    Launch* launch;
    int current;                    // the running thread
    int barrier_line;               // where the threads at the barrier wait; 0: nobody does
    bool any, any_before;           // whether a thread at this barrier, or at the one before, brings a true
    uint64_t random; unsigned order;    // threads run as 0 ^ order, 1 ^ order, ...: of any two, each may be the first
    Warp warps[MAX_THREADS / 32] = {};
    std::vector<Fibre> fibres{MAX_THREADS};
    char* stacks = static_cast<char*>(malloc(MAX_THREADS * STACK_BYTES));    // costs memory where it is touched
    Fibre core;                     // the stack on which the core itself runs

    Fibre& fibre() { return fibres[current]; }
    Fibre* lanes() { return &fibres[current / 32 * 32]; }
    Warp& warp() { return warps[current / 32]; }
    unsigned bit() { return 1u << current % 32; }
};
static thread_local Block* block;   // the one that this core runs
static char last_error[500];        // the first one of the launch that failed last
static uint64_t shuffle_seed = atoll(getenv("SIMULATOR_SHUFFLE") ?: "0");    // 0: threads run in order

// The running thread lets others run, until someone makes it runnable again.
inline void suspend(bool for_good = false) {
    block->warp().runnable &= ~block->bit();
    switch_fibre(block->fibre(), block->core, for_good);
}

// Records an error of this thread. None of its block runs any more; other cores finish the blocks that they have begun.
template <class... Values> [[noreturn]] void fail(int line, const char* format, Values... values) {
    uint3 b = blockIdx, t = threadIdx;
    if (!block->launch->failed.exchange(true)) {
        int length = snprintf(last_error, 200, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u), line %d: ",
                              block->launch->name, b.x, b.y, b.z, t.x, t.y, t.z, line);
        snprintf(last_error + length, 300, format, values...);
    }
    for (auto& warp : block->warps) warp = {};
    for (;;) suspend();    // nobody resumes it
}

inline void fibre_main() {
    Fibre& core = block->core;
    SIMULATOR_ASAN(__sanitizer_finish_switch_fiber(nullptr, (const void**)&core.stack, &core.stack_bytes);)
    block->launch->call();
    suspend(true);
}

inline void run_warp(Block& b, Block::Warp& warp) {
    while (warp.runnable)
        for (unsigned i = 0, order = b.order % 32; i < 32; i++)
            if (unsigned lane = i ^ order; warp.runnable >> lane & 1) {
                b.current = (&warp - b.warps) * 32 + lane;
                threadIdx = b.fibre().index;
                switch_fibre(b.core, b.fibre());
            }
}

// No thread can run, so those at the barrier may go on. False: there are none, all have returned.
inline bool open_barrier(Block& b) {
    unsigned live = 0;
    if (shuffle_seed) b.order = (b.random = b.random * 6364136223846793005 + 1) >> 54;    // 10 bits
    for (auto& warp : b.warps) live |= warp.runnable = std::exchange(warp.relaxing, 0);
    if (live) return std::this_thread::yield(), true;    // another block may have written what they wait for
    for (auto& warp : b.warps)
        if ((warp.runnable = warp.at_collective)) return true;    // in vain: let them say so, and fail
    b.barrier_line = 0, b.any_before = std::exchange(b.any, false);
    for (auto& warp : b.warps) live |= warp.runnable = std::exchange(warp.at_barrier, 0);
    return live;
}

// Fills shared memory with NaNs, and the rest of this library's thread-local memory. (With AddressSanitizer it is static.)
inline int poison_shared_memory(dl_phdr_info* library, size_t, void* ours) {
    char* start = static_cast<char*>(library->dlpi_tls_data);
    for (int i = 0; i < library->dlpi_phnum; i++) {
        size_t bytes = library->dlpi_phdr[i].p_type == PT_TLS ? library->dlpi_phdr[i].p_memsz : 0;
        if (start <= ours && ours < start + bytes) memset(start, 0xff, bytes);
    }
    return 0;
}

inline void run_block(Block& b, Launch& launch, unsigned number) {
    if (shuffle_seed) dl_iterate_phdr(poison_shared_memory, &block);
    if (shuffle_seed % 2) number = launch.blocks - 1 - number;    // blocks have no order either
    block = &b;
    gridDim = launch.grid, blockDim = launch.block;
    blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
    b.launch = &launch, b.order = 0, b.random = (shuffle_seed + number) * 0x9e3779b97f4a7c15;
    for (unsigned i = 0; i < launch.threads; i++) {
        Fibre& fibre = b.fibres[i];
        fibre.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        fibre.async.copies.clear(), fibre.async.groups = 0, fibre.looks = 0;
        fibre.stack = &b.stacks[i * STACK_BYTES];
        SIMULATOR_ASAN(__asan_unpoison_memory_region(fibre.stack, STACK_BYTES);)    // what a failed launch left there
        prepare_stack(fibre, fibre_main);
        b.warps[i / 32].at_barrier |= 1u << i % 32;    // at the start, as after each round, all wait at a barrier
    }
    while (open_barrier(b))
        for (unsigned i = 0; i < MAX_THREADS / 32; i++) run_warp(b, b.warps[i ^ b.order / 32]);
}

// ======== Waiting: barriers and warp collectives =====================================================================
inline bool barrier(int line, bool mine = false) {
    int others = std::exchange(block->barrier_line, line);
    if (others && others != line) fail(line, "__syncthreads() while others wait at the one in line %d", others);
    block->warp().at_barrier |= block->bit(), block->any |= mine;
    return suspend(), block->any_before;
}

// Waits until all lanes of the mask are here. The last one to come calls all_here() and lets the others go.
template <class Function> void warp_barrier(unsigned mask, int line, Function all_here) {
    Block& b = *block;
    auto& warp = b.warp();
    if (!(mask & b.bit())) fail(line, "lane %d is not in its own mask 0x%08x", b.current % 32, mask);
    b.fibre().line = line, b.fibre().mask = mask;
    warp.at_collective |= b.bit();
    if (mask & ~warp.at_collective) {
        suspend();
        if (!(warp.at_collective & b.bit())) return;
        fail(line, "waits for lanes 0x%08x, but 0x%08x returned or are at a barrier", mask, mask & ~warp.at_collective);
    }
    for (int i = 0; i < 32; i++)
        if (Fibre& other = b.lanes()[i]; mask >> i & 1 && (other.mask != mask || other.line != line))
            fail(line, "waits for lanes 0x%08x, but lane %d for 0x%08x in line %d", mask, i, other.mask, other.line);
    all_here();
    warp.at_collective &= ~mask;
    warp.runnable |= mask;
}

// What collectives are made of: each lane shows a value, and the last one to come computes from these what each lane
// gets: compute(lane, of_lane), where of_lane(i) is what lane i shows.
template <class T, class Compute> auto collective(unsigned mask, T mine, int line, Compute compute) {
    auto of_lane = [lanes = block->lanes()](int lane) -> T& { return *static_cast<T*>(lanes[lane].shown); };
    struct { T mine; decltype(compute(0, of_lane)) result; } shown = {mine};
    block->fibre().shown = &shown;
    warp_barrier(mask, line, [&] {
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) static_cast<decltype(shown)*>(block->lanes()[i].shown)->result = compute(i, of_lane);
    });
    return shown.result;
}

// ======== A launch: blocks over the cores ============================================================================
inline int run(Launch& launch) {
    constexpr size_t WORTH_A_CORE = 256;    // threads; starting a helper takes as long as running some hundred
    static std::mutex one_launch;           // launches run one after the other, as in a CUDA stream
    static std::vector<Block> cores(max(2u, std::thread::hardware_concurrency()));
    std::lock_guard<std::mutex> lock(one_launch);
    auto work = [&](Block& core) {
        for (unsigned i; !launch.failed && (i = launch.next++) < launch.blocks;) run_block(core, launch, i);
    };
    std::vector<std::thread> helpers;
    size_t useful = min({cores.size(), launch.blocks, launch.blocks * launch.threads / WORTH_A_CORE});
    SIMULATOR_ASAN(useful = 1;)
    for (size_t i = 1; i < useful; i++) helpers.emplace_back(work, std::ref(cores[i]));
    work(cores[0]);
    for (std::thread& helper : helpers) helper.join();
    return launch.failed;
}

template <class... Args>
int launch(const char* name, void (*kernel)(Args...), const unsigned grid[3], const unsigned block[3], void** args) {
    std::tuple<Args...> values;
    std::apply([&](auto&... value) { (memcpy(&value, *args++, sizeof value), ...); }, values);
    Launch launch{name, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, [&] { apply(kernel, values); }};
    if (launch.threads <= MAX_THREADS) return run(launch);
    return sprintf(last_error, "kernel %.99s: a block has at most 1024 threads, not %zu", name, launch.threads) > 0;
}
}  // namespace simulator

// ======== What kernels call ==========================================================================================
#define SIMULATOR_LINE int line = __builtin_LINE()    // as a default argument, the caller's
inline void __syncthreads(SIMULATOR_LINE) { simulator::barrier(line); }
inline int __syncthreads_or(int mine, SIMULATOR_LINE) { return simulator::barrier(line, mine); }
inline void __syncwarp(unsigned mask = ~0u, SIMULATOR_LINE) { simulator::warp_barrier(mask, line, [] {}); }
inline int __any_sync(unsigned mask, int predicate, SIMULATOR_LINE) {
    auto any = [=](int, auto of_lane) { for (int i = 0; i < 32; i++) if (mask >> i & 1 && of_lane(i)) return 1; return 0; };
    return simulator::collective(mask, predicate, line, any);
}
template <class T> T __shfl_sync(unsigned mask, T value, int source, SIMULATOR_LINE) {
    if (!(mask >> source & 1)) simulator::fail(line, "reads lane %d, not in its mask 0x%08x", source, mask);
    struct { T value; int source; } mine = {value, source};
    return simulator::collective(mask, mine, line, [](int i, auto of_lane) { return of_lane(of_lane(i).source).value; });
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int x, SIMULATOR_LINE) {
    return __shfl_sync(mask, value, simulator::block->current % 32 ^ x, line);
}
#undef assert
#define assert(condition) ((condition) ? void() : simulator::fail(__LINE__, "assertion failed: %s", #condition))

// ======== Wrapped PTX: what kernels.cu defines in inline assembly for a GPU ==========================================
// Fragments, as mma.sync.m16n8k16 has them. With g = lane / 4 and i = lane % 4 * 2, of A [16, 16] a lane holds, two bf16
// a register, a[0] = A[g][i, i+1], a[1] = A[g+8][i, i+1], a[2] = A[g][i+8, i+9], a[3] = A[g+8][i+8, i+9]; and of every
// eight columns of D, d[0, 1] = D[g][i, i+1] and d[2, 3] = D[g+8][i, i+1].

// The fragment of A [16, 16] in shared memory; at(row, part) is where eight numbers of a row lie (see kernels.cu).
template <class At> void load_shared(uint32_t (&a)[4], At at) {
    int g = simulator::block->current % 32 / 4, i = simulator::block->current % 4;
    for (int r = 0; r < 4; r++) a[r] = reinterpret_cast<const uint32_t*>(at(g + r % 2 * 8, r / 2))[i];
}

// As in kernels.cu. The last lane to come computes it for the warp.
template <bool TRANSPOSED, int STRIDE, int STEPS, int R, int N, class Step, class At>
void mma_shared(float (&d)[R][N][4], Step a, At at, SIMULATOR_LINE) {
    struct Fragments { float (*d)[N][4]; const uint32_t (*a[STEPS])[4]; } mine = {d};
    for (int step = 0; step < STEPS; step++) mine.a[step] = a(step);
    simulator::collective(~0u, mine, line, [&](int lane, auto of_lane) {
        if (lane) return 0;
        float sums[16 * R][8 * N] = {}, b[8][8 * N];
        for (int k = 0; k < 16 * STEPS; k++) {
            for (int n = 0; n < 8 * N && k % 8 == 0; n++) {    // the next eight rows of B, part by part
                auto part = reinterpret_cast<const uint16_t*>(TRANSPOSED ? at(n, k / 8) : at(k + n % 8, n / 8));
                for (int i = 0; i < 8; i++)
                    (TRANSPOSED ? b[i][n] : b[n % 8][n / 8 * 8 + i]) = simulator::half(part[i], 0);
            }
            for (int row = 0; row < 16 * R; row++) {
                float x = simulator::half(of_lane(row % 8 * 4 + k % 8 / 2).a[k / 16][row / 16][row / 8 % 2 + k % 16 / 8 * 2], k);
                if (TRANSPOSED && x == 0) continue;            // rows that there are not
                for (int n = 0; n < 8 * N; n++) sums[row][n] += x * b[k % 8][n];
            }
        }
        for (int i = 0; i < 128 * R * N; i++) {
            int l = i % 32, e = i / 32 % 4, n = i / 128 % N, r = i / 128 / N;
            of_lane(l).d[r][n][e] += sums[16 * r + l / 4 + e / 2 * 8][8 * n + l % 4 * 2 + e % 2];
        }
        return 0;
    });
}

inline float exp2_approx(float x) { return exp2f(x); }
inline uint32_t pack_bf16x2(float x, float y) { return __float2bfloat16(x).bits | __float2bfloat16(y).bits << 16; }

// cp.async: 16 bytes from global to shared memory, past the registers. The first `bytes` are read, the rest is 0.
inline void cp_async_16(void* shared, const void* global, int bytes = 16, SIMULATOR_LINE) {
    if ((uintptr_t(shared) | uintptr_t(global)) % 16) simulator::fail(line, "cp.async needs multiples of 16 bytes");
    auto& [copies, groups] = simulator::block->fibre().async;
    copies.push_back({shared, global, bytes, groups});
}
inline void cp_async_commit() { simulator::block->fibre().async.groups++; }
// Waits until at most the latest N groups are under way. The copies are made here, as late as is allowed.
template <int N> void cp_async_wait() {
    auto& [copies, groups] = simulator::block->fibre().async;
    auto copy = copies.begin();
    for (; copy != copies.end() && copy->group < groups - N; copy++)
        memset(copy->shared, 0, 16), memcpy(copy->shared, copy->global, copy->bytes);
    copies.erase(copies.begin(), copy);
}

inline void relax(SIMULATOR_LINE) {    // between two looks at what another thread will change: lets the others run
    auto& b = *simulator::block;
    if (b.launch->failed || ++b.fibre().looks > 1 << 20) simulator::fail(line, "waits in vain");
    b.warp().relaxing |= b.bit(), simulator::suspend();
}

// A phase of an mbarrier is over when all have arrived, and all bytes that were announced. Copies are made at once.
struct Mbarrier { uint8_t count, waits_for, phase; int bytes; };
inline void mbarrier_arrive(u64* b, int arrivals = 1, int bytes = 0) {
    auto& [count, waits_for, phase, to_come] = *reinterpret_cast<Mbarrier*>(b);
    waits_for -= arrivals, to_come += bytes;
    if (!waits_for && !to_come) waits_for = count, phase ^= 1;
}
inline void mbarrier_init(u64* b, uint8_t count) { *reinterpret_cast<Mbarrier*>(b) = {count, count, 0, 0}; }
inline void mbarrier_expect(u64* b, int bytes) { mbarrier_arrive(b, 1, bytes); }
inline bool mbarrier_passed(u64* b, unsigned parity) { return reinterpret_cast<Mbarrier*>(b)->phase != parity; }
inline bool mbarrier_passed_soon(u64* b, unsigned parity) { return mbarrier_passed(b, parity); }
inline void bulk_copy(void* shared, const void* global, int bytes, u64* b, SIMULATOR_LINE) {
    if ((uintptr_t(shared) | uintptr_t(global) | bytes) % 16) simulator::fail(line, "bulk copies go by 16 bytes");
    memcpy(shared, global, bytes), mbarrier_arrive(b, 0, -bytes);
}
template <int N> void set_registers() {}
inline void fence_async_proxy() {}
inline void store_word(void* p, unsigned w) { __atomic_store_n((unsigned*)p, w, __ATOMIC_RELAXED); }
inline void load_words_if(bool yes, unsigned (&w)[4], const void* p) {
    for (int i = 0; i < 4 && yes; i++) w[i] = __atomic_load_n((const unsigned*)p + i, __ATOMIC_RELAXED);
}
inline void mma_m16n8k16_bf16(float* d, const unsigned (&a)[4], const unsigned* b, const float*, SIMULATOR_LINE) {
    struct { float* d; const unsigned *a, *b; } mine = {d, a, b};    // c is d
    simulator::collective(~0u, mine, line, [](int lane, auto of) {
        for (int i = 0; i < 64; i++) {
            int e = i / 16, k = i % 16, row = lane / 4 * 4 + k % 8 / 2, column = (lane % 4 * 2 + e % 2) * 4 + k % 8 / 2;
            of(lane).d[e] += simulator::half(of(row).a[e / 2 + k / 8 * 2], k) * simulator::half(of(column).b[k / 8], k);
        }
        return 0;
    });
}

constexpr bool HAS_WGMMA = false;
template <bool, int, class... Arguments> void wgmma_shared(Arguments...);    // named in kernels.cu, never called

// Compiled with -fvisibility=hidden, only these are seen from outside: each library keeps its own shared memory.
#define SIMULATOR_PUBLIC extern "C" __attribute__((visibility("default"), used))
#define SIMULATOR_EXPORT(name)                                                                          \
    SIMULATOR_PUBLIC int name##_launch(const unsigned grid[3], const unsigned block[3], void** args) {  \
        return simulator::launch(#name, name, grid, block, args);                                       \
    }
SIMULATOR_PUBLIC inline const char* simulator_error() { return simulator::last_error; }
SIMULATOR_PUBLIC inline void simulator_shuffle(unsigned long long seed) { simulator::shuffle_seed = seed; }
