/*
 * Attention of test_operations.c: each sequence of a batch as its mirror alone, to the bit, and
 * near what attention in double gives.
 */
#include "operations_model.h"

#include <math.h>

typedef struct attention {
    const actor *a;
    uint32_t layer, flags;
    size_t q_row, out_row; /* floats of a query, of all heads */
} attention;

static void attend_all(const attention *t, kvt_cache *cache, const kvt_attend_item *items,
                       size_t n_items, const float *q, float *out, float *lse, int by_plan)
{
    kvt_attend_args args = kvt_attend_args_init();
    args.layer = t->layer;
    args.flags = t->flags;
    args.items = items;
    args.n_items = n_items;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    args.lse = lse;
    args.n_threads = by_plan ? 3 : 0;
    if (by_plan) {
        kvt_attend_plan plan;
        void *scratch;
        must_at(t->a, cache, kvt_attend_plan_init(&plan, cache, &args), "attend plan");
        scratch = aligned_alloc(64, (plan.scratch_bytes + 127) / 64 * 64);
        if (!scratch)
            abort();
        for (size_t i = plan.n_tasks; i-- > 0;)
            must_at(t->a, cache, kvt_attend_task(&plan, scratch, i), "attend task");
        must_at(t->a, cache, kvt_attend_finish(&plan, scratch), "attend finish");
        free(scratch);
    } else {
        must_at(t->a, cache, kvt_attend(cache, &args), "attend");
    }
}

/*
 * One query against attention in double, over the tokens in its sight as they are read back, and
 * over the tokens themselves, keys turned to their positions. Bounds: docs/numerics.md,
 * "Attention".
 */
static void expect_near_reference(const attention *t, const member *m, int32_t position,
                                  const float *q, const float *out)
{
    const actor *a = t->a;
    const uint32_t group = a->w->group_of_layer[t->layer];
    const kvt_group_config *g = &a->w->groups[group];
    size_t n = visible(m, t->layer), ratio = g->n_q_heads / g->n_kv_heads, n_seen = 0;
    size_t sinks = m->forms[group].first ? 64 * sink_rows(a->w, group) : 0;
    size_t there = 64 * m->forms[group].first;
    float *k = rows_of(a->w, m->tokens, n, t->layer, KVT_SIDE_K);
    float *v = rows_of(a->w, m->tokens, n, t->layer, KVT_SIDE_V);
    float *k_read = room(n * row_floats(a->w, t->layer, KVT_SIDE_K) * sizeof *k_read);
    float *v_read = room(n * row_floats(a->w, t->layer, KVT_SIDE_V) * sizeof *v_read);
    kvt_type worst = g->k_type > g->v_type ? g->k_type : g->v_type;
    double scale = 1.0 / (double)sqrtf((float)g->k_dim);
    unsigned char sees[MOST];

    for (int side = 0; side < 2; side++) {
        float *x = side == KVT_SIDE_K ? k_read : v_read;
        size_t row = row_floats(a->w, t->layer, (kvt_side)side);
        kvt_tensor view = kvt_tensor_f32(x), rest = kvt_tensor_f32(x + there * row);
        memset(x, 0, n * row * sizeof *x);
        must(a, kvt_read(m->seq, t->layer, (kvt_side)side, 0, sinks, &view));
        must(a, kvt_read(m->seq, t->layer, (kvt_side)side, there, n - there, &rest));
    }
    turn_rows(a->w, m->tokens, n, t->layer, k);
    turn_rows(a->w, m->tokens, n, t->layer, k_read);
    for (size_t i = 0; i < n; i++) {
        sees[i] = (unsigned char)is_in_sight(a->w, m, t->layer, position, i);
        n_seen += sees[i];
    }
    for (size_t h = 0; h < g->n_q_heads && n_seen; h++) {
        double exact[MAX_DIM], stored[MAX_DIM], dequant, added, difference = 0, norm = 0;
        double largest = 0, small, bound;
        for (size_t i = 0; i < n; i++) {
            double logit = 0, q_norm = 0, k_norm = 0;
            for (size_t d = 0; d < g->k_dim && sees[i]; d++) {
                double x = (double)q[h * g->k_dim + d],
                       y = (double)k[(i * g->n_kv_heads + h / ratio) * g->k_dim + d];
                logit += x * y * scale;
                q_norm += x * x;
                k_norm += y * y;
            }
            if (m->turned) /* rounded angles: the error is of the vectors, not of the product */
                logit = sqrt(q_norm * k_norm) * scale;
            largest = fabs(logit) > largest ? fabs(logit) : largest;
        }
        reference_row(q + h * g->k_dim, k, v, n, g->n_kv_heads, h / ratio, g->k_dim, g->v_dim,
                      scale, 0, sees, NULL, 0, 0, -INFINITY, exact);
        reference_row(q + h * g->k_dim, k_read, v_read, n, g->n_kv_heads, h / ratio, g->k_dim,
                      g->v_dim, scale, 0, sees, NULL, 0, 0, -INFINITY, stored);
        for (size_t d = 0; d < g->v_dim; d++) {
            difference += (stored[d] - exact[d]) * (stored[d] - exact[d]);
            norm += exact[d] * exact[d];
        }
        dequant = sqrt(difference / norm);
        added = relative_l2(out + h * g->v_dim, stored, g->v_dim);
        small = 2e-6 * (1 + largest);
        /* Integer products: q of 14 bits, the logits' error shifts weights. */
        bound = small + (worst < KVT_TYPE_I8 || (t->flags & KVT_ATTEND_F32) ? 0
                         : worst == KVT_TYPE_I8 ? 0.06 * dequant + (1 + largest) / 4000
                                                : 0.3 * dequant + (1 + largest) / 30);
        check(a, t->flags & KVT_ATTEND_FAST || added <= bound);
        check(a, worst != KVT_TYPE_F32 || dequant <= small);
        check(a, worst != KVT_TYPE_F16 || dequant <= 4e-3 * (1 + largest));
        check(a, worst != KVT_TYPE_I8 || dequant <= 0.1 * (1 + largest));
    }
    for (size_t d = 0; d < t->out_row && !n_seen; d++)
        check(a, out[d] == 0);
    free(k);
    free(v);
    free(k_read);
    free(v_read);
}

/* Whether no query sees a token that has been released. */
static int is_in_reach(const attention *t, const member *m, const int32_t *positions, size_t n)
{
    const world *w = t->a->w;
    uint32_t g = w->group_of_layer[t->layer];
    for (size_t i = 64 * sink_rows(w, g); i < 64 * m->forms[g].first; i++)
        for (size_t j = 0; j < n; j++)
            if (is_in_sight(w, m, t->layer, positions[j], i))
                return 0;
    return 1;
}

/* A sequence's item, of up to 3 queries: the last tokens', or at positions of their own. */
enum { QUERIES = 3 };

static int make_item(actor *a, const attention *t, const member *m, kvt_attend_item *item,
                     int32_t *positions)
{
    size_t n_tokens = m->seq ? visible(m, t->layer) : 0, n;
    int given = rng_below(&a->r, 3) == 0;
    if (!n_tokens)
        return 0;
    memset(item, 0, sizeof *item);
    n = n_tokens < QUERIES ? 1 : 1 + rng_below(&a->r, QUERIES);
    item->seq = m->seq;
    item->n_queries = n;
    item->query_positions = given ? positions : NULL;
    for (size_t i = 0; i < n; i++)
        positions[i] = m->tokens[n_tokens - n + i].position + given * (int32_t)rng_below(&a->r, 4);
    return 1;
}

/* Refused, and in the mirror too. */
static void expect_out_of_reach(actor *a, const attention *t, const member *m,
                                const kvt_attend_item *item)
{
    const kvt_group_config *g = &a->w->groups[a->w->group_of_layer[t->layer]];
    float q[QUERIES * 4 * MAX_DIM] = {0}, out[QUERIES * 4 * MAX_DIM];
    kvt_attend_args args = kvt_attend_args_init();
    kvt_attend_item one = *item;
    check(a, g->n_q_heads <= 4);
    args.layer = t->layer;
    args.flags = t->flags;
    args.items = &one;
    args.n_items = 1;
    args.q = kvt_tensor_f32(q);
    args.out = kvt_tensor_f32(out);
    check(a, kvt_attend(a->w->cache, &args) == KVT_ERR_STATE);
    one.seq = m->mirror;
    check(a, kvt_attend(a->mirrors, &args) == KVT_ERR_STATE);
    a->met.refused++;
}

void attend(actor *a, member *m)
{
    static const uint32_t modes[] = {0, 0, KVT_ATTEND_F32, KVT_ATTEND_FAST};
    int32_t positions[SEQS][QUERIES];
    attention t = {a, rng_below(&a->r, a->w->n_layers), modes[rng_below(&a->r, 4)], 0, 0};
    const kvt_group_config *g = &a->w->groups[a->w->group_of_layer[t.layer]];
    kvt_attend_item items[SEQS];
    member *of[SEQS];
    size_t n_items = 0, n = 0, at = 0, calls = calls_of(a->w);
    float *q, *out, *alone, *lse, lse_alone[QUERIES * 4];
    int by_plan = (int)rng_below(&a->r, 2);

    (void)m;
    t.q_row = (size_t)g->n_q_heads * g->k_dim;
    t.out_row = (size_t)g->n_q_heads * g->v_dim;
    if (rng_below(&a->r, 2))
        t.flags |= KVT_ATTEND_CAUSAL;
    for (size_t i = 0; i < SEQS; i++) {
        of[n_items] = &a->members[i];
        if (!make_item(a, &t, of[n_items], &items[n_items], positions[n_items]))
            continue;
        if (is_in_reach(&t, of[n_items], positions[n_items], (size_t)items[n_items].n_queries))
            n += (size_t)items[n_items++].n_queries;
        else
            expect_out_of_reach(a, &t, of[n_items], &items[n_items]);
    }
    if (!n_items)
        return;
    q = rng_normals(&a->r, n * t.q_row);
    for (size_t i = 0; i < n * t.q_row; i++)
        q[i] *= 0.5f;
    out = room(n * t.out_row * sizeof *out);
    alone = room(QUERIES * t.out_row * sizeof *alone);
    lse = room(n * g->n_q_heads * sizeof *lse);
    attend_all(&t, a->w->cache, items, n_items, q, out, lse, by_plan);
    check(a, calls_of(a->w) == calls);
    for (size_t i = 0; i < n_items; i++) {
        size_t queries = (size_t)items[i].n_queries;
        kvt_attend_item item = items[i];
        item.seq = of[i]->mirror;
        attend_all(&t, a->mirrors, &item, 1, q + at * t.q_row, alone, lse_alone, 0);
        check(a, memcmp(alone, out + at * t.out_row, queries * t.out_row * sizeof *out) == 0);
        check(a, memcmp(lse_alone, lse + at * g->n_q_heads, queries * g->n_q_heads * sizeof *lse) ==
                     0);
        at += queries;
        if (rng_below(&a->r, 4) == 0) /* the last query sees all tokens, causal or not */
            expect_near_reference(&t, of[i], positions[i][queries - 1], q + (at - 1) * t.q_row,
                                  out + (at - 1) * t.out_row);
    }
    free(q);
    free(out);
    free(alone);
    free(lse);
}
