// tiny-vLLM: every GPU kernel of the engine.
//
// A step of the engine is matrix products, which cuBLAS does, and between them these kernels, in the order in which a
// token meets them (the middle five in every layer, rms_norm twice and once more before the head):
//
//     gather_rows       token id -> its row of the embedding table
//     rms_norm          add what the last product gave to the residual stream, normalise
//     rope_and_cache    rotate queries and keys by their position, put keys and values into the paged KV cache
//     paged_attention   each query looks at all the keys up to its own, wherever their pages lie
//     merge_splits      ... and what it found there is added up, where several blocks shared the keys
//     silu_mul          the gate of the feed-forward part
//     sample            logits -> the next token, on the GPU, so that 8 bytes a sequence go to the CPU and not V logits
//
// How to read it. Letters are sizes: T tokens in this step (a ragged batch: the new tokens of all sequences, one after
// the other, whether a sequence brings one token or a chunk of its prompt), S sequences, R rows to sample (sequences
// that get a token), D hidden, H query heads, K kv heads, G = H/K query heads that share a kv head, h head_dim, F ffn,
// V vocabulary, B tokens a page, N pages. Above each kernel stands its contract: the grid, what one block and one
// thread own, each pointer with its shape. No kernel knows whether it serves prefill or decode: positions, slots and lengths
// are data.
//
// Everything is stored as bfloat16 (the upper half of a float32) and computed in float32. The file is compiled for one
// model: the sizes below come in as -D macros, so that loops have constant bounds. The CPU simulator (simulator.h)
// compiles this very file.

#ifndef SIMULATOR
#include <cuda_bf16.h>
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "tiny-vLLM needs a GPU of compute capability 8.0 or newer (A100, RTX 30, ...): older ones have no bfloat16"
#endif

constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;                   // G
constexpr int QKV = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM;    // a token's row of qkv: its queries, keys, values
constexpr float INF = __builtin_bit_cast(float, 0x7f800000);      // NVRTC knows no INFINITY

static_assert(HIDDEN % 8 == 0 && FFN % 8 == 0, "hidden and ffn sizes must be multiples of 8 (16 bytes)");
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM >= 32 && HEAD_DIM <= 256, "head_dim must be 32, 48, 64, ... or 256");
static_assert(NUM_HEADS % NUM_KV_HEADS == 0 && GROUP <= 16, "1 to 16 query heads must share each kv head");

using bf16 = __nv_bfloat16;
using u64 = unsigned long long;

// ---------------------------------------------------------------------------------------------------------------------
// Shared helpers: eight numbers at a time, and sums over a warp or a block
// ---------------------------------------------------------------------------------------------------------------------

// A GPU moves memory best in 16 bytes a thread: eight bf16, one load instruction. The address must be a multiple of 16.
struct alignas(16) Bf16x8 { bf16 v[8]; };    // as they lie in memory
struct alignas(4) Bf16x2 { bf16 v[2]; };     // where a warp shares a row of head_dim: 4 bytes a lane
struct Float8 { float v[8]; };               // as they are computed with, in registers

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
// The embedding lookup at the start of a step; at its end, it picks each sequence's last row, the only one that the
// head needs. A step is launched before the CPU has read the tokens that the one before sampled. Such a token is
// written ~i in rows: number i of these, still on the GPU.
//   out [R, D], table [*, D], rows [R], sampled [*]: by the step before; null if no row is negative.
//   Grid (R): one block copies one row, a thread 16 bytes of it at a time.
// ---------------------------------------------------------------------------------------------------------------------
constexpr int GATHER_THREADS = 128;

extern "C" __global__ __launch_bounds__(GATHER_THREADS) void gather_rows(
        bf16* out, const bf16* table, const int* rows, const int* sampled) {
    const int row = rows[blockIdx.x];
    // 64 bits: a vocabulary of 256,000 rows of 16,384 is more than an int can count.
    const bf16* source = table + (size_t)(row < 0 ? sampled[~row] : row) * HIDDEN;
    bf16* target = out + (size_t)blockIdx.x * HIDDEN;
    for (int i = 8 * threadIdx.x; i < HIDDEN; i += 8 * GATHER_THREADS) vec8(target + i) = vec8(source + i);
}

// ---------------------------------------------------------------------------------------------------------------------
// rms_norm: residual += x;  out = residual / sqrt(mean(residual^2) + eps) * weight
//
// The addition is fused in because both are bound by memory: apart, the residual would make one more round trip.
//   out [T, D], residual [T, D], x [T, D] or null (the first norm of a step: nothing to add yet), weight [D].
//   Grid (T): one block owns one row. A thread owns every 256th group of eight columns and keeps them in registers
//   between the sum of squares and the scaling, so the row is read once. Shared memory: block_reduce's.
// ---------------------------------------------------------------------------------------------------------------------
constexpr int NORM_THREADS = 256;

extern "C" __global__ __launch_bounds__(NORM_THREADS) void rms_norm(
        bf16* out, bf16* residual, const bf16* x, const bf16* weight) {
    constexpr int ROUNDS = (HIDDEN / 8 + NORM_THREADS - 1) / NORM_THREADS;
    const size_t row = (size_t)blockIdx.x * HIDDEN;
    Float8 mine[ROUNDS];
    float squares = 0;
    #pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        const int i = 8 * (r * NORM_THREADS + threadIdx.x);
        if (i >= HIDDEN) break;
        mine[r] = to_float(vec8(residual + row + i));
        if (x != nullptr) {
            const Float8 add = to_float(vec8(x + row + i));
            for (int j = 0; j < 8; ++j) mine[r].v[j] += add.v[j];
            const Bf16x8 rounded = to_bf16(mine[r]);    // later layers see the rounded sum, so the norm must too
            vec8(residual + row + i) = rounded;
            mine[r] = to_float(rounded);
        }
        for (int j = 0; j < 8; ++j) squares += mine[r].v[j] * mine[r].v[j];
    }
    // Every thread must come to this reduction, also one that owns no column: it holds barriers.
    const float scale = rsqrtf(block_reduce(squares, Sum()) / HIDDEN + RMS_EPS);
    #pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        const int i = 8 * (r * NORM_THREADS + threadIdx.x);
        if (i >= HIDDEN) break;
        const Float8 w = to_float(vec8(weight + i));
        for (int j = 0; j < 8; ++j) mine[r].v[j] *= scale * w.v[j];
        vec8(out + row + i) = to_bf16(mine[r]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// rope_and_cache: rotate q and k by their position; put k and v into the cache
//
// RoPE turns each pair of a head's numbers (a, b) by an angle that grows with the position: (a cos - b sin, b cos + a
// sin). The dot product of a query and a key then depends on the distance of their positions alone.
// Hazard: which numbers are a pair? In Hugging Face checkpoints, i and i + h/2; in Meta's own files, 2i and 2i + 1.
// With the wrong choice text stays fluent for some twenty tokens and then decays, so nothing but a test will tell.
//   qkv [T, (H + 2K) h]: q is rotated in place; k and v are only read.   positions [T].
//   cos_sin [max_len, h]: of each position's h/2 angles, first the cosines, then the sines.
//   slot_mapping [T]: slot = page * B + offset in the page; negative for a padding token, for which nothing is written.
//   k_cache, v_cache [N, K, B, h]: within a page, the keys of one head are consecutive, as paged_attention reads them.
//   Grid (T): one block owns one token. A thread owns numbers i..i+7 and i+h/2..i+h/2+7 of a head, so eight whole
//   pairs: it reads both sides before it writes either, and no barrier is needed. (h/2 must be a multiple of 8: hence
//   head_dim % 16 == 0.)
// ---------------------------------------------------------------------------------------------------------------------
constexpr int ROPE_THREADS = 128;

extern "C" __global__ __launch_bounds__(ROPE_THREADS) void rope_and_cache(
        bf16* qkv, const float* cos_sin, const int* positions, const long long* slot_mapping,
        bf16* k_cache, bf16* v_cache) {
    constexpr int HALF = HEAD_DIM / 2, PARTS = HALF / 8;
    const int token = blockIdx.x;
    const long long slot = slot_mapping[token];
    if (slot < 0) return;
    const float* cos = cos_sin + (size_t)positions[token] * HEAD_DIM;
    const float* sin = cos + HALF;

    for (int item = threadIdx.x; item < QKV / 16; item += ROPE_THREADS) {
        const int head = item / PARTS, i = 8 * (item % PARTS);    // heads: first H of queries, K of keys, K of values
        bf16* target = qkv + (size_t)token * QKV + head * HEAD_DIM + i;
        Float8 a = to_float(vec8(target)), b = to_float(vec8(target + HALF));
        if (head < NUM_HEADS + NUM_KV_HEADS) {
            for (int j = 0; j < 8; ++j) {
                const float c = cos[i + j], s = sin[i + j], a0 = a.v[j], b0 = b.v[j];
                a.v[j] = a0 * c - b0 * s;
                b.v[j] = b0 * c + a0 * s;
            }
        }
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
// paged_attention: out = softmax(q . k * scale) v, over the keys at and before each query's position
//
// Attention with three twists.
// - Paged: key number t of a sequence lies in page block_table[t / B], at offset t % B. Only the copy to shared memory
//   knows this.
// - Grouped (GQA): query heads kv_head * G .. kv_head * G + G-1 share one kv head. A block takes all of them, so the kv
//   head is read once.
// - Online softmax: scores come tile by tile, and exp needs their maximum first, lest it overflow. So keep a running
//   maximum m, sum l and accumulator acc; when a tile raises the maximum from m to m', what was summed so far is too
//   large by exp(m' - m), and is rescaled:
//       l   = l   exp(m - m') + sum_j exp(s_j - m')
//       acc = acc exp(m - m') + sum_j exp(s_j - m') v_j            and at the end, out = acc / l
//
// Causal: the queries of a sequence are its last positions, so a query at position p sees keys 0..p, whether it is a
// decode token (p = context - 1) or belongs to a chunk from the middle of a prompt. At p < 0 (padding) there is no key,
// and out is 0.
//   out [T, H h].   qkv [T, (H + 2K) h]: the rotated q is read; this step's k and v are in the cache by now.
//   k_cache, v_cache [N, K, B, h]: of one layer.
//   block_tables [pages of all S], cu_blocks [S + 1]: the pages of sequence s, one for each B tokens, stand in
//   block_tables from number cu_blocks[s] on.
//   cu_seqlens [S + 1]: sequence s brings tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1 of the batch.
//   context_lens [S]: how many tokens it has by now, these included.
//   partial [T, H, splits, h + 2] float, or null with one split: a few decode tokens make too few blocks for a GPU,
//   however long their contexts. So the keys are dealt to `splits` blocks, a run of whole tiles to each (flash-
//   decoding). With one split, out is written; with more, partial: each block's acc, m and l, also of one without keys
//   (0, -inf, 0).
//   Grid (ceil(most queries of a sequence / QUERY_TILE) * splits, K, S): a block owns a tile of one sequence's queries,
//   times the G heads of one kv head. Such a pair (query, head) is a row. Rows are dealt to the warps in turn, so each
//   has at most G; one decode token has G rows in all, the others are skipped. Within a row, a lane owns one key in 32
//   for the scores, then two numbers in 64 of head_dim for the values.
//   Shared memory: a tile of keys and values, and for each warp the probabilities of its current row; 22 to 38 KB.
// ---------------------------------------------------------------------------------------------------------------------
constexpr int QUERY_TILE = 8;    // as many as warps, so that a warp has G rows at most and their acc fits its registers
constexpr int ATTENTION_THREADS = 256;

extern "C" __global__ __launch_bounds__(ATTENTION_THREADS) void paged_attention(
        bf16* out, const bf16* qkv, const bf16* k_cache, const bf16* v_cache, const int* block_tables,
        const int* cu_blocks, const int* cu_seqlens, const int* context_lens, float scale, float* partial, int splits) {
    constexpr int WARPS = ATTENTION_THREADS / 32;
    constexpr int ROWS = (QUERY_TILE * GROUP + WARPS - 1) / WARPS;                // rows of one warp, at most
    constexpr int KEY_TILE = HEAD_DIM <= 64 ? 128 : HEAD_DIM <= 128 ? 64 : 32;    // the static limit is 48 KB
    constexpr int KEYS = KEY_TILE / 32;                                           // keys of one lane
    constexpr int PARTS = HEAD_DIM / 8;                                           // 16-byte parts of one key or value
    constexpr int PAIRS = (HEAD_DIM + 63) / 64;                                   // pairs of numbers of one lane
    // Lane j reads key j: at a row length of 2h bytes, many lanes would meet in the same bank. One unused part makes
    // the row an odd number of 16-byte parts, and any eight lanes then touch all 32 banks.
    __shared__ Bf16x8 k_tile[KEY_TILE][PARTS + 1];
    __shared__ Bf16x8 v_tile[KEY_TILE][PARTS];
    __shared__ float p_tile[WARPS][KEY_TILE];

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int split = blockIdx.x % splits, kv_head = blockIdx.y, sequence = blockIdx.z;
    const int query_len = cu_seqlens[sequence + 1] - cu_seqlens[sequence];
    const int first_query = blockIdx.x / splits * QUERY_TILE;
    if (first_query >= query_len) return;                       // the whole block returns: it misses no barrier
    const int first_token = cu_seqlens[sequence] + first_query;                     // its number in the batch
    const int first_position = context_lens[sequence] - query_len + first_query;    // and in the sequence
    const int queries = min(QUERY_TILE, query_len - first_query), rows = queries * GROUP;
    const int end = first_position + queries;                   // the last query sees keys 0..end-1
    const int* block_table = block_tables + cu_blocks[sequence];
    // This block's keys: whole tiles, so that only the last one of all can be partial. There may be none.
    const int tiles = (end + KEY_TILE - 1) / KEY_TILE, share = (tiles + splits - 1) / splits * KEY_TILE;
    const int first_key = split * share, last_key = min(end, first_key + share);

    float m[ROWS], l[ROWS], acc[ROWS][PAIRS][2];
    for (int r = 0; r < ROWS; ++r) {
        m[r] = -INF;
        l[r] = 0;    // each lane sums its own keys; the lanes are added up at the end
        for (int d = 0; d < PAIRS; ++d) acc[r][d][0] = acc[r][d][1] = 0;
    }

    for (int start = first_key; start < last_key; start += KEY_TILE) {
        // 1. All threads copy the tile. Hazard: the last one may be partial, and so may the last page. Nothing at or
        //    past `end` is read, neither unused slots (garbage, possibly NaN) nor unused entries of the block table
        //    (not even page numbers).
        const int keys = min(KEY_TILE, last_key - start);
        __syncthreads();    // a slow warp may still be reading the tile before this one
        #pragma unroll 4
        for (int item = threadIdx.x; item < keys * PARTS; item += ATTENTION_THREADS) {
            const int key = item / PARTS, part = item % PARTS, position = start + key;
            const size_t page = block_table[position / BLOCK_SIZE];    // 64 bits, as in rope_and_cache
            const size_t place = (page * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE;
            k_tile[key][part] = vec8(k_cache + place * HEAD_DIM + 8 * part);
            v_tile[key][part] = vec8(v_cache + place * HEAD_DIM + 8 * part);
        }
        __syncthreads();    // the tile is complete before any warp reads another warp's part of it

        #pragma unroll      // r must be a constant: acc[r] can live in registers only then
        for (int r = 0; r < ROWS; ++r) {
            const int row = r * WARPS + warp, query = row / GROUP, head = kv_head * GROUP + row % GROUP;
            if (row >= rows) break;
            // A row that sees no key of this tile skips it. Hazard: if this were its first tile, m and the new maximum
            // would both be -inf, and -inf - -inf is NaN. After the skip, a maximum is over at least one real score.
            const int visible = min(keys, first_position + query + 1 - start);
            if (visible <= 0) continue;

            // 2. Scores: each lane has its own keys. All read the same part of q: the L1 cache serves them at once.
            const bf16* q = qkv + (size_t)(first_token + query) * QKV + head * HEAD_DIM;
            float score[KEYS] = {};
            #pragma unroll 4
            for (int part = 0; part < PARTS; ++part) {
                const Float8 q8 = to_float(vec8(q + 8 * part));
                for (int j = 0; j < KEYS; ++j) {
                    if (32 * j >= visible) break;
                    const Float8 k8 = to_float(k_tile[32 * j + lane][part]);
                    for (int i = 0; i < 8; ++i) score[j] += q8.v[i] * k8.v[i];
                }
            }

            // 3. Online softmax. Keys that the row may not see get -inf by selection, not by adding it: what lies there
            //    in shared memory is stale, and may be NaN.
            float highest = m[r];
            for (int j = 0; j < KEYS; ++j) {
                score[j] = 32 * j + lane < visible ? score[j] * scale : -INF;
                highest = fmaxf(highest, score[j]);
            }
            highest = warp_reduce(highest, Max());
            const float rescale = expf(m[r] - highest);    // in the row's first tile m is -inf, and this is 0
            m[r] = highest;
            l[r] *= rescale;
            for (int j = 0; j < KEYS; ++j) {
                const float p = expf(score[j] - highest);
                l[r] += p;
                p_tile[warp][32 * j + lane] = p;
            }
            __syncwarp();    // every lane's probabilities are written before the other lanes read them

            // 4. Values: now a lane owns numbers of head_dim, and walks over the keys.
            for (int d = 0; d < PAIRS; ++d) {
                acc[r][d][0] *= rescale;
                acc[r][d][1] *= rescale;
            }
            #pragma unroll 4
            for (int key = 0; key < visible; ++key) {
                const float p = p_tile[warp][key];
                const Bf16x2* value = reinterpret_cast<const Bf16x2*>(v_tile[key]);
                for (int d = 0; d < PAIRS; ++d) {
                    const int pair = 32 * d + lane;
                    if (pair >= HEAD_DIM / 2) break;    // head_dim need be no multiple of 64
                    const Bf16x2 x = value[pair];
                    acc[r][d][0] += p * __bfloat162float(x.v[0]);
                    acc[r][d][1] += p * __bfloat162float(x.v[1]);
                }
            }
            __syncwarp();    // all lanes have read the probabilities before the next row overwrites them
        }
    }

    #pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int row = r * WARPS + warp, query = row / GROUP, head = kv_head * GROUP + row % GROUP;
        if (row >= rows) break;
        const float sum = warp_reduce(l[r], Sum());
        const size_t place = (size_t)(first_token + query) * NUM_HEADS + head;
        if (splits > 1) {
            float* target = partial + (place * splits + split) * (HEAD_DIM + 2);
            for (int d = 0; d < PAIRS; ++d) {
                const int pair = 32 * d + lane;
                if (pair >= HEAD_DIM / 2) break;
                target[2 * pair] = acc[r][d][0];
                target[2 * pair + 1] = acc[r][d][1];
            }
            if (lane == 0) target[HEAD_DIM] = m[r], target[HEAD_DIM + 1] = sum;
            continue;
        }
        const float scale_down = sum > 0 ? 1 / sum : 0;    // a padding query has seen no key: 0, not 0 / 0
        bf16* target = out + place * HEAD_DIM;
        for (int d = 0; d < PAIRS; ++d) {
            const int pair = 32 * d + lane;
            if (pair >= HEAD_DIM / 2) break;
            reinterpret_cast<Bf16x2*>(target)[pair] = {{__float2bfloat16(acc[r][d][0] * scale_down),
                                                        __float2bfloat16(acc[r][d][1] * scale_down)}};
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// merge_splits: the splits of paged_attention, added up
//
// Each split has summed relative to its own maximum m; the same rule as from tile to tile brings them to a common one.
//   out [T, H h].   partial [T, H, splits, h + 2]: acc, m, l of each split, as paged_attention leaves them.
//   Grid (T, H): one block owns one row of out, a thread one number of it.
// ---------------------------------------------------------------------------------------------------------------------
constexpr int MERGE_THREADS = 256;    // the largest head_dim

extern "C" __global__ __launch_bounds__(MERGE_THREADS) void merge_splits(bf16* out, const float* partial, int splits) {
    const size_t place = (size_t)blockIdx.x * NUM_HEADS + blockIdx.y;
    const float* split = partial + place * splits * (HEAD_DIM + 2);
    const int d = threadIdx.x;
    if (d >= HEAD_DIM) return;
    float m = -INF, l = 0, acc = 0;
    for (int s = 0; s < splits; ++s, split += HEAD_DIM + 2) {
        const float other = split[HEAD_DIM];
        if (other == -INF) continue;    // it had no keys. Hazard: as in paged_attention, -inf - -inf would be NaN
        const float highest = fmaxf(m, other), mine = expf(m - highest), its = expf(other - highest);
        l = l * mine + split[HEAD_DIM + 1] * its;
        acc = acc * mine + split[d] * its;
        m = highest;
    }
    out[place * HEAD_DIM + d] = __float2bfloat16(l > 0 ? acc / l : 0);    // a padding query has seen no key at all
}

// ---------------------------------------------------------------------------------------------------------------------
// silu_mul: out = silu(gate) * up, with silu(g) = g / (1 + exp(-g))
//
//   out [T, F], gate_up [T, 2F]: a token's row holds its gates, then its ups (one matrix product makes both).
//   Grid (ceil(F / (8 * SILU_THREADS)), T): a thread owns eight columns of one token.
// ---------------------------------------------------------------------------------------------------------------------
constexpr int SILU_THREADS = 256;

extern "C" __global__ __launch_bounds__(SILU_THREADS) void silu_mul(bf16* out, const bf16* gate_up) {
    const int i = 8 * (blockIdx.x * SILU_THREADS + threadIdx.x);
    if (i >= FFN) return;
    const size_t token = blockIdx.y;
    Float8 gate = to_float(vec8(gate_up + token * 2 * FFN + i));
    const Float8 up = to_float(vec8(gate_up + token * 2 * FFN + FFN + i));
    // For a very negative gate exp(-g) is inf, and g / inf is the right answer, 0.
    for (int j = 0; j < 8; ++j) gate.v[j] = gate.v[j] / (1 + expf(-gate.v[j])) * up.v[j];
    vec8(out + token * FFN + i) = to_bf16(gate);
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
// Whatever is summed here is summed in integers (probabilities as multiples of 2^-40 of the most probable token's): no
// order of addition can change the result, so threads may add as they come and yet the same logits give the same bits
// in any batch.
//   token [R].   logprob [R]: log-softmax of the logits as they are, before temperature and cuts.   logits [R, V].
//   temperature [R].   top_k [R]: <= 0 or >= V is off.   top_p [R]: >= 1 is off.
//   seed [R].   position [R]: of the new token in its text.
//   Grid (R): one block owns one row; a thread owns every 1,024th group of eight logits.
//   Shared memory: Scratch (33 KB), and block_reduce's.
// ---------------------------------------------------------------------------------------------------------------------
constexpr int SAMPLE_THREADS = 1024;
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
__device__ inline u64 mass(float distance) { return (u64)(expf(-distance) * 0x1p40f); }

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

extern "C" __global__ __launch_bounds__(SAMPLE_THREADS) void sample(
        int* token, float* logprob, const bf16* logits, const float* temperature, const int* top_k, const float* top_p,
        const u64* seed, const int* position) {
    __shared__ Scratch scratch;
    const int s = blockIdx.x;
    const bf16* row = logits + (size_t)s * VOCAB;

    // 1. The greatest logit: greedy's choice, and the zero point of all exponents below, so that none can overflow.
    u64 best = 0;
    for_each_logit(row, [&](int t, float logit) { best = max(best, candidate(logit, t)); });
    const int my_key = best >> 48;    // of this thread's greatest logit; 0 if it has none
    best = block_reduce(best, Max());
    int chosen = ~(unsigned)best;
    const float greatest = __bfloat162float(row[chosen]);

    // 2. The softmax's denominator, for the log-probability.
    u64 denominator = 0;
    for_each_logit(row, [&](int, float logit) { denominator += mass(greatest - logit); });
    denominator = block_reduce(denominator, Sum());

    const float tau = temperature[s];    // it and the cuts are the same for the whole block: no barrier is missed
    if (tau > 0) {
        // 3. The lowest key that is kept.
        // Hazard: divide, do not multiply by 1 / tau: that may be inf, and the greatest logit would get 0 * inf = NaN.
        const auto weight = [&](float logit) { return mass((greatest - logit) / tau); };
        int lowest = 0;
        if (0 < top_k[s] && top_k[s] < VOCAB) {
            // Every thread's greatest logit is at or above the least of these: so many logits, at least. The k-th greatest
            // is not below it, then, and most logits are: they need not be counted.
            if (top_k[s] <= SAMPLE_THREADS) lowest = -block_reduce(-my_key, Max());
            lowest = cutoff(scratch, row, lowest, [](float) { return (u64)1; }, [&](u64) { return (u64)top_k[s]; });
        }
        if (top_p[s] < 1)
            // A part of the mass that top-k left. In double: float has 24 bits, the sum up to 58. At least 1: top_p = 0 keeps
            // the most probable token.
            lowest = cutoff(scratch, row, lowest, weight, [&](u64 total) {
                return max((u64)1, (u64)ceil(top_p[s] * (double)total));
            });

        // 4. The race. The noise depends on the request's seed, the position and the token, and on nothing else.
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
        logprob[s] = __bfloat162float(row[chosen]) - greatest - logf(denominator * 0x1p-40f);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// stream_read: reads memory as fast as the card can, for --bench: the floor of whatever is bound by memory
//
//   out [grid * READ_THREADS]: of each thread, the exclusive or of all that it read, so that no load can be left out.
//   x [rounds, 4, grid * READ_THREADS, 2]: a round is four words of 16 bytes for each thread: four loads in flight.
//   Grid (any).
// ---------------------------------------------------------------------------------------------------------------------
constexpr int READ_THREADS = 512;

extern "C" __global__ __launch_bounds__(READ_THREADS) void stream_read(u64* out, const u64* x, int rounds) {
    struct alignas(16) Word { u64 v[2]; };
    const size_t threads = gridDim.x * READ_THREADS, me = blockIdx.x * READ_THREADS + threadIdx.x;
    const Word* word = reinterpret_cast<const Word*>(x) + me;
    u64 all = 0;
    for (int round = 0; round < rounds; ++round, word += 4 * threads) {
        Word loaded[4];
        for (int j = 0; j < 4; ++j) loaded[j] = word[j * threads];
        for (int j = 0; j < 4; ++j) all ^= loaded[j].v[0] ^ loaded[j].v[1];
    }
    out[me] = all;
}
