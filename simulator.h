// simulator.h: CUDA's execution model on a CPU. simulator.py puts this file in front of the text of
// .cu files, the very same as for a GPU, and a C++ compiler makes a shared library of both:
//
//     ... simulator.h, kernels.cu ...
//     SIMULATOR_EXPORT(rms_norm)    // int rms_norm_launch(grid, block, args), as cuLaunchKernel
//
// A thread becomes a *fibre*: a call of the kernel on a stack of its own, which can be left in the
// middle and resumed later. A fibre runs until it returns or has to wait for other threads; then
// its core runs the next fibre, warp after warp, until none can run. If all threads that have not
// returned wait in __syncthreads(), the barrier opens. A warp's collectives (shuffle, vote, mma)
// are made of a smaller barrier, for 32 lanes. One core runs a whole thread block in this way;
// thread blocks spread over the cores.
//
// Where a GPU would hang or compute nonsense, the simulator is strict:
//   - All threads of a thread block that have not returned must wait at the same __syncthreads(),
//     and all lanes of a collective's mask must come. Errors name kernel, block, thread and line.
//   - cp.async copies at the wait and not before, so a forgotten wait reads old data.
//   - simulator_shuffle(seed) runs threads in random order, a new order after each barrier, and
//     fills shared memory with NaNs before each thread block: a result that depends on the seed
//     lacks a barrier or an initialisation.
//   - Built with -fsanitize=address,undefined, it finds accesses outside of arrays.
// A thread that waits for another thread in a loop must call relax() there. Two thread blocks that
// wait for each other need 256 threads or more each, so that each gets a core.
//
// To look into a kernel, print from the kernel, or stop there with gdb (without optimisation):
//     printf '#!/bin/sh\nexec g++ "$@" -O0 -g\n' > debug-g++; chmod +x debug-g++
//     CXX=./debug-g++ gdb -ex 'set breakpoint pending on' -ex 'break rms_norm if threadIdx.x == 3'
//       --args python ...
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
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
#define __shared__ static        // AddressSanitizer guards no thread_locals; one core runs all then
#else
#define SIMULATOR_ASAN(...)
#define __shared__ thread_local  // a thread block runs on one core, and has the core's copy
#endif

// ---- Keywords, built-in types and functions -----------------------------------------------------
#define __global__
#define __device__
#define __launch_bounds__(...)
// Compiled with -fvisibility=hidden, only public names are seen from outside: each library keeps
// its own shared memory.
#define SIMULATOR_PUBLIC extern "C" __attribute__((visibility("default"), used))
#define EXPORT(name, value) constexpr int name = value; SIMULATOR_PUBLIC const int exported_##name = name
#define DYNAMIC_SHARED(bytes) alignas(1024) __shared__ char dynamic_shared[bytes]
static thread_local struct uint3 { unsigned x, y, z; } threadIdx, blockIdx, blockDim, gridDim;

// Conversions only, since kernels compute in float32. A bfloat16 is the upper half of a float32.
struct __nv_bfloat16 { unsigned short bits; };
using bf16 = __nv_bfloat16;
using u8 = unsigned char;
using u64 = unsigned long long;
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
    unsigned word = __float_as_uint(x);
    unsigned rounded = word + 0x7fff + (word >> 16 & 1);                      // to nearest, ties to even
    return {static_cast<unsigned short>(x == x ? rounded >> 16 : 0x7fff)};    // (a NaN might become a number)
}

// A macro, because glibc has a function of this name. What is approximate on a GPU is exact here.
#define rsqrtf(x) (1.0f / sqrtf(x))
using std::max, std::min;

// Real atomics, since other cores run other thread blocks. Returns the value before the update.
template <class T, class Update> T update_atomically(T* p, Update update) {
    T old = *p;
    T updated;
    do updated = update(old);    // if another core has changed *p, old becomes the new value: try again
    while (!__atomic_compare_exchange(p, &old, &updated, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return old;
}
template <class T> T atomicAdd(T* p, std::common_type_t<T> x) {    // (common_type_t: T comes from p alone)
    return update_atomically(p, [=](T old) { return old + x; });
}
template <class T> T atomicInc(T* p, std::common_type_t<T> limit) {
    return update_atomically(p, [=](T old) { return old >= limit ? 0 : old + 1; });
}

namespace simulator {
// ---- Fibres -------------------------------------------------------------------------------------
constexpr int MAX_THREADS = 1024;                // of a thread block
constexpr size_t STACK_BYTES = 33 * 4096 + 256;  // the + 256 spreads the stacks' tops over the cache

struct Copy { void* shared; const void* global; int bytes, group; };
struct Fibre {
    uint3 index;                 // threadIdx
    int line;                    // of the collective where the fibre waits for lanes of its warp
    unsigned mask;               // these lanes
    void* shown;                 // the value that the fibre shows them
    unsigned looks;              // calls of relax()
    std::vector<Copy> copies;    // of cp.async: issued, not waited for
    int groups;                  // of cp.async: committed so far
    char* stack;                 // the lowest address
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
    void** top;                  // the last used address, while the fibre does not run
};

// Called on one stack, returns on another: to the call that left the other stack, or at first to
// the beginning of entry(), see below. Saves the registers that a function must keep. Jumps at the
// end, since a CPU expects of a ret that it goes back to the latest call.
__attribute__((naked, noinline, noipa)) static void save_and_load(void*** save, void** load) {    // rdi, rsi
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n popq %rcx\n jmp *%rcx");
}
inline void switch_stack(Fibre& from, Fibre& to) { save_and_load(&from.top, to.top); }
inline void prepare_stack(Fibre& fibre, void (*entry)()) {
    // As if the fibre had been left just before entry(), called by nobody, as gdb will see: room
    // for six registers, entry(), and no address to return to.
    fibre.top = reinterpret_cast<void**>(fibre.stack + STACK_BYTES) - 8;
    memset(fibre.top, 0, 64);
    fibre.top[6] = reinterpret_cast<void*>(entry);
}
#endif

inline void switch_fibre(Fibre& from, Fibre& to, [[maybe_unused]] bool for_good = false) {
    SIMULATOR_ASAN(void** fake_stack = for_good ? nullptr : &from.fake_stack;)
    SIMULATOR_ASAN(__sanitizer_start_switch_fiber(fake_stack, to.stack, to.stack_bytes);)
    switch_stack(from, to);
    SIMULATOR_ASAN(__sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);)
}

// ---- A thread block: its threads run until all wait or have returned ----------------------------
struct Launch {
    const char* name;
    uint3 grid, block;
    std::function<void()> call;     // the kernel with its arguments
    size_t blocks = size_t(grid.x) * grid.y * grid.z;
    size_t threads = block.x * block.y * block.z;
    std::atomic<unsigned> next{0};  // the first thread block that no core has taken
    std::atomic<bool> failed{false};
};

struct Block {                      // one for each core, used for one thread block after the other
    // Lanes, a bit each. A lane that is in none of the four has returned.
    struct Warp { unsigned runnable, at_barrier, at_collective, relaxing; };
    Launch* launch;
    int current;                    // the running thread
    int barrier_line;               // where threads wait at a barrier; 0: none does
    unsigned looks_outside;         // calls of relax_for_others(), without a round between that had none
    bool looked_outside;            // whether there was a call in this round
    bool any, any_before;           // whether a thread brings a true to this barrier, or brought to the last
    uint64_t random;
    unsigned order;                 // threads run as 0 ^ order, 1 ^ order, ...: of any two, each may be first
    Warp warps[MAX_THREADS / 32] = {};
    std::vector<Fibre> fibres{MAX_THREADS};
    char* stacks = static_cast<char*>(malloc(MAX_THREADS * STACK_BYTES));    // memory comes with use
    Fibre core;                     // the stack on which the core itself runs

    Fibre& fibre() { return fibres[current]; }
    Fibre* lanes() { return &fibres[current / 32 * 32]; }
    Warp& warp() { return warps[current / 32]; }
    unsigned bit() { return 1u << current % 32; }
};
static thread_local Block* block;   // of this core
static char last_error[500];        // the first error of the launch that failed last
static uint64_t shuffle_seed = atoll(getenv("SIMULATOR_SHUFFLE") ?: "0");    // 0: threads run in order

inline uint64_t next_random() { return block->random = block->random * 6364136223846793005 + 1; }
inline bool happens_to_be_late() { return shuffle_seed && next_random() >> 61 == 0; }    // one time in eight

// Lets other threads run, until one of them makes the running thread runnable again.
inline void suspend(bool for_good = false) {
    block->warp().runnable &= ~block->bit();
    switch_fibre(block->fibre(), block->core, for_good);
}

// Records an error of the running thread. No thread of its thread block runs any more; other cores
// finish the thread blocks that they have begun.
template <class... Values> [[noreturn]] void fail(int line, const char* format, Values... values) {
    uint3 b = blockIdx, t = threadIdx;
    if (!block->launch->failed.exchange(true)) {
        const char* place = "kernel %s, block (%u, %u, %u), thread (%u, %u, %u), line %d: ";
        const char* name = block->launch->name;
        int length = snprintf(last_error, 200, place, name, b.x, b.y, b.z, t.x, t.y, t.z, line);
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
        for (unsigned i = 0; i < 32; i++) {
            unsigned lane = i ^ b.order % 32;
            if (!(warp.runnable >> lane & 1)) continue;
            b.current = (&warp - b.warps) * 32 + lane;
            threadIdx = b.fibre().index;
            switch_fibre(b.core, b.fibre());
        }
}

// Called when no thread can run: lets waiting threads go on. False if all threads have returned.
inline bool open_barrier(Block& b) {
    if (shuffle_seed) b.order = next_random() >> 54;    // 10 bits
    // First, threads that wait in relax(): another thread block may have written the awaited word.
    unsigned live = 0;
    for (auto& warp : b.warps) live |= warp.runnable = std::exchange(warp.relaxing, 0);
    if (live) {
        if (!std::exchange(b.looked_outside, false)) b.looks_outside = 0;
        const bool is_long = b.looks_outside > 10000;    // the other process may want this core
        if (is_long) std::this_thread::sleep_for(std::chrono::microseconds(50));
        else std::this_thread::yield();
        return true;
    }
    // Then a warp whose lanes wait for other lanes in vain: the lanes say so, and fail.
    for (auto& warp : b.warps) {
        warp.runnable = warp.at_collective;
        if (warp.runnable) return true;
    }
    b.barrier_line = 0;
    b.any_before = std::exchange(b.any, false);
    for (auto& warp : b.warps) live |= warp.runnable = std::exchange(warp.at_barrier, 0);
    return live;
}

// Fills this library's thread-local memory, of which shared memory is a part, with NaNs. (With
// AddressSanitizer shared memory is static, and stays.)
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
    if (shuffle_seed % 2) number = launch.blocks - 1 - number;    // thread blocks have no order either
    block = &b;
    gridDim = launch.grid;
    blockDim = launch.block;
    blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
    b.launch = &launch;
    b.looks_outside = 0;
    b.order = 0;
    b.random = (shuffle_seed + number) * 0x9e3779b97f4a7c15;
    for (unsigned i = 0; i < launch.threads; i++) {
        Fibre& fibre = b.fibres[i];
        fibre.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        fibre.copies.clear();
        fibre.groups = 0;
        fibre.looks = 0;
        fibre.stack = &b.stacks[i * STACK_BYTES];
        SIMULATOR_ASAN(__asan_unpoison_memory_region(fibre.stack, STACK_BYTES);)    // left by a failed launch
        prepare_stack(fibre, fibre_main);
        b.warps[i / 32].at_barrier |= 1u << i % 32;    // all begin at a barrier
    }
    while (open_barrier(b))
        for (unsigned i = 0; i < MAX_THREADS / 32; i++) run_warp(b, b.warps[i ^ b.order / 32]);
}

// ---- Waiting: barriers and warp collectives -----------------------------------------------------
inline bool barrier(int line, bool mine = false) {
    int others = std::exchange(block->barrier_line, line);
    if (others && others != line)
        fail(line, "__syncthreads() while others wait at the one in line %d", others);
    block->warp().at_barrier |= block->bit();
    block->any |= mine;
    suspend();
    return block->any_before;
}

// Waits until all lanes of the mask are here. The last lane calls all_here() and lets all go on.
template <class Function> void warp_barrier(unsigned mask, int line, Function all_here) {
    Block& b = *block;
    auto& warp = b.warp();
    if (!(mask & b.bit())) fail(line, "lane %d is not in its own mask 0x%08x", b.current % 32, mask);
    b.fibre().line = line;
    b.fibre().mask = mask;
    warp.at_collective |= b.bit();
    if (mask & ~warp.at_collective) {
        suspend();
        if (!(warp.at_collective & b.bit())) return;
        unsigned absent = mask & ~warp.at_collective;
        fail(line, "waits for lanes 0x%08x, but 0x%08x returned or are at a barrier", mask, absent);
    }
    for (int i = 0; i < 32; i++) {
        Fibre& other = b.lanes()[i];
        if (mask >> i & 1 && (other.mask != mask || other.line != line))
            fail(line, "waits for lanes 0x%08x, but lane %d for 0x%08x in line %d", mask, i, other.mask,
                 other.line);
    }
    all_here();
    warp.at_collective &= ~mask;
    warp.runnable |= mask;
}

// What collectives are made of. Each lane shows a value; the last lane to come computes each lane's
// result: compute(lane, of_lane), where of_lane(i) is the value that lane i shows.
template <class T, class Compute> auto collective(unsigned mask, T mine, int line, Compute compute) {
    auto of_lane = [lanes = block->lanes()](int lane) -> T& { return *static_cast<T*>(lanes[lane].shown); };
    struct Shown { T mine; decltype(compute(0, of_lane)) result; } shown = {mine};
    block->fibre().shown = &shown;
    warp_barrier(mask, line, [&] {
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) static_cast<Shown*>(block->lanes()[i].shown)->result = compute(i, of_lane);
    });
    return shown.result;
}

// ---- A launch: thread blocks over the cores -----------------------------------------------------
inline int run(Launch& launch) {
    constexpr size_t WORTH_A_CORE = 256;    // threads; to start a helper takes as long as to run some hundred
    static std::mutex one_launch;           // launches run one after the other, as in a CUDA stream
    static std::vector<Block> cores(max(2u, std::thread::hardware_concurrency()));
    std::lock_guard<std::mutex> lock(one_launch);
    auto work = [&](Block& core) {
        while (!launch.failed) {
            unsigned i = launch.next++;
            if (i >= launch.blocks) break;
            run_block(core, launch, i);
        }
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
int launch(const char* name, void (*kernel)(Args...), const unsigned grid[3], const unsigned block[3],
           void** args) {
    std::tuple<Args...> values;
    std::apply([&](auto&... value) { (memcpy(&value, *args++, sizeof value), ...); }, values);
    auto call = [&] { apply(kernel, values); };
    Launch launch{name, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, call};
    if (launch.threads <= MAX_THREADS) return run(launch);
    sprintf(last_error, "kernel %.99s: a block has at most 1024 threads, not %zu", name, launch.threads);
    return 1;
}

inline float half(unsigned word, int k) {    // the lower bf16 of a word if k is even, the upper if odd
    return __uint_as_float(word >> k % 2 * 16 << 16);
}
}  // namespace simulator

// ---- What kernels call --------------------------------------------------------------------------
#define SIMULATOR_LINE int line = __builtin_LINE()    // as a default argument, the caller's line
inline void __syncthreads(SIMULATOR_LINE) { simulator::barrier(line); }
inline int __syncthreads_or(int mine, SIMULATOR_LINE) { return simulator::barrier(line, mine); }
inline void __syncwarp(unsigned mask = ~0u, SIMULATOR_LINE) { simulator::warp_barrier(mask, line, [] {}); }
inline int __any_sync(unsigned mask, int predicate, SIMULATOR_LINE) {
    auto any = [=](int, auto of_lane) {
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1 && of_lane(i)) return 1;
        return 0;
    };
    return simulator::collective(mask, predicate, line, any);
}
template <class T> T __shfl_sync(unsigned mask, T value, int source, SIMULATOR_LINE) {
    if (!(mask >> source & 1)) simulator::fail(line, "reads lane %d, not in its mask 0x%08x", source, mask);
    struct { T value; int source; } mine = {value, source};
    auto read = [](int i, auto of_lane) { return of_lane(of_lane(i).source).value; };
    return simulator::collective(mask, mine, line, read);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int x, SIMULATOR_LINE) {
    return __shfl_sync(mask, value, simulator::block->current % 32 ^ x, line);
}
#undef assert
#define assert(condition) \
    ((condition) ? void() : simulator::fail(__LINE__, "assertion failed: %s", #condition))

// ---- The functions of ptx.h ---------------------------------------------------------------------
// Contracts, and how fragments lie in the lanes, stand in ptx.h.
inline uint32_t pack_bf16x2(float low, float high) {
    return __float2bfloat16(low).bits | __float2bfloat16(high).bits << 16;
}
// E4M3 and f16, without the sign: MANTISSA bits of mantissa. Numbers below 2^LEAST are equally far apart.
template <int MANTISSA, int LEAST> int to_bits(float x, float most) {
    float size = fminf(fabsf(x), most);
    int exponent = max(ilogbf(size), LEAST);
    int steps = rintf(ldexpf(size, MANTISSA - exponent));    // of 2^(exponent - MANTISSA); ties to even
    return (exponent - LEAST << MANTISSA) + steps;
}
template <int MANTISSA, int LEAST> float from_bits(int bits) {
    int above = max((bits >> MANTISSA) - 1, 0);              // the exponent above LEAST
    int steps = bits - (above << MANTISSA);
    return steps * __uint_as_float(above + LEAST - MANTISSA + 127 << 23);
}
inline u8 pack_e4m3(float x) {
    if (x != x) return 0x7f;
    return __float_as_uint(x) >> 31 << 7 | to_bits<3, -6>(x, 448);
}
inline float unpack_e4m3(u8 code) {
    float size = from_bits<3, -6>(code % 128);
    return code < 128 ? size : -size;
}
inline unsigned pack_f16(float x) {
    if (x != x) return 0x7fff;
    return __float_as_uint(x) >> 31 << 15 | to_bits<10, -14>(x, 65536);    // 65536: infinity's bits
}
inline float unpack_f16(unsigned bits) {
    unsigned size = bits % 0x8000;
    float x = size < 0x7c00 ? from_bits<10, -14>(size) : size == 0x7c00 ? INFINITY : NAN;
    return bits < 0x8000 ? x : -x;
}
inline unsigned short pack_e4m3x2(float low, float high) { return pack_e4m3(low) | pack_e4m3(high) << 8; }
inline unsigned unpack_e4m3x2(unsigned x) { return pack_bf16x2(unpack_e4m3(x >> 8), unpack_e4m3(x >> 24)); }
inline float half_f16(unsigned word, int k) { return unpack_f16(word >> k % 2 * 16 & 0xffff); }
inline unsigned pack_f16x2(float low, float high) { return pack_f16(low) | pack_f16(high) << 16; }
inline unsigned e4m3x2_to_f16x2(unsigned short x) {
    static const auto f16s = [] {    // of all codes, for speed
        std::array<unsigned, 256> f16s;
        for (int code = 0; code < 256; code++)
            f16s[code] = pack_f16(code % 128 == 127 ? NAN : unpack_e4m3(code));
        return f16s;
    }();
    return f16s[x % 256] | f16s[x / 256] << 16;
}

template <class At> void load_shared(uint32_t (&a)[4], At at) {
    int g = simulator::block->current % 32 / 4;
    int t = simulator::block->current % 4;
    for (int r = 0; r < 4; r++) a[r] = reinterpret_cast<const uint32_t*>(at(g + r % 2 * 8, r / 2))[t];
}

template <float number(unsigned, int)>    // of a word: the lower if k is even, the upper if odd
void multiply_fragments(float* d, const unsigned (&a)[4], const unsigned* b, int line) {
    struct { float* d; const unsigned *a, *b; } mine = {d, a, b};    // c is d
    simulator::collective(~0u, mine, line, [](int lane, auto of_lane) {
        if (lane) return 0;
        float x[16][16];
        float y[16][8];
        float z[16][8];
        for (int l = 0; l < 32; l++) {    // fragments to matrices, as in ptx.h
            auto& mine = of_lane(l);
            int g = l / 4;
            int t = l % 4;
            for (int i = 0; i < 8; i++)
                x[g + i / 2 % 2 * 8][2 * t + i / 4 * 8 + i % 2] = number(mine.a[i / 2], i);
            for (int i = 0; i < 4; i++) {
                y[2 * t + i / 2 * 8 + i % 2][g] = number(mine.b[i / 2], i);
                z[g + i / 2 * 8][2 * t + i % 2] = mine.d[i];
            }
        }
        for (int row = 0; row < 16; row++)
            for (int k = 0; k < 16; k++)
                for (int n = 0; n < 8; n++) z[row][n] += x[row][k] * y[k][n];
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) of_lane(l).d[i] = z[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
        return 0;
    });
}
inline void mma_m16n8k16_bf16(
        float* d, const unsigned (&a)[4], const unsigned* b, const float*, SIMULATOR_LINE) {    // c is d
    multiply_fragments<simulator::half>(d, a, b, line);
}
inline void mma_m16n8k16_f16(
        float* d, const unsigned (&a)[4], const unsigned* b, const float*, SIMULATOR_LINE) {
    multiply_fragments<half_f16>(d, a, b, line);
}

// mma_shared and mma_shared_e4m3. The last lane to come computes the product for the warp.
template <bool CODES, bool TRANSPOSED, int STEPS, int R, int N, class Step, class At>
void multiply_shared(float (&d)[R][N][4], Step a, At at, int line) {
    struct Fragments { float (*d)[N][4]; const uint32_t (*a[STEPS])[4]; } mine = {d};
    for (int step = 0; step < STEPS; step++) mine.a[step] = a(step);
    simulator::collective(~0u, mine, line, [&](int lane, auto of_lane) {
        if (lane) return 0;
        float sums[16 * R][8 * N] = {};
        float b[8][8 * N];
        for (int k = 0; k < 16 * STEPS; k++) {
            for (int n = 0; n < 8 * N && k % 8 == 0; n++) {    // the next eight rows of B, part by part
                int eighth = TRANSPOSED ? k / 8 : n / 8;
                int half = TRANSPOSED ? eighth % 2 : eighth / (N / 2);
                int code_part = TRANSPOSED ? eighth / 2 : eighth % (N / 2);
                int part = CODES ? code_part : eighth;
                const void* numbers = TRANSPOSED ? at(n, part) : at(k + n % 8, part);
                for (int i = 0; i < 8; i++)
                    (TRANSPOSED ? b[i][n] : b[n % 8][n / 8 * 8 + i]) =
                        CODES ? unpack_e4m3(static_cast<const u8*>(numbers)[2 * i + half])
                              : __bfloat162float(static_cast<const bf16*>(numbers)[i]);
            }
            for (int row = 0; row < 16 * R; row++) {
                auto& owner = of_lane(row % 8 * 4 + k % 8 / 2);
                float x = simulator::half(owner.a[k / 16][row / 16][row / 8 % 2 + k % 16 / 8 * 2], k);
                if (TRANSPOSED && x == 0) continue;    // for speed: attention's missing rows are zeros
                for (int n = 0; n < 8 * N; n++) sums[row][n] += x * b[k % 8][n];
            }
        }
        for (int i = 0; i < 128 * R * N; i++) {
            int l = i % 32;
            int e = i / 32 % 4;
            int n = i / 128 % N;
            int r = i / 128 / N;
            of_lane(l).d[r][n][e] += sums[16 * r + l / 4 + e / 2 * 8][8 * n + l % 4 * 2 + e % 2];
        }
        return 0;
    });
}

template <bool TRANSPOSED, int STRIDE, int STEPS, int R, int N, class Step, class At>
void mma_shared(float (&d)[R][N][4], Step a, At at, SIMULATOR_LINE) {
    multiply_shared<false, TRANSPOSED, STEPS>(d, a, at, line);
}
template <bool TRANSPOSED, int STRIDE, int STEPS, int N, class Step, class At>
void mma_shared_e4m3(float (&d)[1][N][4], Step a, At at, SIMULATOR_LINE) {
    multiply_shared<true, TRANSPOSED, STEPS>(d, a, at, line);
}

inline void cp_async_16(void* shared, const void* global, int bytes = 16, SIMULATOR_LINE) {
    if ((uintptr_t(shared) | uintptr_t(global)) % 16)
        simulator::fail(line, "cp.async needs multiples of 16 bytes");
    simulator::Fibre& fibre = simulator::block->fibre();
    fibre.copies.push_back({shared, global, bytes, fibre.groups});
}
inline void cp_async_commit() { simulator::block->fibre().groups++; }
template <int N> void cp_async_wait() {    // the copies are made here, as late as is allowed
    simulator::Fibre& fibre = simulator::block->fibre();
    auto copy = fibre.copies.begin();
    for (; copy != fibre.copies.end() && copy->group < fibre.groups - N; copy++) {
        memset(copy->shared, 0, 16);
        memcpy(copy->shared, copy->global, copy->bytes);
    }
    fibre.copies.erase(fibre.copies.begin(), copy);
}

inline float exp2_approx(float x) { return exp2f(x); }
inline unsigned multiply_bf16x2(unsigned x, unsigned y) {
    using simulator::half;
    return pack_bf16x2(half(x, 0) * half(y, 0), half(x, 1) * half(y, 1));
}
inline unsigned atomic_inc_acq_rel(unsigned* p, unsigned limit) { return atomicInc(p, limit); }

constexpr bool HAS_WGMMA = false;
inline void fence_async_proxy() {}
template <bool, int, class... Arguments> void wgmma_shared(Arguments...);    // named, never called

// Bulk copies are made at once. A phase is over when all have arrived and all announced bytes have
// come.
struct Mbarrier { uint8_t count, waits_for, phase; int bytes; };
inline void mbarrier_arrive(u64* b, int arrivals = 1, int bytes = 0) {
    Mbarrier& mbarrier = *reinterpret_cast<Mbarrier*>(b);
    mbarrier.waits_for -= arrivals;
    mbarrier.bytes += bytes;
    if (mbarrier.waits_for || mbarrier.bytes) return;
    mbarrier.waits_for = mbarrier.count;
    mbarrier.phase ^= 1;
}
inline void mbarrier_init(u64* b, uint8_t count) { *reinterpret_cast<Mbarrier*>(b) = {count, count, 0, 0}; }
inline void mbarrier_expect(u64* b, int bytes) { mbarrier_arrive(b, 1, bytes); }
inline bool mbarrier_passed(u64* b, unsigned parity) {
    return reinterpret_cast<Mbarrier*>(b)->phase != parity;
}
// When shuffled, a thread is late at times: it looks again when all others have gone as far as they can.
inline bool mbarrier_passed_soon(u64* b, unsigned parity) {
    return !simulator::happens_to_be_late() && mbarrier_passed(b, parity);
}
inline void bulk_copy(void* shared, const void* global, int bytes, u64* b, SIMULATOR_LINE) {
    if ((uintptr_t(shared) | uintptr_t(global) | bytes) % 16)
        simulator::fail(line, "bulk copies go by 16 bytes");
    memcpy(shared, global, bytes);
    mbarrier_arrive(b, 0, -bytes);
}
inline void store_word(void* p, unsigned w) { __atomic_store_n((unsigned*)p, w, __ATOMIC_RELAXED); }
template <bool> void load_words_if(bool yes, unsigned (&w)[4], const void* p) {
    for (int i = 0; i < 4 && yes; i++) w[i] = __atomic_load_n((const unsigned*)p + i, __ATOMIC_RELAXED);
}
template <int N> void set_registers() {}
inline void let_others_run(int line) {
    simulator::Block& b = *simulator::block;
    if (b.launch->failed) simulator::fail(line, "waits for a thread that has failed");
    b.warp().relaxing |= b.bit();
    simulator::suspend();
}
inline void relax(SIMULATOR_LINE) {
    if (++simulator::block->fibre().looks > 1 << 20) simulator::fail(line, "waits in vain");
    let_others_run(line);
}
inline void relax_for_others(SIMULATOR_LINE) {
    simulator::block->looks_outside++;
    simulator::block->looked_outside = true;
    let_others_run(line);
}
inline void __trap(SIMULATOR_LINE) { simulator::fail(line, "gives up"); }
template <class T> void store_word_system(T* p, T w) { __atomic_store_n(p, w, __ATOMIC_RELAXED); }
inline u64 load_word_system(const u64* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline u64 nanoseconds() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

#define SIMULATOR_EXPORT(name)                                                                          \
    SIMULATOR_PUBLIC int name##_launch(const unsigned grid[3], const unsigned block[3], void** args) {  \
        return simulator::launch(#name, name, grid, block, args);                                       \
    }
SIMULATOR_PUBLIC inline const char* simulator_error() { return simulator::last_error; }
SIMULATOR_PUBLIC inline void simulator_shuffle(unsigned long long seed) { simulator::shuffle_seed = seed; }
