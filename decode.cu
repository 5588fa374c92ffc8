// -------------------------------------------------------------------------------------------------
// decode: a whole step of a few sequences with one token each, from the embedding to the logits
//
// A step of so few sequences reads all weights and multiplies each of them only a few times: the step
// takes as long as the memory needs to deliver the weights. With one kernel for each operation, the
// memory idles at the end and at the beginning of every kernel. Here a single kernel stays for the
// whole step, with one thread block on each multiprocessor, and the weights flow into shared memory
// even while the input of their product is still being computed. (This file is compiled behind ptx.h and
// kernels.cu, and uses their names.)
//
// 1. How the work is cut. The step is a fixed list of operations: in each layer the products qkv, o,
// gate_up and down, with attention behind qkv, and at the end the product head. A product is W @ x,
// with one x for each sequence. Its matrix W [rows, columns] is cut like this:
//
//                   part 0: SEGMENT columns     part 1
//                 +---------------------------+---------------------------+
//     row r       | segment 0                 | segment 1                 |   piece 0: 4 segments, which
//     row r + 1   | segment 2                 | segment 3                 |   lie together in memory
//                 +---------------------------+---------------------------+
//                   ... APART rows after row r:
//                 +---------------------------+---------------------------+
//     partner r   | segment 0                 | segment 1                 |   piece 1: 4 segments, too
//     partner r+1 | segment 2                 | segment 3                 |
//                 +---------------------------+---------------------------+
//
//     segment   a row of W, or a half or a quarter of a long row (the drawing shows halves). Of half_down,
//               W is the left or the right half of down's columns.
//     part      the number of a segment within its row, and the columns of all segments of this number
//     piece     four consecutive segments: one copy from global to shared memory (of half_down, a copy for
//               each row). With FP8 weights, eight segments of 2,048 columns or fewer: two *tiles* of four.
//     partner   the row APART rows after a row of piece 0, whose product must meet the product of that
//               row in one lane: the up row of a gate row, the other row of a RoPE pair
//     unit      a piece and the piece of the partners: the work that a thread block takes at a time.
//               A unit of attention is a kv head of a sequence and a range of keys, see Split.
//     ticket    the number of a unit. Units are numbered in the order of the network, and a counter in
//               global memory hands the numbers out: the next unit goes to the thread block that asks.
//     stage     a place for two pieces in the ring, a buffer in shared memory. A unit of a product fills
//               one stage; a unit of attention fills one or more, piece 0 with keys, piece 1 with values.
//
// 2. Who does what. A thread block has twelve warps:
//
//     producer    1 warp     draws tickets and copies the units into the ring. The producer waits for
//                            free stages only, never for the input of a product, and so runs ahead.
//     consumers   8 warps    multiply: each owns some columns, of x and of every segment
//     reducers    2 warps    take the units in turn: add up the consumers' sums, apply what follows the
//                            product (norm, RoPE, silu, residual, KV cache), and publish the results
//     merger      1 warp     publishes the embedding; merges the attention of a context so long that its
//                            keys are several units; with several ranks, clears the other set of words
//
// All units of a product share x. A consumer reads its columns of x once for a product and keeps them
// in registers, while the weights of the same columns pass by, unit after unit:
//
//     columns of a segment    0 .. 63    64 .. 127    ...    448 .. 511    512 .. 575    ...
//     consumer                   0           1        ...        7             0         ...
//
// A wide h of more than four sequences does not fit into registers. Then the product down becomes two
// products, over the left and over the right half of the columns: see forward.
//
//     weights, KV cache              words, in global memory, of all thread blocks <-------------+
//            |                          |                        |                   |           |
//            | copies                   | x, or queries          | attention of      | merged    |
//            v                          v                        v several units     |           |
//        producer --> ring --> consumers --> sums --> reducers   merger -------------+           |
//                                                        |                                       |
//                                                        +---------------------------------------+
//
// 3. How results travel from one thread block to another, without a barrier over the grid. Each word
// for results is 0 before the step. A warp that needs a word reads the word until it is not 0.
// (A result of 0 is published as -0.) Value and flag are the same word, so the order of memory accesses
// does not matter. Each layer has words of its own, and each word is written once in a step, so no
// result can be overwritten before the last reader has come.
//
// Several ranks (GPUs that share the model, see communicator.py) have a part of the heads and of F each.
// The products o and down of a rank are only parts of a sum. A rank publishes its part of y or x to all
// ranks: each rank has words for the parts of all ranks. A reader of y or x reads all parts and adds
// them up in the order of ranks, so all ranks get the same bits.
//
// Thread blocks never wait for each other in a circle: tickets are drawn in order (a thread block's first
// is its own number, so all must run at once), and a unit depends only on units with smaller tickets.
// (With several ranks, also on units of operations before, on other GPUs. All ranks launch the same
// kernels in the same order, so every rank's decode begins, if none has died.) No sum depends on who draws
// a unit or on who comes first: the same input gives the same bits, in a batch of the same size.
//
//   logits [S, V / ranks].   embed [V, D].   norm [D]: the weight of the last norm; the matrices contain
//   the weights of all other norms, see rms_norm.   token_ids [S]: see rows of gather_rows.
//   weights [4 L + 1]: the addresses of qkv, o, gate_up and down of each layer, and of the head.
//   scales [4 L + 1]: with FP8 weights, those matrices are E4M3 codes, and these are the addresses of
//   the rows' scales, float [rows]: a weight is code * scale.
//   layers: L, which is NUM_LAYERS. (As a constant, L makes the compiler spill more registers.)
//   kv_cache [L, 2, N, K, B, h], query_scale: log2(e) / sqrt(h): see rope_and_cache.
//   words [TICKET_WORDS + (L + 1) S (VECTOR_WORDS + splits PARTIAL_WORDS)], all 0: the counter of
//   tickets; then, behind TICKET_WORDS, the Vectors of each layer, and x for the head. Null if there are
//   several ranks: the words then lie at addresses[rank].
//   splits: DECODE_SPLITS / S, the most for a context.   biases [L, (H + 2K) h]: null unless QKV_BIAS is 1.
//   addresses [ranks + 1]: of each rank's words, see set_of; of `stop`, see Patience. Null for one rank.
//   Other arrays: see rope_and_cache, paged_attention.
//   Grid: a thread block for each multiprocessor. All must run at the same time, since they wait for
//   each other. (decode_shared_bytes leaves no room for two on a multiprocessor.)
//   Hazard: the launch is not cooperative, so nothing checks that all find room. Kernels of others only
//   delay a thread block. But two decode kernels at once (two processes under MPS, two streams) can each
//   hold a part of the multiprocessors, and both wait for ever for thread blocks that never begin.
// -------------------------------------------------------------------------------------------------
constexpr int CONSUMERS = 8;    // warps
constexpr int REDUCERS = 2;     // warps. A single one would be slower than the consumers
EXPORT(DECODE_THREADS, 32 * (CONSUMERS + REDUCERS + 2));    // 2: the merger and the producer
EXPORT(decode_shared_bytes, 227 * 1024);    // the most for a thread block on compute capability 9.0

// At launch every thread has as many registers as a multiprocessor's 65,536 allow, a multiple of 8.
// Consumers keep x and weights in registers, so the four other warps hand over a part of their share.
constexpr int REGISTERS = 65536 / DECODE_THREADS / 8 * 8;
constexpr int CONSUMER_REGISTERS = 200;
constexpr int OTHER_REGISTERS = (DECODE_THREADS * REGISTERS - 32 * CONSUMERS * CONSUMER_REGISTERS) /
                                (DECODE_THREADS - 32 * CONSUMERS);

constexpr int SEGMENTS = 4;          // of a tile; with the partners: the 8 columns of an mma
constexpr int MOST_SEQUENCES = 8;    // times SEGMENTS: a pair of sums for each lane of a reducer
constexpr int PENDING = 8;           // units from producer to reducers: more than the ring has stages

// Pieces on their way into the ring: as few as keep the memory busy, since the consumers' reads of
// words queue up behind the pieces. Even fewer while consumers wait for words. A consumer counts as
// waiting while at least BEHIND stages are filled and not given back.
constexpr int IN_FLIGHT = 3;
constexpr int IN_FLIGHT_WAITING = 2;
constexpr int BEHIND = 2;

constexpr unsigned ALL_LANES = 0xffffffff;
constexpr unsigned MINUS_ZEROS = 0x80008000;    // two bf16 of -0: not a word of 0. (As a float: -5e-41.)
constexpr int HEADS = NUM_HEADS * HEAD_DIM;     // columns of the attention's output

struct alignas(16) Words { unsigned w[4]; };    // 8 bf16; arrays are registers: all loops over them unroll
struct alignas(8) Words2 { unsigned w[2]; };
struct alignas(8) Pair { float a, b; };

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }    // max() is no constant on a GPU

// ---- How the matrices are cut -------------------------------------------------------------------
constexpr int WARP_COLUMNS = 64;    // consecutive columns of a consumer: 128 bytes, a line of the L2 cache
constexpr int WEIGHT_BYTES = FP8_WEIGHTS ? 1 : 2;
// With FP8 weights, of x in products: a number beyond 65504 * 8, larger than models have, becomes infinite.
constexpr float F16_SCALE = 8;

// A row has 1 << shift segments. Segments of some 4 KB are long enough for the copies, and short enough
// for a ring of several stages and for the registers of the consumers. Longer segments are taken where
// the consumers could not own equally many columns of shorter segments.
__device__ constexpr int shift_of(int columns) {
    const int bytes = WEIGHT_BYTES * columns;
    int shift = bytes > 8192 ? 2 : bytes > 4096 ? 1 : 0;
    while (shift > 0 && columns % (WARP_COLUMNS * CONSUMERS << shift) != 0) --shift;
    return shift;
}

// half_down comes twice: on side 0 with the left half of down's columns, on side 1 with the right half.
enum Product { QKV_PRODUCT, O_PRODUCT, GATE_UP_PRODUCT, DOWN_PRODUCT, HEAD_PRODUCT, HALF_DOWN_PRODUCT };

// apart: rows from a row to the partner; 0: the partners follow right behind piece 0.
// normed: whether x goes through a norm. Such an x is the sum over the ranks.
struct Matrix { int rows, columns, apart; bool normed; };
constexpr Matrix MATRICES[] = {    // in the order of Product, without half_down
    {QKV, HIDDEN, HEAD_DIM / 2, true},
    {HIDDEN, HEADS, 0, false},
    {2 * FFN, HIDDEN, FFN, true},
    {HIDDEN, FFN, 0, false},
    {VOCAB / RANKS, HIDDEN, 0, true},
};

template <Product P> struct Shape {
    static constexpr Product WHOLE = P == HALF_DOWN_PRODUCT ? DOWN_PRODUCT : P;
    static constexpr int NUMBER = P == HEAD_PRODUCT ? 0 : WHOLE;    // of the matrix in its layer
    static constexpr Matrix MATRIX = MATRICES[WHOLE];
    static constexpr int COLUMNS = WHOLE == P ? MATRIX.columns : MATRIX.columns / 2;
    static constexpr int SHIFT = shift_of(COLUMNS);
    static constexpr int SEGMENT = COLUMNS >> SHIFT;
    // Tiles of a piece, so that a piece has some 16 KB. (2 only where SHIFT is 0: tile 1 is 4 rows later.)
    static constexpr int TILES = FP8_WEIGHTS && SEGMENT <= 2048 ? 2 : 1;
    static constexpr int PIECE_BYTES = TILES * SEGMENTS * SEGMENT * WEIGHT_BYTES;
    static constexpr int PIECE_ROWS = TILES * SEGMENTS >> SHIFT;
    static constexpr int APART = MATRIX.apart ? MATRIX.apart : PIECE_ROWS;
    static constexpr int UNITS = MATRIX.rows / (2 * PIECE_ROWS);
    static constexpr bool NORMED = MATRIX.normed;
    // Words in a lane of a consumer: of x, as long as a segment; of the segment itself.
    static constexpr int N = SEGMENT / 32 / CONSUMERS;
    static constexpr int W = N * WEIGHT_BYTES / 2;
    __device__ static int row(int unit) {                 // the first of a unit
        const int rows_before = unit * PIECE_ROWS;        // in the pieces 0 of other units
        return rows_before / APART * 2 * APART + rows_before % APART;
    }
};
constexpr int LONGEST_SEGMENT = larger(Shape<QKV_PRODUCT>::SEGMENT,
                                       larger(Shape<O_PRODUCT>::SEGMENT, Shape<DOWN_PRODUCT>::SEGMENT));
constexpr int LARGEST_PIECE = larger(Shape<QKV_PRODUCT>::PIECE_BYTES,
                                     larger(Shape<O_PRODUCT>::PIECE_BYTES, Shape<DOWN_PRODUCT>::PIECE_BYTES));
constexpr int MOST_TILES = larger(Shape<QKV_PRODUCT>::TILES,
                                  larger(Shape<O_PRODUCT>::TILES, Shape<DOWN_PRODUCT>::TILES));

constexpr int TILE = 16;            // keys that a consumer attends to at once; the next tile is another's
constexpr int KEYS_STEP = larger(TILE, BLOCK_SIZE);    // powers of two: a stage holds whole tiles and pages
constexpr int KEY_BYTES = sizeof(kv) * HEAD_DIM;
constexpr int STAGE_KEYS = larger(1, LARGEST_PIECE / KEY_BYTES / KEYS_STEP) * KEYS_STEP;
constexpr int SPLIT_KEYS = 256;     // of a split, at least: to merge smaller splits costs more than they gain

// ---- Shared memory ------------------------------------------------------------------------------
// The consumers' lanes read from both pieces at once: with 64 bytes more, from different banks.
constexpr int BANKS_APART = 64;
constexpr int PIECE_BYTES = larger(LARGEST_PIECE, KEY_BYTES * STAGE_KEYS) + BANKS_APART;

template <int COUNT> struct Layout {    // of a thread block's shared memory, with COUNT stages
    alignas(128) char ring[COUNT][2][PIECE_BYTES];
    // Of each consumer: the sums of a segment and its partner, [.., tile, sequence, segment]; the attention
    // over the consumer's keys; the sum of x^2 over the consumer's columns, [.., sequence and part].
    Pair sums[PENDING][CONSUMERS][MOST_TILES * MOST_SEQUENCES * SEGMENTS];
    Float8 heads[CONSUMERS][GROUP][HEAD_DIM / 8];
    // Consumers write squares again without a wait: when they have the x of the next normed product, which
    // depends, through words, on all that the reducers have computed with the old squares. (An x that depends
    // on no unit belongs to a sequence that only pads the batch, and no batch has such sequences alone.)
    float squares[CONSUMERS][2 * MOST_SEQUENCES];
    // mbarriers. Of a stage: a piece has come; all consumers have read the stage.
    u64 full[COUNT][2];
    u64 empty[COUNT];
    // Of a unit: all consumers have written their sums; a reducer is done with sums, heads and ticket.
    u64 sums_full[PENDING];
    u64 sums_empty[PENDING];
    // The latest of this thread block, none less than the one before. racecheck reports them, RAW and WAR:
    // the reducers poll without an mbarrier. A ticket is one word, and says by itself whether it is new: the
    // old ticket in its place is less than the last that the reducer has had.
    volatile int tickets[PENDING];
    int keys[MOST_SEQUENCES];           // the sequences' context lengths
    int attention_units;                // of a layer
    const char* weights[4 * NUM_LAYERS + 1];
    u64 addresses[RANKS];               // of each rank's words
    bool has_stopped;                   // see Patience: one warp says so for all
};

constexpr int MOST_STAGES = 6;    // more gain nothing
constexpr int LEAST_STAGES = BEHIND + 1;
template <int COUNT> __device__ constexpr int stages_that_fit() {    // but at least LEAST_STAGES
    if constexpr (COUNT <= LEAST_STAGES || sizeof(Layout<COUNT>) <= decode_shared_bytes) return COUNT;
    else return stages_that_fit<COUNT - 1>();
}
constexpr int STAGES = stages_that_fit<MOST_STAGES>();
using Shared = Layout<STAGES>;
static_assert(PENDING > STAGES && PENDING > REDUCERS, "see tickets");

// ---- Which models this kernel takes -------------------------------------------------------------
__device__ constexpr bool is_dealt_out(int columns) {    // whether all consumers own equally many columns
    return columns % (WARP_COLUMNS * CONSUMERS << shift_of(columns)) == 0;
}
constexpr bool FITS =
    is_dealt_out(HIDDEN) && is_dealt_out(HEADS) && is_dealt_out(FFN) &&
    Shape<GATE_UP_PRODUCT>::SHIFT < 2 &&           // two gate rows in a unit make one word of h
    VOCAB % (2 * SEGMENTS * Shape<HEAD_PRODUCT>::TILES * RANKS) == 0 &&    // whole units
    HEADS <= 8192 &&                               // as FFN below, but a wider attention is rare
    LONGEST_SEGMENT <= 4096 &&                     // x must find room in the registers of the consumers
    !QK_NORM && !O_BIAS &&                         // no thread block has a whole head; o's bias is rare
    (HEAD_DIM == 64 || HEAD_DIM == 128) &&         // whole 64 numbers a head, see Attention and merge()
    GROUP <= 8 &&                                  // the queries are the columns of one mma
    STAGE_KEYS <= 32 * BLOCK_SIZE &&               // each page of a stage has a lane of the producer
    4 * NUM_LAYERS < DECODE_THREADS &&             // a thread for each matrix copies the address
    sizeof(Shared) <= decode_shared_bytes;         // if only with LEAST_STAGES
// Consumers hold h of all sequences in registers. A wide h of more than FEW_SEQUENCES has no room: there
// down becomes two products, each with half of h. (A wide FFN that FITS is a multiple of 2,048, so all
// consumers own equally many columns of half an h, too.) With several ranks, h stays whole, and consumers
// add x up from the words of all ranks: a wide h or a wide x has room for FEW_SEQUENCES only.
constexpr int FEW_SEQUENCES = MOST_SEQUENCES / 2;
constexpr bool IS_NARROW = FFN <= 8192 && HIDDEN <= 4096;
constexpr int SEQUENCES = RANKS == 1 || IS_NARROW ? MOST_SEQUENCES : FEW_SEQUENCES;
constexpr bool SPLITS_DOWN = RANKS == 1 && FFN > 8192;
using HalfDown = Shape<HALF_DOWN_PRODUCT>;
static_assert(!FITS || !SPLITS_DOWN ||
              (HalfDown::PIECE_BYTES <= LARGEST_PIECE && HalfDown::TILES <= MOST_TILES));
EXPORT(DECODE_BATCH, FITS ? SEQUENCES : 0);        // the most sequences; 0: the kernel is empty

// ---- The arguments, and the words between thread blocks -----------------------------------------
constexpr int PARTIAL = HEAD_DIM / 2 + 4;    // words: a head's output of one split, and 4 times the logsumexp
EXPORT(DECODE_TICKET_WORDS, 4);              // the counter, and a gap: Vectors must be 16-byte aligned
constexpr int Z = SPLITS_DOWN ? HIDDEN : 0;  // numbers of Vectors' z
EXPORT(DECODE_VECTOR_WORDS, (2 * RANKS * HIDDEN + QKV + HEADS + Z + FFN) / 2);    // of a sequence and layer
EXPORT(DECODE_PARTIAL_WORDS, NUM_HEADS * PARTIAL);    // of a sequence, layer and split
EXPORT(DECODE_SPLITS, 32);                   // of all contexts together, at most
// Of several ranks: see set_of.
constexpr int SET_WORDS = DECODE_TICKET_WORDS + (NUM_LAYERS + 1) * (
    SEQUENCES * DECODE_VECTOR_WORDS + DECODE_SPLITS * DECODE_PARTIAL_WORDS);
EXPORT(DECODE_SHARED_WORDS, DECODE_TICKET_WORDS + 2 * SET_WORDS);

struct Step {    // the kernel's arguments
    bf16* logits;
    const bf16 *embed, *norm, *biases;
    const u64* scales;    // addresses
    int* token_ids;
    const int* sampled;
    int layers;
    const float* cos_sin;
    const int* positions;
    const long long* slot_mapping;
    kv* kv_cache;
    int num_blocks;
    const int *block_tables, *cu_blocks, *context_lens;
    float query_scale;
    unsigned* words;    // of the first Vectors
    int* counter;
    int sequences, splits;
    const u64* addresses;    // of each rank's words, and of `stop`
    int rank;
    int* old_set;            // see set_of
    __device__ int vectors_size() const {    // words
        return sequences * (DECODE_VECTOR_WORDS + splits * DECODE_PARTIAL_WORDS);
    }
    __device__ kv* cache(int layer, int values) const {    // [N, K, B, h]: a layer's keys (0) or values (1)
        return kv_cache + (2 * layer + values) * (size_t)num_blocks * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM;
    }
};

struct Vectors {    // what thread blocks hand to each other in a layer
    bf16* x;              // [ranks, S, D], the residual before the layer: the sum over the ranks
    bf16* qkv;            // [S, (H + 2K) h]
    bf16* attention;      // [S, H h]
    bf16* y;              // [ranks, S, D], the residual after attention
    bf16* z;              // [S, D], if SPLITS_DOWN: the residual between two half_down
    bf16* h;              // [S, F]
    unsigned* partial;    // [S, H, splits, PARTIAL]
    __device__ Vectors(const Step& step, int layer) {
        const int S = step.sequences;
        x = reinterpret_cast<bf16*>(step.words + layer * (size_t)step.vectors_size());
        qkv = x + RANKS * S * HIDDEN;
        attention = qkv + S * QKV;
        y = attention + S * HEADS;
        z = y + RANKS * S * HIDDEN;
        h = z + S * Z;
        partial = reinterpret_cast<unsigned*>(h + S * FFN);
    }
};

__device__ inline Pair unpack(unsigned w) {    // the two bf16 of a word
    return {__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000)};
}
// Of two words, the lower or the upper halves.
__device__ inline unsigned low(unsigned x, unsigned y) { return (x & 0xffff) | y << 16; }
__device__ inline unsigned high(unsigned x, unsigned y) { return x >> 16 | (y & 0xffff0000); }

// E4M3 codes of the lower halves of x and y, then of the upper halves: the order in the KV cache, see
// rope_and_cache, if x and y are numbers i, i + 1 and i + h/2, i + 1 + h/2 of a head.
__device__ inline unsigned pack_codes(unsigned x, unsigned y) {
    const unsigned upper = pack_e4m3x2(unpack(x).b, unpack(y).b);
    return pack_e4m3x2(unpack(x).a, unpack(y).a) | upper << 16;
}

template <bool SYSTEM = false> __device__ inline void publish(void* p, unsigned word) {
    word = word ? word : MINUS_ZEROS;    // a word of 0 would never arrive: 0 means "not yet written"
    if constexpr (SYSTEM) store_word_system(static_cast<unsigned*>(p), word);
    else store_word(p, word);
}
__device__ inline void publish(void* p, const Words& v) {
    for (int i = 0; i < 4; ++i) publish(static_cast<unsigned*>(p) + i, v.w[i]);
}
__device__ inline bool missing(const Words& v) { return !v.w[0] || !v.w[1] || !v.w[2] || !v.w[3]; }

// Waits until phase number `phase` of an mbarrier is over. Only the parity counts, since nobody is two
// phases behind. (So phase r + 1 means r - 1 as well, and a wait for phase "-1" ends at once.)
__device__ inline void wait(u64* mbarrier, unsigned phase) {
    while (!mbarrier_passed_soon(mbarrier, phase % 2)) relax();
}

struct Endless {    // a wait for words of the own rank, in place of a Patience
    static constexpr bool has_stopped = false;
    __device__ void relax() const { ::relax(); }
};

// A warp reads v[i] from address(i), for every i with wanted(i), until no word is missing. If i is not
// wanted, v[i] becomes -0. While v[0] is missing, a lane asks for v[0] to v[3] only, because polling
// takes bandwidth from the weights. After v[0] has come, all loads are under way together, and a v[i]
// is read again only if a word of v[i] is missing. (SENDERS: v[0] to v[SENDERS - 1] are the first words
// of so many ranks, and each of these ranks may be late.)
template <int SENDERS = 1, int M, class Wanted, class Address, class Wait = Endless>
__device__ inline void take(Words (&v)[M], Wanted wanted, Address address, Wait wait = {}) {
    for (int i = 0; i < M; ++i)
        for (unsigned& w : v[i].w) w = wanted(i) ? 0 : MINUS_ZEROS;
    const auto have_begun = [&] {
        bool have = !missing(v[0]);
        for (int i = 1; i < SENDERS; ++i) have = have && !missing(v[i]);
        return have;
    };
    bool again = true;
    while (again) {
        #pragma unroll
        for (int i = 0; i < M; ++i) {
            const bool asks = missing(v[i]) && (i < larger(4, SENDERS) || have_begun());
            load_words_if<(SENDERS > 1)>(asks, v[i].w, address(i));
        }
        again = false;
        for (int i = 0; i < M; ++i) again |= missing(v[i]);
        again = __any_sync(ALL_LANES, again && !wait.has_stopped);
        if (again) wait.relax();
    }
}

// The sum of word(0), word(1), ... of all ranks, in this order: two bf16.
template <class Word> __device__ inline unsigned sum_over_ranks(Word word) {
    Pair sum = unpack(word(0));
    for (int rank = 1; rank < RANKS; ++rank) {
        const Pair more = unpack(word(rank));
        sum = {sum.a + more.a, sum.b + more.b};
    }
    return pack_bf16x2(sum.a, sum.b);
}

// take() of x or y: v[i] becomes the sum over the ranks. address(i): of rank 0's part. Only a few v[i] are
// read at once, since the parts of all ranks need registers.
constexpr int AT_ONCE = larger(1, 16 / RANKS);
template <int M, class Wanted, class Address>
__device__ inline void take_sums(
        Words (&v)[M], const Step& step, Wanted wanted, Address address, Patience patience) {
    #pragma unroll
    for (int first = 0; first < M; first += AT_ONCE) {
        Words got[AT_ONCE * RANKS];
        const auto is_wanted = [&](int i) { return first + i / RANKS < M && wanted(first + i / RANKS); };
        const auto part = [&](int i) {
            return address(first + i / RANKS) + i % RANKS * step.sequences * HIDDEN;
        };
        take<RANKS>(got, is_wanted, part, patience);
        for (int i = 0; i < AT_ONCE && first + i < M; ++i)
            for (int j = 0; j < 4; ++j)
                v[first + i].w[j] = sum_over_ranks([&](int rank) { return got[RANKS * i + rank].w[j]; });
    }
}

// ---- The forward pass ---------------------------------------------------------------------------
// Producer, consumers and reducers walk through the same operations: role.product<P>(layer) and
// role.attention(layer) do the role's share of each unit of the operation that the thread block has
// drawn, and role.next() goes on to the next of these units (a reducer: to the next but one, its own).
struct Role {
    Shared& shared;
    const Step& step;
    int lane;
    int ticket = -1;       // of the next unit; from `end` on: the unit belongs to a later operation
    unsigned units = 0;    // the number of the next unit, among those of the thread block
    int begin = 0;         // the operation's tickets: begin .. end - 1
    int end = 0;
    __device__ auto patience() {
        if constexpr (RANKS == 1) return Endless{};
        else return Patience{step.addresses + RANKS, shared.has_stopped};
    }
    __device__ unsigned place() const { return units % PENDING; }
    __device__ void enter(int count) {    // an operation of so many units
        begin = end;
        end += count;
    }
    __device__ bool has_many() const { return step.sequences > FEW_SEQUENCES; }
};

template <class AnyRole> __device__ void forward(AnyRole&& role) {
    const int layers = role.step.layers;
    role.next();
    for (int layer = 0; layer < layers; ++layer) {
        // y = x + attention(norm(x) @ qkv) @ o
        role.template product<QKV_PRODUCT>(layer);
        role.attention(layer);
        role.template product<O_PRODUCT>(layer);
        // next x = y + (silu(norm(y) @ gate) * (norm(y) @ up)) @ down
        role.template product<GATE_UP_PRODUCT>(layer);
        if constexpr (SPLITS_DOWN) {
            if (role.has_many()) {
                // z = y + left half of h @ left half of down, next x = z + the same of the right halves
                for (int side = 0; side < 2; ++side) role.template product<HALF_DOWN_PRODUCT>(layer, side);
                continue;
            }
        }
        role.template product<DOWN_PRODUCT>(layer);
    }
    role.template product<HEAD_PRODUCT>(layers);    // logits = norm(x) @ head
}

// ---- Splits: the units of attention -------------------------------------------------------------
// Of a sequence. share: the keys of each split but the last. A sequence that only pads the batch has no
// keys, and a count of 0.
struct Splits { int share, count; };
__device__ inline Splits splits_of(int keys, int most) {
    constexpr int STEP = STAGE_KEYS;
    const int share = max(SPLIT_KEYS, (keys + STEP * most - 1) / (STEP * most) * STEP);
    return {share, (keys + share - 1) / share};
}

struct Split {       // the keys begin .. end - 1 of a sequence, for one kv head
    int sequence, kv_head, number, begin, end;
    bool is_last;    // has the new token's key
};
__device__ inline Split find_split(const Shared& shared, const Step& step, int unit) {
    int s = 0;
    Splits splits = splits_of(shared.keys[s], step.splits);
    while (unit >= NUM_KV_HEADS * splits.count) {
        unit -= NUM_KV_HEADS * splits.count;
        ++s;
        splits = splits_of(shared.keys[s], step.splits);
    }
    const int number = unit / NUM_KV_HEADS;
    const int begin = number * splits.share;
    const int end = min(shared.keys[s], begin + splits.share);
    return {s, unit % NUM_KV_HEADS, number, begin, end, end == shared.keys[s]};
}

struct Output {    // of attention over some keys: 8 of a head's numbers, l times too large
    float m = -INF;    // the greatest score. (Of a partial: the logsumexp, with an l of 1.)
    float l = 0;       // the sum of 2^(score - m)
    Float8 numbers = {};
    // Adds the attention over other keys. Hazard: without keys, m and other_m are both -inf, and
    // 2^(-inf - -inf) would be NaN. So the factor of the greater m is 1 without a subtraction.
    __device__ void add(float other_m, float other_l, const Float8& other) {
        const float highest = fmaxf(m, other_m);
        const float factor = m == highest ? 1 : exp2_approx(m - highest);
        const float other_factor = other_m == highest ? 1 : exp2_approx(other_m - highest);
        for (int i = 0; i < 8; ++i) numbers.v[i] = numbers.v[i] * factor + other.v[i] * other_factor;
        l = l * factor + other_l * other_factor;
        m = highest;
    }
    // The attention itself. A sequence that only pads the batch has no keys: l is 0, and so are the words.
    // (A key of NaN makes l NaN, and the words. As a code, NaN is 480: see rope_and_cache.)
    __device__ Words words() const {
        Words words;
        for (int i = 0; i < 4; ++i)
            words.w[i] = l == 0 ? 0 : pack_bf16x2(numbers.v[2 * i] / l, numbers.v[2 * i + 1] / l);
        return words;
    }
};

// ---- The producer -------------------------------------------------------------------------------
struct Producer : Role {
    int drawn = blockIdx.x;    // the next ticket, in lane 0: at first the thread block's own number
    unsigned filled = 0;       // stages so far
    unsigned issued = 0;       // pieces so far
    unsigned landed = 0;       // pieces that have come

    __device__ void next() {
        ticket = __shfl_sync(ALL_LANES, drawn, 0);
        // The counter takes as long to answer as a unit takes to copy, so the answer is for the next draw.
        if (lane == 0) drawn = gridDim.x + atomicAdd(step.counter, 1);
    }
    // Hands the ticket to consumers and reducers. The unit's first stage is the next stage.
    __device__ void announce() {
        wait(&shared.sums_empty[place()], units / PENDING + 1);    // nobody needs the ticket in this place,
        wait_for_stage();                                          // nor the stage
        if (lane == 0) shared.tickets[place()] = ticket;
        ++units;
    }
    // Until the consumers have given the next stage back. (In the first round of the ring: at once.)
    // Hazard: a lane that fills the stage lets the other warps go on. These soon end the next phase of
    // each mbarrier that the producer has just waited for, and a lane that looks only then, at a parity,
    // waits for ever. So no lane goes on before all have looked.
    __device__ void wait_for_stage() {
        wait(&shared.empty[filled % STAGES], filled / STAGES + 1);
        __syncwarp();
    }
    __device__ void wait_for_room() {     // until one more piece may be on its way
        const unsigned before = filled - BEHIND;
        u64* empty = &shared.empty[before % STAGES];
        const bool is_busy = filled < BEHIND || mbarrier_passed(empty, before / STAGES % 2);
        while (issued - landed >= (is_busy ? IN_FLIGHT : IN_FLIGHT_WAITING)) {
            wait(&shared.full[landed / 2 % STAGES][landed % 2], landed / 2 / STAGES);
            ++landed;
        }
        ++issued;
    }
    template <Product P> __device__ void product(int layer, int side = 0) {
        using Shape = Shape<P>;
        constexpr int COPIES = Shape::WHOLE == P ? 1 : Shape::PIECE_ROWS;    // half rows do not lie together
        constexpr int BYTES = Shape::PIECE_BYTES / COPIES;
        constexpr int ROW_BYTES = Shape::MATRIX.columns * WEIGHT_BYTES;
        enter(Shape::UNITS);
        const char* matrix = shared.weights[4 * layer + Shape::NUMBER];
        matrix += side * Shape::COLUMNS * WEIGHT_BYTES;
        for (; ticket < end; next()) {
            const char* rows = matrix + (size_t)Shape::row(ticket - begin) * ROW_BYTES;
            announce();
            for (int piece = 0; piece < 2; ++piece) {
                u64* full = &shared.full[filled % STAGES][piece];
                char* target = shared.ring[filled % STAGES][piece];
                wait_for_room();
                if (lane == 0) {
                    mbarrier_expect(full, Shape::PIECE_BYTES);
                    for (int i = 0; i < COPIES; ++i)
                        bulk_copy(target + i * BYTES, rows + i * ROW_BYTES, BYTES, full);
                }
                rows += (size_t)Shape::APART * ROW_BYTES;
            }
            ++filled;
        }
    }
    // Fills stages with the keys and values of up to STAGE_KEYS tokens: each lane copies one page. A lane
    // looks its page for the next stage up before it waits for this stage.
    __device__ void attention(int layer) {
        constexpr int BYTES = KEY_BYTES * BLOCK_SIZE;    // of a head's keys in a page
        enter(shared.attention_units);
        for (; ticket < end; next()) {
            const Split split = find_split(shared, step, ticket - begin);
            const int* block_table = step.block_tables + step.cu_blocks[split.sequence];
            const auto look_up = [&](int first) {
                const int key = first + lane * BLOCK_SIZE;
                return lane < STAGE_KEYS / BLOCK_SIZE && key < split.end ? block_table[key / BLOCK_SIZE] : -1;
            };
            int next_page = look_up(split.begin);
            announce();
            for (int first = split.begin; first < split.end; first += STAGE_KEYS) {
                const int page = next_page;
                next_page = look_up(first + STAGE_KEYS);
                wait_for_stage();
                const int pages = (min(STAGE_KEYS, split.end - first) + BLOCK_SIZE - 1) / BLOCK_SIZE;
                const size_t head = (size_t)page * NUM_KV_HEADS + split.kv_head;
                for (int piece = 0; piece < 2; ++piece) {
                    u64* full = &shared.full[filled % STAGES][piece];
                    wait_for_room();
                    if (lane == 0) mbarrier_expect(full, pages * BYTES);
                    const kv* source = step.cache(layer, piece) + head * BLOCK_SIZE * HEAD_DIM;
                    char* target = shared.ring[filled % STAGES][piece] + lane * BYTES;
                    if (page >= 0) bulk_copy(target, source, BYTES, full);
                }
                ++filled;
            }
        }
    }
    __device__ void run() {
        forward(*this);
        // Consumers and reducers look for their next unit until a ticket past the end comes: one to each
        // reducer, and the first to the consumers.
        for (int i = 0; i < REDUCERS; ++i) announce();
        if (lane < 2) mbarrier_arrive(&shared.full[filled % STAGES][lane]);
    }
};

// ---- The consumers ------------------------------------------------------------------------------
// Lane 4g + t of a warp holds fragments as mma.m16n8k16 wants them, see ptx.h: of A the rows g and
// g + 8, of B column g, of the result the columns 2t and 2t + 1 of rows g and g + 8.

// A consumer's attention: the G queries of a kv head, and every eighth tile of the split's keys. In
// contrast to paged_attention the second product is transposed, out' = v' p', because so few columns
// are a B: p' has one for each head.
struct Attention {
    static constexpr int KEY_WORDS = HEAD_DIM / 32;      // Words of a query (and of a key, as bf16) in a lane
    static constexpr int VALUE_WORDS = HEAD_DIM / 64;    // Words of a value (as bf16) in a lane
    static constexpr int PUT = FP8_CACHE ? 2 : 1;
    int g;
    int t;
    Words q[KEY_WORDS + PUT];    // Words t, t + 4, ... of head g's query; the last: of the new key or value
    float m = -INF;            // of head g, as in Output
    float l = 0;               // of head g, over this lane's keys only
    // [4c + i][0..1]: number first_number(c, i) of heads 2t and 2t + 1; [4c + i][2..3]: the next number.
    float out[HEAD_DIM / 16][4] = {};

    // Of codes: the even bytes of part g + 8c of a value, eight codes, are numbers from 4 (g + 8c) on, the
    // odd bytes are numbers from h/2 + 4 (g + 8c) on.
    __device__ int first_number(int c, int i) const {
        return FP8_CACHE ? 4 * (g + 8 * c) + i / 2 * 2 + i % 2 * HEAD_DIM / 2 : 8 * (g + 8 * c) + 2 * i;
    }
    // Part i of a stage's key or value number `key`. Beyond the last key any key will do: its
    // probability is 0, and the last value is a number, unlike old bytes of the ring (0 * NaN is NaN).
    template <class Part> __device__ static Part part_of(const char* rows, int key, int count, int i) {
        return reinterpret_cast<const Part*>(rows)[min(key, count - 1) * int(KEY_BYTES / sizeof(Part)) + i];
    }
    // s[n][0..1]: the scores of head g with keys start + 8n + 2t and the key after. [2..3]: nothing.
    __device__ void compute_scores(
            float (&s)[2][4], const char* keys, int start, int count, float query_scale) {
        for (int n = 0; n < 2; ++n) {
            for (int i = 0; i < KEY_BYTES / 64; ++i) {
                const Words k = part_of<Words>(keys, start + 8 * n + g, count, 4 * i + t);
                if constexpr (FP8_CACHE)
                    for (int j = 0; j < 4; ++j) {    // numbers 8 (4i + t) + 2j, and those h/2 further
                        const unsigned a[4] = {q[i].w[j], 0, q[i + KEY_WORDS / 2].w[j], 0};
                        const unsigned b[2] = {unpack_e4m3x2(k.w[j] << 8), unpack_e4m3x2(k.w[j])};
                        mma_m16n8k16_bf16(s[n], a, b, s[n]);
                    }
                else
                    for (int j = 0; j < 4; j += 2) {
                        const unsigned a[4] = {q[i].w[j], 0, q[i].w[j + 1], 0};
                        mma_m16n8k16_bf16(s[n], a, &k.w[j], s[n]);
                    }
            }
            for (int j = 0; j < 2; ++j)
                s[n][j] = start + 8 * n + 2 * t + j < count ? s[n][j] * query_scale : -INF;
        }
    }
    // Scores become probabilities 2^(s - m), with m of all tiles so far, and l and out are scaled to the
    // new m. Hazard: before the first tile m is -inf, and -inf - -inf would be NaN. But `highest` is
    // a number: start < count, so the four lanes of head g have at least the score of key `start`. (A row
    // g >= G has a query of -0 and scores of 0. Scores of NaN alone leave -inf, and NaN is right then.) A
    // consumer without a tile in the split never comes here, and leaves m = -inf to Output::add.
    __device__ void rescale(float (&s)[2][4]) {
        float highest = m;
        for (int n = 0; n < 2; ++n)
            for (int j = 0; j < 2; ++j) highest = fmaxf(highest, s[n][j]);
        for (int distance = 1; distance < 4; distance *= 2)
            highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, distance));
        const float factor = exp2_approx(m - highest);
        const float factor_a = __shfl_sync(ALL_LANES, factor, 4 * (2 * t));        // of head 2t
        const float factor_b = __shfl_sync(ALL_LANES, factor, 4 * (2 * t + 1));    // of head 2t + 1
        m = highest;
        l *= factor;
        for (auto& four : s)
            for (int j = 0; j < 2; ++j) {
                four[j] = exp2_approx(four[j] - m);
                l += four[j];
            }
        for (auto& four : out)
            for (int i = 0; i < 4; ++i) four[i] *= i % 2 ? factor_b : factor_a;
    }
    // out' += v' p'. A row of v' is the same number of all values, but a register has two numbers of one
    // value: low() and high() weave the registers of two keys into two rows of v'.
    __device__ void add_values(const float (&p)[2][4], const char* values, int start, int count) {
        const unsigned b[2] = {pack_bf16x2(p[0][0], p[0][1]), pack_bf16x2(p[1][0], p[1][1])};
        for (int c = 0; c < VALUE_WORDS; ++c) {
            Words v[4];    // of keys 2t, 2t + 1, 2t + 8, 2t + 9
            for (int i = 0; i < 4; ++i) {
                const int key = start + 2 * t + i % 2 + i / 2 * 8;
                if constexpr (FP8_CACHE) {
                    const Words2 codes = part_of<Words2>(values, key, count, g + 8 * c);
                    for (int j = 0; j < 4; ++j)
                        v[i].w[j] = unpack_e4m3x2(j % 2 ? codes.w[j / 2] : codes.w[j / 2] << 8);
                } else {
                    v[i] = part_of<Words>(values, key, count, g + 8 * c);
                }
            }
            for (int i = 0; i < 4; ++i) {
                const unsigned a[4] = {low(v[0].w[i], v[1].w[i]), high(v[0].w[i], v[1].w[i]),
                                       low(v[2].w[i], v[3].w[i]), high(v[2].w[i], v[3].w[i])};
                mma_m16n8k16_bf16(out[4 * c + i], a, b, out[4 * c + i]);
            }
        }
    }
    // A tile: the keys start .. start + 15 of a stage with `count` keys; start < count.
    __device__ void add_tile(const char* keys, const char* values, int start, int count, float query_scale) {
        float s[2][4] = {};
        compute_scores(s, keys, start, count, query_scale);
        rescale(s);
        add_values(s, values, start, count);
    }
    // Writes the results to shared memory, for the reducer.
    __device__ void leave(Pair* sums, Float8 (*heads)[HEAD_DIM / 8]) {
        l = quad_sum(l);
        if (t == 0 && g < GROUP) sums[g] = {m, l};
        for (int j = 0; j < 2 && 2 * t + j < GROUP; ++j) {
            float* head = heads[2 * t + j][0].v;
            for (int c = 0; c < VALUE_WORDS; ++c)
                for (int i = 0; i < 4; ++i)
                    for (int k = 0; k < 2; ++k) head[first_number(c, i) + k] = out[4 * c + i][j + 2 * k];
        }
    }
};

// The x of a product is a matrix [S << SHIFT, SEGMENT] here: a row is one part of one sequence's x.
template <int MOST> struct Consumer : Role {    // for up to MOST sequences
    int warp;
    unsigned stage = 0;
    unsigned round = 0;    // of the ring
    int g = lane / 4;
    int t = lane % 4;
    int r = g % 2 * 4 + g / 2;    // of eight rows of x, the row that is row g of A: see read_input
    template <Product P> static constexpr int ROW_TILES = ((MOST << Shape<P>::SHIFT) + 7) / 8;    // of 8 rows
    // As in Role, but a constant: else the code for a whole wide h of all sequences would be compiled, too.
    __device__ static constexpr bool has_many() { return MOST > FEW_SEQUENCES; }

    __device__ void wait_for_stage() {
        for (u64& full : shared.full[stage]) wait(&full, round);
    }
    // Gives the stage back to the producer, whose next copy overwrites the stage. Hazard: the arrival at the
    // mbarrier can overtake loads from shared memory. (An arrival behind __syncwarp() alone left NaN in the
    // logits after some 30 steps of eight sequences, with FP8 weights on two H200.) So a vote decides whether
    // lane 0 or lane 1 arrives, and the vote needs `read` of all lanes, which a lane must compute from
    // everything that the lane has loaded: no lane can vote before its loads are done.
    __device__ void give_back(unsigned read) {
        if (lane == __any_sync(ALL_LANES, read == 1)) mbarrier_arrive(&shared.empty[stage]);
        if (++stage == STAGES) {
            stage = 0;
            ++round;
        }
    }
    __device__ void next() {    // waits for the next unit
        wait_for_stage();
        ticket = shared.tickets[place()];
    }
    // racecheck reports sums and squares, written before and read behind this mbarrier (RAW). The reports
    // are wrong: the tool credits an arrival to the lane that arrives, not to the lanes that __syncwarp()
    // has ordered before it. A kernel of this pattern alone gets the same reports, and none if every
    // lane arrives (compute-sanitizer 2025.3.1).
    __device__ void finish_unit() {
        __syncwarp();    // all lanes have written their sums
        if (lane == 0) mbarrier_arrive(&shared.sums_full[place()]);
        ++units;
    }
    __device__ Pair* my_sums() { return shared.sums[place()][warp]; }

    // Where in a segment Words i and i + 1 (i even) of a lane lie: in 64 columns of this consumer.
    template <Product P> __device__ int column(int i) const {
        return WARP_COLUMNS * (CONSUMERS * (i % Shape<P>::N / 2) + warp);
    }
    // Moves this consumer's columns of a unit into registers and gives the stage back. Of B, lane 4g + t
    // has column g: segment g / 2 of piece g % 2. So the columns 2t and 2t + 1 of the result belong to
    // segment t of piece 0 and to segment t of piece 1, its partner. (Of a second tile: segment t + 4.)
    template <Product P, int M> __device__ void load_weights(Words (&w)[M]) {
        using Shape = Shape<P>;
        constexpr int IN_WORDS = 16 / WEIGHT_BYTES;
        constexpr int IN_LANE = WARP_COLUMNS / IN_WORDS / 4;    // Words of 64 columns in a lane
        const Words* piece = reinterpret_cast<const Words*>(shared.ring[stage][g % 2]);
        const Words* mine = piece + g / 2 * (Shape::SEGMENT / IN_WORDS) + 4 * IN_LANE * warp + t;
        unsigned read = 0;
        for (int i = 0; i < M; ++i) {
            const Words* tile = mine + i / Shape::W * SEGMENTS * (Shape::SEGMENT / IN_WORDS);
            w[i] = tile[4 * IN_LANE * CONSUMERS * (i % Shape::W / IN_LANE) + 4 * (i % IN_LANE)];
            read ^= w[i].w[0];
        }
        give_back(read);
    }
    // Reads this consumer's columns of x: a lane gets, of every eighth row r, r + 8, ..., the columns that
    // it has of the weights: 8t .. 8t + 7 of each 32 (of codes: 16t .. 16t + 15 of each 64). Eight lanes
    // read 128 bytes of a row together, since the L2 cache delivers 128 bytes faster than twice 64. Then
    // lanes 8i + j and 8i + j + 4 swap: the first gets both halves of row i, the second both halves of
    // row i + 4. Hence the order of rows in r.
    __device__ int columns_to_read() const { return FP8_WEIGHTS ? 16 * t + 8 * (g % 2) : 8 * (lane % 8); }
    __device__ int columns_of(int i) const {    // of x[i], behind column(i)
        return FP8_WEIGHTS ? 16 * t + 8 * (i % 2) : 32 * (i % 2) + 8 * t;
    }
    template <Product P, int M> __device__ void read_input(int layer, int side, Words (&x)[M]) {
        using Shape = Shape<P>;
        const Vectors v(step, layer);
        const bf16* const inputs[] = {v.x, v.attention, v.y, v.h, v.x};
        const bf16* in = inputs[Shape::WHOLE] + side * Shape::COLUMNS;
        constexpr int OTHERS = Shape::MATRIX.columns - Shape::COLUMNS;    // columns of the other half
        const auto row = [&](int i) { return 8 * (i / Shape::N) + 4 * (i % 2) + lane / 8; };
        const auto wanted = [&](int i) { return row(i) < step.sequences << Shape::SHIFT; };
        const auto address = [&](int i) {
            const bf16* part = in + row(i) * Shape::SEGMENT + (row(i) >> Shape::SHIFT) * OTHERS;
            return part + column<P>(i) + columns_to_read();
        };
        if constexpr (RANKS > 1 && Shape::NORMED) take_sums(x, step, wanted, address, this->patience());
        else take(x, wanted, address);
        for (int i = 0; i < M; i += 2)
            for (int j = 0; j < 4; ++j) {
                unsigned& a = x[i].w[j];
                unsigned& b = x[i + 1].w[j];
                const unsigned other = __shfl_xor_sync(ALL_LANES, g % 2 ? a : b, 4);
                (g % 2 ? a : b) = other;
            }
    }
    // For the norm: the sum of x^2 over this consumer's columns, of each row. These sums are the
    // diagonal of the product of x and x'.
    template <Product P, int M> __device__ void sum_squares(const Words (&x)[M]) {
        constexpr int N = Shape<P>::N;
        for (int tile = 0; tile < M / N; ++tile) {
            float sum[4][4] = {};
            for (int i = 0; i < 2 * N; ++i) {
                const unsigned* two = x[tile * N + i / 2].w + i % 2 * 2;
                const unsigned a[4] = {two[0], 0, two[1], 0};
                mma_m16n8k16_bf16(sum[i % 4], a, two, sum[i % 4]);
            }
            const float even = sum[0][0] + sum[1][0] + (sum[2][0] + sum[3][0]);
            const float odd = sum[0][1] + sum[1][1] + (sum[2][1] + sum[3][1]);
            if (t == g / 2) shared.squares[warp][8 * tile + r] = g % 2 ? odd : even;    // row g, column g
        }
    }
    // The weight of the last norm. (The matrices contain the weights of all other norms.)
    template <int M> __device__ void apply_last_norm(Words (&x)[M]) {
        using Shape = Shape<HEAD_PRODUCT>;
        const int part = r % (1 << Shape::SHIFT);
        for (int i = 0; i < M; ++i) {
            const int first = part * Shape::SEGMENT + column<HEAD_PRODUCT>(i) + columns_of(i);
            const Float8 norm = to_float(vec8(step.norm + first));
            for (int j = 0; j < 4; ++j) {
                const Pair two = unpack(x[i].w[j]);
                x[i].w[j] = pack_bf16x2(norm.v[2 * j] * two.a, norm.v[2 * j + 1] * two.b);
            }
        }
    }
    // Words of x become fragments of A: the first half of the eight columns in row g, the second half in
    // row g + 8. An mma with the first half of the weights computes the product in rows 0 to 7 of the
    // result, an mma with the second half in rows 8 to 15; multiply() ignores the other eight rows.
    // With codes, x and the weights are f16 in the product: one instruction makes f16 of two codes. x has
    // not been normed, so x is divided by F16_SCALE, lest it exceed the range of f16.
    // Hazard for speed: the compiler does not know that sequences >> 8 is 0. Without the xor it would
    // reorder again for every mma.
    template <int M> __device__ void order_for_mma(Words (&x)[M]) {
        const unsigned zero = step.sequences >> 8;
        #pragma unroll
        for (Words& v : x) {
            v = {{v.w[0] ^ zero, v.w[2] ^ zero, v.w[1] ^ zero, v.w[3] ^ zero}};
            if constexpr (FP8_WEIGHTS)
                for (unsigned& w : v.w) w = pack_f16x2(unpack(w).a / F16_SCALE, unpack(w).b / F16_SCALE);
        }
    }
    // sum += the product of x[i / 2] and number i of a column tile's B.
    __device__ static void add_product(float (&sum)[4], const Words& x, const Words* w, int i) {
        if constexpr (FP8_WEIGHTS) {
            const unsigned codes = w[i / 4].w[i % 4];
            const unsigned b[2] = {e4m3x2_to_f16x2(codes), e4m3x2_to_f16x2(codes >> 16)};
            mma_m16n8k16_f16(sum, x.w, b, sum);
        } else {
            mma_m16n8k16_bf16(sum, x.w, w[i / 2].w + i % 2 * 2, sum);
        }
    }
    // TOGETHER: tiles of x that share a fragment of B, so that codes become f16 only once.
    template <Product P, int M, int COUNT>
    __device__ void multiply(const Words (&x)[M], const Words (&w)[COUNT]) {
        constexpr int SHIFT = Shape<P>::SHIFT;
        constexpr int N = Shape<P>::N;
        constexpr int TOGETHER = FP8_WEIGHTS && M / N % 2 == 0 ? 2 : 1;
        constexpr int CHAINS = 4 / TOGETHER;    // since an mma waits for the mma before in the chain
        for (int column_tile = 0; column_tile < Shape<P>::TILES; ++column_tile)
            for (int first = 0; first < M / N; first += TOGETHER) {
                if (8 * first >= step.sequences << SHIFT) break;
                float sums[TOGETHER][CHAINS][4] = {};
                for (int i = 0; i < 2 * N; ++i)
                    for (int k = 0; k < TOGETHER; ++k)
                        add_product(sums[k][i % CHAINS], x[(first + k) * N + i / 2],
                                    w + column_tile * Shape<P>::W, i);
                for (int k = 0; k < TOGETHER; ++k) {
                    const auto& sum = sums[k];
                    const int row = 8 * (first + k) + r;
                    const int sequence = row >> SHIFT;
                    const bool is_same_part = (row ^ t) % (1 << SHIFT) == 0;    // of x's row and of segment t
                    if (!is_same_part || sequence >= MOST) continue;
                    Pair even = {sum[0][0], sum[0][1]};    // of the mma whose result is in rows 0 to 7
                    Pair odd = {sum[1][2], sum[1][3]};
                    for (int chain = 2; chain < CHAINS; chain += 2) {
                        even = {even.a + sum[chain][0], even.b + sum[chain][1]};
                        odd = {odd.a + sum[chain + 1][2], odd.b + sum[chain + 1][3]};
                    }
                    my_sums()[SEGMENTS * (MOST_SEQUENCES * column_tile + sequence) + t] =
                        {even.a + odd.a, even.b + odd.b};
                }
            }
        finish_unit();
    }
    template <Product P> __device__ void product(int layer, int side = 0) {
        enter(Shape<P>::UNITS);
        if (ticket >= end) return;
        Words w[Shape<P>::TILES * Shape<P>::W];
        Words x[ROW_TILES<P> * Shape<P>::N];
        load_weights<P>(w);    // the first unit's weights need not wait for x
        read_input<P>(layer, side, x);
        if constexpr (Shape<P>::NORMED) sum_squares<P>(x);
        if constexpr (P == HEAD_PRODUCT) apply_last_norm(x);
        order_for_mma(x);
        multiply<P>(x, w);
        for (next(); ticket < end; next()) {
            load_weights<P>(w);
            multiply<P>(x, w);
        }
    }
    __device__ void attention(int layer) {
        enter(shared.attention_units);
        const Vectors v(step, layer);
        for (; ticket < end; next()) attend(v, find_split(shared, step, ticket - begin));
    }
    __device__ void attend(const Vectors& v, const Split& split) {
        // The new token's key and value may not be in the cache yet. The consumer whose tile has the new
        // key puts both into the ring, in the place of what came from the cache; a lane puts one Words.
        constexpr int KEY_WORDS = Attention::KEY_WORDS;
        constexpr int PARTS = KEY_BYTES / 16;
        const bf16* token = v.qkv + split.sequence * QKV;    // the new token's queries, keys, values
        const bf16* query = token + (split.kv_head * GROUP + g) * HEAD_DIM;
        const bf16* key = token + (NUM_HEADS + split.kv_head) * HEAD_DIM;
        const int piece = lane / PARTS;    // 0: the key, 1: the value
        const int part = lane % PARTS;
        const bf16* put = key + piece * NUM_KV_HEADS * HEAD_DIM + 8 * part;
        const bool has_new_key = split.is_last && (split.end - 1 - split.begin) / TILE % CONSUMERS == warp;
        const bool puts = has_new_key && piece < 2;
        Attention attention = {g, t};
        take(attention.q, [&](int i) { return i < KEY_WORDS ? g < GROUP : puts; },
             [&](int i) {
                 return i < KEY_WORDS ? query + 32 * i + 8 * t : put + (i - KEY_WORDS) * HEAD_DIM / 2;
             });
        int at = split.begin + TILE * warp;    // the next tile of this consumer
        for (int first = split.begin; first < split.end; first += STAGE_KEYS) {
            wait_for_stage();
            auto& [keys, values] = shared.ring[stage];
            const int count = min(STAGE_KEYS, split.end - first);
            if (puts && first + count == split.end) {
                Words* rows = reinterpret_cast<Words*>(shared.ring[stage][piece]);
                Words words = attention.q[KEY_WORDS];
                if constexpr (FP8_CACHE)    // 8 numbers, and the 8 numbers h/2 further
                    for (int i = 0; i < 4; ++i)
                        words.w[i] = pack_codes(words.w[i], attention.q[KEY_WORDS + 1].w[i]);
                rows[(count - 1) * PARTS + part] = words;
                fence_async_proxy();    // a later copy into this stage must not be overtaken by this write
            }
            __syncwarp();    // all Words are put before a lane reads; no other warp reads this tile
            for (; at < first + count; at += TILE * CONSUMERS)
                attention.add_tile(keys, values, at - first, count, step.query_scale);
            // Every loaded key and value has a part in these two numbers.
            give_back(__float_as_uint(attention.out[0][0] + attention.out[HEAD_DIM / 16 - 1][0]));
        }
        // `heads` has room for one unit: a reducer must be done with the unit before (as it was with the unit
        // before that, when that unit's heads were written). Unit "-1" passes, see wait().
        wait(&shared.sums_empty[(units - 1) % PENDING], (units - 1) / PENDING);
        attention.leave(my_sums(), shared.heads[warp]);
        finish_unit();
    }
};

// ---- The reducers -------------------------------------------------------------------------------
// Lane 4s + t has two sums of sequence s: of segment t of piece 0 and of the partner, segment t of piece
// 1. Where a row has several parts, the lanes of all parts get the row's sum, and the lane of part 0
// writes. A lane beyond the sequences adds up whatever there is, and writes nothing.
struct Reducer : Role {
    int s = min(lane / SEGMENTS, step.sequences - 1);
    int t = lane % SEGMENTS;

    // Waits for the next ticket. Tickets grow: a ticket that is not greater than the last is an old one.
    __device__ void next() {
        const int old = ticket;
        const volatile int& latest = shared.tickets[place()];
        for (ticket = latest; ticket <= old; ticket = latest) relax();
    }
    __device__ void wait_for_sums() { wait(&shared.sums_full[place()], units / PENDING); }
    __device__ void finish_unit() {
        __syncwarp();    // all lanes have read the sums, and have used the numbers
        if (lane == 0) mbarrier_arrive(&shared.sums_empty[place()]);
        units += REDUCERS;
    }
    // Over the consumers, then over the row's parts.
    template <int SHIFT> __device__ Pair sum(int tile) const {
        Pair sum = {0, 0};
        for (int warp = 0; warp < CONSUMERS; ++warp) {
            const Pair p = shared.sums[place()][warp][MOST_SEQUENCES * SEGMENTS * tile + lane];
            sum = {sum.a + p.a, sum.b + p.b};
        }
        for (int i = 0; i < SHIFT; ++i) {
            sum.a += __shfl_xor_sync(ALL_LANES, sum.a, 1 << i);
            sum.b += __shfl_xor_sync(ALL_LANES, sum.b, 1 << i);
        }
        return sum;
    }
    template <int SHIFT> __device__ float inverse_rms() const {    // of the product's x
        float squares = 0;
        for (int part = 0; part < 1 << SHIFT; ++part)
            for (int warp = t; warp < CONSUMERS; warp += 4)
                squares += shared.squares[warp][(s << SHIFT) + part];
        return rsqrtf(quad_sum(squares) / HIDDEN + RMS_EPS);
    }
    struct Loaded {    // for a row and its partner; old: the residual at the lane's word
        unsigned old[RANKS] = {};
        Pair angle = {1, 0};
        Pair bias = {0, 0};
        Pair scale;
    };
    template <Product P> __device__ void product(int layer, int side = 0) {
        using Shape = Shape<P>;
        constexpr bool ADDS = P == O_PRODUCT || Shape::WHOLE == DOWN_PRODUCT;    // to a residual
        enter(Shape::UNITS);
        if (ticket >= end) return;
        const Vectors v(step, layer);
        const int own_row = RANKS == 1 ? s : step.rank * step.sequences + s;    // of x or y
        bf16* const outputs[] = {v.qkv + s * QKV, v.y + own_row * HIDDEN, v.h + s * FFN,
                                 Vectors(step, layer + 1).x + own_row * HIDDEN,
                                 step.logits + (size_t)s * (VOCAB / RANKS)};
        bf16* out = P == HALF_DOWN_PRODUCT && side == 0 ? v.z + s * HIDDEN : outputs[Shape::WHOLE];
        // Rank 0 adds the residual to its partial sum, so the sum over the ranks has the residual once.
        const bool adds = ADDS && (RANKS == 1 || step.rank == 0);
        const bf16* residual = (P == O_PRODUCT ? v.x : side == 1 ? v.z : v.y) + s * HIDDEN;
        const float* angles = step.cos_sin + (size_t)step.positions[s] * HEAD_DIM;
        // A word is two neighbouring rows, but a lane has row r of the unit and the partner. So two lanes
        // swap: the lane of an even r gets rows r and r + 1, the lane of an odd r gets the partners of
        // rows r - 1 and r. A gate row and an up row make one number of h: there two lanes make one word.
        const int distance = 1 << Shape::SHIFT;    // lanes from row r to row r + 1
        const int r = t / distance;
        const bool is_odd = r % 2;
        const int at = is_odd ? Shape::APART + r - 1 : r;    // of the word, after the unit's first row
        const bool has_word = !(P == GATE_UP_PRODUCT && is_odd);
        const bool writes = lane / SEGMENTS < step.sequences && t % distance == 0 && has_word;
        float norm = 0;
        const float* scales = nullptr;
        if constexpr (FP8_WEIGHTS)
            scales = reinterpret_cast<const float*>(step.scales[4 * layer + Shape::NUMBER]);
        for (; ticket < end; next()) {
            const int first = Shape::row(ticket - begin);
            Loaded loaded[Shape::TILES];    // before the sums are there
            for (int tile = 0; tile < Shape::TILES; ++tile) {
                auto& [old, angle, bias, scale] = loaded[tile];
                const int row = first + SEGMENTS * tile;
                const bf16* old_word = residual + row + at;
                for (int rank = 0; rank < RANKS && adds; ++rank) old[rank] = load_partial(old_word, rank);
                const float* turn = angles + row % HEAD_DIM + r;    // cosine; HEAD_DIM / 2 further: sine
                if (P == QKV_PRODUCT) angle = {turn[0], turn[HEAD_DIM / 2]};
                const bf16* two = step.biases + layer * QKV + row + r;
                if constexpr (QKV_BIAS && P == QKV_PRODUCT)
                    bias = {__bfloat162float(two[0]), __bfloat162float(two[Shape::APART])};
                if constexpr (FP8_WEIGHTS)
                    scale = {F16_SCALE * scales[row + r], F16_SCALE * scales[row + r + Shape::APART]};
            }
            wait_for_sums();
            if (Shape::NORMED && norm == 0) norm = inverse_rms<Shape::SHIFT>();
            Pair sums[Shape::TILES];
            for (int tile = 0; tile < Shape::TILES; ++tile) sums[tile] = sum<Shape::SHIFT>(tile);
            for (int tile = 0; tile < Shape::TILES; ++tile) {
                auto& [old, angle, bias, scale] = loaded[tile];
                const int row = first + SEGMENTS * tile;
                Pair x = sums[tile];
                if constexpr (FP8_WEIGHTS) x = {x.a * scale.a, x.b * scale.b};
                if (Shape::NORMED) x = {x.a * norm, x.b * norm};
                if constexpr (QKV_BIAS && P == QKV_PRODUCT) x = {x.a + bias.a, x.b + bias.b};
                // Values are not turned.
                if (P == QKV_PRODUCT && row < (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM)
                    x = {x.a * angle.a - x.b * angle.b, x.b * angle.a + x.a * angle.b};
                const bool is_cached = P == QKV_PRODUCT && writes && row >= HEADS;
                if constexpr (FP8_CACHE)
                    if (is_cached) put_into_cache(pack_bf16x2(x.a, x.b), layer, row + r);
                x = neighbours<P>(x, is_odd);
                if (adds) x = with_residual(x, old, residual + row + at);
                const unsigned word = pack_bf16x2(x.a, x.b);
                if constexpr (ADDS && RANKS > 1) {
                    if (writes) publish_to_ranks(out + row + at, word);
                } else if (writes) publish(out + row + at, word);
                if constexpr (!FP8_CACHE)
                    if (is_cached) put_into_cache(word, layer, row + at);
            }
            finish_unit();
        }
    }
    // A rank's part of a word of x or y. p: where the part of rank 0 lies.
    __device__ unsigned load_partial(const bf16* p, int rank) const {
        return *reinterpret_cast<const volatile unsigned*>(p + rank * step.sequences * HIDDEN);
    }
    __device__ Pair with_residual(Pair x, unsigned (&old)[RANKS], const bf16* old_word) {
        // The residual may still be on its way: x and y have been published, since the sum depends on them;
        // z comes from a unit with a smaller ticket.
        auto wait = this->patience();
        for (int rank = 0; rank < RANKS; ++rank)
            while (old[rank] == 0 && !wait.has_stopped) {
                wait.relax();
                old[rank] = load_partial(old_word, rank);
            }
        unsigned sum = old[0];
        if constexpr (RANKS > 1) sum = sum_over_ranks([&](int rank) { return old[rank]; });
        return {x.a + unpack(sum).a, x.b + unpack(sum).b};
    }
    // p: in the words of the own rank. The other ranks come first, since they are farther away.
    __device__ void publish_to_ranks(bf16* p, unsigned word) const {
        for (int i = 1; i <= RANKS; ++i) {
            const int rank = (step.rank + i) % RANKS;
            const u64 distance = shared.addresses[rank] - shared.addresses[step.rank];
            publish<true>(reinterpret_cast<char*>(p) + distance, word);
        }
    }
    // From a row and its partner to the two rows of a lane's word.
    template <Product P> __device__ static Pair neighbours(Pair x, bool is_odd) {
        constexpr int SHIFT = Shape<P>::SHIFT;
        if constexpr (P == GATE_UP_PRODUCT) {
            x.a = silu(x.a) * x.b;
            x.b = __shfl_xor_sync(ALL_LANES, x.a, 1 << SHIFT);
        } else if constexpr (SHIFT < 2) {    // else piece 0 is one row, and the partner is the next row
            const float other = __shfl_xor_sync(ALL_LANES, is_odd ? x.a : x.b, 1 << SHIFT);
            (is_odd ? x.a : x.b) = other;
        }
        return x;
    }
    // For later steps: keys and values go to the new token's slot of the KV cache. word: rows `row` and
    // row + 1 of qkv; for codes, `row` and the partner, which are neighbours in the cache.
    __device__ void put_into_cache(unsigned word, int layer, int row) const {
        const int head = row / HEAD_DIM - NUM_HEADS;    // K heads of keys, then K heads of values
        const long long slot = step.slot_mapping[s];
        if (slot < 0) return;                           // a sequence that only pads the batch
        const long long page = slot / BLOCK_SIZE;
        kv* cache = step.cache(layer, head / NUM_KV_HEADS);
        cache += ((page * NUM_KV_HEADS + head % NUM_KV_HEADS) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM;
        if constexpr (FP8_CACHE) {
            const unsigned short codes = pack_e4m3x2(unpack(word).a, unpack(word).b);
            reinterpret_cast<unsigned short*>(cache)[row % HEAD_DIM] = codes;
        } else {
            store_word(cache + row % HEAD_DIM, word);
        }
    }
    // Of a unit of attention: adds up the outputs of the consumers, who had different keys. A lane has 8
    // numbers of a head. If the unit has all keys of the sequence, the output is final; else it is a
    // partial, for the merger.
    __device__ void attention(int layer) {
        const Vectors v(step, layer);
        enter(shared.attention_units);
        for (; ticket < end; next()) {
            const Split split = find_split(shared, step, ticket - begin);
            const auto& sums = shared.sums[place()];
            wait_for_sums();
            for (int i = lane; i < GROUP * HEAD_DIM / 8; i += 32) {
                const int head = i / (HEAD_DIM / 8);
                const int eight = i % (HEAD_DIM / 8);
                Output out;
                for (int warp = 0; warp < CONSUMERS; ++warp)
                    out.add(sums[warp][head].a, sums[warp][head].b, shared.heads[warp][head][eight]);
                const int row = split.sequence * NUM_HEADS + split.kv_head * GROUP + head;
                unsigned* partial = v.partial + (row * step.splits + split.number) * PARTIAL;
                const bool has_all_keys = split.is_last && split.number == 0;
                void* target = partial + 4 * eight;
                if (has_all_keys) target = v.attention + row * HEAD_DIM + 8 * eight;
                publish(target, out.words());
                const unsigned lse = __float_as_uint(out.m + log2f(out.l));
                if (eight == 0 && !has_all_keys) publish(partial + HEAD_DIM / 2, {{lse, lse, lse, lse}});
            }
            finish_unit();
        }
    }
};

// ---- Several ranks: two sets of words -----------------------------------------------------------
// Each rank has two sets of words. Steps use the sets in turn:
//     [TICKET_WORDS: the set of this step, 0 or 1; the number of thread blocks that have begun this step]
//     set 0, set 1: [TICKET_WORDS: the counter of tickets; the number of words that a step has used], Vectors
// At first all words are 0, and all ranks run the same steps, so the ranks agree on the set. In step n
// the merger clears the other set, the set of step n - 1 and of step n + 1. No word gets lost:
//   - All words of step n - 1 have come. For each product a thread block of this rank has drawn a unit,
//     and the consumers of this thread block have read the whole x of the product.
//   - No word of step n + 1 can come yet. Before step n + 1 another rank runs all_gather of step n, which
//     waits for this rank's all_gather, which begins when this kernel has ended.
// The number of the set is data, since a CUDA graph repeats the arguments of its kernels.
__device__ inline int* set_of(int* words, int number) {
    return words + DECODE_TICKET_WORDS + number * SET_WORDS;
}

// Called by a thread of each thread block when all threads have read words[0]. The last one turns over.
__device__ inline void turn_over(int* words, const Step& step) {
    auto* begun = reinterpret_cast<unsigned*>(words + 1);
    if (atomic_inc_acq_rel(begun, gridDim.x - 1) != gridDim.x - 1) return;
    words[0] = 1 - words[0];
    step.counter[1] = (step.layers + 1) * step.vectors_size();
}

// The work of one of `threads` threads, number `thread`.
__device__ inline void clear_words(int* set, int thread, int threads) {
    Words* vectors = reinterpret_cast<Words*>(set + DECODE_TICKET_WORDS);
    for (int i = thread; i < set[1] / 4; i += threads) vectors[i] = {};
    if (thread == 0) set[0] = 0;
}

// ---- The merger ---------------------------------------------------------------------------------
// One warp merges the splits of one head of one sequence: 8 * width numbers of the output, number
// `slice` of such slices. width lanes have a split, 8 numbers each, so the lanes have 32 / width splits
// at a time.   row: sequence * H + head.
constexpr int MERGE_ROUNDS = 4;    // at most
__device__ void merge(
        const Step& step, int splits, int row, int slice, int width, const Vectors& v, int lane) {
    const int first = 8 * (width * slice + lane % width);
    const unsigned* partial = v.partial + row * step.splits * PARTIAL;
    Output out;
    Words got[2 * MERGE_ROUNDS];    // of a split each: 8 numbers, and the logsumexp
    const auto split = [&](int i) { return (32 * (i / 2) + lane) / width; };
    take(got, [&](int i) { return split(i) < splits; },
         [&](int i) { return partial + split(i) * PARTIAL + (i % 2 ? HEAD_DIM / 2 : first / 2); });
    for (int i = 0; i < 2 * MERGE_ROUNDS; i += 2)
        if (split(i) < splits)
            out.add(__uint_as_float(got[i + 1].w[0]), 1, to_float(reinterpret_cast<const Bf16x8&>(got[i])));
    for (int distance = width; distance < 32; distance *= 2) {
        const auto other = [&](float x) { return __shfl_xor_sync(ALL_LANES, x, distance); };
        Float8 numbers;
        for (int i = 0; i < 8; ++i) numbers.v[i] = other(out.numbers.v[i]);
        const float m = other(out.m);
        const float l = other(out.l);
        out.add(m, l, numbers);
    }
    if (lane < width) publish(v.attention + row * HEAD_DIM + first, out.words());
}

// The mergers of all thread blocks deal the work out among themselves, by number. First the embedding,
// x = embed[token] of layer 0 (with several ranks: a sum, embed[token] + -0 + ...); then, layer by
// layer, the heads of all sequences with several splits; at last, the words of the step before.
// For a sequence that only pads the batch, merge() of 0 splits publishes an attention of 0.
__device__ void merge_all(Shared& shared, const Step& step, int lane) {
    constexpr int EIGHTS = HIDDEN / 8;    // of an embedding
    const int thread = 32 * blockIdx.x + lane;
    const int threads = 32 * gridDim.x;
    for (int i = thread; i < step.sequences * EIGHTS; i += threads) {
        const int id = step.token_ids[i / EIGHTS];
        const int token = id < 0 ? step.sampled[~id] : id;
        if (id < 0 && i % EIGHTS == 0) step.token_ids[i / EIGHTS] = token;    // no hazard: see gather_rows
        const bf16* row = step.embed + (size_t)token * HIDDEN;
        bf16* x = Vectors(step, 0).x + 8 * i;
        publish(x, reinterpret_cast<const Words*>(row)[i % EIGHTS]);
        for (int rank = 1; rank < RANKS; ++rank) publish(x + rank * step.sequences * HIDDEN, Words{});
    }
    __syncwarp();
    // As wide as the number of splits allows, lest there be more items than mergers.
    int width = 32 * MERGE_ROUNDS / DECODE_SPLITS;
    while (2 * width <= min(32 * MERGE_ROUNDS / step.splits, HEAD_DIM / 8)) width *= 2;
    const int slices = HEAD_DIM / 8 / width;
    for (int layer = 0; layer < step.layers; ++layer)
        for (int item = blockIdx.x; item < step.sequences * NUM_HEADS * slices; item += gridDim.x) {
            const int row = item / slices;
            const int splits = splits_of(shared.keys[row / NUM_HEADS], step.splits).count;
            if (splits != 1) merge(step, splits, row, item % slices, width, Vectors(step, layer), lane);
        }
    if constexpr (RANKS > 1) clear_words(step.old_set, thread, threads);
}

// ---- The kernel ---------------------------------------------------------------------------------
__device__ inline void prepare(Shared& shared, const Step& step, const u64* weights) {
    const int me = threadIdx.x;
    if (me < 2 * STAGES) mbarrier_init(&shared.full[me / 2][me % 2], 1);
    if (me < STAGES) mbarrier_init(&shared.empty[me], CONSUMERS);
    if (me < PENDING) {
        mbarrier_init(&shared.sums_full[me], CONSUMERS);
        mbarrier_init(&shared.sums_empty[me], 1);
        shared.tickets[me] = -1;
    }
    if (me <= 4 * step.layers) shared.weights[me] = reinterpret_cast<const char*>(weights[me]);
    if (RANKS > 1 && me < RANKS) shared.addresses[me] = step.addresses[me];
    if (RANKS > 1 && me == 0) shared.has_stopped = false;
    if (me == 0) {
        int units = 0;
        for (int s = 0; s < step.sequences; ++s) {
            shared.keys[s] = step.context_lens[s];
            units += splits_of(shared.keys[s], step.splits).count * NUM_KV_HEADS;
        }
        shared.attention_units = units;
    }
    __syncthreads();    // shared memory is ready before a warp begins
}

extern "C" __global__ __launch_bounds__(DECODE_THREADS, 1) void decode(
        bf16* logits, const bf16* embed, const bf16* norm, int* token_ids, const int* sampled,
        const u64* weights, int layers, const float* cos_sin, const int* positions,
        const long long* slot_mapping, kv* kv_cache, int num_blocks, const int* block_tables,
        const int* cu_blocks, const int* context_lens, float query_scale, int* words, int sequences,
        int splits, const bf16* biases, const u64* scales, const u64* addresses, int rank) {
    if constexpr (FITS) {
        DYNAMIC_SHARED(decode_shared_bytes);
        Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
        int* set = words;
        int* old_set = nullptr;
        if constexpr (RANKS > 1) {
            words = reinterpret_cast<int*>(addresses[rank]);
            const int turn = words[0];
            set = set_of(words, turn);
            old_set = set_of(words, 1 - turn);
        }
        const Step step = {
            logits, embed, norm, biases, scales, token_ids, sampled, layers, cos_sin, positions, slot_mapping,
            kv_cache, num_blocks, block_tables, cu_blocks, context_lens, query_scale,
            reinterpret_cast<unsigned*>(set) + DECODE_TICKET_WORDS, set, sequences, splits,
            addresses, rank, old_set};
        prepare(shared, step, weights);
        if (RANKS > 1 && threadIdx.x == 0) turn_over(words, step);
        const int warp = threadIdx.x / 32;
        const int lane = threadIdx.x % 32;
        if (warp < CONSUMERS) {
            set_registers<CONSUMER_REGISTERS>();
            if (sequences <= 2) forward(Consumer<2>{{shared, step, lane}, warp});
            else if (sequences <= FEW_SEQUENCES) forward(Consumer<FEW_SEQUENCES>{{shared, step, lane}, warp});
            else forward(Consumer<SEQUENCES>{{shared, step, lane}, warp});
        } else {
            set_registers<OTHER_REGISTERS>();
            const int other = warp - CONSUMERS;
            if (other < REDUCERS) forward(Reducer{{shared, step, lane, -1, unsigned(other)}});
            else if (other == REDUCERS) merge_all(shared, step, lane);
            else Producer{{shared, step, lane}}.run();
        }
    }
}
