/*
 * Parts of a sequence, by tokens and by layers, saved and loaded; loads that end where a prompt
 * does; and options that are refused.
 */
#include "snapshot_options.h"

/* K and V of a layer, as one hash; 0: some of it cannot be read. */
static uint64_t rows(const subject *s, const kvt_seq *seq, uint32_t layer, uint64_t first,
                     uint64_t n)
{
    static float x[MOST * 4 * 64];
    uint64_t h = 1;
    const kvt_group_config *g = &s->groups[0];
    if (layer >= g->n_layers)
        g = &s->groups[1];
    for (int side = 0; side < 2; side++) {
        kvt_tensor view = kvt_tensor_f32(x);
        if (kvt_read(seq, layer, side ? KVT_SIDE_V : KVT_SIDE_K, first, n, &view) != KVT_OK)
            return 0;
        h = mix(h, x, (size_t)n * g->n_kv_heads * (side ? g->v_dim : g->k_dim) * sizeof *x);
    }
    return h;
}

static void expect_ids(const subject *s, const kvt_seq *a, uint64_t first, const kvt_seq *b,
                       uint64_t n)
{
    int32_t of_a[MOST], of_b[MOST];
    expect_ok(s->cache, kvt_seq_token_ids(a, first, n, of_a));
    expect_ok(s->cache, kvt_seq_token_ids(b, 0, n, of_b));
    assert_memory_equal(of_a, of_b, n * sizeof *of_a);
    expect_ok(s->cache, kvt_seq_positions(a, first, n, of_a));
    expect_ok(s->cache, kvt_seq_positions(b, 0, n, of_b));
    assert_memory_equal(of_a, of_b, n * sizeof *of_a);
    expect_ok(s->cache, kvt_seq_key_positions(a, first, n, of_a));
    expect_ok(s->cache, kvt_seq_key_positions(b, 0, n, of_b));
    assert_memory_equal(of_a, of_b, n * sizeof *of_a);
}

static uint32_t layers_of(const subject *s)
{
    return s->groups[0].n_layers + (s->n_groups == 2 ? s->groups[1].n_layers : 0);
}

/* ---- tokens ---- */

static void prefixes(void **state)
{
    static const uint64_t lengths[] = {1, 2, 63, 64, 65, 100, 128, 200, 260, 299, 300, 329, 330};
    rng r = {61};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int moved = 0; moved < 2; moved++) {
            subject s;
            kvt_seq *seq;
            int some = 0;
            open_kind(&s, kind, &r);
            seq = full_seq(&s, 400);
            if (moved && kvt_seq_remove(seq, 64, 64) != KVT_OK)
                expect_ok(s.cache, kvt_seq_truncate(seq, kvt_seq_reachable(seq, 335)));
            for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
                kvt_save_options o = saves((uint32_t)i % 3);
                uint64_t n = lengths[i];
                bytes file = {NULL, 0, 0, 0, -1, 0};
                kvt_writer writer = bytes_writer(&file);
                kvt_seq *to = tagged_seq(&s), *copy = NULL;
                kvt_status status, forked;
                o.n_tokens = n;
                status = kvt_seq_save_stream(seq, &writer, &o);
                forked = kvt_seq_fork(seq, n, &copy);
                if (status != KVT_OK) {
                    assert_int_equal(status, KVT_ERR_STATE);
                    expect_error_text(s.cache, "released", "a prefix");
                    assert_true(s.groups[0].window_tokens > 0);
                    assert_int_equal(file.n, 0);
                } else {
                    some++;
                    expect(s.cache, KVT_OK, forked);
                    expect_ok(s.cache, load_bytes(to, file.data, file.n, NULL));
                    assert_int_equal(kvt_seq_length(to), n);
                    expect_ids(&s, seq, 0, to, n);
                    for (uint32_t layer = 0; layer < layers_of(&s); layer++) {
                        uint64_t first = n > 60 ? n - 25 : 0; /* in sight */
                        assert_true(rows(&s, to, layer, first, n - first) != 0);
                        assert_true(rows(&s, to, layer, first, n - first) ==
                                    rows(&s, seq, layer, first, n - first));
                        if (!s.groups[0].window_tokens)
                            assert_true(rows(&s, to, layer, 0, n) == rows(&s, seq, layer, 0, n));
                    }
                    if (kind == F16 || kind == F32)
                        expect_equal(&s, to, copy, "a prefix and a fork", (size_t)n);
                    step_of(&s, to, 600, 70);
                    step_of(&s, copy, 600, 70);
                    if (kind == F16 || kind == F32)
                        expect_equal(&s, to, copy, "a prefix and a fork, later", (size_t)n);
                    (void)attend_hash(&s, to);
                }
                kvt_seq_destroy(copy);
                kvt_seq_destroy(to);
                bytes_free(&file);
            }
            assert_true(some > (s.groups[0].window_tokens ? 1 : 12));
            kvt_seq_destroy(seq);
            close_subject(&s);
        }
}

static void middles(void **state)
{
    rng r = {62};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int moved = 0; moved < 2; moved++) {
            subject s;
            kvt_seq *seq;
            open_kind(&s, kind, &r);
            seq = full_seq(&s, 400);
            if (moved && kvt_seq_remove(seq, 64, 64) != KVT_OK)
                expect_ok(s.cache, kvt_seq_truncate(seq, kvt_seq_reachable(seq, 335)));
            for (uint64_t first = 64; first <= kvt_seq_length(seq); first += 64)
                for (uint64_t part = 0; part < 4; part++) {
                    kvt_save_options o = saves((uint32_t)(first / 64 + part) % 3);
                    uint64_t n = kvt_seq_length(seq) - first;
                    uint64_t less = part * 43 < n ? part * 43 : 0;
                    bytes file = {NULL, 0, 0, 0, -1, 0};
                    kvt_writer writer = bytes_writer(&file);
                    kvt_seq *to = tagged_seq(&s);
                    uint64_t points[9];
                    size_t n_points;
                    kvt_status status;
                    o.first_token = first;
                    o.n_tokens = less ? n - less : 0;
                    n -= less;
                    status = kvt_seq_save_stream(seq, &writer, &o);
                    if (status == KVT_ERR_STATE) {
                        expect_error_text(s.cache, "released", "a part");
                        assert_true(s.groups[0].window_tokens > 0);
                    } else {
                        expect(s.cache, KVT_OK, status);
                        expect_ok(s.cache, load_bytes(to, file.data, file.n, NULL));
                        assert_int_equal(kvt_seq_length(to), n);
                        expect_ids(&s, seq, first, to, n);
                        expect_ok(s.cache, kvt_seq_checkpoints(to, points, 9, &n_points));
                        assert_int_equal(n_points, 0);
                        for (uint32_t layer = 0; n && layer < layers_of(&s); layer++) {
                            uint64_t here = rows(&s, to, layer, 0, n);
                            if (here == 0 || here != rows(&s, seq, layer, first, n))
                                fail_msg("kind %d, tokens from %u: layer %u differs", kind,
                                         (unsigned)first, (unsigned)layer);
                        }
                        step_of(&s, to, 600, 70);
                        for (uint32_t layer = 0; n > 90 && kind == F16 && layer < 3; layer++)
                            assert_true(rows(&s, to, layer, 64, 20) ==
                                        rows(&s, seq, layer, first + 64, 20));
                        (void)attend_hash(&s, to);
                    }
                    kvt_seq_destroy(to);
                    bytes_free(&file);
                }
            kvt_seq_destroy(seq);
            close_subject(&s);
        }
}

/* ---- layers ---- */

/* A cache of some layers of a subject's: so many of each group. */
static subject part_of(const subject *s, uint32_t first, uint32_t second)
{
    subject p = *s;
    p.n_groups = 0;
    for (uint32_t g = 0; g < s->n_groups; g++)
        if (g ? second : first) {
            p.groups[p.n_groups] = s->groups[g];
            p.t[p.n_groups] = s->t[g];
            p.groups[p.n_groups++].n_layers = g ? second : first;
        }
    open_cache(&p, NULL);
    return p;
}

static void some_layers(void **state)
{
    static const struct {
        uint32_t n, layers[5], first, second;
    } parts[] = {
        {1, {0}, 1, 0},    {1, {2}, 1, 0},       {2, {0, 2}, 2, 0},
        {2, {1, 4}, 1, 1}, {3, {0, 2, 3}, 2, 1}, {5, {0, 1, 2, 3, 4}, 3, 2},
        {1, {4}, 0, 1},    {2, {3, 4}, 0, 2},
    };
    rng r = {63};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
            for (uint32_t codec = 0; codec < 3; codec++)
                for (int moved = 0; moved < 2; moved++) {
                    kvt_save_options o = saves(codec);
                    kvt_load_options l = loads();
                    subject s, p;
                    kvt_seq *seq, *of_file, *of_load;
                    open_kind(&s, kind, &r);
                    if (parts[i].second && s.n_groups == 1) {
                        close_subject(&s);
                        continue;
                    }
                    seq = full_seq(&s, 200);
                    if (moved)
                        (void)kvt_seq_remove(seq, 64, 64);
                    p = part_of(&s, parts[i].first, parts[i].second);
                    of_file = tagged_seq(&p);
                    of_load = tagged_seq(&p);
                    expect_ok(s.cache, kvt_seq_save(seq, in_folder("all"), &o));
                    o.layers = parts[i].layers;
                    o.n_layers = parts[i].n;
                    expect_ok(s.cache, kvt_seq_save(seq, in_folder("part"), &o));
                    l.map = codec == KVT_CODEC_RAW ? KVT_MAP_LAZY : KVT_MAP_NONE;
                    expect_ok(p.cache, kvt_seq_load(of_file, in_folder("part"), &l, NULL));
                    l.layers = parts[i].layers;
                    l.n_layers = parts[i].n;
                    expect_ok(p.cache, kvt_seq_load(of_load, in_folder("all"), &l, NULL));
                    l.map = KVT_MAP_NONE;
                    expect_ok(p.cache, kvt_seq_load(of_load, in_folder("all"), &l, NULL));
                    expect_equal(&p, of_file, of_load, "some layers", i);
                    for (uint32_t k = 0; k < parts[i].n; k++) {
                        uint64_t n = kvt_seq_length(seq), first = n - 25;
                        assert_true(rows(&s, seq, parts[i].layers[k], first, 25) ==
                                    rows(&p, of_file, k, first, 25));
                    }
                    step_of(&p, of_file, 600, 100);
                    step_of(&p, of_load, 600, 100);
                    expect_equal(&p, of_file, of_load, "some layers, later", i);
                    if (parts[i].n != layers_of(&s)) {
                        l.layers = NULL, l.n_layers = 0;
                        expect(p.cache, KVT_ERR_MISMATCH,
                               kvt_seq_load(of_file, in_folder("all"), &l, NULL));
                        expect(s.cache, KVT_ERR_MISMATCH,
                               kvt_seq_load(seq, in_folder("part"), &l, NULL));
                    }
                    kvt_seq_destroy(of_file);
                    kvt_seq_destroy(of_load);
                    kvt_cache_destroy(p.cache);
                    kvt_seq_destroy(seq);
                    close_subject(&s);
                }
}

/* All at once: tokens, layers and types, of a delta. */
static void all_at_once(void **state)
{
    static const kvt_type f32[] = {KVT_TYPE_F32, KVT_TYPE_F32};
    static const uint32_t layers[] = {0, 2, 4};
    rng r = {64};
    subject s, p, q;
    kvt_seq *seq, *to, *other;
    kvt_save_options o = saves(KVT_CODEC_RAW);
    kvt_load_options l = loads();
    (void)state;
    open_kind(&s, WINDOW, &r);
    s.groups[0].window_tokens = s.groups[0].sink_tokens = 0;
    kvt_cache_destroy(s.cache);
    open_cache(&s, NULL);
    seq = full_seq(&s, 300);
    o.first_token = 64;
    o.n_tokens = 150;
    o.convert = 1;
    o.k_types = o.v_types = f32;
    o.layers = layers;
    o.n_layers = 3;
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("one"), &o));
    o.parent = in_folder("one");
    o.n_tokens = 200;
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("two"), &o));
    p = s;
    p.groups[0].k_type = p.groups[0].v_type = KVT_TYPE_F32;
    p.groups[1].k_type = p.groups[1].v_type = KVT_TYPE_F32;
    q = part_of(&p, 2, 1);
    to = tagged_seq(&q);
    expect_ok(q.cache, kvt_seq_load(to, in_folder("two"), &l, NULL));
    assert_int_equal(kvt_seq_length(to), 200);
    for (uint32_t k = 0; k < 3; k++)
        assert_true(rows(&s, seq, layers[k], 64, 200) == rows(&q, to, k, 0, 200));
    expect_ids(&s, seq, 64, to, 200);
    other = tagged_seq(&q);
    for (int i = 0; i < 6; i++) { /* subsets of it that do not fit the cache */
        static const uint32_t wrong[6][3] = {{0, 1, 3}, {0, 2, 1}, {1, 2, 3},
                                             {0, 0, 2}, {7, 8, 9}, {2, 1, 0}};
        kvt_status expected =
            wrong[i][1] > wrong[i][0] && wrong[i][2] > wrong[i][1] ? KVT_ERR_MISMATCH : KVT_ERR_ARG;
        l.layers = wrong[i];
        l.n_layers = 3;
        expect(q.cache, expected, kvt_seq_load(other, in_folder("two"), &l, NULL));
        expect_error_text(q.cache, expected == KVT_ERR_ARG ? "ascend" : "snapshot of another model",
                          "a wrong subset");
    }
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("all"), NULL));
    l.convert = 1; /* likewise of the whole file, which is converted on the way */
    for (int i = 0; i < 5; i++) {
        static const uint32_t some[5][3] = {{0, 2, 4}, {1, 2, 3}, {0, 1, 2}, {0, 3, 4}, {2, 3, 9}};
        l.layers = some[i];
        expect(q.cache, i < 2 ? KVT_OK : KVT_ERR_MISMATCH,
               kvt_seq_load(other, in_folder("all"), &l, NULL));
    }
    kvt_seq_destroy(other);
    kvt_seq_destroy(to);
    kvt_cache_destroy(q.cache);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* ---- prompts ---- */

static void prompts(void **state)
{
    static const size_t diverge[] = {0, 1, 63, 64, 65, 150, 299, 300};
    static const size_t lengths[] = {1, 64, 150, 299, 300, 301, 400};
    rng r = {65};
    (void)state;
    for (int kind = 0; kind < KINDS; kind++) {
        subject s;
        kvt_seq *seq;
        open_kind(&s, kind, &r);
        seq = full_seq(&s, 300);
        for (uint32_t codec = 0; codec < 2; codec++) {
            kvt_save_options o = saves(codec);
            expect_ok(s.cache, kvt_seq_save(seq, in_folder("file"), &o));
            for (size_t d = 0; d < sizeof diverge / sizeof *diverge; d += is_quick() ? 3 : 1)
                for (size_t n = 0; n < sizeof lengths / sizeof *lengths; n += is_quick() ? 2 : 1) {
                    int32_t prompt[400];
                    uint64_t equal = diverge[d] < lengths[n] ? diverge[d] : lengths[n], most;
                    kvt_load_options l = loads();
                    kvt_load_result all, result;
                    kvt_seq *to = tagged_seq(&s), *cut = tagged_seq(&s);
                    for (size_t i = 0; i < 400; i++)
                        prompt[i] = (int32_t)(i < diverge[d] ? i : i + 1000);
                    equal = equal < 300 ? equal : 300;
                    most = equal == lengths[n] ? equal - 1 : equal;
                    l.prompt = prompt;
                    l.n_prompt = lengths[n];
                    expect_ok(s.cache, kvt_seq_load(to, in_folder("file"), &l, &all));
                    assert_int_equal(all.n_tokens, 300);
                    assert_int_equal(all.prefix_tokens, equal);
                    assert_int_equal(all.reuse_tokens, kvt_seq_reachable(to, most));
                    if (!s.groups[0].window_tokens)
                        assert_int_equal(all.reuse_tokens, most);
                    for (l.reuse = KVT_REUSE_PREFIX; l.reuse <= KVT_REUSE_CHECKPOINT; l.reuse++)
                        for (l.map = 0; l.map < 3; l.map++) {
                            uint64_t length = l.reuse == KVT_REUSE_PREFIX ? all.reuse_tokens
                                              : all.checkpoint_tokens == UINT64_MAX
                                                  ? 0
                                                  : all.checkpoint_tokens;
                            expect_ok(s.cache, kvt_seq_load(to, in_folder("file"), &l, &result));
                            assert_int_equal(result.n_tokens, length);
                            assert_int_equal(kvt_seq_length(to), length);
                            assert_int_equal(result.prefix_tokens, all.prefix_tokens);
                            assert_int_equal(result.reuse_tokens,
                                             all.reuse_tokens < length ? all.reuse_tokens : length);
                            assert_int_equal(result.checkpoint_tokens, all.checkpoint_tokens);
                            expect_ok(s.cache, kvt_seq_load(cut, in_folder("file"), NULL, NULL));
                            expect_ok(s.cache, kvt_seq_truncate(cut, length));
                            expect_equal(&s, to, cut, "cut by a load", (size_t)length);
                            if (l.map == 1 && d % 3 == 0) {
                                step_of(&s, to, 600, 100);
                                step_of(&s, cut, 600, 100);
                                expect_equal(&s, to, cut, "cut by a load, later", (size_t)length);
                            }
                        }
                    kvt_seq_destroy(to);
                    kvt_seq_destroy(cut);
                }
        }
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

/* What is behind the prompt's end is not staged. */
static void prompts_save_memory(void **state)
{
    kvt_group_config g = group_of(4, 8, 8, 128, 128, KVT_TYPE_F16, KVT_TYPE_F16);
    const size_t row_bytes = (size_t)64 * 4 * 8 * 256 * 2;
    rng r = {66};
    ledger memory;
    subject s;
    kvt_seq *seq;
    int32_t prompt[60];
    (void)state;
    ledger_init(&memory);
    open_subject(&s, &g, 1, &r);
    s.ledger = &memory;
    open_cache(&s, NULL);
    seq = tagged_seq(&s);
    grow(&s, seq, 640);
    for (uint32_t codec = 0; codec < 2; codec++) {
        kvt_save_options o = saves(codec);
        kvt_load_options l = loads();
        kvt_seq *to;
        size_t with[2];
        expect_ok(s.cache, kvt_seq_save(seq, in_folder("file"), &o));
        for (int i = 0; i < 60; i++)
            prompt[i] = i;
        l.prompt = prompt;
        l.n_prompt = 60;
        for (l.reuse = 0; l.reuse < 2; l.reuse++) {
            size_t live;
            expect_ok(s.cache, kvt_cache_trim(s.cache));
            to = tagged_seq(&s);
            live = memory.peak_bytes = memory.live_bytes;
            expect_ok(s.cache, kvt_seq_load(to, in_folder("file"), &l, NULL));
            with[l.reuse] = memory.peak_bytes - live;
            kvt_seq_destroy(to);
        }
        assert_true(with[0] > 10 * row_bytes);
        assert_true(with[1] + 8 * row_bytes < with[0]);
    }
    kvt_seq_destroy(seq);
    close_subject(&s);
    ledger_close(&memory);
}

/* A window of a group that is not saved has released tokens of the range. */
static void windows_elsewhere(void **state)
{
    static const uint32_t without[] = {3, 4}, with[] = {2, 3};
    rng r = {67};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    subject s;
    kvt_seq *seq;
    bytes before, after;
    uint64_t bound;
    (void)state;
    open_kind(&s, WINDOW, &r);
    seq = tagged_seq(&s);
    grow(&s, seq, 100);
    o.layers = without;
    o.n_layers = 2;
    before = save_with(&s, seq, &o);
    grow(&s, seq, 400);
    o.n_tokens = 100;
    after = save_with(&s, seq, &o);
    expect_ok(s.cache, kvt_seq_save_bound(seq, &bound, &o));
    assert_int_equal(bound, after.n);
    assert_int_equal(after.n, before.n);
    assert_memory_equal(after.data, before.data, after.n);
    bytes_free(&after);
    o.first_token = 128;
    after = save_with(&s, seq, &o);
    bytes_free(&after);
    o.layers = with;
    expect(s.cache, KVT_ERR_STATE, kvt_seq_save_bound(seq, &bound, &o));
    expect_error_text(s.cache, "window of group 0 has released tokens from 128 on", "a part");
    o.first_token = 0;
    expect(s.cache, KVT_ERR_STATE, kvt_seq_save_bound(seq, &bound, &o));
    expect_error_text(s.cache, "window of group 0 has released what", "a beginning");
    bytes_free(&before);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* Keys behind the range have moved: the file is that of a sequence of which none has. */
static void moved_elsewhere(void **state)
{
    rng r = {68};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    subject s;
    kvt_seq *seq;
    bytes before, after;
    (void)state;
    open_kind(&s, F16, &r);
    seq = tagged_seq(&s);
    grow(&s, seq, 256);
    o.n_tokens = 130;
    before = save_with(&s, seq, &o);
    expect_ok(s.cache, kvt_seq_remove(seq, 130, 64));
    after = save_with(&s, seq, &o);
    assert_int_equal(after.n, before.n);
    assert_memory_equal(after.data, before.data, after.n);
    bytes_free(&after);
    o.n_tokens = 131;
    after = save_with(&s, seq, &o);
    assert_int_equal(get32(before.data + 44), 0);
    assert_int_equal(get32(after.data + 44), 1);
    bytes_free(&after);
    bytes_free(&before);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/*
 * Nor are blocks of checkpoints behind it. Each of a file's 16 has two open blocks of its own: a
 * load takes little more than of a file that ends at the third. Beside what is kept, a budget for
 * the checkpoints' blocks of the same rows and for the positions of the whole file suffices.
 */
static void prompts_save_checkpoints(void **state)
{
    static const kvt_type types[] = {KVT_TYPE_I8, KVT_TYPE_I4};
    const size_t row_bytes = (size_t)64 * 4 * 8 * 256 * 2; /* open */
    rng r = {67};
    int32_t prompt[MOST];
    (void)state;
    for (int i = 0; i < MOST; i++)
        prompt[i] = i == 70 ? 1 : i; /* another id */
    for (int kind = 0; kind < 2; kind++) {
        kvt_group_config g = group_of(4, 8, 8, 128, 128, types[kind], types[kind]);
        subject s;
        kvt_seq *seq;
        g.residual_tokens = 64;
        open_subject(&s, &g, 1, &r);
        open_cache(&s, NULL);
        seq = tagged_seq(&s);
        grow(&s, seq, 60);
        expect_ok(s.cache, kvt_seq_checkpoint(seq, NULL, 0));
        grow(&s, seq, 20);
        expect_ok(s.cache, kvt_seq_checkpoint(seq, NULL, 0));
        for (int i = 0; i < 14; i++) {
            if (i == 1) {
                kvt_save_options o = saves(KVT_CODEC_RAW);
                expect_ok(s.cache, kvt_seq_save(seq, in_folder("few"), &o));
            }
            grow(&s, seq, 40);
            expect_ok(s.cache, kvt_seq_checkpoint(seq, NULL, 0));
        }
        for (uint32_t codec = 0; codec < 2; codec++) {
            kvt_save_options o = saves(codec);
            expect_ok(s.cache, kvt_seq_save(seq, in_folder("file"), &o));
            for (uint32_t how = 0; how < 4; how++) { /* a prefix or a checkpoint; mapped */
                size_t peak[2];
                uint64_t hash[3], kept = 0;
                for (int file = 0; file < 3; file++) { /* few; all; all, with a budget */
                    kvt_load_options l = loads();
                    kvt_load_result got;
                    ledger memory;
                    subject to = s;
                    kvt_seq *loaded;
                    ledger_init(&memory);
                    to.ledger = &memory;
                    to.budget = file == 2 ? kept + 6 * row_bytes + 16 * 4096 : 0;
                    open_cache(&to, NULL);
                    loaded = tagged_seq(&to);
                    l.prompt = prompt;
                    l.n_prompt = 100;
                    l.reuse = how % 2 ? KVT_REUSE_CHECKPOINT : KVT_REUSE_PREFIX;
                    l.map = how / 2 ? KVT_MAP_VERIFY : KVT_MAP_NONE;
                    memory.peak_bytes = memory.live_bytes;
                    expect_ok(to.cache,
                              kvt_seq_load(loaded, in_folder(file ? "file" : "few"), &l, &got));
                    assert_int_equal(got.n_tokens, how % 2 ? 60 : 70);
                    assert_int_equal(got.checkpoint_tokens, 60);
                    if (file < 2)
                        peak[file] = memory.peak_bytes;
                    expect_ok(to.cache, kvt_cache_trim(to.cache));
                    if (file == 1)
                        kept = kvt_cache_memory_bytes(to.cache);
                    hash[file] = seq_hash(loaded, &g);
                    if (file > 0 && (file == 2 || how % 2)) /* row 0 is open, or sealed */
                        assert_true(hash[file] == hash[file - 1]);
                    kvt_seq_destroy(loaded);
                    kvt_cache_destroy(to.cache);
                    ledger_close(&memory);
                }
                if (codec == KVT_CODEC_RAW)
                    assert_true(peak[1] < peak[0] + 5 * row_bytes);
            }
        }
        kvt_seq_destroy(seq);
        close_subject(&s);
    }
}

/* Layers that are of two groups in the file, and of one in the cache: chosen ones, too. */
static void groups_differ(void **state)
{
    static const uint32_t both[] = {0, 1};
    model m = model_of(1, 1, 16, 16, KVT_TYPE_F16, KVT_TYPE_F16);
    kvt_load_options l = loads();
    kvt_cache *cache;
    kvt_seq *seq;
    bytes file;
    uint64_t hash;
    (void)state;
    m.groups[1] = m.groups[0];
    m.layers[1][0] = 1;
    m.n_groups = 2;
    cache = model_cache(&m);
    seq = model_seq(cache);
    model_append(&m, cache, seq, 70, 70);
    file = saved(cache, seq, KVT_CODEC_RAW);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
    m = model_of(2, 1, 16, 16, KVT_TYPE_F16, KVT_TYPE_F16);
    cache = model_cache(&m);
    seq = model_seq(cache);
    model_append(&m, cache, seq, 5, 5);
    hash = state_hash(&m, cache, seq);
    for (int chosen = 0; chosen < 2; chosen++) {
        l.layers = chosen ? both : NULL;
        l.n_layers = chosen ? 2 : 0;
        expect(cache, KVT_ERR_MISMATCH, kvt_seq_load_memory(seq, file.data, file.n, &l, NULL));
        expect_error_text(cache,
                          chosen ? "1 of its layers are of group 0 of the cache, which has 2"
                                 : "n_groups is 2, the cache's is 1",
                          "two groups");
        assert_true(state_hash(&m, cache, seq) == hash);
    }
    bytes_free(&file);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* ---- options that are refused ---- */

static void refused(void **state)
{
    static const kvt_type types[] = {KVT_TYPE_F16, KVT_TYPE_F16}, none[] = {(kvt_type)77};
    static const kvt_type k5[] = {KVT_TYPE_I5};
    static const uint32_t twice[] = {1, 1}, down[] = {1, 0}, far[] = {0, 3};
    static const int32_t prompt[] = {1, 2};
    static const kvt_snapshot_piece large = {"large", prompt, SIZE_MAX / 4 + 1};
    rng r = {67};
    subject s;
    kvt_seq *seq;
    uint64_t hash, bound = 7;
    size_t n = 7;
    bytes file;
    (void)state;
    open_kind(&s, I8, &r);
    seq = full_seq(&s, 100);
    hash = file_hash(&s, seq);
    file = saved(s.cache, seq, KVT_CODEC_RAW);
    spill(in_folder("file"), file.data, file.n);
    for (int i = 0; i < 29; i++) {
        kvt_save_options o = saves(KVT_CODEC_RAW);
        bytes b = {NULL, 0, 0, 0, -1, 0};
        kvt_writer writer = bytes_writer(&b);
        unsigned char memory[100];
        switch (i) {
        case 0: o.struct_size = 0; break;
        case 1: o.struct_size = sizeof o + 8; break;
        case 2: o.codec = 3; break;
        case 3: o.no_fsync = 2; break;
        case 4: o.in_place = 2; break;
        case 5: o.convert = 2; break;
        case 6: o.zstd_level = -8; break;
        case 7: o.zstd_level = 20; break;
        case 8: o.first_token = 1; break;
        case 9: o.first_token = 128; break;
        case 10: o.n_tokens = 101; break;
        case 11: o.first_token = 64, o.n_tokens = 37; break;
        case 12: o.n_tokens = UINT64_MAX; break;
        case 13: o.layers = twice; break;
        case 14: o.n_layers = 1; break;
        case 15: o.layers = twice, o.n_layers = 2; break;
        case 16: o.layers = down, o.n_layers = 2; break;
        case 17: o.layers = far, o.n_layers = 2; break;
        case 18: o.convert = 1; break;
        case 19: o.k_types = types; break;
        case 20: o.convert = 1, o.v_types = none; break;
        case 21: o.convert = 1, o.k_types = k5; break;
        case 22: o.n_pieces = 1; break;
        case 23: o.convert = 1, o.k_types = types, o.n_types = 2; break;
        case 24: o.reserved = 1; break;
        case 25:
            o.pieces = &large, o.n_pieces = (size_t)UINT32_MAX + (SIZE_MAX > UINT32_MAX);
            break;
        case 26: o.pieces = &large, o.n_pieces = 1; break;
        case 27: o.parent = ""; break;
        default: o.n_types = 5; break;
        }
        expect(s.cache, KVT_ERR_ARG, kvt_seq_save(seq, in_folder("x"), &o));
        expect(s.cache, KVT_ERR_ARG, kvt_seq_save_stream(seq, &writer, &o));
        expect(s.cache, KVT_ERR_ARG, kvt_seq_save_fd(seq, 1, &o));
        expect(s.cache, KVT_ERR_ARG, kvt_seq_save_memory(seq, memory, sizeof memory, &n, &o));
        expect(s.cache, KVT_ERR_ARG, kvt_seq_save_bound(seq, &bound, &o));
        assert_true(n == 7 && bound == 7 && b.n == 0);
        assert_int_not_equal(access(in_folder("x"), F_OK), 0);
    }
    for (int i = 0; i < 11; i++) {
        kvt_load_options l = loads();
        kvt_reader reader = bytes_reader(&file);
        file.at = 0;
        switch (i) {
        case 0: l.struct_size = 3; break;
        case 1: l.struct_size = sizeof l + 8; break;
        case 2: l.n_prompt = 1; break;
        case 3: l.reuse = 3, l.prompt = prompt, l.n_prompt = 2; break;
        case 4: l.map = 3; break;
        case 5: l.convert = 2; break;
        case 6: l.n_layers = 3; break;
        case 7: l.layers = twice; break;
        case 8: l.layers = twice, l.n_layers = 2; break;
        case 9: l.reuse = KVT_REUSE_PREFIX; break;
        default: {
            static const uint32_t three[] = {0, 2, 2};
            l.layers = three, l.n_layers = 3;
        }
        }
        expect(s.cache, KVT_ERR_ARG, kvt_seq_load(seq, in_folder("file"), &l, NULL));
        expect(s.cache, KVT_ERR_ARG, kvt_seq_load_stream(seq, &reader, &l, NULL));
        expect(s.cache, KVT_ERR_ARG, kvt_seq_load_fd(seq, 0, &l, NULL));
        expect(s.cache, KVT_ERR_ARG, kvt_seq_load_memory(seq, file.data, file.n, &l, NULL));
        assert_int_equal(file.at, 0);
    }
    assert_true(file_hash(&s, seq) == hash);
    expect(s.cache, KVT_ERR_ARG, kvt_seq_save_memory(seq, NULL, 9, &n, NULL));
    expect(s.cache, KVT_ERR_ARG, kvt_seq_save_memory(seq, &n, sizeof n, NULL, NULL));
    expect(s.cache, KVT_ERR_ARG, kvt_seq_save_bound(seq, NULL, NULL));
    expect(s.cache, KVT_ERR_ARG, kvt_seq_load_memory(seq, NULL, 9, NULL, NULL));
    assert_int_equal(kvt_seq_save_memory(NULL, &n, sizeof n, &n, NULL), KVT_ERR_ARG);
    assert_int_equal(kvt_seq_save_bound(NULL, &bound, NULL), KVT_ERR_ARG);
    assert_int_equal(kvt_seq_save_fd(NULL, 1, NULL), KVT_ERR_ARG);
    assert_int_equal(kvt_seq_load_fd(NULL, 0, NULL, NULL), KVT_ERR_ARG);
    assert_int_equal(kvt_seq_load_memory(NULL, &n, sizeof n, NULL, NULL), KVT_ERR_ARG);
    expect_ok(s.cache, kvt_seq_begin(seq, 1, NULL)); /* a pending step */
    {
        bytes b = {NULL, 0, 0, 0, -1, 0};
        kvt_writer writer = bytes_writer(&b);
        expect(s.cache, KVT_ERR_STATE, kvt_seq_save(seq, in_folder("x"), NULL));
        expect(s.cache, KVT_ERR_STATE, kvt_seq_save_stream(seq, &writer, NULL));
        expect(s.cache, KVT_ERR_STATE, kvt_seq_save_fd(seq, 1, NULL));
        expect(s.cache, KVT_ERR_STATE, kvt_seq_save_memory(seq, &n, sizeof n, &n, NULL));
        expect(s.cache, KVT_ERR_STATE, kvt_seq_save_bound(seq, &bound, NULL));
        expect(s.cache, KVT_ERR_STATE, kvt_seq_load(seq, in_folder("file"), NULL, NULL));
        expect(s.cache, KVT_ERR_STATE, kvt_seq_load_fd(seq, 0, NULL, NULL));
        expect(s.cache, KVT_ERR_STATE, kvt_seq_load_memory(seq, file.data, file.n, NULL, NULL));
        expect(s.cache, KVT_ERR_STATE, load_bytes(seq, file.data, file.n, NULL));
    }
    expect_ok(s.cache, kvt_seq_abort(seq));
    assert_int_equal(kvt_seq_length(seq), 100);
    bytes_free(&file);
    kvt_seq_destroy(seq);
    close_subject(&s);
}

/* What comes behind a part without block 0, or a conversion, does not depend on steps. */
static void steps_behind_parts(void **state)
{
    static const kvt_type types[][2] = {
        {KVT_TYPE_I8, KVT_TYPE_I8}, {KVT_TYPE_I4, KVT_TYPE_I4}, {KVT_TYPE_I4, KVT_TYPE_I8}};
    static const uint32_t residuals[] = {KVT_RESIDUAL_NONE, 1, 64, 200};
    (void)state;
    for (size_t i = 0; i < 3 * 4 * 2; i++) {
        kvt_group_config g = group_of(1, 2, 1, 16, 16, types[i % 3][0], types[i % 3][1]), other = g;
        const int is_part = i / 12 == 0;
        kvt_save_options o = saves(KVT_CODEC_RAW);
        kvt_load_options l = loads();
        rng r = {i};
        kvt_seq *from, *at_once, *singly;
        uint64_t file;
        subject s, source;
        g.residual_tokens = residuals[i / 3 % 4];
        open_subject(&s, &g, 1, &r);
        open_cache(&s, NULL);
        source = s;
        if (!is_part) {
            other.k_type = other.v_type = KVT_TYPE_F16;
            source.groups[0] = other;
            open_cache(&source, NULL);
        }
        from = seq_of(&source);
        grow(&source, from, 164);
        o.first_token = is_part ? 64 : 0;
        l.convert = !is_part;
        expect_ok(source.cache, kvt_seq_save(from, in_folder("part"), &o));
        at_once = seq_of(&s);
        singly = seq_of(&s);
        expect_ok(s.cache, kvt_seq_load(at_once, in_folder("part"), &l, NULL));
        expect_ok(s.cache, kvt_seq_load(singly, in_folder("part"), &l, NULL));
        step_of(&s, at_once, 200, 300);
        for (size_t t = 0; t < 300; t++)
            step_of(&s, singly, 200 + t, 1);
        file = file_hash(&s, at_once);
        if (file_hash(&s, singly) != file)
            fail_msg("types %d and %d, residual %u, %s", (int)g.k_type, (int)g.v_type,
                     (unsigned)g.residual_tokens, is_part ? "a part" : "converted");
        kvt_seq_destroy(from);
        kvt_seq_destroy(at_once);
        kvt_seq_destroy(singly);
        if (!is_part)
            kvt_cache_destroy(source.cache);
        close_subject(&s);
    }
}

/* A range in the sinks' rows is there, whatever the window has released behind them. */
static void of_the_sinks(void **state)
{
    kvt_group_config g = group_of(1, 2, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8);
    rng r = {77};
    kvt_save_options o = saves(KVT_CODEC_RAW);
    kvt_seq *seq, *to;
    float was[192 * 16], is[128 * 16];
    kvt_tensor a = kvt_tensor_f32(was), b = kvt_tensor_f32(is);
    subject s;
    (void)state;
    g.window_tokens = 100;
    g.sink_tokens = 130; /* three rows */
    open_subject(&s, &g, 1, &r);
    open_cache(&s, NULL);
    seq = seq_of(&s);
    to = seq_of(&s);
    while (kvt_seq_length(seq) < 700)
        grow(&s, seq, 50);
    expect_ok(s.cache, kvt_read(seq, 0, KVT_SIDE_K, 0, 192, &a));
    o.first_token = 64;
    o.n_tokens = 128;
    expect_ok(s.cache, kvt_seq_save(seq, in_folder("sinks"), &o));
    expect_ok(s.cache, kvt_seq_load(to, in_folder("sinks"), NULL, NULL));
    assert_int_equal(kvt_seq_length(to), 128);
    expect_ok(s.cache, kvt_read(to, 0, KVT_SIDE_K, 0, 128, &b));
    assert_memory_equal(is, was + 64 * 16, sizeof is);
    o.n_tokens = 192;
    expect(s.cache, KVT_ERR_STATE, kvt_seq_save(seq, in_folder("sinks"), &o));
    kvt_seq_destroy(seq);
    kvt_seq_destroy(to);
    close_subject(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(prefixes),
        cmocka_unit_test(middles),
        cmocka_unit_test(some_layers),
        cmocka_unit_test(all_at_once),
        cmocka_unit_test(prompts),
        cmocka_unit_test(prompts_save_memory),
        cmocka_unit_test(prompts_save_checkpoints),
        cmocka_unit_test(refused),
        cmocka_unit_test(groups_differ),
        cmocka_unit_test(windows_elsewhere),
        cmocka_unit_test(moved_elsewhere),
        cmocka_unit_test(steps_behind_parts),
        cmocka_unit_test(of_the_sinks),
    };
    RUN_IN_FOLDER(tests);
}
