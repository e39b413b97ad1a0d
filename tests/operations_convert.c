/*
 * Conversions in test_operations.c: the run's file is loaded into a cache of other types, which has
 * had others before, and into one that has just been made. Both sequences have to be the same, to
 * the bit, and go on alike. What a sequence saves in these types is what its mirror does.
 */
#include "operations_model.h"

void some_other_types(world *w, rng *r)
{
    static const kvt_type types[] = {KVT_TYPE_F32, KVT_TYPE_F16, KVT_TYPE_I8, KVT_TYPE_I4,
                                     KVT_TYPE_I5};
    static const uint32_t residuals[] = {0, 0, KVT_RESIDUAL_NONE, 1, 100};
    for (uint32_t g = 0; g < w->n_groups; g++) {
        kvt_group_config *o = &w->other_groups[g];
        *o = w->groups[g];
        o->k_type = types[rng_below(r, 3 + !(o->flags & KVT_GROUP_NO_OFFSET))];
        o->v_type = types[rng_below(r, 5)];
        if (o->flags & KVT_GROUP_V_IN_K) {
            o->k_type = types[rng_below(r, 3)];
            o->v_type = o->k_type;
        }
        o->residual_tokens = residuals[rng_below(r, 5)];
    }
    w->other = w->config;
    w->other.groups = w->other_groups;
    memset(&w->other.allocator, 0, sizeof w->other.allocator);
    w->other.memory_budget_bytes = 0;
}

/* Rows of a sequence of the other types, near those that were appended to the file's. */
static void expect_near_file(const actor *a, const kvt_cache *cache, const kvt_seq *seq)
{
    const world *w = a->w;
    const member *f = &a->filed;
    for (uint32_t l = 0; l < w->n_layers; l++)
        for (int side = 0; side < 2; side++) {
            const uint32_t g = w->group_of_layer[l];
            size_t first = f->forms[g].first * KVT_BLOCK_TOKENS, n = f->length - first;
            float *got = room(n * row_floats(w, l, (kvt_side)side) * sizeof *got);
            kvt_tensor view = kvt_tensor_f32(got);
            must_at(a, cache, kvt_read(seq, l, (kvt_side)side, first, n, &view), "converted");
            expect_near(a, l, (kvt_side)side, &w->other_groups[g], f->tokens + first, n, got);
            free(got);
        }
}

/*
 * Whether what windows have released is what the other types need: row 0, where keys have an offset
 * there and had none.
 */
static int lacks_row_0(const world *w, const member *m)
{
    for (uint32_t g = 0; g < w->n_groups; g++) {
        const kvt_group_config *o = &w->other_groups[g];
        int offset = o->k_type >= KVT_TYPE_I8 && !(o->flags & KVT_GROUP_NO_OFFSET);
        if (m->forms[g].first && o->sink_tokens == 0 && offset != has_offset(w, g))
            return 1;
        for (size_t i = 0; i < m->n_points; i++)
            if (m->points[i].forms[g].first && o->sink_tokens == 0 && offset != has_offset(w, g))
                return 1;
    }
    return 0;
}

/* The same step of both, or truncate, or removal. */
static void go_on(actor *a, kvt_cache *const *caches, kvt_seq *const *seqs)
{
    size_t length = (size_t)kvt_seq_length(seqs[0]), n = rng_below(&a->r, 70) + 1;
    token fed[70];
    kvt_status status;
    switch (rng_below(&a->r, 3)) {
    case 0:
        n = length + n <= MOST ? n : MOST - length;
        some_tokens(a, kvt_seq_next_position(seqs[0]), fed, n);
        for (int i = 0; i < 2 && n; i++)
            step_whole(a, caches[i], seqs[i], fed, n);
        return;
    case 1:
        n = rng_below(&a->r, (uint32_t)length + 1);
        status = kvt_seq_truncate(seqs[0], n);
        check(a, kvt_seq_truncate(seqs[1], n) == status);
        break;
    default:
        n = 64 * rng_below(&a->r, 3);
        status = kvt_seq_remove(seqs[0], n, 64);
        check(a, kvt_seq_remove(seqs[1], n, 64) == status);
        break;
    }
    check(a, status != KVT_ERR_CORRUPT && status != KVT_ERR_MEMORY);
}

/* What is saved in the other types; from a member, or its mirror. */
static bytes save_as_others(const actor *a, const kvt_cache *cache, const kvt_seq *seq,
                            const member *m)
{
    const world *w = a->w;
    kvt_status status;
    kvt_type k_types[GROUPS], v_types[GROUPS];
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    kvt_save_options options = save_options(KVT_CODEC_RAW);
    options.convert = 1;
    options.n_types = w->n_groups;
    options.k_types = k_types;
    options.v_types = v_types;
    for (uint32_t g = 0; g < w->n_groups; g++) {
        k_types[g] = w->other_groups[g].k_type;
        v_types[g] = w->other_groups[g].v_type;
    }
    status = kvt_seq_save_stream(seq, &writer, &options);
    if (status != KVT_ERR_STATE || !lacks_row_0(a->w, m))
        must_at(a, cache, status, "save in other types");
    return b;
}

void convert(actor *a, member *m)
{
    kvt_load_options options = {.struct_size = sizeof options};
    kvt_cache *caches[2] = {a->others, NULL};
    kvt_seq *seqs[2];
    bytes b, same;
    kvt_status status;
    int loaded = 0;
    if (!a->file.n)
        return;
    options.convert = 1;
    must_at(a, NULL, kvt_cache_create(&a->w->other, &caches[1]), "create");
    for (int i = 0; i < 2; i++) {
        seqs[i] = tagged_seq(a, caches[i], a->filed.tag);
        status = load_filed(a, seqs[i], &options, NULL);
        if (status != KVT_ERR_MISMATCH || !lacks_row_0(a->w, &a->filed))
            must_at(a, caches[i], status, "load with convert");
        loaded += status == KVT_OK;
    }
    check(a, loaded != 1);
    if (loaded)
        expect_near_file(a, caches[0], seqs[0]);
    expect_same_file(a, caches[0], seqs[0], caches[1], seqs[1], "converted");
    for (uint32_t i = rng_below(&a->r, 4); i > 0; i--)
        go_on(a, caches, seqs);
    expect_same_file(a, caches[0], seqs[0], caches[1], seqs[1], "gone on");
    kvt_seq_destroy(a->other);
    a->other = seqs[0];
    kvt_seq_destroy(seqs[1]);

    if (m->seq && !m->pending) {
        b = save_as_others(a, a->w->cache, m->seq, m);
        same = save_as_others(a, a->mirrors, m->mirror, m);
        check(a, b.n == same.n && (b.n == 0 || memcmp(b.data, same.data, b.n) == 0));
        bytes_free(&b);
        bytes_free(&same);
    }
    kvt_cache_destroy(caches[1]);
    a->met.converted += loaded == 2;
}
