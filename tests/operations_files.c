/*
 * Snapshots in test_operations.c: the last one that a run has saved, alone or as a delta of those
 * before, and what loads make of it, whichever way it is given.
 */
#include "operations_model.h"

#include <stdio.h>
#include <unistd.h>

enum {
    DEPTH = 5, /* files of a chain, at most */
    PATH_BYTES = 80
};

/* How a load gets the file. */
typedef enum way { STREAM, MEMORY, PATH, MAPPED, LAZY, WAYS } way;

/* ---- the folder ---- */

void open_folder(actor *a)
{
    (void)snprintf(a->folder, sizeof a->folder, "/tmp/kvtile-operations-XXXXXX");
    check(a, mkdtemp(a->folder) != NULL);
}

/* Of the file at a depth of the chain. */
static const char *path_at(const actor *a, size_t depth, char *path)
{
    (void)snprintf(path, PATH_BYTES, "%s/%u.kvt", a->folder, (unsigned)depth);
    return path;
}

void close_folder(const actor *a)
{
    char path[PATH_BYTES];
    for (size_t i = 0; i <= DEPTH; i++)
        (void)unlink(path_at(a, i, path));
    check(a, rmdir(a->folder) == 0); /* no temporary is left */
}

static bytes read_file(const actor *a, const char *path)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    unsigned char part[4096];
    size_t n;
    FILE *f = fopen(path, "rb");
    check(a, f != NULL);
    while (f && (n = fread(part, 1, sizeof part, f)) > 0)
        check(a, writer.write(writer.user, part, n) == 0);
    check(a, f && fclose(f) == 0);
    return b;
}

static void write_file(const actor *a, const char *path, const bytes *b)
{
    FILE *f = fopen(path, "wb");
    check(a, f && fwrite(b->data, 1, b->n, f) == b->n);
    check(a, f && fclose(f) == 0);
}

/* ---- saves ---- */

/* Into the folder's file of that depth of the chain. 0: it was refused. */
static int save_in_folder(actor *a, const member *m, const kvt_save_options *options, size_t depth,
                          bytes *b)
{
    char path[PATH_BYTES];
    if (!succeeded(a, kvt_seq_save(m->seq, path_at(a, depth, path), options), m))
        return 0;
    a->depth = depth;
    a->met.deltas += depth > 0;
    *b = read_file(a, path);
    return 1;
}

void save(actor *a, member *m)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    kvt_save_options options;
    char parent[PATH_BYTES];
    size_t depth = 0;
    uint64_t bound;
    if (m->pending)
        return;
    options = save_options(rng_below(&a->r, 4) ? KVT_CODEC_RAW : rng_below(&a->r, 3));
    if (a->w->on_disk && a->file.n && a->depth + 1 < DEPTH && rng_below(&a->r, 4)) {
        depth = a->depth + 1;
        options.parent = path_at(a, a->depth, parent);
    }
    must(a, kvt_seq_save_bound(m->seq, &bound, &options));
    arm(a);
    if (!(a->w->on_disk ? save_in_folder(a, m, &options, depth, &b)
                        : succeeded(a, kvt_seq_save_stream(m->seq, &writer, &options), m))) {
        bytes_free(&b);
        return;
    }
    check(a, b.n <= bound);
    if (options.codec == KVT_CODEC_RAW && !depth && !m->n_points)
        check(a, b.n == bound);
    bytes_free(&a->file);
    log_free(&a->filed.log);
    a->file = b;
    copy_model(&a->filed, m);
    forms_save(a->w, a->filed.forms, m->tokens, m->length);
    for (size_t i = 0; i < m->n_points; i++)
        forms_save(a->w, a->filed.points[i].forms, m->tokens, m->points[i].n_tokens);
    if (m->unkeyed < m->length) /* the file says so where the keys' shifts do not */
        a->filed.unkeyed =
            m->tokens[m->unkeyed].key == m->tokens[m->unkeyed].position ? 0 : SIZE_MAX;
    log_add(&a->filed.log, RELOAD, 0, 0, NULL);
}

/* ---- loads ---- */

static way some_way(actor *a)
{
    return (way)rng_below(&a->r, a->w->on_disk ? WAYS : PATH);
}

/* Load a file's bytes; path: where they are, for the ways that take one. */
static kvt_status load_by(const actor *a, kvt_seq *seq, const bytes *file, const char *path, way by,
                          kvt_load_options *options, kvt_load_result *result)
{
    bytes b = *file;
    kvt_reader reader = bytes_reader(&b);
    b.at = 0;
    options->folder = a->w->on_disk && by < PATH ? a->folder : NULL;
    options->map = by == MAPPED ? KVT_MAP_VERIFY : by == LAZY ? KVT_MAP_LAZY : KVT_MAP_NONE;
    return by == STREAM   ? kvt_seq_load_stream(seq, &reader, options, result)
           : by == MEMORY ? kvt_seq_load_memory(seq, b.data, b.n, options, result)
                          : kvt_seq_load(seq, path, options, result);
}

static kvt_status load_filed_by(const actor *a, kvt_seq *seq, way by, kvt_load_options *options,
                                kvt_load_result *result)
{
    char path[PATH_BYTES];
    return load_by(a, seq, &a->file, path_at(a, a->depth, path), by, options, result);
}

kvt_status load_filed(const actor *a, kvt_seq *seq, kvt_load_options *options,
                      kvt_load_result *result)
{
    return load_filed_by(a, seq, MEMORY, options, result);
}

/* A prompt that begins like the file's tokens, or empty. Returns how many of it are the file's. */
static size_t some_prompt(actor *a, int32_t *prompt, kvt_load_options *options)
{
    const member *f = &a->filed;
    size_t same = rng_below(&a->r, (uint32_t)f->length + 1), n = 0;
    int none = 0;
    options->prompt = prompt;
    options->n_prompt = same + rng_below(&a->r, 3);
    for (size_t i = 0; i < options->n_prompt; i++) {
        int is_same = i < same && f->tokens[i].id != KVT_TOKEN_NONE;
        prompt[i] = is_same ? f->tokens[i].id : i < same && rng_below(&a->r, 2) ? 70001 : 70000;
        none |= !is_same;
        n += !none;
    }
    return n;
}

/* The mirror of a loaded file: that file in the mirrors' cache, or its log replayed. */
static kvt_seq *mirror_of_file(const actor *a)
{
    kvt_seq *seq;
    kvt_load_options options = {.struct_size = sizeof options};
    if (a->operation % 2)
        return replay(a, &a->filed.log);
    seq = tagged_seq(a, a->mirrors, a->filed.tag);
    must_mirror(a, load_filed(a, seq, &options, NULL));
    return seq;
}

/* The model is the file's. */
static void take_filed(const actor *a, member *m)
{
    member old = *m;
    log_free(&old.log);
    kvt_seq_destroy(old.mirror);
    copy_model(m, &a->filed);
    m->seq = old.seq;
    m->reserves = old.reserves;
    m->turned = 0;
    for (size_t i = 0; i < m->length; i++)
        m->turned |= m->tokens[i].key != m->tokens[i].position;
    forms_settle(a->w, m->forms);
    for (size_t i = 0; i < m->n_points; i++)
        forms_settle(a->w, m->points[i].forms);
    m->mirror = mirror_of_file(a);
}

/*
 * What a load says of how to go on, and where the sequence ends with options.reuse. m: the model,
 * loaded whole.
 */
static void expect_answer(const actor *a, member *m, const kvt_load_options *options, size_t prefix,
                          const kvt_load_result *got)
{
    size_t bound = options->n_prompt && prefix == options->n_prompt ? prefix - 1 : prefix;
    const point *p = point_before(m, bound);
    size_t reuse = deepest(a, m, bound), end = m->length;
    check(a, got->prefix_tokens == prefix);
    check(a, got->checkpoint_tokens == (p ? p->n_tokens : UINT64_MAX));
    if (options->reuse)
        end = options->reuse == KVT_REUSE_PREFIX ? reuse : p ? p->n_tokens : 0;
    check(a, got->reuse_tokens == (reuse < end ? reuse : end));
    check(a, got->n_tokens == end);
    if (end == m->length)
        return;
    did(a, m, TRUNCATE, 0, end);
    model_truncate(a->w, m, end);
    m->uncounted |= m->turned; /* the mirror still has the turns of what it had */
}

void load(actor *a, member *m)
{
    int32_t prompt[MOST + 2];
    kvt_load_options options = {.struct_size = sizeof options};
    kvt_load_result result;
    way by = some_way(a);
    size_t prefix = 0;
    if (!a->file.n)
        return;
    if (!m->length && !m->pending && m->tag != a->filed.tag)
        set_tag(a, m, a->filed.tag);
    if (rng_below(&a->r, 3)) {
        prefix = some_prompt(a, prompt, &options);
        options.reuse = options.n_prompt ? rng_below(&a->r, 4) % 3 : KVT_REUSE_ALL;
    }
    if (m->pending || m->tag != a->filed.tag) {
        refused(a, load_filed_by(a, m->seq, by, &options, &result),
                m->pending ? KVT_ERR_STATE : KVT_ERR_MISMATCH, m);
        return;
    }
    arm(a);
    if (!succeeded(a, load_filed_by(a, m->seq, by, &options, &result), m))
        return;
    take_filed(a, m);
    m->uncounted = result.mapped_bytes > 0;
    a->met.mapped += result.mapped_bytes > 0;
    a->met.loaded++;
    expect_answer(a, m, &options, prefix, &result);
    expect_mirrored(a, m);
}

/* ---- parts ---- */

/* Rows of a sequence, as far as they are there, near those of the tokens. */
static void expect_near_tokens(const actor *a, const kvt_seq *seq, const token *fed, size_t n)
{
    for (uint32_t l = 0; l < a->w->n_layers; l++)
        for (int side = 0; side < 2; side++) {
            const kvt_group_config *g = &a->w->groups[a->w->group_of_layer[l]];
            size_t row = row_floats(a->w, l, (kvt_side)side);
            float *got = room(n * row * sizeof *got);
            kvt_tensor view = kvt_tensor_f32(got);
            kvt_status status = kvt_read(seq, l, (kvt_side)side, 0, n, &view);
            check(a, status == KVT_OK || (status == KVT_ERR_STATE && g->window_tokens));
            if (status == KVT_OK)
                expect_near(a, l, (kvt_side)side, NULL, fed, n, got);
            free(got);
        }
}

/* Some tokens of a member, and the same of its mirror, saved and loaded. */
void save_part(actor *a, member *m)
{
    bytes files[2] = {{NULL, 0, 0, 0, -1, 0}, {NULL, 0, 0, 0, -1, 0}};
    kvt_seq *const from[2] = {m->seq, m->mirror};
    kvt_seq *to[2] = {NULL, NULL};
    kvt_status status[2] = {KVT_OK, KVT_OK};
    kvt_save_options options;
    char text[32];
    if (m->pending || !m->length)
        return;
    options = save_options(rng_below(&a->r, 3));
    if (rng_below(&a->r, 2))
        options.first_token = (uint64_t)KVT_BLOCK_TOKENS *
                              rng_below(&a->r, (uint32_t)((m->length - 1) / KVT_BLOCK_TOKENS) + 1);
    options.n_tokens = 1 + rng_below(&a->r, (uint32_t)(m->length - options.first_token));
    for (int i = 0; i < 2; i++) {
        kvt_writer writer = bytes_writer(&files[i]);
        status[i] = kvt_seq_save_stream(from[i], &writer, &options);
    }
    check(a, status[0] == status[1]);
    if (status[0] != KVT_OK)
        refused(a, status[0], KVT_ERR_STATE, m);
    for (int i = 0; i < 2 && status[0] == KVT_OK; i++) {
        kvt_cache *cache = i ? a->mirrors : a->w->cache;
        if (i == 0)
            arm(a);
        status[i] = kvt_seq_create(cache, &to[i]);
        if (status[i] == KVT_OK)
            status[i] = kvt_seq_set_tag(to[i], text, tag_of(m->tag, text));
        if (status[i] == KVT_OK)
            status[i] = load_bytes(to[i], files[i].data, files[i].n, NULL);
        if (i == 0 && !succeeded(a, status[0], m))
            break;
        must_at(a, cache, status[i], "load of a part");
        expect_near_tokens(a, to[i], m->tokens + options.first_token, (size_t)options.n_tokens);
    }
    if (status[0] == KVT_OK) {
        check(a, files[0].n == files[1].n && memcmp(files[0].data, files[1].data, files[0].n) == 0);
        expect_same_file(a, a->w->cache, to[0], a->mirrors, to[1], "a part");
        a->met.parts++;
    }
    for (int i = 0; i < 2; i++) {
        kvt_seq_destroy(to[i]);
        bytes_free(&files[i]);
    }
}

/* ---- damage ---- */

/* A copy of the file, with one byte changed, or cut. */
static bytes damaged(actor *a)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    uint32_t at = rng_below(&a->r, (uint32_t)a->file.n);
    b.data = room(a->file.n);
    b.n = b.room = a->file.n;
    memcpy(b.data, a->file.data, b.n);
    if (rng_below(&a->r, 6) == 0)
        b.n = at;
    else
        b.data[at] ^= (unsigned char)(1 + rng_below(&a->r, 255));
    return b;
}

void load_damaged(actor *a, member *m)
{
    kvt_load_options options = {.struct_size = sizeof options};
    char path[PATH_BYTES];
    way by = some_way(a);
    int done = 0;
    if (!a->file.n || m->pending)
        return;
    if (!m->length && m->tag != a->filed.tag)
        set_tag(a, m, a->filed.tag);
    if (m->tag != a->filed.tag)
        return;
    path_at(a, DEPTH, path);
    for (int tries = 0; !done && tries < 8; tries++) { /* most of it is not verified late */
        bytes b = damaged(a);
        if (by >= PATH)
            write_file(a, path, &b);
        done = by != LAZY || load_late(a, path);
        if (by != LAZY) {
            kvt_status status = load_by(a, m->seq, &b, path, by, &options, NULL);
            if (status == KVT_OK || status == KVT_ERR_STATE || status == KVT_ERR_ARG)
                report(a, "a damaged file", "was not refused for its damage");
            a->met.damaged += status != KVT_ERR_BUDGET;
            expect_mirrored(a, m);
        }
        bytes_free(&b);
    }
}
