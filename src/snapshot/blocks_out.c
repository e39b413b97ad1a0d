/*
 * The blocks of a snapshot that is saved.
 *
 * A layer is written as its image, which is its memory where nothing in that is dead: hashed and
 * handed to the writer as it lies, in one pass; or as streams, gathered from the image, filtered
 * and compressed. Its digest is of the image either way. The layers of a block are coded side by
 * side (jobs.c) and go out in order; the digests follow, when they are known.
 */
#include "src/snapshot/saver.h"

#include "src/snapshot/convert.h"

#define PROGRESS_BYTES ((uint64_t)64 << 20)
#define WRITE_COST 3 /* of a byte to the page cache, in bytes that are hashed */

/* What the tasks of one batch have in common. */
typedef struct batch {
    kvt_snap_saver *s;
    const kvt_block *block;
    uint32_t group, form, tokens, n_streams;
    size_t native_bytes;
    int digests_only;
    int written; /* write_beside: the answer */
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
} batch;

const kvt_block *kvt_snap_own_block(const kvt_snap_saver *s, uint64_t row, uint32_t group)
{
    return kvt_snap_has_row(&s->runs, row, group)
               ? kvt_seq_block(s->seq, (size_t)row + s->first_row, s->group_of[group])
               : NULL;
}

uint32_t kvt_snap_stored_form(const kvt_snap_saver *s, const kvt_block *block, uint64_t row,
                              uint32_t group, uint32_t tokens)
{
    return s->targets ? kvt_convert_form(&s->seq->cache->groups[s->group_of[group]], block->form,
                                         s->stored_as[group], (size_t)row, tokens)
                      : block->form;
}

/* The image of a layer, where it lies in memory or made in the job's own. */
static void make_image(const batch *b, kvt_snap_job *job)
{
    const kvt_snap_saver *s = b->s;
    const kvt_group *stored = s->stored_as[b->group];
    const kvt_group *group = &s->seq->cache->groups[s->group_of[b->group]];
    size_t bytes = stored->layouts[b->form].layer_bytes;
    uint32_t index = s->layer_of[s->first_layer[b->group] + job->layer];
    const unsigned char *layer = kvt_head_record(group, b->block, index, 0);

    job->from = layer;
    /* What is mapped must not be saved as if it were sound. */
    job->status = kvt_block_verify(b->block, index);
    if (job->status != KVT_OK)
        return;
    if (!s->targets && kvt_snap_is_image(stored, b->form, b->tokens))
        return;
    job->status = kvt_snap_reserve(s->context, &job->image, 0, bytes, "a layer's image");
    if (job->status == KVT_OK && s->targets)
        job->status = kvt_convert_image(s->context, group, b->block->form, layer, b->tokens, stored,
                                        b->form, job->image.data, &job->scratch);
    else if (job->status == KVT_OK)
        memcpy(job->image.data, layer, bytes);
    if (job->status == KVT_OK)
        kvt_snap_image_clear(stored, b->form, b->tokens, job->image.data);
    job->from = job->image.data;
}

/* One layer: its image and digest, and its section. */
static void code_layer(void *arg, size_t i)
{
    batch *b = arg;
    kvt_snap_saver *s = b->s;
    kvt_snap_job *job = &s->jobs.jobs[i];
    const kvt_group *stored = s->stored_as[b->group];
    size_t bytes = stored->layouts[b->form].layer_bytes;

    job->status = KVT_OK;
    make_image(b, job);
    if (job->status != KVT_OK)
        return;
    if (job->to) {
        kvt_snap_copy_digest(job->to, job->from, bytes, job->digest);
        return;
    }
    kvt_snap_digest(job->from, bytes, job->digest);
    if (b->digests_only || s->native)
        return;
    job->status =
        kvt_snap_reserve(s->context, &job->native, 0, b->native_bytes, "a snapshot's streams");
    if (job->status == KVT_OK)
        job->status = kvt_snap_reserve(s->context, &job->section, 0,
                                       kvt_snap_set_room(b->native_bytes), "a snapshot's section");
    if (job->status != KVT_OK)
        return;
    kvt_snap_gather(stored, b->form, b->tokens, job->from, job->native.data);
    {
        kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
        memcpy(shapes, b->shapes, sizeof shapes);
        /* The first layer's values depend on the token alone: they repeat as tokens do. */
        shapes[1].repeats = shapes[1].kind == KVT_SNAP_KIND_V &&
                            s->header->layers[s->first_layer[b->group] + job->layer] == 0;
        job->status =
            kvt_snap_make_set(&job->codec, KVT_SNAP_LAYER, job->layer, shapes, b->n_streams,
                              job->native.data, job->section.data, &job->bytes);
    }
}

/* Layer i - 1; first what is collected, while other threads code layers. */
static void write_beside(void *arg, size_t i)
{
    batch *b = arg;

    if (i)
        code_layer(b, i - 1);
    else
        b->written = kvt_snap_write_collected(b->s);
}

static batch batch_of(kvt_snap_saver *s, const kvt_block *block, uint64_t row, uint32_t group,
                      uint32_t tokens)
{
    batch b;

    memset(&b, 0, sizeof b);
    b.s = s;
    b.block = block;
    b.group = group;
    b.form = kvt_snap_stored_form(s, block, row, group, tokens);
    b.tokens = tokens;
    b.n_streams =
        kvt_snap_shapes(&s->header->groups[group], b.form, tokens, b.shapes, &b.native_bytes);
    return b;
}

/* Code layers first .. first + n - 1. */
static kvt_status run(batch *b, uint32_t first, size_t n)
{
    kvt_snap_saver *s = b->s;
    size_t bytes = s->stored_as[b->group]->layouts[b->form].layer_bytes, i;

    for (i = 0; i < n; i++)
        s->jobs.jobs[i].layer = first + (uint32_t)i;
    if (s->writes_beside && !b->digests_only && s->parts_bytes >= KVT_SNAP_WRITE_BYTES / 2) {
        kvt_status status;
        size_t work = n * bytes + s->parts_bytes * WRITE_COST;
        kvt_snap_jobs_run(&s->jobs, write_beside, b, n + 1, work / (n + 1));
        status = kvt_snap_written(s, b->written);
        if (status != KVT_OK)
            return status;
    } else {
        kvt_snap_jobs_run(&s->jobs, code_layer, b, n, bytes);
    }
    for (i = 0; i < n; i++) {
        if (s->jobs.jobs[i].status != KVT_OK)
            return s->jobs.jobs[i].status;
        memcpy(s->digests.data + KVT_SNAP_ID_HEAD + (first + i) * (size_t)KVT_SNAP_ID_BYTES,
               s->jobs.jobs[i].digest, KVT_SNAP_ID_BYTES);
    }
    return KVT_OK;
}

/* From the digests of all layers. */
static void make_id(kvt_snap_saver *s, const batch *b, unsigned char *id)
{
    kvt_put32(s->digests.data, b->tokens);
    kvt_put32(s->digests.data + 4, b->form);
    kvt_snap_digest(
        s->digests.data,
        KVT_SNAP_ID_HEAD + s->header->groups[b->group].n_layers * (size_t)KVT_SNAP_ID_BYTES, id);
    if (s->whole) /* bookkeeping, not contents: a const block takes it */
        kvt_block_set_id(s->seq->cache, (kvt_block *)(uintptr_t)b->block, b->tokens, id);
}

kvt_status kvt_snap_id_of(kvt_snap_saver *s, const kvt_block *block, uint64_t row, uint32_t group,
                          uint32_t tokens, unsigned char *id)
{
    batch b;
    uint32_t first, n_layers = s->header->groups[group].n_layers;
    kvt_status status = KVT_OK;

    if (s->whole && kvt_block_id(s->seq->cache, block, tokens, id))
        return KVT_OK;
    b = batch_of(s, block, row, group, tokens);
    b.digests_only = 1;
    for (first = 0; status == KVT_OK && first < n_layers; first += (uint32_t)s->jobs.n) {
        size_t n = n_layers - first < s->jobs.n ? n_layers - first : s->jobs.n, i;
        for (i = 0; i < n; i++)
            s->jobs.jobs[i].to = NULL;
        status = run(&b, first, n);
    }
    if (status == KVT_OK)
        make_id(s, &b, id);
    return status;
}

void kvt_snap_make_entry(kvt_snap_saver *s, const kvt_block *block, uint64_t row, uint32_t group,
                         uint32_t tokens, const unsigned char *id, unsigned char *entry)
{
    memset(entry, 0, KVT_SNAP_ENTRY_BYTES);
    if (id)
        memcpy(entry, id, KVT_SNAP_ID_BYTES);
    kvt_put32(entry + 16, group);
    kvt_put32(entry + 20, (uint32_t)row);
    kvt_put32(entry + 24, tokens);
    entry[28] = (unsigned char)kvt_snap_stored_form(s, block, row, group, tokens);
    entry[30] = id != NULL;
}

static kvt_status tell(kvt_snap_saver *s, uint64_t bytes)
{
    s->done += bytes;
    if (!s->options->progress || (s->done - s->told < PROGRESS_BYTES && s->done < s->total))
        return KVT_OK;
    s->told = s->done;
    return s->options->progress(s->options->progress_user, s->done, s->total)
               ? kvt_snap_fail(s->context, KVT_ERR_CANCELLED, "save: cancelled by progress")
               : KVT_OK;
}

/* The heads before the layers of a block. */
static kvt_status put_block_head(kvt_snap_saver *s, const batch *b, uint64_t number,
                                 const unsigned char *entry)
{
    static const unsigned char zeros[KVT_SNAP_ALIGN];
    uint32_t n_layers = s->header->groups[b->group].n_layers;
    unsigned char payload[KVT_SNAP_BLOCK_BYTES - KVT_SNAP_SUM_BYTES];
    kvt_status status = kvt_snap_put_head(s, KVT_SNAP_BLOCK, KVT_SNAP_BLOCK_BYTES, number);

    memset(payload, 0, sizeof payload);
    memcpy(payload, entry + KVT_SNAP_ID_BYTES, 16);
    kvt_put32(payload + 16, n_layers);
    kvt_put32(payload + 20, (uint32_t)s->native);
    if (status == KVT_OK)
        status = kvt_snap_put_summed(s, payload, sizeof payload, NULL);
    if (status == KVT_OK && s->native) {
        size_t pad = (size_t)(0 - (s->offset + KVT_SNAP_SECTION_BYTES)) % KVT_SNAP_ALIGN;
        uint64_t images = (uint64_t)n_layers * s->stored_as[b->group]->layouts[b->form].layer_bytes;
        status = kvt_snap_put_head(s, KVT_SNAP_IMAGES, pad + images, pad);
        if (status == KVT_OK)
            status = kvt_snap_put(s, zeros, pad);
    }
    return status;
}

/* Layers first .. first + n - 1, coded and put. */
static kvt_status put_layers(kvt_snap_saver *s, batch *b, uint32_t first, size_t n)
{
    size_t bytes = s->stored_as[b->group]->layouts[b->form].layer_bytes, i;
    unsigned char *to = NULL;
    kvt_status status = KVT_OK;

    if (s->native && s->output.memory) {
        to = kvt_snap_put_room(s, (uint64_t)n * bytes);
        if (!to)
            return KVT_ERR_FULL;
    }
    for (i = 0; i < n; i++)
        s->jobs.jobs[i].to = to ? to + i * bytes : NULL;
    status = run(b, first, n);
    for (i = 0; status == KVT_OK && !to && i < n; i++) {
        const kvt_snap_job *job = &s->jobs.jobs[i];
        status = !s->native                     ? kvt_snap_put(s, job->section.data, job->bytes)
                 : job->from == job->image.data ? kvt_snap_put(s, job->from, bytes)
                                                : kvt_snap_put_kept(s, job->from, bytes);
    }
    return status == KVT_OK ? tell(s, (uint64_t)n * bytes) : status;
}

uint64_t kvt_snap_block_bound(const kvt_snap_saver *s, uint64_t bytes, uint32_t group,
                              uint32_t form)
{
    const uint64_t n_layers = s->header->groups[group].n_layers;
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    size_t native;

    bytes += KVT_SNAP_SECTION_BYTES + KVT_SNAP_BLOCK_BYTES;
    if (s->native) {
        bytes += KVT_SNAP_SECTION_BYTES;
        bytes = (bytes + KVT_SNAP_ALIGN - 1) / KVT_SNAP_ALIGN * KVT_SNAP_ALIGN;
        bytes += n_layers * s->stored_as[group]->layouts[form].layer_bytes;
    } else {
        (void)kvt_snap_shapes(&s->header->groups[group], form, KVT_TOKENS, shapes, &native);
        bytes += n_layers * kvt_snap_set_room(native);
    }
    return bytes + KVT_SNAP_SECTION_BYTES + (n_layers + 1) * KVT_SNAP_ID_BYTES + KVT_SNAP_SUM_BYTES;
}

/* As many as are worth a write, all of a block in equal parts, where they take no buffers. */
static size_t layers_at_once(const kvt_snap_saver *s, const batch *b)
{
    const kvt_group *stored = s->stored_as[b->group];
    size_t bytes = stored->layouts[b->form].layer_bytes, n_layers, parts, n;

    if (!s->writes_beside || s->targets || !kvt_snap_is_image(stored, b->form, b->tokens))
        return s->jobs.n;
    n_layers = s->header->groups[b->group].n_layers;
    parts = (n_layers * bytes + KVT_SNAP_WRITE_BYTES / 2) / KVT_SNAP_WRITE_BYTES;
    n = parts > 1 ? (n_layers + parts - 1) / parts : n_layers;
    n = n < s->jobs.room ? n : s->jobs.room;
    return n > s->jobs.n ? n : s->jobs.n;
}

kvt_status kvt_snap_put_block(kvt_snap_saver *s, uint64_t number, const kvt_block *block)
{
    const unsigned char *entry = s->table.data + number * KVT_SNAP_ENTRY_BYTES;
    uint32_t group = kvt_get32(entry + 16), first;
    uint32_t n_layers = s->header->groups[group].n_layers;
    uint64_t offset = s->offset;
    unsigned char id[KVT_SNAP_ID_BYTES];
    kvt_snap_summer summer;
    batch b;
    size_t at_once;
    kvt_status status;

    if (entry[30]) /* in a parent */
        return KVT_OK;
    b = batch_of(s, block, kvt_get32(entry + 20), group, kvt_get32(entry + 24));
    status = put_block_head(s, &b, number, entry);
    at_once = layers_at_once(s, &b);
    for (first = 0; status == KVT_OK && first < n_layers; first += (uint32_t)at_once)
        status = put_layers(s, &b, first, n_layers - first < at_once ? n_layers - first : at_once);
    if (status != KVT_OK)
        return status;
    make_id(s, &b, id);
    kvt_snap_summer_init(&summer);
    kvt_snap_summer_add(&summer, id, sizeof id);
    kvt_snap_summer_add(&summer, s->digests.data + KVT_SNAP_ID_HEAD,
                        n_layers * (size_t)KVT_SNAP_ID_BYTES);
    status = kvt_snap_put_head(s, KVT_SNAP_DIGESTS,
                               (uint64_t)(n_layers + 1) * KVT_SNAP_ID_BYTES + KVT_SNAP_SUM_BYTES,
                               number);
    if (status == KVT_OK)
        status = kvt_snap_put(s, id, sizeof id);
    if (status == KVT_OK)
        status = kvt_snap_put(s, s->digests.data + KVT_SNAP_ID_HEAD,
                              n_layers * (size_t)KVT_SNAP_ID_BYTES);
    if (status == KVT_OK) {
        unsigned char sum[KVT_SNAP_SUM_BYTES];
        kvt_put64(sum, kvt_snap_summer_sum(&summer));
        status = kvt_snap_put(s, sum, sizeof sum);
    }
    if (status == KVT_OK)
        kvt_snap_put_note(s, KVT_SNAP_BLOCK, number, offset, id);
    return status;
}
