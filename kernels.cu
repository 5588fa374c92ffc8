// tiny-vLLM: the engine's GPU kernels. (decode.cu holds one more: a whole step of a few sequences.)
//
// A step of the engine is a series of matrix products, by cuBLAS, with these kernels between them. The
// kernels stand in the order in which a token meets them; the second to the fifth run in every layer,
// attention as one of two kernels. (With FP8 weights, so do quantize and add_residual.)
//
//     gather_rows       token id -> the token's row of the embedding table
//     rope_and_cache    queries and keys are rotated by position, keys and values go to their pages
//     paged_attention   each query looks at all keys up to its own, in whatever pages the keys lie
//     decode_attention  the same, for a step in which every sequence brings one token
//     silu_mul          the gate of the feed-forward part
//     quantize          with FP8 weights: numbers in 16 bits -> codes in 8 bits, and a scale for each row
//     add_residual      with FP8 weights: a product is scaled, added to the residual stream, and normed
//     scale_logits      with FP8 weights: the head's product is scaled
//     rms_norm          the norm before the head (a layer's norms: in rope_and_cache and silu_mul)
//     sample            logits -> token, on the GPU: 8 bytes a sequence go to the CPU, not V logits
//     best_logprobs     logits -> the most probable tokens, where a request asks for them
//     all_reduce        with several GPUs: the sum over the GPUs, behind two products of every layer
//     all_gather        with several GPUs: each has the logits of a part of the vocabulary
//
// Letters are sizes:
//     T  tokens in this step, a ragged batch:    D  hidden size         F  feed-forward size
//        the new tokens of all sequences, one    H  query heads         V  vocabulary
//        after the other, whether a sequence     K  kv heads            L  layers
//        brings one token or a prompt's chunk    G  H / K               B  tokens in a page
//     S  sequences                               h  head_dim            N  pages of the KV cache
//     R  sampled rows: sequences that get a token
// A page is what vLLM calls a block of the KV cache (block_table); CUDA's block is a thread block.
//
// Above each kernel stands its contract: the grid, what a thread block and a thread own, each
// pointer with its shape. Prefill and decode share the kernels: positions, slots and lengths are
// data. Only attention divides its work in two ways, by the number of a thread block's rows.
//
// Numbers are stored as bfloat16 (the upper half of a float32) and computed in float32. This file
// is compiled for one model, so loops have constant bounds. The macros (H, K and F are a GPU's, of several):
//     HIDDEN, FFN, VOCAB, BLOCK_SIZE     D, F, V, B          QKV_BIAS      1: q, k and v get a bias
//     NUM_HEADS, NUM_KV_HEADS            H, K                QK_NORM       1: q's and k's heads are normed
//     HEAD_DIM                           h                   FP8_WEIGHTS   1: weights are E4M3 codes
//     RMS_EPS                            of the norms        FP8_CACHE     1: so are keys and values
//     NUM_LAYERS, O_BIAS, RANKS          for decode.cu alone
// Read ptx.h first: how a warp holds a matrix, and E4M3. compile_kernels() in device.py puts ptx.h in front
// for a GPU, simulator.h for a CPU, and reads this text too:
//   extern "C" __global__ __launch_bounds__(THREADS) void name(parameters)
//     declares a kernel. THREADS is a number or an exported constant (a second bound may follow);
//     a parameter is a bf16, float, int, long long, u8, u64 or kv, or a pointer to such numbers.
//   EXPORT(NAME, value);
//     at the beginning of a line declares a constant int that Python reads as kernels.NAME.

constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;                   // G: query heads that share a kv head
constexpr int QKV = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM;    // a token's row: queries, keys, values
constexpr float INF = __builtin_bit_cast(float, 0x7f800000);      // NVRTC knows no INFINITY
constexpr float LOWEST = -3.4e38f;        // almost -INF; but LOWEST - LOWEST is 0, not NaN
constexpr float LOG2_E = 1.44269504f;     // exp(x) = 2^(x log2(e)): GPUs have an instruction for powers of 2

static_assert(HIDDEN % 8 == 0 && FFN % 8 == 0, "hidden and ffn sizes must be multiples of 8 (16 bytes)");
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM >= 32 && HEAD_DIM <= 256,
              "head_dim must be 32, 48, 64, ... or 256");
static_assert((BLOCK_SIZE & (BLOCK_SIZE - 1)) == 0, "a page must have 8, 16, 32, ... tokens");
static_assert(NUM_HEADS % NUM_KV_HEADS == 0 && GROUP <= 16, "1 to 16 query heads must share each kv head");

// A GPU moves memory best in 16 bytes a thread: eight bf16, one load instruction. The address must
// be a multiple of 16.
struct alignas(16) Bf16x8 { bf16 v[8]; };    // in memory
struct Float8 { float v[8]; };               // in registers, to compute with
struct alignas(8) Float2 { float v[2]; };

// A number of the KV cache: bf16, or with --kv-cache-dtype fp8 an E4M3 code (see ptx.h).
#if FP8_CACHE
using kv = u8;
#else
using kv = bf16;
#endif
constexpr int KV_PARTS = HEAD_DIM * sizeof(kv) / 16;    // 16-byte parts of a key or value
struct alignas(16) Words4 { unsigned w[4]; };           // sixteen codes, or eight bf16

__device__ inline Bf16x8& vec8(bf16* p) { return *reinterpret_cast<Bf16x8*>(p); }
__device__ inline const Bf16x8& vec8(const bf16* p) { return *reinterpret_cast<const Bf16x8*>(p); }

__device__ inline Float8 to_float(const Bf16x8 x) {
    Float8 y;
    for (int i = 0; i < 8; ++i) y.v[i] = __bfloat162float(x.v[i]);
    return y;
}

__device__ inline Bf16x8 to_bf16(const Float8& x) {
    Bf16x8 y;
    for (int i = 0; i < 8; ++i) y.v[i] = __float2bfloat16(x.v[i]);
    return y;
}

// -------------------------------------------------------------------------------------------------
// gather_rows: out[r] = table[rows[r]], the embedding lookup
//
// The CPU launches a step before it has read the tokens that the step before sampled. rows names
// such a token ~i: token i of `sampled`, which the GPU has. The kernel replaces ~i by the token, for
// `sample`: there, at the end of the step, `sampled` gets the next tokens.
//   out [T, D], table [V, D], rows [T], sampled [R of the step before], null if no row is negative.
//   Grid (T): a thread block copies one row, a thread 16 bytes of the row at a time.
//   Hazard: thread 0 replaces a number that other threads may not have read. No barrier is needed: each
//     thread reads the number once, and finds the same row by ~i and by the token.
// -------------------------------------------------------------------------------------------------
EXPORT(ROW_THREADS, 256);    // of most kernels: a thread block has one row, or a part of a row
extern "C" __global__ __launch_bounds__(ROW_THREADS) void gather_rows(
        bf16* out, const bf16* table, int* rows, const int* sampled) {
    const int id = rows[blockIdx.x];
    const int row = id < 0 ? sampled[~id] : id;
    if (id < 0 && threadIdx.x == 0) rows[blockIdx.x] = row;
    // 64 bits: 256,000 rows of 16,384 numbers are more numbers than an int can count.
    const bf16* source = table + (size_t)row * HIDDEN;
    bf16* target = out + (size_t)blockIdx.x * HIDDEN;
    for (int i = 8 * threadIdx.x; i < HIDDEN; i += 8 * ROW_THREADS) vec8(target + i) = vec8(source + i);
}

// ---- Sums and maxima over a warp or a thread block ----------------------------------------------
struct Sum { template <class T> __device__ T operator()(T a, T b) const { return a + b; } };
struct Max { template <class T> __device__ T operator()(T a, T b) const { return a > b ? a : b; } };

// A butterfly: in step k, lane i meets lane i xor 2^k. All 32 lanes get the result, always added in
// the same order.
template <class T, class Op>
__device__ inline T warp_reduce(T x, Op op) {
    for (int distance = 16; distance > 0; distance /= 2) x = op(x, __shfl_xor_sync(0xffffffff, x, distance));
    return x;
}

template <class T>
__device__ inline T quad_sum(T x) {    // over lanes 4g .. 4g + 3, whose numbers are of one row: see ptx.h
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// All threads of a thread block get the result: a butterfly in each warp, then every thread folds
// the results of the warps, 32 at most.
template <class T, class Op>
__device__ inline T block_reduce(T x, Op op) {
    __shared__ T partial[32];
    x = warp_reduce(x, op);
    __syncthreads();    // a slow warp may still be reading `partial` of the reduction before this one
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();    // all partial results are written before anyone folds them
    x = partial[0];
    for (int warp = 1; warp < blockDim.x / 32; ++warp) x = op(x, partial[warp]);
    return x;
}

// -------------------------------------------------------------------------------------------------
// The norm: x / rms(x) * weight, with rms(x) = sqrt(mean(x^2) + eps)
//
// A layer's two norms need no kernel of their own. load_weights() folds a norm's weight into the
// matrix behind the norm. (The folded matrix is bf16 again: one rounding more than in Hugging
// Face's model, where the weight multiplies the vector.) The remaining factor, 1 / rms(x), is one
// number a token: the kernel that reads the token's products (rope_and_cache, silu_mul) computes
// the factor from x and multiplies by it. (With FP8 weights, the factor is in the codes of x: see
// add_residual, which reads x before the product.)
// -------------------------------------------------------------------------------------------------
// 1 / rms(x) of a row, for all threads of a thread block. All must call: block_reduce has barriers.
__device__ inline float inverse_rms(const bf16* x) {
    float squares = 0;
    for (int i = 8 * threadIdx.x; i < HIDDEN; i += 8 * blockDim.x) {
        const Float8 mine = to_float(vec8(x + i));
        for (int j = 0; j < 8; ++j) squares += mine.v[j] * mine.v[j];
    }
    return rsqrtf(block_reduce(squares, Sum()) / HIDDEN + RMS_EPS);
}

// ---- FP8 weights: a number is a code in 8 bits (E4M3, see ptx.h) times a scale -------------------
// cuBLAS multiplies codes with codes. A kernel behind the product multiplies by the scales: row_scales,
// one for each row of the weights, so one for each column of the product; and the token's scale.
constexpr float MOST_E4M3 = 448;
struct alignas(8) Codes8 { unsigned short v[4]; };    // eight codes, in pairs
struct alignas(16) Scales8 { float v[8]; };

// Threads for a row: one for eight columns, in whole warps, but `most` at most.
__device__ constexpr int threads_for(int columns, int most) {
    const int threads = (columns + 255) / 256 * 32;
    return threads < most ? threads : most;
}

__device__ inline void store_codes(u8* p, const Float8& x, float times) {
    Codes8 codes;
    for (int i = 0; i < 4; ++i) codes.v[i] = pack_e4m3x2(x.v[2 * i] * times, x.v[2 * i + 1] * times);
    *reinterpret_cast<Codes8*>(p) = codes;
}

__device__ inline Float8 multiplied(Float8 x, const float* scales) {
    const Scales8 times = *reinterpret_cast<const Scales8*>(scales);
    for (int i = 0; i < 8; ++i) x.v[i] *= times.v[i];
    return x;
}

// A normed token needs no scale of its own: |x_i| / rms(x) is sqrt(D) at most. The token's codes are those of
// 448 / sqrt(D) * x / rms(x), and the products with these codes are multiplied by a constant:
__device__ inline float normed_scale() { return sqrtf(HIDDEN) / MOST_E4M3; }

__device__ inline float greatest_of(float greatest, const Float8& x) {
    for (int i = 0; i < 8; ++i) greatest = fmaxf(greatest, fabsf(x.v[i]));
    return greatest;
}

// The scale of a row: the greatest number of the row gets the greatest code. greatest: of the thread's
// numbers. All threads of the thread block must call, and get the result; scales[row] gets it too.
__device__ inline float row_scale(float greatest, float* scales, int row) {
    greatest = block_reduce(greatest, Max());
    const float scale = greatest > 1e-30f ? greatest / MOST_E4M3 : 1;    // else 1 / scale might be infinite
    if (threadIdx.x == 0) scales[row] = scale;
    return scale;
}

// -------------------------------------------------------------------------------------------------
// rope_and_cache: norms q, k and v, rotates q and k by position, writes k and v to the cache
//
// RoPE rotates each pair (a, b) of a head's numbers by an angle that grows with the position:
// (a cos - b sin, b cos + a sin). The dot product of a query and a key then depends on the distance
// of their positions alone.
// Hazard: which numbers are a pair? i and i + h/2 in Hugging Face checkpoints, 2i and 2i + 1 in
// Meta's own files. With the wrong pairs text stays fluent for some twenty tokens and then decays,
// so only a test can tell.
//   qkv [T, (H + 2K) h]: q is replaced; k and v are only read.
//   x [T, D]: the residual stream before the norm; qkv is x @ the folded matrix.
//   cos_sin [max_len, h]: for each position the cosines of h/2 angles, then the sines.
//   positions [T].
//   slot_mapping [T]: slot = page * B + offset. Negative for a padding token: nothing is written.
//   k_cache, v_cache [N, K, B, h]: in a page, one head's keys are consecutive: so attention reads.
//     Codes stand in the order 0, h/2, 1, h/2 + 1, ..., in the pairs that turn together. A word of codes
//     then becomes two words of fragments, and no byte changes places (see mma_shared_e4m3). A number
//     is rounded to bf16 and then to a code, as in decode.cu, where the bf16 alone reach the cache. A number
//     beyond 448 becomes 448. Hazard: attention reads the code of NaN as 480. NaN comes from broken
//     weights alone, but then an answer can be wrong without an error; with bf16 the request would fail.
//   query_scale: multiplies every query (see paged_attention).
//   bias [(H + 2K) h]: added to q, k and v, before they turn. Null unless QKV_BIAS is 1.
//   qk_norm [2h]: each head of q and of k is normed too, before it turns, with a weight [h] for all
//     heads of q and one for all heads of k. Null unless QK_NORM is 1.
//   row_scales [(H + 2K) h]: with FP8 weights, of the matrix; qkv is the product with codes of normed tokens,
//     and x is not read. Otherwise null.
//   Grid (T): a thread block owns one token. A thread owns eight pairs of a head at a time (so h
//     must be a multiple of 16), and reads both halves of the pairs before it writes either: no
//     barrier is needed in between. Shared memory: block_reduce's, and `squares`.
// -------------------------------------------------------------------------------------------------
extern "C" __global__ __launch_bounds__(ROW_THREADS) void rope_and_cache(
        bf16* qkv, const bf16* x, const float* cos_sin, const int* positions, const long long* slot_mapping,
        kv* k_cache, kv* v_cache, float query_scale, const bf16* bias, const bf16* qk_norm,
        const float* row_scales) {
    constexpr int HALF = HEAD_DIM / 2;
    constexpr int EIGHTS = HALF / 8;
    const int token = blockIdx.x;
    const long long slot = slot_mapping[token];
    const float* cos = cos_sin + (size_t)positions[token] * HEAD_DIM;
    const float* sin = cos + HALF;
    const float factor = FP8_WEIGHTS ? normed_scale() : inverse_rms(x + (size_t)token * HIDDEN);
    const bf16* row = qkv + (size_t)token * QKV;
    const auto load = [&](const bf16* p) {    // eight numbers of the row, with factor and bias
        Float8 y = to_float(vec8(p));
        if constexpr (FP8_WEIGHTS) y = multiplied(y, row_scales + (p - row));
        Float8 more = {};
        if constexpr (QKV_BIAS) more = to_float(vec8(bias + (p - row)));
        for (int j = 0; j < 8; ++j) y.v[j] = y.v[j] * factor + more.v[j];
        return y;
    };
    __shared__ float squares[QK_NORM ? QKV / 16 : 1];    // of eight pairs, the sum of their squares
    if constexpr (QK_NORM) {
        for (int item = threadIdx.x; item < QKV / 16; item += ROW_THREADS) {
            const bf16* pairs = row + item / EIGHTS * HEAD_DIM + 8 * (item % EIGHTS);
            const Float8 a = load(pairs);
            const Float8 b = load(pairs + HALF);
            float sum = 0;
            for (int j = 0; j < 8; ++j) sum += a.v[j] * a.v[j] + b.v[j] * b.v[j];
            squares[item] = sum;
        }
        __syncthreads();    // squares are written before they are read, and q is read before q is replaced
    }

    if (slot < 0) return;    // here, so that x and qkv are on their way before `slot` has come
    for (int item = threadIdx.x; item < QKV / 16; item += ROW_THREADS) {
        const int head = item / EIGHTS;    // first the H heads of queries, then K of keys, then K of values
        const int i = 8 * (item % EIGHTS);
        bf16* target = qkv + (size_t)token * QKV + head * HEAD_DIM + i;
        Float8 a = load(target);
        Float8 b = load(target + HALF);
        const bool turns = head < NUM_HEADS + NUM_KV_HEADS;    // values do not turn
        float times = head < NUM_HEADS ? query_scale : 1;
        if (QK_NORM && turns) {
            float sum = 0;
            for (int e = 0; e < EIGHTS; ++e) sum += squares[head * EIGHTS + e];
            times *= rsqrtf(sum / HEAD_DIM + RMS_EPS);
            const bf16* weight = qk_norm + (head < NUM_HEADS ? 0 : HEAD_DIM) + i;
            for (int j = 0; j < 8; ++j) a.v[j] *= to_float(vec8(weight)).v[j];
            for (int j = 0; j < 8; ++j) b.v[j] *= to_float(vec8(weight + HALF)).v[j];
        }
        for (int j = 0; j < 8; ++j) {
            const float c = turns ? cos[i + j] : 1;
            const float s = turns ? sin[i + j] : 0;
            const float a0 = a.v[j] * times;
            const float b0 = b.v[j] * times;
            a.v[j] = a0 * c - b0 * s;
            b.v[j] = b0 * c + a0 * s;
        }
        if (head >= NUM_HEADS) {
            kv* cache = head < NUM_HEADS + NUM_KV_HEADS ? k_cache : v_cache;
            const int kv_head = (head - NUM_HEADS) % NUM_KV_HEADS;
            // 64 bits, like slot: in a cache of 4 GB, page * K * B * h passes 2^31.
            const long long page = slot / BLOCK_SIZE;
            const long long offset = slot % BLOCK_SIZE;
            cache += ((page * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + offset) * HEAD_DIM;
            if constexpr (FP8_CACHE) {
                const auto codes_of = [&](int j) {
                    const unsigned pair = pack_bf16x2(a.v[j], b.v[j]);
                    return pack_e4m3x2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
                };
                Words4 codes;
                for (int j = 0; j < 4; ++j) codes.w[j] = codes_of(2 * j) | codes_of(2 * j + 1) << 16;
                *reinterpret_cast<Words4*>(cache + 2 * i) = codes;
                continue;
            }
            target = reinterpret_cast<bf16*>(cache) + i;
        }
        vec8(target) = to_bf16(a);
        vec8(target + HALF) = to_bf16(b);
    }
}

// -------------------------------------------------------------------------------------------------
// paged_attention, decode_attention: out = softmax(q . k / sqrt(h)) v
//
// FlashAttention-2, with two additions:
// - Paged. Key t of a sequence lies in page block_table[t / B], at offset t % B. Only the copy to
//   shared memory knows of pages.
// - Grouped queries (GQA). Query heads kv_head * G .. kv_head * G + G - 1 share one kv head. A row
//   is a query with one of these heads, and has number query * G + head % G. All rows of a thread
//   block share the keys that the thread block reads.
//
// Powers of 2. Queries come multiplied by log2(e) / sqrt(h) (query_scale of rope_and_cache), so
// exp(q . k / sqrt(h)) is 2^(q . k), a single instruction. Below, exp means this power of 2.
//
// Online softmax. Keys come tile by tile. exp(s) of a score s might overflow; exp(s - m) does not
// if m is near the maximum. The factor exp(-m) is in the sum l and in the accumulator acc alike, so
// out = acc / l is the same for any m. When m becomes m', l and acc are rescaled:
//     l   = l   exp(m - m') + sum_j exp(s_j - m')
//     acc = acc exp(m - m') + sum_j exp(s_j - m') v_j
// FlashAttention-2 raises m to the maximum of every tile. To find a tile's maximum takes as long as
// the tile's exps. So here m stays at the first tile's maximum until a lane's share of a sum passes
// 2^32: then the thread block repeats the tile with a higher m.
//
// Causal. A sequence's queries are its last positions. A query at position p sees keys 0 .. p,
// whether it is a decode token (p = context - 1) or stands in the middle of a prompt. A padding
// query has p < 0, sees no key, and gets out = 0.
//
// Splits (flash-decoding). A few decode tokens make too few thread blocks for a GPU, however long
// their contexts. So a row's keys are dealt to `splits` thread blocks, a run of tiles to each (to
// fewer if there are few keys). Each leaves acc, m and l in `partial`; the last to end merges all.
//
//   out [T, H h].
//   qkv [T, (H + 2K) h]: the rotated q is read; this step's k and v are in the cache by now.
//   k_cache, v_cache [N, K, B, h]: of one layer, as rope_and_cache leaves them.
//   block_tables [pages of all S], cu_blocks [S + 1]: sequence s has the pages
//     block_tables[cu_blocks[s] .. cu_blocks[s + 1] - 1], each with B tokens.
//   cu_seqlens [S + 1]: tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1 of the step are sequence s's.
//   context_lens [S]: how many tokens the sequence has by now, this step's included.
//   tiles [A, 2]: the work, in tiles of rows. Tile a is ATTENTION_ROWS rows (or as many as are
//     left) of sequence tiles[a, 0], from row tiles[a, 1] on. Tiles with many keys to see should be
//     first.
//   partial [T, H, splits, h + 2] float: acc, m, l. Null if splits is 1.
//   Grid (K * splits, A), with A * K at most 1,024 if splits > 1. Thread blocks start in this
//     order, heads first: so the longest tiles of all heads start before any shorter tile.
//
// What a thread block does:
//
//     start to copy q, and the first tiles of K and V
//     m = LOWEST, l = 0, acc = 0
//     for each tile of keys:
//         wait for K; start the next copy
//         repeat:
//             s = q @ K^T, and -inf where a key comes after the query
//             if this is the first tile, or repeated: raise m to the maximum; rescale l and acc
//             p = exp(s - m)
//         until no thread has a sum of p's beyond 2^32
//         l += sum of p
//         wait for V; start the next copy
//         acc += p @ V
//     with few rows: leave acc, m and l of each warp in shared memory, and merge the warps
//     out = acc / l; or, with splits: leave acc, m and l, and the last of the splits merges
//
// Who owns what. Of each 16 rows of scores and acc, lane i of a warp has rows i / 4 and i / 4 + 8,
// and in these rows columns 2 (i % 4) and 2 (i % 4) + 1 of every eight: so mma leaves its result
// (see ptx.h), and so the next mma wants its left factor, the probabilities.
// - Many rows (prefill): each warp owns 16 of every 64 rows.
// - Few rows (16 at most, as in decode: a token has G rows): all warps have the same rows, and each
//   warp has keys of its own in every tile: 16, or 32 if the tile has 128 keys. (Where a large head_dim
//   makes tiles smaller, the warps beyond repeat the work of others.) At the end the sums of the warps
//   are added up.
// Shared memory: q of the thread block's rows, then a ring of STAGES tiles, K, V, K, V, ...: while
// one stage is multiplied, copies fill the others.
//
// Codes (FP8_CACHE). With few rows, memory is the limit, so the ring holds codes. A warp loads fragments of
// codes and turns the codes into bf16 in registers. With many rows, all warps multiply the same keys, and
// wgmma reads shared memory itself. So the codes become bf16 in the ring: each thread converts the codes that
// the thread has copied, in place, before the barrier.
// -------------------------------------------------------------------------------------------------
EXPORT(ATTENTION_THREADS, 128);                           // four warps: wgmma is an instruction of four
EXPORT(ATTENTION_ROWS, HEAD_DIM <= 128 ? 128 : 64);       // of a thread block: acc must fit the registers
constexpr int PARTS = HEAD_DIM / 8;                       // 16-byte parts of a row of q, K or V, as bf16
constexpr int SMALL_TILE = HEAD_DIM <= 64 ? 64 : HEAD_DIM <= 128 ? 32 : 16;    // keys: 8 KB of bf16 at most
constexpr int SMALL_BYTES = 48 << 10;                     // of shared memory that need no asking for
constexpr bool WGMMA = HAS_WGMMA && (HEAD_DIM == 64 || HEAD_DIM == 128);
constexpr int PREFILL_TILE = WGMMA ? 64 : SMALL_TILE;     // keys
constexpr int PREFILL_BYTES = PREFILL_TILE > SMALL_TILE ? 80 << 10 : SMALL_BYTES;
EXPORT(paged_attention_shared_bytes, PREFILL_BYTES);
constexpr int MIN_SPLIT = 256;                            // keys of a split, at least: merging costs time
constexpr float MOST_SUM = 0x1p32f;                       // of a lane and row in a tile: beyond, m is raised
constexpr int MOST_COUNTERS = 1024;                       // A * K, if there are splits

// Where part `part` of row `row` lies in a tile of ROWS rows. ldmatrix reads one part of eight rows
// at a time, and the eight should lie in different banks. Rows with an odd number of parts do, so
// rows are padded to an odd number; or, with 8, 16, ... parts, part p of row r changes places with
// part p xor r % 8. Then the first eight parts of all ROWS come before the next eight
// parts: wgmma wants rows of 128 bytes. In both layouts row r + 8 starts 8 * STRIDE parts after row
// r, so multiples of 8 rows can be added to an address afterwards.
template <int ROWS, int PARTS> struct TileLayout {
    static constexpr int PADDED = PARTS % 8 == 0 ? PARTS : PARTS | 1;    // parts that a row takes
    static constexpr int STRIDE = PARTS % 8 == 0 ? 8 : PADDED;           // parts from a row to the next
    __device__ static unsigned place(unsigned row, unsigned part) {
        return PARTS % 8 == 0 ? part / 8 * 8 * ROWS + row * 8 + (part % 8 ^ row % 8) : row * STRIDE + part;
    }
};

__device__ unsigned arrived[MOST_COUNTERS];    // splits that have ended, of a kv head and row tile; then 0

struct AttentionWork {    // the kernel's arguments, and the thread block's part of the work
    bf16* out;
    const bf16* qkv;
    const kv* k_cache;
    const kv* v_cache;
    const int* block_tables;
    const int* cu_blocks;
    const int* cu_seqlens;
    const int* context_lens;
    const int* tiles;
    float* partial;
    int sequence = tiles[2 * blockIdx.y];
    unsigned first_row = tiles[2 * blockIdx.y + 1];           // of the sequence's rows
    unsigned first_token = cu_seqlens[sequence];
    int queries = cu_seqlens[sequence + 1] - cu_seqlens[sequence];
    unsigned rows = min(queries * GROUP - int(first_row), ATTENTION_ROWS);
    int first_seen = context_lens[sequence] - queries + 1;    // keys that the query of first_token sees
    const int* block_table = block_tables + cu_blocks[sequence];
};

template <bool FEW>            // whether the rows are 16 at most
struct AttentionBlock : AttentionWork {
    static constexpr bool TOGETHER = WGMMA && !FEW;                     // four warps multiply together
    static constexpr int ROW_TILES = FEW ? 1 : ATTENTION_ROWS / 64;     // a warp's, of 16 rows each, 64 apart
    static constexpr int LANE_ROWS = 2 * ROW_TILES;                     // rows of which a lane has numbers
    static constexpr unsigned Q_ROWS = FEW ? 16 : ATTENTION_ROWS;
    static constexpr bool CODES = FP8_CACHE && FEW;                     // whether the ring holds codes
    static constexpr bool EXPANDS = FP8_CACHE && !FEW;                  // whether codes become bf16 there
    static constexpr int FEW_TILE = CODES ? 2 * SMALL_TILE : SMALL_TILE;
    static constexpr int KEY_TILE = FEW ? FEW_TILE : PREFILL_TILE;      // keys
    static constexpr int SHARES = FEW_TILE < 64 ? FEW_TILE / 16 : 4;
    static constexpr int KEY_WARPS = FEW ? SHARES : 1;                  // warps that share out a tile's keys
    static constexpr unsigned KEYS = KEY_TILE / KEY_WARPS;              // a warp's, of each tile
    static constexpr unsigned BYTES = FEW ? SMALL_BYTES : PREFILL_BYTES;
    using Queries = TileLayout<Q_ROWS, PARTS>;
    using Tile = TileLayout<KEY_TILE, CODES ? KV_PARTS : PARTS>;    // of K or V
    static constexpr unsigned STAGE = KEY_TILE * Tile::PADDED;          // parts
    static constexpr unsigned FITTING = (BYTES / 16 - Q_ROWS * Queries::PADDED) / STAGE;
    static constexpr unsigned STAGES = FITTING < 5 ? FITTING : 5;       // of the ring
    static_assert(STAGES >= 2, "while one stage is multiplied, another is filled");
    static constexpr int PAIRS = HEAD_DIM / 2 + 1;                      // of a record, see merge()
    static_assert(!FEW || 8 * Q_ROWS * KEY_WARPS * PAIRS <= BYTES, "the warps' records must fit");
    // To copy K and V, LANES threads share a key, so the thread block copies STEP keys at once. All
    // of these numbers, B included, are powers of 2.
    static constexpr unsigned LANES = KV_PARTS <= 4 ? 4 : KV_PARTS <= 8 ? 8 : 16;
    static constexpr unsigned STEP = ATTENTION_THREADS / LANES;

    using Pages = unsigned[KEY_TILE / STEP];      // of the keys of a tile that a thread copies
    using RowSums = float[LANE_ROWS];             // m or l; l of the lane's own columns, until the end
    using Acc = float[ROW_TILES][PARTS][4];       // fragments of acc
    using Scores = float[ROW_TILES][KEYS / 8][4];
    using Probabilities = unsigned[KEYS / 16][ROW_TILES][4];    // as bf16: the left factor of p @ V

    Bf16x8* memory;                               // shared: q, then the ring
    Bf16x8* ring = memory + Q_ROWS * Queries::PADDED;    // wgmma: q and stages are multiples of 1,024 bytes
    unsigned kv_head = blockIdx.x % NUM_KV_HEADS;
    unsigned split = blockIdx.x / NUM_KV_HEADS;
    unsigned splits = gridDim.x / NUM_KV_HEADS;
    unsigned lane = threadIdx.x % 32;
    unsigned warp = threadIdx.x / 32;
    unsigned warp_row = FEW ? 0 : warp * 16;             // the warp's first row
    unsigned warp_key = warp % KEY_WARPS * KEYS;         // and first key of each tile
    unsigned me = threadIdx.x % ATTENTION_THREADS;       // %: tells the compiler how many threads there are
    unsigned my_key = me / LANES;                        // the first that this thread copies, of each tile,
    unsigned my_part = me % LANES;                       // and which part: of 32 parts, also part + 16
    // A split's keys are whole tiles: only the last tile of all can be partial. There may be no
    // tile.
    unsigned end = max(visible(rows - 1), 0);            // keys that the last row sees
    unsigned all_tiles = (end + KEY_TILE - 1) / KEY_TILE;
    unsigned share = max((all_tiles + splits - 1) / splits, unsigned(MIN_SPLIT / KEY_TILE));
    unsigned used_splits = max((all_tiles + share - 1) / share, 1u);
    unsigned first_tile = split * share;
    unsigned last_tile = min(first_tile + share, all_tiles);    // past the last

    __device__ void run() const {
        if (split >= used_splits) return;
        copy_queries();
        Pages pages;
        look_up(pages, first_tile);
        #pragma unroll
        for (unsigned item = 0; item < STAGES - 1; ++item) load(pages, 2 * first_tile + item);
        RowSums m;
        RowSums l = {};
        Acc acc = {};
        for (float& x : m) x = LOWEST;
        for (unsigned tile = first_tile; tile < last_tile; ++tile) add_tile(tile, pages, m, l, acc);
        for (float& x : l) x = quad_sum(x);
        cp_async_wait<0>();
        __syncthreads();    // no copy is under way, and no warp still reads the ring: its memory is free
        write(m, l, acc);
        if (FEW) {
            __syncthreads();    // all warps' records are written before any thread reads them
            merge(KEY_WARPS, [&](unsigned row) { return warp_record(row, 0); }, used_splits == 1);
        }
        if (used_splits > 1) merge_splits();
    }

    // ---- Rows and keys ----
    __device__ size_t token_head(unsigned row) const {    // token * H + head
        const unsigned token = first_token + (first_row + row) / GROUP;
        return (size_t)token * NUM_HEADS + kv_head * GROUP + (first_row + row) % GROUP;
    }
    __device__ int visible(unsigned row) const {          // how many keys the row sees
        return first_seen + int((first_row + row) / GROUP);
    }
    __device__ unsigned row_of(int i) const {             // of the lane's row i
        return warp_row + i / 2 * 64 + i % 2 * 8 + lane / 4;
    }
    __device__ int keys_left(unsigned tile) const {       // from the first key on that this thread copies
        return int(end) - int(tile * KEY_TILE + my_key);
    }
    __device__ Bf16x8* q_at(int row, int part) const { return memory + Queries::place(row, part); }
    __device__ static float& at(Scores& s, int i, int n, int j) {    // row i, column 8n + 2t + j (see ptx.h)
        return s[i / 2][n][i % 2 * 2 + j];
    }

    // ---- Copies ----
    __device__ void copy_queries() const {    // part of the first group of copies. Rows past the last are 0
        for (unsigned item = threadIdx.x; item < Q_ROWS * PARTS; item += ATTENTION_THREADS) {
            const unsigned row = item / PARTS;
            const unsigned part = item % PARTS;
            const size_t i = token_head(min(row, rows - 1));
            const bf16* source = qkv + i / NUM_HEADS * QKV + i % NUM_HEADS * HEAD_DIM + 8 * part;
            cp_async_16(q_at(row, part), source, row < rows ? 16 : 0);
        }
    }

    // The pages of this thread's keys of a tile, a tile before they are copied.
    // Hazard: nothing at or past `end` is read, neither unused slots (garbage, possibly NaN) nor
    // unused entries of the block table (not even page numbers). In the stage such keys are 0: NaN
    // times a probability of 0 would be NaN.
    __device__ void look_up(Pages& pages, unsigned tile) const {
        const int* mine = block_table + (tile * KEY_TILE / BLOCK_SIZE + my_key / BLOCK_SIZE);
        #pragma unroll
        for (int i = 0; i < KEY_TILE / STEP; ++i)
            pages[i] = i * int(STEP) < keys_left(tile) ? mine[i * STEP / BLOCK_SIZE] : 0;
    }

    // Starts to copy an item of the ring: item 2t is K of tile t, item 2t + 1 is V.
    __device__ void load(Pages& pages, unsigned item) const {
        constexpr u64 PAGE_BYTES = sizeof(kv) * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM;
        constexpr unsigned PART = 16 / sizeof(kv);    // numbers
        const unsigned tile = item / 2;
        const unsigned offset = tile * KEY_TILE % BLOCK_SIZE + my_key % BLOCK_SIZE;    // of the first key
        // For speed, addresses are integers and are summed in this order: the compiler's own order
        // takes three instructions more for each copy.
        const u64 cache = reinterpret_cast<u64>(
            (item % 2 ? v_cache : k_cache) + ((kv_head * BLOCK_SIZE + offset) * HEAD_DIM + PART * my_part));
        #pragma unroll
        for (unsigned p = 0; p < KV_PARTS; p += LANES) {
            if (tile >= last_tile || my_part + p >= KV_PARTS) break;
            Bf16x8* stage = ring + item % STAGES * STAGE;
            #pragma unroll
            for (int i = 0; i < KEY_TILE / STEP; ++i) {
                const u64 page = pages[i] * PAGE_BYTES + cache;
                cp_async_16(stage + i * STEP * Tile::STRIDE + Tile::place(my_key, my_part + p),
                            reinterpret_cast<const kv*>(page) + i * STEP % BLOCK_SIZE * HEAD_DIM + PART * p,
                            i * int(STEP) < keys_left(tile) ? 16 : 0);
            }
        }
        cp_async_commit();    // a group of nothing counts too
        if (item % 2) look_up(pages, tile + 1);
    }

    // Converts the codes that this thread has copied, in place: 16 bytes of codes are parts p and
    // p + PARTS / 2 of the bf16, and were copied to the place of part p.
    __device__ void expand(unsigned item) const {
        Bf16x8* stage = ring + item % STAGES * STAGE;
        #pragma unroll
        for (unsigned p = my_part; p < KV_PARTS; p += LANES)
            #pragma unroll
            for (int i = 0; i < KEY_TILE / STEP; ++i) {
                Bf16x8* first = stage + i * STEP * Tile::STRIDE + Tile::place(my_key, p);
                Bf16x8* second = stage + i * STEP * Tile::STRIDE + Tile::place(my_key, p + PARTS / 2);
                const Words4 codes = *reinterpret_cast<const Words4*>(first);
                Words4 even;    // bytes
                Words4 odd;
                for (int j = 0; j < 4; ++j) {
                    even.w[j] = unpack_e4m3x2(codes.w[j] << 8);
                    odd.w[j] = unpack_e4m3x2(codes.w[j]);
                }
                *reinterpret_cast<Words4*>(first) = even;
                *reinterpret_cast<Words4*>(second) = odd;
            }
    }

    // Waits for the next item in turn. The barrier also carries a vote: returns whether any thread's vote is
    // true. again: whether the thread block has waited for this item before.
    __device__ bool wait(unsigned item, bool vote, bool again) const {
        cp_async_wait<STAGES - 2>();
        if constexpr (EXPANDS)
            if (!again) expand(item);
        if constexpr (TOGETHER) fence_async_proxy();    // each thread its own copies, before the barrier
        // All threads' copies have come, and no warp still reads the stage that is filled next.
        return __syncthreads_or(vote);
    }

    // After the wait for an item: starts to copy a later item, returns the warp's keys of this
    // item.
    __device__ const Bf16x8* take(Pages& pages, unsigned item) const {
        load(pages, item + STAGES - 1);
        return ring + item % STAGES * STAGE + warp_key * Tile::STRIDE;
    }

    // ---- A tile ----
    __device__ void add_tile(unsigned tile, Pages& pages, RowSums& m, RowSums& l, Acc& acc) const {
        wait(2 * tile, false, false);
        const Bf16x8* k_tile = take(pages, 2 * tile);
        Probabilities p = {};
        RowSums sum = {};
        bool raise = tile == first_tile;
        bool again = false;
        do {
            Scores s = {};
            multiply_keys(s, k_tile);
            mask(s, tile * KEY_TILE + warp_key);
            if (raise) raise_maximum(s, m, l, acc);
            const float largest = exponentiate(s, m, p, sum);
            // The barrier for V also carries the vote. If the tile is repeated, V has come already, and
            // wait() must not expand it twice.
            raise = wait(2 * tile + 1, largest > MOST_SUM, again);
            again = true;
        } while (raise);
        for (int i = 0; i < LANE_ROWS; ++i) l[i] += sum[i];
        const Bf16x8* v_tile = take(pages, 2 * tile + 1);
        const auto v_at = [=](int row, int part) { return v_tile + Tile::place(row, part); };
        const auto p_step = [&](int step) -> auto& { return p[step]; };
        if constexpr (TOGETHER) wgmma_shared<false, KEYS / 16>(acc, p, v_at);
        else if constexpr (CODES) mma_shared_e4m3<false, Tile::STRIDE, KEYS / 16>(acc, p_step, v_at);
        else mma_shared<false, Tile::STRIDE, KEYS / 16>(acc, p_step, v_at);
    }

    __device__ void multiply_keys(Scores& s, const Bf16x8* k_tile) const {    // s += q @ K^T
        const auto k_at = [=](int row, int part) { return k_tile + Tile::place(row, part); };
        if constexpr (TOGETHER) {
            wgmma_shared<true, PARTS / 2>(s, [=](int row, int part) { return q_at(row, part); }, k_at);
        } else {
            // For speed, q comes from shared memory each time: fragments that were loaded once lost
            // their registers to p (ptxas 13.0). The array has room for all steps, since the
            // simulator asks for all of them before it multiplies.
            unsigned q[PARTS / 2][ROW_TILES][4];
            const auto load_q = [&](int step) -> auto& {
                #pragma unroll
                for (int r = 0; r < ROW_TILES; ++r)
                    load_shared(q[step][r], [=](int row, int part) {
                        const int q_part = CODES ? step + part * PARTS / 2 : 2 * step + part;
                        return q_at(warp_row + 64 * r + row, q_part);
                    });
                return q[step];
            };
            if constexpr (CODES) mma_shared_e4m3<true, Tile::STRIDE, PARTS / 2>(s, load_q, k_at);
            else mma_shared<true, Tile::STRIDE, PARTS / 2>(s, load_q, k_at);
        }
    }

    __device__ void mask(Scores& s, int start) const {    // start: the warp's first key
        if (start + int(KEYS) <= visible(warp_row)) return;    // even the first row sees all these keys
        #pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            const int seen = visible(row_of(i)) - start - int(lane % 4 * 2);
            #pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
                for (int j = 0; j < 2; ++j)
                    if (8 * n + j >= seen) at(s, i, n, j) = -INF;
        }
    }

    __device__ void raise_maximum(Scores& s, RowSums& m, RowSums& l, Acc& acc) const {
        #pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            float highest = m[i];
            for (int n = 0; n < KEYS / 8; ++n) highest = max(highest, max(at(s, i, n, 0), at(s, i, n, 1)));
            for (int k = 1; k < 4; k *= 2) highest = max(highest, __shfl_xor_sync(0xffffffff, highest, k));
            const float rescale = exp2_approx(m[i] - highest);
            m[i] = highest;
            l[i] *= rescale;
            #pragma unroll
            for (int d = 0; d < 2 * PARTS; ++d) acc[i / 2][d / 2][i % 2 * 2 + d % 2] *= rescale;
        }
    }

    // p = exp(s - m), and each row's sum over this lane's columns. Returns the largest sum.
    __device__ float exponentiate(Scores& s, const RowSums& m, Probabilities& p, RowSums& sum) const {
        float largest = 0;
        #pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            if (FEW && i > 0 && rows <= 8) break;    // in decode, there often are no rows past the eighth
            sum[i] = 0;
            #pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
                const float p0 = exp2_approx(at(s, i, n, 0) - m[i]);
                const float p1 = exp2_approx(at(s, i, n, 1) - m[i]);
                sum[i] += p0 + p1;
                p[n / 2][i / 2][n % 2 * 2 + i % 2] = pack_bf16x2(p0, p1);
            }
            largest = max(largest, sum[i]);
        }
        return largest;
    }

    // ---- Results ----
    // A record has PAIRS pairs of numbers, of a row and some of its keys: acc, then m and l. A row's records
    // are neighbours.
    __device__ Float2* partial_record(unsigned row, unsigned of_split) const {
        return reinterpret_cast<Float2*>(partial) + (token_head(row) * splits + of_split) * PAIRS;
    }
    __device__ Float2* warp_record(unsigned row, unsigned of_warp) const {    // where q and the ring were
        return reinterpret_cast<Float2*>(memory) + (row * KEY_WARPS + of_warp) * PAIRS;
    }
    __device__ unsigned* out_pairs(unsigned row) const {
        return reinterpret_cast<unsigned*>(out + token_head(row) * HEAD_DIM);
    }
    // out = acc / l. A query at p < 0 has seen no key: 0, not 0 / 0.
    __device__ static float inverse(float l) { return l > 0 ? 1 / l : 0; }

    // Of the rows whose numbers this lane has. The warps of few rows leave records, for merge().
    __device__ void write(const RowSums& m, const RowSums& l, const Acc& acc) const {
        const bool is_final = !FEW && used_splits == 1;
        #pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            const unsigned row = row_of(i);
            if (row >= rows || (FEW && warp >= KEY_WARPS)) continue;
            const float down = inverse(l[i]);
            unsigned* pairs = out_pairs(row);
            Float2* record = FEW ? warp_record(row, warp) : partial_record(row, split);
            for (int n = 0; n < PARTS; ++n) {
                const float x = acc[i / 2][n][i % 2 * 2];
                const float y = acc[i / 2][n][i % 2 * 2 + 1];
                if (is_final) pairs[4 * n + lane % 4] = pack_bf16x2(x * down, y * down);
                else record[4 * n + lane % 4] = {x, y};
            }
            if (!is_final) record[HEAD_DIM / 2] = {m[i], l[i]};
        }
    }

    // Adds up each row's records: `count`, from first_of(row) on. The sum is final, or this split's record.
    template <class FirstOf> __device__ void merge(unsigned count, FirstOf first_of, bool is_final) const {
        for (unsigned item = threadIdx.x; item < rows * HEAD_DIM / 2; item += ATTENTION_THREADS) {
            const unsigned row = item / (HEAD_DIM / 2);
            const unsigned d = item % (HEAD_DIM / 2);
            const Float2* first = first_of(row);
            float m = LOWEST;
            #pragma unroll 8
            for (unsigned i = 0; i < count; ++i) m = max(m, first[i * PAIRS + HEAD_DIM / 2].v[0]);
            float l = 0;
            float x = 0;
            float y = 0;
            #pragma unroll 8
            for (unsigned i = 0; i < count; ++i) {
                const Float2* record = first + i * PAIRS;
                const float weight = exp2_approx(record[HEAD_DIM / 2].v[0] - m);
                l += weight * record[HEAD_DIM / 2].v[1];
                x += weight * record[d].v[0];
                y += weight * record[d].v[1];
            }
            if (is_final) {
                out_pairs(row)[d] = pack_bf16x2(x * inverse(l), y * inverse(l));
            } else {
                partial_record(row, split)[d] = {x, y};
                if (d == 0) partial_record(row, split)[HEAD_DIM / 2] = {m, l};
            }
        }
    }

    // The last of the splits to end merges them all, in the same order whoever is last. atomicInc
    // wraps the counter around to 0, for the next launch.
    __device__ void merge_splits() const {
        unsigned* before = reinterpret_cast<unsigned*>(memory);
        unsigned* counter = &arrived[blockIdx.y * NUM_KV_HEADS + kv_head];
        __syncthreads();    // all records are written before thread 0 says so, and no warp reads `memory` now
        if (threadIdx.x == 0) *before = atomic_inc_acq_rel(counter, used_splits - 1);
        __syncthreads();    // all know who is last, and see all splits' records, before anyone reads them
        if (*before < used_splits - 1) return;
        merge(used_splits, [&](unsigned row) { return partial_record(row, 0); }, true);
    }
};

template <bool DECODE>    // whether no tile has more than 16 rows
__device__ inline void attend(const AttentionWork& work, Bf16x8* memory) {
    if (work.rows <= 16) AttentionBlock<true>{work, memory}.run();
    else if constexpr (!DECODE) AttentionBlock<false>{work, memory}.run();
}

// At head_dim 64 three thread blocks share a multiprocessor, not two: while some multiply, the
// third does its softmax. The third block's registers cost a spill of 8 bytes.
extern "C" __global__ __launch_bounds__(ATTENTION_THREADS, WGMMA && HEAD_DIM == 64 ? 3 : 2)
void paged_attention(
        bf16* out, const bf16* qkv, const kv* k_cache, const kv* v_cache, const int* block_tables,
        const int* cu_blocks, const int* cu_seqlens, const int* context_lens, const int* tiles,
        float* partial) {
    DYNAMIC_SHARED(PREFILL_BYTES);
    attend<false>({out, qkv, k_cache, v_cache, block_tables, cu_blocks, cu_seqlens, context_lens, tiles,
                   partial}, reinterpret_cast<Bf16x8*>(dynamic_shared));
}

// For a batch of single queries. With fewer registers than paged_attention, more thread blocks
// share a multiprocessor and keep more copies under way.
extern "C" __global__ __launch_bounds__(ATTENTION_THREADS, HEAD_DIM <= 128 ? 4 : 2) void decode_attention(
        bf16* out, const bf16* qkv, const kv* k_cache, const kv* v_cache, const int* block_tables,
        const int* cu_blocks, const int* cu_seqlens, const int* context_lens, const int* tiles,
        float* partial) {
    __shared__ Bf16x8 memory[SMALL_BYTES / 16];    // (dynamic, it would cost a register)
    attend<true>({out, qkv, k_cache, v_cache, block_tables, cu_blocks, cu_seqlens, context_lens, tiles,
                  partial}, memory);
}

// -------------------------------------------------------------------------------------------------
// silu_mul: out = silu(gate) * up, with silu(g) = g / (1 + exp(-g)), of normed gates and ups
//
//   out [T, F].
//   gate_up [T, 2F]: a token's gates, then its ups (one matrix product makes both).
//   x [T, D]: the residual stream before the norm; gate_up is x @ the folded matrix.
//   row_scales [2F]: with FP8 weights, of the matrix, as in rope_and_cache. Then codes [T, F] and scales [T]
//     are written (see quantize), and not out. Otherwise the three are null.
//   Grid (ceil(F / SILU_COLUMNS), T): a thread owns a few groups of eight columns of one token. (With FP8
//     weights a thread block owns a token, since it must find the token's greatest number.) Shared memory:
//     block_reduce's.
// -------------------------------------------------------------------------------------------------
EXPORT(SILU_THREADS, FP8_WEIGHTS ? threads_for(FFN, 512) : ROW_THREADS);
constexpr int SILU_GROUPS = FP8_WEIGHTS ? (FFN + 8 * SILU_THREADS - 1) / (8 * SILU_THREADS) : 2;
EXPORT(SILU_COLUMNS, 8 * SILU_THREADS * SILU_GROUPS);    // of a thread block; a group is eight columns

// exp(-g) is 2^(-g log2(e)). For a very negative g that is inf, and g / inf is right: 0.
__device__ inline float silu(float g) { return g / (1 + exp2_approx(-LOG2_E * g)); }

extern "C" __global__ __launch_bounds__(SILU_THREADS) void silu_mul(
        bf16* out, const bf16* gate_up, const bf16* x, u8* codes, float* scales, const float* row_scales) {
    const size_t token = blockIdx.y;
    const int first = blockIdx.x * SILU_COLUMNS + 8 * threadIdx.x;
    Bf16x8 gates[SILU_GROUPS];    // both arrays are on their way while the squares of x are summed
    Bf16x8 ups[SILU_GROUPS];
    for (int k = 0; k < SILU_GROUPS; ++k) {
        const int i = min(first + 8 * SILU_THREADS * k, FFN - 8);
        gates[k] = vec8(gate_up + token * 2 * FFN + i);
        ups[k] = vec8(gate_up + token * 2 * FFN + FFN + i);
    }
    const float factor = FP8_WEIGHTS ? normed_scale() : inverse_rms(x + token * HIDDEN);
    Float8 results[SILU_GROUPS];
    float greatest = 0;
    for (int k = 0; k < SILU_GROUPS; ++k) {
        const int i = first + 8 * SILU_THREADS * k;
        if (i >= FFN) break;
        Float8 gate = to_float(gates[k]);
        Float8 up = to_float(ups[k]);
        if constexpr (FP8_WEIGHTS) {
            gate = multiplied(gate, row_scales + i);
            up = multiplied(up, row_scales + FFN + i);
        }
        for (int j = 0; j < 8; ++j) {
            const float g = gate.v[j] * factor;
            gate.v[j] = silu(g) * (up.v[j] * factor);
        }
        if constexpr (FP8_WEIGHTS) {
            results[k] = gate;
            greatest = greatest_of(greatest, gate);
        } else {
            vec8(out + token * FFN + i) = to_bf16(gate);
        }
    }
    if constexpr (FP8_WEIGHTS) {
        const float scale = row_scale(greatest, scales, token);
        for (int k = 0; k < SILU_GROUPS; ++k) {
            const int i = first + 8 * SILU_THREADS * k;
            if (i < FFN) store_codes(codes + token * FFN + i, results[k], 1 / scale);
        }
    }
}

// -------------------------------------------------------------------------------------------------
// quantize: rows of a matrix as E4M3 codes, with a scale for each row: x[r, i] is about codes[r, i] scales[r]
//
// A row's codes depend on the row alone. The codes of NaN and of infinity are NaN's.
//   codes [R, columns], scales [R], x [R, columns]. columns: a multiple of 8.
//   Grid (R): a thread block owns one row. Shared memory: block_reduce's.
// -------------------------------------------------------------------------------------------------
extern "C" __global__ __launch_bounds__(ROW_THREADS) void quantize(
        u8* codes, float* scales, const bf16* x, int columns) {
    if constexpr (FP8_WEIGHTS) {
        const bf16* row = x + (size_t)blockIdx.x * columns;
        float greatest = 0;
        for (int i = 8 * threadIdx.x; i < columns; i += 8 * ROW_THREADS)
            greatest = greatest_of(greatest, to_float(vec8(row + i)));
        const float scale = row_scale(greatest, scales, blockIdx.x);
        for (int i = 8 * threadIdx.x; i < columns; i += 8 * ROW_THREADS)
            store_codes(codes + (size_t)blockIdx.x * columns + i, to_float(vec8(row + i)), 1 / scale);
    }
}

// -------------------------------------------------------------------------------------------------
// add_residual: out = residual + product + bias, and codes of the normed sum, the next product's input
//
//   codes [T, D]: the sum, divided by rms and by normed_scale(). Null: none are wanted.
//   out [T, D], residual [T, D], bias [D]: null, each, for none. out may be residual or product.
//   product [T, D]: of codes, to be multiplied by row_scales [D] and token_scales [T]. Null for none.
//   Grid (T): a thread block owns one token, a thread ADD_GROUPS groups of eight columns. Shared memory:
//     block_reduce's.
// -------------------------------------------------------------------------------------------------
EXPORT(ADD_THREADS, threads_for(HIDDEN, 512));
constexpr int ADD_GROUPS = (HIDDEN + 8 * ADD_THREADS - 1) / (8 * ADD_THREADS);    // a thread's
extern "C" __global__ __launch_bounds__(ADD_THREADS) void add_residual(
        u8* codes, bf16* out, const bf16* residual, const bf16* product, const float* row_scales,
        const float* token_scales, const bf16* bias) {
    if constexpr (FP8_WEIGHTS) {
        const size_t first = (size_t)blockIdx.x * HIDDEN;
        Float8 sums[ADD_GROUPS];
        float squares = 0;
        for (int k = 0; k < ADD_GROUPS; ++k) {
            const int i = 8 * (threadIdx.x + k * ADD_THREADS);
            if (i >= HIDDEN) break;
            Float8 sum = {};
            const auto add = [&](const bf16* p) {
                const Float8 more = to_float(vec8(p));
                for (int j = 0; j < 8; ++j) sum.v[j] += more.v[j];
            };
            if (product) {
                sum = multiplied(to_float(vec8(product + first + i)), row_scales + i);
                for (int j = 0; j < 8; ++j) sum.v[j] *= token_scales[blockIdx.x];
            }
            if (bias) add(bias + i);
            if (residual) add(residual + first + i);
            const Bf16x8 rounded = to_bf16(sum);
            if (out) vec8(out + first + i) = rounded;
            sums[k] = to_float(rounded);
            for (int j = 0; j < 8; ++j) squares += sums[k].v[j] * sums[k].v[j];
        }
        if (!codes) return;
        const float factor = rsqrtf(block_reduce(squares, Sum()) / HIDDEN + RMS_EPS) / normed_scale();
        for (int k = 0; k < ADD_GROUPS; ++k) {
            const int i = 8 * (threadIdx.x + k * ADD_THREADS);
            if (i < HIDDEN) store_codes(codes + first + i, sums[k], factor);
        }
    }
}

// -------------------------------------------------------------------------------------------------
// scale_logits: the head's product of codes, multiplied by the scales
//
//   logits [R, columns], row_scales [columns], token_scales [R]. columns: a multiple of 8.
//   Grid (ceil(columns / SCALE_COLUMNS), R): a thread owns eight columns of one row.
// -------------------------------------------------------------------------------------------------
EXPORT(SCALE_COLUMNS, 8 * ROW_THREADS);
extern "C" __global__ __launch_bounds__(ROW_THREADS) void scale_logits(
        bf16* logits, const float* row_scales, const float* token_scales, int columns) {
    const int i = SCALE_COLUMNS * blockIdx.x + 8 * threadIdx.x;
    if (i >= columns) return;
    bf16* mine = logits + (size_t)blockIdx.y * columns + i;
    Float8 x = multiplied(to_float(vec8(mine)), row_scales + i);
    for (int j = 0; j < 8; ++j) x.v[j] *= token_scales[blockIdx.y];
    vec8(mine) = to_bf16(x);
}

// -------------------------------------------------------------------------------------------------
// rms_norm: out[r] = x / rms(x) * weight, with x = residual[rows[r]]
//
// Before the head, which is large: only the sampled rows go through it.
//   out [R, D], residual [T, D], rows [R], weight [D].
//   Grid (R): a thread block owns one row, a thread every 256th group of eight columns. Shared
//     memory: block_reduce's.
// -------------------------------------------------------------------------------------------------
extern "C" __global__ __launch_bounds__(ROW_THREADS) void rms_norm(
        bf16* out, const bf16* residual, const int* rows, const bf16* weight) {
    const bf16* x = residual + (size_t)rows[blockIdx.x] * HIDDEN;
    bf16* target = out + (size_t)blockIdx.x * HIDDEN;
    const float factor = inverse_rms(x);
    for (int i = 8 * threadIdx.x; i < HIDDEN; i += 8 * ROW_THREADS) {
        Float8 mine = to_float(vec8(x + i));
        const Float8 w = to_float(vec8(weight + i));
        for (int j = 0; j < 8; ++j) mine.v[j] *= factor * w.v[j];
        vec8(target + i) = to_bf16(mine);
    }
}

// -------------------------------------------------------------------------------------------------
// sample: the next token of each sequence, and the token's log-probability
//
// First the logits of a few tokens change, see change(). Greedy where the temperature is 0. Elsewhere:
// drop the tokens with less than min_p times the greatest probability; of the others keep the top k
// logits; of these keep the most probable that together reach probability top_p; draw a kept token
// with probability proportional to exp(logit / temperature).
//
// A changed logit is a float32: bf16 numbers near 20 are 0.125 apart, and a penalty of 0.05 would be
// lost. So the changed logit stands in the token's entry of a list, and the row has -inf there, which
// is never drawn. Each pass goes over the row, then over the entries. At the end the row gets its own
// logits back: best_logprobs reads them.
//
// A grammar bans most tokens, by a mask of one bit for each token. A banned token has the logit -inf in
// all passes but the first, softmax_of's: reported log-probabilities know no grammar.
//
// To keep the top of 128,256 logits looks like sorting. But a bf16 logit has 16 bits, so only
// 65,536 values are possible, and top-k and top-p need just one value: the lowest that is still
// kept. cutoff() finds the value in two passes over the row. A histogram over the upper 8 bits
// tells in which of 256 bins the running sum, from the top down, reaches the target. A histogram
// over the lower 8 bits, of that bin's logits only, tells at which value. (A changed logit has 32 bits:
// a row with entries takes four passes.) For top-k the sum counts logits; for top-p the sum adds
// probabilities. Nothing is approximate: equal logits are kept or dropped together (so top-k may keep
// more than k), and the value at which the sum reaches the target is kept.
//
// A draw needs no running sum either. Give every kept token an independent exponential random
// number E, and take the token with the least E / exp(logit / temperature): token t with
// probability exp(logit_t / temperature) / sum. (An "exponential race": the runner of rate r
// arrives first with probability r / sum of rates.) In logarithms, that is the token with the
// greatest logit / temperature - log E: an argmax like greedy's, with -log E, "Gumbel noise",
// added.
//
// Histograms are sums of integers (probabilities are multiples of 2^-40 of the most probable
// token's). No order of addition changes an integer sum: threads add as they come, and equal logits
// give equal bits.
//   token [R].   logits [R, V]: changed, and restored bit for bit.
//   logprob [R]: log-softmax of the logits as given, before changes, temperature and cuts. NaN, with any
//     token, for a row with a NaN, a +inf, or nothing above -inf.
//   temperature [R].   top_k [R]: off if <= 0 or >= V.   top_p [R]: off if >= 1.   min_p [R]: off if 0.
//   seed [R].   position [R]: of the new token in its text.
//   given [R]: -1, or the token to report without a choice (a prompt's own token).
//   penalties [R, 3]: presence, frequency, repetition.
//   lists, cu_entries [R + 1]: the numbers lists[cu_entries[r]] to lists[cu_entries[r + 1] - 1] are row
//     r's entries, three numbers each, see Entry. The kernel overwrites them.
//   mask_starts [R]: -1, or row r's mask begins at lists[mask_starts[r]]: token t is allowed if bit t % 32
//     of number t / 32 is 1.
//   newest [R]: -1, or the index in token_ids of a token of the text that row r's entries do not count.
//   token_ids [T]: the step's, after gather_rows. Hazard: in `sampled` the newest token of row r may be
//     overwritten already, by the thread block of another row.
//   Grid (R): a thread block owns one row, a thread every 1,024th group of eight logits.
//   Shared memory: Scratch (33 KB), and block_reduce's.
// -------------------------------------------------------------------------------------------------
EXPORT(SAMPLE_THREADS, 1024);
constexpr int BINS = 256;     // of a histogram over 8 bits
constexpr int COPIES = 16;    // of a histogram: logits crowd in few bins, and atomics on one address queue up
constexpr u64 GOLDEN = 0x9e3779b97f4a7c15;    // 2^64 / golden ratio: multiples of it keep far from each other
constexpr float BELOW_1 = 0x1.fffffep-1f;     // the greatest float below 1

// Maps floats to integers in the same order: bits grow with a positive float, and fall with a
// negative float; -0 equals +0.
__device__ inline unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);    // -0 + 0 is +0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// A candidate as one integer: the greater score wins, and of equal scores the lower token.
__device__ inline u64 candidate(float score, int token) {
    return (u64)ordered(score) << 32 | ~(unsigned)token;
}
__device__ inline int token_of(u64 candidate) { return ~(unsigned)candidate; }

// exp(-distance) as a multiple of 2^-40. A sum over 2^18 logits has 58 bits; each loses less than
// 2^-40 of the greatest mass.
__device__ inline u64 mass(float distance) { return (u64)(exp2_approx(-LOG2_E * distance) * 0x1p40f); }

// A random-looking number for each z, one to one. A multiplication carries differences upwards and
// a shift brings differences down again, so every bit of z moves every bit of the result. (The
// factors are random odd numbers, tested for this.)
__device__ inline u64 scramble(u64 z) {
    z = (z ^ z >> 32) * 0xdca4631cfa6051f5;
    z = (z ^ z >> 29) * 0x8de1134a212a3ef5;
    return z ^ z >> 32;
}

// log E of a token, with E an exponential random number.
// Hazard: an E near 0 wins the race, so E must be fine-grained there. -log(u) is not: of the floats
// u, one in 2^24 is 1, E is 0, and any token wins, however improbable. -log(1 - u) is: u has 64
// bits, and 0 is avoided. So is 1, to which the greatest u would be rounded: with an infinite E no
// token could win against a token with a logit of -inf.
__device__ inline float log_exponential(u64 stream, int token) {
    const float u = (scramble(stream + token * GOLDEN) | 1) * 0x1p-64f;
    return logf(-log1pf(-min(u, BELOW_1)));
}

// Calls body(token, logit) for every logit of the row, spread over the thread block.
template <class Body>
__device__ inline void for_each_logit(const bf16* logits, Body body) {
    // Hazard: V may be odd, so a row may start at any even address. Up to seven logits before the
    // first multiple of 16 bytes, and up to seven at the end, are read one at a time.
    const int head = min(VOCAB, (int)(8 - (size_t)logits / 2 % 8) % 8);
    const int tail = head + (VOCAB - head) / 8 * 8;
    const int first = threadIdx.x;
    const int last = tail + threadIdx.x;
    if (first < head) body(first, __bfloat162float(logits[first]));
    for (int token = head + 8 * threadIdx.x; token < tail; token += 8 * SAMPLE_THREADS) {
        const Float8 x = to_float(vec8(logits + token));
        for (int j = 0; j < 8; ++j) body(token + j, x.v[j]);
    }
    if (last < VOCAB) body(last, __bfloat162float(logits[last]));
}

// A token whose logit changes. The entries of a row have different tokens.
struct Entry {
    int token;                              // -1: the entry is empty
    union { int count; bf16 raw; };         // count and bias for change(), which puts the row's own
    union { float bias; float changed; };   // logit and the changed logit in their places
};

// The thread block's shared memory. (Declared inside cutoff(), each instance of the template would
// have its own.)
struct Scratch {
    Entry* entries;                // of the row. (Here, since threads have no registers left.)
    int num_entries;
    const int* mask;               // of the row; null: all tokens are allowed
    u64 histogram[BINS][COPIES];
    u64 remaining;                 // the target, less the sum of the bins above the found bin
    int found;                     // the bin in which the sum reaches the target

    __device__ bool bans(int token) const { return mask && !(mask[token / 32] >> token % 32 & 1); }
};

// Calls body(entry) for every entry that is not empty. A thread gets the same entries each time.
template <class Body>
__device__ inline void for_each_entry(const Scratch& shared, Body body) {
    #pragma unroll 1    // most rows have no entries
    for (int i = threadIdx.x; i < shared.num_entries; i += SAMPLE_THREADS)
        if (shared.entries[i].token >= 0) body(shared.entries[i]);
}

// Calls body(token, logit) for every logit of the row and every changed logit.
template <class Body>
__device__ inline void for_each_logit(const Scratch& shared, const bf16* row, Body body) {
    if (shared.mask) {
        #pragma unroll 1    // a loop apart, and a small one: most rows have no mask, and no register to spare
        for (int t = threadIdx.x; t < VOCAB; t += SAMPLE_THREADS)
            body(t, shared.bans(t) ? -INF : __bfloat162float(row[t]));
    } else {
        for_each_logit(row, body);
    }
    for_each_entry(shared, [&](const Entry& entry) { body(entry.token, entry.changed); });
}

// Computes the changed logits: the bias comes first, then the penalties (presence, frequency,
// repetition) by the count: how often the token stands in the answer; 0: in the prompt alone; -1: in
// neither. newest: -1, or a token to count. If no entry has that token, the last one gets it, which is
// empty. All threads of a thread block must call.
__device__ inline void change(const Scratch& shared, bf16* row, int newest, const float* penalties) {
    bool is_mine = false;
    for_each_entry(shared, [&](Entry& entry) {
        if (entry.token != newest) return;
        entry.count = max(entry.count, 0) + 1;
        is_mine = true;
    });
    const bool has_entry = __syncthreads_or(is_mine);
    const int last = shared.num_entries - 1;
    if (newest >= 0 && !has_entry && threadIdx.x == last % SAMPLE_THREADS)    // the thread that visits `last`
        shared.entries[last] = {newest, {1}, {0}};
    for_each_entry(shared, [&](Entry& entry) {
        bf16& logit = row[entry.token];
        float x = __bfloat162float(logit) + entry.bias;
        if (entry.count >= 0) x = x > 0 ? x / penalties[2] : x * penalties[2];
        if (entry.count > 0) x = x - penalties[1] * entry.count - penalties[0];
        entry.raw = logit;
        x = min(x, -LOWEST);    // x / 1e-40 is inf, and inf - inf would be NaN
        entry.changed = shared.bans(entry.token) ? -INF : x;
        logit = __float2bfloat16(-INF);
    });
    __syncthreads();    // all logits are changed before any thread reads another's
}

// The greatest key such that the weights of all logits with this key or a greater key add up to the
// target or more. Logits with keys below `lowest` weigh nothing. get_target(sum of all weights) is
// 1 to that sum.
template <class Weight, class Target>
__device__ inline unsigned cutoff(
        Scratch& shared, const bf16* row, unsigned lowest, Weight weight, Target get_target) {
    const int bin = threadIdx.x;    // where 256 threads own one bin each
    const int last_shift = shared.num_entries > 0 ? 0 : 16;    // a bf16 has no lower 16 bits
    unsigned prefix = 0;            // the key's upper bits, as far as they are known
    u64 target = 0;
    for (int shift = 24; shift >= last_shift; shift -= 8) {
        for (int i = threadIdx.x; i < BINS * COPIES; i += SAMPLE_THREADS)
            shared.histogram[i / COPIES][i % COPIES] = 0;
        __syncthreads();    // all bins are zero before the first is added to
        for_each_logit(shared, row, [&](int, float logit) {
            const unsigned key = ordered(logit);
            const unsigned upper = key >> shift;
            if (key >= lowest && upper >> 8 == prefix)    // an integer sum: the same in any order
                atomicAdd(&shared.histogram[upper & (BINS - 1)][threadIdx.x % COPIES], weight(logit));
        });
        __syncthreads();    // all weights are added before the bins are read
        if (bin < BINS)
            for (int c = 1; c < COPIES; ++c) shared.histogram[bin][0] += shared.histogram[bin][c];
        __syncthreads();    // all bins are folded before any thread looks at another's
        if (bin < BINS) {
            u64 above = 0;
            u64 total = 0;
            for (int b = 0; b < BINS; ++b) {    // all read the same bin: different bins queue up at one bank
                const u64 sum = shared.histogram[b][0];
                total += sum;
                if (b > bin) above += sum;
            }
            if (shift == 24) target = get_target(total);
            if (above < target && target <= above + shared.histogram[bin][0]) {    // true for one bin
                shared.found = bin;
                shared.remaining = target - above;
            }
        }
        __syncthreads();    // `found` is written before all read it, and bins are read before they are zeroed
        prefix = prefix << 8 | shared.found;
        target = shared.remaining;
    }
    return prefix << last_shift;
}

// The lowest key that min_p, top_k and top_p keep. highest: the greatest logit that this thread has
// seen; greatest: the row's.
__device__ inline unsigned lowest_kept(
        Scratch& scratch, const bf16* row, float highest, float greatest, float tau, const float* min_p,
        const int* top_k, const float* top_p) {    // (pointers: values would take registers from the start)
    // exp((logit - greatest) / tau) must be min_p or more. The logarithm of 0 is -inf: all are kept.
    unsigned lowest = ordered(greatest + tau * logf(*min_p));
    if (0 < *top_k && *top_k < VOCAB) {
        // The least of all threads' greatest logits has as many logits at or above it as there are
        // threads. So the k-th greatest logit is not below it; most logits are, and need not be
        // counted.
        if (*top_k <= SAMPLE_THREADS) lowest = max(lowest, ~block_reduce(~ordered(highest), Max()));
        lowest = cutoff(scratch, row, lowest, [](float) { return (u64)1; }, [&](u64 total) {
            return min((u64)*top_k, total);    // min_p may leave less than k
        });
    }
    if (*top_p < 1) {
        // Hazard: divide, do not multiply by 1 / tau, which may be inf: the greatest logit would
        // get 0 * inf = NaN.
        const auto weight = [&](float logit) { return mass((greatest - logit) / tau); };
        // A part of the mass that is left. In double: float has 24 bits, the sum up to 58. At
        // least 1: top_p = 0 keeps the most probable token.
        lowest = cutoff(scratch, row, lowest, weight, [&](u64 total) {
            return max((u64)1, (u64)ceil(*top_p * (double)total));
        });
    }
    return lowest;
}

// The softmax of a row: exp(logit - greatest) / denominator.
struct Softmax {
    float highest;        // the greatest logit that this thread has seen; -inf if none is above -inf
    u64 best;             // the greatest logit of the row, as a candidate
    float greatest;       // ... as a number: the zero point of all exponents, so that none overflows
    float denominator;    // NaN for a row with no softmax: with a NaN, a +inf, or nothing above -inf
    __device__ float log_of(float logit) const { return logit - greatest - logf(denominator); }
};

// All threads of a thread block must call. In one pass, as in attention: the denominator's share of a
// thread is relative to the greatest logit that the thread has seen.
__device__ inline Softmax softmax_of(const bf16* row) {
    float highest = -INF;
    float sum = 0;
    int at = 0;
    for_each_logit(row, [&](int t, float logit) {
        if (logit > highest) {
            sum = sum * exp2_approx(LOG2_E * (highest - logit)) + 1;
            highest = logit;
            at = t;
        } else if (logit != -INF) {    // -inf - -inf would be NaN
            // Here a NaN, or a second +inf, makes the sum NaN.
            sum += exp2_approx(LOG2_E * (logit - highest));
        }
    });
    const u64 best = block_reduce(candidate(highest, at), Max());
    const float greatest = __bfloat162float(row[token_of(best)]);
    // inf - inf: with a single +inf, or -inf alone, NaN gets into the sum here.
    const float share = sum * exp2_approx(LOG2_E * (highest - greatest));
    return {highest, best, greatest, block_reduce(share, Sum())};
}

// The same of the changed logits, without a denominator. Entries come in any order, so the first of a
// thread's equal logits need not be the lowest token's: all are compared as candidates.
__device__ inline Softmax best_changed(const Scratch& shared, const bf16* row) {
    Softmax changed = {-INF};
    for_each_logit(shared, row, [&](int t, float logit) {
        changed.highest = max(changed.highest, logit);
        changed.best = max(changed.best, candidate(logit, t));
    });
    changed.greatest = block_reduce(changed.highest, Max());
    changed.best = block_reduce(changed.best, Max());
    return changed;
}

extern "C" __global__ __launch_bounds__(SAMPLE_THREADS, 2) void sample(
        int* token, float* logprob, bf16* logits, const float* temperature, const int* top_k,
        const float* top_p, const float* min_p, const u64* seed, const int* position, const int* given,
        const float* penalties, int* lists, const int* cu_entries, const int* newest, const int* token_ids,
        const int* mask_starts) {
    __shared__ Scratch scratch;
    const int s = blockIdx.x;
    bf16* row = logits + (size_t)s * VOCAB;
    if (threadIdx.x == 0) {    // softmax_of() has a barrier before the others read these three
        scratch.entries = reinterpret_cast<Entry*>(lists + cu_entries[s]);
        scratch.num_entries = (cu_entries[s + 1] - cu_entries[s]) / 3;
        scratch.mask = mask_starts[s] < 0 ? nullptr : lists + mask_starts[s];
    }

    // 1. The softmax of the logits as given: what is reported.
    const Softmax softmax = softmax_of(row);

    // 2. The changed logits, and the greatest of all: greedy's choice. (No thread reads the raw row after
    // softmax_of()'s last barrier.) Entries, tau, cuts and softmax are the thread block's: all meet each
    // barrier, or none.
    Softmax changed = softmax;
    if (scratch.num_entries > 0)
        change(scratch, row, newest[s] < 0 ? -1 : token_ids[newest[s]], penalties + 3 * s);
    if (scratch.num_entries > 0 || scratch.mask) changed = best_changed(scratch, row);
    const bool is_given = given[s] >= 0;
    const float tau = temperature[s];
    int chosen = is_given ? given[s] : token_of(changed.best);
    // A NaN is no denominator: then nothing can be drawn. Nor where all tokens are banned.
    if (!is_given && tau > 0 && softmax.denominator > 0 && changed.greatest > -INF) {
        // 3. The cuts.
        const unsigned lowest = lowest_kept(
            scratch, row, changed.highest, changed.greatest, tau, min_p + s, top_k + s, top_p + s);
        // 4. The race. The noise depends on the request's seed, the position and the token alone.
        const u64 stream = scramble(scramble(seed[s] + GOLDEN) + position[s]);
        u64 best = candidate(-INF, chosen);    // a start: the greatest logit's score is finite, and above
        for_each_logit(scratch, row, [&](int t, float logit) {
            if (ordered(logit) < lowest) return;
            best = max(best, candidate((logit - changed.greatest) / tau - log_exponential(stream, t), t));
        });
        best = block_reduce(best, Max());
        chosen = token_of(best);
    }

    // 5. The row as it was. (A block_reduce came after each pass: all threads are done with the row.)
    for_each_entry(scratch, [&](const Entry& entry) { row[entry.token] = entry.raw; });
    if (scratch.num_entries > 0) __syncthreads();    // all is restored before thread 0 reads a logit
    if (threadIdx.x == 0) {
        token[s] = chosen;
        logprob[s] = softmax.log_of(__bfloat162float(row[chosen]));
    }
}

// -------------------------------------------------------------------------------------------------
// best_logprobs: the most probable tokens of each sequence, in order, and their log-probabilities
//
// Each thread has a candidate: the best of its own logits that are not yet chosen. In each round the
// best of all candidates is chosen, and the thread that loses its candidate looks for its next.
//   tokens, logprobs [R, count].   logits [R, V].   count: at most V.
//   Grid (R): as for sample. Shared memory: block_reduce's.
// -------------------------------------------------------------------------------------------------
__device__ inline u64 best_below(const bf16* row, u64 limit) {    // of this thread's candidates; 0: none
    u64 best = 0;
    for_each_logit(row, [&](int t, float logit) {
        const u64 mine = candidate(logit, t);
        if (mine < limit) best = max(best, mine);
    });
    return best;
}

extern "C" __global__ __launch_bounds__(SAMPLE_THREADS) void best_logprobs(
        int* tokens, float* logprobs, const bf16* logits, int count) {
    const bf16* row = logits + (size_t)blockIdx.x * VOCAB;
    const Softmax softmax = softmax_of(row);
    u64 mine = best_below(row, ~(u64)0);
    for (int i = 0; i < count; ++i) {
        const u64 best = block_reduce(mine, Max());
        if (threadIdx.x == 0) {
            const size_t place = (size_t)blockIdx.x * count + i;
            tokens[place] = token_of(best);
            logprobs[place] = softmax.log_of(__bfloat162float(row[token_of(best)]));
        }
        if (mine == best) mine = best_below(row, best);    // no candidate is another thread's
    }
}

// -------------------------------------------------------------------------------------------------
// all_reduce, all_gather: with several GPUs, the numbers of all ranks (a rank: a process and its GPU)
//
// Every rank calls the same kernels, in the same order, with the same sizes and grids. A thread sends
// its words to all ranks, and waits for the words of all ranks.
//
// An inbox is memory of one rank that all ranks write to. Its words have 8 bytes: two bf16, and the
// number of the call. One store brings both, so a reader that finds the number of its own call has
// the two bf16, too: no order of stores matters. Sums are in the order of ranks, so all ranks get the
// same bits.
//
// A piece is EXCHANGE_THREADS words, one for each thread. Each piece counts its own calls. All threads
// send a word, also beyond the last number. So a place of an inbox changes in every call of its
// piece, and there is no old number that could be taken for a new one, not even after 2^32 calls.
//
// Two buffers, used in turn, are enough. In call e of a piece, a rank writes where the words of call
// e - 2 were. The rank's call e - 1 has ended, so every other rank had begun call e - 1, and had
// ended call e - 2 and its reading. Hazard: no launch may begin before the kernel in front of it has
// ended, so programmatic dependent launch must stay off for these kernels.
//
// A rank that has died sends nothing. The others stop waiting when their own CPU says so in the word
// `stop`: their results are then wrong, and their host raises an error instead of using the results
// (Channel.check in communicator.py). After STOP_SECONDS a rank gives up by itself, with an error of
// its GPU: no rank could tell its wrong results from right ones.
//   addresses [ranks + 1]: of each rank's inbox [2 buffers, ranks, capacity], at first 0; of `stop`.
//   capacity: words, a multiple of EXCHANGE_THREADS, n / 2 or more.
//   calls [capacity / EXCHANGE_THREADS]: the calls of each piece so far, modulo 2^32.
//   Grid (any number of thread blocks that run at once): a thread block has every gridDim-th piece.
// -------------------------------------------------------------------------------------------------
EXPORT(EXCHANGE_THREADS, 512);
EXPORT(EXCHANGE_BLOCKS, 2);    // that run at once on every multiprocessor: each card runs 1,024 threads
constexpr u64 STOP_SECONDS = 20;    // far longer than any rank can be late
constexpr u64 STOP_PAUSE = 10 * 1000 * 1000;    // nanoseconds between two looks at `stop`

// A thread's wait for a word of another rank. `stop` lies in the CPU's memory, far away. Hazard: if all
// waiting threads looked at `stop` often, they would be late with their next words, the threads of
// other ranks would wait for the words and look at `stop`, too, and so on. So a thread looks only after
// a wait that no rank causes in a good run.
struct Patience {
    const u64* stop_address;    // where the address of `stop` lies
    bool& has_stopped;          // true: the wait is over
    unsigned looks = 0;
    u64 start = 0;
    u64 last_look = 0;          // at `stop`
    __device__ void relax() {   // between two looks at the word
        relax_for_others();
        if (++looks % 1024 != 0) return;
        const u64 now = nanoseconds();
        if (start == 0) start = last_look = now;
        if (now - start > STOP_SECONDS * 1000000000) __trap();
        if (now - last_look < STOP_PAUSE) return;
        last_look = now;
        has_stopped = load_word_system(reinterpret_cast<const u64*>(*stop_address)) != 0;
    }
};

struct Received {    // the words of all ranks at one place of their pieces
    const u64* first;
    int capacity;
    unsigned call;
    const u64* stop_address;
    bool& has_stopped;
    __device__ unsigned from(int sender) const {
        const u64* p = first + (size_t)sender * capacity;
        u64 word = load_word_system(p);
        Patience patience = {stop_address, has_stopped};
        while (word >> 32 != call && !has_stopped) {
            patience.relax();
            word = load_word_system(p);
        }
        return (unsigned)word;
    }
};

// Sends the words send(i) of this thread to all ranks. Then calls receive(i, received) for each i. n:
// numbers, two in a word.
template <class Send, class Receive>
__device__ inline void exchange(
        int n, const u64* addresses, int rank, int ranks, int capacity, int* calls, Send send,
        Receive receive) {
    const int pieces = (n / 2 + EXCHANGE_THREADS - 1) / EXCHANGE_THREADS;
    const auto place = [&](int receiver, int sender, unsigned call, int i) {
        u64* inbox = reinterpret_cast<u64*>(addresses[receiver]);
        return inbox + ((size_t)(call % 2) * ranks + sender) * capacity + i;
    };
    for (int piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        const unsigned call = (unsigned)calls[piece] + 1;
        const int i = piece * EXCHANGE_THREADS + threadIdx.x;
        const u64 word = (u64)call << 32 | (2 * i < n ? send(i) : 0);
        for (int distance = 1; distance <= ranks; ++distance) {    // not all to the same rank at once
            const int receiver = (rank + distance) % ranks;
            store_word_system(place(receiver, rank, call, i), word);
        }
    }
    bool has_stopped = false;
    for (int piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        const unsigned call = (unsigned)calls[piece] + 1;
        const int i = piece * EXCHANGE_THREADS + threadIdx.x;
        receive(i, Received{place(rank, 0, call, i), capacity, call, addresses + ranks, has_stopped});
    }
    __syncthreads();    // all threads have read the numbers of calls
    for (int piece = blockIdx.x; piece < pieces; piece += gridDim.x)
        if (threadIdx.x == 0) calls[piece] = (int)((unsigned)calls[piece] + 1);
}

// x [n]: replaced by the sum over the ranks. n: even.
extern "C" __global__ __launch_bounds__(EXCHANGE_THREADS, EXCHANGE_BLOCKS) void all_reduce(
        bf16* x, int n, const u64* addresses, int rank, int ranks, int capacity, int* calls) {
    unsigned* words = reinterpret_cast<unsigned*>(x);
    const auto add = [&](int i, const Received& received) {
        float low = 0;
        float high = 0;
        for (int sender = 0; sender < ranks; ++sender) {
            const unsigned word = received.from(sender);
            low += __uint_as_float(word << 16);
            high += __uint_as_float(word & 0xffff0000);
        }
        if (2 * i < n) words[i] = pack_bf16x2(low, high);
    };
    exchange(n, addresses, rank, ranks, capacity, calls, [&](int i) { return words[i]; }, add);
}

// out [R, ranks, columns]: out[r, p] is row r of rank p's x [R, columns]. columns: even. The call is
// for the numbers first to first + n - 1 of x, both even.
extern "C" __global__ __launch_bounds__(EXCHANGE_THREADS, EXCHANGE_BLOCKS) void all_gather(
        bf16* out, const bf16* x, int columns, int first, int n, const u64* addresses, int rank, int ranks,
        int capacity, int* calls) {
    const unsigned* words = reinterpret_cast<const unsigned*>(x + first);
    const auto put = [&](int i, const Received& received) {
        const size_t row = (first + 2 * i) / columns;
        const int column = (first + 2 * i) % columns;
        for (int sender = 0; sender < ranks; ++sender) {
            bf16* target = out + (row * ranks + sender) * columns + column;
            const unsigned word = received.from(sender);
            if (2 * i < n) *reinterpret_cast<unsigned*>(target) = word;
        }
    };
    exchange(n, addresses, rank, ranks, capacity, calls, [&](int i) { return words[i]; }, put);
}
