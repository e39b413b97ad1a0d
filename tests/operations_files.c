/*
 * Snapshots in test_operations.c: the last one that a run has saved, and what loads make of it.
 */
#include "operations_model.h"

void save(actor *a, member *m)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    kvt_writer writer = bytes_writer(&b);
    kvt_save_options options;
    if (m->pending)
        return;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.codec = rng_below(&a->r, 4) ? KVT_CODEC_RAW : rng_below(&a->r, 3);
    arm(a);
    if (!succeeded(a, kvt_seq_save_stream(m->seq, &writer, &options), m)) {
        bytes_free(&b);
        return;
    }
    bytes_free(&a->file);
    log_free(&a->filed.log);
    a->file = b;
    copy_model(&a->filed, m);
    forms_save(a->w, a->filed.forms, m->tokens, m->length);
    for (size_t i = 0; i < m->n_points; i++)
        forms_save(a->w, a->filed.points[i].forms, m->tokens, m->points[i].n_tokens);
    log_add(&a->filed.log, RELOAD, 0, 0, NULL);
}

/* A prompt that begins like the file's tokens, or NULL. Returns how many of it are the file's. */
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

/* What a load says of how to go on. m: the model, loaded. */
static void expect_answer(const actor *a, const member *m, const kvt_load_options *options,
                          size_t prefix, const kvt_load_result *got)
{
    size_t bound = options->n_prompt && prefix == options->n_prompt ? prefix - 1 : prefix;
    const point *p = point_before(m, bound);
    check(a, got->n_tokens == m->length && got->prefix_tokens == prefix);
    check(a, got->checkpoint_tokens == (p ? p->n_tokens : UINT64_MAX));
    check(a, got->reuse_tokens == deepest(a, m, bound));
}

/* The file of a pool's cache, or what the mirrors' cache makes of it. */
static kvt_seq *mirror_of_file(const actor *a)
{
    char text[32];
    kvt_seq *seq = NULL;
    if (a->operation % 2)
        return replay(a, &a->filed.log);
    must_mirror(a, kvt_seq_create(a->mirrors, &seq));
    must_mirror(a, kvt_seq_set_tag(seq, text, tag_of(a->filed.tag, text)));
    must_mirror(a, load_bytes(seq, a->file.data, a->file.n, NULL));
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

void load(actor *a, member *m)
{
    int32_t prompt[MOST + 2];
    kvt_load_options options = {.struct_size = sizeof options};
    kvt_load_result result;
    kvt_reader reader = bytes_reader(&a->file);
    size_t prefix = 0;
    if (!a->file.n)
        return;
    if (!m->length && !m->pending && m->tag != a->filed.tag)
        set_tag(a, m, a->filed.tag);
    if (rng_below(&a->r, 3))
        prefix = some_prompt(a, prompt, &options);
    a->file.at = 0;
    if (m->pending || m->tag != a->filed.tag) {
        refused(a, kvt_seq_load_stream(m->seq, &reader, &options, &result),
                m->pending ? KVT_ERR_STATE : KVT_ERR_MISMATCH, m);
        return;
    }
    arm(a);
    if (!succeeded(a, kvt_seq_load_stream(m->seq, &reader, &options, &result), m))
        return;
    take_filed(a, m);
    a->met.loaded++;
    expect_answer(a, m, &options, prefix, &result);
    expect_mirrored(a, m);
}
