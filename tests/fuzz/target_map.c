/*
 * Load file 0 from a file, read and mapped: what is verified answers as reading does; what is
 * verified at its first use is refused there, or is what reading gives.
 */
#include "fuzz.h"

static kvt_status once(place *p, const input *in, uint32_t map, blob *state)
{
    kvt_load_options options;
    kvt_load_result result;
    const char *path = memory_file(in->files[0], in->bytes[0]);
    const size_t before = p->meter.live;
    kvt_status status;

    memset(&result, 0, sizeof result);
    options_of(in, p, &options);
    options.map = map;
    if (map)
        options.convert = 0;
    status = kvt_seq_load(p->seq, path, &options, &result);
    check_memory(p, in, before);
    p->meter.countdown = 0;
    state->data = NULL;
    if (status != KVT_OK) {
        check_unchanged(p);
    } else {
        CHECK(map || !result.mapped_bytes);
        if (in->controls[CONTROL_MORE] & 1)
            *state = state_of(p->seq); /* else each part is verified at its use */
        check_loaded(p, p->seq, &result, map == KVT_MAP_LAZY);
        place_reset(p);
    }
    return status;
}

static void inspect(const input *in, kvt_status loaded)
{
    kvt_snapshot_info info;
    char text[256];
    const char *path = memory_file(in->files[0], in->bytes[0]);
    kvt_status status[2];
    for (int verify = 0; verify < 2; verify++) {
        memset(&info, 0, sizeof info);
        info.struct_size = sizeof info;
        text[0] = 0;
        status[verify] = kvt_snapshot_inspect(path, verify, &info, text, sizeof text);
        CHECK(status[verify] == KVT_OK || text[0]);
    }
    CHECK(status[0] == KVT_OK || status[1] != KVT_OK);
    if (loaded == KVT_OK && !in->controls[CONTROL_LAYERS])
        CHECK(status[1] == KVT_OK);
    if (loaded == KVT_OK)
        CHECK(info.file_bytes == in->bytes[0]);
}

int fuzz_map(const uint8_t *data, size_t size)
{
    input in;
    place *p;
    kvt_status status[3];
    blob states[3];

    input_open(&in, data, size);
    p = place_of(&in);
    for (uint32_t map = 0; map < 3; map++)
        status[map] = once(p, &in, map, &states[map]);
    if (!in.controls[CONTROL_FAIL] && !in.controls[CONTROL_CANCEL] && !in.controls[CONTROL_TYPES] &&
        !in.controls[CONTROL_CACHE]) {
        CHECK((status[0] == KVT_OK) == (status[1] == KVT_OK));
        CHECK(status[0] != KVT_OK || status[2] == KVT_OK);
        for (uint32_t map = 1; map < 3; map++)
            if (states[0].data && states[map].data)
                CHECK(same_blob(&states[0], &states[map]));
        /* With a prompt blocks of checkpoints behind the cut are not taken up, nor verified. */
        if (states[2].data && !in.controls[CONTROL_REUSE])
            CHECK(status[0] == KVT_OK);
        inspect(&in, status[0]);
    }
    for (uint32_t map = 0; map < 3; map++)
        free(states[map].data);
    return 0;
}
