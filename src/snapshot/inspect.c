/*
 * Describe and verify a snapshot without a cache.
 */
#include "src/snapshot/format.h"

static kvt_status on_sequence(void *user, int32_t next_position, const unsigned char *tag,
                              uint32_t tag_bytes)
{
    kvt_snapshot_info *info = user;
    info->next_position = next_position;
    info->tag_bytes = tag_bytes;
    memcpy(info->tag, tag, tag_bytes);
    return KVT_OK;
}

kvt_status kvt_snapshot_inspect(const char *path, int verify, kvt_snapshot_info *info,
                                char *error_text, size_t error_text_bytes)
{
    kvt_snap_context context;
    kvt_snap_header *header = NULL;
    kvt_snap_counts counts;
    kvt_snapshot_info found;
    kvt_snap_sink sink;
    kvt_snap_file file;
    kvt_reader reader;
    void *memory;
    kvt_status status, failure;
    uint32_t g;

    memset(&context, 0, sizeof context);
    memset(&sink, 0, sizeof sink);
    memset(&found, 0, sizeof found);
    sink.user = &found;
    sink.sequence = on_sequence;
    memset(&counts, 0, sizeof counts);
    context.text = error_text;
    context.text_bytes = error_text_bytes;
    if (error_text && error_text_bytes)
        error_text[0] = '\0';
    if (!path || !*path || !info)
        return kvt_snap_fail(&context, KVT_ERR_ARG, "no %s", info ? "path" : "info");
    if (info->struct_size != sizeof *info)
        return kvt_snap_fail(&context, KVT_ERR_ARG, "info.struct_size is %zu, not %zu",
                             info->struct_size, sizeof *info);
    status = kvt_snap_file_open(&context, path, &file, &reader);
    if (status != KVT_OK)
        goto fail;
    status = kvt_snap_alloc(&context, sizeof *header, "a snapshot's header", &memory);
    if (status != KVT_OK)
        goto fail;
    header = memory;
    status = kvt_snap_read(&context, &reader, file.bytes, !verify, &sink, header, &counts);
    if (status == KVT_ERR_IO) {
        failure = kvt_snap_file_failure(&file, path);
        status = failure != KVT_OK ? failure : status;
    }
    if (status == KVT_OK && verify)
        status = kvt_snap_file_expect_end(&file, path);
    if (status != KVT_OK)
        goto fail;
    *info = found;
    info->struct_size = sizeof *info;
    info->version = KVT_SNAP_VERSION;
    info->n_groups = header->n_groups;
    for (g = 0; g < header->n_groups; g++)
        info->groups[g] = header->groups[g];
    memcpy(info->fingerprint, header->fingerprint, sizeof info->fingerprint);
    info->fingerprint_bytes = header->fingerprint_bytes;
    info->n_tokens = header->n_tokens;
    info->n_blocks = header->n_blocks;
    info->file_bytes = counts.file_bytes;
    info->stored_bytes = counts.stored_bytes;
    info->native_bytes = counts.native_bytes;
    info->n_elements = counts.n_elements;
    info->n_open_blocks = counts.n_open_blocks;
    info->n_checkpoints = counts.n_checkpoints;
fail:
    if (header)
        kvt_snap_free(&context, header, sizeof *header);
    kvt_snap_file_close(&file);
    return status;
}
