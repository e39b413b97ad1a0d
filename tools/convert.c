/*
 * kvtile convert: a snapshot into another file.
 */
#include "tool.h"

#include <stdio.h>
#include <string.h>

typedef struct target {
    tool_output out;
    uint64_t done, total; /* bytes; the total is about that of the input */
} target;

static int write_part(void *user, const void *data, size_t bytes)
{
    target *to = user;

    if (output_write(&to->out, data, bytes) != 0)
        return 1;
    to->done += bytes;
    return progress_step(NULL, to->done, to->total);
}

static int fail_seq(const tool_options *o, const tool_source *s, kvt_status status)
{
    char text[TOOL_TEXT] = "";

    (void)kvt_cache_error(s->cache, text, sizeof text);
    return tool_fail(o, s->path, status, "%s", *text ? text : kvt_status_string(status));
}

static int save(const tool_options *o, const tool_source *s, target *to)
{
    kvt_writer writer;
    kvt_save_options options;
    kvt_status status;

    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.codec = o->codec;
    options.zstd_level = o->level;
    writer.user = to;
    writer.write = write_part;
    to->total = kvt_seq_memory_bytes(s->seq);
    progress_begin(o, s->path, "writing");
    if (output_open(&to->out, o->files[1], o->force) != 0)
        return tool_fail(o, o->files[1], KVT_ERR_IO, "%s", to->out.text);
    status = kvt_seq_save_stream(s->seq, &writer, &options);
    if (*to->out.text == '\0' && status != KVT_OK) {
        output_discard(&to->out);
        return fail_seq(o, s, status);
    }
    if (*to->out.text || output_commit(&to->out) != 0)
        return tool_fail(o, o->files[1], KVT_ERR_IO, "%s", to->out.text);
    progress_end();
    return SOUND;
}

int convert_run(const tool_options *o)
{
    char text[TOOL_TEXT];
    tool_source s;
    target to;
    kvt_status status = KVT_OK;
    int code;

    memset(&s, 0, sizeof s);
    memset(&to, 0, sizeof to);
    if (output_check(o->files[1], o->force, text, sizeof text) != 0)
        return tool_fail(o, o->files[1], KVT_ERR_IO, "%s", text);
    code = source_load(&s, o->files[0], o);
    if (code == SOUND && o->end != UINT64_MAX) {
        if (o->end > s.info.n_tokens)
            code = tool_refuse(o, s.path, "it has %llu tokens, not %llu",
                               (unsigned long long)s.info.n_tokens, (unsigned long long)o->end);
        else
            status = kvt_seq_truncate(s.seq, o->end);
        if (status != KVT_OK)
            code = fail_seq(o, &s, status);
    }
    if (code == SOUND)
        code = save(o, &s, &to);
    if (code == SOUND && o->json) {
        json_begin(s.path, KVT_OK);
        printf(",\"output\":");
        json_string(o->files[1]);
        printf(",\"n_tokens\":%llu,\"file_bytes\":%llu}\n",
               (unsigned long long)kvt_seq_length(s.seq), (unsigned long long)to.done);
    } else if (code == SOUND && !o->quiet && strcmp(o->files[1], "-") != 0) {
        printf("%s: %llu tokens, %llu bytes\n", o->files[1],
               (unsigned long long)kvt_seq_length(s.seq), (unsigned long long)to.done);
    }
    source_release(&s);
    return code;
}
