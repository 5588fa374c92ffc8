// ---------------------------------------------------------------------------------------------------------------------
// decode: a whole step of a few sequences that bring one token each, from the embedding to the logits, in one kernel
//
// So small a batch reads all weights to do next to nothing with each: the step takes as long as the memory needs to
// bring them. With a kernel for each operation the memory idles at every kernel's end and beginning. Here one kernel
// stays for the whole step, a block on each multiprocessor, and weights flow into shared memory whatever waits for what:
//
//     producer    1 warp     draws tickets: the next unit of weights, in the order of the network, goes to whichever
//                            block asks. It copies units into a ring of slots, and runs ahead of those who wait.
//     consumers   8 warps    multiply: each owns some columns of x, and of every row of weights the same columns
//     reducer     1 warp     adds up the consumers' sums, does what follows the product, and publishes the results
//     mergers     2 warps    put together a long context's attention: consumers and reducer of a block do some keys of it
//
// Results get from block to block without a barrier over the grid: `words` are 0 at first, and who needs one reads it
// until it is something else. (A result of 0 is written as -0.) Value and flag are one word, so no order of memory
// accesses matters; each layer has its own words, written once a step, so none can be overwritten too early. Nobody waits
// in a circle: units are drawn in order, and each depends on units before it alone.
//
// A unit is 8 segments of rows, which the consumers multiply by x at once, as B of an mma. A segment is a row, or where
// rows are long a half or a quarter; x is A, with a row for each sequence and part. Half of a unit's rows are the
// partners of the others: the partner of a gate row is its up row, that of a query's or key's row the other half of its
// RoPE pair. So one lane of the reducer gets the sums of both.
//   logits [S, V].   embed [V, D].   norm [D]: the last one's weight; the others' are in the matrices, see rms_norm.
//   token_ids [S]: ~i is number i of sampled, see gather_rows.
//   weights: addresses of qkv, o, gate_up and down of each layer, and of the head.   kv_cache [L, 2, N, K, B, h].
//   words: 4, of which the first counts tickets; then Vectors, L + 1 times. All 0.
//   The other arrays: see rope_and_cache and paged_attention.
//   Grid: a block on each multiprocessor. All must come to be there at once, since they wait for one another.
//   No sum depends on who draws or comes first: the same input gives the same bits.
// ---------------------------------------------------------------------------------------------------------------------
constexpr int MOST_SEQUENCES = 8;
constexpr int CONSUMERS = 8;                     // warps, both
constexpr int MERGERS = 2;
EXPORT(DECODE_THREADS, 32 * (CONSUMERS + MERGERS + 2));    // 2: a reducer and a producer
EXPORT(decode_shared_bytes, 227 * 1024);         // all that a block may have on compute capability 9.0
constexpr int CONSUMER_REGISTERS = 200, OTHER_REGISTERS = 104;    // of a thread: of 168 each, the others hand over some
constexpr int PENDING = 8;                       // tickets that are between producer and reducer at most
constexpr int IN_FLIGHT = 3;                     // pieces (half units) on their way: as few as keep the memory busy,
constexpr int IN_FLIGHT_WAITING = 2;             // fewer if consumers wait: words would queue up behind weights;
constexpr int BEHIND = 2;                        // they do if so many units lie before them
constexpr unsigned ZEROS = 0x80008000;           // two bf16 that are 0, but are not a word that is 0
constexpr int HEADS = NUM_HEADS * HEAD_DIM;
constexpr int PARTIAL = HEAD_DIM / 2 + 4;        // words: a head's output of one split, and four times its logsumexp
// `words` has TICKET_WORDS + (L + 1) S (VECTOR_WORDS + splits PARTIAL_WORDS) words; a context has DECODE_SPLITS / S splits at most.
EXPORT(DECODE_TICKET_WORDS, 4);
EXPORT(DECODE_VECTOR_WORDS, (2 * HIDDEN + QKV + HEADS + FFN) / 2);
EXPORT(DECODE_PARTIAL_WORDS, NUM_HEADS * PARTIAL);
EXPORT(DECODE_SPLITS, 32);

struct alignas(16) Words { unsigned w[4]; };     // 8 bf16 or 4 floats; arrays are registers: all loops over them unroll
struct alignas(8) Pair { float a, b; };

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }    // max() is no constant on a GPU
__device__ constexpr int shift_of(int columns) { return columns <= 2048 ? 0 : columns <= 4096 ? 1 : 2; }

enum Product { QKV_PRODUCT, O_PRODUCT, GATE_UP, DOWN, HEAD };
template <Product P> struct Shape {              // of a product's matrix
    static constexpr int COLUMNS = P == O_PRODUCT ? HEADS : P == DOWN ? FFN : HIDDEN,
        SHIFT = shift_of(COLUMNS), SEGMENT = COLUMNS >> SHIFT,
        N = SEGMENT / 32 / CONSUMERS,                      // a warp has so often 32 columns, a lane 8 of them
        ROWS = P == QKV_PRODUCT ? QKV : P == GATE_UP ? 2 * FFN : P == HEAD ? VOCAB : HIDDEN,
        UNITS = ROWS / (8 >> SHIFT),
        HALF = 4 >> SHIFT,                                 // rows of a unit; their partners are so much further:
        APART = P == QKV_PRODUCT ? HEAD_DIM / 2 : P == GATE_UP ? FFN : HALF;
    static constexpr bool NORMED = P == QKV_PRODUCT || P == GATE_UP || P == HEAD;    // whether a norm comes before it
    __device__ static int row(int unit) { return unit * HALF / APART * 2 * APART + unit * HALF % APART; }
};

constexpr int SEGMENT = larger(Shape<QKV_PRODUCT>::SEGMENT, larger(Shape<O_PRODUCT>::SEGMENT, Shape<DOWN>::SEGMENT));
constexpr int TILE = 16;                         // keys that a consumer attends to at once; the next ones are another's
constexpr int STEP_KEYS = larger(TILE, BLOCK_SIZE);    // a slot has a multiple of these:
constexpr int SLOT_KEYS = larger(1, 4 * SEGMENT / HEAD_DIM / STEP_KEYS) * STEP_KEYS;
constexpr int SPLIT_KEYS = 256;                  // of a unit of attention, at least: a context no longer than this is one unit
constexpr int PIECE = larger(8 * SEGMENT, 2 * HEAD_DIM * SLOT_KEYS) + 64;    // bytes; + 64, so that two use all banks

template <int STAGES> struct Layout {            // of a thread block's shared memory, with so many stages
    alignas(128) char ring[STAGES][2][PIECE];     // a unit's first four segments, and their partners; or keys, and values
    Pair parts[PENDING][CONSUMERS][4 * MOST_SEQUENCES];    // sums over a consumer's columns, [.., sequence, segment]
    Float8 heads[CONSUMERS][GROUP][HEAD_DIM / 8];        // attention over a consumer's keys
    float squares[CONSUMERS][2 * MOST_SEQUENCES];          // sums over squares of its columns of x, [.., sequence and part]
    u64 full[STAGES][2], empty[STAGES];            // mbarriers: a piece has come; all consumers are done with the slot
    u64 done[PENDING], summed[PENDING];          // all parts are written; the reducer has read them
    volatile int tickets[PENDING];               // numbers of units; a block's grow
    int keys[MOST_SEQUENCES], attention_units;     // of a layer
    const bf16* weights[4 * NUM_LAYERS + 1];
};

constexpr int LEAST_STAGES = BEHIND + 1, MOST_STAGES = 6;
template <int N> __device__ constexpr int stages_that_fit() {    // but LEAST_STAGES for a model that does not fit
    if constexpr (N <= LEAST_STAGES || sizeof(Layout<N>) <= decode_shared_bytes) return N;
    else return stages_that_fit<N - 1>();
}
constexpr int SLOTS = stages_that_fit<MOST_STAGES>();
using Shared = Layout<SLOTS>;

__device__ constexpr bool whole(int columns) { return columns % (64 * CONSUMERS << shift_of(columns)) == 0; }
constexpr bool FITS = whole(HIDDEN) && whole(HEADS) && whole(FFN) && Shape<HEAD>::SHIFT < 2 && VOCAB % 8 == 0 &&
    (HEAD_DIM == 64 || HEAD_DIM == 128) && GROUP <= 8 && SLOT_KEYS <= 32 * BLOCK_SIZE &&
    4 * NUM_LAYERS < DECODE_THREADS && sizeof(Shared) <= decode_shared_bytes;
constexpr int SEQUENCES = FFN <= 8192 ? MOST_SEQUENCES : 4;    // consumers have all of h in their registers
EXPORT(DECODE_BATCH, FITS ? SEQUENCES : 0);      // 0: this kernel does nothing

struct Step {                                    // the kernel's arguments of these names
    bf16* logits; const bf16 *embed, *norm; const int *token_ids, *sampled; int layers;
    const float* cos_sin; const int* positions; const long long* slot_mapping; bf16* kv_cache; int num_blocks;
    const int *block_tables, *cu_blocks, *context_lens; float scale; unsigned* words; int *tickets, sequences, splits;
    __device__ bf16* cache(int layer, int values) const {
        return kv_cache + (2 * layer + values) * (size_t)num_blocks * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM;
    }
};

struct Vectors {                                 // what is handed over in a layer
    bf16 *x, *qkv, *attention, *y, *h;           // [S, D], [S, (H + 2K) h], [S, H h], [S, D], [S, F]; x, y: residual
    unsigned* partial;                           // [S, H, splits, PARTIAL]
    __device__ Vectors(const Step& step, int layer) {
        const int S = step.sequences, size = S * (DECODE_VECTOR_WORDS + step.splits * DECODE_PARTIAL_WORDS);
        x = reinterpret_cast<bf16*>(step.words + layer * (size_t)size);
        qkv = x + S * HIDDEN, attention = qkv + S * QKV, y = attention + S * HEADS, h = y + S * HIDDEN;
        partial = reinterpret_cast<unsigned*>(h + S * FFN);
    }
};

__device__ inline Pair unpack(unsigned w) { return {__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000)}; }
__device__ inline void publish(void* p, unsigned word) { store_word(p, word ? word : ZEROS); }
__device__ inline void publish(void* p, const Words& v) {
    for (int i = 0; i < 4; ++i) publish(static_cast<unsigned*>(p) + i, v.w[i]);
}
__device__ inline bool missing(const Words& v) { return !v.w[0] || !v.w[1] || !v.w[2] || !v.w[3]; }

// Waits until the mbarrier has been passed `times` + 1 times. (Only the parity counts: nobody is two rounds behind.)
__device__ inline void wait(u64* mbarrier, unsigned times) { while (!mbarrier_passed_soon(mbarrier, times % 2)) relax(); }

// A warp reads those v[i] that are wanted from address(i) until all have come; the others are 0. While the first is missing
// it asks for four at most, since polling takes bandwidth from the weights. Then all loads are under way together, and only
// what was missing is read again.
template <int M, class Wanted, class Address>
__device__ inline void take(Words (&v)[M], Wanted wanted, Address address) {
    for (int i = 0; i < M; ++i) for (unsigned& w : v[i].w) w = wanted(i) ? 0 : ZEROS;
    for (bool again = true; again;) {
        #pragma unroll
        for (int i = 0; i < M; ++i) load_words_if(missing(v[i]) && (i < 4 || !missing(v[0])), v[i].w, address(i));
        again = false;
        for (int i = 0; i < M; ++i) again |= missing(v[i]);
        if ((again = __any_sync(0xffffffff, again))) relax();
    }
}

// ---- The forward pass -----------------------------------------------------------------------------------------------
// What goes by tickets: role.product<P>(layer) works on those of the product's units that the block has drawn, and
// role.attention(layer) likewise. Each role knows the number of its next unit, and `end`: the operation has the numbers
// before that (and from `begin` on). What is not below `end` belongs to a later operation.
template <class Role> __device__ void forward(Role& role, int layers) {
    for (int layer = 0; layer < layers; ++layer) {
        role.template product<QKV_PRODUCT>(layer);    // y = x + attention(norm(x) @ qkv) @ o
        role.attention(layer);
        role.template product<O_PRODUCT>(layer);
        role.template product<GATE_UP>(layer);        // next x = y + silu(norm(y) @ gate) * (norm(y) @ up) @ down
        role.template product<DOWN>(layer);
    }
    role.template product<HEAD>(layers);              // logits = norm(x) @ head
}

struct Split { int sequence, kv_head, number, begin, end; bool last; };    // a unit of attention: keys begin .. end - 1

__device__ inline int splits_of(int keys, int splits, int& share) {    // of a sequence; share: keys of each but the last
    share = max(SPLIT_KEYS, (keys + SLOT_KEYS * splits - 1) / (SLOT_KEYS * splits) * SLOT_KEYS);
    return (keys + share - 1) / share;
}
__device__ inline Split find_split(const Shared& shared, const Step& step, int unit) {
    int s = 0, share, units;
    for (; unit >= (units = NUM_KV_HEADS * splits_of(shared.keys[s], step.splits, share)); ++s) unit -= units;
    const int number = unit / NUM_KV_HEADS, begin = number * share, end = min(shared.keys[s], begin + share);
    return {s, unit % NUM_KV_HEADS, number, begin, end, end == shared.keys[s]};
}

struct Output {                                  // of attention over some keys: 8 numbers, l times too large
    float m = -INF, l = 0;
    Float8 numbers = {};
    __device__ void add(float other_m, float other_l, const Float8& other) {
        // Both may be -inf, and -inf - -inf would be NaN.
        const float highest = fmaxf(m, other_m), mine = m == highest ? 1 : exp2_approx(m - highest),
                    its = other_m == highest ? 1 : exp2_approx(other_m - highest);
        for (int i = 0; i < 8; ++i) numbers.v[i] = numbers.v[i] * mine + other.v[i] * its;
        l = l * mine + other_l * its, m = highest;
    }
    __device__ Words words() const {             // a sequence that only pads the batch has no keys
        Words words;
        for (int i = 0; i < 4; ++i) words.w[i] = l > 0 ? pack_bf16x2(numbers.v[2 * i] / l, numbers.v[2 * i + 1] / l) : 0;
        return words;
    }
};

// ---- The producer ---------------------------------------------------------------------------------------------------
struct Producer {
    Shared& shared; const Step& step;
    int lane;
    int drawn = blockIdx.x, number = 0, begin = 0, end = 0;    // a block's first ticket is its own number
    unsigned ticket = 0, k = 0, issued = 0, landed = 0;        // tickets and slots so far; pieces

    __device__ void draw() {
        number = __shfl_sync(0xffffffff, drawn, 0);
        if (lane == 0) drawn = gridDim.x + atomicAdd(step.tickets, 1);    // takes as long as a unit: looked at after it
    }
    __device__ void announce() {                 // a unit; the next slot is its
        wait(&shared.summed[ticket % PENDING], ticket / PENDING + 1);    // nobody needs the ticket that was here;
        wait(&shared.empty[k % SLOTS], k / SLOTS + 1);                   // nor this slot. (True at once in round 0.)
        if (lane == 0) shared.tickets[ticket % PENDING] = number;
        ++ticket;
    }
    __device__ void wait_for_room() {            // until another piece may be under way
        const bool busy = k < BEHIND || mbarrier_passed(&shared.empty[(k - BEHIND) % SLOTS], (k - BEHIND) / SLOTS % 2);
        for (; issued - landed >= (busy ? IN_FLIGHT : IN_FLIGHT_WAITING); ++landed)
            wait(&shared.full[landed / 2 % SLOTS][landed % 2], landed / 2 / SLOTS);
        ++issued;
    }
    template <Product P> __device__ void product(int layer) {
        using Shape = Shape<P>;
        begin = end, end += Shape::UNITS;
        const bf16* matrix = shared.weights[P == HEAD ? 4 * layer : 4 * layer + P];
        for (; number < end; draw(), ++k) {
            const bf16* rows = matrix + (size_t)Shape::row(number - begin) * Shape::COLUMNS;
            announce();
            for (int piece = 0; piece < 2; ++piece, rows += (size_t)Shape::APART * Shape::COLUMNS) {
                u64* full = &shared.full[k % SLOTS][piece];
                wait_for_room();
                if (lane > 0) continue;
                mbarrier_expect(full, 8 * Shape::SEGMENT);
                bulk_copy(shared.ring[k % SLOTS][piece], rows, 8 * Shape::SEGMENT, full);
            }
        }
    }
    // Keys and values of up to SLOT_KEYS tokens a slot, page by page, each by a lane. It looks pages up a slot ahead.
    __device__ void attention(int layer) {
        constexpr int BYTES = 2 * HEAD_DIM * BLOCK_SIZE;    // of a page's head
        for (begin = end, end += shared.attention_units; number < end; draw()) {
            const Split split = find_split(shared, step, number - begin);
            const int* block_table = step.block_tables + step.cu_blocks[split.sequence];
            const auto look_up = [&](int first) {
                const int key = first + lane * BLOCK_SIZE;
                return lane < SLOT_KEYS / BLOCK_SIZE && key < split.end ? block_table[key / BLOCK_SIZE] : -1;
            };
            int page, next = look_up(split.begin);
            announce();
            for (int first = split.begin; first < split.end; first += SLOT_KEYS, ++k) {
                page = next, next = look_up(first + SLOT_KEYS);
                wait(&shared.empty[k % SLOTS], k / SLOTS + 1);    // (the first is)
                for (int piece = 0; piece < 2; ++piece) {
                    u64* full = &shared.full[k % SLOTS][piece];
                    wait_for_room();
                    const int pages = (min(SLOT_KEYS, split.end - first) + BLOCK_SIZE - 1) / BLOCK_SIZE;
                    if (lane == 0) mbarrier_expect(full, pages * BYTES);
                    const size_t head = (size_t)page * NUM_KV_HEADS + split.kv_head;
                    const bf16* source = step.cache(layer, piece) + head * BLOCK_SIZE * HEAD_DIM;
                    if (page >= 0) bulk_copy(shared.ring[k % SLOTS][piece] + lane * BYTES, source, BYTES, full);
                }
            }
        }
    }
    __device__ void run() {
        draw();
        forward(*this, step.layers);
        announce();                              // a number past the end, for those who look for the next
        if (lane < 2) mbarrier_arrive(&shared.full[k % SLOTS][lane]);
    }
};

// ---- The consumers --------------------------------------------------------------------------------------------------
// A warp's attention: the G queries of a kv head, and some tiles of keys. As in paged_attention, but scores = q k',
// and out' = v' p', for which lanes weave two values together. Lane 4g + t has m and l of head g, out of 2t and 2t + 1.
struct Attention {
    static constexpr int KC = HEAD_DIM / 32, VC = HEAD_DIM / 64;    // 16-byte parts of a key or value that a lane has
    int g, t;
    Words q[KC + 1];                             // and 8 numbers of the new token's key or value
    float m = -INF, l = 0, out[HEAD_DIM / 16][4] = {};    // out: [0..1] one number of either head, [2..3] the next

    __device__ void add_tile(const char* keys, const char* values, int start, int count, float scale) {
        const auto part = [&](const char* rows, int key, int i) {    // past the end any key will do, its probability is 0
            return reinterpret_cast<const Words*>(rows)[min(start + key, count - 1) * (HEAD_DIM / 8) + i];
        };
        float s[2][4] = {}, highest = m;         // s [0..1]: keys 8n + 2t and the next
        for (int n = 0; n < 2; ++n) {
            for (int i = 0; i < KC; ++i) {
                const Words k = part(keys, 8 * n + g, 4 * i + t);
                for (int j = 0; j < 4; j += 2) {
                    const unsigned a[4] = {q[i].w[j], 0, q[i].w[j + 1], 0};
                    mma_m16n8k16_bf16(s[n], a, &k.w[j], s[n]);
                }
            }
            for (int j = 0; j < 2; ++j) {
                s[n][j] = start + 8 * n + 2 * t + j < count ? s[n][j] * scale * LOG2_E : -INF;    // for exp2
                highest = fmaxf(highest, s[n][j]);
            }
        }
        for (int distance = 1; distance < 4; distance *= 2)
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, distance));
        const float rescale = exp2_approx(m - highest), of_a = __shfl_sync(0xffffffff, rescale, 8 * t),
                    of_b = __shfl_sync(0xffffffff, rescale, 8 * t + 4);    // heads 2t and 2t + 1
        m = highest, l *= rescale;
        for (auto& four : s) for (int j = 0; j < 2; ++j) l += four[j] = exp2_approx(four[j] - m);
        for (auto& four : out) four[0] *= of_a, four[1] *= of_b, four[2] *= of_a, four[3] *= of_b;
        const unsigned b[2] = {pack_bf16x2(s[0][0], s[0][1]), pack_bf16x2(s[1][0], s[1][1])};
        for (int c = 0; c < VC; ++c) {
            Words v[4];                          // of keys 2t, 2t + 1, 2t + 8, 2t + 9
            for (int i = 0; i < 4; ++i) v[i] = part(values, 2 * t + i % 2 + i / 2 * 8, g + 8 * c);
            const auto low = [](unsigned x, unsigned y) { return (x & 0xffff) | y << 16; };
            const auto high = [](unsigned x, unsigned y) { return x >> 16 | (y & 0xffff0000); };
            for (int i = 0; i < 4; ++i) {
                const unsigned a[4] = {low(v[0].w[i], v[1].w[i]), high(v[0].w[i], v[1].w[i]),
                                       low(v[2].w[i], v[3].w[i]), high(v[2].w[i], v[3].w[i])};
                mma_m16n8k16_bf16(out[4 * c + i], a, b, out[4 * c + i]);
            }
        }
    }
    __device__ void leave(Pair* sums, Float8 (*heads)[HEAD_DIM / 8]) {    // for the reducer
        l = quad_sum(l);
        if (t == 0 && g < GROUP) sums[g] = {m, l};
        for (int j = 0; j < 2 && 2 * t + j < GROUP; ++j)
            for (int c = 0; c < VC; ++c)
                for (int i = 0; i < 4; ++i)
                    for (int k = 0; k < 2; ++k) heads[2 * t + j][g + 8 * c].v[2 * i + k] = out[4 * c + i][j + 2 * k];
    }
};

template <int S> struct Consumer {               // for up to S sequences
    Shared& shared; const Step& step;
    int warp, lane;
    unsigned ticket = 0, slot = 0, round = 0;
    int number = 0, begin = 0, end = 0;
    int g = lane / 4, t = lane % 4, r = g % 2 * 4 + g / 2;    // r: of eight rows of x, the one that is row g of A
    template <Product P> static constexpr int TILES = ((S << Shape<P>::SHIFT) + 7) / 8;    // of 8 rows of A

    __device__ void wait_for_slot() { for (u64& full : shared.full[slot]) wait(&full, round); }
    // Hazard: loads from shared memory take a while, and an arrival may overtake them. So one lane arrives, and which,
    // that cannot be known before the loads are done: `read` is made of them.
    __device__ void give_back(unsigned read) {
        if (lane == __any_sync(0xffffffff, read == 1)) mbarrier_arrive(&shared.empty[slot]);
        if (++slot == SLOTS) slot = 0, ++round;
    }
    __device__ void next() { wait_for_slot(), number = shared.tickets[ticket++ % PENDING]; }    // waits for a unit
    __device__ void done() {                     // with the unit
        __syncwarp();                            // all lanes have written their sums
        if (lane == 0) mbarrier_arrive(&shared.done[(ticket - 1) % PENDING]);
    }
    // A unit's weights into registers, and its slot is free.
    template <Product P, int M> __device__ void load(Words (&w)[M]) {
        const char* mine = shared.ring[slot][g % 2] + g / 2 * 2 * Shape<P>::SEGMENT + 128 * warp + 16 * t;
        unsigned read = 0;
        for (int i = 0; i < M; ++i)
            w[i] = *reinterpret_cast<const Words*>(mine + 128 * CONSUMERS * (i / 2) + 64 * (i % 2)), read ^= w[i].w[0];
        give_back(read);
    }
    // A warp's columns of a product's input, 64 of each 512. x has a row for each sequence and part; lane 4g + t has of rows
    // r, r + 8, ... eight of each 32 columns. An mma takes these for rows g and g + 8 of A, of 16 columns. So each eight are
    // used twice: with the weights of half of the columns, when the first eight rows of the result count, and of the other
    // half, when the last eight do. Before a norm also the sum over x's squares, as product of x with itself.
    template <Product P, int M> __device__ void take_input(int layer, Words (&x)[M]) {
        using Shape = Shape<P>;
        const Vectors v(step, layer);
        const bf16* in = P == O_PRODUCT ? v.attention : P == GATE_UP ? v.y : P == DOWN ? v.h : v.x;
        // Eight lanes read 128 bytes of a row together, since the L2 cache gives those faster than twice 64. Then lanes 8i + j
        // and 8i + j + 4 swap, such that one has both halves of row i, the other of row i + 4.
        const auto row = [&](int i) { return 8 * (i / Shape::N) + 4 * (i % 2) + lane / 8; };
        const auto column = [&](int i) { return 64 * (CONSUMERS * (i % Shape::N / 2) + warp); };
        take(x, [&](int i) { return row(i) < step.sequences << Shape::SHIFT; },
             [&](int i) { return in + row(i) * Shape::SEGMENT + column(i) + 8 * (lane % 8); });
        for (int i = 0; i < M; i += 2)
            for (int j = 0; j < 4; ++j) {
                unsigned &a = x[i].w[j], &b = x[i + 1].w[j];
                const unsigned other = __shfl_xor_sync(0xffffffff, g % 2 ? a : b, 4);
                (g % 2 ? a : b) = other;
            }
        for (int tile = 0; tile < M / Shape::N && Shape::NORMED; ++tile) {
            float sum[4][4] = {};
            for (int i = 0; i < 2 * Shape::N; ++i) {
                const unsigned *two = x[tile * Shape::N + i / 2].w + i % 2 * 2, a[4] = {two[0], 0, two[1], 0};
                mma_m16n8k16_bf16(sum[i % 4], a, two, sum[i % 4]);
            }
            const float even = sum[0][0] + sum[1][0] + (sum[2][0] + sum[3][0]),
                        odd = sum[0][1] + sum[1][1] + (sum[2][1] + sum[3][1]);
            if (t == g / 2) shared.squares[warp][8 * tile + r] = g % 2 ? odd : even;    // the diagonal
        }
        if (P == HEAD)                           // the last norm has its weight to itself
            for (int i = 0; i < M; ++i) {
                const int first = r % (1 << Shape::SHIFT) * Shape::SEGMENT + column(i) + 32 * (i % 2) + 8 * t;
                const Float8 norm = to_float(vec8(step.norm + first));
                for (int j = 0; j < 4; ++j) {
                    const Pair two = unpack(x[i].w[j]);
                    x[i].w[j] = pack_bf16x2(norm.v[2 * j] * two.a, norm.v[2 * j + 1] * two.b);
                }
            }
        // Into the order in which an mma wants them. Unless they are made anew, the compiler leaves that to each mma.
        const unsigned zero = step.sequences >> 8;
        for (Words& v : x) v = {{v.w[0] ^ zero, v.w[2] ^ zero, v.w[1] ^ zero, v.w[3] ^ zero}};
    }
    template <Product P, int M, int N> __device__ void multiply(const Words (&x)[M], const Words (&w)[N]) {
        constexpr int SHIFT = Shape<P>::SHIFT;
        for (int tile = 0; tile < M / N; ++tile) {
            if (8 * tile >= step.sequences << SHIFT) break;
            float sum[4][4] = {};                // four chains: each mma waits for the one before it in its chain
            for (int i = 0; i < 2 * N; ++i)
                mma_m16n8k16_bf16(sum[i % 4], x[tile * N + i / 2].w, w[i / 2].w + i % 2 * 2, sum[i % 4]);
            const int row = 8 * tile + r, sequence = row >> SHIFT;    // of x; its part must be the segment's
            if ((row ^ t) % (1 << SHIFT) == 0 && sequence < S)
                shared.parts[(ticket - 1) % PENDING][warp][sequence * 4 + t] =
                    {sum[0][0] + sum[2][0] + (sum[1][2] + sum[3][2]), sum[0][1] + sum[2][1] + (sum[1][3] + sum[3][3])};
        }
        done();
    }
    template <Product P> __device__ void product(int layer) {
        begin = end, end += Shape<P>::UNITS;
        if (number >= end) return;
        Words w[Shape<P>::N], x[TILES<P> * Shape<P>::N];
        load<P>(w);                              // these need not wait for x
        take_input<P>(layer, x);
        multiply<P>(x, w);
        for (next(); number < end; next()) load<P>(w), multiply<P>(x, w);
    }
    __device__ void attention(int layer) {
        const Vectors v(step, layer);
        for (begin = end, end += shared.attention_units; number < end; next()) {
            const Split split = find_split(shared, step, number - begin);
            const bf16* token = v.qkv + split.sequence * QKV;    // the new one's queries, keys, values
            const bf16* query = token + (split.kv_head * GROUP + g) * HEAD_DIM;
            // Its key and value may not be in the cache yet: the warp whose tile has them puts them into the ring.
            const bf16* key = token + (NUM_HEADS + split.kv_head) * HEAD_DIM;
            const int value = lane / (HEAD_DIM / 8), eight = lane % (HEAD_DIM / 8);
            const bool puts = split.last && (split.end - 1 - split.begin) / TILE % CONSUMERS == warp && value < 2;
            Attention attention = {g, t};
            take(attention.q, [&](int i) { return i < Attention::KC ? g < GROUP : puts; }, [&](int i) {
                return i < Attention::KC ? query + 32 * i + 8 * t : key + value * NUM_KV_HEADS * HEAD_DIM + 8 * eight; });
            int at = split.begin + TILE * warp;
            for (int first = split.begin; first < split.end; first += SLOT_KEYS) {
                wait_for_slot();
                auto& [keys, values] = shared.ring[slot];
                const int count = min(SLOT_KEYS, split.end - first);
                if (puts && first + count == split.end) {
                    Words* rows = reinterpret_cast<Words*>(shared.ring[slot][value]);
                    rows[(count - 1) * (HEAD_DIM / 8) + eight] = attention.q[Attention::KC];
                    fence_async_proxy();
                }
                __syncwarp();                    // all lanes have put theirs before one reads it; no other warp will
                for (; at < first + count; at += TILE * CONSUMERS)
                    attention.add_tile(keys, values, at - first, count, step.scale);
                give_back(__float_as_uint(attention.out[0][0] + attention.out[HEAD_DIM / 16 - 1][0]));
            }
            wait(&shared.summed[(ticket - 2) % PENDING], (ticket - 2) / PENDING);    // the unit before needs no `heads` now
            attention.leave(shared.parts[(ticket - 1) % PENDING][warp], shared.heads[warp]);
            done();
        }
    }
    __device__ void run() { next(), forward(*this, step.layers); }
};

// ---- The reducer ----------------------------------------------------------------------------------------------------
// Lane 4g + t has the sums of sequence g, of row r of a unit and of its partner. Lanes beyond the sequences go along,
// and so do those beside the first of a row's parts.
struct Reducer {
    Shared& shared; const Step& step;
    int lane;
    unsigned ticket = 0;
    int number = -1, begin = 0, end = 0;
    int s = min(lane / 4, step.sequences - 1), t = lane % 4;

    __device__ void next() {                     // a block's tickets grow: what is no greater is an old one
        const int old = number;
        while ((number = shared.tickets[ticket % PENDING]) <= old) relax();
    }
    __device__ void summed() {
        __syncwarp();                            // all lanes have read the parts, and used what they read
        if (lane == 0) mbarrier_arrive(&shared.summed[ticket % PENDING]);
        ++ticket;
    }
    template <int SHIFT> __device__ Pair sum() const {
        constexpr int PAIRS = 4 * MOST_SEQUENCES;
        Pair sum = {0, 0};
        for (int i = 0; i < CONSUMERS * PAIRS / 32; ++i) {
            const Pair p = shared.parts[ticket % PENDING][(32 * i + lane) / PAIRS][lane % PAIRS];
            sum.a += p.a, sum.b += p.b;
        }
        const auto add = [&](int distance) {
            sum.a += __shfl_xor_sync(0xffffffff, sum.a, distance);
            sum.b += __shfl_xor_sync(0xffffffff, sum.b, distance);
        };
        for (int distance = 16; distance >= PAIRS; distance /= 2) add(distance);
        for (int i = 0; i < SHIFT; ++i) add(1 << i);    // the row's parts
        return sum;
    }
    template <int SHIFT> __device__ float inverse_rms() const {    // of the input
        float squares = 0;
        for (int p = 0; p < 1 << SHIFT; ++p)
            for (int warp = t; warp < CONSUMERS; warp += 4) squares += shared.squares[warp][(s << SHIFT) + p];
        return rsqrtf(quad_sum(squares) / HIDDEN + RMS_EPS);
    }
    template <Product P> __device__ void product(int layer) {
        using Shape = Shape<P>;
        begin = end, end += Shape::UNITS;
        if (number >= end) return;
        const Vectors v(step, layer), after(step, layer + (P != HEAD));
        bf16* out = P == QKV_PRODUCT ? v.qkv + s * QKV : P == O_PRODUCT ? v.y + s * HIDDEN :
                    P == GATE_UP ? v.h + s * FFN : P == DOWN ? after.x + s * HIDDEN : step.logits + (size_t)s * VOCAB;
        const bf16* residual = (P == O_PRODUCT ? v.x : v.y) + s * HIDDEN;
        const float* angles = step.cos_sin + (size_t)step.positions[s] * HEAD_DIM;
        // A word is two rows. Where a lane has none that are neighbours, two lanes swap: even r get rows r and r + 1,
        // odd ones the partners of r - 1 and r. A gate and an up make one number, so there two lanes make one word.
        const int r = t >> Shape::SHIFT, second = r % 2, distance = 1 << Shape::SHIFT;
        const int place = second ? Shape::APART + r - 1 : r;
        const bool writes = lane / 4 < step.sequences && t % distance == 0 && !(P == GATE_UP && second);
        float scale = 0;
        for (; number < end; next()) {
            const int row = Shape::row(number - begin);
            unsigned old = 0;                    // loads that need not wait for the sums
            Pair angle = {1, 0};
            const auto load_old = [&] { return *reinterpret_cast<const volatile unsigned*>(residual + row + place); };
            if (P == O_PRODUCT || P == DOWN) old = load_old();
            if (P == QKV_PRODUCT) angle = {angles[row % HEAD_DIM + r], angles[row % HEAD_DIM + r + HEAD_DIM / 2]};
            wait(&shared.done[ticket % PENDING], ticket / PENDING);
            if (Shape::NORMED && scale == 0) scale = inverse_rms<Shape::SHIFT>();
            Pair x = sum<Shape::SHIFT>();
            if (Shape::NORMED) x = {x.a * scale, x.b * scale};
            if (P == QKV_PRODUCT && row < (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM)    // values are not turned
                x = {x.a * angle.a - x.b * angle.b, x.b * angle.a + x.a * angle.b};
            if (P == GATE_UP) x.a = silu(x.a) * x.b;
            if (P == GATE_UP) x.b = __shfl_xor_sync(0xffffffff, x.a, distance);
            else if (Shape::SHIFT < 2) {
                const float other = __shfl_xor_sync(0xffffffff, second ? x.a : x.b, distance);
                (second ? x.a : x.b) = other;
            }
            if (P == O_PRODUCT || P == DOWN) {
                while (old == 0) old = load_old();    // it is there, since the input is made of it, if not seen yet
                x = {x.a + unpack(old).a, x.b + unpack(old).b};
            }
            const unsigned word = pack_bf16x2(x.a, x.b);
            if (writes) publish(out + row + place, word);
            if (P == QKV_PRODUCT && writes && row >= HEADS) put_into_cache(word, layer, row + place);
            summed();
        }
    }
    __device__ void put_into_cache(unsigned word, int layer, int row) const {    // for the steps to come
        const int head = row / HEAD_DIM - NUM_HEADS;    // those of keys, those of values
        const long long slot = step.slot_mapping[s], page = slot / BLOCK_SIZE;
        if (slot < 0) return;
        bf16* cache = step.cache(layer, head / NUM_KV_HEADS);
        cache += ((page * NUM_KV_HEADS + head % NUM_KV_HEADS) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM;
        store_word(cache + row % HEAD_DIM, word);
    }
    // Of a unit of attention, a lane has 8 numbers of a head's output: a sum over consumers, each of which had other keys.
    __device__ void attention(int layer) {
        const Vectors v(step, layer);
        for (begin = end, end += shared.attention_units; number < end; next()) {
            const Split split = find_split(shared, step, number - begin);
            const auto& sums = shared.parts[ticket % PENDING];
            wait(&shared.done[ticket % PENDING], ticket / PENDING);
            for (int i = lane; i < GROUP * HEAD_DIM / 8; i += 32) {
                const int head = i / (HEAD_DIM / 8), eight = i % (HEAD_DIM / 8);
                Output out;
                for (int warp = 0; warp < CONSUMERS; ++warp)
                    out.add(sums[warp][head].a, sums[warp][head].b, shared.heads[warp][head][eight]);
                const int row = split.sequence * NUM_HEADS + split.kv_head * GROUP + head;
                unsigned* partial = v.partial + (row * step.splits + split.number) * PARTIAL;
                const bool whole = split.last && split.number == 0;    // these were all keys
                publish(whole ? (void*)(v.attention + row * HEAD_DIM + 8 * eight) : partial + 4 * eight, out.words());
                const unsigned logsumexp = __float_as_uint(out.m + log2f(out.l));
                if (eight == 0) publish(partial + HEAD_DIM / 2, {{logsumexp, logsumexp, logsumexp, logsumexp}});
            }
            summed();
        }
    }
    __device__ void run() { next(), forward(*this, step.layers); }
};

// ---- The mergers ----------------------------------------------------------------------------------------------------
// One warp: 8 P numbers of a head's output. Lane P s + p has 8 of them, of splits s, s + 32 / P, ...; there are at most four
// times 32 / P. `row`: sequence and head.
__device__ void merge(const Step& step, int splits, int row, int part, int P, const Vectors& v, int lane) {
    const int first = 8 * (P * part + lane % P);
    const unsigned* partial = v.partial + row * step.splits * PARTIAL;
    Output out;
    Words got[8];    // of four splits, numbers and logsumexp
    const auto split = [&](int i) { return (32 * (i / 2) + lane) / P; };
    take(got, [&](int i) { return split(i) < splits; },
         [&](int i) { return partial + split(i) * PARTIAL + (i % 2 ? HEAD_DIM / 2 : first / 2); });
    for (int i = 0; i < 8; i += 2)
        if (split(i) < splits)
            out.add(__uint_as_float(got[i + 1].w[0]), 1, to_float(reinterpret_cast<const Bf16x8&>(got[i])));
    for (int distance = P; distance < 32; distance *= 2) {
        const auto other = [&](float x) { return __shfl_xor_sync(0xffffffff, x, distance); };
        Float8 numbers;
        for (int i = 0; i < 8; ++i) numbers.v[i] = other(out.numbers.v[i]);
        const float m = other(out.m), l = other(out.l);
        out.add(m, l, numbers);
    }
    if (lane < P) publish(v.attention + row * HEAD_DIM + first, out.words());
}

__device__ void merge_all(Shared& shared, const Step& step, int merger, int lane) {
    const int worker = merger * gridDim.x + blockIdx.x, workers = MERGERS * gridDim.x;
    for (int i = 32 * worker + lane; i < step.sequences * HIDDEN / 8; i += 32 * workers) {    // x = embed[token]
        const int id = step.token_ids[i / (HIDDEN / 8)], token = id < 0 ? step.sampled[~id] : id;
        publish(Vectors(step, 0).x + 8 * i, reinterpret_cast<const Words*>(step.embed + (size_t)token * HIDDEN)[i % (HIDDEN / 8)]);
    }
    __syncwarp();
    const int P = step.sequences > 4 ? 8 : 4, parts = HEAD_DIM / 8 / P;    // such that there is a warp for each part, or nearly
    for (int layer = 0; layer < step.layers; ++layer)
        for (int item = worker; item < step.sequences * NUM_HEADS * parts; item += workers) {
            const int row = item / parts;
            int share;
            const int splits = splits_of(shared.keys[row / NUM_HEADS], step.splits, share);
            if (splits != 1) merge(step, splits, row, item % parts, P, Vectors(step, layer), lane);
        }
}

// ---- The kernel -----------------------------------------------------------------------------------------------------
extern "C" __global__ __launch_bounds__(DECODE_THREADS, 1) void decode(
        bf16* logits, const bf16* embed, const bf16* norm, const int* token_ids, const int* sampled, const u64* weights,
        int layers, const float* cos_sin, const int* positions, const long long* slot_mapping, bf16* kv_cache,
        int num_blocks, const int* block_tables, const int* cu_blocks, const int* context_lens, float scale, int* words,
        int sequences, int splits) {
    if constexpr (FITS) {
        DYNAMIC_SHARED(decode_shared_bytes);
        Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
        const int me = threadIdx.x, warp = me / 32, lane = me % 32;
        const Step step = {logits, embed, norm, token_ids, sampled, layers, cos_sin, positions, slot_mapping, kv_cache,
                           num_blocks, block_tables, cu_blocks, context_lens, scale, reinterpret_cast<unsigned*>(words) + DECODE_TICKET_WORDS,
                           words, sequences, splits};
        if (me < 2 * SLOTS) mbarrier_init(&shared.full[me / 2][me % 2], 1);
        if (me < SLOTS) mbarrier_init(&shared.empty[me], CONSUMERS);
        if (me < PENDING) mbarrier_init(&shared.done[me], CONSUMERS), mbarrier_init(&shared.summed[me], 1), shared.tickets[me] = -1;
        if (me <= 4 * layers) shared.weights[me] = reinterpret_cast<const bf16*>(weights[me]);
        if (me == 0) {
            int units = 0, share;
            for (int s = 0; s < sequences; ++s)
                units += splits_of(shared.keys[s] = context_lens[s], splits, share) * NUM_KV_HEADS;
            shared.attention_units = units;
        }
        __syncthreads();    // all this is there before anyone uses it
        if (warp < CONSUMERS) {
            set_registers<CONSUMER_REGISTERS>();
            if (sequences <= 2) Consumer<2>{shared, step, warp, lane}.run();
            else if (sequences <= 4) Consumer<4>{shared, step, warp, lane}.run();
            else Consumer<SEQUENCES>{shared, step, warp, lane}.run();
        } else {
            set_registers<OTHER_REGISTERS>();
            if (warp < CONSUMERS + MERGERS) merge_all(shared, step, warp - CONSUMERS, lane);
            else if (warp == CONSUMERS + MERGERS) Reducer{shared, step, lane}.run();
            else Producer{shared, step, lane}.run();
        }
    }
}
