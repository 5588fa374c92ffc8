// tiny-vLLM: the GPU kernels of the engine. (decode.cu has one more, which does a whole step of a few sequences.)
//
// A step of the engine is matrix products, which cuBLAS does, and between them these kernels, in the order in which a
// token meets them (the second to the fourth in every layer):
//
//     gather_rows       token id -> its row of the embedding table
//     rope_and_cache    rotate queries and keys by their position, put keys and values into the paged KV cache
//     paged_attention   each query looks at all the keys up to its own, wherever their pages lie;
//                       decode_attention does the same where each sequence brings one query
//     silu_mul          the gate of the feed-forward part
//     rms_norm          the last norm, in front of the head; a layer's two norms are in rope_and_cache and silu_mul
//     sample            logits -> the next token, on the GPU, so that 8 bytes a sequence go to the CPU and not V logits
//
// How to read it. Letters are sizes: T tokens in this step (a ragged batch: the new tokens of all sequences, one after
// the other, whether a sequence brings one token or a chunk of its prompt), S sequences, R rows to sample (sequences
// that get a token), D hidden, H query heads, K kv heads, G = H/K query heads that share a kv head, h head_dim, F ffn,
// V vocabulary, B tokens a page, N pages. Above each kernel stands its contract: the grid, what one block and one
// thread own, each pointer with its shape. No kernel knows whether it serves prefill or decode: positions, slots and
// lengths are data.
//
// Everything is stored as bfloat16 (the upper half of a float32) and computed in float32. The file is compiled for one
// model: the sizes below come in as -D macros, so that loops have constant bounds. The CPU simulator (simulator.h)
// compiles this very file.
//
// compile_kernels() in tinyvllm.py reads this text: `extern "C" __global__ __launch_bounds__(THREADS) void name(...)`
// declares a kernel, with THREADS a number or an EXPORTed constant, and parameters (or pointers to) bf16, float, int,
// long long, u64. EXPORT(NAME, value) at the beginning of a line is a constant that Python reads as kernels.NAME.

constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;                   // G
constexpr int QKV = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM;    // a token's row of qkv: its queries, keys, values
constexpr float INF = __builtin_bit_cast(float, 0x7f800000);      // NVRTC knows no INFINITY
constexpr float LOWEST = -3.4e38f;        // almost -INF; but LOWEST - LOWEST is 0, and not NaN
constexpr float LOG2_E = 1.44269504f;     // exp(x) = 2^(x log2(e)), and powers of 2 are what a GPU has

static_assert(HIDDEN % 8 == 0 && FFN % 8 == 0, "hidden and ffn sizes must be multiples of 8 (16 bytes)");
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM >= 32 && HEAD_DIM <= 256, "head_dim must be 32, 48, 64, ... or 256");
static_assert(NUM_HEADS % NUM_KV_HEADS == 0 && GROUP <= 16, "1 to 16 query heads must share each kv head");

// ---------------------------------------------------------------------------------------------------------------------
// Shared helpers: eight numbers at a time, and sums over a warp or a block
// ---------------------------------------------------------------------------------------------------------------------

// A GPU moves memory best in 16 bytes a thread: eight bf16, one load instruction. The address must be a multiple of 16.
struct alignas(16) Bf16x8 { bf16 v[8]; };    // as they lie in memory
struct Float8 { float v[8]; };               // as they are computed with, in registers
struct alignas(8) Float2 { float v[2]; };

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

struct Sum { template <class T> __device__ T operator()(T a, T b) const { return a + b; } };
struct Max { template <class T> __device__ T operator()(T a, T b) const { return a > b ? a : b; } };

// All 32 lanes of a warp get the result. In step k, lane i meets lane i xor 2^k: a butterfly, always in the same order.
template <class T, class Op>
__device__ inline T warp_reduce(T x, Op op) {
    for (int distance = 16; distance > 0; distance /= 2) x = op(x, __shfl_xor_sync(0xffffffff, x, distance));
    return x;
}

template <class T> __device__ inline T quad_sum(T x) {    // over lanes 4g .. 4g + 3, which share a row of an mma's result
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// All threads of a block get the result: a butterfly in each warp, then everyone folds the (at most 32) warps' results.
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

// ---------------------------------------------------------------------------------------------------------------------
// gather_rows: out[r] = table[rows[r]]
//
// The embedding lookup. A step is launched before the CPU has read the tokens that the one before sampled. Such a token is
// written ~i in rows: number i of these, still on the GPU.
//   out [T, D], table [V, D], rows [T], sampled [*]: by the step before; null if no row is negative.
//   Grid (T): one block copies one row, a thread 16 bytes of it at a time.
// ---------------------------------------------------------------------------------------------------------------------
EXPORT(GATHER_THREADS, 128);

extern "C" __global__ __launch_bounds__(GATHER_THREADS) void gather_rows(
        bf16* out, const bf16* table, const int* rows, const int* sampled) {
    const int row = rows[blockIdx.x];
    // 64 bits: a vocabulary of 256,000 rows of 16,384 is more than an int can count.
    const bf16* source = table + (size_t)(row < 0 ? sampled[~row] : row) * HIDDEN;
    bf16* target = out + (size_t)blockIdx.x * HIDDEN;
    for (int i = 8 * threadIdx.x; i < HIDDEN; i += 8 * GATHER_THREADS) vec8(target + i) = vec8(source + i);
}

// ---------------------------------------------------------------------------------------------------------------------
// rms_norm: out[r] = x / rms(x) * weight, with x = residual[rows[r]] and rms(x) = sqrt(mean(x^2) + eps)
//
// In front of the head, which is large: only the rows that are sampled go through it. The two norms of a layer need no
// kernel: their weight is in the matrix behind them already (see load_weights), and 1 / rms(x) is one factor for all of a
// token's products, so the kernel that takes these up computes it from x and applies it.
//   out [R, D], residual [T, D], rows [R], weight [D].
//   Grid (R): one block owns one row, a thread every 256th group of eight columns. Shared memory: block_reduce's.
// ---------------------------------------------------------------------------------------------------------------------
EXPORT(NORM_THREADS, 256);

// 1 / rms(x) of a row, for all threads of a block. Every thread must call it: it holds barriers.
__device__ inline float inverse_rms(const bf16* x) {
    float squares = 0;
    for (int i = 8 * threadIdx.x; i < HIDDEN; i += 8 * blockDim.x) {
        const Float8 mine = to_float(vec8(x + i));
        for (int j = 0; j < 8; ++j) squares += mine.v[j] * mine.v[j];
    }
    return rsqrtf(block_reduce(squares, Sum()) / HIDDEN + RMS_EPS);
}

extern "C" __global__ __launch_bounds__(NORM_THREADS) void rms_norm(
        bf16* out, const bf16* residual, const int* rows, const bf16* weight) {
    const bf16* x = residual + (size_t)rows[blockIdx.x] * HIDDEN;
    bf16* target = out + (size_t)blockIdx.x * HIDDEN;
    const float factor = inverse_rms(x);
    for (int i = 8 * threadIdx.x; i < HIDDEN; i += 8 * NORM_THREADS) {
        Float8 mine = to_float(vec8(x + i));
        const Float8 w = to_float(vec8(weight + i));
        for (int j = 0; j < 8; ++j) mine.v[j] *= factor * w.v[j];
        vec8(target + i) = to_bf16(mine);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// rope_and_cache: normalise q, k and v, rotate q and k by their position, put k and v into the cache
//
// RoPE turns each pair of a head's numbers (a, b) by an angle that grows with the position: (a cos - b sin, b cos + a
// sin). The dot product of a query and a key then depends on the distance of their positions alone.
// Hazard: which numbers are a pair? In Hugging Face checkpoints, i and i + h/2; in Meta's own files, 2i and 2i + 1.
// With the wrong choice text stays fluent for some twenty tokens and then decays, so nothing but a test will tell.
//   qkv [T, (H + 2K) h]: q is replaced; k and v are only read.   x [T, D]: what qkv is a product of, see rms_norm.
//   positions [T].   query_scale: every query is multiplied with this too, see paged_attention.
//   cos_sin [max_len, h]: of each position's h/2 angles, first the cosines, then the sines.
//   slot_mapping [T]: slot = page * B + offset in the page; negative for a padding token, for which nothing is written.
//   k_cache, v_cache [N, K, B, h]: within a page, the keys of one head are consecutive, as paged_attention reads them.
//   Grid (T): one block owns one token. A thread owns numbers i..i+7 and i+h/2..i+h/2+7 of a head, so eight whole
//   pairs: it reads both sides before it writes either, and no barrier is needed between the two. (h/2 must be a multiple
//   of 8: hence head_dim % 16 == 0.) Shared memory: block_reduce's.
// ---------------------------------------------------------------------------------------------------------------------
EXPORT(ROPE_THREADS, 256);

extern "C" __global__ __launch_bounds__(ROPE_THREADS) void rope_and_cache(
        bf16* qkv, const bf16* x, const float* cos_sin, const int* positions, const long long* slot_mapping,
        bf16* k_cache, bf16* v_cache, float query_scale) {
    constexpr int HALF = HEAD_DIM / 2, EIGHTS = HALF / 8;
    const int token = blockIdx.x;
    const long long slot = slot_mapping[token];
    const float* cos = cos_sin + (size_t)positions[token] * HEAD_DIM;
    const float* sin = cos + HALF;
    const float factor = inverse_rms(x + (size_t)token * HIDDEN);

    for (int item = threadIdx.x; item < QKV / 16; item += ROPE_THREADS) {
        const int head = item / EIGHTS, i = 8 * (item % EIGHTS);    // heads: first H of queries, K of keys, K of values
        bf16* target = qkv + (size_t)token * QKV + head * HEAD_DIM + i;
        Float8 a = to_float(vec8(target)), b = to_float(vec8(target + HALF));
        const bool turns = head < NUM_HEADS + NUM_KV_HEADS;    // values do not
        const float times = head < NUM_HEADS ? factor * query_scale : factor;
        for (int j = 0; j < 8; ++j) {
            const float c = turns ? cos[i + j] : 1, s = turns ? sin[i + j] : 0;
            const float a0 = a.v[j] * times, b0 = b.v[j] * times;
            a.v[j] = a0 * c - b0 * s;
            b.v[j] = b0 * c + a0 * s;
        }
        if (slot < 0) break;
        if (head >= NUM_HEADS) {
            bf16* cache = head < NUM_HEADS + NUM_KV_HEADS ? k_cache : v_cache;
            const int kv_head = (head - NUM_HEADS) % NUM_KV_HEADS;
            // 64 bits, as slot has them: page * K * B * h passes 2^31 in a cache of 4 GB.
            const long long page = slot / BLOCK_SIZE, offset = slot % BLOCK_SIZE;
            target = cache + ((page * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + offset) * HEAD_DIM + i;
        }
        vec8(target) = to_bf16(a);
        vec8(target + HALF) = to_bf16(b);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// paged_attention: out = softmax(q . k / sqrt(h)) v, over the keys at and before each query's position
//
// The queries that it gets are multiplied with log2(e) / sqrt(h) already, so exp(q . k / sqrt(h)) is 2^(q . k), and a power
// of 2 is one instruction. Below, exp is written for this power of 2.
// FlashAttention-2, with two twists.
// - Paged: key number t of a sequence lies in page block_table[t / B], at offset t % B. Only the copy to shared memory
//   knows this.
// - Grouped (GQA): query heads kv_head * G .. kv_head * G + G-1 share one kv head. Each pair (query, one of these) is a
//   row, number query * G + head % G, and all rows of a block share the keys that it reads.
// Online softmax: scores come tile by tile, and exp(s) might overflow, exp(s - m) not, if m is near the maximum. m stands in
// sum l and accumulator acc alike, so in the end it does not matter which. When it becomes m', what is there is rescaled:
//     l   = l   exp(m - m') + sum_j exp(s_j - m')
//     acc = acc exp(m - m') + sum_j exp(s_j - m') v_j            and at the end, out = acc / l
// FlashAttention-2 has m follow the maximum, from tile to tile. But to find a tile's maximum takes as long as its exps. So
// here m stays what it was in the first tile, until a lane's share of a sum passes 2^32: then the block does the tile again,
// with higher m's.
// Causal: the queries of a sequence are its last positions, so a query at position p sees keys 0..p, whether it is a
// decode token (p = context - 1) or belongs to a chunk from the middle of a prompt. At p < 0 (padding) there
// is no key, and out is 0.
//   out [T, H h].   qkv [T, (H + 2K) h]: the rotated q is read; this step's k and v are in the cache by now.
//   k_cache, v_cache [N, K, B, h]: of one layer.
//   block_tables [pages of all S], cu_blocks [S + 1]: the pages of sequence s, one for each B tokens, stand in
//   block_tables from number cu_blocks[s] on.
//   cu_seqlens [S + 1]: sequence s brings tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1 of the batch.
//   context_lens [S]: how many tokens it has by now, these included.
//   partial [T, H, splits, h + 2] float, or null with one split: a few decode tokens make too few blocks for a GPU,
//   however long their contexts. So the keys are dealt to `splits` blocks (flash-decoding), a run of tiles to each, or
//   to fewer if there are few. Each leaves acc, m and l here, and the last one to end merges them.
//   tiles [A, 2]: the work: a sequence, and the first of the rows of it that a block owns, ATTENTION_ROWS of them,
//   or as many as there are. What sees the most keys should come first.
//   Grid (K * splits, A); A * K is at most 1,024 if splits > 1. Blocks begin in this order, heads first: so the longest
//   tiles of all heads begin before any shorter one.
//
// Who owns what: of each 16 rows of scores and acc, lane i of a warp holds rows i / 4 and i / 4 + 8, and in these the
// columns 2 (i % 4), +1 of every eight (as mma leaves them; the next mma wants probabilities as a factor just there).
// - Prefill: of every 64 rows each warp owns 16. A block has twice 64, or once if head_dim > 128 (acc must fit the registers).
// - Few rows (16 at most, as in decode: one token has G): all warps have the same rows, and each its own 16 keys of a tile
//   (where head_dim makes tiles smaller, warps beyond repeat what others do). In the end warp 0 adds up what they found.
// Shared memory: q of the block's rows, and a ring of tiles, K, V, K, V, ...: while one is used, the next are on their way.
// ---------------------------------------------------------------------------------------------------------------------
EXPORT(ATTENTION_THREADS, 128);         // four warps, with 16 of every 64 rows each: wgmma wants just these, all at once
EXPORT(ATTENTION_ROWS, HEAD_DIM <= 128 ? 128 : 64);    // of a thread block
constexpr int PARTS = HEAD_DIM / 8;      // 16-byte parts of a row of q, K or V
constexpr int SMALL_TILE = HEAD_DIM <= 64 ? 64 : HEAD_DIM <= 128 ? 32 : 16;    // keys: at most 8 KB of K or V
constexpr int SMALL_BYTES = 48 << 10;    // of shared memory in all: what needs no asking for
constexpr bool WGMMA = HAS_WGMMA && (HEAD_DIM == 64 || HEAD_DIM == 128);
constexpr int PREFILL_TILE = WGMMA ? 64 : SMALL_TILE, PREFILL_BYTES = PREFILL_TILE > SMALL_TILE ? 80 << 10 : SMALL_BYTES;
EXPORT(paged_attention_shared_bytes, PREFILL_BYTES);
constexpr int MIN_SPLIT = 256;           // keys for one block at least: for fewer, merging costs more than it gains
// ldmatrix reads one part of eight rows at a time, and these should lie in different banks. They do if a row has an odd
// number of parts, so rows are padded; or, with 8, 16, ... parts, if part p of row r changes places with p xor r % 8.
// Then the first eight parts of a tile's ROWS come before the next eight: wgmma wants rows of 128 bytes.
// Eight rows further is always 8 STRIDE further, so multiples of 8 can be added afterwards.
constexpr int PADDED = PARTS % 8 == 0 ? PARTS : PARTS + 1;    // parts that a row takes
constexpr int STRIDE = PARTS % 8 == 0 ? 8 : PADDED;           // to the next row
template <int ROWS> __device__ inline unsigned place(unsigned row, unsigned part) {
    return PARTS % 8 == 0 ? part / 8 * 8 * ROWS + row * 8 + (part % 8 ^ row % 8) : row * STRIDE + part;
}

__device__ unsigned arrived[1024];       // of each block's rows: splits that have ended. 0 between launches

// A block's work: some rows from first_row on, of the sequence that begins with first_token, whose query sees first_seen keys.
template <bool FEW>    // whether the rows are 16 at most
__device__ inline void attend(
        Bf16x8* memory, unsigned first_row, unsigned rows, unsigned first_token, int first_seen, const int* block_table,
        bf16* out, const bf16* qkv, const bf16* k_cache, const bf16* v_cache, float* partial) {
    constexpr bool TOGETHER = WGMMA && !FEW;
    constexpr int ROW_TILES = FEW ? 1 : ATTENTION_ROWS / 64;        // a warp's, of 16 rows each, 64 apart
    constexpr int KEY_TILE = FEW ? SMALL_TILE : PREFILL_TILE, KEY_WARPS = FEW ? SMALL_TILE / 16 : 1;    // that share a tile
    constexpr unsigned KEYS = KEY_TILE / KEY_WARPS;       // of a warp in each tile
    constexpr unsigned Q_ROWS = FEW ? 16 : 64 * ROW_TILES, TILE = KEY_TILE * PADDED, BYTES = FEW ? SMALL_BYTES : PREFILL_BYTES;
    constexpr unsigned FIT = (BYTES / 16 - Q_ROWS * PADDED) / TILE, SLOTS = FIT < 5 ? FIT : 5;    // of the ring
    const unsigned kv_head = blockIdx.x % NUM_KV_HEADS, split = blockIdx.x / NUM_KV_HEADS;
    const unsigned splits = gridDim.x / NUM_KV_HEADS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned warp_row = FEW ? 0 : warp * 16, warp_key = warp % KEY_WARPS * KEYS;
    // Of a row: its token * H + head, and how many keys it sees.
    const auto token_head = [=](unsigned row) {
        const unsigned token = first_token + (first_row + row) / GROUP;
        return (size_t)token * NUM_HEADS + kv_head * GROUP + (first_row + row) % GROUP;
    };
    const auto visible = [=](unsigned row) { return first_seen + int((first_row + row) / GROUP); };
    constexpr int MINE = 2 * ROW_TILES;                   // rows of which this lane has numbers
    const auto row_of = [=](int i) { return warp_row + i / 2 * 64 + i % 2 * 8 + lane / 4; };
    // This block's keys: whole tiles, so that only the last one of all can be partial. There may be none.
    const unsigned end = max(visible(rows - 1), 0), all_tiles = (end + KEY_TILE - 1) / KEY_TILE;
    const unsigned share = max((all_tiles + splits - 1) / splits, unsigned(MIN_SPLIT / KEY_TILE));
    const unsigned used_splits = max((all_tiles + share - 1) / share, 1u);
    if (split >= used_splits) return;
    const unsigned first_tile = split * share, last_tile = min(first_tile + share, all_tiles);

    // 1. Copies. q first; it belongs to the first group. Rows that there are not are 0.
    const auto q_at = [=](int row, int part) { return memory + place<Q_ROWS>(row, part); };
    for (unsigned item = threadIdx.x; item < Q_ROWS * PARTS; item += ATTENTION_THREADS) {
        const unsigned row = item / PARTS, part = item % PARTS;
        const size_t i = token_head(min(row, rows - 1)), token = i / NUM_HEADS, head = i % NUM_HEADS;
        const bf16* source = qkv + token * QKV + head * HEAD_DIM + 8 * part;
        cp_async_16(q_at(row, part), source, row < rows ? 16 : 0);
    }
    // Of K and V, a thread copies one part (two, if head_dim > 128) of every STEPth key. It looks up their pages a tile
    // ahead. Hazard: nothing at or past `end` is read, neither unused slots (garbage, possibly NaN) nor unused entries
    // of the block table (not even page numbers). In the tile such keys are 0: NaN times a probability of 0 would be NaN.
    constexpr unsigned LANES = PARTS <= 4 ? 4 : PARTS <= 8 ? 8 : 16, STEP = ATTENTION_THREADS / LANES;
    const unsigned me = threadIdx.x % ATTENTION_THREADS, my_key = me / LANES, my_part = me % LANES;    // %: tells the compiler how many
    const auto left = [=](unsigned tile) { return int(end) - int(tile * KEY_TILE + my_key); };    // from my first key on
    unsigned pages[KEY_TILE / STEP];
    const auto look_up = [&](unsigned tile) {    // all of these numbers are powers of 2
        const int* mine = block_table + (tile * KEY_TILE / BLOCK_SIZE + my_key / BLOCK_SIZE);
        #pragma unroll
        for (int i = 0; i < KEY_TILE / STEP; ++i) pages[i] = i * int(STEP) < left(tile) ? mine[i * STEP / BLOCK_SIZE] : 0;
    };
    Bf16x8* const ring = memory + Q_ROWS * PADDED;        // for wgmma, q and tiles are multiples of 1,024 bytes
    const auto load = [&](unsigned item) {    // item 2t of the ring is K of tile t, 2t + 1 is V
        const unsigned tile = item / 2, slot = tile * KEY_TILE % BLOCK_SIZE + my_key % BLOCK_SIZE;    // of its first key
        // Addresses as integers, and summed up in this order: the compiler's order costs three instructions more for a copy.
        const u64 cache = reinterpret_cast<u64>(
            (item % 2 ? v_cache : k_cache) + ((kv_head * BLOCK_SIZE + slot) * HEAD_DIM + 8 * my_part));
        #pragma unroll
        for (unsigned p = 0; p < PARTS; p += LANES) {
            if (tile >= last_tile || my_part + p >= PARTS) break;
            #pragma unroll
            for (int i = 0; i < KEY_TILE / STEP; ++i) {
                const u64 page = pages[i] * u64(2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + cache;
                cp_async_16(ring + item % SLOTS * TILE + i * STEP * STRIDE + place<KEY_TILE>(my_key, my_part + p),
                            reinterpret_cast<const bf16*>(page) + i * STEP % BLOCK_SIZE * HEAD_DIM + 8 * p,
                            i * int(STEP) < left(tile) ? 16 : 0);
            }
        }
        cp_async_commit();                    // also a group of nothing counts
        if (item % 2) look_up(tile + 1);
    };
    const auto wait = [&](bool x) {           // for the next item in turn; returns whether any thread's x is true
        cp_async_wait<SLOTS - 2>();
        if constexpr (TOGETHER) fence_async_proxy();    // each thread its own, before the barrier
        return __syncthreads_or(x);    // all threads' copies are there; and no warp still reads the slot that is filled next
    };
    const auto take = [&](unsigned item) {    // after the wait for it; starts the copy of a later one
        load(item + SLOTS - 1);
        return ring + item % SLOTS * TILE + warp_key * STRIDE;
    };
    look_up(first_tile);
    #pragma unroll
    for (unsigned item = 0; item < SLOTS - 1; ++item) load(2 * first_tile + item);

    unsigned q[PARTS / 2][ROW_TILES][4];                  // one step at a time (the simulator wants all at once)
    const auto load_q = [&](int step) -> auto& {
        #pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
            load_shared(q[step][r], [=](int row, int part) { return q_at(warp_row + 64 * r + row, 2 * step + part); });
        return q[step];
    };
    // l is of this lane's columns only, until the end.
    float m[MINE], l[MINE] = {}, acc[ROW_TILES][PARTS][4] = {};
    for (float& x : m) x = LOWEST;
    for (unsigned tile = first_tile; tile < last_tile; ++tile) {
        wait(false);
        const Bf16x8* k_tile = take(2 * tile);
        const auto k_at = [=](int row, int part) { return k_tile + place<KEY_TILE>(row, part); };
        unsigned p[KEYS / 16][ROW_TILES][4] = {};    // probabilities, as bf16: a factor of the next product
        float sum[MINE] = {}, largest;
        bool raise = tile == first_tile;
        do {
            // 2. Scores
            float s[ROW_TILES][KEYS / 8][4] = {};
            // Hazard: q from shared memory each time. Its fragments, loaded once, lost their registers to p's (ptxas 13.0).
            if constexpr (TOGETHER) wgmma_shared<true, PARTS / 2>(s, q_at, k_at);
            else mma_shared<true, STRIDE, PARTS / 2>(s, load_q, k_at);
            const auto score = [&](int i, int n, int j) -> float& { return s[i / 2][n][i % 2 * 2 + j]; };
            const int start = tile * KEY_TILE + warp_key;
            if (start + int(KEYS) > visible(warp_row))    // unless its first row, which sees the fewest, sees all
                #pragma unroll
                for (int i = 0; i < MINE; ++i) {
                    const int seen = visible(row_of(i)) - start - int(lane % 4 * 2);
                    #pragma unroll
                    for (int n = 0; n < KEYS / 8; ++n)
                        for (int j = 0; j < 2; ++j) if (8 * n + j >= seen) score(i, n, j) = -INF;
                }
            // 3. Online softmax
            if (raise)
                #pragma unroll
                for (int i = 0; i < MINE; ++i) {
                    float highest = m[i];
                    for (int n = 0; n < KEYS / 8; ++n) highest = max(highest, max(score(i, n, 0), score(i, n, 1)));
                    for (int k = 1; k < 4; k *= 2) highest = max(highest, __shfl_xor_sync(0xffffffff, highest, k));
                    const float rescale = exp2_approx(m[i] - highest);
                    m[i] = highest, l[i] *= rescale;
                    #pragma unroll
                    for (int d = 0; d < 2 * PARTS; ++d) acc[i / 2][d / 2][i % 2 * 2 + d % 2] *= rescale;
                }
            largest = 0;
            #pragma unroll
            for (int i = 0; i < MINE; ++i) {
                if (FEW && i > 0 && rows <= 8) break;    // decode: often, the upper eight rows are not there
                sum[i] = 0;
                #pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
                    const float p0 = exp2_approx(score(i, n, 0) - m[i]), p1 = exp2_approx(score(i, n, 1) - m[i]);
                    sum[i] += p0 + p1;
                    p[n / 2][i / 2][n % 2 * 2 + i % 2] = pack_bf16x2(p0, p1);
                }
                largest = max(largest, sum[i]);
            }
        } while ((raise = wait(largest > 0x1p32f)));    // for V: too early, if the tile is done again
        for (int i = 0; i < MINE; ++i) l[i] += sum[i];
        // 4. Values
        const Bf16x8* v_tile = take(2 * tile + 1);
        const auto v_at = [=](int row, int part) { return v_tile + place<KEY_TILE>(row, part); };
        if constexpr (TOGETHER) wgmma_shared<false, KEYS / 16>(acc, p, v_at);
        else mma_shared<false, STRIDE, KEYS / 16>(acc, [&](int step) -> auto& { return p[step]; }, v_at);
    }
    for (float& x : l) x = quad_sum(x);

    // 5. Warp 0 adds up the warps that split each tile's keys. They have the same rows: lane i wants what the others' lane i has.
    cp_async_wait<0>();
    __syncthreads();    // no copy is under way, and no warp still reads the ring: its memory is free
    if (KEY_WARPS > 1) {
        const auto of_warp = [=](int w, int value) -> float& {
            return reinterpret_cast<float*>(memory)[(w * (4 * PARTS + 4) + value) * 32 + lane]; };
        for (int i = 0; i < 2 && warp < KEY_WARPS; ++i) {
            of_warp(warp, i) = m[i], of_warp(warp, 2 + i) = l[i];
            for (int d = 0; d < 2 * PARTS; ++d) of_warp(warp, 4 + 2 * PARTS * i + d) = acc[0][d / 2][2 * i + d % 2];
        }
        __syncthreads();    // all warps' sums are written before warp 0 reads them
        for (int w = 1; w < KEY_WARPS && warp == 0; ++w)
            for (int i = 0; i < 2; ++i) {
                const float highest = max(m[i], of_warp(w, i));
                const float mine = exp2_approx(m[i] - highest), its = exp2_approx(of_warp(w, i) - highest);
                m[i] = highest, l[i] = l[i] * mine + of_warp(w, 2 + i) * its;
                for (int d = 0; d < 2 * PARTS; ++d) {
                    float& x = acc[0][d / 2][2 * i + d % 2];
                    x = x * mine + of_warp(w, 4 + 2 * PARTS * i + d) * its;
                }
            }
    }

    // 6. Results
    #pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const unsigned row = row_of(i);
        if (row >= rows || (FEW && warp > 0)) continue;
        const float down = l[i] > 0 ? 1 / l[i] : 0;    // a query at p < 0 has seen no key: 0, not 0 / 0
        unsigned* bf16s = reinterpret_cast<unsigned*>(out + token_head(row) * HEAD_DIM) + lane % 4;
        Float2* floats = reinterpret_cast<Float2*>(partial);
        floats += (token_head(row) * splits + split) * (HEAD_DIM / 2 + 1);
        for (int d = 0; d < PARTS; ++d) {
            const float x = acc[i / 2][d][i % 2 * 2], y = acc[i / 2][d][i % 2 * 2 + 1];
            if (used_splits == 1) bf16s[4 * d] = pack_bf16x2(x * down, y * down);
            else floats[4 * d + lane % 4] = {x, y};
        }
        if (used_splits > 1) floats[HEAD_DIM / 2] = {m[i], l[i]};
    }
    if (used_splits == 1) return;

    // 7. The last of the splits to end merges them, always in the same order. The counter wraps around to 0.
    unsigned* before = reinterpret_cast<unsigned*>(memory);
    unsigned* counter = &arrived[blockIdx.y * NUM_KV_HEADS + kv_head];
    __syncthreads();    // all threads have written their results before one says so, and warp 0 has read the others'
    if (threadIdx.x == 0) *before = atomic_inc_acq_rel(counter, used_splits - 1);
    __syncthreads();    // it is known who is last, and what the others wrote is seen, before anyone reads it
    if (*before < used_splits - 1) return;
    for (unsigned item = threadIdx.x; item < rows * HEAD_DIM / 2; item += ATTENTION_THREADS) {
        const size_t row = token_head(item / (HEAD_DIM / 2)), d = item % (HEAD_DIM / 2);
        const Float2* found = reinterpret_cast<const Float2*>(partial) + row * splits * (HEAD_DIM / 2 + 1);
        float highest = LOWEST, sum = 0, x = 0, y = 0;
        #pragma unroll 8
        for (int i = 0; i < used_splits; ++i) highest = max(highest, found[i * (HEAD_DIM / 2 + 1) + HEAD_DIM / 2].v[0]);
        #pragma unroll 8
        for (int i = 0; i < used_splits; ++i, found += HEAD_DIM / 2 + 1) {
            const float weight = exp2_approx(found[HEAD_DIM / 2].v[0] - highest);
            sum += weight * found[HEAD_DIM / 2].v[1];
            x += weight * found[d].v[0];
            y += weight * found[d].v[1];
        }
        const float down = sum > 0 ? 1 / sum : 0;
        reinterpret_cast<unsigned*>(out)[row * (HEAD_DIM / 2) + d] = pack_bf16x2(x * down, y * down);
    }
}

template <bool DECODE>    // whether no tile has more than 16 rows
__device__ inline void attend_tile(
        Bf16x8* memory, bf16* out, const bf16* qkv, const bf16* k_cache, const bf16* v_cache, const int* block_tables,
        const int* cu_blocks, const int* cu_seqlens, const int* context_lens, const int* tiles, float* partial) {
    const int sequence = tiles[2 * blockIdx.y], first_row = tiles[2 * blockIdx.y + 1];
    const int first_token = cu_seqlens[sequence], queries = cu_seqlens[sequence + 1] - first_token;
    const int first_seen = context_lens[sequence] - queries + 1, rows = min(queries * GROUP - first_row, ATTENTION_ROWS);
    const int* block_table = block_tables + cu_blocks[sequence];
    if (rows <= 16)
        attend<true>(memory, first_row, rows, first_token, first_seen, block_table, out, qkv, k_cache, v_cache, partial);
    else if constexpr (!DECODE)
        attend<false>(memory, first_row, rows, first_token, first_seen, block_table, out, qkv, k_cache, v_cache, partial);
}

// A third block at head_dim 64: softmax of one while others multiply. It costs a spill of 8 bytes.
extern "C" __global__ __launch_bounds__(ATTENTION_THREADS, WGMMA && HEAD_DIM == 64 ? 3 : 2) void paged_attention(
        bf16* out, const bf16* qkv, const bf16* k_cache, const bf16* v_cache, const int* block_tables,
        const int* cu_blocks, const int* cu_seqlens, const int* context_lens, const int* tiles, float* partial) {
    DYNAMIC_SHARED(PREFILL_BYTES);
    attend_tile<false>(reinterpret_cast<Bf16x8*>(dynamic_shared), out, qkv, k_cache, v_cache, block_tables, cu_blocks,
                       cu_seqlens, context_lens, tiles, partial);
}

// The same for a batch of single queries: it needs fewer registers, so more blocks are on a multiprocessor at once and keep
// more copies under way.
extern "C" __global__ __launch_bounds__(ATTENTION_THREADS, HEAD_DIM <= 128 ? 4 : 2) void decode_attention(
        bf16* out, const bf16* qkv, const bf16* k_cache, const bf16* v_cache, const int* block_tables,
        const int* cu_blocks, const int* cu_seqlens, const int* context_lens, const int* tiles, float* partial) {
    __shared__ Bf16x8 memory[SMALL_BYTES / 16];
    attend_tile<true>(memory, out, qkv, k_cache, v_cache, block_tables, cu_blocks, cu_seqlens, context_lens, tiles, partial);
}

// ---------------------------------------------------------------------------------------------------------------------
// silu_mul: out = silu(gate) * up, with silu(g) = g / (1 + exp(-g)), of normalised gates and ups
//
//   out [T, F], gate_up [T, 2F]: a token's row holds its gates, then its ups (one matrix product makes both).
//   x [T, D]: what gate_up is a product of, see rms_norm.
//   Grid (ceil(F / SILU_COLUMNS), T): a thread owns twice eight columns of one token. Shared memory: block_reduce's.
// ---------------------------------------------------------------------------------------------------------------------
EXPORT(SILU_THREADS, 256);
EXPORT(SILU_COLUMNS, 4096);    // of a thread block

// exp(-g) is 2^(-g log2(e)). For a very negative g it is inf, and g / inf is the right answer, 0.
__device__ inline float silu(float g) { return g / (1 + exp2_approx(-LOG2_E * g)); }

extern "C" __global__ __launch_bounds__(SILU_THREADS) void silu_mul(bf16* out, const bf16* gate_up, const bf16* x) {
    const size_t token = blockIdx.y;
    const int first = blockIdx.x * SILU_COLUMNS + 8 * threadIdx.x;
    Bf16x8 gates[2], ups[2];    // under way while the squares of x are summed up
    for (int k = 0; k < 2; ++k) {
        const int i = min(first + k * SILU_COLUMNS / 2, FFN - 8);
        gates[k] = vec8(gate_up + token * 2 * FFN + i);
        ups[k] = vec8(gate_up + token * 2 * FFN + FFN + i);
    }
    const float factor = inverse_rms(x + token * HIDDEN);
    for (int k = 0; k < 2; ++k) {
        const int i = first + k * SILU_COLUMNS / 2;
        if (i >= FFN) break;
        Float8 gate = to_float(gates[k]);
        const Float8 up = to_float(ups[k]);
        for (int j = 0; j < 8; ++j) {
            const float g = gate.v[j] * factor;
            gate.v[j] = silu(g) * (up.v[j] * factor);
        }
        vec8(out + token * FFN + i) = to_bf16(gate);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// sample: the next token of each sequence, and its log-probability
//
// Greedy where the temperature is 0. Else: keep the top k logits, of these keep the most probable ones that together
// reach probability top_p, and draw one of what is left, with probability proportional to exp(logit / temperature).
//
// Keeping the top of 128,256 logits looks like sorting. But a bf16 logit has 16 bits, so there are only 65,536 possible
// values, and all that top-k and top-p need is one of them: the lowest value that is still kept. cutoff() finds it in
// two passes over the row: a histogram over the upper 8 bits tells in which of 256 bins the running sum, from the top
// down, reaches the target; a second one over the lower 8 bits, of that bin's logits only, tells at which value. For
// top-k the sum counts logits, for top-p it adds up their probabilities. No approximation: equal logits have one value,
// so they are kept or dropped together (top-k may then keep more than k), and the value at which the sum reaches its
// target is kept.
//
// Drawing without a running sum either: give every kept token an independent exponential random number E and take the
// token with the least E / exp(logit / temperature); it is token t with probability exp(logit_t / temperature) / sum.
// (An "exponential race": the runner of rate r arrives first with probability r / sum of rates.) In logarithms, that is
// the greatest logit/T - log E, an argmax like greedy's, only with noise: "Gumbel noise" is what -log E is called.
//
// Histograms are summed in integers (probabilities as multiples of 2^-40 of the most probable token's): no order of addition
// can change the result, so threads may add as they come and yet the same logits give the same bits.
//   token [R].   logprob [R]: log-softmax of the logits as they are, before temperature and cuts.   logits [R, V].
//   temperature [R].   top_k [R]: <= 0 or >= V is off.   top_p [R]: >= 1 is off.
//   seed [R].   position [R]: of the new token in its text.
//   Grid (R): one block owns one row; a thread owns every 1,024th group of eight logits.
//   Shared memory: Scratch (33 KB), and block_reduce's.
// ---------------------------------------------------------------------------------------------------------------------
EXPORT(SAMPLE_THREADS, 1024);
constexpr int COPIES = 16;    // of the histogram: logits crowd in a few bins, and atomics on one address queue up

// Maps floats to integers in the same order: a positive float's bits grow with it, a negative one's fall; -0 equals +0.
__device__ inline unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);    // -0 + 0 is +0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The same for a bf16 logit, whose value as a float has nothing in its lower 16 bits.
__device__ inline int key_of(float logit) { return ordered(logit) >> 16; }

// A candidate as one integer: the greater score wins, of equal scores the lower token.
__device__ inline u64 candidate(float score, int token) { return (u64)ordered(score) << 32 | ~(unsigned)token; }

// exp(-distance) as a multiple of 2^-40: 2^18 of them add up to 58 bits, and what is cut off is less than 1 in 10^12.
__device__ inline u64 mass(float distance) { return (u64)(exp2_approx(-LOG2_E * distance) * 0x1p40f); }

// A random-looking number for each z, one to one: a multiplication carries differences upwards, a shift brings them
// down again, so every bit of z moves every bit of the result. (The factors are random odd numbers, tested for that.)
__device__ inline u64 scramble(u64 z) {
    z = (z ^ z >> 32) * 0xdca4631cfa6051f5;
    z = (z ^ z >> 29) * 0x8de1134a212a3ef5;
    return z ^ z >> 32;
}
constexpr u64 GOLDEN = 0x9e3779b97f4a7c15;    // 2^64 / golden ratio: its multiples keep far from each other

// Calls body(token, logit) for every logit of the row, spread over the block.
template <class Body>
__device__ inline void for_each_logit(const bf16* logits, Body body) {
    // Hazard: V may be odd, so a row may start at any even address. Up to seven logits in front of the first multiple
    // of 16 bytes, and up to seven at the end, are read one by one.
    const int head = min(VOCAB, (int)(8 - (size_t)logits / 2 % 8) % 8), tail = head + (VOCAB - head) / 8 * 8;
    const int first = threadIdx.x, last = tail + threadIdx.x;
    if (first < head) body(first, __bfloat162float(logits[first]));
    for (int token = head + 8 * threadIdx.x; token < tail; token += 8 * SAMPLE_THREADS) {
        const Float8 x = to_float(vec8(logits + token));
        for (int j = 0; j < 8; ++j) body(token + j, x.v[j]);
    }
    if (last < VOCAB) body(last, __bfloat162float(logits[last]));
}

// What cutoff() needs in shared memory. (Declared inside of it, each instance of the template would have its own.)
struct Scratch {
    u64 histogram[256][COPIES];    // [bin][copy]
    u64 remaining;                 // the target, less what lies in the bins above the found one
    int found;                     // the bin in which the sum passes the target
};

// The greatest key such that the weights of all logits with this key or a greater one add up to the target or more. Logits
// with keys below `lowest` count for nothing. get_target(sum of all weights) is at least 1 and at most that sum.
template <class Weight, class Target>
__device__ inline int cutoff(Scratch& shared, const bf16* logits, int lowest, Weight weight, Target get_target) {
    const int bin = threadIdx.x;    // in the parts where 256 threads own one bin each
    int prefix = 0;                 // the key's upper bits, as far as they are known
    u64 target = 0;
    for (int shift = 8; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256 * COPIES; i += SAMPLE_THREADS) shared.histogram[i / COPIES][i % COPIES] = 0;
        __syncthreads();    // all bins are zero before the first is added to
        for_each_logit(logits, [&](int, float logit) {
            const int key = key_of(logit);
            if (key >= lowest && key >> (shift + 8) == prefix)    // an integer sum: the same in any order
                atomicAdd(&shared.histogram[key >> shift & 255][threadIdx.x % COPIES], weight(logit));
        });
        __syncthreads();    // all weights are added before the bins are read
        if (bin < 256) for (int c = 1; c < COPIES; ++c) shared.histogram[bin][0] += shared.histogram[bin][c];
        __syncthreads();    // all bins are folded before any thread looks at another's
        if (bin < 256) {
            u64 above = 0, total = 0;
            for (int b = 0; b < 256; ++b) {    // all read the same bin at once: in turns of their own they would queue at one bank
                const u64 sum = shared.histogram[b][0];
                total += sum;
                if (b > bin) above += sum;
            }
            if (shift == 8) target = get_target(total);
            if (above < target && target <= above + shared.histogram[bin][0]) {    // true for one bin
                shared.found = bin;
                shared.remaining = target - above;
            }
        }
        __syncthreads();    // `found` is written before all read it, and the bins are read before they are zeroed again
        prefix = prefix << 8 | shared.found;
        target = shared.remaining;
    }
    return prefix;
}

extern "C" __global__ __launch_bounds__(SAMPLE_THREADS, 2) void sample(
        int* token, float* logprob, const bf16* logits, const float* temperature, const int* top_k, const float* top_p,
        const u64* seed, const int* position) {
    __shared__ Scratch scratch;
    const int s = blockIdx.x;
    const bf16* row = logits + (size_t)s * VOCAB;

    // 1. The greatest logit: greedy's choice, and the zero point of all exponents below, so that none can overflow. With it, as
    //    in attention, the softmax's denominator: of this thread's logits, relative to the greatest that it has seen.
    float highest = -INF, sum = 0;
    int at = 0;
    for_each_logit(row, [&](int t, float logit) {
        if (logit > highest) sum = sum * exp2_approx(LOG2_E * (highest - logit)) + 1, highest = logit, at = t;
        else if (logit > -INF) sum += exp2_approx(LOG2_E * (logit - highest));    // (-inf - -inf would be NaN)
    });
    u64 best = block_reduce(candidate(highest, at), Max());
    int chosen = ~(unsigned)best;
    const float greatest = __bfloat162float(row[chosen]);
    const float denominator = block_reduce(sum * exp2_approx(LOG2_E * (highest - greatest)), Sum());

    const float tau = temperature[s];    // it and the cuts are the same for the whole block: no barrier is missed
    if (tau > 0) {
        // 2. The lowest key that is kept.
        // Hazard: divide, do not multiply by 1 / tau: that may be inf, and the greatest logit would get 0 * inf = NaN.
        const auto weight = [&](float logit) { return mass((greatest - logit) / tau); };
        int lowest = 0;
        if (0 < top_k[s] && top_k[s] < VOCAB) {
            // Every thread's greatest logit is at or above the least of these: so many logits, at least. The k-th greatest
            // is not below it, then, and most logits are: they need not be counted.
            if (top_k[s] <= SAMPLE_THREADS) lowest = -block_reduce(-key_of(highest), Max());
            lowest = cutoff(scratch, row, lowest, [](float) { return (u64)1; }, [&](u64) { return (u64)top_k[s]; });
        }
        if (top_p[s] < 1)
            // A part of the mass that top-k left. In double: float has 24 bits, the sum up to 58. At least 1: top_p = 0 keeps
            // the most probable token.
            lowest = cutoff(scratch, row, lowest, weight, [&](u64 total) {
                return max((u64)1, (u64)ceil(top_p[s] * (double)total));
            });

        // 3. The race. The noise depends on the request's seed, the position and the token, and on nothing else.
        const u64 stream = scramble(scramble(seed[s] + GOLDEN) + position[s]);
        best = candidate(-INF, chosen);    // stays only if nothing else is finite
        for_each_logit(row, [&](int t, float logit) {
            if (key_of(logit) < lowest) return;
            // Hazard: an E near 0 wins the race, so it must be fine-grained there. -log(u) is not: one in 2^24 floats u
            // is 1, E is 0, and any token wins, however improbable. -log(1 - u) is: u has 64 bits, and 0 is avoided.
            const float u = (scramble(stream + t * GOLDEN) | 1) * 0x1p-64f;
            best = max(best, candidate((logit - greatest) / tau - logf(-log1pf(-u)), t));
        });
        best = block_reduce(best, Max());
        chosen = ~(unsigned)best;
    }
    if (threadIdx.x == 0) {
        token[s] = chosen;
        logprob[s] = __bfloat162float(row[chosen]) - greatest - logf(denominator);
    }
}
