/*
 * Files that appear whole or not at all, and what is removed when the program ends, by a signal
 * too (bench_files.c).
 */
#ifndef BENCH_FILES_H
#define BENCH_FILES_H

#include "bench.h"

/* Both names lead to one file that is there, also through links. */
bool bench_file_is(const char *a, const char *b);

/*
 * Exits (code 2) where an output of this name cannot be written, or is one of the inputs (NULL:
 * none). Leaves nothing.
 */
void bench_file_check(const char *flag, const char *path, const char *const *inputs,
                      size_t n_inputs);

/*
 * Written as NAME.part (or .part-2, ... where there is one) beside what it replaces, which keeps
 * its permissions; a link is followed. What is no regular file is written as it is. Exits (code 1)
 * where a call fails; then, and where the program ends before the commit, the temporary is removed.
 */
typedef struct bench_file {
    FILE *file;
    const char *path;
    char *target, *temporary; /* NULL: written as it is */
} bench_file;

void bench_file_create(bench_file *f, const char *path);
void bench_file_commit(bench_file *f);
/* Close it and leave the temporary, whose name is answered, where it is. */
const char *bench_file_keep(bench_file *f);

/*
 * Call it when the program ends: by exit, or by a signal that bench_end_interrupted has found. It
 * may be called more than once. From the first of these on signals that end a program are noted;
 * a second one of a kind ends it at once.
 */
void bench_at_end(void (*clean)(void));
bool bench_interrupted(void);
/* Where a signal was noted: clean up, and end by it. Called between measurements. */
void bench_end_interrupted(void);

#endif /* BENCH_FILES_H */
