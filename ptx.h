// ptx.h: instructions that CUDA C++ has no words for, one function for one instruction or idea.
//
// compile_kernels() puts this file in front of a .cu file for a GPU. For the CPU simulator.h stands
// in front, with functions of the same names.
//
// Each lane calls a function for itself, but where the comment begins with "A warp" or "Four warps"
// all lanes together. A function orders accesses to memory only if the comment says so.
//
// The tensor cores multiply matrices that a warp holds in *fragments*: each lane has a few numbers
// of every matrix in registers, two bf16 or one float a register. In
// D [16, 8] = A [16, 16] @ B [16, 8] + C [16, 8] a lane has, with g = lane / 4 and t = lane % 4,
//
//     a[0]: A, row g,     columns 2t, 2t + 1        b[0]: B, column g, rows 2t, 2t + 1
//     a[1]: A, row g + 8, columns 2t, 2t + 1        b[1]: B, column g, rows 2t + 8, 2t + 9
//     a[2]: A, row g,     columns 2t + 8, 2t + 9    d[0], d[1]: D, row g,     columns 2t, 2t + 1
//     a[3]: A, row g + 8, columns 2t + 8, 2t + 9    d[2], d[3]: D, row g + 8, columns 2t, 2t + 1
//
//     D, row 0: lanes 0 0 1 1 2 2 3 3 (d[0], d[1])    row 8: lanes 0 0 1 1 2 2 3 3 (d[2], d[3])
//        row 1: lanes 4 4 5 5 6 6 7 7                 row 9: lanes 4 4 5 5 6 6 7 7
//
// Two D side by side, rounded to bf16, are fragments of an A: a product is the left factor of the
// next product, and no number moves from lane to lane.
#include <cuda_bf16.h>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "tiny-vLLM needs a GPU of compute capability 8.0 or newer (A100, RTX 30, ...), with bfloat16"
#endif

using bf16 = __nv_bfloat16;
using u8 = unsigned char;
using u64 = unsigned long long;

// A constant that Python reads too: compile_kernels() finds the lines that begin with EXPORT( and
// reads exported_NAME from the compiled module.
#define EXPORT(name, value) constexpr int name = value; extern "C" __device__ const int exported_##name = name

// Shared memory that may pass 48 KB: compile_kernels() asks for NAME_shared_bytes for kernel NAME.
// Aligned to 1,024 bytes: bits 7 to 9 of an address tell wgmma which parts have changed places.
#define DYNAMIC_SHARED(bytes) extern __shared__ __align__(1024) char dynamic_shared[]

// ---- For every card -----------------------------------------------------------------------------

// An address in shared memory, as PTX wants it.
__device__ inline unsigned shared_address(const void* p) { return __cvta_generic_to_shared(p); }

// The products of two pairs of bf16.
__device__ inline unsigned multiply_bf16x2(unsigned x, unsigned y) {
    constexpr unsigned MINUS_ZERO = 0x80008000;    // a product alone would need compute capability 9.0
    unsigned both;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(x), "r"(y), "r"(MINUS_ZERO));
    return both;
}

// E4M3, a number in 8 bits (its code): sign, 4 bits of exponent, 3 of mantissa. The least number above 0
// is 2^-9, the greatest 448; there is no infinity, and 0x7f and 0xff are NaN (arXiv:2209.05433).
// Two codes, that of `low` in the lower byte, rounded to nearest, ties to even. Beyond 448: 448.
// (Compute capability 8.9 and newer.)
__device__ inline unsigned short pack_e4m3x2(float low, float high) {
    unsigned short both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
    return both;
}
// The numbers of two codes, exactly. x: a code in the upper byte of each half; the other bytes do not
// matter. Hazard: the codes of NaN become 480.
__device__ inline unsigned unpack_e4m3x2(unsigned x) {
    // Each bit of a code goes to its place in a bf16. The exponents' biases are 7 and 127, so the numbers
    // are 2^120 times too small.
    constexpr unsigned TWO_TO_120 = 0x7b807b80;
    return multiply_bf16x2((x & 0x80008000) | (x >> 4 & 0x07f007f0), TWO_TO_120);
}

// The same as two f16, by one instruction, for a product in f16. x: a code in each byte. NaN stays NaN.
__device__ inline unsigned e4m3x2_to_f16x2(unsigned short x) {
    unsigned both;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"(x));
    return both;
}
// Two f16, rounded to nearest, ties to even. f16 has 5 bits of exponent and 10 of mantissa, so all bits of a
// bf16 are kept from 2^-17 on. Beyond 65504, the greatest f16: infinity.
__device__ inline unsigned pack_f16x2(float low, float high) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// A warp. d = a @ b + c, in fragments as above.
#define MMA_M16N8K16(type)                                                                                   \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                                       \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                                \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]),                                  \
          "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))
__device__ inline void mma_m16n8k16_bf16(
        float* d, const unsigned (&a)[4], const unsigned* b, const float* c) {
    MMA_M16N8K16("bf16");
}
__device__ inline void mma_m16n8k16_f16(
        float* d, const unsigned (&a)[4], const unsigned* b, const float* c) {
    MMA_M16N8K16("f16");
}

// A warp. Reads four matrices [8, 8] of bf16 from shared memory: lane 8m + i says where row i of
// matrix m lies. r[m]: of matrix m, row g and columns 2t, 2t + 1 (TRANSPOSED: column g and rows).
template <bool TRANSPOSED>
__device__ inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
#define LDMATRIX_X4(trans)                                                                                   \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];"                 \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory")
    if (TRANSPOSED) LDMATRIX_X4(".trans");
    else LDMATRIX_X4("");
}

// The same for two matrices: lanes 0 to 15 say where their rows lie.
template <bool TRANSPOSED>
__device__ inline void ldmatrix_x2(unsigned (&r)[2], const void* row) {
#define LDMATRIX_X2(trans)                                                                                   \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0, %1}, [%2];"                         \
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory")
    if (TRANSPOSED) LDMATRIX_X2(".trans");
    else LDMATRIX_X2("");
}

// A warp. The fragment of A [16, 16] in shared memory. at(row, part): where the eight numbers
// 8 part .. 8 part + 7 of a row lie.
template <class At>
__device__ inline void load_shared(unsigned (&a)[4], At at) {
    ldmatrix_x4<false>(a, at(threadIdx.x % 16, threadIdx.x / 16 % 2));
}

// A warp. d[r] [16, 8N] += a[r] [16, 16 STEPS] @ b, for R tiles of 16 rows. a(step): fragments of
// 16 columns, for all tiles. b lies in shared memory, its rows (TRANSPOSED: its columns) at(row,
// part), and row r + 8 starts 8 * STRIDE parts after row r.
template <bool TRANSPOSED, int STRIDE, int STEPS, int R, int N, class Step, class At>
__device__ inline void mma_shared(float (&d)[R][N][4], Step a, At at) {
    const unsigned lane = threadIdx.x % 32;
    #pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const unsigned (&a_step)[R][4] = a(step);
        #pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned b[4];    // 16 columns. Each serves R tiles: shared memory is the slower part
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

// A warp. As mma_shared for a tile of 16 rows, with E4M3 codes for b. A row of b (TRANSPOSED: a column) has
// half as many parts as the same numbers in bf16. The even bytes of part p are the codes of part p of these
// bf16; the odd bytes are the codes of a part in the second half: part p + half the number. TRANSPOSED:
// a(step) has the columns of these two parts.
template <bool TRANSPOSED, int STRIDE, int STEPS, int N, class Step, class At>
__device__ inline void mma_shared_e4m3(float (&d)[1][N][4], Step a, At at) {
    #pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const unsigned (&a_step)[4] = a(step)[0];
        #pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            unsigned codes[2];    // a part each of eight rows (TRANSPOSED: columns), and of the next eight
            if (TRANSPOSED) ldmatrix_x2<false>(codes, at(threadIdx.x % 16, step) + 16 * i * STRIDE);
            else ldmatrix_x2<true>(codes, at(threadIdx.x % 16, i) + 16 * step * STRIDE);
            const unsigned even[2] = {unpack_e4m3x2(codes[0] << 8), unpack_e4m3x2(codes[1] << 8)};
            const unsigned odd[2] = {unpack_e4m3x2(codes[0]), unpack_e4m3x2(codes[1])};
            if (TRANSPOSED) {
                const unsigned first[2] = {even[0], odd[0]};
                const unsigned second[2] = {even[1], odd[1]};
                mma_m16n8k16_bf16(d[0][2 * i], a_step, first, d[0][2 * i]);
                mma_m16n8k16_bf16(d[0][2 * i + 1], a_step, second, d[0][2 * i + 1]);
            } else {
                mma_m16n8k16_bf16(d[0][i], a_step, even, d[0][i]);
                mma_m16n8k16_bf16(d[0][i + N / 2], a_step, odd, d[0][i + N / 2]);
            }
        }
    }
}

// Starts to copy 16 bytes from global to shared memory, past the registers: the first `bytes`; the
// rest becomes 0. After cp_async_wait() this lane sees the copy, other lanes after a barrier too.
__device__ inline void cp_async_16(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
// Makes a group of the copies that the lane has started since its last commit.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the lane's latest N groups are under way.
template <int N>
__device__ inline void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

__device__ inline float exp2_approx(float x) {    // 2^x, with a relative error of 2^-22
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// `low` is the lower half. Volatile, since the conversion must not sink below wgmma's fence.
__device__ inline unsigned pack_bf16x2(float low, float high) {
    unsigned both;
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// atomicInc that orders memory: a lane that finds the result of this lane's call also finds all
// that this lane had written or seen before the call.
__device__ inline unsigned atomic_inc_acq_rel(unsigned* p, unsigned limit) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before) : "l"(p), "r"(limit) : "memory");
    return before;
}

// ---- wgmma: four warps multiply together (compute capability 9.0 alone) -------------------------
// D [64, 64] += A [64, 16] @ B [16, 64]; each warp has 16 rows of D and A, in fragments as above.
// (mma reaches two thirds of the speed.) The tensor cores read B from shared memory themselves, and
// A unless in fragments. TileLayout in kernels.cu puts matrices there as wgmma wants them: in rows of
// 128 bytes whose 16-byte parts have changed places. The simulator has no wgmma: only tests on such
// a GPU run this section.
// Orders the lane's own writes to shared memory before later looks by the copy engine or wgmma.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HAS_WGMMA = true;
#define IN_OUT_4(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])
// d: float [8][4], 64 columns. operands: A, B, then "p" (true: add to d), their signs, and whether
// they are transposed. The rest is the operands' registers, from %32 on.
#define WGMMA_M64N64K16(d, operands, ...)                                                                    \
    asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; "                                                      \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "                                     \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "    \
                 "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " operands ";}"          \
                 : IN_OUT_4(d[0]), IN_OUT_4(d[1]), IN_OUT_4(d[2]), IN_OUT_4(d[3]),                           \
                   IN_OUT_4(d[4]), IN_OUT_4(d[5]), IN_OUT_4(d[6]), IN_OUT_4(d[7])                            \
                 : __VA_ARGS__ : "memory")

// A matrix in shared memory, in wgmma's words. row: a multiple of 8. part: even; a multiple of 8
// where rows go along k. A sum, so that a tile's matrices are one number plus constants.
template <class At>
__device__ inline u64 wgmma_matrix(At at, int row, int part) {
    constexpr u64 SWIZZLE_128_BYTES = (u64)1 << 62;        // as TileLayout::place changes places
    constexpr u64 EIGHT_ROWS = (u64)(1024 / 16) << 32;     // from row r to row r + 8, in 16 bytes
    constexpr u64 UNUSED = 1 << 16;                        // the distance in the other direction is ignored
    const u64 start = shared_address(at(0, 0)) / 16;
    return (SWIZZLE_128_BYTES | EIGHT_ROWS | UNUSED | start) + (at(row, part) - at(0, 0));
}

// Four warps. As mma_shared. TRANSPOSED (scores): a is in shared memory too, at a(row, part).
// Otherwise a is fragments [STEPS][R][4]. Returns when d is complete.
template <bool TRANSPOSED, int STEPS, int R, int N, class A, class At>
__device__ inline void wgmma_shared(float (&d)[R][N][4], const A& a, At at) {
    static_assert(N % 8 == 0, "64 columns an instruction");
    const auto settle = [&] {    // the compiler moves nothing that happens to d across this point, either way
        #pragma unroll
        for (int i = 0; i < R * N; ++i) asm volatile("" : IN_OUT_4(d[i / N][i % N]) :: "memory");
    };
    settle();
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");    // after writes to d and a's fragments
    #pragma unroll
    for (int i = 0; i < STEPS * R * N; i += 8) {
        const int step = i / N / R;
        const int r = i / N % R;
        const int n = i % N;
        if constexpr (TRANSPOSED)
            WGMMA_M64N64K16((d[r] + n), "%32, %33, p, 1, 1, 0, 0",
                            "l"(wgmma_matrix(a, 64 * r, 2 * step)), "l"(wgmma_matrix(at, 8 * n, 2 * step)));
        else
            WGMMA_M64N64K16((d[r] + n), "{%32, %33, %34, %35}, %36, p, 1, 1, 1",
                            "r"(a[step][r][0]), "r"(a[step][r][1]), "r"(a[step][r][2]), "r"(a[step][r][3]),
                            "l"(wgmma_matrix(at, 16 * step, n)));
    }
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
    settle();
}
#else
constexpr bool HAS_WGMMA = false;
template <bool, int, class... Arguments> __device__ void wgmma_shared(Arguments...);    // named, never called
#endif

// ---- mbarriers, bulk copies and words, for decode.cu (compute capability 9.0 and newer) ---------
// An mbarrier in shared memory counts arrivals, and bytes that bulk copies are to bring. When all
// have come, a phase is over and the next begins. A waiter names the parity of the phase that is to
// be over. Arrivals and copies write before the phase is over, a waiter reads afterwards.

__device__ inline void mbarrier_init(u64* b, unsigned count) {    // a phase wants `count` arrivals
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_address(b)), "r"(count) : "memory");
    fence_async_proxy();    // the copy engine sees the mbarrier
}
__device__ inline void mbarrier_arrive(u64* b) {    // an arrival
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(shared_address(b)) : "memory");
}
__device__ inline void mbarrier_expect(u64* b, unsigned bytes) {    // an arrival, and bytes to come
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                 :: "r"(shared_address(b)), "r"(bytes) : "memory");
}
__device__ inline bool mbarrier_passed(u64* b, unsigned parity) {    // is that phase over?
    unsigned yes;
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(yes) : "r"(shared_address(b)), "r"(parity) : "memory");
    return yes;
}
__device__ inline bool mbarrier_passed_soon(u64* b, unsigned parity) {    // may nap before it says no
    unsigned yes;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(yes) : "r"(shared_address(b)), "r"(parity) : "memory");
    return yes;
}

// Starts to copy global to shared memory; the mbarrier counts the bytes that come. L2 need not keep
// the bytes: no other thread block reads them (but for pages that several sequences share).
__device__ inline void bulk_copy(void* shared, const void* global, unsigned bytes, u64* b) {
    asm volatile("{.reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], once;}"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(b)) : "memory");
}
// Reads four words, or leaves w as it is. Relaxed: words that other thread blocks write (SYSTEM: or
// other GPUs) are seen in the end, each by itself; 16 bytes need not come at once.
template <bool SYSTEM>
__device__ inline void load_words_if(bool yes, unsigned (&w)[4], const void* p) {
#define LOAD_WORDS_IF(scope)                                                                                 \
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; "                                                     \
                 "@p ld.relaxed." scope ".global.v4.u32 {%0, %1, %2, %3}, [%4];}"                            \
                 : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3]) : "l"(p), "r"((unsigned)yes) : "memory")
    if constexpr (SYSTEM) LOAD_WORDS_IF("sys");
    else LOAD_WORDS_IF("gpu");
}
__device__ inline void store_word(void* p, unsigned w) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(p), "r"(w) : "memory");
}
// Four aligned warps. Sets a thread's number of registers; a kernel that calls it starts with 168.
template <int N>
__device__ inline void set_registers() {
    if constexpr (N > 168) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}

__device__ inline void relax() {}    // between two looks at what another thread will change

// ---- Words between GPUs -------------------------------------------------------------------------
// Relaxed: another GPU, or the CPU, sees a store in the end. The 4 or 8 bytes of a word come at once.
__device__ inline void store_word_system(unsigned* p, unsigned w) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" :: "l"(p), "r"(w) : "memory");
}
__device__ inline void store_word_system(u64* p, u64 w) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(p), "l"(w) : "memory");
}
__device__ inline u64 load_word_system(const u64* p) {
    u64 w;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(w) : "l"(p) : "memory");
    return w;
}
__device__ inline u64 nanoseconds() {    // since some moment
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}
// As relax(), but the word comes from another process. The caller counts the seconds.
__device__ inline void relax_for_others() {}
