/*
 * See store_values.h.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "store_values.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

kvt_store_error store_error;

void expect_store(kvt_status expected, kvt_status got, const char *where)
{
    if (got != expected)
        fail_msg("%s: status %d, not %d: %s", where, (int)got, (int)expected, store_error.text);
}

/* ---- keys and values ---- */

kvt_store_key key_of(uint64_t number)
{
    rng r = {number * 2 + 1};
    kvt_store_key key;
    for (size_t i = 0; i < 4; i++) {
        uint64_t x = rng_next(&r);
        memcpy(key.bytes + 8 * i, &x, 8);
    }
    key.bytes[0] &= 3;
    return key;
}

static uint64_t sum_of(const unsigned char *data, size_t bytes)
{
    uint64_t sum = 7, word;
    for (; bytes >= 8; bytes -= 8, data += 8) {
        memcpy(&word, data, 8);
        sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
        sum ^= sum >> 29;
    }
    while (bytes--)
        sum = (sum ^ *data++) * 0x100000001b3u;
    return sum;
}

void value_fill(uint64_t number, uint64_t version, unsigned char *to, size_t bytes)
{
    rng r = {number * 977 + version * 31 + 5};
    size_t i;
    for (i = 0; i < bytes; i += 8) {
        uint64_t x = rng_next(&r);
        memcpy(to + i, &x, bytes - i < 8 ? bytes - i : 8);
    }
    if (bytes >= 24) {
        uint64_t sum;
        kvt_store_key key = key_of(number);
        memcpy(to + 8, key.bytes, 8);
        memcpy(to + 16, &version, 8);
        sum = sum_of(to + 8, bytes - 8) ^ bytes;
        memcpy(to, &sum, 8);
    }
}

int value_is_sound(const kvt_store_key *key, const unsigned char *data, size_t bytes,
                   uint64_t *version)
{
    uint64_t sum;
    if (bytes < 24)
        return 0;
    memcpy(&sum, data, 8);
    if (version)
        memcpy(version, data + 16, 8);
    return sum == (sum_of(data + 8, bytes - 8) ^ bytes) && memcmp(data + 8, key->bytes, 8) == 0;
}

kvt_status put_value(kvt_store *s, uint64_t number, uint64_t version, size_t bytes)
{
    unsigned char *data = malloc(bytes + 1);
    kvt_store_key key = key_of(number);
    kvt_store_part part = {data, bytes};
    kvt_store_value value = {&part, 1, bytes};
    kvt_status status;
    size_t n_put = 99;

    assert_non_null(data);
    value_fill(number, version, data, bytes);
    status = s->put(s->user, &key, &value, 1, &n_put, &store_error);
    assert_true(n_put == (status == KVT_OK) || (n_put == 1 && status != KVT_OK));
    free(data);
    return status;
}

int64_t get_version(kvt_store *s, uint64_t number)
{
    kvt_store_key key = key_of(number);
    collector c;
    uint64_t version = 0;
    int64_t answer = -1;

    collector_make(&c, 1);
    store_ok(collector_get(s, &c, &key, 1));
    if (c.values[0].n_begun && c.values[0].have == c.values[0].total)
        answer = !c.values[0].is_wrong &&
                         value_is_sound(&key, c.values[0].data, (size_t)c.values[0].total, &version)
                     ? (int64_t)version
                     : -2;
    collector_free(&c);
    return answer;
}

int has_value(kvt_store *s, uint64_t number)
{
    kvt_store_key key = key_of(number);
    uint8_t found = 9;
    store_ok(s->exists(s->user, &key, 1, &found, &store_error));
    assert_true(found <= 1);
    return found;
}

/* ---- receivers ---- */

static void *place(void *user, size_t i, uint64_t total, uint64_t offset, size_t *bytes)
{
    collector *c = user;
    got_value *v = &c->values[i];

    assert_true(i < c->n && *bytes >= 1 && *bytes <= total - offset);
    if (offset == 0) {
        free(v->data);
        v->data = malloc((size_t)total);
        assert_non_null(v->data);
    }
    if (c->places == 2 && c->n_all % 2)
        return NULL;
    if (c->most && *bytes > c->most)
        *bytes = c->most;
    return v->data + offset;
}

static int part(void *user, size_t i, uint64_t total, uint64_t offset, const void *data,
                size_t bytes)
{
    collector *c = user;
    got_value *v = &c->values[i];

    assert_true(i < c->n);
    if (offset == 0) {
        v->n_begun++;
        v->have = 0;
        v->total = total;
        if (!c->places || v->data != data) {
            free(v->data);
            v->data = malloc((size_t)total + 1);
            assert_non_null(v->data);
        }
    }
    if (offset != v->have || total != v->total || bytes > total - offset || (!bytes && total)) {
        v->is_wrong = 1;
        return KVT_STORE_SKIP;
    }
    if (v->data + offset == data)
        c->n_placed++;
    else if (bytes)
        memcpy(v->data + offset, data, bytes);
    v->have += bytes;
    v->n_parts++;
    c->largest = bytes > c->largest ? bytes : c->largest;
    if (c->on_part)
        c->on_part(c->user);
    return c->n_all++ == c->stop_part ? c->answer : KVT_STORE_MORE;
}

void collector_make(collector *c, size_t n)
{
    memset(c, 0, sizeof *c);
    c->values = calloc(n ? n : 1, sizeof *c->values);
    assert_non_null(c->values);
    c->n = n;
    c->stop_part = SIZE_MAX;
}

void collector_free(collector *c)
{
    for (size_t i = 0; i < c->n; i++)
        free(c->values[i].data);
    free(c->values);
}

kvt_store_receiver collector_receiver(collector *c)
{
    kvt_store_receiver r = {c, part, c->places ? place : NULL};
    return r;
}

kvt_status collector_get(kvt_store *s, collector *c, const kvt_store_key *keys, size_t n)
{
    kvt_store_receiver r = collector_receiver(c);
    return s->get(s->user, keys, n, &r, &store_error);
}

/* ---- folders ---- */

static void look_at(const char *path, const char *name, folder_state *state)
{
    char file[800];
    unsigned char *data;
    struct stat status;
    kvt_store_key key;
    size_t n;
    FILE *f;

    (void)snprintf(file, sizeof file, "%s/%s", path, name);
    if (strncmp(name, "put-", 4) == 0 && stat(file, &status) == 0) {
        state->n_temporaries++;
        state->temporary_bytes += (uint64_t)status.st_size;
        return;
    }
    if (strlen(name) != 64 || stat(file, &status) != 0) {
        state->n_other += name[0] != '.';
        return;
    }
    for (size_t i = 0; i < 32; i++) {
        unsigned byte = 0;
        if (sscanf(name + 2 * i, "%2x", &byte) != 1)
            fail_msg("%s", file);
        key.bytes[i] = (uint8_t)byte;
    }
    f = fopen(file, "rb");
    if (!f)
        return; /* evicted meanwhile */
    data = malloc((size_t)status.st_size + 1);
    assert_non_null(data);
    n = fread(data, 1, (size_t)status.st_size, f);
    (void)fclose(f);
    state->n_values++;
    state->bytes += (uint64_t)status.st_size;
    state->n_unsound += n != (size_t)status.st_size || !value_is_sound(&key, data, n, NULL);
    free(data);
}

folder_state folder_look(const char *path)
{
    folder_state state;
    struct dirent *entry, *file;
    DIR *all = opendir(path);

    memset(&state, 0, sizeof state);
    assert_non_null(all);
    while ((entry = readdir(all)) != NULL) {
        char name[400];
        DIR *folder;
        if (entry->d_name[0] == '.')
            continue;
        (void)snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        folder = opendir(name);
        if (!folder) {
            state.n_other += strcmp(entry->d_name, "kvtile-store") != 0;
            continue;
        }
        while ((file = readdir(folder)) != NULL)
            look_at(name, file->d_name, &state);
        (void)closedir(folder);
    }
    (void)closedir(all);
    return state;
}

void folder_remove(const char *path)
{
    struct dirent *entry;
    DIR *folder = opendir(path);

    while (folder && (entry = readdir(folder)) != NULL) {
        char name[512];
        (void)snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0 &&
            unlink(name) != 0)
            folder_remove(name);
    }
    if (folder)
        (void)closedir(folder);
    (void)rmdir(path);
}

kvt_status folder_open(const char *path, uint64_t max_bytes, kvt_store *s)
{
    kvt_directory_config config;

    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.path = path;
    config.max_bytes = max_bytes;
    config.error_text = store_error.text;
    config.error_text_bytes = sizeof store_error.text;
    return kvt_store_open_directory(&config, s);
}

void folder_file(const char *path, uint64_t number, char *to, size_t room)
{
    kvt_store_key key = key_of(number);
    size_t n = (size_t)snprintf(to, room, "%s/%02x/", path, key.bytes[0]);
    for (size_t i = 0; i < 32; i++)
        n += (size_t)snprintf(to + n, room - n, "%02x", key.bytes[i]);
}

void folder_agrees(const char *path, kvt_store *s)
{
    folder_state state = folder_look(path);
    kvt_store_stats stats;
    store_ok(s->stats(s->user, &stats, &store_error));
    assert_int_equal(stats.n_values, state.n_values);
    assert_int_equal(stats.bytes, state.bytes);
    assert_int_equal(state.n_unsound, 0);
}

int count_descriptors(void)
{
    int n = 0;
    for (int fd = 0; fd < 64; fd++)
        n += fcntl(fd, F_GETFD) != -1;
    return n;
}
