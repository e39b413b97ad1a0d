/*
 * Convert files, and save what loads as other types, ranges and layers: what comes out is a
 * snapshot that loads.
 */
#include "fuzz.h"

#include <stdio.h>

static unsigned char file_data[1 << 22];

static size_t read_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    size_t n;
    CHECK(f);
    n = fread(file_data, 1, sizeof file_data, f);
    CHECK(fclose(f) == 0);
    return n;
}

static int is_sound(const char *path)
{
    kvt_snapshot_info info;
    char text[256];
    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    return kvt_snapshot_inspect(path, 1, &info, text, sizeof text) == KVT_OK;
}

/* A file that was written by a call is a sound one, if the parent is: of that not all was read. */
static void check_written(const input *in, const char *path, const char *parent)
{
    kvt_snapshot_info info;
    char text[256];
    input made = *in;
    place *p;

    if (parent && !is_sound(parent))
        return;
    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    CHECK(kvt_snapshot_inspect(path, 1, &info, text, sizeof text) == KVT_OK);
    made.n = 1;
    made.bytes[0] = read_file(path);
    made.files[0] = file_data;
    if (made.bytes[0] == sizeof file_data || info.depth)
        return;
    memset(made.controls, 0, sizeof made.controls);
    p = place_of(&made);
    if (load64(file_data + 24) <= p->config.max_tokens) {
        kvt_load_result result;
        kvt_status status;
        memset(&result, 0, sizeof result);
        status = kvt_seq_load(p->seq, path, NULL, &result);
        /* A geometry that is too large here is another cache's. */
        CHECK(status == KVT_OK || status == KVT_ERR_MISMATCH);
        if (status == KVT_OK) {
            check_loaded(p, p->seq, &result, 0);
            place_reset(p);
        } else {
            check_unchanged(p);
        }
    }
}

int fuzz_convert(const uint8_t *data, size_t size)
{
    input in;
    place *p;
    kvt_load_options from;
    kvt_save_options to;
    kvt_load_result result;
    kvt_status status;
    char text[256];

    input_open(&in, data, size);
    if (in.bytes[0] >= 64 && load64(in.files[0] + 24) > 20000)
        return 0; /* slow */
    p = place_of(&in);
    for (size_t i = 0; i < in.n; i++)
        (void)folder_file(i, in.files[i], in.bytes[i]);
    (void)remove(folder_file(5, NULL, 0));
    (void)remove(folder_file(6, NULL, 0));

    options_of(&in, p, &from);
    p->meter.countdown = 0;
    from.prompt = NULL;
    from.n_prompt = from.reuse = from.convert = 0;
    save_options_of(&in, p, &to);
    if (in.controls[CONTROL_MORE] & 2 && in.n > 1)
        to.parent = folder_file(in.n - 1, NULL, 0);
    text[0] = 0;
    status = kvt_snapshot_convert(folder_file(0, NULL, 0), &from, folder_file(5, NULL, 0), &to,
                                  text, sizeof text);
    CHECK(status == KVT_OK || text[0]);
    if (status == KVT_OK)
        check_written(&in, folder_file(5, NULL, 0), to.parent);

    /* And with a cache in between. */
    p = place_of(&in);
    memset(&result, 0, sizeof result);
    options_of(&in, p, &from);
    status = kvt_seq_load(p->seq, folder_file(0, NULL, 0), &from, &result);
    p->meter.countdown = 0;
    if (status != KVT_OK) {
        check_unchanged(p);
    } else {
        const uint32_t odd[2] = {0, 2};
        save_options_of(&in, p, &to);
        if (in.controls[CONTROL_MORE] & 1) {
            to.layers = odd;
            to.n_layers = 1 + (in.controls[CONTROL_MORE] >> 1 & 1);
        }
        p->meter.countdown = in.controls[CONTROL_FAIL];
        status = kvt_seq_save(p->seq, folder_file(6, NULL, 0), &to);
        p->meter.countdown = 0;
        CHECK(status == KVT_OK || status == KVT_ERR_ARG || status == KVT_ERR_STATE ||
              status == KVT_ERR_VALUE || status == KVT_ERR_BUDGET ||
              status == KVT_ERR_UNSUPPORTED ||
              (status == KVT_ERR_MEMORY && in.controls[CONTROL_FAIL]));
        place_reset(p);
        if (status == KVT_OK)
            check_written(&in, folder_file(6, NULL, 0), to.parent);
    }
    for (size_t i = 0; i < 7; i++)
        (void)remove(folder_file(i, NULL, 0));
    return 0;
}
