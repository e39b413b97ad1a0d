/*
 * How ggml's threads run kvtile's tasks.
 *
 * ggml calls a custom operator once on each of its threads, with a barrier behind each node but
 * none inside. So a node does its own: the first thread that comes makes the plan (its tasks and
 * their scratch) while the others wait, all of them draw tasks from a counter, and the last one to
 * find none left runs finish. An operator that was created with one task is called on all threads
 * too, so three nodes, plan, tasks and finish, would need the same care and two barriers more.
 *
 * A layer has two nodes, append and attend: attention needs all of the layer's keys, and the
 * barrier between nodes is what waits for them. attend takes append's output, one unused number, as
 * a source, which is how the graph knows their order.
 */
#include "kvtile_ggml.h"

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct node {
    struct kvt_ggml *g;
    uint32_t layer, n_q_heads, n_kv_heads, k_dim, v_dim;
    bool v_in_k;
    kvt_ggml_options options;
    struct node *next; /* the same layer with other options */
} node;

struct kvt_ggml {
    kvt_cache *cache;
    uint32_t n_layers;
    /*
     * [n_layers] what the operators of graphs point to: a layer with the default options, then
     * those with others, which graphs that were built before go on with. They stay.
     */
    node *nodes;

    /* The pending step. */
    kvt_ggml_item *items;
    kvt_append_plan *appends;      /* [n_items] of the append node that runs */
    kvt_attend_item *attend_items; /* [n_items] */
    size_t n_items, room;          /* 0: no step is pending */
    uint64_t n_tokens;

    /* The node that runs. */
    atomic_int door; /* 0: nobody has come, 1: one makes the plan, 2: tasks can be drawn */
    atomic_size_t next;
    atomic_int left; /* threads that have found no more tasks */
    size_t n_tasks;
    kvt_attend_plan attend;
    void *scratch;
    size_t scratch_bytes;

    atomic_int status; /* the first failure of the step */
    char error[400];
};

/* ---- errors ---- */

/* what: of the caller's own; NULL: the cache's text says it. Once a step: the first one counts. */
static kvt_status fail(kvt_ggml *g, kvt_status status, const char *what)
{
    int none = KVT_OK;
    if (atomic_compare_exchange_strong(&g->status, &none, (int)status)) {
        char text[300] = "";
        if (!what)
            kvt_cache_error(g->cache, text, sizeof text);
        snprintf(g->error, sizeof g->error, "%s: %s", kvt_status_string(status),
                 what ? what : text);
    }
    return status;
}

const char *kvt_ggml_error(const kvt_ggml *g)
{
    return g ? g->error : "no memory, or no cache";
}

/* ---- create, destroy ---- */

kvt_ggml *kvt_ggml_create(kvt_cache *cache, const kvt_config *config)
{
    kvt_ggml *g = cache && config ? calloc(1, sizeof *g) : NULL;
    if (!g)
        return NULL;
    g->cache = cache;
    for (uint32_t i = 0; i < config->n_groups; i++)
        g->n_layers += config->groups[i].n_layers;
    g->nodes = calloc(g->n_layers, sizeof *g->nodes);
    if (!g->nodes) {
        free(g);
        return NULL;
    }
    uint32_t first = 0;
    for (uint32_t i = 0; i < config->n_groups; i++) {
        const kvt_group_config *c = &config->groups[i];
        for (uint32_t j = 0; j < c->n_layers; j++) {
            uint32_t layer = c->layers ? c->layers[j] : first + j;
            g->nodes[layer] = (node){.g = g,
                                     .layer = layer,
                                     .n_q_heads = c->n_q_heads,
                                     .n_kv_heads = c->n_kv_heads,
                                     .k_dim = c->k_dim,
                                     .v_dim = c->v_dim,
                                     .v_in_k = c->flags & KVT_GROUP_V_IN_K};
        }
        first += c->n_layers;
    }
    return g;
}

void kvt_ggml_destroy(kvt_ggml *g)
{
    if (!g)
        return;
    kvt_ggml_abort(g);
    free(g->items);
    free(g->appends);
    free(g->attend_items);
    free(g->scratch);
    for (uint32_t i = 0; i < g->n_layers; i++)
        for (node *n = g->nodes[i].next, *next; n; n = next) {
            next = n->next;
            free(n);
        }
    free(g->nodes);
    free(g);
}

/* ---- steps ---- */

/* The three arrays of a step, for n items. */
static bool make_room(kvt_ggml *g, size_t n)
{
    if (n <= g->room)
        return true;
    kvt_ggml_item *items = calloc(n, sizeof *items);
    kvt_append_plan *appends = calloc(n, sizeof *appends);
    kvt_attend_item *attend_items = calloc(n, sizeof *attend_items);
    if (!items || !appends || !attend_items) {
        free(items);
        free(appends);
        free(attend_items);
        return false;
    }
    free(g->items);
    free(g->appends);
    free(g->attend_items);
    g->items = items;
    g->appends = appends;
    g->attend_items = attend_items;
    g->room = n;
    return true;
}

kvt_status kvt_ggml_begin(kvt_ggml *g, const kvt_ggml_item *items, size_t n_items,
                          const int32_t *positions)
{
    if (!g)
        return KVT_ERR_ARG;
    if (g->n_items) { /* whose graph has a status of its own */
        snprintf(g->error, sizeof g->error, "kvt_ggml_begin: a step is pending");
        return KVT_ERR_STATE;
    }
    g->error[0] = 0;
    atomic_store(&g->status, KVT_OK);
    if (!items || n_items == 0)
        return fail(g, KVT_ERR_ARG, "no items");
    for (size_t i = 0; i < n_items; i++)
        if (!items[i].seq)
            return fail(g, KVT_ERR_ARG, "an item has no sequence");
    if (!make_room(g, n_items))
        return fail(g, KVT_ERR_MEMORY, "no room for the step's items");
    memset(g->attend_items, 0, n_items * sizeof *g->attend_items);
    uint64_t n_tokens = 0;
    for (size_t i = 0; i < n_items; i++) {
        kvt_status status =
            kvt_seq_begin(items[i].seq, items[i].n_tokens, positions ? positions + n_tokens : NULL);
        if (status != KVT_OK) {
            fail(g, status, NULL);
            while (i-- > 0)
                kvt_seq_abort(items[i].seq);
            return status;
        }
        g->items[i] = items[i];
        g->attend_items[i].seq = items[i].seq;
        g->attend_items[i].n_queries = items[i].n_tokens;
        n_tokens += items[i].n_tokens;
    }
    g->n_items = n_items;
    g->n_tokens = n_tokens;
    return KVT_OK;
}

void kvt_ggml_abort(kvt_ggml *g)
{
    for (size_t i = 0; g && i < g->n_items; i++)
        kvt_seq_abort(g->items[i].seq);
    if (g)
        g->n_items = 0;
}

kvt_status kvt_ggml_commit(kvt_ggml *g, const int32_t *token_ids)
{
    if (!g)
        return KVT_ERR_ARG;
    /* All sequences have the step or none: a graph has appended a layer to all of them or failed,
       so that only the first commit can find a layer missing, and the ids are checked here. */
    if (!g->n_items) {
        atomic_store(&g->status, KVT_OK); /* of an earlier step */
        return fail(g, KVT_ERR_STATE, "no step is pending");
    }
    for (uint64_t i = 0; token_ids && i < g->n_tokens; i++)
        if (token_ids[i] < KVT_TOKEN_NONE)
            fail(g, KVT_ERR_ARG, "a token id is below -1");
    kvt_status status = (kvt_status)atomic_load(&g->status);
    const int32_t *ids = token_ids;
    for (size_t i = 0; i < g->n_items && status == KVT_OK; i++) {
        status = kvt_seq_commit(g->items[i].seq, ids);
        if (status != KVT_OK)
            fail(g, status, NULL);
        ids = ids ? ids + g->items[i].n_tokens : NULL;
    }
    if (status != KVT_OK)
        kvt_ggml_abort(g);
    g->n_items = 0;
    return status;
}

/* ---- nodes ---- */

/* What a node does, in the order of the head comment. plan returns how many tasks there are. */
typedef struct work {
    size_t (*plan)(const node *n, struct ggml_tensor *dst, int n_threads);
    void (*task)(kvt_ggml *g, size_t i);
    void (*finish)(kvt_ggml *g, struct ggml_tensor *dst);
} work;

static bool sound(kvt_ggml *g)
{
    return atomic_load(&g->status) == KVT_OK;
}

static void run(const work *w, const node *n, struct ggml_tensor *dst, int n_threads)
{
    kvt_ggml *g = n->g;
    int nobody = 0;
    if (atomic_compare_exchange_strong(&g->door, &nobody, 1)) {
        if (!g->n_items)
            fail(g, KVT_ERR_STATE, "the graph was computed without kvt_ggml_begin");
        g->n_tasks = sound(g) ? w->plan(n, dst, n_threads) : 0;
        atomic_store(&g->door, 2);
    } else {
        for (unsigned spins = 1; atomic_load(&g->door) != 2; spins++)
            if (spins % 1024 == 0)
                sched_yield();
    }
    for (size_t i; (i = atomic_fetch_add(&g->next, 1)) < g->n_tasks;)
        w->task(g, i);
    if (atomic_fetch_add(&g->left, 1) == n_threads - 1) {
        w->finish(g, dst);
        atomic_store(&g->next, 0);
        atomic_store(&g->left, 0);
        atomic_store(&g->door, 0);
    }
}

/* kvtile's view of [dims, n_heads, n_tokens], from this token on. */
static kvt_tensor view(const struct ggml_tensor *t, uint64_t token)
{
    kvt_tensor k;
    k.data = (char *)t->data + token * t->nb[2];
    k.dtype = t->type == GGML_TYPE_F16 ? KVT_F16 : t->type == GGML_TYPE_BF16 ? KVT_BF16 : KVT_F32;
    k.token_stride = (int64_t)t->nb[2];
    k.head_stride = (int64_t)t->nb[1];
    return k;
}

static size_t append_plan(const node *n, struct ggml_tensor *dst, int n_threads)
{
    kvt_ggml *g = n->g;
    uint64_t token = 0;
    size_t n_tasks = 0;
    (void)n_threads;
    if ((uint64_t)dst->src[0]->ne[2] != g->n_tokens) {
        fail(g, KVT_ERR_ARG, "the graph has another number of tokens than the step");
        return 0;
    }
    for (size_t i = 0; i < g->n_items; i++) {
        kvt_tensor k = view(dst->src[0], token), v = {0};
        if (!n->v_in_k)
            v = view(dst->src[1], token);
        kvt_status status = kvt_append_plan_init(&g->appends[i], g->items[i].seq, n->layer, &k,
                                                 !n->v_in_k ? &v : NULL);
        if (status != KVT_OK) {
            fail(g, status, NULL);
            return 0;
        }
        n_tasks += g->appends[i].n_tasks;
        token += g->items[i].n_tokens;
    }
    return n_tasks;
}

static void append_task(kvt_ggml *g, size_t i)
{
    kvt_append_plan *p = g->appends;
    for (; i >= p->n_tasks; p++)
        i -= p->n_tasks;
    kvt_append_task(p, i); /* a failure comes again from finish */
}

static void append_finish(kvt_ggml *g, struct ggml_tensor *dst)
{
    for (size_t i = 0; i < g->n_items && sound(g); i++) {
        kvt_status status = kvt_append_finish(&g->appends[i]);
        if (status != KVT_OK)
            fail(g, status, NULL);
    }
    memset(dst->data, 0, ggml_nbytes(dst));
}

static void append(struct ggml_tensor *dst, int ith, int nth, void *user)
{
    static const work w = {append_plan, append_task, append_finish};
    (void)ith;
    run(&w, user, dst, nth);
}

static size_t attend_plan(const node *n, struct ggml_tensor *dst, int n_threads)
{
    kvt_ggml *g = n->g;
    kvt_attend_args args = kvt_attend_args_init();
    if ((uint64_t)dst->ne[2] != g->n_tokens) {
        fail(g, KVT_ERR_ARG, "the graph has another number of tokens than the step");
        return 0;
    }
    args.layer = n->layer;
    args.flags = n->options.flags | KVT_ATTEND_CAUSAL;
    args.items = g->attend_items;
    args.n_items = g->n_items;
    args.q = view(dst->src[0], 0);
    args.out = view(dst, 0);
    args.scale = n->options.scale;
    args.softcap = n->options.softcap;
    args.sink_logits = n->options.sink_logits;
    args.alibi_slopes = n->options.alibi_slopes;
    args.n_threads = (uint32_t)n_threads;
    kvt_status status = kvt_attend_plan_init(&g->attend, g->cache, &args);
    if (status != KVT_OK) {
        fail(g, status, NULL);
        return 0;
    }
    /* Grows with the contexts, seldom: by half at least. */
    size_t bytes = g->attend.scratch_bytes;
    if (bytes > g->scratch_bytes) {
        bytes = (bytes + bytes / 2 + 63) / 64 * 64;
        free(g->scratch);
        g->scratch = aligned_alloc(64, bytes);
        g->scratch_bytes = g->scratch ? bytes : 0;
        if (!g->scratch) {
            fail(g, KVT_ERR_MEMORY, "no scratch for attention");
            return 0;
        }
    }
    return g->attend.n_tasks;
}

static void attend_task(kvt_ggml *g, size_t i)
{
    kvt_attend_task(&g->attend, g->scratch, i); /* a failure comes again from finish */
}

static void attend_finish(kvt_ggml *g, struct ggml_tensor *dst)
{
    kvt_status status = sound(g) ? kvt_attend_finish(&g->attend, g->scratch) : KVT_OK;
    if (status != KVT_OK)
        fail(g, status, NULL);
    if (sound(g))
        return;
    for (int64_t i = 0; i < ggml_nelements(dst); i++)
        ((float *)dst->data)[i] = NAN;
}

static void attend(struct ggml_tensor *dst, int ith, int nth, void *user)
{
    static const work w = {attend_plan, attend_task, attend_finish};
    (void)ith;
    run(&w, user, dst, nth);
}

/* ---- the graph ---- */

/* [dims, n_heads, n_tokens] with dense rows of a type that kvtile reads. */
static bool fits(const struct ggml_tensor *t, uint32_t dims, uint32_t n_heads, int64_t n_tokens)
{
    return (t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16) &&
           t->nb[0] == ggml_type_size(t->type) && t->ne[0] == (int64_t)dims &&
           t->ne[1] == (int64_t)n_heads && t->ne[2] == n_tokens && t->ne[3] == 1;
}

static bool same_options(const kvt_ggml_options *a, const kvt_ggml_options *b)
{
    return a->flags == b->flags && a->scale == b->scale && a->softcap == b->softcap &&
           a->sink_logits == b->sink_logits && a->alibi_slopes == b->alibi_slopes;
}

/* The layer's node with these options, a new one if need be. */
static node *node_with(kvt_ggml *g, uint32_t layer, const kvt_ggml_options *options)
{
    node *n = &g->nodes[layer], *made;
    for (;; n = n->next) {
        if (same_options(&n->options, options))
            return n;
        if (!n->next)
            break;
    }
    made = malloc(sizeof *made);
    GGML_ASSERT(made);
    *made = g->nodes[layer];
    made->options = *options;
    made->next = NULL;
    n->next = made;
    return made;
}

struct ggml_tensor *kvt_ggml_attention(kvt_ggml *g, struct ggml_context *ctx, uint32_t layer,
                                       struct ggml_tensor *q, struct ggml_tensor *k,
                                       struct ggml_tensor *v, const kvt_ggml_options *options)
{
    static const kvt_ggml_options defaults = {0};
    GGML_ASSERT(g && layer < g->n_layers && q);
    node *n = node_with(g, layer, options ? options : &defaults);
    int64_t n_tokens = q->ne[2];
    GGML_ASSERT(fits(q, n->k_dim, n->n_q_heads, n_tokens));
    GGML_ASSERT(!k || fits(k, n->k_dim, n->n_kv_heads, n_tokens));
    GGML_ASSERT(!v || fits(v, n->v_dim, n->n_kv_heads, n_tokens));
    GGML_ASSERT((v != NULL) == (k != NULL && !n->v_in_k));
    struct ggml_tensor *sources[2] = {q, NULL};
    if (k) {
        struct ggml_tensor *rows[2] = {k, v};
        sources[1] = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, rows, v ? 2 : 1, append,
                                    GGML_N_TASKS_MAX, n);
    }
    return ggml_custom_4d(ctx, GGML_TYPE_F32, n->v_dim, n->n_q_heads, n_tokens, 1, sources,
                          k ? 2 : 1, attend, GGML_N_TASKS_MAX, n);
}
