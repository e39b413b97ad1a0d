/*
 * A damaged file that is verified late, in test_operations.c: whatever is done to the sequence,
 * each number that it shows is its mirror's, which has the sound file, or the call is refused and
 * has changed nothing.
 */
#include "operations_model.h"

/* The two sequences. */
typedef struct pair {
    kvt_cache *caches[2];
    kvt_seq *seqs[2];
    int refused; /* a call has been */
} pair;

static int is_over_budget(const actor *a, kvt_status status)
{
    return status == KVT_ERR_BUDGET && a->w->config.memory_budget_bytes;
}

/* Whether a call on the first sequence has succeeded, so that it has to on its mirror. */
static int goes_well(actor *a, pair *p, kvt_status status, const char *what)
{
    if (status != KVT_ERR_CORRUPT && !is_over_budget(a, status))
        must_at(a, p->caches[0], status, what);
    p->refused |= status == KVT_ERR_CORRUPT;
    return status == KVT_OK;
}

/* All rows that are there of a layer's side. */
static void read_both(actor *a, pair *p, uint32_t layer, kvt_side side)
{
    size_t n = (size_t)kvt_seq_length(p->seqs[0]), row = row_floats(a->w, layer, side), first = 0;
    float *got = room((n + 1) * row * sizeof *got), *same = room((n + 1) * row * sizeof *same);
    kvt_tensor got_view = kvt_tensor_f32(got), same_view = kvt_tensor_f32(same);
    kvt_status status;
    while (first < n && kvt_read(p->seqs[1], layer, side, first, n - first, &same_view) != KVT_OK)
        first += KVT_BLOCK_TOKENS; /* a window has released some */
    check(a, first <= n);
    must_mirror(a, kvt_read(p->seqs[1], layer, side, first, n - first, &same_view));
    status = kvt_read(p->seqs[0], layer, side, first, n - first, &got_view);
    if (goes_well(a, p, status, "read"))
        check(a, memcmp(got, same, (n - first) * row * sizeof *got) == 0);
    free(got);
    free(same);
}

/* A query behind the last token. */
static void attend_both(actor *a, pair *p, uint32_t layer)
{
    const kvt_group_config *g = &a->w->groups[a->w->group_of_layer[layer]];
    float *q = rng_normals(&a->r, (size_t)g->n_q_heads * g->k_dim);
    size_t row = (size_t)g->n_q_heads * g->v_dim * sizeof(float);
    float *out[2] = {room(row), room(row)};
    kvt_status status[2];
    int32_t position = kvt_seq_next_position(p->seqs[0]);
    for (int i = 0; i < 2; i++) {
        kvt_attend_args args = kvt_attend_args_init();
        kvt_attend_item item;
        memset(&item, 0, sizeof item);
        item.seq = p->seqs[i];
        item.n_queries = 1;
        item.query_positions = &position;
        args.layer = layer;
        args.items = &item;
        args.n_items = 1;
        args.q = kvt_tensor_f32(q);
        args.out = kvt_tensor_f32(out[i]);
        status[i] = kvt_attend(p->caches[i], &args);
    }
    if (status[1] == KVT_OK && goes_well(a, p, status[0], "attend"))
        check(a, memcmp(out[0], out[1], row) == 0);
    check(a, status[1] == KVT_OK || status[0] == status[1] || status[0] == KVT_ERR_CORRUPT);
    free(q);
    free(out[0]);
    free(out[1]);
}

static void save_both(actor *a, pair *p)
{
    bytes b = {NULL, 0, 0, 0, -1, 0}, same;
    kvt_writer writer = bytes_writer(&b);
    kvt_save_options options = save_options(KVT_CODEC_RAW);
    if (goes_well(a, p, kvt_seq_save_stream(p->seqs[0], &writer, &options), "save")) {
        same = save_raw(a, p->caches[1], p->seqs[1]);
        check(a, same.n == b.n && memcmp(same.data, b.data, b.n) == 0);
        bytes_free(&same);
    }
    bytes_free(&b);
}

/* Both are forks of themselves at n tokens, without a step. */
static void fork_both(actor *a, pair *p, size_t n)
{
    kvt_seq *copies[2] = {NULL, NULL};
    if (!goes_well(a, p, kvt_seq_fork(p->seqs[0], n, &copies[0]), "fork")) {
        must(a, kvt_seq_abort(p->seqs[0]));
        must_mirror(a, kvt_seq_abort(p->seqs[1]));
        return;
    }
    must_mirror(a, kvt_seq_fork(p->seqs[1], n, &copies[1]));
    for (int i = 0; i < 2; i++) {
        kvt_seq_destroy(p->seqs[i]);
        p->seqs[i] = copies[i];
    }
}

/* A step, at whose begin or end, or amid which, they may be forked at n tokens. */
static void step_both(actor *a, pair *p, size_t n)
{
    token fed[70];
    size_t n_fed = 1 + rng_below(&a->r, 70), length = (size_t)kvt_seq_length(p->seqs[0]);
    int32_t next = kvt_seq_next_position(p->seqs[0]), positions[70];
    uint32_t forks = rng_below(&a->r, 4);
    if (length + n_fed > MOST)
        return;
    some_tokens(a, next, fed, n_fed);
    for (size_t i = 0; i < n_fed; i++)
        positions[i] = fed[i].position;
    if (!goes_well(a, p, kvt_seq_begin(p->seqs[0], n_fed, positions), "begin")) {
        check(a, kvt_seq_pending(p->seqs[0]) == 0);
        return;
    }
    begin_step(a, p->caches[1], p->seqs[1], fed, n_fed);
    if (forks == 0) {
        fork_both(a, p, n);
        return;
    }
    for (int i = 0; i < 2; i++)
        for (uint32_t l = 0; l < a->w->n_layers; l++)
            append_layer(a, p->caches[i], p->seqs[i], fed, n_fed, l, 0);
    for (uint32_t l = 0; l < a->w->n_layers; l++)
        attend_both(a, p, l);
    if (forks == 1) {
        fork_both(a, p, n);
        return;
    }
    for (int i = 0; i < 2; i++)
        commit_step(a, p->caches[i], p->seqs[i], fed, n_fed);
}

static void act_on_both(actor *a, pair *p)
{
    size_t length = (size_t)kvt_seq_length(p->seqs[0]);
    size_t n = (size_t)kvt_seq_reachable(p->seqs[0], rng_below(&a->r, (uint32_t)length + 1));
    size_t first = 64 * rng_below(&a->r, 4);
    kvt_status status;
    check(a, n == kvt_seq_reachable(p->seqs[1], n));
    switch (rng_below(&a->r, 8)) {
    case 0:
    case 1:
    case 2: step_both(a, p, n); break;
    case 3:
        must(a, kvt_seq_truncate(p->seqs[0], n));
        must_mirror(a, kvt_seq_truncate(p->seqs[1], n));
        break;
    case 4: fork_both(a, p, n); break;
    case 5:
        status = kvt_seq_checkpoint(p->seqs[0], NULL, 0);
        if (goes_well(a, p, status, "checkpoint"))
            must_mirror(a, kvt_seq_checkpoint(p->seqs[1], NULL, 0));
        break;
    case 6:
        status = kvt_seq_remove(p->seqs[0], first, 64);
        if (status != KVT_ERR_CORRUPT && !is_over_budget(a, status))
            check(a, kvt_seq_remove(p->seqs[1], first, 64) == status);
        p->refused |= status == KVT_ERR_CORRUPT;
        break;
    default: save_both(a, p); break;
    }
}

int load_late(actor *a, const char *path)
{
    kvt_load_options options = {.struct_size = sizeof options};
    pair p = {{a->w->cache, a->mirrors}, {NULL, NULL}, 0};
    char text[32];
    size_t n = tag_of(a->filed.tag, text);
    int loaded;
    options.map = KVT_MAP_LAZY;
    if (kvt_seq_create(a->w->cache, &p.seqs[0]) != KVT_OK)
        return 1;
    must(a, kvt_seq_set_tag(p.seqs[0], text, n));
    loaded = kvt_seq_load(p.seqs[0], path, &options, NULL) == KVT_OK;
    if (loaded) {
        options.map = KVT_MAP_NONE;
        p.seqs[1] = tagged_seq(a, a->mirrors, a->filed.tag);
        must_mirror(a, load_filed(a, p.seqs[1], &options, NULL));
        for (uint32_t i = rng_below(&a->r, 10); i > 0; i--)
            act_on_both(a, &p);
        for (uint32_t l = 0; l < a->w->n_layers; l++) {
            read_both(a, &p, l, KVT_SIDE_K);
            read_both(a, &p, l, KVT_SIDE_V);
            attend_both(a, &p, l);
        }
        a->met.late += (size_t)p.refused;
        kvt_seq_destroy(p.seqs[1]);
    }
    kvt_seq_destroy(p.seqs[0]);
    return loaded;
}
