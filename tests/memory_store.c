/*
 * A store in memory: see memory_store.h. Not for several threads.
 */
#include "memory_store.h"

#include <stdio.h>

static int fails(memory_store *m, const char *call, kvt_store_error *error, kvt_status *status)
{
    *status = KVT_OK;
    if (m->fail_at < 0 || m->n_calls++ != (size_t)m->fail_at)
        return 0;
    (void)snprintf(error->text, sizeof error->text, "the %s was made to fail", call);
    *status = m->failure;
    return 1;
}

memory_value *memory_store_find(memory_store *m, const kvt_store_key *key)
{
    for (size_t i = 0; i < m->n; i++)
        if (memcmp(&m->values[i].key, key, sizeof *key) == 0)
            return &m->values[i];
    return NULL;
}

void memory_store_drop(memory_store *m, memory_value *value)
{
    free(value->data);
    *value = m->values[--m->n];
}

/* A value of so many bytes, which are to be written, in place of one that is there. */
static memory_value *add(memory_store *m, const kvt_store_key *key, size_t bytes)
{
    memory_value *value = memory_store_find(m, key);
    if (!value) {
        if (m->n == m->room) {
            m->room = 2 * m->room + 16;
            m->values = realloc(m->values, m->room * sizeof *m->values);
            assert_non_null(m->values);
        }
        value = &m->values[m->n++];
        value->data = NULL;
    }
    free(value->data);
    value->key = *key;
    value->bytes = bytes;
    value->data = malloc(bytes + 1);
    assert_non_null(value->data);
    return value;
}

memory_value *memory_store_set(memory_store *m, const kvt_store_key *key, const void *data,
                               size_t bytes)
{
    memory_value *value = add(m, key, bytes);
    if (bytes)
        memcpy(value->data, data, bytes);
    return value;
}

/* Give a value, in parts. 1: no more at all. */
static int give(memory_store *m, const memory_value *value, size_t i,
                const kvt_store_receiver *receiver, int *failed)
{
    size_t at = 0, n;
    do {
        const unsigned char *from = value->data + at;
        void *place = NULL;
        int answer;
        n = value->bytes - at;
        if (m->part_bytes && n > m->part_bytes)
            n = m->part_bytes;
        if (m->places && receiver->place) {
            size_t room = n;
            place = receiver->place(receiver->user, i, value->bytes, at, &room);
            if (place) {
                assert_true(room > 0 && room <= n);
                n = room;
                memcpy(place, from, n);
            }
        }
        if (m->fail_part >= 0 && m->n_parts == (size_t)m->fail_part) {
            *failed = 1;
            return 1;
        }
        m->n_parts++;
        answer = receiver->part(receiver->user, i, value->bytes, at, place ? place : from, n);
        if (answer != KVT_STORE_MORE)
            return answer == KVT_STORE_STOP;
        at += n;
    } while (at < value->bytes);
    return 0;
}

static kvt_status get(void *user, const kvt_store_key *keys, size_t n,
                      const kvt_store_receiver *receiver, kvt_store_error *error)
{
    memory_store *m = user;
    kvt_status status;
    int failed = 0;

    m->n_gets++;
    if (fails(m, "get", error, &status))
        return status;
    for (size_t i = 0; i < n; i++) {
        size_t at = m->backwards ? n - 1 - i : i;
        const memory_value *value = memory_store_find(m, &keys[at]);
        if (value && give(m, value, at, receiver, &failed))
            break;
    }
    if (failed) {
        (void)snprintf(error->text, sizeof error->text, "the get was made to fail half way");
        return m->failure;
    }
    return KVT_OK;
}

static kvt_status put(void *user, const kvt_store_key *keys, const kvt_store_value *values,
                      size_t n, size_t *n_put, kvt_store_error *error)
{
    memory_store *m = user;
    kvt_status status;

    m->n_puts++;
    *n_put = 0;
    if (fails(m, "put", error, &status))
        return status;
    for (size_t i = 0; i < n; i++) {
        memory_value *value;
        size_t at = 0;
        if (m->put_at_most >= 0 && i == (size_t)m->put_at_most) {
            (void)snprintf(error->text, sizeof error->text, "the put was made to fail half way");
            return m->failure;
        }
        value = add(m, &keys[i], (size_t)values[i].bytes);
        for (size_t j = 0; j < values[i].n_parts; j++) {
            if (values[i].parts[j].bytes)
                memcpy(value->data + at, values[i].parts[j].data, values[i].parts[j].bytes);
            at += values[i].parts[j].bytes;
        }
        assert_int_equal(at, values[i].bytes);
        ++*n_put;
    }
    return KVT_OK;
}

static kvt_status exists(void *user, const kvt_store_key *keys, size_t n, uint8_t *found,
                         kvt_store_error *error)
{
    memory_store *m = user;
    kvt_status status;

    m->n_exists++;
    m->n_asked = n;
    if (fails(m, "exists", error, &status))
        return status;
    for (size_t i = 0; i < n; i++)
        found[i] = memory_store_find(m, &keys[i]) != NULL;
    return KVT_OK;
}

static kvt_status remove_values(void *user, const kvt_store_key *keys, size_t n,
                                kvt_store_error *error)
{
    memory_store *m = user;
    kvt_status status;

    m->n_removes++;
    if (fails(m, "remove", error, &status))
        return status;
    for (size_t i = 0; i < n; i++) {
        memory_value *value = memory_store_find(m, &keys[i]);
        if (value)
            memory_store_drop(m, value);
    }
    return KVT_OK;
}

kvt_store memory_store_open(memory_store *m)
{
    kvt_store store;

    memset(m, 0, sizeof *m);
    m->fail_at = m->fail_part = m->put_at_most = -1;
    m->failure = KVT_ERR_IO;
    memset(&store, 0, sizeof store);
    store.struct_size = sizeof store;
    store.user = m;
    store.get = get;
    store.put = put;
    store.exists = exists;
    store.remove = remove_values;
    return store;
}

void memory_store_free(memory_store *m)
{
    while (m->n)
        memory_store_drop(m, &m->values[m->n - 1]);
    free(m->values);
    memset(m, 0, sizeof *m);
}

void memory_store_copy(const memory_store *from, memory_store *to)
{
    for (size_t i = 0; i < from->n; i++) {
        const memory_value *value = &from->values[i];
        (void)memory_store_set(to, &value->key, value->data, value->bytes);
    }
}
