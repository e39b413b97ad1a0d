/*
 * Load a snapshot into a sequence.
 *
 * The reader verifies, the stage takes what it delivers (stage.h). Only when the end has been read
 * and verified does the sequence give its blocks up and take the new ones, which cannot fail.
 */
#include "src/snapshot/crypt.h"
#include "src/snapshot/stage.h"

/* How to go on with the prompt: see kvt_load_result. */
static void answer(const kvt_snap_stage *st, const kvt_seq *seq, kvt_load_result *result)
{
    const kvt_load_options *o = st->options;
    const kvt_checkpoint *checkpoint;
    uint64_t most;

    memset(result, 0, sizeof *result);
    result->n_tokens = seq->length;
    most = result->prefix_tokens = st->prefix_tokens;
    if (o->n_prompt && most == o->n_prompt)
        most--;
    checkpoint = kvt_checkpoint_before(seq, most);
    result->reuse_tokens = kvt_seq_reachable(seq, most);
    result->checkpoint_tokens = checkpoint ? checkpoint->n_tokens : UINT64_MAX;
}

/* Cut to what the prompt can use: no step is pending and it can be reached, so it does not fail. */
static kvt_status cut(kvt_seq *seq, uint32_t reuse, kvt_load_result *result)
{
    uint64_t n = reuse == KVT_REUSE_PREFIX                 ? result->reuse_tokens
                 : result->checkpoint_tokens == UINT64_MAX ? 0
                                                           : result->checkpoint_tokens;
    kvt_status status;

    if (n == seq->length)
        return KVT_OK;
    status = kvt_seq_truncate(seq, n);
    result->n_tokens = seq->length;
    if (result->reuse_tokens > seq->length)
        result->reuse_tokens = seq->length;
    return status;
}

/* The checks that all forms share. *copy: the options, or the defaults. */
static kvt_status admit(const kvt_seq *seq, const kvt_load_options *options, kvt_load_options *copy)
{
    uint32_t i;

    memset(copy, 0, sizeof *copy);
    if (options) {
        if (!kvt_copy_struct(copy, options, sizeof *copy))
            return kvt_fail(seq->cache, KVT_ERR_ARG, "load options: unknown struct_size");
        if (!copy->prompt && copy->n_prompt)
            return kvt_fail(seq->cache, KVT_ERR_ARG, "load options: prompt is NULL");
        if (copy->reuse > KVT_REUSE_CHECKPOINT || copy->map > KVT_MAP_LAZY || copy->convert > 1)
            return kvt_fail(seq->cache, KVT_ERR_ARG, "load options: reuse %u, map %u or convert %u",
                            (unsigned)copy->reuse, (unsigned)copy->map, (unsigned)copy->convert);
        if (copy->layers ? copy->n_layers != seq->cache->n_layers : copy->n_layers != 0)
            return kvt_fail(seq->cache, KVT_ERR_ARG,
                            "load options: n_layers is %u, the cache's is %u",
                            (unsigned)copy->n_layers, (unsigned)seq->cache->n_layers);
        for (i = 1; i < copy->n_layers; i++)
            if (copy->layers[i] <= copy->layers[i - 1])
                return kvt_fail(seq->cache, KVT_ERR_ARG, "load options: layers do not ascend");
        if (copy->reuse && !copy->n_prompt)
            return kvt_fail(seq->cache, KVT_ERR_ARG, "load options: reuse without a prompt");
        if (copy->map && copy->key)
            return kvt_fail(seq->cache, KVT_ERR_UNSUPPORTED,
                            "load: an encrypted snapshot cannot be mapped");
    }
    if (seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE, "load: a step is pending");
    return KVT_OK;
}

/* Reading memory by way of a reader: what is encrypted. */
typedef struct view {
    const unsigned char *data;
    size_t bytes, at;
} view;

/* What is read from, beside the bytes. */
typedef struct origin {
    kvt_snap_input input;
    kvt_snap_file *file; /* NULL: none */
    const char *path;    /* of it */
    int whole;           /* the snapshot fills it */
    const view *view;    /* memory by way of a reader, NULL: none */
    const kvt_snap_crypt *crypt;
} origin;

/* A failed read: why. */
static kvt_status explain(const origin *from, kvt_status status)
{
    kvt_status why = KVT_OK;

    if (status != KVT_ERR_IO)
        return status;
    if (from->crypt)
        why = kvt_snap_crypt_failure(from->crypt);
    if (why == KVT_OK && from->file)
        why = kvt_snap_file_failure(from->file, from->path);
    return why != KVT_OK ? why : status;
}

/* Nothing may follow the snapshot in what it fills. */
static kvt_status expect_end(const kvt_snap_stage *st, const origin *from, uint64_t bytes)
{
    unsigned char byte;
    int64_t n = 0;

    if (from->crypt) /* a container is the snapshot's, whatever follows it in a stream */
        n = from->input.reader.read(from->input.reader.user, &byte, 1);
    if (!from->whole && n == 0)
        return KVT_OK;
    if (n < 0)
        return KVT_ERR_IO;
    if (n > 0 || (from->input.memory && bytes != from->input.bytes) ||
        (from->view && from->view->at != from->view->bytes))
        return kvt_fail(st->seq->cache, KVT_ERR_CORRUPT,
                        "snapshot damaged: there are bytes after its end%s%s",
                        from->path ? ": " : "", from->path ? from->path : "");
    return !from->input.memory && from->file ? kvt_snap_file_expect_end(from->file, from->path)
                                             : KVT_OK;
}

static kvt_status load(kvt_seq *seq, const kvt_snap_context *context, const origin *from,
                       const kvt_load_options *options, kvt_load_result *result)
{
    kvt_load_result found;
    kvt_snap_counts counts;
    kvt_snap_header *header;
    kvt_snap_sink sink;
    kvt_snap_stage st;
    void *memory;
    kvt_status status;

    memset(&counts, 0, sizeof counts);
    kvt_snap_stage_begin(&st, context, seq, options, &sink);
    status = kvt_snap_alloc(context, sizeof *header, "a snapshot's header", &memory);
    if (status != KVT_OK)
        return status;
    header = memory;
    status = kvt_snap_read(context, &from->input, 0, &sink, header, &counts);
    if (status == KVT_OK)
        status = expect_end(&st, from, counts.file_bytes);
    status = explain(from, status);
    if (status == KVT_OK)
        status = kvt_snap_stage_complete(&st, header);
    if (status == KVT_OK) {
        kvt_checkpoints_drop_from(seq, 0);
        kvt_turns_free(seq->cache, seq->turns);
        seq->turns = NULL;
        kvt_rows_replace(seq, &st.made);
        kvt_rows_settle(seq, 1);
        if (seq->length && (header->flags & KVT_SNAP_UNKEYED || kvt_snap_stage_converts(&st)))
            seq->unkeyed_from = 0;
        answer(&st, seq, &found);
        if (options->reuse)
            status = cut(seq, options->reuse, &found);
        found.mapped_bytes = kvt_snap_maps_bytes(&st.maps);
        if (status == KVT_OK && result)
            *result = found;
    } else {
        kvt_snap_stage_drop(&st);
    }
    kvt_snap_stage_release(&st);
    kvt_rows_settle(seq, 0);
    kvt_snap_free(context, header, sizeof *header);
    return status;
}

/* The same, decrypted where there is a key. */
static kvt_status load_from(kvt_seq *seq, const kvt_snap_context *context, origin *from,
                            const kvt_load_options *options, kvt_load_result *result)
{
    kvt_snap_crypt crypt;
    kvt_reader reader, plain;
    kvt_status status;

    if (!from->input.folder)
        from->input.folder = options->folder;
    from->input.key = options->key;
    if (!options->key)
        return load(seq, context, from, options, result);
    reader = from->input.reader;
    status = kvt_snap_decrypt_begin(context, options->key, &reader, &crypt, &plain);
    if (status == KVT_ERR_IO)
        status = explain(from, status);
    if (status == KVT_OK) {
        from->input.reader = plain;
        from->input.bytes = UINT64_MAX;
        from->crypt = &crypt;
        status = load(seq, context, from, options, result);
    }
    kvt_snap_crypt_release(&crypt);
    return status;
}

static origin origin_of(const kvt_reader *reader)
{
    origin from;
    memset(&from, 0, sizeof from);
    if (reader)
        from.input.reader = *reader;
    from.input.bytes = UINT64_MAX;
    return from;
}

/* What all loads begin with. */
static kvt_status begin(const kvt_seq *seq, const kvt_load_options *options,
                        kvt_snap_context *context, kvt_load_options *copy)
{
    memset(context, 0, sizeof *context);
    context->cache = seq->cache;
    return admit(seq, options, copy);
}

static kvt_status refuse_map(const kvt_seq *seq, const kvt_load_options *options)
{
    return options->map ? kvt_fail(seq->cache, KVT_ERR_ARG, "load: only a file can be mapped")
                        : KVT_OK;
}

kvt_status kvt_seq_load_stream(kvt_seq *seq, const kvt_reader *reader,
                               const kvt_load_options *options, kvt_load_result *result)
{
    kvt_snap_context context;
    kvt_load_options copy;
    origin from;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!reader || !reader->read)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "load: no reader");
    status = begin(seq, options, &context, &copy);
    if (status == KVT_OK)
        status = refuse_map(seq, &copy);
    if (status != KVT_OK)
        return status;
    from = origin_of(reader);
    return load_from(seq, &context, &from, &copy, result);
}

kvt_status kvt_seq_load_fd(kvt_seq *seq, int fd, const kvt_load_options *options,
                           kvt_load_result *result)
{
    kvt_snap_context context;
    kvt_load_options copy;
    kvt_snap_file file;
    kvt_reader reader;
    origin from;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (fd < 0)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "load: file descriptor %d", fd);
    status = begin(seq, options, &context, &copy);
    if (status == KVT_OK)
        status = refuse_map(seq, &copy);
    if (status != KVT_OK)
        return status;
    kvt_snap_file_of_fd(&context, fd, &file, NULL, &reader);
    from = origin_of(&reader);
    from.file = &file;
    from.path = "the file descriptor";
    return load_from(seq, &context, &from, &copy, result);
}

static int64_t read_memory(void *user, void *data, size_t bytes)
{
    view *v = user;
    if (bytes > v->bytes - v->at)
        bytes = v->bytes - v->at;
    memcpy(data, v->data + v->at, bytes);
    v->at += bytes;
    return (int64_t)bytes;
}

kvt_status kvt_seq_load_memory(kvt_seq *seq, const void *data, size_t bytes,
                               const kvt_load_options *options, kvt_load_result *result)
{
    kvt_snap_context context;
    kvt_load_options copy;
    origin from;
    view v = {data, bytes, 0};
    kvt_reader reader = {&v, read_memory};
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!data)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "load: no memory");
    status = begin(seq, options, &context, &copy);
    if (status == KVT_OK)
        status = refuse_map(seq, &copy);
    if (status != KVT_OK)
        return status;
    from = origin_of(copy.key ? &reader : NULL);
    from.whole = 1;
    if (copy.key) {
        from.view = &v;
    } else {
        from.input.memory = data;
        from.input.bytes = bytes;
    }
    return load_from(seq, &context, &from, &copy, result);
}

kvt_status kvt_seq_load(kvt_seq *seq, const char *path, const kvt_load_options *options,
                        kvt_load_result *result)
{
    char folder[KVT_SNAP_PATH_BYTES];
    kvt_snap_context context;
    kvt_load_options copy;
    kvt_snap_mapped mapped;
    kvt_snap_file file;
    kvt_reader reader;
    origin from;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!path || !*path)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "load: no path");
    status = begin(seq, options, &context, &copy);
    if (status != KVT_OK)
        return status;
    memset(&mapped, 0, sizeof mapped);
    status = kvt_snap_file_open(&context, path, &file, &reader);
    if (status == KVT_OK) {
        size_t n = kvt_snap_folder_bytes(path);
        from = origin_of(&reader);
        from.file = &file;
        from.path = path;
        from.whole = 1;
        from.input.bytes = file.bytes;
        if (!copy.key) {
            from.input.view = kvt_snap_file_view;
            from.input.read_at = file.bytes == UINT64_MAX ? NULL : kvt_snap_file_part;
            from.input.skip = kvt_snap_file_skip;
        }
        if (n < sizeof folder) { /* it was opened, so it is */
            memcpy(folder, path, n);
            folder[n] = '\0';
            from.input.folder = copy.folder ? copy.folder : folder;
        }
        if (copy.map) {
            status = kvt_snap_file_map(&file, path, &mapped);
            from.input.memory = mapped.memory;
            from.input.mapped = &mapped;
        }
        if (status == KVT_OK)
            status = load_from(seq, &context, &from, &copy, result);
        if (!mapped.owner)
            kvt_snap_unmap(&mapped);
    }
    kvt_snap_file_close(&file);
    return status;
}
