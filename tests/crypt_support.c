#include "crypt_support.h"

char text[300];
const unsigned char key[32] = "a key of 32 bytes, for tests ...";

/* ---- memory files ---- */

static int fails(file *f)
{
    if (f->countdown == 0)
        return 1;
    f->countdown -= f->countdown > 0;
    return 0;
}

int file_write(void *user, const void *data, size_t bytes)
{
    file *f = user;

    if (fails(f))
        return -1;
    while (f->n + bytes > f->room) {
        f->room = 2 * f->room + 1000;
        f->data = realloc(f->data, f->room);
        assert_non_null(f->data);
    }
    memcpy(f->data + f->n, data, bytes);
    f->n += bytes;
    return 0;
}

int64_t file_read_at(void *user, uint64_t offset, void *data, size_t bytes)
{
    file *f = user;
    size_t left = offset < f->n ? f->n - (size_t)offset : 0;

    if (fails(f))
        return -1;
    if (f->pieces && bytes > 1)
        bytes = 1 + rng_below(f->pieces, (uint32_t)bytes);
    if (bytes > left)
        bytes = left;
    if (bytes)
        memcpy(data, f->data + offset, bytes);
    return (int64_t)bytes;
}

int64_t file_read(void *user, void *data, size_t bytes)
{
    file *f = user;
    int64_t n = file_read_at(user, f->at, data, bytes);

    f->at += n > 0 ? (size_t)n : 0;
    return n;
}

file file_of(const unsigned char *data, size_t n)
{
    file f;
    memset(&f, 0, sizeof f);
    f.countdown = -1;
    if (n)
        (void)file_write(&f, data, n);
    return f;
}

/* ---- contexts: without a cache, with threads, with a caller's executor ---- */

static void run_backwards(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n)
{
    (void)user;
    while (n--)
        task(arg, n);
}

kvt_cache *cache_with(uint32_t n_threads, int executor, const kvt_allocator *allocator)
{
    kvt_group_config group = group_of(1, 1, 1, 8, 8, KVT_TYPE_F16, KVT_TYPE_F16);
    kvt_config config = kvt_config_init();
    kvt_cache *cache;

    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = 64;
    config.n_threads = executor ? 0 : pool_threads(n_threads);
    if (executor) {
        config.executor.run = run_backwards;
        config.executor.n_threads = n_threads;
    }
    if (allocator)
        config.allocator = *allocator;
    assert_int_equal(kvt_cache_create(&config, &cache), KVT_OK);
    return cache;
}

kvt_snap_context context_of(kvt_cache *cache)
{
    kvt_snap_context context = {cache, text, sizeof text};
    text[0] = 0;
    return context;
}

/* ---- whole files ---- */

int by_parts;

static int file_write_parts(void *user, const kvt_snap_part *parts, size_t n)
{
    int answer = 0;
    for (size_t i = 0; i < n && !answer; i++)
        answer = file_write(user, parts[i].data, parts[i].bytes);
    return answer;
}

unsigned char *plain_of(size_t n, uint64_t seed)
{
    unsigned char *plain = malloc(n + 1);
    rng r = {seed};

    assert_non_null(plain);
    for (size_t i = 0; i < n; i++)
        plain[i] = (unsigned char)rng_next(&r);
    return plain;
}

kvt_status encrypt(const kvt_snap_context *context, const unsigned char *plain, size_t n,
                   uint32_t segment, size_t most, file *to)
{
    kvt_writer out = {to, file_write}, in;
    kvt_snap_crypt c;
    kvt_status status = kvt_snap_encrypt_begin_sized(context, key, &out, segment, &c, &in);
    rng r = {n + most};
    int failed = 0;

    c.write_parts = by_parts ? file_write_parts : NULL;
    for (size_t i = 0, part; status == KVT_OK && i < n && !failed; i += part) {
        part = most ? rng_below(&r, (uint32_t)most + 1) : n;
        part = part < n - i ? part : n - i;
        failed = in.write(in.user, plain + i, part);
    }
    if (status == KVT_OK) {
        const kvt_status why = kvt_snap_crypt_failure(&c);
        status = kvt_snap_encrypt_end(&c);
        assert_true(!failed || (status != KVT_OK && in.write(in.user, plain, 1) != 0));
        assert_int_equal(status == KVT_ERR_IO ? KVT_OK : status, kvt_snap_crypt_failure(&c));
        assert_true(why == KVT_OK || why == status);
    }
    kvt_snap_crypt_release(&c);
    return status;
}

file encrypted(const unsigned char *plain, size_t n)
{
    const kvt_snap_context context = context_of(NULL);
    file f = file_of(NULL, 0);

    assert_int_equal(encrypt(&context, plain, n, S, 0, &f), KVT_OK);
    return f;
}

kvt_status decrypt(const kvt_snap_context *context, const unsigned char *k, file *from,
                   const unsigned char *plain, size_t n, size_t most, size_t *delivered)
{
    kvt_reader in = {from, file_read}, out;
    kvt_snap_crypt c;
    unsigned char *to = malloc(most);
    kvt_status status;
    int64_t got = 1;

    assert_non_null(to);
    from->at = 0;
    *delivered = 0;
    status = kvt_snap_decrypt_begin(context, k, &in, &c, &out);
    while (status == KVT_OK && (got = out.read(out.user, to, most)) > 0) {
        assert_true((size_t)got <= most && (size_t)got <= n - *delivered);
        assert_memory_equal(to, plain + *delivered, (size_t)got);
        *delivered += (size_t)got;
    }
    if (status == KVT_OK && got < 0) {
        assert_true(out.read(out.user, to, 1) < 0);
        status = kvt_snap_crypt_failure(&c);
        if (status == KVT_OK)
            status = KVT_ERR_IO;
    } else if (status == KVT_OK) {
        assert_int_equal(out.read(out.user, to, 1), 0);
    }
    kvt_snap_crypt_release(&c);
    free(to);
    return status;
}

kvt_status decrypt_at(const kvt_snap_context *context, file *from, const unsigned char *plain,
                      size_t n)
{
    const kvt_snap_source source = {from, file_read_at, from->n};
    kvt_snap_crypt c;
    uint64_t bytes = 0;
    kvt_status status = kvt_snap_decrypt_open(context, key, &source, &c, &bytes);
    unsigned char *to = calloc((size_t)bytes + 1, 1);

    assert_non_null(to);
    if (status == KVT_OK)
        status = kvt_snap_decrypt_at(&c, 0, to, (size_t)bytes);
    if (status == KVT_OK) {
        assert_int_equal(bytes, n);
        assert_memory_equal(to, plain, n);
    }
    kvt_snap_crypt_release(&c);
    free(to);
    return status;
}
