/*
 * Memory of loads of files that lie about sizes, or unpack to more than they say: never more than
 * kvt_working_forecast, the blocks that the cache's max_tokens may have, 1 MiB and twice the file.
 * And that of deltas and mapped files, which are sound.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "snapshot_support.h"

#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <xxhash.h>

static char folder[64];

static const char *in_folder(const char *name)
{
    static char path[8][160];
    static int turn;
    turn = (turn + 1) % 8;
    (void)snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}

static void spill(const char *path, const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static uint64_t working_of(const model *m, uint64_t n_tokens)
{
    kvt_group_config groups[2];
    kvt_config config = model_config(m, groups);
    uint64_t answer = 0;
    expect_ok(NULL, kvt_working_forecast(&config, n_tokens, &answer));
    return answer;
}

/* Of the blocks of max_tokens tokens. */
static uint64_t blocks_of(const model *m)
{
    kvt_group_config groups[2];
    kvt_config config = model_config(m, groups);
    uint64_t full = 0, empty = 0;
    expect_ok(NULL, kvt_memory_forecast(&config, 1, m->max_tokens, &full));
    expect_ok(NULL, kvt_memory_forecast(&config, 1, 0, &empty));
    return full - empty;
}

static kvt_save_options save_options(uint32_t codec, const char *parent)
{
    kvt_save_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.codec = codec;
    o.no_fsync = 1;
    o.parent = parent;
    return o;
}

static kvt_load_options load_options(uint32_t map)
{
    kvt_load_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.map = map;
    return o;
}

/* ---- files that lie ---- */

/* Loads, each of what is in b; the most bytes that any has held. */
static uint64_t peak_of(const model *m, kvt_cache *cache, const bytes *b, const char *what,
                        size_t at, size_t *refused, size_t *loaded)
{
    uint64_t most = 0;
    const char *path = in_folder("file");

    spill(path, b->data, b->n);
    for (int way = 0; way < 5; way++) {
        kvt_load_options o = load_options(way < 3 ? KVT_MAP_NONE : (uint32_t)way - 2);
        kvt_seq *seq = model_seq(cache);
        bytes copy = *b;
        kvt_reader reader = bytes_reader(&copy);
        size_t before = m->ledger->live_bytes;
        kvt_status status;

        copy.at = 0;
        m->ledger->peak_bytes = before;
        status = way == 0   ? kvt_seq_load_stream(seq, &reader, &o, NULL)
                 : way == 1 ? kvt_seq_load_memory(seq, b->data, b->n, &o, NULL)
                            : kvt_seq_load(seq, path, &o, NULL);
        if (getenv("KVT_TEST_VERBOSE") && m->ledger->peak_bytes - before > most)
            print_message("%s %zu, way %d: %zu\n", what, at, way, m->ledger->peak_bytes - before);
        if (m->ledger->peak_bytes - before > most)
            most = m->ledger->peak_bytes - before;
        if (status == KVT_ERR_ARG || status == KVT_ERR_STATE || status == KVT_ERR_IO)
            fail_msg("%s %zu: status %d", what, at, (int)status);
        if (status == KVT_OK && way < 4 && strcmp(what, "word") == 0)
            fail_msg("word %zu: loaded", at); /* lazily images are taken as they are */
        *loaded += status == KVT_OK;
        *refused += status != KVT_OK;
        kvt_seq_destroy(seq);
        expect_ok(cache, kvt_cache_trim(cache));
    }
    return most;
}

/* Where a sound file has checksums, and of what, in the order in which they are to be made. */
typedef struct sums {
    struct {
        size_t at, begin, n;
    } list[400];
    size_t n;
} sums;

static void add_sum(sums *s, size_t at, size_t begin, size_t n)
{
    assert_true(s->n < sizeof s->list / sizeof s->list[0]);
    s->list[s->n].at = at;
    s->list[s->n].begin = begin;
    s->list[s->n++].n = n;
}

static void find_sums(const bytes *f, sums *s)
{
    size_t at = get32(f->data + 12);

    s->n = 0;
    add_sum(s, at - 8, 0, at - 8);
    while (at < f->n) {
        const unsigned char *d = f->data + at;
        uint32_t type = get32(d);
        size_t size = (size_t)get64(d + 8), payload = at + 32;
        if (type == 1 || type == 2 || type == 5 || type == 10) {
            size_t n = get32(d + 32), begin = payload + 16 + 24 * n;
            for (size_t i = 0; i < n; i++) {
                size_t stored = get32(d + 40 + 24 * i + 4);
                add_sum(s, payload + 8 + 24 * i + 16, begin, stored);
                begin += stored;
            }
            add_sum(s, payload + 8 + 24 * n, payload, 8 + 24 * n);
        } else if (type == 7) {
            add_sum(s, payload + 32, payload, 32);
        } else if (type != 13) {
            add_sum(s, payload + size - 8, payload, size - 8);
        }
        add_sum(s, at + 24, at, 24);
        at += 32 + size;
    }
}

static void make_sums(const bytes *f, const sums *s)
{
    for (size_t i = 0; i < s->n; i++)
        put64(f->data + s->list[i].at, XXH64(f->data + s->list[i].begin, s->list[i].n, 0));
}

/* Each word of the file is a large number, all sums are right. */
static int is_image(const bytes *f, size_t at)
{
    for (size_t i = get32(f->data + 12); i < f->n; i += 32 + (size_t)get64(f->data + i + 8))
        if (get32(f->data + i) == 13 && at >= i + 32 && at < i + 32 + get64(f->data + i + 8))
            return 1;
    return 0;
}

static void test_lying_words(void **state)
{
    static const uint32_t lies[] = {0xffffffffu, 0x7fffffffu, 0x40000000u, 0x00ffffffu, 0xfff8u};
    size_t refused = 0, loaded = 0, trials = 0;
    uint64_t most = 0, bound = 0;
    (void)state;

    for (int kind = 0; kind < 3; kind++) {
        model m = model_of(2, 1, 16, 8, kind == 2 ? KVT_TYPE_I4 : KVT_TYPE_I8, KVT_TYPE_F16);
        size_t step = is_quick() ? 36 : 4;
        kvt_cache *cache;
        kvt_seq *seq;
        bytes file;
        static sums there;
        unsigned char *changed;
        ledger l;

        ledger_init(&l);
        m.ledger = &l;
        m.max_tokens = 128;
        cache = model_cache(&m);
        seq = model_seq(cache);
        model_append(&m, cache, seq, 50, 50);
        expect_ok(cache, kvt_seq_checkpoint(seq, "a blob", 6));
        model_append(&m, cache, seq, 20, 20);
        file = saved(cache, seq, kind ? KVT_CODEC_RAW : KVT_CODEC_ZSTD);
        kvt_seq_destroy(seq);
        expect_ok(cache, kvt_cache_trim(cache));
        /* What says that it is large is read by 1 MiB first, and then as it has come. */
        bound = working_of(&m, m.max_tokens) + blocks_of(&m) + ((uint64_t)1 << 20) + 2 * file.n;
        find_sums(&file, &there);
        changed = malloc(file.n);
        assert_non_null(changed);
        for (size_t at = 0; at + 4 <= file.n; at += step)
            for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
                bytes lie = {changed, file.n, file.n, 0, -1, 0};
                uint64_t peak;
                if (is_image(&file, at) && at % 64)
                    continue; /* of what is no size a part */
                memcpy(changed, file.data, file.n);
                put32(changed + at, lies[i]);
                make_sums(&lie, &there);
                if (memcmp(changed, file.data, file.n) == 0) /* it was a sum */
                    continue;
                peak = peak_of(&m, cache, &lie, "word", at, &refused, &loaded);
                trials++;
                most = peak > most ? peak : most;
                if (peak > bound)
                    fail_msg("file %d, word %zu is %#x: %llu bytes, foretold %llu", kind, at,
                             (unsigned)lies[i], (unsigned long long)peak,
                             (unsigned long long)bound);
            }
        free(changed);
        bytes_free(&file);
        kvt_cache_destroy(cache);
        ledger_close(&l);
    }
    print_message("lies: %zu files, %zu loads refused, %zu loaded; peak %llu bytes, bound %llu\n",
                  trials, refused, loaded, (unsigned long long)most, (unsigned long long)bound);
}

/* A Zstandard frame of so many blocks of 128 KiB of zeros; its window: 10 + log 2. */
static size_t make_bomb(unsigned char *to, size_t blocks, unsigned log)
{
    static const unsigned char head[] = {0x28, 0xb5, 0x2f, 0xfd, 0};
    size_t n = sizeof head;
    memcpy(to, head, n);
    to[n++] = (unsigned char)(log << 3);
    for (size_t i = 0; i < blocks; i++, n += 4)
        put32(to + n, 131072u << 3 | 2 | (i + 1 == blocks));
    return n;
}

/* Streams that unpack to 128 MiB, and such that claim windows of up to 2 GiB. */
static void test_bombs(void **state)
{
    model m = model_of(1, 1, 64, 64, KVT_TYPE_I8, KVT_TYPE_F16);
    size_t refused = 0, loaded = 0, trials = 0, size, at, k_bytes, all;
    uint64_t most = 0, bound, sound;
    kvt_cache *cache;
    kvt_seq *seq;
    bytes file;
    ledger l;
    static unsigned char frame[16384];
    (void)state;

    ledger_init(&l);
    m.ledger = &l;
    m.max_tokens = 128;
    m.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
    cache = model_cache(&m);
    seq = model_seq(cache);
    model_append(&m, cache, seq, 70, 70);
    file = saved(cache, seq, KVT_CODEC_RAW);
    kvt_seq_destroy(seq);
    expect_ok(cache, kvt_cache_trim(cache));
    relay(&file, 0);
    bound = working_of(&m, m.max_tokens) + blocks_of(&m);
    at = section_payload(file.data, file.n, 5, 0, &size);
    k_bytes = get32(file.data + at + 8 + 4);
    all = get32(file.data + at) * (size_t)24 + 16; /* where the streams are */
    assert_int_equal(k_bytes, 4096);
    sound = peak_of(&m, cache, &file, "sound", 0, &refused, &loaded);
    assert_int_equal(loaded, 5);
    for (unsigned log = 7; log <= 21; log += 7) { /* windows of 128 KiB, 16 MiB, 2 GiB */
        size_t n = make_bomb(frame, 1021, log);
        bytes bomb = {NULL, 0, 0, 0, -1, 0};
        kvt_writer writer = bytes_writer(&bomb);
        unsigned char *set;
        uint64_t peak;

        assert_int_equal(n, 4090);
        assert_int_equal(writer.write(writer.user, file.data, file.n), 0);
        set = bomb.data + at;
        memcpy(set + all, frame, n);
        memmove(set + all + n, set + all + k_bytes, size - all - k_bytes);
        set[8 + 3] = 1;
        put32(set + 8 + 4, (uint32_t)n);
        resign(bomb.data, bomb.n);
        loaded = 0;
        peak = peak_of(&m, cache, &bomb, "bomb", log, &refused, &loaded);
        trials++;
        most = peak > most ? peak : most;
        assert_int_equal(loaded, 0);
        assert_true(peak <= bound);
        bytes_free(&bomb);
    }
    print_message("bombs: %zu files of %zu bytes, peak %llu bytes, of the sound one %llu, bound "
                  "%llu\n",
                  trials, file.n, (unsigned long long)most, (unsigned long long)sound,
                  (unsigned long long)bound);
    bytes_free(&file);
    kvt_cache_destroy(cache);
    ledger_close(&l);
}

/* ---- deltas and mapped files ---- */

static const unsigned char a_key[KVT_KEY_BYTES] = "a key of thirty-two bytes, or so";

/* For all parents: buffers of tokens, zstd; and for each. */
enum { DEPTH = 6, PARENTS_BYTES = 300 << 10, LEVEL_BYTES = 80 << 10 };
enum { KEY_BYTES = 513 << 10 }; /* for each file that is encrypted */

/* A chain, each file of which is loaded in each way that there is. */
static void chains_with(uint32_t codec, const unsigned char *key, uint32_t n_threads)
{
    const uint64_t level = LEVEL_BYTES + (key ? KEY_BYTES : 0);
    model m = model_of(2, 8, 64, 64, KVT_TYPE_I8, KVT_TYPE_I8);
    uint64_t most, blocks;
    char names[DEPTH + 1][160];
    kvt_cache *cache;
    kvt_seq *seq;
    ledger l;

    ledger_init(&l);
    m.ledger = &l;
    m.n_threads = n_threads;
    cache = model_cache(&m);
    seq = model_seq(cache);
    blocks = blocks_of(&m);
    most = working_of(&m, m.max_tokens);
    if (key) /* of the file itself */
        most += n_threads > 1 ? (uint64_t)n_threads * 3 << 20 : KEY_BYTES;
    for (unsigned depth = 0; depth <= DEPTH; depth++) {
        kvt_save_options o = save_options(codec, depth ? names[depth - 1] : NULL);
        uint64_t save, loads[3] = {0};
        size_t before;
        if (depth)
            most += level + (depth == 1 ? PARENTS_BYTES : 0);
        (void)snprintf(names[depth], sizeof names[0], "%s/%u", folder, depth);
        o.key = key;
        model_append(&m, cache, seq, 64, 64);
        before = l.live_bytes;
        l.peak_bytes = before;
        expect_ok(cache, kvt_seq_save(seq, names[depth], &o));
        save = l.peak_bytes - before;
        for (uint32_t map = 0; map < (key ? 1 : 3); map++) {
            kvt_seq *loaded = model_seq(cache);
            kvt_load_options from = load_options(map);
            from.key = key;
            expect_ok(cache, kvt_cache_trim(cache));
            before = l.live_bytes;
            l.peak_bytes = before;
            expect_ok(cache, kvt_seq_load(loaded, names[depth], &from, NULL));
            loads[map] = l.peak_bytes - before;
            kvt_seq_destroy(loaded);
            expect_ok(cache, kvt_cache_trim(cache));
            assert_true(loads[map] <= most + blocks);
        }
        assert_true(save <= most);
        print_message("codec %u%s, %u threads, depth %u: save %llu, load %llu, mapped %llu, lazy "
                      "%llu; most %llu, blocks %llu\n",
                      (unsigned)codec, key ? ", key" : "", (unsigned)n_threads, depth,
                      (unsigned long long)save, (unsigned long long)loads[0],
                      (unsigned long long)loads[1], (unsigned long long)loads[2],
                      (unsigned long long)most, (unsigned long long)blocks);
    }
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    ledger_close(&l);
    for (int depth = 0; depth <= DEPTH; depth++)
        assert_int_equal(unlink(names[depth]), 0);
}

static int encrypts(void)
{
    static unsigned char made[1 << 18];
    model m = model_of(1, 1, 8, 8, KVT_TYPE_F16, KVT_TYPE_F16);
    kvt_cache *cache = model_cache(&m);
    kvt_seq *seq = model_seq(cache);
    kvt_save_options o = save_options(KVT_CODEC_RAW, NULL);
    size_t n;
    kvt_status status;

    o.key = a_key;
    status = kvt_seq_save_memory(seq, made, sizeof made, &n, &o);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    assert_true(status == KVT_OK || status == KVT_ERR_UNSUPPORTED);
    return status == KVT_OK;
}

static void test_chains(void **state)
{
    (void)state;
    for (uint32_t codec = KVT_CODEC_RAW; codec <= KVT_CODEC_ZSTD; codec++) {
        chains_with(codec, NULL, 1);
        if (encrypts()) {
            chains_with(codec, a_key, 1);
            chains_with(codec, a_key, pool_threads(4));
        }
    }
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(folder, sizeof folder, "test_snapshot_bounds-%ld", (long)getpid());
    return mkdir(folder, 0700);
}

static int teardown(void **state)
{
    (void)state;
    (void)unlink(in_folder("file"));
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lying_words),
        cmocka_unit_test(test_bombs),
        cmocka_unit_test(test_chains),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
