// ptx.h: instructions that CUDA C++ has no words for, one function for each. tinyvllm.py pastes this file in front of
// kernels.cu for a GPU. For the CPU simulator.h stands in front, and has functions of the same names.
#include <cuda_bf16.h>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "tiny-vLLM needs a GPU of compute capability 8.0 or newer (A100, RTX 30, ...): older ones have no bfloat16"
#endif

using bf16 = __nv_bfloat16;
using u64 = unsigned long long;

// A constant that Python reads too: compile_kernels() looks for lines that begin with EXPORT(, and reads exported_NAME.
#define EXPORT(name, value) constexpr int name = value; extern "C" __device__ const int exported_##name = name

__device__ inline unsigned shared_address(const void* p) { return __cvta_generic_to_shared(p); }    // as PTX wants it

// d [16, 8] = a [16, 16] @ b [16, 8] + c [16, 8] on the tensor cores: a warp holds them in fragments.
__device__ inline void mma_m16n8k16_bf16(float* d, const unsigned (&a)[4], const unsigned* b, const float* c) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
          "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Fragments of four matrices [8, 8] in shared memory: lane 8m + i says where row i of number m lies.
template <bool TRANSPOSED>
__device__ inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    const unsigned address = shared_address(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// The fragment of a [16, 16] in shared memory: at(row, part) says where numbers 8 part .. 8 part + 7 of a row lie.
template <class At> __device__ inline void load_shared(unsigned (&a)[4], At at) {
    ldmatrix_x4<false>(a, at(threadIdx.x % 16, threadIdx.x / 16 % 2));
}

// d[r] [16, 8N] += a[r] [16, 16 STEPS] @ b, for R tiles of rows: a(step) is the fragments of 16 columns; b lies in
// shared memory, its rows at(row, part), or, TRANSPOSED, its columns. Eight rows further is 8 STRIDE parts further.
template <bool TRANSPOSED, int STRIDE, int STEPS, int R, int N, class Step, class At>
__device__ inline void mma_shared(float (&d)[R][N][4], Step a, At at) {
    const unsigned lane = threadIdx.x % 32;
    #pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const unsigned (&a_step)[R][4] = a(step);
        #pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned b[4];    // fragments of 16 columns; each serves R tiles, since shared memory is the slower part
            if (TRANSPOSED)
                ldmatrix_x4<false>(b, at(lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2) + 8 * n * STRIDE);
            else
                ldmatrix_x4<true>(b, at(lane % 16, n + lane / 16) + 16 * step * STRIDE);
            #pragma unroll
            for (int i = 0; i < 2 * R; ++i)
                mma_m16n8k16_bf16(d[i / 2][n + i % 2], a_step[i / 2], b + i % 2 * 2, d[i / 2][n + i % 2]);
        }
    }
}

// Starts a copy of 16 bytes from global to shared memory, not through registers. `bytes` of them are read, the rest is 0.
__device__ inline void cp_async_16(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
// What a thread has started since its last commit is a group. Waits until at most its latest N groups are under way.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

__device__ inline float exp2_approx(float x) {    // 2^x, with a relative error of 2^-22
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ inline unsigned pack_bf16x2(float low, float high) {    // two bf16 in a register, `low` in the lower half
    unsigned both;
    // volatile: it must not sink below wgmma's fence
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
// atomicInc that orders memory: whoever finds its result here also finds what this thread had written or seen before.
__device__ inline unsigned atomic_inc_acq_rel(unsigned* p, unsigned limit) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(limit) : "memory");
    return before;
}

// After a thread's own writes to shared memory, before the copy engine or wgmma comes there (compute capability 9.0 and up).
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Shared memory that may be more than 48 KB: NAME_shared_bytes tells CudaDevice.compile how much kernel NAME wants.
// It begins at a multiple of 1,024 bytes: wgmma reads from bits 7 to 9 of an address how parts have changed places.
#define DYNAMIC_SHARED(bytes) extern __shared__ __align__(1024) char dynamic_shared[]

// On compute capability 9.0, four warps together multiply faster (mma: two thirds of that speed): d [64, 64] += a [64, 16] @
// b [16, 64], each warp with 16 of the rows, in fragments as above. The tensor cores read b from shared memory themselves, and
// a too if it is no fragment. It must lie there as place() puts it: rows of 128 bytes, whose parts of 16 bytes have changed
// places. The simulator has none of this: only tests on such a GPU run it.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HAS_WGMMA = true;
#define FOUR(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])
#define WGMMA_M64N64K16(d, operands, ...)                                                                              \
    asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, "  \
                 "%2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "   \
                 "%23, %24, %25, %26, %27, %28, %29, %30, %31}, " operands ";}"                                        \
                 : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]), FOUR(d[4]), FOUR(d[5]), FOUR(d[6]), FOUR(d[7])      \
                 : __VA_ARGS__ : "memory")
// What wgmma is told of a matrix: where it begins, in 16 bytes; that eight rows further is 1,024 bytes further; and, in the
// highest bits, a swizzle of 128 bytes, which is place()'s. (1 << 16 is ignored.) row: a multiple of 8; part: even, and of 8
// where rows go along k. As a sum: all matrices of a tile are one number plus constants.
template <class At> __device__ inline u64 wgmma_matrix(At at, int row, int part) {
    return ((u64)1 << 62 | (u64)64 << 32 | 1 << 16 | shared_address(at(0, 0)) / 16) + (at(row, part) - at(0, 0));
}
// As mma_shared, by four warps. TRANSPOSED (scores): a is in shared memory too, at a(row, part); else fragments [STEPS][R][4].
template <bool TRANSPOSED, int STEPS, int R, int N, class A, class At>
__device__ inline void wgmma_shared(float (&d)[R][N][4], const A& a, At at) {
    const auto settle = [&] {    // nothing that happens to d moves across this point, either way
        #pragma unroll
        for (int i = 0; i < R * N; ++i) asm volatile("" : FOUR(d[i / N][i % N]) :: "memory");
    };
    static_assert(N % 8 == 0, "64 columns an instruction");
    settle();
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");    // registers written before it are seen: d, and a's fragments
    #pragma unroll
    for (int i = 0; i < STEPS * R * N; i += 8) {
        const int step = i / N / R, r = i / N % R, n = i % N;
        if constexpr (TRANSPOSED)
            WGMMA_M64N64K16((d[r] + n), "%32, %33, p, 1, 1, 0, 0",
                            "l"(wgmma_matrix(a, 64 * r, 2 * step)), "l"(wgmma_matrix(at, 8 * n, 2 * step)));
        else
            WGMMA_M64N64K16((d[r] + n), "{%32, %33, %34, %35}, %36, p, 1, 1, 1", "r"(a[step][r][0]), "r"(a[step][r][1]),
                            "r"(a[step][r][2]), "r"(a[step][r][3]), "l"(wgmma_matrix(at, 16 * step, n)));
    }
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
    settle();
}
#else
constexpr bool HAS_WGMMA = false;
template <bool, int, class... Arguments> __device__ void wgmma_shared(Arguments...);    // named in kernels.cu, never called
#endif

// PTX of compute capability 9.0. An mbarrier counts arrivals in shared memory, and bytes that a bulk copy brings there;
// waiters name the parity of the phase that is to be over.
__device__ inline void mbarrier_init(u64* b, unsigned count) {    // such that the copy engine sees it
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_address(b)), "r"(count) : "memory");
    fence_async_proxy();
}
__device__ inline void mbarrier_arrive(u64* b) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(shared_address(b)) : "memory");
}
__device__ inline void mbarrier_expect(u64* b, unsigned bytes) {    // an arrival, and this many bytes are to come
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(shared_address(b)), "r"(bytes) : "memory");
}
#define MBARRIER_TEST(name, instruction)                                                                              \
    __device__ inline bool name(u64* b, unsigned parity) {                                                            \
        unsigned yes;                                                                                                 \
        asm volatile("{.reg .pred p; mbarrier." instruction ".parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"  \
                     : "=r"(yes) : "r"(shared_address(b)), "r"(parity) : "memory");                                   \
        return yes;                                                                                                   \
    }
MBARRIER_TEST(mbarrier_passed, "test_wait")
MBARRIER_TEST(mbarrier_passed_soon, "try_wait")    // the same, but if not, it may take a nap first
__device__ inline void bulk_copy(void* shared, const void* global, unsigned bytes, u64* b) {    // L2 need not keep it
    asm volatile("{.reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], once;}"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(b)) : "memory");
}
// Relaxed: what other blocks write is seen in the end. Each word by itself: 16 bytes need not come at once.
__device__ inline void load_words_if(bool yes, unsigned (&w)[4], const void* p) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3]) : "l"(p), "r"((unsigned)yes) : "memory");
}
__device__ inline void store_word(void* p, unsigned w) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(p), "r"(w) : "memory");
}
template <int N> __device__ inline void set_registers() {    // a thread's, of four aligned warps; 168 is what decode begins with
    if constexpr (N > 168) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}
__device__ inline void relax() {}    // between two looks at what another thread will change
