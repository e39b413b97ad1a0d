/*
 * kvtile diff: what differs between two snapshots. Both are loaded, and compared by what a program
 * can see of them: the tokens, and the keys and values as they are read back. How a file stores
 * them (codec, which blocks are open) is not compared.
 */
#include "tool.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PART_TOKENS 16384u
#define PART_FLOATS 1048576u /* of either file, that are compared at a time: a token at least */

/* One side of a layer. */
typedef struct rows {
    uint64_t tokens, blocks; /* that differ */
    uint64_t first;          /* token that does */
    uint64_t missing;        /* tokens that a window has released in one of the files */
    double largest;          /* difference of two elements */
    uint64_t last_block;     /* that was counted */
    int compared;            /* 0: the shapes differ */
} rows;

typedef struct diff {
    const tool_options *o;
    tool_source a, b;
    int fingerprint, geometry, types, tag, next_position, checkpoints; /* 1: equal */
    uint64_t n;              /* tokens that both have, by number */
    uint64_t ids, positions; /* how many of them, from the first one on, are equal */
    rows (*layers)[2];       /* [layers that both have] */
    uint32_t n_layers;
    float *part[2];
} diff;

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
static kvt_status compare_checkpoints(diff *d)
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
    if (!at[0] || !at[1] || kvt_seq_checkpoints(d->a.seq, at[0], n[0], &n[0]) != KVT_OK ||
        kvt_seq_checkpoints(d->b.seq, at[1], n[0], &n[1]) != KVT_OK)
        status = KVT_ERR_MEMORY;
    if (status == KVT_OK)
        d->checkpoints = memcmp(at[0], at[1], n[0] * sizeof *at[0]) == 0;
    for (i = 0; i < n[0] && status == KVT_OK && d->checkpoints; i++) {
        void *a = blob_of(d->a.seq, at[0][i], &bytes[0]);
        void *b = blob_of(d->b.seq, at[0][i], &bytes[1]);
        if (!a || !b)
            status = KVT_ERR_MEMORY;
        else
            d->checkpoints = same_bytes(a, bytes[0], b, bytes[1]);
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

static int compare_rows(diff *d, uint32_t layer, kvt_side side, uint64_t *done, uint64_t total)
{
    rows *r = &d->layers[layer][side];
    size_t row = (size_t)source_heads(&d->a, layer) * source_dims(&d->a, layer, side);
    uint64_t step = PART_FLOATS / row, at, n;
    kvt_tensor to[2];

    r->compared = source_heads(&d->a, layer) == source_heads(&d->b, layer) &&
                  source_dims(&d->a, layer, side) == source_dims(&d->b, layer, side);
    if (!r->compared)
        return SOUND;
    /* Parts within a block, whose rows are released together. */
    step = step < KVT_BLOCK_TOKENS ? 1 : KVT_BLOCK_TOKENS;
    to[0] = kvt_tensor_f32(d->part[0]);
    to[1] = kvt_tensor_f32(d->part[1]);
    for (at = 0; at < d->n; at += n) {
        kvt_status a, b;
        n = d->n - at < step ? d->n - at : step;
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

static int compare(diff *d)
{
    const uint64_t total = d->n * d->n_layers * 2;
    uint64_t done = 0;
    uint32_t layer;
    kvt_status status;
    int code = SOUND;

    compare_heads(d);
    status = compare_checkpoints(d);
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
    return code;
}

static int differ(const rows *r)
{
    return !r->compared || r->tokens || r->missing;
}

static int all_equal(const diff *d)
{
    uint32_t layer;
    int equal = d->fingerprint && d->geometry && d->types && d->tag && d->next_position &&
                d->checkpoints && d->a.info.n_tokens == d->b.info.n_tokens && d->ids == d->n &&
                d->positions == d->n;

    for (layer = 0; layer < d->n_layers; layer++)
        equal = equal && !differ(&d->layers[layer][0]) && !differ(&d->layers[layer][1]);
    return equal;
}

static void print_json(const diff *d)
{
    const char *comma = "";
    uint32_t layer;
    int side;

    json_begin(d->a.path, KVT_OK);
    printf(",\"other\":");
    json_string(d->b.path);
    printf(",\"equal\":");
    json_bool(all_equal(d));
    printf(",\"same\":{\"fingerprint\":");
    json_bool(d->fingerprint);
    printf(",\"geometry\":");
    json_bool(d->geometry);
    printf(",\"types\":");
    json_bool(d->types);
    printf(",\"tag\":");
    json_bool(d->tag);
    printf(",\"next_position\":");
    json_bool(d->next_position);
    printf(",\"checkpoints\":");
    json_bool(d->checkpoints);
    printf("},\"n_tokens\":[%" PRIu64 ",%" PRIu64 "],\"equal_token_ids\":%" PRIu64
           ",\"equal_positions\":%" PRIu64 ",\"layers\":[",
           d->a.info.n_tokens, d->b.info.n_tokens, d->ids, d->positions);
    for (layer = 0; layer < d->n_layers; layer++)
        for (side = 0; side < 2; side++) {
            const rows *r = &d->layers[layer][side];
            if (!differ(r))
                continue;
            printf("%s{\"layer\":%" PRIu32 ",\"side\":\"%c\",\"compared\":", comma, layer,
                   "kv"[side]);
            json_bool(r->compared);
            printf(",\"tokens\":%" PRIu64 ",\"blocks\":%" PRIu64 ",\"released\":%" PRIu64,
                   r->tokens, r->blocks, r->missing);
            if (r->tokens)
                printf(",\"first\":%" PRIu64 ",\"largest\":%.9g", r->first, r->largest);
            printf("}");
            comma = ",";
        }
    printf("]}\n");
}

static void print_text(const diff *d)
{
    uint32_t layer;
    int side;

    if (all_equal(d)) {
        printf("%s and %s are equal: %" PRIu64 " tokens\n", d->a.path, d->b.path, d->n);
        return;
    }
    printf("%s and %s differ\n", d->a.path, d->b.path);
    if (!d->fingerprint)
        printf("  fingerprints differ\n");
    if (!d->geometry)
        printf("  geometries differ\n");
    if (!d->types)
        printf("  types, flags or rotations differ\n");
    if (!d->tag)
        printf("  tags differ\n");
    if (!d->next_position)
        printf("  next positions differ: %" PRId32 ", %" PRId32 "\n", d->a.info.next_position,
               d->b.info.next_position);
    if (!d->checkpoints)
        printf("  checkpoints differ\n");
    printf("  tokens: %" PRIu64 ", %" PRIu64 "; the first %" PRIu64
           " have equal ids, the first %" PRIu64 " equal positions\n",
           d->a.info.n_tokens, d->b.info.n_tokens, d->ids, d->positions);
    for (layer = 0; layer < d->n_layers; layer++)
        for (side = 0; side < 2; side++) {
            const rows *r = &d->layers[layer][side];
            if (!r->compared)
                printf("  layer %" PRIu32 " %c: another shape\n", layer, "KV"[side]);
            if (r->tokens)
                printf("  layer %" PRIu32 " %c: %" PRIu64 " token%s in %" PRIu64
                       " block%s differ%s, the first is %" PRIu64 ", by up to %.4g\n",
                       layer, "KV"[side], r -> tokens, r -> tokens == 1 ? "" : "s", r->blocks,
                       r->blocks == 1 ? "" : "s", r->tokens == 1 ? "s" : "", r->first, r->largest);
            if (r->missing)
                printf("  layer %" PRIu32 " %c: %" PRIu64 " tokens are there in one alone\n", layer,
                       "KV"[side], r -> missing);
        }
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
    code = source_load(&d.a, o->files[0], o);
    if (code == SOUND)
        code = source_load(&d.b, o->files[1], o);
    if (code == SOUND)
        code = allocate(&d);
    if (code == SOUND)
        code = compare(&d);
    if (code == SOUND) {
        code = all_equal(&d) ? SOUND : DIFFERENT;
        if (o->json)
            print_json(&d);
        else if (!o->quiet)
            print_text(&d);
    }
    source_release(&d.a);
    source_release(&d.b);
    free(d.layers);
    free(d.part[0]);
    free(d.part[1]);
    return code;
}
