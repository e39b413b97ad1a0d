/*
 * Encrypted files, by libsodium's crypto_secretstream_xchacha20poly1305 (cipher.c).
 *
 * A container is a head and segments of one size, the last one shorter. Each is a secret stream of
 * one message, with a header (nonce) of its own, so that segments are coded in parallel and read at
 * any place. What a single stream would see to by its order is seen to by the additional data: the
 * head, which has the file's random id, the segment's number, its size, and whether it is the last.
 *
 * The caller's key encrypts nothing. Keyed BLAKE2b of the head gives the file's own key, and 16
 * bytes that are stored to tell a wrong key from damage.
 *
 * The writer holds a full segment back until another byte comes: the last one is marked.
 *
 * Segments of 64 KiB to 16 MiB are equally fast, smaller ones slower (4 KiB: two thirds). 256 KiB
 * are worth a wake-up of another thread, and little to decrypt for a few bytes at any place.
 * tests/time_crypt.c measures it.
 */
#ifdef KVT_HAVE_CRYPT
#include <sodium.h>
#endif

#include "src/snapshot/crypt.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#if defined(__linux__)
#include <sys/random.h>
#endif

#define OFFSET_VERSION 8
#define OFFSET_SEGMENT 12
#define OFFSET_ID 16
#define ID_BYTES 16
#define OFFSET_CHECK 32 /* the bytes before it are what the keys are derived from */
#define CHECK_BYTES 16
#define OFFSET_ZERO 48
#define OFFSET_SUM 56
#define LAST 1u /* flag of a segment */
#define SEGMENTS_A_THREAD 4u

int kvt_snap_is_encrypted(const unsigned char *first)
{
    return memcmp(first, KVT_SNAP_CRYPT_MAGIC, KVT_SNAP_MAGIC_BYTES) == 0;
}

kvt_status kvt_snap_crypt_needs_key(const kvt_snap_context *context, const char *name)
{
    return kvt_snap_fail(context, KVT_ERR_MISMATCH, "%sthe snapshot is encrypted: a key is needed",
                         name);
}

kvt_status kvt_snap_crypt_failure(const kvt_snap_crypt *c)
{
    return c->failure == KVT_OK ? KVT_OK : kvt_snap_fail(c->context, c->failure, "%s", c->text);
}

/*
 * Segments at once. A save has some for each thread: what is written meanwhile is a task of the
 * length of several, beside which they have to come out even. 4 are a quarter faster than 1.
 */
static uint32_t lanes_of(uint32_t n_threads, int encrypts)
{
    uint64_t n = n_threads > 1 ? (uint64_t)n_threads * (encrypts ? SEGMENTS_A_THREAD : 1) : 1;

    return n < KVT_SNAP_CRYPT_LANES ? (uint32_t)n : KVT_SNAP_CRYPT_LANES;
}

uint64_t kvt_snap_crypt_bytes(uint32_t n_threads)
{
    uint64_t coded = kvt_snap_counted(KVT_SNAP_CRYPT_SEGMENT + KVT_SNAP_CRYPT_MORE_BYTES);

    return lanes_of(n_threads, 1) *
           (kvt_snap_counted(KVT_SNAP_CRYPT_SEGMENT) + (n_threads > 1 ? 2 : 1) * coded);
}

#ifdef KVT_HAVE_CRYPT

_Static_assert(KVT_SNAP_CRYPT_KEY_BYTES == crypto_secretstream_xchacha20poly1305_KEYBYTES, "key");
_Static_assert(KVT_SNAP_CRYPT_PREFIX_BYTES == 8 + crypto_secretstream_xchacha20poly1305_HEADERBYTES,
               "size, flags and the stream's header");
_Static_assert(KVT_SNAP_CRYPT_MORE_BYTES ==
                   KVT_SNAP_CRYPT_PREFIX_BYTES + crypto_secretstream_xchacha20poly1305_ABYTES,
               "and the tag and the authenticator");

int kvt_snap_crypt_built(void)
{
    return 1;
}

/* Keep the failure, for kvt_snap_crypt_failure. Nothing is written or delivered any more. */
static kvt_status crypt_fail(kvt_snap_crypt *c, kvt_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

static kvt_status crypt_fail(kvt_snap_crypt *c, kvt_status status, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    (void)vsnprintf(c->text, sizeof c->text, format, arguments);
    va_end(arguments);
    c->failure = status;
    return kvt_snap_fail(c->context, status, "%s", c->text);
}

static kvt_status not_authentic(kvt_snap_crypt *c, uint64_t number)
{
    return crypt_fail(c, KVT_ERR_CORRUPT,
                      "the encrypted snapshot was damaged or changed: segment %llu",
                      (unsigned long long)number);
}

static kvt_status cut_short(kvt_snap_crypt *c, uint64_t number)
{
    return crypt_fail(c, KVT_ERR_CORRUPT, "the encrypted snapshot is cut short: in segment %llu",
                      (unsigned long long)number);
}

/* Whether segments are encrypted while those before are written. */
static int writes_beside(const kvt_snap_crypt *c)
{
    return c->write_parts && c->n_lanes > 1;
}

/* No more than a source has: there may be many of them, and small. */
static kvt_status lane_reserve(kvt_snap_crypt *c, kvt_snap_lane *lane)
{
    const char *what = "a segment of an encrypted snapshot";
    size_t bytes = c->segment_bytes;
    kvt_status status;

    if (c->source.read_at && c->plain_bytes < bytes)
        bytes = c->plain_bytes ? (size_t)c->plain_bytes : 1;
    status = kvt_snap_reserve(c->context, &lane->coded, 0, bytes + KVT_SNAP_CRYPT_MORE_BYTES, what);
    if (status == KVT_OK && writes_beside(c))
        status = kvt_snap_reserve(c->context, &lane->other, 0, lane->coded.bytes, what);
    if (status == KVT_OK)
        status = kvt_snap_reserve(c->context, &lane->plain, 0, bytes, what);
    return status == KVT_OK ? KVT_OK : crypt_fail(c, status, "no memory for %s", what);
}

/* ---- the head ---- */

/* sodium_init, and random numbers afterwards, would end the process where the system has none. */
static kvt_status prepare(const kvt_snap_context *context, const unsigned char *key,
                          kvt_snap_crypt *c)
{
    memset(c, 0, sizeof *c);
    c->context = context;
    if (!key)
        return crypt_fail(c, KVT_ERR_ARG, "the key is NULL");
#if defined(__linux__)
    unsigned char probe;
    ssize_t n;
    do
        n = getrandom(&probe, 1, 0);
    while (n < 0 && errno == EINTR);
    if (n != 1)
        return crypt_fail(c, KVT_ERR_UNSUPPORTED,
                          "no encryption: the system gives no random "
                          "numbers");
#endif
    if (sodium_init() < 0)
        return crypt_fail(c, KVT_ERR_UNSUPPORTED, "no encryption: libsodium cannot be initialized");
    return KVT_OK;
}

/* Larger segments than ours take no more memory, but for one that is larger than all lanes. */
static void set_lanes(kvt_snap_crypt *c, int encrypts)
{
    const kvt_cache *cache = c->context->cache;
    uint32_t most, threads = cache ? cache->parallel.n_threads : 1;

    c->n_lanes = lanes_of(threads, encrypts);
    if (c->segment_bytes > KVT_SNAP_CRYPT_SEGMENT) {
        most = (uint32_t)((uint64_t)c->n_lanes * KVT_SNAP_CRYPT_SEGMENT / c->segment_bytes);
        c->n_lanes = most > 1 ? most : 1;
    }
}

/* The file's key, and what is stored to know the caller's key by. */
static void derive(kvt_snap_crypt *c, const unsigned char *key, unsigned char *check)
{
    unsigned char out[KVT_SNAP_CRYPT_KEY_BYTES + CHECK_BYTES];

    (void)crypto_generichash(out, sizeof out, c->head, OFFSET_CHECK, key, KVT_SNAP_CRYPT_KEY_BYTES);
    memcpy(c->key, out, sizeof c->key);
    memcpy(check, out + sizeof c->key, CHECK_BYTES);
    sodium_memzero(out, sizeof out);
}

static void head_make(kvt_snap_crypt *c, const unsigned char *key)
{
    memcpy(c->head, KVT_SNAP_CRYPT_MAGIC, KVT_SNAP_MAGIC_BYTES);
    kvt_put32(c->head + OFFSET_VERSION, KVT_SNAP_CRYPT_VERSION);
    kvt_put32(c->head + OFFSET_SEGMENT, c->segment_bytes);
    randombytes_buf(c->head + OFFSET_ID, ID_BYTES);
    derive(c, key, c->head + OFFSET_CHECK);
    kvt_put64(c->head + OFFSET_SUM, kvt_snap_sum(c->head, OFFSET_SUM));
}

/* The first bytes of the head, before the others are read. */
static kvt_status head_begin(kvt_snap_crypt *c)
{
    if (kvt_snap_is_encrypted(c->head))
        return KVT_OK;
    if (memcmp(c->head, KVT_SNAP_MAGIC, KVT_SNAP_MAGIC_BYTES) == 0)
        return crypt_fail(c, KVT_ERR_MISMATCH,
                          "the snapshot is not encrypted, though a key was given");
    return crypt_fail(c, KVT_ERR_FORMAT, "not a kvtile snapshot");
}

static kvt_status head_get(kvt_snap_crypt *c, const unsigned char *key)
{
    unsigned char check[CHECK_BYTES];
    uint32_t version = kvt_get32(c->head + OFFSET_VERSION);

    if (version != KVT_SNAP_CRYPT_VERSION)
        return crypt_fail(c, KVT_ERR_FORMAT,
                          "the snapshot's encryption has version %u, this build reads %u", version,
                          KVT_SNAP_CRYPT_VERSION);
    c->segment_bytes = kvt_get32(c->head + OFFSET_SEGMENT);
    if (!kvt_snap_same_sum(kvt_get64(c->head + OFFSET_SUM), kvt_snap_sum(c->head, OFFSET_SUM)) ||
        kvt_get64(c->head + OFFSET_ZERO) != 0 || c->segment_bytes < KVT_SNAP_CRYPT_LEAST ||
        c->segment_bytes > KVT_SNAP_CRYPT_MOST || (c->segment_bytes & (c->segment_bytes - 1)) != 0)
        return crypt_fail(c, KVT_ERR_CORRUPT, "the head of the encrypted snapshot is damaged");
    derive(c, key, check);
    if (sodium_memcmp(check, c->head + OFFSET_CHECK, CHECK_BYTES) != 0)
        return crypt_fail(c, KVT_ERR_MISMATCH, "the snapshot is encrypted with another key");
    set_lanes(c, 0);
    return KVT_OK;
}

/* ---- segments ---- */

enum { DATA_BYTES = KVT_SNAP_CRYPT_HEAD_BYTES + 16 };

/* The additional data of a segment: the head, its number, its size, its flags. */
static void additional(const kvt_snap_crypt *c, const kvt_snap_lane *lane, unsigned char *data)
{
    memcpy(data, c->head, KVT_SNAP_CRYPT_HEAD_BYTES);
    kvt_put64(data + KVT_SNAP_CRYPT_HEAD_BYTES, lane->number);
    kvt_put32(data + KVT_SNAP_CRYPT_HEAD_BYTES + 8, lane->bytes);
    kvt_put32(data + KVT_SNAP_CRYPT_HEAD_BYTES + 12, lane->last ? LAST : 0);
}

static unsigned char tag_of(const kvt_snap_lane *lane)
{
    return lane->last ? crypto_secretstream_xchacha20poly1305_TAG_FINAL
                      : crypto_secretstream_xchacha20poly1305_TAG_PUSH;
}

static void encode(void *arg, size_t i)
{
    kvt_snap_crypt *c = arg;
    kvt_snap_lane *lane = &c->lanes[i];
    unsigned char *to = lane->coded.data, data[DATA_BYTES];
    const kvt_snap_message message = {c->key, to + 8, data, sizeof data};

    additional(c, lane, data);
    kvt_put32(to, lane->bytes);
    kvt_put32(to + 4, lane->last ? LAST : 0);
    randombytes_buf(to + 8, crypto_secretstream_xchacha20poly1305_HEADERBYTES);
    kvt_snap_seal(&message, lane->plain.data, lane->bytes, tag_of(lane),
                  to + KVT_SNAP_CRYPT_PREFIX_BYTES);
}

static void decode(void *arg, size_t i)
{
    kvt_snap_crypt *c = arg;
    kvt_snap_lane *lane = &c->lanes[i];
    const unsigned char *from = lane->coded.data;
    unsigned char data[DATA_BYTES], tag = 0;
    const kvt_snap_message message = {c->key, from + 8, data, sizeof data};

    additional(c, lane, data);
    lane->sound = kvt_snap_unseal(&message, from + KVT_SNAP_CRYPT_PREFIX_BYTES, lane->bytes, &tag,
                                  lane->plain.data) &&
                  tag == tag_of(lane);
}

/* Code the first n lanes. */
static void run(kvt_snap_crypt *c, void (*task)(void *arg, size_t i), size_t n)
{
    kvt_cache *cache = c->context->cache;

    if (cache && n > 1) { /* about 0.7 ns a byte */
        uint64_t nanoseconds = (uint64_t)n * c->segment_bytes / 10 * 7;
        kvt_parallel_run(&cache->parallel, task, c, n,
                         kvt_parallel_threads(&cache->parallel, nanoseconds));
    } else {
        for (size_t i = 0; i < n; i++)
            task(c, i);
    }
}

/* Size and flags of a segment, as read; *lane's number is set. Sets its size and `last`. */
static int prefix_get(const kvt_snap_crypt *c, kvt_snap_lane *lane)
{
    uint32_t flags = kvt_get32(lane->coded.data + 4);

    lane->bytes = kvt_get32(lane->coded.data);
    lane->last = flags == LAST;
    if (flags > LAST || lane->bytes > c->segment_bytes)
        return 0;
    return lane->last ? lane->bytes > 0 || lane->number == 0 : lane->bytes == c->segment_bytes;
}

/* ---- encrypting ---- */

static void write_collected(kvt_snap_crypt *c)
{
    c->answer = 0;
    if (c->write_parts)
        c->answer = c->write_parts(c->to.user, c->parts, c->n_parts);
    else
        for (size_t i = 0; i < c->n_parts && !c->answer; i++)
            c->answer = c->to.write(c->to.user, c->parts[i].data, c->parts[i].bytes);
    c->n_parts = 0;
}

/* Lane i - 1; first what is collected, while other threads encrypt. */
static void write_beside(void *arg, size_t i)
{
    if (i)
        encode(arg, i - 1);
    else
        write_collected(arg);
}

static void collect(kvt_snap_crypt *c, const void *data, size_t bytes)
{
    c->parts[c->n_parts].data = data;
    c->parts[c->n_parts++].bytes = bytes;
}

/* Encrypt the lanes up to the current one, and write them: with the next ones, or now. */
static int flush(kvt_snap_crypt *c, int last)
{
    size_t n = (size_t)c->lane + 1;

    for (size_t i = 0; i < n; i++) {
        c->lanes[i].number = c->number++;
        c->lanes[i].last = last && i + 1 == n;
    }
    if (c->n_parts)
        run(c, write_beside, n + 1);
    else
        run(c, encode, n);
    if (c->answer)
        return -1;
    if (!c->begun)
        collect(c, c->head, sizeof c->head);
    c->begun = 1;
    for (size_t i = 0; i < n; i++) {
        kvt_snap_lane *lane = &c->lanes[i];
        kvt_snap_buffer coded = lane->coded;
        collect(c, coded.data, (size_t)lane->bytes + KVT_SNAP_CRYPT_MORE_BYTES);
        if (writes_beside(c)) {
            lane->coded = lane->other;
            lane->other = coded;
        }
        lane->bytes = 0;
    }
    c->lane = 0;
    if (last || !writes_beside(c))
        write_collected(c);
    return c->answer ? -1 : 0;
}

static int plain_write(void *user, const void *data, size_t bytes)
{
    kvt_snap_crypt *c = user;
    const unsigned char *from = data;

    while (bytes && !c->stopped) {
        kvt_snap_lane *lane = &c->lanes[c->lane];
        size_t n = c->segment_bytes - lane->bytes;

        if (n == 0 && c->lane + 1 < c->n_lanes) {
            c->lane++;
        } else if (n == 0) {
            c->stopped = flush(c, 0) != 0;
        } else if (!lane->plain.data) {
            c->stopped = lane_reserve(c, lane) != KVT_OK;
        } else {
            n = bytes < n ? bytes : n;
            memcpy(lane->plain.data + lane->bytes, from, n);
            lane->bytes += (uint32_t)n;
            from += n;
            bytes -= n;
        }
    }
    return c->stopped ? -1 : 0;
}

kvt_status kvt_snap_encrypt_begin_sized(const kvt_snap_context *context, const unsigned char *key,
                                        const kvt_writer *to, uint32_t segment_bytes,
                                        kvt_snap_crypt *c, kvt_writer *plain)
{
    kvt_status status = prepare(context, key, c);

    if (status != KVT_OK)
        return status;
    c->to = *to;
    c->segment_bytes = segment_bytes;
    set_lanes(c, 1);
    head_make(c, key);
    plain->user = c;
    plain->write = plain_write;
    return KVT_OK;
}

kvt_status kvt_snap_encrypt_end(kvt_snap_crypt *c)
{
    if (!c->stopped && !c->lanes[0].plain.data) /* an empty one */
        c->stopped = lane_reserve(c, &c->lanes[0]) != KVT_OK;
    if (!c->stopped && !c->ended)
        c->stopped = flush(c, 1) != 0;
    c->ended = 1;
    if (!c->stopped)
        return KVT_OK;
    return c->failure != KVT_OK
               ? kvt_snap_crypt_failure(c)
               : kvt_snap_fail(c->context, KVT_ERR_IO, "writing the encrypted snapshot failed");
}

/* ---- decrypting, front to back ---- */

/* Bytes read: fewer only at the end; negative: an error. */
static int64_t read_all(const kvt_reader *from, unsigned char *to, size_t bytes)
{
    size_t done = 0;

    while (done < bytes) {
        int64_t n = from->read(from->user, to + done, bytes - done);
        if (n < 0 || (uint64_t)n > bytes - done)
            return -1;
        if (n == 0)
            break;
        done += (size_t)n;
    }
    return (int64_t)done;
}

/*
 * Read one segment. 0: it is there; else the reading stops here, with c->failure set unless it is
 * the reader's.
 */
static int segment_read(kvt_snap_crypt *c, kvt_snap_lane *lane)
{
    size_t rest;
    int64_t n;

    if (!lane->plain.data && lane_reserve(c, lane) != KVT_OK)
        return -1;
    lane->number = c->number;
    n = read_all(&c->from, lane->coded.data, KVT_SNAP_CRYPT_PREFIX_BYTES);
    if (n == KVT_SNAP_CRYPT_PREFIX_BYTES) {
        if (!prefix_get(c, lane)) {
            (void)not_authentic(c, lane->number);
            return -1;
        }
        rest = (size_t)lane->bytes + KVT_SNAP_CRYPT_MORE_BYTES - KVT_SNAP_CRYPT_PREFIX_BYTES;
        n = read_all(&c->from, lane->coded.data + KVT_SNAP_CRYPT_PREFIX_BYTES, rest);
        if (n == (int64_t)rest) {
            c->number++;
            return 0;
        }
    }
    if (n >= 0)
        (void)cut_short(c, lane->number);
    return -1;
}

/* Read and decrypt as many segments as there are lanes. Those before one that fails are ready. */
static void refill(kvt_snap_crypt *c)
{
    uint32_t n = 0, i = 0;

    while (n < c->n_lanes && !c->ended && !c->stopped) {
        c->stopped = segment_read(c, &c->lanes[n]) != 0;
        if (!c->stopped)
            c->ended = c->lanes[n++].last != 0;
    }
    run(c, decode, n);
    while (i < n && c->lanes[i].sound)
        i++;
    if (i < n) {
        (void)not_authentic(c, c->lanes[i].number);
        c->stopped = 1;
    }
    c->n_ready = i;
    c->lane = 0;
    c->at = 0;
}

static int64_t plain_read(void *user, void *data, size_t bytes)
{
    kvt_snap_crypt *c = user;
    kvt_snap_lane *lane;

    for (;;) {
        if (c->lane == c->n_ready) {
            if (c->stopped)
                return -1;
            if (c->ended || !bytes)
                return 0;
            refill(c);
            continue;
        }
        lane = &c->lanes[c->lane];
        if (c->at < lane->bytes)
            break;
        c->lane++;
        c->at = 0;
    }
    if (bytes > lane->bytes - c->at)
        bytes = lane->bytes - c->at;
    memcpy(data, lane->plain.data + c->at, bytes);
    c->at += bytes;
    return (int64_t)bytes;
}

kvt_status kvt_snap_decrypt_begin(const kvt_snap_context *context, const unsigned char *key,
                                  const kvt_reader *from, kvt_snap_crypt *c, kvt_reader *plain)
{
    kvt_status status = prepare(context, key, c);
    size_t rest = KVT_SNAP_CRYPT_HEAD_BYTES - KVT_SNAP_MAGIC_BYTES;
    int64_t n;

    if (status != KVT_OK)
        return status;
    c->from = *from;
    n = read_all(from, c->head, KVT_SNAP_MAGIC_BYTES);
    if (n == KVT_SNAP_MAGIC_BYTES) {
        status = head_begin(c);
        if (status != KVT_OK)
            return status;
        n = read_all(from, c->head + KVT_SNAP_MAGIC_BYTES, rest);
        if (n >= 0 && n < (int64_t)rest)
            return crypt_fail(c, KVT_ERR_CORRUPT,
                              "the encrypted snapshot is cut short: in its head");
    } else if (n >= 0) {
        return crypt_fail(c, KVT_ERR_FORMAT, "not a kvtile snapshot: it has %d bytes", (int)n);
    }
    if (n < 0)
        return kvt_snap_fail(context, KVT_ERR_IO, "reading the encrypted snapshot failed");
    status = head_get(c, key);
    if (status != KVT_OK)
        return status;
    plain->user = c;
    plain->read = plain_read;
    return KVT_OK;
}

/* ---- decrypting at any place ---- */

static kvt_status read_at(kvt_snap_crypt *c, uint64_t offset, unsigned char *to, size_t bytes)
{
    while (bytes) {
        int64_t n = c->source.read_at(c->source.user, offset, to, bytes);
        if (n == 0)
            return crypt_fail(c, KVT_ERR_CORRUPT,
                              "the encrypted snapshot is cut short: at byte %llu",
                              (unsigned long long)offset);
        if (n < 0 || (uint64_t)n > bytes)
            return kvt_snap_fail(c->context, KVT_ERR_IO,
                                 "reading the encrypted snapshot failed at byte %llu",
                                 (unsigned long long)offset);
        to += n;
        offset += (uint64_t)n;
        bytes -= (size_t)n;
    }
    return KVT_OK;
}

/* Segments first .. first + n - 1 of a source into the first n lanes. */
static kvt_status load(kvt_snap_crypt *c, uint64_t first, uint32_t n)
{
    uint64_t whole = (uint64_t)c->segment_bytes + KVT_SNAP_CRYPT_MORE_BYTES;

    c->n_ready = 0; /* until all are sound */
    for (uint32_t i = 0; i < n; i++) {
        kvt_snap_lane *lane = &c->lanes[i];
        uint64_t offset = KVT_SNAP_CRYPT_HEAD_BYTES + (first + i) * whole;
        uint64_t left = c->source.bytes - offset, bytes = left < whole ? left : whole;
        kvt_status status = lane->plain.data ? KVT_OK : lane_reserve(c, lane);

        if (status == KVT_OK)
            status = read_at(c, offset, lane->coded.data, (size_t)bytes);
        if (status != KVT_OK)
            return status;
        lane->number = first + i;
        if (!prefix_get(c, lane) || lane->bytes + (uint64_t)KVT_SNAP_CRYPT_MORE_BYTES != bytes ||
            lane->last != (lane->number + 1 == c->n_segments))
            return not_authentic(c, lane->number);
    }
    run(c, decode, n);
    for (uint32_t i = 0; i < n; i++)
        if (!c->lanes[i].sound)
            return not_authentic(c, c->lanes[i].number);
    c->n_ready = n;
    return KVT_OK;
}

kvt_status kvt_snap_decrypt_open(const kvt_snap_context *context, const unsigned char *key,
                                 const kvt_snap_source *source, kvt_snap_crypt *c,
                                 uint64_t *plain_bytes)
{
    kvt_status status = prepare(context, key, c);
    uint64_t whole, coded;

    if (status != KVT_OK)
        return status;
    c->source = *source;
    if (source->bytes < KVT_SNAP_MAGIC_BYTES)
        return crypt_fail(c, KVT_ERR_FORMAT, "not a kvtile snapshot: it has %d bytes",
                          (int)source->bytes);
    status = read_at(c, 0, c->head, KVT_SNAP_MAGIC_BYTES);
    if (status == KVT_OK)
        status = head_begin(c);
    if (status == KVT_OK && source->bytes < KVT_SNAP_CRYPT_HEAD_BYTES)
        status = crypt_fail(c, KVT_ERR_CORRUPT, "the encrypted snapshot is cut short: in its head");
    if (status == KVT_OK)
        status = read_at(c, 0, c->head, KVT_SNAP_CRYPT_HEAD_BYTES);
    if (status == KVT_OK)
        status = head_get(c, key);
    if (status != KVT_OK)
        return status;
    coded = source->bytes - KVT_SNAP_CRYPT_HEAD_BYTES;
    whole = (uint64_t)c->segment_bytes + KVT_SNAP_CRYPT_MORE_BYTES;
    c->n_segments = coded / whole + (coded % whole != 0);
    if (c->n_segments == 0 || (coded % whole && coded % whole < KVT_SNAP_CRYPT_MORE_BYTES))
        return cut_short(c, coded / whole);
    c->plain_bytes = coded - c->n_segments * KVT_SNAP_CRYPT_MORE_BYTES;
    c->n_lanes = 1; /* each of a delta's parents is a source */
    status = load(c, c->n_segments - 1, 1);
    if (status == KVT_OK)
        *plain_bytes = c->plain_bytes;
    return status;
}

kvt_status kvt_snap_decrypt_at(kvt_snap_crypt *c, uint64_t offset, void *to, size_t bytes)
{
    unsigned char *target = to;

    if (offset > c->plain_bytes || bytes > c->plain_bytes - offset)
        return crypt_fail(c, KVT_ERR_CORRUPT,
                          "the encrypted snapshot holds %llu bytes: none at %llu",
                          (unsigned long long)c->plain_bytes, (unsigned long long)offset);
    while (bytes) {
        uint64_t number = offset / c->segment_bytes;
        uint64_t first = c->n_ready ? c->lanes[0].number : 0;
        size_t at = (size_t)(offset % c->segment_bytes), n;
        const kvt_snap_lane *lane;

        if (number < first || number >= first + c->n_ready) {
            uint64_t more = (offset + bytes - 1) / c->segment_bytes - number + 1;
            kvt_status status = load(c, number, more < c->n_lanes ? (uint32_t)more : c->n_lanes);
            if (status != KVT_OK)
                return status;
            first = number;
        }
        lane = &c->lanes[number - first];
        n = lane->bytes - at < bytes ? lane->bytes - at : bytes;
        memcpy(target, lane->plain.data + at, n);
        target += n;
        offset += n;
        bytes -= n;
    }
    return KVT_OK;
}

void kvt_snap_crypt_release(kvt_snap_crypt *c)
{
    for (size_t i = 0; i < KVT_SNAP_CRYPT_LANES; i++) {
        kvt_snap_lane *lane = &c->lanes[i];
        if (lane->plain.data)
            sodium_memzero(lane->plain.data, lane->plain.bytes);
        kvt_snap_release(c->context, &lane->plain);
        kvt_snap_release(c->context, &lane->coded);
        kvt_snap_release(c->context, &lane->other);
    }
    sodium_memzero(c->key, sizeof c->key);
    c->n_ready = c->lane = 0;
    c->stopped = 1;
}

#else /* without libsodium */

int kvt_snap_crypt_built(void)
{
    return 0;
}

static kvt_status not_built(const kvt_snap_context *context, kvt_snap_crypt *c)
{
    memset(c, 0, sizeof *c);
    c->context = context;
    return kvt_snap_fail(context, KVT_ERR_UNSUPPORTED,
                         "no encrypted snapshots: kvtile was built without libsodium");
}

kvt_status kvt_snap_encrypt_begin_sized(const kvt_snap_context *context, const unsigned char *key,
                                        const kvt_writer *to, uint32_t segment_bytes,
                                        kvt_snap_crypt *c, kvt_writer *plain)
{
    (void)key;
    (void)to;
    (void)segment_bytes;
    (void)plain;
    return not_built(context, c);
}

kvt_status kvt_snap_encrypt_end(kvt_snap_crypt *c)
{
    return not_built(c->context, c);
}

kvt_status kvt_snap_decrypt_begin(const kvt_snap_context *context, const unsigned char *key,
                                  const kvt_reader *from, kvt_snap_crypt *c, kvt_reader *plain)
{
    (void)key;
    (void)from;
    (void)plain;
    return not_built(context, c);
}

kvt_status kvt_snap_decrypt_open(const kvt_snap_context *context, const unsigned char *key,
                                 const kvt_snap_source *source, kvt_snap_crypt *c,
                                 uint64_t *plain_bytes)
{
    (void)key;
    (void)source;
    (void)plain_bytes;
    return not_built(context, c);
}

kvt_status kvt_snap_decrypt_at(kvt_snap_crypt *c, uint64_t offset, void *to, size_t bytes)
{
    (void)offset;
    (void)to;
    (void)bytes;
    return not_built(c->context, c);
}

void kvt_snap_crypt_release(kvt_snap_crypt *c)
{
    (void)c;
}

#endif /* KVT_HAVE_CRYPT */

kvt_status kvt_snap_encrypt_begin(const kvt_snap_context *context, const unsigned char *key,
                                  const kvt_writer *to, kvt_snap_crypt *c, kvt_writer *plain)
{
    return kvt_snap_encrypt_begin_sized(context, key, to, KVT_SNAP_CRYPT_SEGMENT, c, plain);
}
