/*
 * Load file 0 from a stream and from memory: the two answer the same.
 */
#include "fuzz.h"

static kvt_status once(place *p, const input *in, int from_memory, kvt_load_result *result,
                       blob *state)
{
    kvt_load_options options;
    view v = {in->files[0], in->bytes[0], 0, in->controls[CONTROL_CHUNK]};
    kvt_reader reader = view_reader(&v);
    const size_t before = p->meter.live;
    kvt_status status;

    memset(result, 0, sizeof *result);
    options_of(in, p, &options);
    if (from_memory)
        status = kvt_seq_load_memory(p->seq, in->files[0], in->bytes[0], &options, result);
    else
        status = kvt_seq_load_stream(p->seq, &reader, &options, result);
    check_memory(p, in, before);
    p->meter.countdown = 0;
    state->data = NULL;
    if (status != KVT_OK) {
        check_unchanged(p);
    } else {
        *state = state_of(p->seq);
        CHECK(state->data);
        CHECK(from_memory ? 1 : v.at <= v.n);
        check_loaded(p, p->seq, result, 0);
        place_reset(p);
    }
    return status;
}

int fuzz_load(const uint8_t *data, size_t size)
{
    input in;
    place *p;
    kvt_load_result results[2];
    kvt_status status[2];
    blob states[2];

    input_open(&in, data, size);
    p = place_of(&in);
    status[0] = once(p, &in, 0, &results[0], &states[0]);
    status[1] = once(p, &in, 1, &results[1], &states[1]);
    if (status[1] == KVT_OK && !in.controls[CONTROL_FAIL] && !in.controls[CONTROL_CANCEL]) {
        CHECK(status[0] == KVT_OK); /* the other way round there may be bytes behind the end */
        CHECK(same_blob(&states[0], &states[1]));
        CHECK(memcmp(&results[0], &results[1], sizeof results[0]) == 0);
    }
    free(states[0].data);
    free(states[1].data);
    return 0;
}
