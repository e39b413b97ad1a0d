/*
 * AMX int8: products of whole tiles for attention on codes of 8, 5 and 4 bits.
 *
 * A tile register holds 16 rows of 64 bytes, and one instruction adds the products of 16 rows of
 * A with 16 columns of B, 64 bytes deep, to 16 x 16 sums of 32 bits. B are codes in their stored
 * layout (tile.h): 64 dims of K's 16 tokens are 16 consecutive rows of 64 bytes; 64 tokens of V's
 * 16 dims are 16 rows at a stride of 4 * dims. So nothing is shuffled, and a token of K, or a dim
 * of V, is a column. A are the digits of q, or of the weights:
 *
 *   near  two digits a value, value = 256 * high + low: two rows of A, one after the other.
 *         q: low in -128 .. 127, high in -127 .. 127, both signed. p: both 0 .. 255, unsigned.
 *         8 rows of q or p make a tile ("group") of A.
 *   fast  one digit a value; 16 rows make a group.
 *
 * Both digits in one tile cost as much as a tile for each digit, but few rows need fewer tiles: a
 * GQA group of 4 or 8 query heads takes one. The two digits' sums are combined in f32.
 *
 * From the simple form to the fast one:
 *  1. One product needs a load of A and one of B, of 8 cycles each (Sapphire Rapids), and takes
 *     16. Two groups by two column tiles share their loads: one load a product.
 *  2. A single group cannot share a load of B; it uses four column tiles with four accumulator
 *     tiles, so that a product's latency (52 cycles) overlaps three others.
 *  3. Sums can leave tile registers through memory only. While the products of the next block run,
 *     the vector units convert the stored sums to scores or add them to the accumulators.
 * For 32 rows, 64 tokens and 128 dims the tile unit is busy for 512 cycles, where f32 would take
 * 8192. The vector units are busy for some 320 (K) and 1200 (V, whose weights are split into digits
 * in each call, and whose results are twice as many and are read as well as written), on two ports.
 *
 * Few rows use the same path, not VNNI: K at 128 dims is 8 tiles, that is 128 cycles for 1 to 8
 * rows, where VNNI takes 128 for each, and reading the codes from memory takes some 2000.
 *
 * Codes of 4 and 5 bits are unpacked once a call, into a buffer in the order of 8 bits, and
 * multiplied with one digit. That costs as much as the products of some four rows, so fewer rows
 * take the products of avx512_4bit.c, with the same result, bit for bit: digits are the same, sums
 * are exact, and what is multiplied by 1/2 here is the same number as there.
 *
 * dims are a multiple of 16, tiles 64 deep. The last chunk of 8-bit K overlaps the one before it,
 * and A has zeros for the dims that were already summed: all tiles have one shape, so that they are
 * configured once a call, and no load leaves the tile of 16 tokens. Below 64 dims the tiles have
 * fewer rows.
 *
 * Sums: 64 * 255 * 127 (V) and 1024 * 128 * 127 (K) are below 2^24. So no int32 overflows, and each
 * digit's sum is exact as f32.
 *
 * Tiles are configured and released in each call: live tile state (8 KiB) is saved at each context
 * switch, and the caller's thread must not be left with our configuration.
 */
#include "simd/dither.h"
#include "simd/levels.h"
#include "simd/x86/prefetch.h"
#include "amx_tile.h"
#include "avx512_product.h"

#define INLINE static inline __attribute__((always_inline))

/* Names of the tiles. Literals, as they become part of an instruction's name. */
#define SUM_0 0
#define SUM_1 1
#define SUM_2 2
#define SUM_3 3
#define A_0 4
#define A_1 5
#define B_0 6
#define B_1 7

#define SIDE ((size_t)16)      /* rows of a tile, and its columns of 4 bytes */
#define DEPTH_MAX ((size_t)64) /* bytes of a tile's row */
#define TILE_BYTES (SIDE * DEPTH_MAX)

/* Lower bound of a row's largest magnitude, so that its reciprocal is finite. */
#define LEAST 0x1p-100f
/* The largest q of two digits, and of one; the largest p. */
#define Q_MAX_NEAR 32639.0f
#define Q_MAX_FAST 127.0f
#define P_MAX_NEAR 65535.0f
#define P_MAX_FAST 255.0f

enum { KEYS, VALUES };

/*
 * A group: the scales of its rows in 64 bytes, then a tile for each chunk of the depth, with
 * `digits` rows for each of its 16 / digits rows.
 */
#define SCALES_BYTES DEPTH_MAX

/* One call: out[rows][columns * 16] of A and B. */
typedef struct product {
    const unsigned char *a;
    size_t group_bytes, first_group, rows;
    /* B: the tile of column tile j and chunk c is at j * column_bytes + min(c * TILE_BYTES, last),
     * its rows row_bytes apart. */
    const unsigned char *b;
    size_t columns, column_bytes, row_bytes, last;
    size_t depth, chunks;
    const void *next;
    const float *factors; /* KEYS: of the tokens; VALUES: alpha */
    float *out;
    size_t ld_out;
} product;

/* The position of a block of four sum tiles: two groups by two column tiles, or one by four. */
typedef struct block {
    size_t group, groups, column, columns;
} block;

/* ---- the products ---- */

INLINE void configure(size_t a_rows, size_t depth)
{
    _Alignas(64) kvt_tile_config config = {.palette = 1};
    for (size_t i = SUM_0; i <= SUM_3; i++) {
        config.rows[i] = (uint8_t)a_rows;
        config.row_bytes[i] = 64;
    }
    for (size_t i = A_0; i <= A_1; i++) {
        config.rows[i] = (uint8_t)a_rows;
        config.row_bytes[i] = (uint16_t)depth;
    }
    for (size_t i = B_0; i <= B_1; i++) {
        config.rows[i] = (uint8_t)(depth / 4);
        config.row_bytes[i] = 64;
    }
    KVT_TILE_CONFIGURE(&config);
}

/* Prefetch the lines of `next` at the same offsets as a tile of B. */
INLINE void prefetch(const product *x, const unsigned char *tile)
{
    uintptr_t line = (uintptr_t)x->next + (uintptr_t)(tile - x->b);
    for (size_t i = 0; i < x->depth / 4; i++)
        _mm_prefetch((const char *)(line + i * x->row_bytes), _MM_HINT_T1);
}

#define DOT(sum, a, b)                                                                             \
    do {                                                                                           \
        if (side == KEYS)                                                                          \
            KVT_TILE_DOT_SIGNED(sum, a, b);                                                        \
        else                                                                                       \
            KVT_TILE_DOT_UNSIGNED(sum, a, b);                                                      \
    } while (0)

/* Sums of group i and column tile j: two groups SUM_(2i + j), one group SUM_j. */
INLINE void multiply(int side, const product *x, const block *w)
{
    const unsigned char *a = x->a + w->group * x->group_bytes + SCALES_BYTES;
    const unsigned char *b = x->b + w->column * x->column_bytes;
    KVT_TILE_ZERO(SUM_0);
    KVT_TILE_ZERO(SUM_1);
    KVT_TILE_ZERO(SUM_2);
    KVT_TILE_ZERO(SUM_3);
    for (size_t c = 0; c < x->chunks; c++) {
        const unsigned char *tile = b + (c * TILE_BYTES < x->last ? c * TILE_BYTES : x->last);
        KVT_TILE_LOAD(A_0, a + c * TILE_BYTES, DEPTH_MAX);
        KVT_TILE_LOAD(B_0, tile, x->row_bytes);
        DOT(SUM_0, A_0, B_0);
        if (w->groups == 2) {
            KVT_TILE_LOAD(A_1, a + x->group_bytes + c * TILE_BYTES, DEPTH_MAX);
            DOT(SUM_2, A_1, B_0);
            if (w->columns == 2) {
                KVT_TILE_LOAD(B_1, tile + x->column_bytes, x->row_bytes);
                DOT(SUM_1, A_0, B_1);
                DOT(SUM_3, A_1, B_1);
            }
        } else if (w->columns > 1) {
            KVT_TILE_LOAD(B_1, tile + x->column_bytes, x->row_bytes);
            DOT(SUM_1, A_0, B_1);
            if (w->columns > 2) {
                KVT_TILE_LOAD(B_0, tile + 2 * x->column_bytes, x->row_bytes);
                DOT(SUM_2, A_0, B_0);
            }
            if (w->columns > 3) {
                KVT_TILE_LOAD(B_1, tile + 3 * x->column_bytes, x->row_bytes);
                DOT(SUM_3, A_0, B_1);
            }
        }
        /* Prefetch with the first groups only: they pass over all of B once. */
        if (x->next && w->group == x->first_group)
            for (size_t j = 0; j < w->columns; j++)
                prefetch(x, tile + j * x->column_bytes);
    }
}

/* Stores all four: some are unused (zero) only at the last columns of few shapes. */
INLINE void store_sums(int32_t *sums)
{
    KVT_TILE_STORE(SUM_0, sums, 64);
    KVT_TILE_STORE(SUM_1, sums + SIDE * SIDE, 64);
    KVT_TILE_STORE(SUM_2, sums + 2 * SIDE * SIDE, 64);
    KVT_TILE_STORE(SUM_3, sums + 3 * SIDE * SIDE, 64);
}

/* ---- results ---- */

/* 16 sums of a row: of its two digits, rounded once. */
INLINE __m512 sum_of(size_t digits, const int32_t *sums)
{
    __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
    if (digits == 2)
        sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f),
                              _mm512_cvtepi32_ps(_mm512_load_si512(sums + SIDE)));
    return sum;
}

INLINE void finish_row(int side, size_t digits, const product *x, size_t row, __m512 scale,
                       size_t column, size_t columns, const int32_t *sums)
{
    float *out = x->out + row * x->ld_out + column * SIDE;
    const float *factors = x->factors + column * SIDE;
    const __m512 alpha = side == VALUES ? _mm512_set1_ps(x->factors[row]) : scale;
    for (size_t j = 0; j < columns; j++) {
        __m512 sum = sum_of(digits, sums + j * SIDE * SIDE);
        if (side == KEYS)
            sum = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_load_ps(factors + j * SIDE)), scale);
        else
            sum =
                _mm512_fmadd_ps(sum, scale, _mm512_mul_ps(_mm512_loadu_ps(out + j * SIDE), alpha));
        _mm512_storeu_ps(out + j * SIDE, sum);
    }
}

INLINE void finish_group(int side, size_t digits, const product *x, size_t group, size_t column,
                         size_t columns, const int32_t *sums)
{
    const float *scales = (const float *)(const void *)(x->a + group * x->group_bytes);
    size_t first = group * (SIDE / digits), n = SIDE / digits;
    n = x->rows - first < n ? x->rows - first : n;
    for (size_t r = 0; r < n; r++)
        finish_row(side, digits, x, first + r, _mm512_set1_ps(scales[r]), column, columns,
                   sums + r * digits * SIDE);
}

INLINE void finish_block(int side, size_t digits, const product *x, const block *w,
                         const int32_t *sums)
{
    /* Full blocks with constant bounds: fewer instructions than the general form. */
    if (w->groups == 2 && w->columns == 2) {
        finish_group(side, digits, x, w->group, w->column, 2, sums);
        finish_group(side, digits, x, w->group + 1, w->column, 2, sums + 2 * SIDE * SIDE);
    } else if (w->columns == 4) {
        finish_group(side, digits, x, w->group, w->column, 4, sums);
    } else {
        for (size_t i = 0; i < w->groups; i++)
            finish_group(side, digits, x, w->group + i, w->column, w->columns,
                         sums + i * 2 * SIDE * SIDE);
    }
}

/* w becomes the block after it; 0 when it was the last. */
INLINE int next_block(const product *x, size_t groups, block *w)
{
    size_t most, left;
    w->column += w->columns;
    if (w->column == x->columns) {
        w->column = 0;
        w->group += w->groups;
        w->groups = groups - w->group > 1 ? 2 : 1;
    }
    most = w->groups == 2 ? 2 : 4;
    left = x->columns - w->column;
    w->columns = left < most ? left : most;
    return w->group < groups;
}

INLINE void run(int side, size_t digits, const product *x)
{
    _Alignas(64) int32_t sums[4 * SIDE * SIDE];
    const size_t groups = (x->rows * digits + SIDE - 1) / SIDE;
    const size_t a_rows = (x->rows - x->first_group * (SIDE / digits)) * digits;
    /* Zero groups at the end of a row of columns: next_block moves to the first block. */
    block now = {x->first_group, 0, x->columns, 0}, stored = now;
    int more = next_block(x, groups, &now);

    /* The last of several groups may have unused rows, but its tiles have all 16. */
    configure(a_rows < SIDE ? a_rows : SIDE, x->depth);
    for (;;) {
        if (more)
            multiply(side, x, &now);
        if (stored.columns)
            finish_block(side, digits, x, &stored, sums);
        if (!more)
            break;
        store_sums(sums);
        stored = now;
        more = next_block(x, groups, &now);
    }
    KVT_TILE_RELEASE();
}

/* ---- digits ---- */

/*
 * Round 64 numbers of a row, to nearest even, and split them into digits. KEYS: magnitudes up to
 * 32639 (127 with one digit); VALUES: 0 to 65535 (255), and a NaN becomes 0.
 */
INLINE void put_digits(int side, size_t digits, const __m512 *x, unsigned char *to)
{
    /* Undoes the order of 32-bit lanes that two levels of 128-bit packs leave. */
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i c0 = _mm512_cvtps_epi32(x[0]), c1 = _mm512_cvtps_epi32(x[1]);
    const __m512i c2 = _mm512_cvtps_epi32(x[2]), c3 = _mm512_cvtps_epi32(x[3]);
    __m512i front, back, bytes;
    if (side == KEYS) {
        front = _mm512_packs_epi32(c0, c1);
        back = _mm512_packs_epi32(c2, c3);
    } else {
        front = _mm512_packus_epi32(c0, c1);
        back = _mm512_packus_epi32(c2, c3);
    }
    if (digits == 2) {
        if (side == KEYS) { /* a low byte of 128 or more is negative as int8: high is one more */
            const __m512i half = _mm512_set1_epi16(128);
            bytes = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(front, half), 8),
                                       _mm512_srai_epi16(_mm512_add_epi16(back, half), 8));
        } else {
            bytes = _mm512_packus_epi16(_mm512_srli_epi16(front, 8), _mm512_srli_epi16(back, 8));
        }
        _mm512_store_si512(to, _mm512_permutexvar_epi32(order, bytes));
        to += DEPTH_MAX;
    }
    front = _mm512_and_si512(front, _mm512_set1_epi16(255));
    back = _mm512_and_si512(back, _mm512_set1_epi16(255));
    bytes = _mm512_packus_epi16(front, back);
    _mm512_store_si512(to, _mm512_permutexvar_epi32(order, bytes));
}

/* ---- scores ---- */

static size_t depth_of(size_t dims_p)
{
    return dims_p < DEPTH_MAX ? dims_p : DEPTH_MAX;
}

static size_t chunks_of(size_t dims_p)
{
    return (dims_p + DEPTH_MAX - 1) / DEPTH_MAX;
}

INLINE void pack_q(size_t digits, float q_max, const float *q, size_t ldq, size_t rows,
                   size_t dims_p, void *packed)
{
    const size_t a_group = SIDE / digits, group_bytes = a_group * kvt_packed_row_bytes(dims_p);
    const size_t depth = depth_of(dims_p), chunks = chunks_of(dims_p);
    for (size_t r = 0; r < rows; r++, q += ldq) {
        unsigned char *group = (unsigned char *)packed + r / a_group * group_bytes;
        unsigned char *row = group + SCALES_BYTES + r % a_group * digits * DEPTH_MAX;
        __m512 largest = _mm512_set1_ps(LEAST), reciprocal;
        float top;
        for (size_t d = 0; d < dims_p; d += SIDE)
            largest = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(q + d)), largest);
        top = _mm512_reduce_max_ps(largest);
        reciprocal = _mm512_set1_ps(q_max / top);
        ((float *)(void *)group)[r % a_group] = top / q_max;
        for (size_t c = 0; c < chunks; c++, row += TILE_BYTES) {
            /* The last chunk overlaps the one before by so many dims, zero in this one. */
            size_t early = dims_p < (c + 1) * DEPTH_MAX && c ? (c + 1) * DEPTH_MAX - dims_p : 0;
            const float *from = q + c * DEPTH_MAX - early;
            __m512 x[4];
            for (size_t i = 0; i < 4; i++) {
                __mmask16 counts = SIDE * i >= early && SIDE * i < depth ? 0xffff : 0;
                x[i] = _mm512_mul_ps(_mm512_maskz_loadu_ps(counts, from + SIDE * i), reciprocal);
            }
            put_digits(KEYS, digits, x, row);
        }
    }
    /* Unused rows of the last group are multiplied, too: zero them. */
    for (size_t r = rows; r % a_group; r++)
        for (size_t c = 0; c < chunks; c++)
            memset((unsigned char *)packed + r / a_group * group_bytes + SCALES_BYTES +
                       c * TILE_BYTES + r % a_group * digits * DEPTH_MAX,
                   0, digits * DEPTH_MAX);
}

INLINE void qk(size_t digits, const void *packed, size_t first, size_t rows, const void *codes,
               const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next, float *s)
{
    _Alignas(64) float token_scales[KVT_TOKENS];
    const product x = {
        .a = packed,
        .group_bytes = SIDE / digits * kvt_packed_row_bytes(dims_p),
        .first_group = first / (SIDE / digits),
        .rows = rows,
        .b = codes,
        .columns = (n_tokens + SIDE - 1) / SIDE,
        .column_bytes = SIDE * dims_p,
        .row_bytes = 64,
        .last = (dims_p - depth_of(dims_p)) * SIDE,
        .depth = depth_of(dims_p),
        .chunks = chunks_of(dims_p),
        .next = next,
        .factors = token_scales,
        .out = s,
        .ld_out = KVT_TOKENS,
    };
    for (size_t t = 0; t < KVT_TOKENS; t += SIDE) {
        __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)(scales + t));
        _mm512_store_ps(token_scales + t, _mm512_cvtph_ps(h));
    }
    run(KEYS, digits, &x);
}

/* ---- codes of 4 and 5 bits ---- */

/*
 * Codes of 4 and 5 bits become the numbers that they stand for, in the order of 8 bits (tile.h),
 * once for all rows: a line of 64 bytes becomes two.
 */
enum { K4, V4, V5 };

INLINE __m512i numbers_of(int type, int upper)
{
    const __m128i levels = _mm_setr_epi8(KVT_V4_LEVELS);
    const __m128i odd = _mm_setr_epi8(-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15);
    if (type == V4)
        return _mm512_broadcast_i32x4(levels);
    if (type == V5)
        return _mm512_broadcast_i32x4(_mm_add_epi8(odd, _mm_set1_epi8(upper ? 16 : -16)));
    return _mm512_broadcast_i32x4(odd);
}

/* to: where the first half goes, and half_bytes behind it the second. fifth: V5's bits. */
INLINE void unpack_line(int type, const unsigned char *line, const unsigned char *fifth,
                        unsigned char *to, size_t half_bytes)
{
    __m512i half[2];
    kvt_unpack_nibbles(_mm512_loadu_si512(line), half);
    for (size_t i = 0; i < 2; i++) {
        __m512i x = _mm512_shuffle_epi8(numbers_of(type, 0), half[i]);
        if (type == V5) {
            uint64_t upper;
            memcpy(&upper, fifth + 8 * i, sizeof upper);
            x = _mm512_mask_shuffle_epi8(x, upper, numbers_of(type, 1), half[i]);
        }
        _mm512_store_si512(to + i * half_bytes, x);
    }
}

/*
 * Cycles of a line for the prefetch: the lines are read in one go, and the products come after, so
 * the prefetches are to wait for the lines.
 */
#define UNPACK_CYCLES KVT_PREFETCH_WAITS

/* Numbers that are unpacked at a time: 64 tokens of 512 dims. */
#define UNPACKED (KVT_TOKENS * (size_t)512)

/* With fewer rows the products of avx512_4bit.c do less work than unpacking all codes does. */
#define ROWS_LEAST 4

/* ---- scores of 4 bits ---- */

/* Digits of q[d] * scales[d] as groups, `chunks` tiles each, zero beyond dims_p. */
INLINE void pack_folded(const float *q, size_t ldq, const uint16_t *scales, size_t rows,
                        size_t dims_p, unsigned char *packed, size_t group_bytes)
{
    const size_t chunks = chunks_of(dims_p);
#define FOLD(n)                                                                                    \
    kvt_fold(n, q + r * ldq, ldq, scales, dims_p, row, DEPTH_MAX, TILE_BYTES, &step, &sum)
    for (size_t r = 0, n; r < rows; r += n) { /* 8, 4, 2 or 1, so that a group has whole ones */
        unsigned char *group = packed + r / SIDE * group_bytes;
        unsigned char *row = group + SCALES_BYTES + r % SIDE * DEPTH_MAX;
        __m512 step;
        __m512i sum;
        n = rows - r >= 8 ? 8 : rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
        switch (n) {
        case 8: FOLD(8); break;
        case 4: FOLD(4); break;
        case 2: FOLD(2); break;
        default: FOLD(1); break;
        }
        _mm512_mask_storeu_ps((float *)(void *)group + r % SIDE, (__mmask16)((1u << n) - 1), step);
    }
#undef FOLD
    for (size_t r = rows; r % SIDE; r++) /* unused rows, as in pack_q */
        for (size_t c = 0; c < chunks; c++)
            memset(packed + r / SIDE * group_bytes + SCALES_BYTES + c * TILE_BYTES +
                       r % SIDE * DEPTH_MAX,
                   0, DEPTH_MAX);
}

/* n tiles of K from tile `first` on, column_bytes apart; zeros up to there. */
INLINE void unpack_k(const unsigned char *codes, size_t first, size_t n, size_t dims_p,
                     uintptr_t next, unsigned char *to, size_t column_bytes)
{
    const size_t tile = dims_p * 8, middle = 2 * tile;
    for (size_t j = first; j < first + n; j++, to += column_bytes) {
        for (size_t at = j * tile; at < (j + 1) * tile; at += 64) {
            const uintptr_t again = j < 2 ? (uintptr_t)codes + at + middle : next + at - middle;
            unpack_line(K4, codes + at, NULL, to + (at - j * tile) * 2, 64);
            kvt_prefetch_line(UNPACK_CYCLES, codes + at, next + at, again);
        }
        memset(to + 2 * tile, 0, column_bytes - 2 * tile);
    }
}

/* A code stands for (2 * code - 15) / 2 scales. */
static void qk_i4_near(const float *q, size_t ldq, size_t rows, const void *codes,
                       const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                       float *s)
{
    _Alignas(64) unsigned char packed[KVT_ROWS_MAX / SIDE * (SCALES_BYTES + SIDE * KVT_DIMS_MAX)];
    _Alignas(64) unsigned char numbers[UNPACKED];
    _Alignas(64) float halves[KVT_TOKENS];
    const size_t chunks = chunks_of(dims_p), column_bytes = chunks * TILE_BYTES;
    const size_t most = 4 * column_bytes <= UNPACKED ? 4 : 2;
    product x = {
        .a = packed,
        .group_bytes = SCALES_BYTES + column_bytes,
        .rows = rows,
        .b = numbers,
        .column_bytes = column_bytes,
        .row_bytes = 64,
        .last = (chunks - 1) * TILE_BYTES,
        .depth = DEPTH_MAX,
        .chunks = chunks,
        .factors = halves,
        .ld_out = KVT_TOKENS,
    };

    if (rows < ROWS_LEAST) {
        kvt_avx512_qk_i4_near(q, ldq, rows, codes, scales, n_tokens, dims_p, next, s);
        return;
    }
    for (size_t t = 0; t < KVT_TOKENS; t += SIDE)
        _mm512_store_ps(halves + t, _mm512_set1_ps(0.5f));
    pack_folded(q, ldq, scales, rows, dims_p, packed, x.group_bytes);
    for (size_t j = 0, tiles = (n_tokens + SIDE - 1) / SIDE; j < tiles; j += most) {
        x.columns = tiles - j < most ? tiles - j : most;
        x.out = s + j * SIDE;
        unpack_k(codes, j, x.columns, dims_p, (uintptr_t)(next ? next : codes), numbers,
                 column_bytes);
        run(KEYS, 1, &x);
    }
}

/* ---- weighted sums ---- */

typedef struct weights {
    float scales[16];
    unsigned char tile[16][64];
} weights;

/* The weights of 16 tokens; zero beyond n_tokens, where the stored scale can be a NaN. */
#define WEIGHTS(p, t) _mm512_mul_ps(_mm512_loadu_ps((p) + (t)), scale[(t) / 16])

/*
 * The weights of all rows as digits. Two passes over the rows: the first finds the maxima, so that
 * 16 divisions are one vector instruction.
 */
INLINE void pack_p(size_t digits, float p_max, const float *p, size_t rows, const uint16_t *scales,
                   size_t n_tokens, weights *groups)
{
    const uint64_t alive = ~(uint64_t)0 >> (KVT_TOKENS - n_tokens);
    const size_t a_group = SIDE / digits;
    _Alignas(64) float largest[KVT_ROWS_MAX], reciprocal[KVT_ROWS_MAX], unit[KVT_ROWS_MAX];
    __m512 scale[4], dither[4];

    for (size_t i = 0; i < 4; i++) {
        scale[i] = _mm512_maskz_cvtph_ps(
            (__mmask16)(alive >> 16 * i),
            _mm256_loadu_si256((const __m256i *)(const void *)(scales + 16 * i)));
        dither[i] = digits == 1 ? _mm512_load_ps(kvt_dither + 16 * i) : _mm512_setzero_ps();
    }
    for (size_t i = 0; i < KVT_ROWS_MAX; i += SIDE)
        _mm512_store_ps(largest + i, _mm512_set1_ps(LEAST));
    for (size_t r = 0; r < rows; r++) {
        const float *row = p + r * KVT_TOKENS;
        /* vmaxps returns its second operand for a NaN (of logits beyond f32); its digits are 0. */
        __m512 top = _mm512_max_ps(WEIGHTS(row, 0), _mm512_set1_ps(LEAST));
        top = _mm512_max_ps(WEIGHTS(row, 16), top);
        top = _mm512_max_ps(WEIGHTS(row, 32), top);
        top = _mm512_max_ps(WEIGHTS(row, 48), top);
        largest[r] = _mm512_reduce_max_ps(top);
    }
    for (size_t i = 0; i < rows; i += SIDE) {
        __m512 top = _mm512_load_ps(largest + i);
        _mm512_store_ps(reciprocal + i, _mm512_div_ps(_mm512_set1_ps(p_max), top));
        _mm512_store_ps(unit + i, _mm512_div_ps(top, _mm512_set1_ps(p_max)));
    }
    for (size_t r = 0; r < rows; r++) {
        const float *row = p + r * KVT_TOKENS;
        const __m512 by = _mm512_set1_ps(reciprocal[r]);
        const __m512 x[4] = {
            _mm512_fmadd_ps(WEIGHTS(row, 0), by, dither[0]),
            _mm512_fmadd_ps(WEIGHTS(row, 16), by, dither[1]),
            _mm512_fmadd_ps(WEIGHTS(row, 32), by, dither[2]),
            _mm512_fmadd_ps(WEIGHTS(row, 48), by, dither[3]),
        };
        groups[r / a_group].scales[r % a_group] = unit[r];
        put_digits(VALUES, digits, x, groups[r / a_group].tile[r % a_group * digits]);
    }
    for (size_t r = rows; r % a_group; r++) /* unused rows, as in pack_q */
        memset(groups[r / a_group].tile[r % a_group * digits], 0, digits * DEPTH_MAX);
}

/* Weighted sums of dims_p dims of which B has codes in 8 bits, laid out as tile.h says. */
INLINE product weighted_of(const weights *groups, size_t rows, const void *codes, size_t dims_p,
                           const float *alpha, float *acc, size_t ldacc)
{
    return (product){
        .a = (const unsigned char *)groups,
        .group_bytes = sizeof *groups,
        .rows = rows,
        .b = codes,
        .columns = dims_p / SIDE,
        .column_bytes = 64,
        .row_bytes = 4 * dims_p,
        .depth = KVT_TOKENS,
        .chunks = 1,
        .factors = alpha,
        .out = acc,
        .ld_out = ldacc,
    };
}

INLINE void pv(size_t digits, float p_max, const float *p, size_t rows, const void *codes,
               const uint16_t *scales, size_t n_tokens, size_t dims_p, const float *alpha,
               const void *next, float *acc, size_t ldacc)
{
    _Alignas(64) weights groups[KVT_ROWS_MAX / 8];
    product x = weighted_of(groups, rows, codes, dims_p, alpha, acc, ldacc);
    x.next = next;
    pack_p(digits, p_max, p, rows, scales, n_tokens, groups);
    run(VALUES, digits, &x);
}

/* ---- weighted sums of 4 and 5 bits ---- */

/* n dims of V from `dim` on. */
INLINE void unpack_v(int type, const unsigned char *codes, size_t dims_p, size_t dim, size_t n,
                     uintptr_t next, unsigned char *to)
{
    const size_t middle = dims_p * KVT_TOKENS / 4;
    for (size_t t = 0; t < KVT_TOKENS; t += 8) {
        const size_t fifth = kvt_v5_index(t, dim, dims_p);
        const size_t first = kvt_v4_index(t, dim, dims_p);
        for (size_t at = first; at < first + 4 * n; at += 64, to += 64) {
            const uintptr_t again =
                t < KVT_TOKENS / 2 ? (uintptr_t)codes + at + middle : next + at - middle;
            unpack_line(type, codes + at, type == V5 ? codes + fifth + (at - first) / 4 : NULL, to,
                        4 * n);
            kvt_prefetch_line(UNPACK_CYCLES, codes + at, next + at, again);
        }
        to += 4 * n;
        for (size_t at = fifth; type == V5 && at < fifth + n; at += 64)
            _mm_prefetch((const char *)(next + at), _MM_HINT_T1);
    }
}

INLINE void pv_bits(int type, const float *p, size_t rows, const void *codes,
                    const uint16_t *scales, size_t n_tokens, size_t dims_p, const float *alpha,
                    const void *next, float *acc, size_t ldacc)
{
    _Alignas(64) unsigned char numbers[UNPACKED];
    _Alignas(64) weights groups[KVT_ROWS_MAX / 8];
    const size_t most = UNPACKED / KVT_TOKENS;
    pack_p(1, P_MAX_FAST, p, rows, scales, n_tokens, groups);
    for (size_t d = 0; d < dims_p; d += most) {
        const size_t n = dims_p - d < most ? dims_p - d : most;
        const product x = weighted_of(groups, rows, numbers, n, alpha, acc + d, ldacc);
        unpack_v(type, codes, dims_p, d, n, (uintptr_t)(next ? next : codes), numbers);
        run(VALUES, 1, &x);
    }
}

static void pv_i4_near(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                       size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                       float *acc, size_t ldacc)
{
    if (rows < ROWS_LEAST)
        kvt_avx512_pv_i4_near(p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc);
    else
        pv_bits(V4, p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc);
}

static void pv_i5_near(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                       size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                       float *acc, size_t ldacc)
{
    if (rows < ROWS_LEAST)
        kvt_avx512_pv_i5_near(p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc);
    else
        pv_bits(V5, p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc);
}

/* ---- the kernels ---- */

static void pack_q_near(const float *q, size_t ldq, size_t rows, size_t dims_p, void *packed)
{
    pack_q(2, Q_MAX_NEAR, q, ldq, rows, dims_p, packed);
}

static void pack_q_fast(const float *q, size_t ldq, size_t rows, size_t dims_p, void *packed)
{
    pack_q(1, Q_MAX_FAST, q, ldq, rows, dims_p, packed);
}

static void qk_i8_near(const void *packed, size_t first, size_t rows, const void *codes,
                       const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                       float *s)
{
    qk(2, packed, first, rows, codes, scales, n_tokens, dims_p, next, s);
}

static void qk_i8_fast(const void *packed, size_t first, size_t rows, const void *codes,
                       const uint16_t *scales, size_t n_tokens, size_t dims_p, const void *next,
                       float *s)
{
    qk(1, packed, first, rows, codes, scales, n_tokens, dims_p, next, s);
}

static void pv_i8_near(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                       size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                       float *acc, size_t ldacc)
{
    pv(2, P_MAX_NEAR, p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc);
}

static void pv_i8_fast(const float *p, size_t rows, const void *codes, const uint16_t *scales,
                       size_t n_tokens, size_t dims_p, const float *alpha, const void *next,
                       float *acc, size_t ldacc)
{
    pv(1, P_MAX_FAST, p, rows, codes, scales, n_tokens, dims_p, alpha, next, acc, ldacc);
}

const kvt_kernels kvt_kernels_amx = {
    .isa = "amx",
    .pack_q_near = pack_q_near,
    .pack_q_fast = pack_q_fast,
    .qk_i8_near = qk_i8_near,
    .qk_i8_fast = qk_i8_fast,
    .pv_i8_near = pv_i8_near,
    .pv_i8_fast = pv_i8_fast,
    .qk_i4_near = qk_i4_near,
    .pv_i4_near = pv_i4_near,
    .pv_i5_near = pv_i5_near,
};
