/*
 * Describe and verify a snapshot without a cache.
 */
#include "src/snapshot/crypt.h"

typedef struct inspection {
    const kvt_snap_context *context;
    const kvt_inspect_options *options;
    kvt_snapshot_info info;
} inspection;

/* The file as it is read: of an encrypted one, also what decrypting takes away. */
typedef struct counted {
    const kvt_reader *from;
    uint64_t bytes;
} counted;

static int64_t read_counted(void *user, void *data, size_t bytes)
{
    counted *c = user;
    int64_t n = c->from->read(c->from->user, data, bytes);

    if (n > 0)
        c->bytes += (uint64_t)n;
    return n;
}

static kvt_status on_parent(void *user, const kvt_snap_parent *parent)
{
    kvt_snapshot_info *info = &((inspection *)user)->info;
    memcpy(info->parent_id, parent->id, sizeof info->parent_id);
    memcpy(info->parent_name, parent->name, parent->name_bytes + (size_t)1);
    info->depth = parent->depth;
    info->inherited_tokens = parent->inherited;
    return KVT_OK;
}

static kvt_status on_sequence(void *user, int32_t next_position, const unsigned char *tag,
                              uint32_t tag_bytes)
{
    kvt_snapshot_info *info = &((inspection *)user)->info;
    info->next_position = next_position;
    info->tag_bytes = tag_bytes;
    if (tag_bytes)
        memcpy(info->tag, tag, tag_bytes);
    return KVT_OK;
}

static kvt_status on_piece(void *user, const kvt_snapshot_piece *piece)
{
    const inspection *i = user;
    return i->options->on_piece && i->options->on_piece(i->options->piece_user, piece)
               ? kvt_snap_fail(i->context, KVT_ERR_CANCELLED, "cancelled by on_piece")
               : KVT_OK;
}

static kvt_status on_progress(void *user, uint64_t done, uint64_t total)
{
    const inspection *i = user;
    return i->options->progress && i->options->progress(i->options->progress_user, done, total)
               ? kvt_snap_fail(i->context, KVT_ERR_CANCELLED, "cancelled by progress")
               : KVT_OK;
}

static void describe(kvt_snapshot_info *info, const kvt_snap_header *header,
                     const kvt_snap_counts *counts)
{
    uint32_t g, i, n = 0;

    info->struct_size = sizeof *info;
    info->version = KVT_SNAP_VERSION;
    info->n_groups = header->n_groups;
    info->n_layers = header->n_layers;
    for (g = 0; g < header->n_groups; g++) {
        info->groups[g] = header->groups[g];
        for (i = 0; i < header->groups[g].n_layers; i++)
            info->layer_groups[header->layers[n++]] = (uint8_t)g;
    }
    memcpy(info->fingerprint, header->fingerprint, sizeof info->fingerprint);
    info->fingerprint_bytes = header->fingerprint_bytes;
    info->n_tokens = header->n_tokens;
    info->n_blocks = header->n_blocks;
    info->file_bytes = counts->file_bytes;
    info->stored_bytes = counts->stored_bytes;
    info->native_bytes = counts->native_bytes;
    info->n_elements = counts->n_elements;
    info->n_open_blocks = counts->n_open_blocks;
    info->n_checkpoints = counts->n_checkpoints;
    info->inherited_blocks = counts->n_inherited_blocks;
    info->native_blocks = counts->n_native_blocks;
    info->n_pieces = counts->n_pieces;
    memcpy(info->snapshot_id, counts->id, sizeof info->snapshot_id);
}

/* Nothing may follow the snapshot. */
static kvt_status expect_end(const kvt_snap_input *input, const kvt_snap_crypt *crypt,
                             kvt_snap_file *file, const char *path)
{
    unsigned char byte;
    int64_t n = crypt ? input->reader.read(input->reader.user, &byte, 1) : 0;

    if (n > 0)
        return kvt_snap_fail(file->context, KVT_ERR_CORRUPT,
                             "snapshot damaged: there are bytes after its end: %s", path);
    return n < 0 ? KVT_ERR_IO : kvt_snap_file_expect_end(file, path);
}

/* A failed read: why. */
static kvt_status explain(kvt_status status, const kvt_snap_crypt *crypt, const kvt_snap_file *file,
                          const char *path)
{
    kvt_status why = KVT_OK;

    if (status != KVT_ERR_IO)
        return status;
    if (crypt)
        why = kvt_snap_crypt_failure(crypt);
    if (why == KVT_OK)
        why = kvt_snap_file_failure(file, path);
    return why != KVT_OK ? why : status;
}

/* The file is open. */
static kvt_status read_file(inspection *i, kvt_snap_file *file, const kvt_reader *reader,
                            const char *path, kvt_snap_header *header)
{
    char folder[KVT_SNAP_PATH_BYTES];
    size_t n = kvt_snap_folder_bytes(path);
    kvt_snap_crypt crypt, *decrypts = NULL;
    counted coded = {reader, 0};
    kvt_reader counts_coded = {&coded, read_counted};
    kvt_snap_counts counts;
    kvt_snap_input input;
    kvt_snap_sink sink;
    kvt_status status = KVT_OK;

    memset(&input, 0, sizeof input);
    memset(&sink, 0, sizeof sink);
    memset(&counts, 0, sizeof counts);
    input.folder = i->options->folder;
    if (!input.folder && n < sizeof folder) { /* it was opened, so it is */
        memcpy(folder, path, n);
        folder[n] = '\0';
        input.folder = folder;
    }
    input.key = i->options->key;
    input.reader = *reader;
    input.bytes = file->bytes;
    if (!input.key)
        input.view = kvt_snap_file_view;
    sink.user = i;
    sink.parent = on_parent;
    sink.sequence = on_sequence;
    sink.piece = on_piece;
    sink.progress = on_progress;
    if (input.key) {
        decrypts = &crypt;
        input.bytes = UINT64_MAX;
        i->info.encrypted = 1;
        status =
            kvt_snap_decrypt_begin(i->context, input.key, &counts_coded, &crypt, &input.reader);
    }
    if (status == KVT_OK)
        status = kvt_snap_read(i->context, &input, !i->options->verify, &sink, header, &counts);
    if (status == KVT_OK && i->options->verify)
        status = expect_end(&input, decrypts, file, path);
    status = explain(status, decrypts, file, path);
    if (decrypts) {
        kvt_snap_crypt_release(&crypt);
        counts.file_bytes = coded.bytes;
    }
    if (status == KVT_OK)
        describe(&i->info, header, &counts);
    return status;
}

kvt_status kvt_snapshot_inspect_with(const char *path, const kvt_inspect_options *options,
                                     kvt_snapshot_info *info, char *error_text,
                                     size_t error_text_bytes)
{
    kvt_snap_context context;
    kvt_snap_header *header;
    kvt_inspect_options copy;
    kvt_snap_file file;
    kvt_reader reader;
    inspection *i;
    void *memory;
    kvt_status status;

    memset(&context, 0, sizeof context);
    memset(&copy, 0, sizeof copy);
    context.text = error_text;
    context.text_bytes = error_text_bytes;
    if (error_text && error_text_bytes)
        error_text[0] = '\0';
    if (!path || !*path || !info)
        return kvt_snap_fail(&context, KVT_ERR_ARG, "no %s", info ? "path" : "info");
    if (info->struct_size != sizeof *info)
        return kvt_snap_fail(&context, KVT_ERR_ARG, "info.struct_size is %zu, not %zu",
                             info->struct_size, sizeof *info);
    if (options &&
        (!kvt_copy_struct(&copy, options, sizeof copy) || copy.verify > 1 || copy.reserved))
        return kvt_snap_fail(&context, KVT_ERR_ARG,
                             "inspect options: unknown struct_size, or verify or reserved");
    status = kvt_snap_alloc(&context, sizeof *i + sizeof *header, "a snapshot's header", &memory);
    if (status != KVT_OK)
        return status;
    i = memory;
    header = (kvt_snap_header *)(void *)(i + 1);
    memset(i, 0, sizeof *i);
    i->context = &context;
    i->options = &copy;
    status = kvt_snap_file_open(&context, path, &file, &reader);
    if (status == KVT_OK)
        status = read_file(i, &file, &reader, path, header);
    if (status == KVT_OK)
        *info = i->info;
    kvt_snap_file_close(&file);
    kvt_snap_free(&context, memory, sizeof *i + sizeof *header);
    return status;
}

kvt_status kvt_snapshot_inspect(const char *path, int verify, kvt_snapshot_info *info,
                                char *error_text, size_t error_text_bytes)
{
    kvt_inspect_options options;

    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.verify = verify != 0;
    return kvt_snapshot_inspect_with(path, &options, info, error_text, error_text_bytes);
}
