/*
 * Filters and the codec of a snapshot's streams. The only file that names zstd.
 *
 * zstd's fast levels are an order-0 entropy coder with a match finder that has nothing to find in
 * most of a cache, so a filter pays where it changes the distribution of single bytes (measured
 * on synthetic keys and values, 8 heads of 128 dims; docs/format.md says what each one does):
 *
 *   delta        i8 codes that follow each other in time: keys without offset or rotation 1.04 ->
 *                1.2, and 1.2 -> 1.4 at a correlation of 0.9; worse where tokens are independent
 *   planes       f16 1.07 -> 1.15, f32 1.07 -> 1.18, scales 2.4 -> 2.6; each plane a frame of its
 *                own, since planes that share a table of codes spoil each other's
 *   token-major  rows that repeat as a whole, as the first layer's values do where tokens
 *                repeat: 1.07 -> 3.4
 *
 * Codes take the delta where it makes the sum of their magnitudes smaller, which tells the entropy
 * well enough and costs a pass in cache. Only where rows may repeat is the token-major order
 * compressed as well and the smaller result kept. The choice depends on the bytes alone.
 */
#define ZSTD_STATIC_LINKING_ONLY /* ZSTD_customMem: zstd's memory is the cache's, and counted */
#include <zstd.h>
#include <zstd_errors.h>

#include "src/snapshot/format.h"

/* ---- memory for zstd: its free does not tell the size, so that is kept in front ---- */

#define SIZE_FIELD 64 /* keeps the alignment */

static void *zstd_alloc(void *opaque, size_t bytes)
{
    kvt_snap_codec *codec = opaque;
    void *memory;

    if (bytes > SIZE_MAX - SIZE_FIELD) {
        codec->failure = KVT_ERR_MEMORY;
        return NULL;
    }
    bytes += SIZE_FIELD;
    codec->failure = kvt_snap_alloc(codec->context, bytes, "zstd", &memory);
    if (codec->failure != KVT_OK)
        return NULL;
    memcpy(memory, &bytes, sizeof bytes);
    return (unsigned char *)memory + SIZE_FIELD;
}

static void zstd_free(void *opaque, void *address)
{
    kvt_snap_codec *codec = opaque;
    unsigned char *memory;
    size_t bytes;

    if (!address)
        return;
    memory = (unsigned char *)address - SIZE_FIELD;
    memcpy(&bytes, memory, sizeof bytes);
    kvt_snap_free(codec->context, memory, bytes);
}

static ZSTD_customMem zstd_memory(kvt_snap_codec *codec)
{
    ZSTD_customMem memory;
    memory.customAlloc = zstd_alloc;
    memory.customFree = zstd_free;
    memory.opaque = codec;
    return memory;
}

void kvt_snap_codec_init(kvt_snap_codec *codec, const kvt_snap_context *context)
{
    memset(codec, 0, sizeof *codec);
    codec->context = context;
    codec->level = 0;
}

void kvt_snap_codec_release(kvt_snap_codec *codec)
{
    (void)ZSTD_freeCCtx(codec->compressor);
    (void)ZSTD_freeDCtx(codec->decompressor);
    codec->compressor = NULL;
    codec->decompressor = NULL;
    kvt_snap_release(codec->context, &codec->filtered);
    kvt_snap_release(codec->context, &codec->attempt);
}

/* ---- delta: every code minus that of the token before, per head and dim, mod 256 ---- */

static uint32_t add8(uint32_t a, uint32_t b) /* four bytes, no carry between them */
{
    return ((a & 0x7f7f7f7fu) + (b & 0x7f7f7f7fu)) ^ ((a ^ b) & 0x80808080u);
}

static uint32_t sub8(uint32_t a, uint32_t b)
{
    return ((a | 0x80808080u) - (b & 0x7f7f7f7fu)) ^ ((a ^ ~b) & 0x80808080u);
}

static uint32_t word_at(const unsigned char *p, size_t i)
{
    return kvt_get32(p + 4 * i);
}

/*
 * K, [tile][dim / 4][16 tokens][4 dims]: a word is four dims of a token, the word before it the
 * token before; for a tile's first token that is the last one of the tile before.
 */
static void delta_k(const kvt_snap_shape *shape, const unsigned char *from, unsigned char *to,
                    int undo)
{
    size_t lanes = shape->dims / 4, tiles = (shape->tokens + 15) / 16, h, d, i, t;

    for (h = 0; h < shape->heads; h++)
        for (i = 0; i < tiles; i++) {
            size_t tile = (h * tiles + i) * lanes * 64;
            for (d = 0; d < lanes; d++) {
                const unsigned char *source = from + tile + d * 64;
                unsigned char *target = to + tile + d * 64;
                /* Values, not differences: undoing, they are in the target already. */
                const unsigned char *values = undo ? target : source;
                uint32_t before = i ? word_at(values - lanes * 64, 15) : 0;

                if (undo) {
                    for (t = 0; t < 16; t++) {
                        before = add8(before, word_at(source, t));
                        kvt_put32(target + 4 * t, before);
                    }
                } else {
                    kvt_put32(target, sub8(word_at(source, 0), before));
                    for (t = 1; t < 16; t++)
                        kvt_put32(target + 4 * t, sub8(word_at(source, t), word_at(source, t - 1)));
                }
            }
        }
}

/* V, [token / 4][dim][4 tokens]: a word is four tokens of a dim, the first in its low byte. */
static void delta_v(const kvt_snap_shape *shape, const unsigned char *from, unsigned char *to,
                    int undo)
{
    size_t dims = shape->dims, groups = (shape->tokens + 3) / 4, h, i, d;

    for (h = 0; h < shape->heads; h++)
        for (i = 0; i < groups; i++) {
            const unsigned char *source = from + (h * groups + i) * dims * 4;
            unsigned char *target = to + (h * groups + i) * dims * 4;
            const unsigned char *values = (undo ? target : source) - (i ? dims * 4 : 0);

            for (d = 0; d < dims; d++) {
                uint32_t before = i ? word_at(values, d) >> 24 : 0;
                uint32_t x = word_at(source, d);
                if (undo) {
                    x = add8(x, x << 8);
                    x = add8(x, x << 16);
                    x = add8(x, before * 0x01010101u);
                } else {
                    x = sub8(x, x << 8 | before);
                }
                kvt_put32(target + 4 * d, x);
            }
        }
}

/* ---- token-major: [head][token][dim], tokens rounded up as in the native order ---- */

static void token_major_k(const kvt_snap_shape *shape, const unsigned char *from, unsigned char *to,
                          int undo)
{
    size_t lanes = shape->dims / 4, tiles = shape->heads * ((shape->tokens + 15) / 16), i, d, t;

    for (i = 0; i < tiles; i++) {
        size_t tile = i * lanes * 64;
        for (t = 0; t < 16; t++)
            for (d = 0; d < lanes; d++) {
                size_t native = tile + (d * 16 + t) * 4, row = tile + (t * lanes + d) * 4;
                memcpy(to + (undo ? native : row), from + (undo ? row : native), 4);
            }
    }
}

static void token_major_v(const kvt_snap_shape *shape, const unsigned char *from, unsigned char *to,
                          int undo)
{
    size_t dims = shape->dims, groups = shape->heads * ((shape->tokens + 3) / 4), i, d;

    for (i = 0; i < groups; i++) {
        const unsigned char *source = from + i * dims * 4;
        unsigned char *target = to + i * dims * 4;
        for (d = 0; d < dims; d++) {
            if (undo) {
                target[4 * d] = source[d];
                target[4 * d + 1] = source[dims + d];
                target[4 * d + 2] = source[2 * dims + d];
                target[4 * d + 3] = source[3 * dims + d];
            } else {
                target[d] = source[4 * d];
                target[dims + d] = source[4 * d + 1];
                target[2 * dims + d] = source[4 * d + 2];
                target[3 * dims + d] = source[4 * d + 3];
            }
        }
    }
}

/* ---- planes: all lowest bytes, then all second ones, ... ---- */

static void planes_split(const unsigned char *from, unsigned char *to, size_t n, size_t element)
{
    size_t i;

    if (element == 2) {
        unsigned char *high = to + n;
        for (i = 0; i < n; i++) {
            to[i] = from[2 * i];
            high[i] = from[2 * i + 1];
        }
    } else {
        unsigned char *a = to, *b = to + n, *c = b + n, *d = c + n;
        for (i = 0; i < n; i++) {
            uint32_t x = word_at(from, i);
            a[i] = (unsigned char)x;
            b[i] = (unsigned char)(x >> 8);
            c[i] = (unsigned char)(x >> 16);
            d[i] = (unsigned char)(x >> 24);
        }
    }
}

static void planes_join(const unsigned char *from, unsigned char *to, size_t n, size_t element)
{
    size_t i;

    if (element == 2) {
        const unsigned char *high = from + n;
        for (i = 0; i < n; i++) {
            to[2 * i] = from[i];
            to[2 * i + 1] = high[i];
        }
    } else {
        const unsigned char *a = from, *b = a + n, *c = b + n, *d = c + n;
        for (i = 0; i < n; i++)
            kvt_put32(to + 4 * i,
                      a[i] | (uint32_t)b[i] << 8 | (uint32_t)c[i] << 16 | (uint32_t)d[i] << 24);
    }
}

/* ---- choice ---- */

int kvt_snap_filter_known(const kvt_snap_shape *shape, uint32_t filter)
{
    if (shape->bits < 8)
        return filter == KVT_SNAP_NATIVE;
    if (shape->element == 1)
        return filter <= KVT_SNAP_DELTA;
    return filter == KVT_SNAP_NATIVE || filter == KVT_SNAP_PLANES;
}

static void filter_apply(const kvt_snap_shape *shape, uint32_t filter, const unsigned char *from,
                         unsigned char *to, int undo)
{
    int is_k = shape->kind == KVT_SNAP_KIND_K;

    switch (filter) {
    case KVT_SNAP_TOKEN_MAJOR: (is_k ? token_major_k : token_major_v)(shape, from, to, undo); break;
    case KVT_SNAP_DELTA: (is_k ? delta_k : delta_v)(shape, from, to, undo); break;
    case KVT_SNAP_PLANES:
        (undo ? planes_join : planes_split)(from, to, shape->bytes / shape->element,
                                            shape->element);
        break;
    default: memcpy(to, from, shape->bytes); break;
    }
}

static uint64_t sum_of_magnitudes(const unsigned char *p, size_t bytes)
{
    uint64_t sum = 0;
    size_t i, end;

    for (i = 0; i < bytes; i = end) {
        uint32_t part = 0; /* 128 * 4096 fits many times */
        end = bytes - i < 4096 ? bytes : i + 4096;
        for (; i < end; i++) {
            int x = (signed char)p[i];
            part += (uint32_t)(x < 0 ? -x : x);
        }
        sum += part;
    }
    return sum;
}

/* ---- zstd ---- */

static kvt_status compressor_make(kvt_snap_codec *codec)
{
    if (codec->compressor)
        return KVT_OK;
    codec->failure = KVT_OK;
    codec->compressor = ZSTD_createCCtx_advanced(zstd_memory(codec));
    if (!codec->compressor)
        return codec->failure != KVT_OK
                   ? codec->failure
                   : kvt_snap_fail(codec->context, KVT_ERR_MEMORY, "no zstd context");
    codec->set_level = 0;
    return KVT_OK;
}

/*
 * The level for a part. Small streams, as small models have, take little time at a higher one, and
 * where tokens repeat that finds 5% more in 4-bit keys of the first layer.
 */
#define SMALL_BYTES ((size_t)1 << 14)
#define SMALL_LEVEL 6
static int level_of(const kvt_snap_codec *codec, size_t bytes)
{
    return codec->level ? codec->level : bytes <= SMALL_BYTES ? SMALL_LEVEL : 1;
}

static kvt_status set_level(kvt_snap_codec *codec, int level)
{
    if (codec->set_level != level &&
        ZSTD_isError(ZSTD_CCtx_setParameter(codec->compressor, ZSTD_c_compressionLevel, level)))
        return kvt_snap_fail(codec->context, KVT_ERR_UNSUPPORTED, "zstd refuses level %d", level);
    codec->set_level = level;
    return KVT_OK;
}

/*
 * Compress `planes` equal parts, each to a frame. *stored: bytes in `to`, or 0 when they would
 * pass `room`.
 */
static kvt_status compress(kvt_snap_codec *codec, const unsigned char *from, size_t bytes,
                           size_t planes, unsigned char *to, size_t room, size_t *stored)
{
    size_t part = bytes / planes, used = 0, i;
    kvt_status status = set_level(codec, level_of(codec, part));

    *stored = 0;
    if (status != KVT_OK)
        return status;
    for (i = 0; i < planes; i++) {
        size_t n;
        codec->failure = KVT_OK;
        n = ZSTD_compress2(codec->compressor, to + used, room - used, from + i * part, part);
        if (ZSTD_isError(n)) {
            if (codec->failure != KVT_OK)
                return codec->failure;
            if (ZSTD_getErrorCode(n) == ZSTD_error_dstSize_tooSmall)
                return KVT_OK;
            return kvt_snap_fail(codec->context, KVT_ERR_UNSUPPORTED, "zstd: %s",
                                 ZSTD_getErrorName(n));
        }
        used += n;
    }
    *stored = used;
    return KVT_OK;
}

/*
 * Whether a sample of codes of up to 8 bits shrinks by 2%, as it has to: what it does not is stored
 * as it is at once. The entropy coder sees it in the distribution of bytes, so a sample from the
 * middle tells; zstd's fast levels find no more than that in codes.
 */
#define SAMPLE_BYTES ((size_t)1 << 14)
static kvt_status sample_shrinks(kvt_snap_codec *codec, const unsigned char *from, size_t bytes,
                                 unsigned char *to, int *shrinks)
{
    size_t part = bytes < SAMPLE_BYTES ? bytes : SAMPLE_BYTES, stored;
    kvt_status status = compress(codec, from + (bytes - part) / 2 / 64 * 64, part, 1, to,
                                 part - part / 50, &stored);
    *shrinks = status == KVT_OK && stored;
    return status;
}

/* The largest stream: of a layer with 64 tokens, or of ids. */
static size_t largest_stream(const kvt_snap_header *header)
{
    uint64_t n =
        header->n_tokens < KVT_SNAP_CHUNK_TOKENS ? header->n_tokens : KVT_SNAP_CHUNK_TOKENS;
    size_t most = (size_t)n * 4, sum;
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    uint32_t g, i, streams, form;

    for (g = 0; g < header->n_groups; g++)
        for (form = KVT_SEALED; form < KVT_FORMS; form++) {
            if (!kvt_snap_has_form(&header->groups[g], form))
                continue;
            streams = kvt_snap_shapes(&header->groups[g], form, KVT_TOKENS, shapes, &sum);
            for (i = 0; i < streams; i++)
                most = shapes[i].bytes > most ? shapes[i].bytes : most;
        }
    return most;
}

uint64_t kvt_snap_encode_bytes(const kvt_snap_header *header)
{
    size_t largest = largest_stream(header), part = 1, again = 0, most = 0, sum;
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    uint32_t g, i, streams;

    /* zstd's parameters follow from the power of two that a part's size is rounded up to, and the
     * context does not always grow with it: it comes to be that of the size that takes most. */
    for (;;) {
        int level = part <= SMALL_BYTES ? SMALL_LEVEL : 1;
        size_t bytes = ZSTD_estimateCCtxSize_usingCParams(ZSTD_getCParams(level, part, 0));
        if (!ZSTD_isError(bytes) && bytes > most)
            most = bytes;
        if (part >= largest)
            break;
        part = part > largest / 2 ? largest : 2 * part;
    }
    for (g = 0; g < header->n_groups; g++) { /* codec.attempt: of V, where it is in layer 0 */
        /* i8 of a fine block, as of a sealed one of i8, where the two are alike */
        streams = kvt_snap_shapes(&header->groups[g], KVT_FINE, KVT_TOKENS, shapes, &sum);
        for (i = 0; i < streams; i++)
            if (shapes[i].kind == KVT_SNAP_KIND_V && shapes[i].bits == 8)
                again = shapes[i].bytes > again ? shapes[i].bytes : again;
    }
    return kvt_snap_counted(most) + 4 * SIZE_FIELD + kvt_snap_counted(largest) +
           kvt_snap_counted(again);
}

uint64_t kvt_snap_decode_bytes(const kvt_snap_header *header)
{
    return kvt_snap_counted(ZSTD_estimateDCtxSize()) + SIZE_FIELD +
           kvt_snap_counted(largest_stream(header));
}

static void stream_raw(const kvt_snap_shape *shape, const unsigned char *native, unsigned char *to,
                       kvt_snap_stream *stream)
{
    if (to != native) /* without compression the writer gathers in place */
        memcpy(to, native, shape->bytes);
    stream->filter = KVT_SNAP_NATIVE;
    stream->codec = KVT_SNAP_RAW;
    stream->stored_bytes = (uint32_t)shape->bytes;
}

kvt_status kvt_snap_encode(kvt_snap_codec *codec, const kvt_snap_shape *shape,
                           const unsigned char *native, unsigned char *to, kvt_snap_stream *stream)
{
    const unsigned char *source = native;
    size_t room = shape->bytes - shape->bytes / 50, stored = 0, planes = 1;
    kvt_status status;

    memset(stream, 0, sizeof *stream);
    stream->kind = shape->kind;
    stream->native_bytes = (uint32_t)shape->bytes;
    if (codec->raw || shape->bytes < 32) {
        stream_raw(shape, native, to, stream);
        stream->sum = kvt_snap_sum(to, stream->stored_bytes);
        return KVT_OK;
    }
    status = compressor_make(codec);
    if (status == KVT_OK)
        status = kvt_snap_reserve(codec->context, &codec->filtered, 0, shape->bytes,
                                  "a snapshot's filter");
    if (status != KVT_OK)
        return status;
    if (shape->bits < 8) {
        /* Levels that are about equally often: no filter. */
    } else if (shape->element == 1) {
        filter_apply(shape, KVT_SNAP_DELTA, native, codec->filtered.data, 0);
        if (sum_of_magnitudes(codec->filtered.data, shape->bytes) <
            sum_of_magnitudes(native, shape->bytes)) {
            stream->filter = KVT_SNAP_DELTA;
            source = codec->filtered.data;
        }
    } else {
        filter_apply(shape, KVT_SNAP_PLANES, native, codec->filtered.data, 0);
        stream->filter = KVT_SNAP_PLANES;
        source = codec->filtered.data;
        planes = shape->element;
    }
    if (codec->samples && shape->bits <= 8 && !shape->repeats && shape->bytes >= 2 * SAMPLE_BYTES) {
        int shrinks;
        status = sample_shrinks(codec, source, shape->bytes, to, &shrinks);
        if (status != KVT_OK)
            return status;
        if (!shrinks) {
            stream_raw(shape, native, to, stream);
            stream->sum = kvt_snap_sum(to, stream->stored_bytes);
            return KVT_OK;
        }
    }
    status = compress(codec, source, shape->bytes, planes, to, room, &stored);
    if (status == KVT_OK && shape->repeats && shape->bits == 8) {
        size_t again;
        status = kvt_snap_reserve(codec->context, &codec->attempt, 0, shape->bytes,
                                  "a snapshot's filter");
        if (status != KVT_OK)
            return status;
        filter_apply(shape, KVT_SNAP_TOKEN_MAJOR, native, codec->filtered.data, 0);
        status = compress(codec, codec->filtered.data, shape->bytes, 1, codec->attempt.data,
                          stored ? stored - 1 : room, &again);
        if (status == KVT_OK && again) {
            memcpy(to, codec->attempt.data, again);
            stored = again;
            stream->filter = KVT_SNAP_TOKEN_MAJOR;
        }
    }
    if (status != KVT_OK)
        return status;
    if (stored) {
        stream->codec = KVT_SNAP_ZSTD;
        stream->stored_bytes = (uint32_t)stored;
    } else {
        stream_raw(shape, native, to, stream);
    }
    stream->sum = kvt_snap_sum(to, stream->stored_bytes);
    return KVT_OK;
}

#define SINGLE_SEGMENT 0x20u /* of the byte behind a frame's magic: no window follows */
#define WINDOW_EXPONENT 20u  /* at most, of zstd where pointers have 32 bits; elsewhere 21 */

/*
 * Whether all are frames of RFC 8878 with contents, which every build of zstd takes. One takes
 * others besides: skippable ones, those of its first versions, where it was built so, and larger
 * windows.
 */
static int are_frames(const unsigned char *stored, size_t bytes)
{
    while (bytes) {
        size_t n;
        if (bytes < 4 || kvt_get32(stored) != ZSTD_MAGICNUMBER)
            return 0;
        n = ZSTD_findFrameCompressedSize(stored, bytes);
        if (ZSTD_isError(n))
            return 0;
        /* It has a header, of 6 bytes at least. */
        if (!(stored[4] & SINGLE_SEGMENT) && stored[5] >> 3 > WINDOW_EXPONENT)
            return 0;
        stored += n;
        bytes -= n;
    }
    return 1;
}

kvt_status kvt_snap_decode(kvt_snap_codec *codec, const kvt_snap_shape *shape,
                           const kvt_snap_stream *stream, const unsigned char *stored,
                           unsigned char *native)
{
    const unsigned char *source = stored;
    kvt_status status;

    if (stream->codec == KVT_SNAP_ZSTD) {
        unsigned char *to = native;
        size_t n;

        if (!are_frames(stored, stream->stored_bytes))
            return KVT_ERR_CORRUPT;
        if (!codec->decompressor) {
            codec->failure = KVT_OK;
            codec->decompressor = ZSTD_createDCtx_advanced(zstd_memory(codec));
            if (!codec->decompressor)
                return codec->failure != KVT_OK
                           ? codec->failure
                           : kvt_snap_fail(codec->context, KVT_ERR_MEMORY, "no zstd context");
        }
        if (stream->filter != KVT_SNAP_NATIVE) {
            status = kvt_snap_reserve(codec->context, &codec->filtered, 0, shape->bytes,
                                      "a snapshot's filter");
            if (status != KVT_OK)
                return status;
            to = codec->filtered.data;
        }
        /* One pass into memory of the full size: no window is allocated, whatever a frame asks
         * for. The size has to come out exactly. */
        codec->failure = KVT_OK;
        n = ZSTD_decompressDCtx(codec->decompressor, to, shape->bytes, stored,
                                stream->stored_bytes);
        if (codec->failure != KVT_OK)
            return codec->failure;
        if (ZSTD_isError(n) || n != shape->bytes)
            return KVT_ERR_CORRUPT;
        if (to == native)
            return KVT_OK;
        source = to;
    }
    filter_apply(shape, stream->filter, source, native, 1);
    return KVT_OK;
}
