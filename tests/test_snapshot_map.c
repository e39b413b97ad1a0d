/*
 * Sequences whose blocks lie in a mapped file: all that can be done with them gives what it gives
 * with blocks in memory, bit for bit; files that are replaced, removed and damaged meanwhile.
 */
#include "snapshot_options.h"

static kvt_status load_mapped(kvt_seq *seq, const char *name, uint32_t map, kvt_load_result *result)
{
    kvt_load_options l = loads();
    l.map = map;
    return kvt_seq_load(seq, in_folder(name), &l, result);
}

static kvt_seq *mapped_seq(const subject *s, const char *name, uint32_t map)
{
    kvt_seq *seq = tagged_seq(s);
    kvt_load_result result;
    expect_ok(s->cache, load_mapped(seq, name, map, &result));
    assert_true(map == KVT_MAP_NONE ? result.mapped_bytes == 0 : result.mapped_bytes > 0);
    return seq;
}

static void save_as(const subject *s, const kvt_seq *seq, const char *name, uint32_t codec,
                    const char *parent)
{
    kvt_save_options o = saves(codec);
    char path[400];
    (void)snprintf(path, sizeof path, "%s/%s", folder, parent ? parent : "");
    o.parent = parent ? path : NULL;
    expect_ok(s->cache, kvt_seq_save(seq, in_folder(name), &o));
}

static uint64_t hash_of(const subject *s, const kvt_seq *seq)
{
    return attend_hash(s, seq) * 31 + file_hash(s, seq);
}

/* One thing that is done with a sequence, and what can be seen of it after. */
static uint64_t act(const subject *s, kvt_seq **seq, int what)
{
    uint64_t n = kvt_seq_length(*seq);
    kvt_seq *copy;
    uint64_t h = 0;
    switch (what) {
    case 0: break;
    case 1: grow(s, *seq, 3); break;
    case 2: grow(s, *seq, 150); break;
    case 3:
        expect_ok(s->cache, kvt_seq_truncate(*seq, kvt_seq_reachable(*seq, n - 40)));
        h = hash_of(s, *seq);
        step_of(s, *seq, 500, 100);
        break;
    case 4:
        expect_ok(s->cache, kvt_seq_fork(*seq, kvt_seq_reachable(*seq, n - 20), &copy));
        grow(s, copy, 30);
        h = hash_of(s, copy);
        grow(s, *seq, 10);
        kvt_seq_destroy(*seq); /* the fork keeps the file */
        *seq = copy;
        break;
    case 5:
        mark(s, *seq);
        grow(s, *seq, 130);
        expect_ok(s->cache, kvt_seq_truncate(*seq, n));
        break;
    case 6: h = (uint64_t)kvt_seq_remove(*seq, 64, 64); break;
    case 7: expect_ok(s->cache, kvt_seq_truncate(*seq, kvt_seq_reachable(*seq, 90))); break;
    default:
        copy = *seq;
        *seq = reloaded(s, copy);
        kvt_seq_destroy(copy);
        break;
    }
    return h + hash_of(s, *seq);
}

static void all_is_equal(void **state)
{
    rng r = {51};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int deltas = 0; deltas < 2; deltas++) {
            subject s;
            kvt_seq *seq;
            open_kind(&s, kind, &r);
            seq = full_seq(&s, deltas ? 170 : 333);
            save_as(&s, seq, "a", KVT_CODEC_RAW, NULL);
            if (deltas) {
                grow(&s, seq, 80);
                save_as(&s, seq, "b", KVT_CODEC_ZSTD, "a"); /* between: decoded into memory */
                grow(&s, seq, 80);
                save_as(&s, seq, "c", KVT_CODEC_RAW, "b");
            }
            for (int a = 0; a < 9; a++)
                for (int b = 0; b < 9; b += is_quick() ? 4 : 2) {
                    uint64_t expected[2] = {0, 0};
                    for (uint32_t map = 0; map < 3; map++) {
                        kvt_seq *to = mapped_seq(&s, deltas ? "c" : "a", map);
                        uint64_t first = act(&s, &to, a);
                        uint64_t second = kvt_seq_length(to) > 200 ? act(&s, &to, b) : 0;
                        if (map && (first != expected[0] || second != expected[1]))
                            fail_msg("kind %d, map %u, deltas %d: %d then %d", kind, (unsigned)map,
                                     deltas, a, b);
                        expected[0] = first;
                        expected[1] = second;
                        kvt_seq_destroy(to);
                    }
                }
            kvt_seq_destroy(seq);
            close_subject(&s);
        }
}

/* Replaced by a save, and removed, while it is mapped; the parents of deltas likewise. */
static void files_go(void **state)
{
    rng r = {52};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (uint32_t map = KVT_MAP_VERIFY; map <= KVT_MAP_LAZY; map++) {
            subject s;
            kvt_seq *seq, *to, *again;
            open_kind(&s, kind, &r);
            seq = full_seq(&s, 250);
            save_as(&s, seq, "a", KVT_CODEC_RAW, NULL);
            to = mapped_seq(&s, "a", map);
            save_as(&s, to, "a", KVT_CODEC_RAW, NULL); /* out of the old one into the new one */
            expect_equal(&s, seq, to, "replaced", (size_t)kind);
            again = mapped_seq(&s, "a", map);
            grow(&s, again, 100);
            save_as(&s, again, "b", KVT_CODEC_RAW, "a");
            kvt_seq_destroy(again);
            again = mapped_seq(&s, "b", map);
            assert_int_equal(unlink(in_folder("a")), 0);
            assert_int_equal(unlink(in_folder("b")), 0);
            expect_equal(&s, seq, to, "removed", (size_t)kind);
            grow(&s, seq, 100);
            expect_equal(&s, seq, again, "a removed chain", (size_t)kind);
            grow(&s, again, 50);
            grow(&s, seq, 50);
            expect_equal(&s, seq, again, "and appended", (size_t)kind);
            kvt_seq_destroy(to);
            kvt_cache_destroy(s.cache); /* the cache first: sequences keep it */
            kvt_seq_destroy(again);
            kvt_seq_destroy(seq);
            s.cache = NULL;
            close_subject(&s);
        }
}

/* A load over a mapped sequence, of the very file it lies in; and a failed one. */
static void loads_over(void **state)
{
    rng r = {53};
    subject s;
    kvt_seq *seq, *to;
    (void)state;
    open_kind(&s, WINDOW, &r);
    seq = full_seq(&s, 300);
    save_as(&s, seq, "a", KVT_CODEC_RAW, NULL);
    to = mapped_seq(&s, "a", KVT_MAP_LAZY);
    for (uint32_t map = 0; map < 6; map++) {
        expect_ok(s.cache, load_mapped(to, "a", map % 3, NULL));
        expect_equal(&s, seq, to, "over itself", map);
        expect(s.cache, KVT_ERR_IO, load_mapped(to, "none", map % 3, NULL));
        expect_equal(&s, seq, to, "as it was", map);
    }
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* ---- damage ---- */

/* The bytes of all images of a raw file: where they are. */
static size_t image_at(const bytes *f, unsigned i, size_t *size)
{
    size_t at = section_payload(f->data, f->n, 13, i, size);
    size_t padding = (size_t)get64(f->data + at - 16);
    *size -= padding;
    return at + padding;
}

static void damaged_layers(void **state)
{
    rng r = {54};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++) {
        subject s;
        kvt_seq *seq;
        bytes file;
        size_t n;
        open_kind(&s, kind, &r);
        seq = full_seq(&s, 300);
        save_as(&s, seq, "a", KVT_CODEC_RAW, NULL);
        file = slurp(in_folder("a"));
        for (unsigned block = 0; block < 3; block++)
            for (uint32_t layer = 0; layer < s.groups[0].n_layers; layer++) {
                size_t at = image_at(&file, block, &n);
                size_t row = s.groups[0].n_kv_heads * (size_t)s.groups[0].k_dim;
                kvt_seq *to = tagged_seq(&s), *copy;
                float *x = malloc(300 * row * sizeof *x), q[4 * 64], out[4 * 64], lse[4];
                kvt_tensor view = kvt_tensor_f32(x);
                kvt_attend_args args = kvt_attend_args_init();
                kvt_attend_item item = {.seq = to, .n_queries = 1};
                kvt_save_options o = saves(KVT_CODEC_RAW);
                bytes into = {NULL, 0, 0, 0, -1, 0};
                kvt_writer writer = bytes_writer(&into);
                assert_non_null(x);
                if (s.n_groups == 2 && block) { /* of group 0, in sight */
                    at = image_at(&file, 2 * block, &n);
                    if (n % s.groups[0].n_layers)
                        at = image_at(&file, 0, &n);
                }
                at += layer * (n / s.groups[0].n_layers) + 100;
                file.data[at] ^= 4;
                spill(in_folder("bad"), file.data, file.n);
                expect(s.cache, KVT_ERR_CORRUPT, load_mapped(to, "bad", KVT_MAP_NONE, NULL));
                expect(s.cache, KVT_ERR_CORRUPT, load_mapped(to, "bad", KVT_MAP_VERIFY, NULL));
                assert_true(kvt_seq_is_empty(to));
                expect_ok(s.cache, load_mapped(to, "bad", KVT_MAP_LAZY, NULL));
                for (size_t i = 0; i < 4 * 64; i++) {
                    q[i] = 0.1f;
                    out[i] = -7.0f;
                }
                args.layer = layer;
                args.items = &item;
                args.n_items = 1;
                args.q = kvt_tensor_f32(q);
                args.out = kvt_tensor_f32(out);
                args.lse = lse;
                if (s.groups[0].window_tokens == 0) { /* else it may be out of sight */
                    expect(s.cache, KVT_ERR_CORRUPT, kvt_attend(s.cache, &args));
                    expect_error_text(s.cache, "damaged", "attend");
                    for (size_t i = 0; i < 4 * 64; i++)
                        assert_true(out[i] == -7.0f);
                    for (size_t i = 0; i < 300 * row; i++)
                        x[i] = -7.0f;
                    expect(s.cache, KVT_ERR_CORRUPT,
                           kvt_read(to, layer, KVT_SIDE_K, 0, 300, &view));
                    for (size_t i = 0; i < 300 * row; i++)
                        assert_true(x[i] == -7.0f);
                    for (uint32_t l = 0; l < s.groups[0].n_layers; l++)
                        if (l != layer)
                            expect_ok(s.cache, kvt_read(to, l, KVT_SIDE_V, 0, 300, &view));
                }
                expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_save_stream(to, &writer, &o));
                expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_save(to, in_folder("out"), &o));
                if (kvt_seq_fork(to, 300, &copy) == KVT_OK)
                    kvt_seq_destroy(copy);
                expect_ok(s.cache, kvt_seq_clear(to));
                grow(&s, to, 40);
                bytes_free(&into);
                free(x);
                kvt_seq_destroy(to);
                file.data[at] ^= 4;
            }
        bytes_free(&file);
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

/* Any block, also one that only a checkpoint has: what is damaged is not saved. */
static void damaged_blocks(void **state)
{
    rng r = {59};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++) {
        subject s;
        kvt_seq *seq;
        bytes file;
        size_t n;
        open_kind(&s, kind, &r);
        seq = full_seq(&s, 300);
        save_as(&s, seq, "a", KVT_CODEC_RAW, NULL);
        file = slurp(in_folder("a"));
        for (unsigned block = 0; block < get64(file.data + 48); block += is_quick() ? 3 : 1) {
            size_t at = image_at(&file, block, &n) + n - 1;
            kvt_seq *to = tagged_seq(&s);
            kvt_save_options o = saves(block % 2 ? KVT_CODEC_RAW : KVT_CODEC_ZSTD);
            bytes into = {NULL, 0, 0, 0, -1, 0};
            kvt_writer writer = bytes_writer(&into);
            file.data[at] ^= 0x20;
            spill(in_folder("bad"), file.data, file.n);
            expect_ok(s.cache, load_mapped(to, "bad", KVT_MAP_LAZY, NULL));
            expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_save_stream(to, &writer, &o));
            expect_error_text(s.cache, "its bytes do not make its digest", "a save");
            expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_save(to, in_folder("out"), &o));
            assert_int_not_equal(access(in_folder("out"), F_OK), 0);
            assert_int_equal(kvt_seq_length(to), 300);
            bytes_free(&into);
            kvt_seq_destroy(to);
            file.data[at] ^= 0x20;
        }
        bytes_free(&file);
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

/* A damaged last block, which the next step copies. */
static void damaged_ends(void **state)
{
    rng r = {55};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++) {
        subject s;
        kvt_seq *seq, *to;
        bytes file;
        unsigned last = 0;
        size_t n, at;
        open_kind(&s, kind, &r);
        seq = seq_of(&s);
        grow(&s, seq, 100);
        save_as(&s, seq, "a", KVT_CODEC_RAW, NULL);
        file = slurp(in_folder("a"));
        last = s.n_groups == 2 ? 3 : 1;
        at = image_at(&file, last, &n);
        file.data[at + 9] ^= 1;
        spill(in_folder("bad"), file.data, file.n);
        to = seq_of(&s);
        expect_ok(s.cache, load_mapped(to, "bad", KVT_MAP_LAZY, NULL));
        expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_begin(to, 1, NULL));
        assert_int_equal(kvt_seq_pending(to), 0);
        assert_int_equal(kvt_seq_length(to), 100);
        expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_begin(to, 1, NULL)); /* again */
        expect_ok(s.cache, kvt_seq_truncate(to, 0));
        grow(&s, to, 100);
        expect_equal(&s, seq, to, "begun anew", (size_t)kind);
        kvt_seq_destroy(to);
        bytes_free(&file);
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

/* ---- memory, and what cannot be mapped ---- */

static void memory_is_the_files(void **state)
{
    kvt_group_config g = group_of(4, 8, 8, 128, 128, KVT_TYPE_F16, KVT_TYPE_F16);
    rng r = {56};
    ledger l;
    subject s;
    kvt_seq *seq, *to;
    kvt_load_result result;
    uint64_t empty, with;
    (void)state;
    ledger_init(&l);
    open_subject(&s, &g, 1, &r);
    s.ledger = &l;
    open_cache(&s, NULL);
    empty = kvt_cache_memory_bytes(s.cache);
    seq = tagged_seq(&s);
    grow(&s, seq, 640);
    with = kvt_cache_memory_bytes(s.cache) - empty;
    save_as(&s, seq, "a", KVT_CODEC_RAW, NULL);
    kvt_seq_destroy(seq);
    expect_ok(s.cache, kvt_cache_trim(s.cache));
    for (uint32_t map = KVT_MAP_VERIFY; map <= KVT_MAP_LAZY; map++) {
        to = tagged_seq(&s);
        l.peak_bytes = l.live_bytes;
        expect_ok(s.cache, load_mapped(to, "a", map, &result));
        assert_int_equal(result.mapped_bytes, (uint64_t)640 * 4 * 8 * 256 * 2);
        assert_true(kvt_cache_memory_bytes(s.cache) - empty < with / 20);
        assert_true(l.peak_bytes - empty < with / 5);
        kvt_seq_destroy(to);
        expect_ok(s.cache, kvt_cache_trim(s.cache));
        assert_true(kvt_cache_memory_bytes(s.cache) <= empty + 4096);
    }
    for (size_t n = 1; n <= 129; n += 64) { /* what is reused of it */
        kvt_load_options o = loads();
        int32_t ids[129];
        to = tagged_seq(&s);
        expect_ok(s.cache, load_mapped(to, "a", KVT_MAP_VERIFY, &result));
        expect_ok(s.cache, kvt_seq_token_ids(to, 0, n, ids));
        o.map = KVT_MAP_VERIFY;
        o.reuse = KVT_REUSE_PREFIX;
        o.prompt = ids;
        o.n_prompt = n;
        expect_ok(s.cache, kvt_seq_load(to, in_folder("a"), &o, &result));
        assert_int_equal(result.n_tokens, n - 1);
        assert_int_equal(result.mapped_bytes, (uint64_t)(n - 1) * 4 * 8 * 256 * 2);
        kvt_seq_destroy(to);
    }
    kvt_cache_destroy(s.cache);
    s.budget = empty + with / 4; /* what is mapped is not held against it */
    open_cache(&s, NULL);
    to = tagged_seq(&s);
    expect(s.cache, KVT_ERR_BUDGET, load_mapped(to, "a", KVT_MAP_NONE, NULL));
    expect_ok(s.cache, load_mapped(to, "a", KVT_MAP_LAZY, NULL));
    grow(&s, to, 1);
    kvt_seq_destroy(to);
    kvt_cache_destroy(s.cache);
    s.budget = 0;
    open_cache(&s, NULL); /* every allocation fails */
    for (uint32_t map = KVT_MAP_VERIFY; map <= KVT_MAP_LAZY; map++)
        for (long i = 0;; i++) {
            kvt_status status;
            to = tagged_seq(&s);
            l.countdown = i;
            status = load_mapped(to, "a", map, NULL);
            l.countdown = -1;
            kvt_seq_destroy(to);
            expect_ok(s.cache, kvt_cache_trim(s.cache));
            if (status == KVT_OK)
                break;
            assert_int_equal(status, KVT_ERR_MEMORY);
        }
    close_subject(&s);
    ledger_close(&l);
}

/* Each file of a chain takes memory for the blocks that lie in it, not for all of the sequence. */
static void memory_of_chains(void **state)
{
    enum { FILES = 10 };
    kvt_group_config g = group_of(1, 1, 1, 8, 8, KVT_TYPE_F16, KVT_TYPE_F16);
    rng r = {58};
    subject s;
    kvt_seq *seq, *to;
    uint64_t empty, one, chain;
    char names[FILES][8];
    (void)state;
    open_subject(&s, &g, 1, &r);
    open_cache(&s, NULL);
    seq = tagged_seq(&s);
    grow(&s, seq, 64);
    for (int i = 0; i < FILES; i++) {
        (void)snprintf(names[i], sizeof names[i], "c%d", i);
        save_as(&s, seq, names[i], KVT_CODEC_RAW, i ? names[i - 1] : NULL);
        grow(&s, seq, 64);
    }
    save_as(&s, seq, "last", KVT_CODEC_RAW, names[FILES - 1]);
    save_as(&s, seq, "one", KVT_CODEC_RAW, NULL);
    for (uint32_t map = KVT_MAP_VERIFY; map <= KVT_MAP_LAZY; map++) {
        expect_ok(s.cache, kvt_cache_trim(s.cache));
        empty = kvt_cache_memory_bytes(s.cache);
        to = mapped_seq(&s, "one", map);
        one = kvt_cache_memory_bytes(s.cache) - empty;
        kvt_seq_destroy(to);
        expect_ok(s.cache, kvt_cache_trim(s.cache));
        to = mapped_seq(&s, "last", map);
        chain = kvt_cache_memory_bytes(s.cache) - empty;
        expect_equal(&s, seq, to, "a chain that is mapped", map);
        kvt_seq_destroy(to);
        assert_true(chain < one + FILES * 512);
    }
    kvt_seq_destroy(seq);
    close_subject(&s);
}

static void not_mapped(void **state)
{
    rng r = {57};
    subject s, other;
    kvt_seq *seq, *to, *of_other;
    kvt_load_options l = loads();
    kvt_load_result result;
    kvt_group_config g;
    bytes file;
    (void)state;
    open_kind(&s, I8, &r);
    seq = full_seq(&s, 250);
    to = tagged_seq(&s);
    for (uint32_t codec = 0; codec < 3; codec++)
        for (uint32_t map = 1; map < 3; map++) {
            save_as(&s, seq, "a", codec, NULL);
            expect_ok(s.cache, load_mapped(to, "a", map, &result));
            assert_true(codec == KVT_CODEC_RAW ? result.mapped_bytes > 0
                                               : result.mapped_bytes == 0);
            expect_equal(&s, seq, to, "of any codec", codec);
        }
    file = slurp(in_folder("a"));
    for (l.map = 1; l.map < 3; l.map++) {
        kvt_reader reader = bytes_reader(&file);
        expect(s.cache, KVT_ERR_ARG, kvt_seq_load_stream(to, &reader, &l, NULL));
        expect(s.cache, KVT_ERR_ARG, kvt_seq_load_fd(to, 0, &l, NULL));
        expect(s.cache, KVT_ERR_ARG, kvt_seq_load_memory(to, file.data, file.n, &l, NULL));
        l.key = a_key;
        expect(s.cache, KVT_ERR_UNSUPPORTED, kvt_seq_load(to, in_folder("a"), &l, NULL));
        l.key = NULL;
        expect(s.cache, KVT_ERR_UNSUPPORTED, kvt_seq_load(to, "/dev/zero", &l, NULL));
        spill(in_folder("empty"), "", 0);
        assert_int_not_equal(kvt_seq_load(to, in_folder("empty"), &l, NULL), KVT_OK);
        spill(in_folder("cut"), file.data, file.n / 2);
        expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load(to, in_folder("cut"), &l, NULL));
        spill(in_folder("more"), file.data, file.n);
        {
            FILE *f = fopen(in_folder("more"), "ab");
            assert_non_null(f);
            assert_int_equal(fputc(0, f), 0);
            assert_int_equal(fclose(f), 0);
        }
        expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_load(to, in_folder("more"), &l, NULL));
    }
    expect_equal(&s, seq, to, "as it was", 0);
    bytes_free(&file);
    save_as(&s, seq, "a", KVT_CODEC_RAW, NULL); /* converted: there is nothing to be mapped */
    g = s.groups[0];
    g.k_type = KVT_TYPE_F16;
    open_subject(&other, &g, 1, &r);
    open_cache(&other, NULL);
    of_other = tagged_seq(&other);
    l.convert = 1;
    for (l.map = 1; l.map < 3; l.map++) {
        kvt_status status = kvt_seq_load(of_other, in_folder("a"), &l, &result);
        if (status != KVT_ERR_UNSUPPORTED)
            expect(other.cache, KVT_OK, status);
        if (status == KVT_OK)
            assert_int_equal(result.mapped_bytes, 0);
    }
    kvt_seq_destroy(of_other);
    close_subject(&other);
    kvt_seq_destroy(to);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* Of two groups one is converted, and read; the other lies in the file, and keeps its ids. */
static void one_group_is_converted(void **state)
{
    kvt_group_config g[2] = {group_of(2, 2, 2, 64, 64, KVT_TYPE_F16, KVT_TYPE_F16),
                             group_of(2, 2, 2, 64, 64, KVT_TYPE_F16, KVT_TYPE_F16)};
    rng r = {58};
    subject s, other;
    kvt_seq *seq, *to;
    (void)state;
    open_subject(&s, g, 2, &r);
    open_cache(&s, NULL);
    seq = tagged_seq(&s);
    grow(&s, seq, 640);
    save_as(&s, seq, "a", KVT_CODEC_RAW, NULL);
    g[1].k_type = g[1].v_type = KVT_TYPE_F32;
    open_subject(&other, g, 2, &r);
    open_cache(&other, NULL);
    to = tagged_seq(&other);
    for (uint32_t map = KVT_MAP_NONE; map <= KVT_MAP_LAZY; map++) {
        kvt_load_options l = loads();
        kvt_load_result result;
        l.map = map;
        l.convert = 1;
        expect_ok(other.cache, kvt_seq_load(to, in_folder("a"), &l, &result));
        assert_int_equal(result.mapped_bytes, map ? (uint64_t)640 * 2 * 2 * 128 * 2 : 0);
        for (uint32_t layer = 0; layer < 4; layer++) {
            static float a[640 * 128], b[640 * 128];
            kvt_tensor from = kvt_tensor_f32(a), into = kvt_tensor_f32(b);
            expect_ok(s.cache, kvt_read(seq, layer, KVT_SIDE_K, 0, 640, &from));
            expect_ok(other.cache, kvt_read(to, layer, KVT_SIDE_K, 0, 640, &into));
            assert_memory_equal(a, b, sizeof a);
        }
    }
    kvt_seq_destroy(to);
    close_subject(&other);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/*
 * A full last block, which begin does not verify where nothing is sealed: a fork amid a step, of a
 * part of it, copies nothing.
 */
static void damaged_ends_of_forks(void **state)
{
    static float x[128 * 64];
    kvt_tensor view = kvt_tensor_f32(x);
    rng r = {56};
    subject s;
    kvt_seq *seq, *to, *copy = NULL;
    bytes file;
    size_t n, at;
    (void)state;
    open_kind(&s, F16, &r);
    seq = seq_of(&s);
    grow(&s, seq, 128);
    save_as(&s, seq, "a", KVT_CODEC_RAW, NULL);
    file = slurp(in_folder("a"));
    at = image_at(&file, 1, &n);
    file.data[at + 9] ^= 1;
    spill(in_folder("bad"), file.data, file.n);
    to = seq_of(&s);
    expect_ok(s.cache, load_mapped(to, "bad", KVT_MAP_LAZY, NULL));
    expect_ok(s.cache, kvt_seq_begin(to, 1, NULL));
    expect_ok(s.cache, kvt_seq_fork(to, 100, &copy));
    expect(s.cache, KVT_ERR_CORRUPT, kvt_read(copy, 0, KVT_SIDE_K, 64, 36, &view));
    expect(s.cache, KVT_ERR_CORRUPT, kvt_seq_begin(copy, 1, NULL));
    kvt_seq_destroy(copy);
    kvt_seq_destroy(to);
    bytes_free(&file);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_is_equal),
        cmocka_unit_test(files_go),
        cmocka_unit_test(loads_over),
        cmocka_unit_test(damaged_layers),
        cmocka_unit_test(damaged_ends),
        cmocka_unit_test(memory_is_the_files),
        cmocka_unit_test(memory_of_chains),
        cmocka_unit_test(not_mapped),
        cmocka_unit_test(damaged_blocks),
        cmocka_unit_test(one_group_is_converted),
        cmocka_unit_test(damaged_ends_of_forks),
    };
    RUN_IN_FOLDER(tests);
}
