/*
 * Load file 0 with its parents beside it; go on, save a delta of it, and load that.
 */
#include "fuzz.h"

#include <stdio.h>

static void go_on(place *p, const input *in)
{
    kvt_save_options options;
    kvt_load_options load;
    kvt_status status;
    blob a, b;

    CHECK(kvt_seq_clear(p->other) == KVT_OK);
    if (kvt_seq_load(p->other, folder_file(0, NULL, 0), NULL, NULL) != KVT_OK)
        return;
    place_append(p, p->other, 1 + in->controls[CONTROL_MORE] % 128);
    save_options_of(in, p, &options);
    options.parent = folder_file(0, NULL, 0);
    options.convert = 0;
    options.n_types = 0;
    options.k_types = options.v_types = NULL;
    options.n_tokens = options.first_token = 0;
    p->meter.countdown = in->controls[CONTROL_FAIL];
    status = kvt_seq_save(p->other, folder_file(4, NULL, 0), &options);
    p->meter.countdown = 0;
    CHECK(status == KVT_OK || (status == KVT_ERR_MEMORY && in->controls[CONTROL_FAIL]) ||
          (status == KVT_ERR_BUDGET && p->config.memory_budget_bytes) ||
          (status == KVT_ERR_CORRUPT && FUZZ_UNCHECKED));
    if (status != KVT_OK)
        return;
    a = state_of(p->other);
    memset(&load, 0, sizeof load);
    load.struct_size = sizeof load;
    load.map = in->controls[CONTROL_MORE] % 3;
    status = kvt_seq_load(p->other, folder_file(4, NULL, 0), &load, NULL);
    CHECK(status == KVT_OK || (status == KVT_ERR_BUDGET && p->config.memory_budget_bytes));
    if (status == KVT_OK) {
        b = state_of(p->other);
        CHECK(same_blob(&a, &b));
        free(b.data);
    }
    CHECK(kvt_seq_clear(p->other) == KVT_OK);
    free(a.data);
}

int fuzz_chain(const uint8_t *data, size_t size)
{
    input in;
    place *p;
    kvt_status status[4];
    blob states[4];
    kvt_snapshot_info info;
    char text[256];

    input_open(&in, data, size);
    p = place_of(&in);
    for (size_t i = 0; i < in.n; i++)
        (void)folder_file(i, in.files[i], in.bytes[i]);
    for (uint32_t how = 0; how < 4; how++) {
        kvt_load_options options;
        kvt_load_result result;
        view v = {in.files[0], in.bytes[0], 0, in.controls[CONTROL_CHUNK]};
        kvt_reader reader = view_reader(&v);
        const size_t before = p->meter.live;

        memset(&result, 0, sizeof result);
        options_of(&in, p, &options);
        if (how == 3) {
            options.folder = fuzz_folder();
            status[how] = kvt_seq_load_stream(p->seq, &reader, &options, &result);
        } else {
            options.map = how;
            if (how)
                options.convert = 0;
            status[how] = kvt_seq_load(p->seq, folder_file(0, NULL, 0), &options, &result);
        }
        check_memory(p, &in, before);
        p->meter.countdown = 0;
        states[how].data = NULL;
        if (status[how] != KVT_OK) {
            check_unchanged(p);
        } else {
            states[how] = state_of(p->seq);
            check_loaded(p, p->seq, &result, how == 2);
            place_reset(p);
        }
    }
    if (!in.controls[CONTROL_FAIL] && !in.controls[CONTROL_CANCEL] && !in.controls[CONTROL_TYPES] &&
        !in.controls[CONTROL_CACHE]) {
        CHECK((status[0] == KVT_OK) == (status[1] == KVT_OK));
        CHECK(status[0] != KVT_OK || (status[2] == KVT_OK && status[3] == KVT_OK));
        /* With a prompt blocks of checkpoints behind the cut are not taken up, nor verified. */
        CHECK(!states[2].data || status[0] == KVT_OK || in.controls[CONTROL_REUSE]);
        for (uint32_t how = 1; how < 4; how++)
            if (states[0].data && states[how].data)
                CHECK(same_blob(&states[0], &states[how]));
        memset(&info, 0, sizeof info);
        info.struct_size = sizeof info;
        if (kvt_snapshot_inspect(folder_file(0, NULL, 0), 1, &info, text, sizeof text) != KVT_OK)
            CHECK(status[0] != KVT_OK || in.controls[CONTROL_LAYERS]);
    }
    go_on(p, &in);
    for (uint32_t how = 0; how < 4; how++)
        free(states[how].data);
    for (size_t i = 0; i < 5; i++)
        (void)remove(folder_file(i, NULL, 0));
    return 0;
}
