/*
 * Replays inputs of the fuzzers: fuzz_replay [--model|--store] FILE|FOLDER...
 *
 * Each is given to all targets, with --model to that of models alone, with --store to that of
 * stored values. A property that does not hold ends the process by abort.
 */
#include "fuzz.h"

#include <dirent.h>
#include <stdio.h>

static unsigned char data[1 << 22];
static size_t n_inputs;

enum { SWEEP = 90 };

static int all(size_t n)
{
#ifdef FUZZ_CRYPT
    if (fuzz_crypt(data, n))
        return 1;
#endif
    return fuzz_load(data, n) || fuzz_map(data, n) || fuzz_chain(data, n) || fuzz_convert(data, n);
}

/* Each allocation fails in turn, and each call of progress cancels. */
static int sweep(size_t n)
{
    unsigned char *fail = data + 2 + CONTROL_FAIL, *cancel = data + 2 + CONTROL_CANCEL;
    for (*fail = 1; *fail < SWEEP; ++*fail)
        if (all(n))
            return 1;
    *fail = 0;
    for (*cancel = 1; *cancel < 6; ++*cancel)
        if (all(n))
            return 1;
    return 0;
}

static int replay(const char *path, int (*only)(const uint8_t *data, size_t size))
{
    FILE *f = fopen(path, "rb");
    size_t n;
    if (!f)
        return 1;
    n = fread(data, 1, sizeof data, f);
    (void)fclose(f);
    if (getenv("FUZZ_VERBOSE"))
        (void)fprintf(stderr, "%s\n", path);
    n_inputs++;
    if (only)
        return only(data, n);
    if (all(n))
        return 1;
    if (n <= FUZZ_HEAD || data[0] != 'F')
        return 0;
    if (data[2 + CONTROL_MORE] & MORE_EDGES)
        fuzz_edges(data, n);
    return data[2 + CONTROL_MORE] & MORE_SWEEP ? sweep(n) : 0;
}

int main(int argc, char **argv)
{
    int (*only)(const uint8_t *bytes, size_t size) = NULL;
    if (argc > 1 && strcmp(argv[1], "--model") == 0)
        only = fuzz_model;
#ifdef FUZZ_CRYPT /* keys are libsodium's */
    if (argc > 1 && strcmp(argv[1], "--store") == 0)
        only = fuzz_store;
#endif
    for (int i = 1 + (only != NULL); i < argc; i++) {
        DIR *folder = opendir(argv[i]);
        const struct dirent *entry;
        char path[4096];
        if (!folder) {
            if (replay(argv[i], only) != 0)
                return 1;
            continue;
        }
        while ((entry = readdir(folder)) != NULL) {
            (void)snprintf(path, sizeof path, "%s/%s", argv[i], entry->d_name);
            if (entry->d_name[0] != '.' && replay(path, only) != 0)
                return 1;
        }
        (void)closedir(folder);
    }
    (void)printf("%zu inputs\n", n_inputs);
    return n_inputs == 0;
}
