/*
 * Sliding windows with sinks: the same bits as with a mask that says so over a group without a
 * window, for every kind of positions, options, types, batches, threads and instruction sets.
 */
#include "support.h"

#include <math.h>
#include <stdio.h>

enum { MAX_ITEMS = 3 };

/* How a sequence's positions go. */
typedef enum kind { PLAIN, GAPS, RANDOM, EQUAL, DESCENDING, DRAFTS, FAR_FIRST, N_KINDS } kind;

typedef struct setup {
    kvt_group_config group; /* with its window */
    const char *isa;
    size_t n_items;
    size_t n[MAX_ITEMS], n_q[MAX_ITEMS], pending[MAX_ITEMS], cut[MAX_ITEMS];
    kind kinds[MAX_ITEMS];
    int own_positions, masked, causal, softcap, alibi, sink;
    uint32_t flags, n_threads;
    uint64_t seed;
} setup;

typedef struct item_data {
    tokens t;
    int32_t *positions, *q_positions;
    uint8_t *mask, *all; /* the caller's mask; all that restricts, as a mask */
    size_t stride, all_stride;
} item_data;

static void make_positions(rng *r, kind how, size_t n, int32_t *positions)
{
    for (size_t i = 0; i < n; i++) {
        int32_t at = (int32_t)i;
        switch (how) {
        case PLAIN: positions[i] = at; break;
        case GAPS: positions[i] = (i ? positions[i - 1] : 3) + (rng_below(r, 40) ? 1 : 200); break;
        case RANDOM: positions[i] = (int32_t)rng_below(r, (uint32_t)n); break;
        case EQUAL: positions[i] = 77; break;
        case DESCENDING: positions[i] = (int32_t)n - at; break;
        case DRAFTS: positions[i] = i + 20 < n ? at : (int32_t)n + (int32_t)(i % 5); break;
        case FAR_FIRST: positions[i] = i == 0 ? 1 << 20 : at; break;
        case N_KINDS: break;
        }
    }
}

static int mask_bit(const uint8_t *row, size_t bit)
{
    return row[bit / 8] >> bit % 8 & 1;
}

/* What a query sees, by the header's words. */
static int sees(const setup *s, size_t i, const item_data *d, size_t query, size_t token)
{
    size_t n = s->n[i], n_q = s->n_q[i], mask_tokens = n / 2;
    int64_t position = d->q_positions ? d->q_positions[query] : d->positions[n - n_q + query];
    if (s->masked && token >= n - mask_tokens &&
        !mask_bit(d->mask + query * d->stride, token - (n - mask_tokens)))
        return 0;
    if (!s->masked && s->causal && token > n - n_q + query)
        return 0;
    return token < s->group.sink_tokens ||
           position - d->positions[token] < (int64_t)s->group.window_tokens;
}

/*
 * A sequence of n tokens of one layer; with a window all are pending, since a commit would release
 * what queries far back see. With cut, as many more come first and are dropped.
 */
static kvt_seq *fill(kvt_cache *cache, const setup *s, size_t i, const item_data *d)
{
    kvt_seq *seq = NULL;
    const kvt_group_config *g = &s->group;
    int v_in_k = (g->flags & KVT_GROUP_V_IN_K) != 0;
    size_t done = g->window_tokens ? 0 : s->n[i] - s->pending[i];
    size_t bounds[3] = {done / 3, done, s->n[i]};
    expect_ok(cache, kvt_seq_create(cache, &seq));
    for (size_t j = 0, first = 0; j < 3; first = bounds[j++]) {
        size_t count = bounds[j] - first;
        kvt_tensor k = kvt_tensor_f32(d->t.k + first * g->n_kv_heads * g->k_dim);
        kvt_tensor v = kvt_tensor_f32(d->t.v + first * g->n_kv_heads * g->v_dim);
        if (count == 0)
            continue;
        if (s->cut[i] &&
            j == (g->window_tokens
                      ? 2
                      : 1)) { /* as many as there is room for: they may change the bounds */
            size_t more = s->cut[i] < count ? s->cut[i] : count;
            int32_t far[64] = {1 << 29, 0};
            expect_ok(cache, kvt_seq_begin(seq, more, far));
            expect_ok(cache, kvt_append(seq, 0, &k, v_in_k ? NULL : &v));
            expect_ok(cache, kvt_seq_abort(seq));
        }
        expect_ok(cache, kvt_seq_begin(seq, count, d->positions + first));
        expect_ok(cache, kvt_append(seq, 0, &k, v_in_k ? NULL : &v));
        if (j < 2)
            expect_ok(cache, kvt_seq_commit(seq, NULL));
    }
    return seq;
}

/* By a plan of n_threads threads, all tasks backwards; 0: in one call. */
static kvt_status attend(kvt_cache *cache, kvt_attend_args *args, uint32_t n_threads)
{
    kvt_attend_plan plan;
    kvt_status status;
    void *scratch;
    if (n_threads == 0)
        return kvt_attend(cache, args);
    args->n_threads = n_threads;
    status = kvt_attend_plan_init(&plan, cache, args);
    if (status != KVT_OK)
        return status;
    scratch = aligned_alloc(64, (plan.scratch_bytes + 63) / 64 * 64);
    assert_non_null(scratch);
    for (size_t i = plan.n_tasks; i-- > 0 && status == KVT_OK;)
        status = kvt_attend_task(&plan, scratch, i);
    if (status == KVT_OK)
        status = kvt_attend_finish(&plan, scratch);
    free(scratch);
    return status;
}

/* What a comparison met, so that the test can say that it met everything. */
typedef struct tally {
    int compared, refused, nothing_seen, hidden_blocks;
} tally;

static void compare(const setup *s, tally *met)
{
    rng r = {s->seed};
    const kvt_group_config *g = &s->group;
    kvt_group_config open = *g;
    kvt_cache *caches[2];
    item_data data[MAX_ITEMS] = {0};
    float *out[2], *lse[2], *q;
    float slopes[128], sinks[128];
    size_t queries = 0, n_out, n_lse, most = 0;
    kvt_status status[2];

    open.window_tokens = open.sink_tokens = 0;
    for (size_t i = 0; i < s->n_items; i++) {
        item_data *d = &data[i];
        size_t n = s->n[i], n_q = s->n_q[i];
        d->t = tokens_make(&r, n, g);
        d->positions = malloc(n * sizeof *d->positions);
        make_positions(&r, s->kinds[i], n, d->positions);
        if (s->own_positions) {
            d->q_positions = malloc(n_q * sizeof *d->q_positions);
            for (size_t j = 0; j < n_q; j++)
                d->q_positions[j] =
                    rng_below(&r, 4) ? (int32_t)rng_below(&r, 2 * (uint32_t)n) : 1 << 28;
        }
        d->stride = n / 16 + 2;
        d->mask = malloc(n_q * d->stride);
        for (size_t j = 0; j < n_q * d->stride; j++)
            d->mask[j] = (uint8_t)rng_next(&r);
        d->all_stride = n / 8 + 1;
        d->all = calloc(n_q, d->all_stride);
        for (size_t j = 0; j < n_q; j++) {
            size_t seen = 0;
            for (size_t t = 0; t < n; t++)
                if (sees(s, i, d, j, t)) {
                    d->all[j * d->all_stride + t / 8] |= (uint8_t)(1u << t % 8);
                    seen++;
                }
            met->nothing_seen += seen == 0;
            met->hidden_blocks += seen + 128 < n;
        }
        queries += n_q;
        most = n > most ? n : most;
    }
    n_lse = queries * g->n_q_heads;
    n_out = n_lse * g->v_dim;
    q = rng_normals(&r, n_lse * g->k_dim);
    for (uint32_t h = 0; h < g->n_q_heads; h++) {
        slopes[h] = 0.01f * (float)(h % 9);
        sinks[h] = (float)rng_normal(&r);
    }
    for (int masks = 0; masks < 2; masks++) {
        kvt_attend_item items[MAX_ITEMS] = {0};
        kvt_attend_args args = kvt_attend_args_init();
        kvt_cache *cache = caches[masks] = cache_of(masks ? &open : g, most, 1, s->isa);
        out[masks] = malloc(n_out * sizeof(float));
        lse[masks] = malloc(n_lse * sizeof(float));
        for (size_t i = 0; i < s->n_items; i++) {
            items[i].seq = fill(cache, s, i, &data[i]);
            items[i].n_queries = s->n_q[i];
            items[i].query_positions = data[i].q_positions;
            if (masks) {
                items[i].mask = data[i].all;
                items[i].mask_stride = data[i].all_stride;
                items[i].mask_tokens = s->n[i];
            } else if (s->masked) {
                items[i].mask = data[i].mask;
                items[i].mask_stride = data[i].stride;
                items[i].mask_tokens = s->n[i] / 2;
            }
        }
        args.items = items;
        args.n_items = s->n_items;
        args.q = kvt_tensor_f32(q);
        args.out = kvt_tensor_f32(out[masks]);
        args.lse = lse[masks];
        args.flags = s->flags | (s->causal ? KVT_ATTEND_CAUSAL : 0);
        args.softcap = s->softcap ? 2.5f : 0;
        args.alibi_slopes = s->alibi ? slopes : NULL;
        args.sink_logits = s->sink ? sinks : NULL;
        status[masks] = attend(cache, &args, masks ? 0 : s->n_threads);
        for (size_t i = 0; i < s->n_items; i++)
            kvt_seq_destroy((kvt_seq *)(uintptr_t)items[i].seq);
    }
    if (status[0] != status[1] ||
        (status[0] == KVT_OK && (memcmp(out[0], out[1], n_out * sizeof(float)) != 0 ||
                                 memcmp(lse[0], lse[1], n_lse * sizeof(float)) != 0))) {
        size_t at = 0;
        while (at < n_out && memcmp(&out[0][at], &out[1][at], sizeof(float)) == 0)
            at++;
        fail_msg("isa %s seed %llu status %d/%d: window %u sinks %u, types %d/%d flags %x/%x heads "
                 "%u:%u dims %u:%u, n %zu kind %d queries %zu, items %zu threads %u own %d masked "
                 "%d causal %d: differs at %zu of %zu: %.9g, with a mask %.9g",
                 s->isa, (unsigned long long)s->seed, (int)status[0], (int)status[1],
                 g->window_tokens, g->sink_tokens, (int)g->k_type, (int)g->v_type,
                 (unsigned)g->flags, (unsigned)s->flags, g->n_q_heads, g->n_kv_heads, g->k_dim,
                 g->v_dim, s->n[0], (int)s->kinds[0], s->n_q[0], s->n_items, s->n_threads,
                 s->own_positions, s->masked, s->causal, at, n_out,
                 at < n_out ? (double)out[0][at] : 0.0, at < n_out ? (double)out[1][at] : 0.0);
    }
    met->compared += status[0] == KVT_OK;
    met->refused += status[0] != KVT_OK;
    for (int i = 0; i < 2; i++) {
        free(out[i]), free(lse[i]);
        kvt_cache_destroy(caches[i]);
    }
    for (size_t i = 0; i < s->n_items; i++) {
        tokens_free(&data[i].t);
        free(data[i].positions), free(data[i].q_positions), free(data[i].mask), free(data[i].all);
    }
    free(q);
}

static setup random_setup(rng *r, size_t largest)
{
    static const uint32_t heads[][2] = {{4, 4}, {2, 2}, {8, 2}, {6, 1}, {5, 1}, {33, 1}, {71, 1}};
    static const uint32_t windows[] = {1,   2,   17,   63,   64,   65,         100,
                                       128, 500, 1000, 1024, 1025, UINT32_MAX, 2000};
    static const uint32_t sinks[] = {0, 0, 0, 1, 4, 64, 65, 130, 1030, 100000};
    static const uint32_t modes[] = {0, KVT_ATTEND_F32, KVT_ATTEND_FAST};
    uint32_t h = rng_below(r, 7), dim = 16 * (1 + rng_below(r, 4));
    kvt_type k_type = (kvt_type)rng_below(r, 3), v_type = (kvt_type)rng_below(r, 3);
    int v_in_k = rng_below(r, 4) == 0;
    setup s = {0};
    s.group = group_of(1, heads[h][0], heads[h][1], dim, v_in_k || rng_below(r, 2) ? dim : 32,
                       k_type, v_in_k ? k_type : v_type);
    s.group.flags = (v_in_k ? KVT_GROUP_V_IN_K : 0) | (rng_below(r, 4) ? 0 : KVT_GROUP_NO_OFFSET);
    s.group.window_tokens = windows[rng_below(r, sizeof windows / sizeof *windows)];
    s.group.sink_tokens = sinks[rng_below(r, sizeof sinks / sizeof *sinks)];
    s.group.residual_tokens = rng_below(r, 2) ? KVT_RESIDUAL_NONE : 0;
    s.own_positions = rng_below(r, 3) == 0;
    s.masked = rng_below(r, 4) == 0;
    s.causal = rng_below(r, 3) > 0;
    s.softcap = rng_below(r, 4) == 0;
    s.alibi = rng_below(r, 4) == 0;
    s.sink = rng_below(r, 4) == 0;
    s.flags = modes[rng_below(r, 3)];
    s.n_threads = rng_below(r, 9);
    s.seed = rng_next(r);
    s.n_items = rng_below(r, 3) ? 1 : 1 + rng_below(r, MAX_ITEMS);
    for (size_t i = 0; i < s.n_items; i++) {
        size_t n = 1 + rng_below(r, rng_below(r, 2) ? 300 : (uint32_t)largest), most;
        size_t work = (size_t)s.group.n_q_heads * n;
        most = work > 40000 ? 3 : work > 4000 ? 20 : 70;
        s.n[i] = n;
        s.n_q[i] =
            1 + (rng_below(r, 3) ? rng_below(r, n < most ? (uint32_t)n : (uint32_t)most) : 0);
        s.kinds[i] = rng_below(r, 3) ? PLAIN : (kind)rng_below(r, N_KINDS);
        s.pending[i] = rng_below(r, 2) ? 0 : s.n_q[i];
        s.cut[i] = rng_below(r, 3) ? 0 : 1 + rng_below(r, 64);
    }
    return s;
}

static void same_bits_as_a_mask(void **state)
{
    tally met = {0};
    rng r = {2024};
    (void)state;
    for (uint32_t isa = 0; kvt_isa_name(isa); isa++)
        for (int trial = 0; trial < (is_quick() ? 30 : 400); trial++) {
            setup s = random_setup(&r, is_quick() ? 700 : trial % 8 ? 1500 : 6000);
            s.isa = kvt_isa_name(isa);
            compare(&s, &met);
        }
    printf("%d calls compared, %d refused by both; %d queries see nothing, %d leave out blocks\n",
           met.compared, met.refused, met.nothing_seen, met.hidden_blocks);
    assert_true(met.nothing_seen > 0 && met.hidden_blocks > 0 && met.compared > 10 * met.refused);
}

/* A long causal prefill, whose chunks see different ranges, at every number of threads. */
static void prefill_at_any_number_of_threads(void **state)
{
    tally met = {0};
    (void)state;
    for (uint32_t threads = 0; threads <= 8; threads++)
        for (int sinks = 0; sinks < 2; sinks++) {
            setup s = {.isa = NULL, .n_items = 1, .causal = 1, .n_threads = threads};
            size_t n = is_quick() ? 300 : 2500;
            if (threads % 3 == 2)
                s.causal = 0;
            s.group = group_of(1, 4, 2, 32, 32, KVT_TYPE_I8, KVT_TYPE_I8);
            s.group.window_tokens = is_quick() ? 100 : 700;
            s.group.sink_tokens = sinks ? 4 : 0;
            s.n[0] = n;
            s.n_q[0] = threads % 2 ? n : n / 2;
            s.seed = threads;
            compare(&s, &met);
        }
}

/* ---- single rules ---- */

typedef struct small {
    kvt_cache *cache;
    kvt_seq *seq;
    kvt_attend_item item;
    kvt_attend_args args;
    float q[2 * 16], out[2 * 16], lse[2];
} small;

/* Tokens with keys k[i] and values v[i] in all dims, one head; q is 1 in all dims. */
static void small_make(small *s, uint32_t window, uint32_t sinks, size_t n, const float *k,
                       const float *v)
{
    kvt_group_config g = group_of(1, 1, 1, 16, 16, KVT_TYPE_F32, KVT_TYPE_F32);
    float *keys = malloc(n * 16 * sizeof *keys), *values = malloc(n * 16 * sizeof *values);
    kvt_tensor kt = kvt_tensor_f32(keys), vt = kvt_tensor_f32(values);
    memset(s, 0, sizeof *s);
    g.window_tokens = window;
    g.sink_tokens = sinks;
    s->cache = cache_of(&g, n, 1, NULL);
    for (size_t i = 0; i < n * 16; i++) {
        keys[i] = k ? k[i / 16] : 0;
        values[i] = v[i / 16];
    }
    expect_ok(s->cache, kvt_seq_create(s->cache, &s->seq));
    expect_ok(s->cache, kvt_seq_begin(s->seq, n, NULL));
    expect_ok(s->cache, kvt_append(s->seq, 0, &kt, &vt));
    expect_ok(s->cache, kvt_seq_commit(s->seq, NULL));
    for (size_t i = 0; i < 32; i++)
        s->q[i] = 1;
    s->item.seq = s->seq;
    s->item.n_queries = 1;
    s->args = kvt_attend_args_init();
    s->args.items = &s->item;
    s->args.n_items = 1;
    s->args.q = kvt_tensor_f32(s->q);
    s->args.out = kvt_tensor_f32(s->out);
    s->args.lse = s->lse;
    free(keys), free(values);
}

static void small_free(small *s)
{
    kvt_seq_destroy(s->seq);
    kvt_cache_destroy(s->cache);
}

/* Equal weights: the log-sum-exp tells how many tokens are seen, the output which. */
static void window_counts_the_query_itself(void **state)
{
    float v[300];
    (void)state;
    for (size_t i = 0; i < 300; i++)
        v[i] = (float)i;
    for (uint32_t window = 1; window < 280; window += 1 + window / 5)
        for (uint32_t sinks = 0; sinks < 20; sinks += 4) {
            small s;
            double sum = 0, count = window + sinks;
            small_make(&s, window, sinks, 300, NULL, v);
            for (size_t i = 0; i < sinks; i++)
                sum += (double)i;
            for (size_t i = 300 - window; i < 300; i++)
                sum += (double)i;
            expect_ok(s.cache, kvt_attend(s.cache, &s.args));
            assert_true(fabs((double)s.lse[0] - log(count)) < 1e-5);
            assert_true(fabs((double)s.out[3] - sum / count) < 1e-3);
            small_free(&s);
        }
}

static void nothing_in_sight(void **state)
{
    float v[200], k[200], sink = 0.5f;
    int32_t far = 1000;
    small s;
    (void)state;
    for (size_t i = 0; i < 200; i++)
        v[i] = k[i] = -1;
    small_make(&s, 10, 0, 200, k, v);
    s.item.query_positions = &far;
    s.out[4] = 3;
    expect_ok(s.cache, kvt_attend(s.cache, &s.args));
    for (size_t d = 0; d < 16; d++)
        assert_true(s.out[d] == 0 && !signbit(s.out[d]));
    assert_true(s.lse[0] == -INFINITY);
    s.args.sink_logits = &sink;
    expect_ok(s.cache, kvt_attend(s.cache, &s.args));
    assert_true(s.out[0] == 0 && s.lse[0] == sink);
    s.args.sink_logits = NULL;

    /* Logits of -infinity where something is in sight are an overflow; out of sight nothing is. */
    for (size_t d = 0; d < 16; d++)
        s.q[d] = 3e38f;
    expect_ok(s.cache, kvt_attend(s.cache, &s.args));
    far = 208; /* sees token 199 */
    expect(s.cache, KVT_ERR_VALUE, kvt_attend(s.cache, &s.args));
    far = 209;
    expect_ok(s.cache, kvt_attend(s.cache, &s.args));
    small_free(&s);
    small_make(&s, 10, 1, 200, k, v); /* the sink is in sight */
    for (size_t d = 0; d < 16; d++)
        s.q[d] = 3e38f;
    far = 209;
    s.item.query_positions = &far;
    expect(s.cache, KVT_ERR_VALUE, kvt_attend(s.cache, &s.args));
    small_free(&s);
}

/* ALiBi's bound on the nearest token counts tokens in sight only. */
static void alibi_counts_what_is_in_sight(void **state)
{
    float v[200] = {0}, slope = 100;
    int32_t far = 300;
    small s;
    (void)state;
    small_make(&s, 60, 0, 200, NULL, v); /* sees nothing */
    s.item.query_positions = &far;
    s.args.alibi_slopes = &slope;
    expect_ok(s.cache, kvt_attend(s.cache, &s.args));
    small_free(&s);
    small_make(&s, 102, 0, 200, NULL, v); /* sees token 199, 101 away: a bias of 10100 */
    s.item.query_positions = &far;
    s.args.alibi_slopes = &slope;
    expect(s.cache, KVT_ERR_VALUE, kvt_attend(s.cache, &s.args));
    small_free(&s);
}

static void what_is_refused(void **state)
{
    kvt_group_config g = group_of(1, 1, 1, 16, 16, KVT_TYPE_F32, KVT_TYPE_F32);
    kvt_config config = kvt_config_init();
    kvt_cache *cache = NULL;
    int32_t positions[2] = {0, 0};
    char text[256] = "";
    float v[1] = {2};
    small s;
    (void)state;
    g.sink_tokens = 4;
    config.groups = &g;
    config.n_groups = 1;
    config.max_tokens = 64;
    config.error_text = text;
    config.error_text_bytes = sizeof text;
    expect(NULL, KVT_ERR_ARG, kvt_cache_create(&config, &cache));
    assert_non_null(strstr(text, "sink_tokens"));
    g.window_tokens = 1;
    expect_ok(NULL, kvt_cache_create(&config, &cache));
    kvt_cache_destroy(cache);
    g.reserved = 1;
    expect(NULL, KVT_ERR_ARG, kvt_cache_create(&config, &cache));

    small_make(&s, 5, 0, 1, NULL, v);
    s.item.n_queries = 2; /* no token has the first one's position */
    expect(s.cache, KVT_ERR_ARG, kvt_attend(s.cache, &s.args));
    expect_error_text(s.cache, "window", __FILE__);
    s.item.query_positions = positions;
    expect_ok(s.cache, kvt_attend(s.cache, &s.args));
    assert_true(s.out[0] == 2 && s.out[16] == 2);
    positions[1] = -1;
    expect(s.cache, KVT_ERR_ARG, kvt_attend(s.cache, &s.args));
    small_free(&s);
}

/* A group with a window and one without, in one cache. */
static void groups_have_windows_of_their_own(void **state)
{
    kvt_group_config groups[2];
    kvt_config config = kvt_config_init();
    kvt_cache *cache = NULL;
    kvt_seq *seq = NULL;
    kvt_attend_item item = {.n_queries = 1};
    kvt_attend_args args = kvt_attend_args_init();
    float rows[100 * 16], q[16] = {0}, out[16], lse;
    kvt_tensor t = kvt_tensor_f32(rows);
    (void)state;
    for (size_t i = 0; i < 100 * 16; i++)
        rows[i] = 0;
    groups[0] = groups[1] = group_of(1, 1, 1, 16, 16, KVT_TYPE_I8, KVT_TYPE_I8);
    groups[1].window_tokens = 8;
    config.groups = groups;
    config.n_groups = 2;
    config.max_tokens = 100;
    expect_ok(NULL, kvt_cache_create(&config, &cache));
    expect_ok(cache, kvt_seq_create(cache, &seq));
    expect_ok(cache, kvt_seq_begin(seq, 100, NULL));
    expect_ok(cache, kvt_append(seq, 0, &t, &t));
    expect_ok(cache, kvt_append(seq, 1, &t, &t));
    expect_ok(cache, kvt_seq_commit(seq, NULL));
    item.seq = seq;
    args.items = &item;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    args.lse = &lse;
    expect_ok(cache, kvt_attend(cache, &args));
    assert_true(fabs((double)lse - log(100)) < 1e-5);
    args.layer = 1;
    expect_ok(cache, kvt_attend(cache, &args));
    assert_true(fabs((double)lse - log(8)) < 1e-5);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

/* A loaded sequence has the bounds that attention goes by. */
static void after_a_snapshot(void **state)
{
    char path[64];
    float v[700];
    int32_t far = 640;
    kvt_seq *loaded = NULL;
    small s;
    float lse, out;
    (void)state;
    for (size_t i = 0; i < 700; i++)
        v[i] = (float)i;
    snprintf(path, sizeof path, "window_%llu", (unsigned long long)(uintptr_t)&s % 1000000);
    small_make(&s, 300, 3, 700, NULL, v);
    s.item.query_positions = &far;
    expect_ok(s.cache, kvt_attend(s.cache, &s.args));
    lse = s.lse[0];
    out = s.out[0];
    assert_true(fabs((double)lse - log(362)) < 1e-5); /* 341 to 699, and the sinks */
    expect_ok(s.cache, kvt_seq_save(s.seq, path, NULL));
    expect_ok(s.cache, kvt_seq_create(s.cache, &loaded));
    expect_ok(s.cache, kvt_seq_load(loaded, path, NULL, NULL));
    remove(path);
    s.item.seq = loaded;
    expect_ok(s.cache, kvt_attend(s.cache, &s.args));
    assert_true(s.lse[0] == lse && s.out[0] == out);
    kvt_seq_destroy(loaded);
    small_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(window_counts_the_query_itself),   cmocka_unit_test(nothing_in_sight),
        cmocka_unit_test(alibi_counts_what_is_in_sight),    cmocka_unit_test(what_is_refused),
        cmocka_unit_test(groups_have_windows_of_their_own), cmocka_unit_test(after_a_snapshot),
        cmocka_unit_test(prefill_at_any_number_of_threads), cmocka_unit_test(same_bits_as_a_mask),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
