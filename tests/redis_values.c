/*
 * Keys and values for tests of a store: see redis_values.h.
 */
#include "redis_values.h"

#include <stdio.h>
#include <time.h>

double seconds_now(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

kvt_store_key key_of(uint64_t number)
{
    kvt_store_key key;
    rng r = {number * 0x9e3779b97f4a7c15u + 1};
    for (size_t i = 0; i < KVT_STORE_KEY_BYTES; i++)
        key.bytes[i] = (uint8_t)(rng_next(&r) >> 32);
    return key;
}

/* With zeros, line ends and what looks like the protocol in it. */
unsigned char *value_of(uint64_t number, size_t bytes)
{
    static const char protocol[] = "\r\n$-1\r\n-ERR\0\r\n$5\r\n";
    unsigned char *data = malloc(bytes ? bytes : 1);
    rng r = {number + 77};
    assert_non_null(data);
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t word = rng_next(&r);
        memcpy(data + i, &word, bytes - i < 8 ? bytes - i : 8);
    }
    if (bytes >= sizeof protocol)
        memcpy(data + rng_below(&r, (uint32_t)(bytes - sizeof protocol + 1)), protocol,
               sizeof protocol);
    return data;
}

static kvt_store_key *keys_of(uint64_t first, size_t n)
{
    kvt_store_key *keys = malloc((n ? n : 1) * sizeof *keys);
    assert_non_null(keys);
    for (size_t i = 0; i < n; i++)
        keys[i] = key_of(first + i);
    return keys;
}

kvt_status put_values(const kvt_store *store, uint64_t first, size_t n, size_t bytes, size_t parts,
                      size_t *n_put, kvt_store_error *error)
{
    kvt_store_key *keys = keys_of(first, n);
    kvt_store_value *values = calloc(n, sizeof *values);
    kvt_store_part *all = calloc(n * parts, sizeof *all);
    unsigned char **data = calloc(n, sizeof *data);
    kvt_status status;
    size_t dummy;

    assert_true(values && all && data);
    for (size_t i = 0; i < n; i++) {
        data[i] = value_of(first + i, bytes);
        values[i] = (kvt_store_value){all + i * parts, parts, bytes};
        for (size_t p = 0; p < parts; p++) {
            size_t from = bytes * p / parts, to = bytes * (p + 1) / parts;
            all[i * parts + p] = (kvt_store_part){data[i] + from, to - from};
        }
    }
    error->text[0] = 0;
    status = store->put(store->user, keys, values, n, n_put ? n_put : &dummy, error);
    for (size_t i = 0; i < n; i++)
        free(data[i]);
    free(data);
    free(all);
    free(values);
    free(keys);
    return status;
}

/* ---- getting ---- */

static void begin(taken *t, size_t i, uint64_t total, uint64_t offset)
{
    assert_true(i < t->n);
    assert_false(t->whole[i]);
    if (t->current != i) {
        assert_int_equal(t->current, SIZE_MAX); /* one value after the other */
        assert_int_equal(offset, 0);
        assert_null(t->data[i]);
        t->current = i;
        t->total[i] = total;
        t->data[i] = malloc(total ? (size_t)total : 1);
        assert_non_null(t->data[i]);
    }
    assert_int_equal(t->total[i], total);
    assert_int_equal(t->have[i], offset);
}

static void *place(void *user, size_t i, uint64_t total, uint64_t offset, size_t *bytes)
{
    taken *t = user;
    begin(t, i, total, offset);
    assert_in_range(*bytes, 1, total - offset);
    if (t->place_most && *bytes > t->place_most)
        *bytes = t->place_most;
    return t->data[i] + offset;
}

static int part(void *user, size_t i, uint64_t total, uint64_t offset, const void *data,
                size_t bytes)
{
    taken *t = user;
    begin(t, i, total, offset);
    assert_true(bytes <= total - offset);
    t->n_parts++;
    if (data == t->data[i] + offset && bytes)
        t->n_placed++;
    else if (bytes)
        memcpy(t->data[i] + offset, data, bytes);
    t->have[i] += bytes;
    if (t->have[i] == total) {
        t->whole[i] = 1;
        t->n_whole++;
        t->current = SIZE_MAX;
        if (t->on_value && t->on_value(t->user, i))
            return KVT_STORE_STOP;
        if (t->stop_after && t->n_whole == t->stop_after)
            return KVT_STORE_STOP;
    } else if (t->skip_at && t->have[i] >= t->skip_at) {
        t->current = SIZE_MAX;
        return KVT_STORE_SKIP;
    }
    return KVT_STORE_MORE;
}

kvt_status get_values(const kvt_store *store, uint64_t first, size_t n, taken *t,
                      kvt_store_error *error)
{
    kvt_store_key *keys = keys_of(first, n);
    kvt_store_receiver receiver = {t, part, t->places ? place : NULL};
    kvt_status status;

    t->n = n;
    t->n_whole = t->n_parts = t->n_placed = 0;
    t->data = calloc(n, sizeof *t->data);
    t->total = calloc(n, sizeof *t->total);
    t->have = calloc(n, sizeof *t->have);
    t->whole = calloc(n, 1);
    t->current = SIZE_MAX;
    assert_true(t->data && t->total && t->have && t->whole);
    error->text[0] = 0;
    status = store->get(store->user, keys, n, &receiver, error);
    free(keys);
    return status;
}

int is_taken(const taken *t, uint64_t first, size_t i, size_t bytes)
{
    unsigned char *data;
    if (!t->whole[i])
        return 0;
    data = value_of(first + i, bytes);
    assert_int_equal(t->total[i], bytes);
    assert_memory_equal(t->data[i], data, bytes);
    free(data);
    return 1;
}

void free_taken(taken *t)
{
    for (size_t i = 0; i < t->n; i++)
        free(t->data[i]);
    free(t->data);
    free(t->total);
    free(t->have);
    free(t->whole);
    t->n = 0;
}

void expect_values(const kvt_store *store, uint64_t first, size_t n, size_t bytes,
                   const uint8_t *there)
{
    kvt_store_error error;
    taken t = {.places = (int)(first & 1)};
    expect_call(KVT_OK, error, get_values(store, first, n, &t, &error));
    for (size_t i = 0; i < n; i++)
        assert_int_equal(is_taken(&t, first, i, bytes), there ? there[i] : 1);
    free_taken(&t);
}
