/*
 * Snapshots of what a sequence has besides tokens: windows that have released blocks, checkpoints,
 * a tag and a next position. A loaded sequence goes on as the saved one, back to its checkpoints
 * too; equal states save equal files; a load that fails changes nothing.
 */
#include "snapshot_state.h"

#include <stdio.h>

/* Every checkpoint has its blob, as `checkpoint` makes it. */
static void expect_blobs(const subject *s, const kvt_seq *seq)
{
    uint64_t at[MOST];
    unsigned char blob[80];
    size_t n, size;
    points_of(s, seq, at, &n);
    while (n-- > 0) {
        expect_ok(s->cache, kvt_seq_checkpoint_read(seq, at[n], blob, sizeof blob, &size));
        assert_int_equal(size, at[n] % (sizeof blob + 1));
        for (size_t i = 0; i < size; i++)
            assert_int_equal(blob[i], (unsigned char)(at[n] * 7 + i));
    }
}

static void destroy_all(kvt_seq **seqs, size_t n)
{
    for (size_t i = 0; i < n; i++)
        kvt_seq_destroy(seqs[i]);
}

/* ---- going on ---- */

/*
 * What a user does to one sequence, at random, and the same to another one. after_load: no truncate
 * may come that takes a sealing back, until a begin has come. floor: no truncate below, since what
 * is behind a window there may have been left out of the snapshot.
 */
static void act(const subject *s, kvt_seq *const *seqs, size_t n_seqs, uint64_t floor, rng *r,
                int *fresh)
{
    uint64_t length = kvt_seq_length(seqs[0]), at[MOST], to = 0;
    uint32_t what = rng_below(r, 10), n = 1 + rng_below(r, rng_below(r, 2) ? 90 : 5);
    uint32_t first = rng_below(r, MOST - 90);
    size_t n_points;
    points_of(s, seqs[0], at, &n_points);
    if (what == 8 && n_points) {
        to = at[rng_below(r, (uint32_t)n_points)];
    } else if (what == 9 && !*fresh) {
        to = length - rng_below(r, length < 200 ? (uint32_t)length + 1 : 200);
        for (size_t i = 0; i < 2 * n_seqs; i++) /* in both */
            to = kvt_seq_reachable(seqs[i % n_seqs], to);
        for (size_t i = 0; i < n_seqs; i++)
            to = to >= floor && kvt_seq_reachable(seqs[i], to) == to ? to : length;
        if (rng_below(r, 4))
            to = length; /* seldom */
    } else {
        to = length;
    }
    for (size_t i = 0; i < n_seqs; i++) {
        kvt_seq *seq = seqs[i];
        if (what < 5 && length + n <= MOST) {
            step_of(s, seq, first, n);
        } else if (what < 7) {
            checkpoint(s, seq);
        } else if (what == 7) {
            expect_ok(s->cache, kvt_seq_set_next_position(seq, (int32_t)(length + n)));
        } else {
            expect_ok(s->cache, kvt_seq_truncate(seq, to));
        }
    }
    if (what < 5 && length + n <= MOST)
        *fresh = 0;
    else if (what >= 8 && to < length)
        *fresh = 1; /* a checkpoint may have had open forms beside */
}

static void check_going_on(uint64_t seed)
{
    static const kvt_type types[] = {KVT_TYPE_I8, KVT_TYPE_F16, KVT_TYPE_I4,
                                     KVT_TYPE_I8, KVT_TYPE_F32, KVT_TYPE_I5};
    rng r = {seed};
    kvt_seq *seqs[2] = {NULL, NULL}, *copy = NULL;
    uint64_t loaded_at = 0;
    int fresh = 0;
    subject s;
    make(&s, 1 + rng_below(&r, 150), rng_below(&r, 2) * rng_below(&r, 150), types[rng_below(&r, 6)],
         rng_below(&r, 2) ? KVT_RESIDUAL_NONE : 1 + rng_below(&r, 100), &r);
    seqs[0] = seq_of(&s);
    for (int rounds = 0; rounds < 3; rounds++) {
        for (uint32_t i = 0, n = rng_below(&r, 25); i < n; i++)
            act(&s, seqs, 1, loaded_at, &r, &fresh);
        seqs[1] = reloaded(&s, seqs[0]);
        fresh = 1;
        loaded_at = kvt_seq_length(seqs[0]);
        expect_equal(&s, seqs[1], seqs[0], "loaded", (size_t)seed);
        expect_blobs(&s, seqs[1]);
        for (uint64_t n = 0; n <= kvt_seq_length(seqs[0]); n++)
            if (n + 64 >= kvt_seq_length(seqs[0]))
                assert_true(kvt_seq_reachable(seqs[0], n) == kvt_seq_reachable(seqs[1], n));
            else /* a snapshot keeps what 64 tokens back need, and the sequence may have more */
                assert_true(kvt_seq_reachable(seqs[0], n) >= kvt_seq_reachable(seqs[1], n));
        for (uint32_t i = 0, n = rng_below(&r, 12); i < n; i++) {
            act(&s, seqs, 2, loaded_at, &r, &fresh);
            expect_equal(&s, seqs[1], seqs[0], "loaded, then gone on", (size_t)seed);
        }
        /* Either goes on alone, and may be forked. */
        if (rng_below(&r, 2)) {
            kvt_seq *other = seqs[0];
            seqs[0] = seqs[1];
            seqs[1] = other;
        }
        expect_ok(s.cache, kvt_seq_fork(seqs[0], kvt_seq_length(seqs[0]), &copy));
        expect_equal(&s, copy, seqs[1], "a fork of one that was loaded", (size_t)seed);
        destroy_all(seqs, 2);
        seqs[0] = copy;
    }
    kvt_seq_destroy(seqs[0]);
    close_subject(&s);
}

static void a_loaded_sequence_goes_on(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= (is_quick() ? 8 : 250); seed++)
        check_going_on(seed);
}

/* A checkpoint of what is sealed, released, filled up or nothing of these; at 0 and at the end. */
static void every_pair_of_lengths(void **state)
{
    static const size_t lengths[] = {0, 1, 63, 64, 65, 100, 128, 150, 192, 257};
    rng r = {11};
    (void)state;
    for (size_t i = 0; i < 10; i++)
        for (size_t j = i; j < 10; j++)
            for (int k = 0; k < 6; k++) {
                static const kvt_type types[] = {KVT_TYPE_I8, KVT_TYPE_I8, KVT_TYPE_F16,
                                                 KVT_TYPE_I8, KVT_TYPE_I4, KVT_TYPE_I5};
                subject s;
                kvt_seq *seq, *loaded, *stayed;
                make(&s, k % 2 ? 20 : 0, k == 3 ? 70 : 0, types[k], KVT_RESIDUAL_NONE, &r);
                seq = seq_of(&s);
                if (lengths[i])
                    grow(&s, seq, lengths[i]);
                checkpoint(&s, seq);
                stayed = reloaded(&s, seq);
                if (lengths[j] > lengths[i])
                    step_of(&s, seq, 400, lengths[j] - lengths[i]);
                checkpoint(&s, seq);
                loaded = reloaded(&s, seq);
                expect_equal(&s, loaded, seq, "loaded", lengths[i]);
                expect_blobs(&s, loaded);
                expect_ok(s.cache, kvt_seq_truncate(loaded, lengths[i]));
                expect_equal(&s, loaded, stayed, "back", lengths[i]);
                grow(&s, loaded, 130);
                grow(&s, stayed, 130);
                expect_equal(&s, loaded, stayed, "on from there", lengths[i]);
                kvt_seq_destroy(stayed);
                kvt_seq_destroy(loaded);
                kvt_seq_destroy(seq);
                close_subject(&s);
            }
}

/*
 * Checkpoints before and after truncates into sealed blocks, fine ones and others, also where the
 * last checkpoint is at the end. A loaded sequence goes back to each as the saved one does.
 */
static void check_cuts(kvt_type type, uint32_t fine, rng *r)
{
    kvt_seq *seq, *loaded, *back, *copy = NULL;
    uint64_t at[MOST];
    size_t n;
    subject s;
    make(&s, rng_below(r, 3) ? 0 : 150, 0, type, KVT_RESIDUAL_NONE, r);
    kvt_cache_destroy(s.cache);
    s.groups[0].fine_tokens = fine;
    open_cache(&s, NULL);
    seq = seq_of(&s);
    for (int i = 0; i < 6; i++) {
        const uint64_t length = kvt_seq_length(seq);
        if (length > 10 && rng_below(r, 2)) {
            uint64_t to = length - rng_below(r, length < 90 ? (uint32_t)length : 90);
            expect_ok(s.cache, kvt_seq_truncate(seq, kvt_seq_reachable(seq, to)));
        } else { /* of two steps: sealings of the first are final */
            step_of(&s, seq, rng_below(r, 400), 1 + rng_below(r, rng_below(r, 2) ? 100 : 10));
            step_of(&s, seq, rng_below(r, 400), 1);
        }
        if (rng_below(r, 3))
            checkpoint(&s, seq);
        loaded = reloaded(&s, seq);
        expect_equal(&s, loaded, seq, "loaded", (size_t)i);
        kvt_seq_destroy(loaded);
    }
    loaded = reloaded(&s, seq);
    points_of(&s, seq, at, &n);
    while (n-- > 0) {
        expect_ok(s.cache, kvt_seq_fork(seq, at[n], &copy));
        expect_ok(s.cache, kvt_seq_fork(loaded, at[n], &back));
        expect_equal(&s, back, copy, "back", (size_t)at[n]);
        step_of(&s, back, 300, 70);
        step_of(&s, copy, 300, 70);
        expect_equal(&s, back, copy, "on from there", (size_t)at[n]);
        kvt_seq_destroy(copy);
        kvt_seq_destroy(back);
    }
    kvt_seq_destroy(loaded);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

static void checkpoints_of_cut_rows(void **state)
{
    static const uint32_t fine[] = {0, KVT_FINE_NONE, 1000};
    rng r = {17};
    (void)state;
    for (int i = 0; i < (is_quick() ? 60 : 1500); i++)
        check_cuts(i % 2 ? KVT_TYPE_I5 : KVT_TYPE_I4, fine[i % 3], &r);
}

/* ---- the same state, the same file ---- */

/* Begins that are aborted, drafts that are taken back and forks that go leave no trace. */
static void what_leaves_no_trace(void **state)
{
    rng r = {12};
    (void)state;
    for (int i = 0; i < (is_quick() ? 8 : 60); i++) {
        kvt_seq *plain, *other, *copy = NULL;
        subject s;
        uint32_t window = i % 4 < 2 ? 1 + rng_below(&r, 90) : 0;
        make(&s, window, window ? rng_below(&r, 2) * 10 : 0,
             i % 2   ? KVT_TYPE_I8
             : i % 8 ? KVT_TYPE_I4
                     : KVT_TYPE_F16,
             i % 3 ? KVT_RESIDUAL_NONE : 70, &r);
        plain = seq_of(&s);
        other = seq_of(&s);
        while (kvt_seq_length(plain) < 500) {
            size_t n = 1 + rng_below(&r, 80);
            uint64_t length = kvt_seq_length(plain);
            grow(&s, plain, n);
            switch (rng_below(&r, 4)) {
            case 0:
                expect_ok(s.cache, kvt_seq_begin(other, 1 + rng_below(&r, 80), NULL));
                expect_ok(s.cache, kvt_seq_abort(other));
                break;
            case 1: /* windows release blocks for the length that was there */
                if (window)
                    break;
                step_of(&s, other, 600, 1 + rng_below(&r, 64));
                expect_ok(s.cache, kvt_seq_truncate(other, length));
                break;
            case 2:
                expect_ok(s.cache, kvt_seq_fork(other, length, &copy));
                step_of(&s, copy, 600, 100);
                kvt_seq_destroy(copy);
                break;
            default: break;
            }
            if (rng_below(&r, 2)) {
                grow(&s, other, n);
            } else {
                grow(&s, other, (n + 1) / 2);
                if (n / 2)
                    grow(&s, other, n / 2);
            }
            if (rng_below(&r, 2)) {
                checkpoint(&s, plain);
                checkpoint(&s, other);
            }
            if (rng_below(&r, 4) == 0) { /* the last row of a checkpoint, copied in vain */
                expect_ok(s.cache, kvt_seq_begin(other, 1, NULL));
                expect_ok(s.cache, kvt_seq_abort(other));
            }
            expect_equal(&s, other, plain, "without a trace", (size_t)i);
        }
        kvt_seq_destroy(plain);
        kvt_seq_destroy(other);
        close_subject(&s);
    }
}

/* Each block is in the file once, however many checkpoints have it. */
static void blocks_are_there_once(void **state)
{
    rng r = {13};
    kvt_seq *seq;
    subject s;
    bytes file;
    size_t n, table, before;
    (void)state;
    make(&s, 50, 0, KVT_TYPE_I8, KVT_RESIDUAL_NONE, &r);
    seq = seq_of(&s);
    grow(&s, seq, 300);
    grow(&s, seq, 100); /* rows 0 and 4 .. 6 of the first group, 0 .. 6 of the second */
    file = saved(s.cache, seq, KVT_CODEC_RAW);
    before = file.n;
    (void)section_payload(file.data, file.n, 3, 0, &table);
    assert_int_equal(table, 8 + 32 * get64(file.data + 48));
    bytes_free(&file);
    expect_ok(s.cache, kvt_seq_checkpoint(seq, NULL, 0));
    file = saved(s.cache, seq, KVT_CODEC_RAW);
    n = file.n - before; /* its section and its entry in the index */
    assert_int_equal(n, 32 + 16 + 8 + 8 + 48);
    bytes_free(&file);
    for (int i = 0; i < 5; i++) {
        grow(&s, seq, 1);
        checkpoint(&s, seq);
    }
    file = saved(s.cache, seq, KVT_CODEC_RAW);
    (void)section_payload(file.data, file.n, 3, 0, &n);
    assert_int_equal(n, table + 5 * 2 * 32); /* 5 lengths of row 6; the last one is the table's */
    bytes_free(&file);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* ---- answers ---- */

static void load_answers_for_prompts(void **state)
{
    rng r = {14};
    (void)state;
    for (int with = 0; with < 3; with++) { /* nothing; a window; a window and checkpoints */
        int32_t ids[MOST];
        kvt_load_options options = {.struct_size = sizeof options, .prompt = ids};
        kvt_load_result result;
        uint64_t at[MOST];
        kvt_seq *seq, *copy = NULL;
        subject s;
        bytes file;
        size_t n;
        make(&s, with ? 60 : 0, 0, KVT_TYPE_I8, KVT_RESIDUAL_NONE, &r);
        seq = seq_of(&s);
        for (uint64_t i = 0; i < 8; i++) {
            grow(&s, seq, 50);
            if (with == 2 && i % 3 == 1)
                checkpoint(&s, seq);
        }
        file = saved(s.cache, seq, KVT_CODEC_RAW);
        points_of(&s, seq, at, &n);
        assert_int_equal(n, with == 2 ? 3 : 0);
        for (uint64_t same = 0; same <= 410; same += 1 + same % 7) {
            for (uint64_t n_prompt = same; n_prompt <= same + 1; n_prompt++) {
                uint64_t prefix = same < 400 ? same : 400, bound, last = UINT64_MAX;
                kvt_reader reader = bytes_reader(&file);
                for (int32_t i = 0; i < MOST; i++)
                    ids[i] = (uint64_t)i < same ? i : -7;
                options.n_prompt = n_prompt;
                file.at = 0;
                memset(&result, 0xff, sizeof result);
                expect_ok(s.cache, kvt_seq_load_stream(seq, &reader, &options, &result));
                assert_true(result.n_tokens == 400 && result.prefix_tokens == prefix);
                assert_true(result.reserved[0] == 0 && result.reserved[2] == 0 &&
                            result.mapped_bytes == 0);
                bound = n_prompt && prefix == n_prompt ? prefix - 1 : prefix;
                for (size_t i = 0; i < n; i++)
                    last = at[i] <= bound ? at[i] : last;
                assert_true(result.checkpoint_tokens == last);
                assert_true(result.reuse_tokens <= bound);
                for (uint64_t i = bound; i > result.reuse_tokens; i--)
                    expect(s.cache, KVT_ERR_STATE, kvt_seq_fork(seq, i, &copy));
                if (with == 0)
                    assert_true(result.reuse_tokens == bound);
                expect_ok(s.cache, kvt_seq_truncate(seq, result.reuse_tokens));
                grow(&s, seq, 10);
                assert_true(n_prompt == 0 || result.reuse_tokens < n_prompt);
            }
        }
        file.at = 0;
        {
            kvt_reader reader = bytes_reader(&file);
            expect_ok(s.cache, kvt_seq_load_stream(seq, &reader, NULL, &result));
        }
        assert_true(result.reuse_tokens == 0 && result.checkpoint_tokens == UINT64_MAX);
        bytes_free(&file);
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

/* ---- tag and next position ---- */

static void tags_have_to_be_the_same(void **state)
{
    static const struct {
        const char *stored, *here, *text;
    } cases[] = {
        {"lora 7", "", "it is \"lora 7\" (6 bytes), the sequence's is none (0 bytes)"},
        {"", "lora 7", "it is none (0 bytes), the sequence's is \"lora 7\" (6 bytes)"},
        {"a", "b", "\"a\" (1 bytes), the sequence's is \"b\""},
        {"a\x01", "a", "it is 6101 (2 bytes)"},
        {"a\"b", "a", "it is 612262 (3 bytes)"},
        {"0123456789012345678901234567890123456789012345678901", "0",
         "it is \"01234567890123456789012345678901234567"},
    };
    rng r = {15};
    subject s;
    (void)state;
    make(&s, 40, 0, KVT_TYPE_I8, 0, &r);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvt_seq *seq = seq_of(&s), *other = seq_of(&s);
        kvt_load_result result = {77, 77, 77, 77, 77, {0}};
        uint64_t before;
        bytes file;
        expect_ok(s.cache, kvt_seq_set_tag(seq, cases[i].stored, strlen(cases[i].stored)));
        expect_ok(s.cache, kvt_seq_set_tag(other, cases[i].here, strlen(cases[i].here)));
        grow(&s, seq, 10);
        grow(&s, other, 5);
        checkpoint(&s, other);
        before = file_hash(&s, other);
        file = saved(s.cache, seq, KVT_CODEC_ZSTD);
        expect(s.cache, KVT_ERR_MISMATCH, load_bytes(other, file.data, file.n, &result));
        expect_error_text(s.cache, cases[i].text, "tag");
        assert_true(file_hash(&s, other) == before && result.n_tokens == 77);
        kvt_seq_destroy(other);
        other = seq_of(&s);
        expect_ok(s.cache, kvt_seq_set_tag(other, cases[i].stored, strlen(cases[i].stored)));
        expect_ok(s.cache, load_bytes(other, file.data, file.n, &result));
        expect_equal(&s, seq, other, "with a tag", i);
        bytes_free(&file);
        kvt_seq_destroy(seq);
        kvt_seq_destroy(other);
    }
    close_subject(&s);
}

static void next_positions_come_back(void **state)
{
    rng r = {16};
    subject s;
    (void)state;
    make(&s, 40, 0, KVT_TYPE_I8, 0, &r);
    for (int tag = 0; tag < 3; tag++)
        for (int32_t next = -1; next < INT32_MAX - 1; next = next < 3 ? next + 1 : INT32_MAX - 1) {
            kvt_seq *seq = seq_of(&s), *loaded;
            char text[KVT_MAX_TAG];
            memset(text, 'x', sizeof text);
            expect_ok(s.cache, kvt_seq_set_tag(seq, text, tag == 2 ? sizeof text : (size_t)tag));
            grow(&s, seq, 5);
            if (next >= 0)
                expect_ok(s.cache, kvt_seq_set_next_position(seq, next));
            loaded = reloaded(&s, seq);
            assert_int_equal(kvt_seq_next_position(loaded), next < 0 ? 5 : next);
            expect_equal(&s, seq, loaded, "next position", (size_t)tag);
            grow(&s, seq, 2);
            grow(&s, loaded, 2);
            expect_equal(&s, seq, loaded, "behind a next position", (size_t)tag);
            assert_int_equal(kvt_seq_next_position(loaded), next < 0 ? 7 : next + 2);
            expect_ok(s.cache, kvt_seq_clear(loaded)); /* an empty sequence has one too */
            if (next >= 0)
                expect_ok(s.cache, kvt_seq_set_next_position(loaded, next));
            kvt_seq_destroy(seq);
            seq = reloaded(&s, loaded);
            assert_int_equal(kvt_seq_next_position(seq), next < 0 ? 0 : next);
            kvt_seq_destroy(seq);
            kvt_seq_destroy(loaded);
        }
    close_subject(&s);
}

/* ---- failures ---- */

static void allocations_fail(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        const int loads = i % 2;
        rng r = {17};
        ledger memory;
        kvt_seq *victim;
        uint64_t before, held;
        bytes file;
        subject s;
        ledger_init(&memory);
        make(&s, 20, 0, i < 2 ? KVT_TYPE_I8 : KVT_TYPE_I5, KVT_RESIDUAL_NONE, &r);
        kvt_cache_destroy(s.cache);
        s.ledger = &memory;
        open_cache(&s, NULL);
        file = whole_file(&s, KVT_CODEC_ZSTD);
        victim = victim_of(&s);
        expect_ok(s.cache, kvt_cache_trim(s.cache));
        before = file_hash(&s, victim);
        held = kvt_cache_memory_bytes(s.cache);
        for (long fail = 0;; fail++) {
            bytes out = {NULL, 0, 0, 0, -1, 0};
            kvt_writer writer = bytes_writer(&out);
            kvt_status status;
            memory.countdown = fail;
            status = loads ? load_bytes(victim, file.data, file.n, NULL)
                           : kvt_seq_save_stream(victim, &writer, NULL);
            memory.countdown = -1;
            bytes_free(&out);
            if (status == KVT_OK) {
                assert_true(fail > 15);
                break;
            }
            expect(s.cache, KVT_ERR_MEMORY, status);
            assert_true(kvt_cache_memory_bytes(s.cache) == held);
            assert_true(file_hash(&s, victim) == before);
        }
        kvt_seq_destroy(victim);
        assert_true(kvt_cache_memory_bytes(s.cache) == memory.live_bytes);
        bytes_free(&file);
        close_subject(&s);
        ledger_close(&memory);
    }
}

/* What a load keeps is held against the budget, to the byte; checkpoints and their blobs too. */
static void budget_holds(kvt_type type)
{
    rng r = {18};
    subject s;
    bytes file;
    kvt_seq *seq;
    uint64_t need;
    make(&s, 20, 0, type, type == KVT_TYPE_F16 ? 0 : KVT_RESIDUAL_NONE, &r);
    file = whole_file(&s, KVT_CODEC_RAW);
    for (int i = 0; i < 3; i++) {
        kvt_cache_destroy(s.cache);
        open_cache(&s, NULL);
        seq = seq_of(&s);
        expect_ok(s.cache, kvt_seq_set_tag(seq, "tag", 3));
        expect(s.cache, i == 1 ? KVT_ERR_BUDGET : KVT_OK, load_bytes(seq, file.data, file.n, NULL));
        need = kvt_cache_memory_bytes(s.cache);
        kvt_seq_destroy(seq);
        if (i == 0)
            s.budget = need - 1;
        if (i == 1)
            s.budget++;
    }
    bytes_free(&file);
    close_subject(&s);
}

static void budgets_hold(void **state)
{
    (void)state;
    budget_holds(KVT_TYPE_F16);
    budget_holds(KVT_TYPE_I4);
    budget_holds(KVT_TYPE_I5);
}

/* What the header says of the working memory that checkpoints add. */
static void working_memory_is_as_said(void **state)
{
    static unsigned char blob[3 << 19];
    rng r = {23};
    (void)state;
    for (size_t every = 1; every < 40; every += 19) {
        ledger memory;
        kvt_seq *seq, *loaded;
        uint64_t bound, own, extras;
        size_t held, size = every == 1 ? 10 : sizeof blob, n = 0;
        bytes file;
        subject s;
        ledger_init(&memory);
        make(&s, 20, 0, every == 20 ? KVT_TYPE_I5 : KVT_TYPE_I8, KVT_RESIDUAL_NONE, &r);
        kvt_cache_destroy(s.cache);
        s.ledger = &memory;
        open_cache(&s, NULL);
        seq = seq_of(&s);
        while (kvt_seq_length(seq) < 640) {
            grow(&s, seq, every);
            expect_ok(s.cache, kvt_seq_checkpoint(seq, blob, n++ == 5 ? size : 3));
        }
        expect_ok(NULL, kvt_working_forecast(&s.config, kvt_seq_length(seq), &bound));
        held = memory.peak_bytes = memory.live_bytes;
        file = saved(s.cache, seq, KVT_CODEC_RAW);
        own = 2 * ((kvt_seq_length(seq) + 63) / 64); /* at most */
        extras = get64(file.data + 48);
        assert_true(extras > n);
        assert_true(memory.peak_bytes - held <= bound + 100 * own + 200 * extras + 12 * 8 * n);
        loaded = seq_of(&s);
        expect_ok(s.cache, load_bytes(loaded, file.data, file.n, NULL)); /* what it keeps */
        held = memory.live_bytes;
        expect_ok(s.cache, kvt_seq_clear(loaded));
        expect_ok(s.cache, kvt_cache_trim(s.cache));
        memory.peak_bytes = memory.live_bytes;
        expect_ok(s.cache, load_bytes(loaded, file.data, file.n, NULL));
        assert_true(memory.live_bytes <= held);
        assert_true(memory.peak_bytes - memory.live_bytes <= bound + 150 * extras + 2 * size);
        bytes_free(&file);
        kvt_seq_destroy(loaded);
        kvt_seq_destroy(seq);
        close_subject(&s);
        ledger_close(&memory);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_loaded_sequence_goes_on), cmocka_unit_test(every_pair_of_lengths),
        cmocka_unit_test(checkpoints_of_cut_rows),   cmocka_unit_test(what_leaves_no_trace),
        cmocka_unit_test(blocks_are_there_once),     cmocka_unit_test(load_answers_for_prompts),
        cmocka_unit_test(tags_have_to_be_the_same),  cmocka_unit_test(next_positions_come_back),
        cmocka_unit_test(allocations_fail),          cmocka_unit_test(budgets_hold),
        cmocka_unit_test(working_memory_is_as_said),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
