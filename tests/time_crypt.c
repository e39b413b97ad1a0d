/*
 * How fast files are encrypted and decrypted (src/snapshot/crypt.c), beside copying and writing the
 * same bytes. By hand, after `ninja time_crypt`:
 *
 *   time_crypt FILE [MIB [SEGMENT_KIB]]     FILE is written and removed; 256 MiB by itself
 *
 * Median of 7, with the least and the most, in 10^9 plain bytes a second; then likewise in a
 * second of all threads' CPU time, which says more where other programs run.
 */
#include "src/snapshot/crypt.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { RUNS = 7 };

static unsigned char *data, *coded, *copy;
static size_t n, n_coded, at;

static double seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int write_memory(void *user, const void *from, size_t bytes)
{
    (void)user;
    memcpy(coded + n_coded, from, bytes);
    n_coded += bytes;
    return 0;
}

static int64_t read_memory(void *user, void *to, size_t bytes)
{
    (void)user;
    bytes = bytes < n_coded - at ? bytes : n_coded - at;
    memcpy(to, coded + at, bytes);
    at += bytes;
    return (int64_t)bytes;
}

static int64_t read_memory_at(void *user, uint64_t offset, void *to, size_t bytes)
{
    (void)user;
    memcpy(to, coded + offset, bytes);
    return (int64_t)bytes;
}

static int write_stream(void *user, const void *from, size_t bytes)
{
    return fwrite(from, 1, bytes, user) != bytes;
}

static const unsigned char key[KVT_SNAP_CRYPT_KEY_BYTES] = {1};
static uint32_t segment = KVT_SNAP_CRYPT_SEGMENT;
static const char *path;

static int encrypt(const kvt_snap_context *context, const kvt_writer *to)
{
    kvt_snap_crypt c;
    kvt_writer in;
    int failed = kvt_snap_encrypt_begin_sized(context, key, to, segment, &c, &in) != KVT_OK;
    for (size_t i = 0; i < n && !failed; i += 1 << 16) /* as a layer's streams come */
        failed = in.write(in.user, data + i, 1 << 16);
    failed = failed || kvt_snap_encrypt_end(&c) != KVT_OK;
    kvt_snap_crypt_release(&c);
    return failed;
}

/* One run of a job; 0 when it went well. */
static int run(int job, const kvt_snap_context *context)
{
    kvt_writer memory = {NULL, write_memory}, stream = {NULL, write_stream};
    kvt_reader from = {NULL, read_memory}, out;
    kvt_snap_source source = {NULL, read_memory_at, n_coded};
    kvt_snap_crypt c;
    uint64_t bytes;
    int failed = 0;

    switch (job) {
    case 0: memcpy(copy, data, n); return 0;
    case 1:
    case 2:
        stream.user = fopen(path, "wb");
        if (!stream.user)
            return 1;
        if (job == 2)
            failed = encrypt(context, &stream);
        for (size_t i = 0; job == 1 && i < n; i += 1 << 16)
            failed |= write_stream(stream.user, data + i, 1 << 16);
        return (fclose(stream.user) != 0) | failed;
    case 3: n_coded = 0; return encrypt(context, &memory);
    case 4:
        at = 0;
        failed = kvt_snap_decrypt_begin(context, key, &from, &c, &out) != KVT_OK;
        for (size_t done = 0; done < n && !failed;) {
            int64_t got = out.read(out.user, copy + done, n - done);
            failed = got <= 0;
            done += got > 0 ? (size_t)got : 0;
        }
        break;
    default:
        failed = kvt_snap_decrypt_open(context, key, &source, &c, &bytes) != KVT_OK ||
                 kvt_snap_decrypt_at(&c, 0, copy, n) != KVT_OK;
        break;
    }
    kvt_snap_crypt_release(&c);
    return failed | (memcmp(copy, data, n) != 0);
}

static int compare(const void *a, const void *b)
{
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

int main(int argc, char **argv)
{
    static const char *names[] = {"memcpy",  "fwrite",  "encrypt to a file",
                                  "encrypt", "decrypt", "decrypt at any place"};
    n = (size_t)(argc > 2 ? atoi(argv[2]) : 256) << 20;
    segment = argc > 3 ? (uint32_t)atoi(argv[3]) << 10 : segment;
    data = malloc(n);
    copy = malloc(n);
    coded = malloc(n + n / 64 + 1000);
    if (argc < 2 || !data || !copy || !coded)
        return 2;
    path = argv[1];
    for (size_t i = 0; i < n; i++)
        data[i] = (unsigned char)(i * 2654435761u >> 13);
    memset(copy, 0, n);
    memset(coded, 0, n + n / 64 + 1000);
    printf("%zu MiB, segments of %u KiB\n", n >> 20, segment >> 10);
    for (uint32_t threads = 1; threads <= 2; threads++) {
        kvt_group_config group = kvt_group_config_init();
        kvt_config config = kvt_config_init();
        kvt_snap_context context = {NULL, NULL, 0};
        group.n_layers = group.n_q_heads = group.n_kv_heads = 1;
        group.k_dim = group.v_dim = 8;
        config.groups = &group;
        config.n_groups = 1;
        config.max_tokens = 64;
        config.n_threads = threads;
        if (kvt_cache_create(&config, &context.cache) != KVT_OK)
            return 1;
        for (int job = threads == 1 ? 0 : 2; job < 6; job++) {
            double rates[RUNS], cpu[RUNS];
            for (int i = 0; i < RUNS; i++) {
                double start = seconds(CLOCK_MONOTONIC), begun = seconds(CLOCK_PROCESS_CPUTIME_ID);
                if (run(job, &context) != 0)
                    return 1;
                rates[i] = (double)n * 1e-9 / (seconds(CLOCK_MONOTONIC) - start);
                cpu[i] = (double)n * 1e-9 / (seconds(CLOCK_PROCESS_CPUTIME_ID) - begun);
            }
            qsort(rates, RUNS, sizeof *rates, compare);
            qsort(cpu, RUNS, sizeof *cpu, compare);
            printf("%-22s %u thread%s %6.2f  (%.2f to %.2f)  %6.2f  (%.2f to %.2f)\n", names[job],
                   threads, threads == 1 ? " " : "s", rates[RUNS / 2], rates[0], rates[RUNS - 1],
                   cpu[RUNS / 2], cpu[0], cpu[RUNS - 1]);
        }
        kvt_cache_destroy(context.cache);
    }
    free(data);
    free(copy);
    free(coded);
    return unlink(path) != 0;
}
