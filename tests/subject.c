/*
 * Caches, tokens and steps of tests of whole sequences, and comparisons: see subject.h.
 */
#include "subject.h"

void open_cache(subject *s, const char *isa)
{
    s->config = kvt_config_init();
    s->config.groups = s->groups;
    s->config.n_groups = s->n_groups;
    s->config.max_tokens = MOST;
    s->config.isa = isa;
    s->config.memory_budget_bytes = s->budget;
    s->config.n_threads = pool_threads(s->n_threads);
    if (s->ledger)
        s->config.allocator = ledger_allocator(s->ledger);
    expect_ok(NULL, kvt_cache_create(&s->config, &s->cache));
}

void open_subject(subject *s, const kvt_group_config *groups, uint32_t n_groups, rng *r)
{
    memset(s, 0, sizeof *s);
    memcpy(s->groups, groups, n_groups * sizeof *groups);
    s->n_groups = n_groups;
    for (uint32_t g = 0; g < n_groups; g++) {
        size_t row;
        s->t[g] = tokens_make(r, MOST, &s->groups[g]);
        row = s->t[g].kv_heads * s->t[g].k_dim;
        for (size_t i = 0; i < MOST * row; i++) /* a bias, and now and then an outlier */
            s->t[g].k[i] =
                (s->t[g].k[i] + (float)(i % row % 7)) * (i / row % 97 == 0 ? 100.0f : 1.0f);
        if (s->groups[g].flags & KVT_GROUP_V_IN_K)
            continue;
    }
}

void close_subject(subject *s)
{
    kvt_cache_destroy(s->cache);
    for (uint32_t g = 0; g < s->n_groups; g++)
        tokens_free(&s->t[g]);
}

void append_layers(const subject *s, kvt_seq *seq, size_t first)
{
    uint32_t layer = 0;
    for (uint32_t g = 0; g < s->n_groups; g++)
        for (uint32_t l = 0; l < s->groups[g].n_layers; l++, layer++) {
            const tokens *t = &s->t[g];
            kvt_tensor k = kvt_tensor_f32(t->k + first * t->kv_heads * t->k_dim);
            kvt_tensor v = kvt_tensor_f32(t->v + first * t->kv_heads * t->v_dim);
            int v_in_k = (s->groups[g].flags & KVT_GROUP_V_IN_K) != 0;
            expect_ok(s->cache, kvt_append(seq, layer, &k, v_in_k ? NULL : &v));
        }
}

/* One step of tokens `first` .. of the test's tokens behind what the sequence has. */
void step_of(const subject *s, kvt_seq *seq, size_t first, size_t n)
{
    int32_t ids[MOST];
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)(first + i);
    expect_ok(s->cache, kvt_seq_begin(seq, n, NULL));
    append_layers(s, seq, first);
    expect_ok(s->cache, kvt_seq_commit(seq, ids));
}

void grow(const subject *s, kvt_seq *seq, size_t n)
{
    step_of(s, seq, (size_t)kvt_seq_length(seq), n);
}

kvt_seq *seq_of(const subject *s)
{
    kvt_seq *seq = NULL;
    expect_ok(s->cache, kvt_seq_create(s->cache, &seq));
    return seq;
}

size_t room_of(const subject *s)
{
    kvt_seq *seqs[64];
    size_t n = 0;
    while (n < 64 && kvt_seq_create(s->cache, &seqs[n]) == KVT_OK)
        n++;
    for (size_t i = 0; i < n; i++)
        kvt_seq_destroy(seqs[i]);
    assert_true(n > 0 && n < 64);
    return n;
}

/* ---- comparisons ---- */

uint64_t mix(uint64_t h, const void *data, size_t n)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

/* What attention of the last query gives, on every layer, in every mode. */
uint64_t attend_hash(const subject *s, const kvt_seq *seq)
{
    static const uint32_t modes[] = {0, KVT_ATTEND_F32, KVT_ATTEND_FAST};
    float q[8 * 1024], out[8 * 1024], lse[8];
    uint64_t h = 1;
    uint32_t layer = 0;
    for (size_t i = 0; i < sizeof q / sizeof *q; i++)
        q[i] = (float)(i % 11) * 0.01f - 0.05f;
    for (uint32_t g = 0; g < s->n_groups; g++)
        for (uint32_t l = 0; l < s->groups[g].n_layers; l++, layer++)
            for (size_t mode = 0; mode < 3; mode++) {
                kvt_attend_item item = {.seq = seq, .n_queries = 1};
                kvt_attend_args args = kvt_attend_args_init();
                args.layer = layer;
                args.flags = modes[mode];
                args.items = &item;
                args.n_items = 1;
                args.q = kvt_tensor_f32(q);
                args.out = kvt_tensor_f32(out);
                args.lse = lse;
                expect_ok(s->cache, kvt_attend(s->cache, &args));
                h = mix(h, out, s->groups[g].n_q_heads * s->groups[g].v_dim * sizeof *out);
                h = mix(h, lse, s->groups[g].n_q_heads * sizeof *lse);
            }
    return h;
}

kvt_seq *reloaded(const subject *s, const kvt_seq *seq)
{
    bytes file = saved(s->cache, seq, KVT_CODEC_ZSTD);
    kvt_seq *loaded = seq_of(s);
    unsigned char tag[KVT_MAX_TAG];
    size_t n;
    expect_ok(s->cache, kvt_seq_tag(seq, tag, sizeof tag, &n));
    expect_ok(s->cache, kvt_seq_set_tag(loaded, tag, n));
    expect_ok(s->cache, load_bytes(loaded, file.data, file.n, NULL));
    bytes_free(&file);
    return loaded;
}

uint64_t file_hash(const subject *s, const kvt_seq *seq)
{
    bytes file = saved(s->cache, seq, KVT_CODEC_RAW);
    uint64_t h;
    give_keys(&file);
    h = mix(file.n, file.data, file.n);
    bytes_free(&file);
    return h;
}

void expect_equal(const subject *s, const kvt_seq *a, const kvt_seq *b, const char *what,
                  size_t detail)
{
    if (kvt_seq_length(a) != kvt_seq_length(b) || file_hash(s, a) != file_hash(s, b))
        fail_msg("%s (%zu): the files differ at %u tokens", what, detail,
                 (unsigned)kvt_seq_length(a));
    if (kvt_seq_length(a) && attend_hash(s, a) != attend_hash(s, b))
        fail_msg("%s (%zu): attention differs at %u tokens", what, detail,
                 (unsigned)kvt_seq_length(a));
}
