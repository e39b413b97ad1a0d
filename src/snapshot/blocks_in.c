/*
 * The blocks of a snapshot that is read.
 *
 * Sections are taken in the order of the file; what is in them is decoded, checked and hashed side
 * by side (jobs.c), into the memory that the sink gives for a layer's image, or the job's own where
 * it wants none. The digests come behind the layers: only then does it show which layer is damaged,
 * and the sink has nothing that is not staged until the end.
 */
#include "src/snapshot/parser.h"

#include <stdio.h>

typedef struct batch {
    kvt_snap_parser *p;
    const kvt_snap_block *at;
    const kvt_group *group, *stored_as; /* another group's streams can make the same image */
    uint32_t n_streams;
    size_t native_bytes, image_bytes;
    int native;
    uint64_t read_at; /* not 0: where job 0's image is in the file, the others' behind it */
    kvt_snap_shape shapes[KVT_SNAP_MAX_STREAMS];
    kvt_snap_fault *faults; /* [jobs.n] */
    uint64_t *stored;       /* [jobs.n] */
} batch;

/* A layer's payload, or its image in memory, to its image, digest and the sink. */
static void decode_layer(void *arg, size_t i)
{
    batch *b = arg;
    kvt_snap_parser *p = b->p;
    kvt_snap_job *job = &p->jobs.jobs[i];
    const unsigned char *streams = NULL, *image;

    job->status = KVT_OK;
    b->stored[i] = b->image_bytes;
    memset(&b->faults[i], 0, sizeof b->faults[i]);
    if (!b->native) {
        job->status =
            kvt_snap_decode_set(&job->codec, b->shapes, b->n_streams, b->native_bytes, job->from,
                                job->bytes, &job->native, &streams, &b->stored[i], &b->faults[i]);
        if (job->status != KVT_OK)
            return;
        kvt_snap_scatter(b->stored_as, b->at->form, b->at->tokens, streams, job->to);
        if (b->stored_as != b->group)
            b->faults[i].text = kvt_snap_image_check(b->group, b->at->form, b->at->tokens, job->to);
        if (b->faults[i].text) {
            job->status = KVT_ERR_CORRUPT;
            return;
        }
        kvt_snap_digest(job->to, b->image_bytes, job->digest);
        image = job->to;
    } else {
        if (b->read_at && p->input->read_at(p->input->reader.user, b->read_at + i * b->image_bytes,
                                            job->to, b->image_bytes) != b->image_bytes) {
            job->status = KVT_ERR_IO;
            return;
        }
        image = job->to ? job->to : job->from;
        if (job->to && job->from) {
            b->faults[i].text = kvt_snap_image_copy(b->group, b->at->form, b->at->tokens, job->to,
                                                    job->from, job->digest);
        } else {
            kvt_snap_digest(image, b->image_bytes, job->digest);
            b->faults[i].text = kvt_snap_image_check(b->group, b->at->form, b->at->tokens, image);
        }
        if (b->faults[i].text) {
            job->status = KVT_ERR_CORRUPT;
            return;
        }
    }
    if (p->sink->layer)
        job->status = p->sink->layer(p->sink->user, b->at, job->layer, image, &job->scratch);
}

static void set_place(kvt_snap_parser *p, uint64_t b, const kvt_snap_block *at, uint32_t layer)
{
    (void)snprintf(p->place, sizeof p->place, "block %llu (group %u, tokens from %llu), layer %u",
                   (unsigned long long)b, (unsigned)at->group,
                   (unsigned long long)at->row * KVT_TOKENS, (unsigned)layer);
}

/* Decode n layers whose payloads are there, from `first` on. */
static kvt_status run(batch *b, uint64_t number, uint32_t first, size_t n)
{
    kvt_snap_parser *p = b->p;
    size_t i;

    kvt_snap_jobs_run(&p->jobs, decode_layer, b, n, b->image_bytes);
    for (i = 0; i < n; i++) {
        kvt_snap_job *job = &p->jobs.jobs[i];
        if (job->status != KVT_OK) {
            set_place(p, number, b->at, first + (uint32_t)i);
            return kvt_snap_set_failed(p, job->status, &b->faults[i]);
        }
        p->counts.stored_bytes += b->stored[i];
        memcpy(p->digests.data + KVT_SNAP_ID_HEAD + (first + i) * (size_t)KVT_SNAP_ID_BYTES,
               job->digest, KVT_SNAP_ID_BYTES);
    }
    return kvt_snap_tell(p, (uint64_t)n * b->image_bytes);
}

/* The sink's memory for a layer, or the job's own. */
static kvt_status set_target(batch *b, uint32_t layer, kvt_snap_job *job)
{
    kvt_snap_parser *p = b->p;
    kvt_status status = KVT_OK;

    job->layer = layer;
    job->to = NULL;
    if (p->sink->place)
        status = p->sink->place(p->sink->user, b->at, layer, &job->to);
    if (status == KVT_OK && !job->to) {
        status = kvt_snap_reserve(p->context, &job->image, 0, b->image_bytes, "a layer's image");
        job->to = job->image.data;
    }
    return status;
}

static kvt_status read_sets(batch *b, uint64_t number, uint32_t n_layers)
{
    kvt_snap_parser *p = b->p;
    uint32_t first;

    for (first = 0; first < n_layers; first += (uint32_t)p->jobs.n) {
        size_t n = n_layers - first < p->jobs.n ? n_layers - first : p->jobs.n, i;
        kvt_status status = KVT_OK;
        for (i = 0; i < n; i++) {
            kvt_snap_job *job = &p->jobs.jobs[i];
            kvt_snap_section s;
            status = kvt_snap_expect(p, KVT_SNAP_LAYER, first + i, &s);
            if (status != KVT_OK)
                return status;
            set_place(p, number, b->at, first + (uint32_t)i);
            status =
                kvt_snap_take_set(p, &s, b->n_streams, b->native_bytes, &job->section, &job->from);
            job->bytes = (size_t)s.bytes;
            if (status == KVT_OK)
                status = set_target(b, first + (uint32_t)i, job);
            if (status != KVT_OK)
                return status;
        }
        status = run(b, number, first, n);
        if (status != KVT_OK)
            return status;
    }
    return KVT_OK;
}

/* Images in memory that are used, or verified, where they lie. */
static kvt_status read_mapped(batch *b, uint64_t number, uint32_t n_layers,
                              const unsigned char *images)
{
    kvt_snap_parser *p = b->p;
    uint32_t first;

    if (p->sink->lazy)
        return kvt_snap_tell(p, n_layers * (uint64_t)b->image_bytes);
    for (first = 0; first < n_layers; first += (uint32_t)p->jobs.n) {
        size_t n = n_layers - first < p->jobs.n ? n_layers - first : p->jobs.n, i;
        kvt_status status;
        for (i = 0; i < n; i++) {
            p->jobs.jobs[i].layer = first + (uint32_t)i;
            p->jobs.jobs[i].to = NULL;
            p->jobs.jobs[i].from = images + (first + i) * b->image_bytes;
        }
        status = run(b, number, first, n);
        if (status != KVT_OK)
            return status;
    }
    return KVT_OK;
}

/* A read of one of n images by its place has failed: once more, for the reason. */
static kvt_status read_failed(batch *b, size_t n)
{
    kvt_snap_parser *p = b->p;
    size_t i;

    for (i = 0; i < n; i++) {
        kvt_status status = kvt_snap_take(p, p->jobs.jobs[i].to, b->image_bytes);
        if (status != KVT_OK)
            return status;
    }
    return kvt_snap_fail(p->context, KVT_ERR_IO, "reading a snapshot failed before offset %llu",
                         (unsigned long long)p->offset);
}

static kvt_status read_images(batch *b, uint64_t number, uint32_t n_layers, int *taken)
{
    kvt_snap_parser *p = b->p;
    uint64_t pad, images = (uint64_t)n_layers * b->image_bytes;
    unsigned char zeros[KVT_SNAP_ALIGN];
    const unsigned char *view = p->input->memory;
    uint32_t first;
    size_t i;
    int by_places;
    kvt_snap_section s;
    kvt_status status = kvt_snap_expect(
        p, KVT_SNAP_IMAGES, (0 - (p->offset + KVT_SNAP_SECTION_BYTES)) % KVT_SNAP_ALIGN, &s);

    if (status != KVT_OK)
        return status;
    pad = s.value;
    if (s.bytes != pad + images)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
    status = kvt_snap_take(p, zeros, (size_t)pad);
    if (status != KVT_OK)
        return status;
    for (i = 0; i < pad; i++)
        if (zeros[i])
            return kvt_snap_corrupt(p, "padding that is not zero");
    if (p->input->mapped && p->sink->map && images <= p->remaining) {
        view += p->offset;
        status = p->sink->map(p->sink->user, b->at, p->input->mapped, p->n_here, view,
                              view + images + KVT_SNAP_SECTION_BYTES + KVT_SNAP_ID_BYTES, taken);
        if (status != KVT_OK)
            return status;
        if (*taken) {
            (void)kvt_snap_take_view(p, (size_t)images);
            return read_mapped(b, number, n_layers, view);
        }
    }
    /* Several threads read at once what a file has: all of it is there, by its size. */
    by_places = p->jobs.n > 1 && p->input->read_at && images <= p->remaining;
    for (first = 0; first < n_layers; first += (uint32_t)p->jobs.n) {
        size_t n = n_layers - first < p->jobs.n ? n_layers - first : p->jobs.n;
        b->read_at = by_places ? p->offset : 0;
        for (i = 0; i < n; i++) {
            kvt_snap_job *job = &p->jobs.jobs[i];
            set_place(p, number, b->at, first + (uint32_t)i);
            status = set_target(b, first + (uint32_t)i, job);
            if (status != KVT_OK)
                return status;
            job->from = NULL;
            if (by_places)
                continue;
            /* Of a file to where it stays: hashed there, while it is in a cache of the core. */
            job->from = p->input->memory ? kvt_snap_take_view(p, b->image_bytes) : NULL;
            if (!job->from)
                status = kvt_snap_take(p, job->to, b->image_bytes);
            if (status != KVT_OK)
                return status;
        }
        status = run(b, number, first, n);
        if (status == KVT_ERR_IO && by_places)
            return read_failed(b, n);
        if (status != KVT_OK)
            return status;
        if (by_places)
            kvt_snap_skip(p, (uint64_t)n * b->image_bytes);
    }
    return KVT_OK;
}

/* The digests section: that all layers make what it says, and what it says makes the id. */
static kvt_status read_digests(batch *b, uint64_t number, uint32_t n_layers, int unread,
                               const unsigned char *wanted, unsigned char *id)
{
    kvt_snap_parser *p = b->p;
    size_t bytes = n_layers * (size_t)KVT_SNAP_ID_BYTES, i;
    unsigned char *digests = p->digests.data + KVT_SNAP_ID_HEAD, unused[KVT_SNAP_ID_BYTES];
    kvt_snap_section s;
    kvt_status status = kvt_snap_expect(p, KVT_SNAP_DIGESTS, number, &s);

    if (status == KVT_OK)
        status = kvt_snap_take_summed(p, &s, KVT_SNAP_ID_BYTES + bytes, KVT_SNAP_ID_BYTES + bytes,
                                      unused);
    if (status != KVT_OK)
        return status;
    if (unread)
        memcpy(digests, p->payload.data + KVT_SNAP_ID_BYTES, bytes);
#ifndef KVT_FUZZING
    for (i = 0; i < n_layers; i++)
        if (memcmp(digests + i * KVT_SNAP_ID_BYTES, p->payload.data + (i + 1) * KVT_SNAP_ID_BYTES,
                   KVT_SNAP_ID_BYTES) != 0) {
            set_place(p, number, b->at, (uint32_t)i);
            return kvt_snap_corrupt(p, "its bytes do not make its digest");
        }
#endif
    memcpy(digests, p->payload.data + KVT_SNAP_ID_BYTES, bytes);
    kvt_put32(p->digests.data, b->at->tokens);
    kvt_put32(p->digests.data + 4, b->at->form);
    kvt_snap_digest(p->digests.data, KVT_SNAP_ID_HEAD + bytes, id);
    (void)snprintf(p->place, sizeof p->place, "block %llu (group %u, tokens from %llu)",
                   (unsigned long long)number, (unsigned)b->at->group,
                   (unsigned long long)b->at->row * KVT_TOKENS);
#ifdef KVT_FUZZING
    memcpy(id, p->payload.data, KVT_SNAP_ID_BYTES);
#else
    if (memcmp(id, p->payload.data, KVT_SNAP_ID_BYTES) != 0)
        return kvt_snap_corrupt(p, "its digests do not make its id");
#endif
    if (wanted && memcmp(id, wanted, KVT_SNAP_ID_BYTES) != 0)
        return kvt_snap_corrupt(p, "it is another block than its child names");
    return KVT_OK;
}

static kvt_status read_layers(batch *b, uint64_t number, uint32_t n_layers,
                              const unsigned char *wanted, unsigned char *id)
{
    kvt_snap_parser *p = b->p;
    int taken = 0;
    kvt_status status =
        b->native ? read_images(b, number, n_layers, &taken) : read_sets(b, number, n_layers);

    if (status == KVT_OK)
        status = read_digests(b, number, n_layers, taken && p->sink->lazy, wanted, id);
    if (status != KVT_OK)
        return status;
    p->counts.n_native_blocks += (uint64_t)b->native;
    p->counts.native_bytes += (uint64_t)n_layers * b->native_bytes;
    return p->sink->block ? p->sink->block(p->sink->user, b->at, id) : KVT_OK;
}

kvt_status kvt_snap_read_block(kvt_snap_parser *p, uint64_t number, const kvt_snap_block *at,
                               const unsigned char *entry, const unsigned char *wanted,
                               unsigned char *id)
{
    const kvt_snapshot_group *geometry = &p->header->groups[at->group];
    uint32_t stored_as = at->group;
    uint32_t v_dim = geometry->flags & KVT_GROUP_V_IN_K ? 0 : geometry->v_dim;
    unsigned char bytes[KVT_SNAP_BLOCK_BYTES], known[16];
    void *memory;
    batch b;
    kvt_snap_section s;
    kvt_status status = kvt_snap_expect(p, KVT_SNAP_BLOCK, number, &s);

    if (status != KVT_OK)
        return status;
    if (s.bytes != sizeof bytes)
        return kvt_snap_corrupt(p, "its size is %llu", (unsigned long long)s.bytes);
    status = kvt_snap_take(p, bytes, sizeof bytes);
    if (status != KVT_OK)
        return status;
    if (!kvt_snap_same_sum(kvt_get64(bytes + 32), kvt_snap_sum(bytes, 32)))
        return kvt_snap_corrupt(p, "checksum of its payload");
    memcpy(known, bytes, sizeof known);
    if (!entry) { /* of a parent: wherever it stood there, it is the same block */
        kvt_put32(known + 8, at->tokens);
        kvt_put32(known + 12, at->form);
        entry = known;
        stored_as = kvt_get32(bytes);
        if (stored_as >= p->header->n_groups ||
            p->header->groups[stored_as].n_layers != geometry->n_layers ||
            !kvt_snap_has_form(&p->header->groups[stored_as], at->form) ||
            p->groups[stored_as].layouts[at->form].layer_bytes !=
                p->groups[at->group].layouts[at->form].layer_bytes)
            return kvt_snap_corrupt(p, "it is of a group whose blocks are others");
    }
    if (memcmp(bytes, entry, sizeof known) != 0)
        return kvt_snap_corrupt(p, "it is not the block that the block table lists");
    if (kvt_get32(bytes + 16) != geometry->n_layers)
        return kvt_snap_corrupt(p, "%u layers where %u belong", (unsigned)kvt_get32(bytes + 16),
                                (unsigned)geometry->n_layers);
    if (kvt_get32(bytes + 20) > 1)
        return kvt_snap_fail(p->context, KVT_ERR_FORMAT,
                             "%ssnapshot with a block in layout %u, which this build does not know",
                             p->name, (unsigned)kvt_get32(bytes + 20));
    if (kvt_get64(bytes + 24))
        return kvt_snap_corrupt(p, "a reserved field that is not zero");
    memset(&b, 0, sizeof b);
    b.p = p;
    b.at = at;
    b.group = &p->groups[at->group];
    b.stored_as = &p->groups[stored_as];
    b.native = (int)kvt_get32(bytes + 20);
    b.image_bytes = b.group->layouts[at->form].layer_bytes;
    b.n_streams = kvt_snap_shapes(&p->header->groups[stored_as], at->form, at->tokens, b.shapes,
                                  &b.native_bytes);
    status = kvt_snap_alloc(p->context, p->jobs.n * (sizeof *b.faults + sizeof *b.stored),
                            "a snapshot's layers", &memory);
    if (status != KVT_OK)
        return status;
    b.stored = memory;
    b.faults = (kvt_snap_fault *)(void *)(b.stored + p->jobs.n);
    status = read_layers(&b, number, geometry->n_layers, wanted, id);
    kvt_snap_free(p->context, memory, p->jobs.n * (sizeof *b.faults + sizeof *b.stored));
    if (status != KVT_OK)
        return status;
    p->counts.n_elements += (uint64_t)geometry->n_layers * geometry->n_kv_heads *
                            (geometry->k_dim + v_dim) * at->tokens;
    return kvt_snap_note(p, &s, id);
}
