/*
 * kvtile diff: what differs between two snapshots. Both are loaded, and compared by what a program
 * can see of them: the tokens, and the keys and values as they are read back. How a file stores
 * them (codec, which blocks are open) is not compared.
 *
 * Checkpoints come last, the deepest first: the sequences are truncated to each, which drops it,
 * and what it may have besides the sequence's keys and values is compared: in groups with a window
 * all that is there, in others the rows of 64 tokens that may be open.
 */
#include "diff.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PART_TOKENS 16384u
#define PART_FLOATS 1048576u /* of either file, that are compared at a time: a token at least */

static int fail_read(const diff *d, const tool_source *s, kvt_status status)
{
    char text[TOOL_TEXT] = "";

    (void)kvt_cache_error(s->cache, text, sizeof text);
    return tool_fail(d->o, s->path, status, "%s", *text ? text : kvt_status_string(status));
}

static int same_bytes(const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    return a_bytes == b_bytes && (a_bytes == 0 || memcmp(a, b, a_bytes) == 0);
}

static void compare_heads(diff *d)
{
    const kvt_snapshot_info *a = &d->a.info, *b = &d->b.info;
    uint32_t layer;

    d->fingerprint =
        same_bytes(a->fingerprint, a->fingerprint_bytes, b->fingerprint, b->fingerprint_bytes);
    d->tag = same_bytes(a->tag, a->tag_bytes, b->tag, b->tag_bytes);
    d->next_position = a->next_position == b->next_position;
    d->geometry = d->a.info.n_layers == d->b.info.n_layers;
    d->types = 1;
    for (layer = 0; layer < d->n_layers; layer++) {
        const kvt_snapshot_group *x = &a->groups[d->a.info.layer_groups[layer]];
        const kvt_snapshot_group *y = &b->groups[d->b.info.layer_groups[layer]];
        if (x->n_q_heads != y->n_q_heads || x->n_kv_heads != y->n_kv_heads ||
            x->k_dim != y->k_dim || x->v_dim != y->v_dim || x->window_tokens != y->window_tokens ||
            x->sink_tokens != y->sink_tokens)
            d->geometry = 0;
        if (x->k_type != y->k_type || x->v_type != y->v_type || x->flags != y->flags ||
            x->rotation_seed != y->rotation_seed)
            d->types = 0;
    }
}

/* The blob of a checkpoint, from malloc; NULL: no memory. */
static void *blob_of(const kvt_seq *seq, uint64_t tokens, size_t *bytes)
{
    void *blob = NULL;

    if (kvt_seq_checkpoint_read(seq, tokens, NULL, 0, bytes) == KVT_OK)
        blob = malloc(*bytes + 1);
    if (blob && kvt_seq_checkpoint_read(seq, tokens, blob, *bytes, bytes) != KVT_OK) {
        free(blob);
        blob = NULL;
    }
    return blob;
}

/* Where they are, and their blobs. */
static kvt_status list_points(diff *d)
{
    size_t n[2], i, bytes[2];
    uint64_t *at[2] = {NULL, NULL};
    kvt_status status = kvt_seq_checkpoints(d->a.seq, NULL, 0, &n[0]);

    if (status == KVT_OK)
        status = kvt_seq_checkpoints(d->b.seq, NULL, 0, &n[1]);
    if (status != KVT_OK || n[0] != n[1])
        return status;
    at[0] = malloc((n[0] + 1) * sizeof *at[0]);
    at[1] = malloc((n[0] + 1) * sizeof *at[1]);
    d->points = calloc(n[0] + 1, sizeof *d->points);
    if (!at[0] || !at[1] || !d->points ||
        kvt_seq_checkpoints(d->a.seq, at[0], n[0], &n[0]) != KVT_OK ||
        kvt_seq_checkpoints(d->b.seq, at[1], n[0], &n[1]) != KVT_OK)
        status = KVT_ERR_MEMORY;
    if (status == KVT_OK)
        d->lengths = memcmp(at[0], at[1], n[0] * sizeof *at[0]) == 0;
    for (i = 0; i < n[0] && status == KVT_OK && d->lengths; i++) {
        point *p = &d->points[d->n_points++];
        void *a = blob_of(d->a.seq, at[0][i], &bytes[0]);
        void *b = blob_of(d->b.seq, at[0][i], &bytes[1]);
        p->tokens = at[0][i];
        p->next_position = p->rows = 1; /* until compare_points */
        if (!a || !b)
            status = KVT_ERR_MEMORY;
        else
            p->blob = same_bytes(a, bytes[0], b, bytes[1]);
        free(a);
        free(b);
    }
    free(at[0]);
    free(at[1]);
    return status;
}

typedef kvt_status (*ints_call)(const kvt_seq *seq, uint64_t first, uint64_t n, int32_t *to);

/* How many of the first n ints are equal. */
static kvt_status count_equal(const diff *d, ints_call call, uint64_t n, uint64_t *equal)
{
    int32_t *part = malloc(2 * sizeof *part * PART_TOKENS);
    uint64_t at = 0, i = 0, here = 0;
    kvt_status status = part ? KVT_OK : KVT_ERR_MEMORY;

    while (status == KVT_OK && i == here && at < n) {
        here = n - at < PART_TOKENS ? n - at : PART_TOKENS;
        status = call(d->a.seq, at, here, part);
        if (status == KVT_OK)
            status = call(d->b.seq, at, here, part + PART_TOKENS);
        for (i = 0; status == KVT_OK && i < here && part[i] == part[PART_TOKENS + i]; i++)
            continue;
        at += i;
    }
    free(part);
    *equal = at;
    return status;
}

static kvt_status compare_tokens(diff *d)
{
    uint64_t of_keys = 0;
    kvt_status status = count_equal(d, kvt_seq_token_ids, d->n, &d->ids);

    if (status == KVT_OK)
        status = count_equal(d, kvt_seq_positions, d->n, &d->positions);
    if (status == KVT_OK)
        status = count_equal(d, kvt_seq_key_positions, d->positions, &of_keys);
    d->positions = of_keys;
    return status;
}

/* The largest difference of two elements; 0 and -0 are equal. */
static double distance(const float *x, const float *y, size_t n)
{
    double most = 0;
    size_t i;

    if (memcmp(x, y, n * sizeof *x) != 0)
        for (i = 0; i < n; i++)
            most = fmax(most, fabs((double)x[i] - (double)y[i]));
    return most;
}

static void compare_part(const diff *d, rows *r, uint64_t first, uint64_t n, size_t row)
{
    uint64_t t;

    for (t = first; t < first + n; t++) {
        size_t at = (size_t)(t - first) * row;
        double far = distance(d->part[0] + at, d->part[1] + at, row);
        if (far == 0)
            continue;
        if (r->tokens == 0 || t / KVT_BLOCK_TOKENS != r->last_block)
            r->blocks++;
        r->last_block = t / KVT_BLOCK_TOKENS;
        if (r->tokens++ == 0)
            r->first = t;
        r->largest = fmax(r->largest, far);
    }
}

/* Tokens first .. end - 1 of a side whose shapes are equal; done goes up by them. */
static int compare_range(diff *d, rows *r, uint32_t layer, kvt_side side, uint64_t first,
                         uint64_t end, uint64_t *done, uint64_t total)
{
    size_t row = (size_t)source_heads(&d->a, layer) * source_dims(&d->a, layer, side);
    uint64_t step = PART_FLOATS / row, at, n;
    kvt_tensor to[2];

    /* Parts within a block, whose rows are released together. */
    step = step < KVT_BLOCK_TOKENS ? 1 : KVT_BLOCK_TOKENS;
    to[0] = kvt_tensor_f32(d->part[0]);
    to[1] = kvt_tensor_f32(d->part[1]);
    for (at = first; at < end; at += n) {
        kvt_status a, b;
        n = end - at < step ? end - at : step;
        a = kvt_read(d->a.seq, layer, side, at, n, &to[0]);
        b = kvt_read(d->b.seq, layer, side, at, n, &to[1]);
        if (a != KVT_OK && a != KVT_ERR_STATE)
            return fail_read(d, &d->a, a);
        if (b != KVT_OK && b != KVT_ERR_STATE)
            return fail_read(d, &d->b, b);
        if (a != b)
            r->missing += n;
        else if (a == KVT_OK)
            compare_part(d, r, at, n, row);
        *done += n;
        (void)progress_step(NULL, *done, total);
    }
    return SOUND;
}

static int compare_rows(diff *d, uint32_t layer, kvt_side side, uint64_t *done, uint64_t total)
{
    rows *r = &d->layers[layer][side];

    r->compared = source_heads(&d->a, layer) == source_heads(&d->b, layer) &&
                  source_dims(&d->a, layer, side) == source_dims(&d->b, layer, side);
    return r->compared ? compare_range(d, r, layer, side, 0, d->n, done, total) : SOUND;
}

/*
 * How many blocks of 64 tokens may be open, of groups without a window: a bound, from what the
 * cache holds for the sequence and its checkpoints. Sealed blocks are the sequence's own; the last
 * one may be cut.
 */
static uint64_t open_blocks(const tool_source *s)
{
    uint64_t all = (kvt_seq_length(s->seq) + KVT_BLOCK_TOKENS - 1) / KVT_BLOCK_TOKENS, n;
    kvt_cache_stats stats;
    uint32_t g;

    memset(&stats, 0, sizeof stats);
    stats.struct_size = sizeof stats;
    if (kvt_cache_get_stats(s->cache, &stats) != KVT_OK)
        return UINT64_MAX / KVT_BLOCK_TOKENS;
    n = stats.blocks_used - stats.blocks_sealed;
    for (g = 0; g < s->info.n_groups; g++) { /* without open blocks, but not counted as sealed */
        const kvt_snapshot_group *group = &s->info.groups[g];
        if (group->k_type < KVT_TYPE_I8 && group->v_type < KVT_TYPE_I8 && group->window_tokens == 0)
            n = n > all ? n - all : 0;
    }
    return n + 1;
}

/* At a checkpoint: where the tokens are that are compared. */
typedef struct reach {
    uint64_t gone[KVT_MAX_GROUPS], there[KVT_MAX_GROUPS]; /* of groups with a window, released */
    uint64_t open;                                        /* in the others: from here on */
} reach;

static kvt_status find_reach(const tool_source *s, reach *r)
{
    uint64_t n = kvt_seq_length(s->seq), open = open_blocks(s) * KVT_BLOCK_TOKENS;
    kvt_status status = KVT_OK;
    uint32_t g;

    r->open = n > open ? (n - open) / KVT_BLOCK_TOKENS * KVT_BLOCK_TOKENS : 0;
    for (g = 0; g < s->info.n_groups && status == KVT_OK; g++)
        status = source_released(s, g, &r->gone[g], &r->there[g]);
    return status;
}

/* A layer at the checkpoint that both sequences are truncated to. */
static int compare_point_layer(diff *d, point *p, uint32_t layer, const reach *a, const reach *b)
{
    uint32_t x = d->a.info.layer_groups[layer], y = d->b.info.layer_groups[layer];
    uint64_t end = a->gone[x], begin = a->there[x], done = 0;
    int side, code = SOUND;
    rows r;

    memset(&r, 0, sizeof r);
    r.compared = end == b->gone[y] && begin == b->there[y];
    if (d->a.info.groups[x].window_tokens == 0)
        begin = a->open < b->open ? a->open : b->open;
    for (side = 0; side < 2 && r.compared && code == SOUND; side++) {
        code = compare_range(d, &r, layer, (kvt_side)side, 0, end, &done, 0);
        if (code == SOUND)
            code = compare_range(d, &r, layer, (kvt_side)side, begin, p->tokens, &done, 0);
    }
    p->rows = !diff_rows(&r);
    return code;
}

/* The sequences are as long as the first checkpoint afterwards. */
static int compare_points(diff *d)
{
    size_t i;
    uint32_t layer;
    kvt_status status;
    reach a, b;
    int code = SOUND;

    if (!d->lengths || !d->geometry || d->n_points == 0)
        return SOUND;
    progress_begin(d->o, d->a.path, "comparing checkpoints");
    for (i = d->n_points; i-- > 0 && code == SOUND;) {
        point *p = &d->points[i];
        status = kvt_seq_truncate(d->a.seq, p->tokens);
        if (status == KVT_OK)
            status = find_reach(&d->a, &a);
        if (status != KVT_OK)
            return fail_read(d, &d->a, status);
        status = kvt_seq_truncate(d->b.seq, p->tokens);
        if (status == KVT_OK)
            status = find_reach(&d->b, &b);
        if (status != KVT_OK)
            return fail_read(d, &d->b, status);
        p->next[0] = kvt_seq_next_position(d->a.seq);
        p->next[1] = kvt_seq_next_position(d->b.seq);
        p->next_position = p->next[0] == p->next[1];
        for (layer = 0; layer < d->n_layers && p->rows && code == SOUND; layer++)
            code = compare_point_layer(d, p, layer, &a, &b);
        (void)progress_step(NULL, d->n_points - i, d->n_points);
    }
    if (code == SOUND)
        progress_end();
    return code;
}

static int compare(diff *d)
{
    const uint64_t total = d->n * d->n_layers * 2;
    uint64_t done = 0;
    uint32_t layer;
    kvt_status status;
    int code = SOUND;

    compare_heads(d);
    status = list_points(d);
    if (status == KVT_OK)
        status = compare_tokens(d);
    if (status != KVT_OK)
        return fail_read(d, &d->a, status);
    progress_begin(d->o, d->a.path, "comparing");
    for (layer = 0; layer < d->n_layers && code == SOUND; layer++) {
        code = compare_rows(d, layer, KVT_SIDE_K, &done, total);
        if (code == SOUND)
            code = compare_rows(d, layer, KVT_SIDE_V, &done, total);
    }
    if (code == SOUND)
        progress_end();
    return code == SOUND ? compare_points(d) : code;
}

static int allocate(diff *d)
{
    d->n_layers = d->a.info.n_layers < d->b.info.n_layers ? d->a.info.n_layers : d->b.info.n_layers;
    d->n = d->a.info.n_tokens < d->b.info.n_tokens ? d->a.info.n_tokens : d->b.info.n_tokens;
    d->layers = calloc(d->n_layers, sizeof *d->layers);
    d->part[0] = malloc(PART_FLOATS * sizeof(float));
    d->part[1] = malloc(PART_FLOATS * sizeof(float));
    if (!d->layers || !d->part[0] || !d->part[1])
        return tool_fail(d->o, d->a.path, KVT_ERR_MEMORY, "no memory");
    return SOUND;
}

int diff_run(const tool_options *o)
{
    diff d;
    int code;

    memset(&d, 0, sizeof d);
    d.o = o;
    code = input_check(o, o->files[0]);
    if (code == SOUND)
        code = input_check(o, o->files[1]);
    if (code == SOUND)
        code = source_load(&d.a, o->files[0], pieces_first, &d.pieces, o);
    if (code == SOUND)
        code = source_load(&d.b, o->files[1], pieces_second, &d.pieces, o);
    if (code == SOUND)
        code = allocate(&d);
    if (code == SOUND)
        code = compare(&d);
    if (code == SOUND) {
        code = diff_is_equal(&d) ? SOUND : DIFFERENT;
        if (o->json)
            diff_print_json(&d);
        else if (!o->quiet)
            diff_print_text(&d);
    }
    source_release(&d.a);
    source_release(&d.b);
    pieces_release(&d.pieces);
    free(d.points);
    free(d.layers);
    free(d.part[0]);
    free(d.part[1]);
    return code;
}
