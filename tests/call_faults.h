/*
 * The library's system calls and allocations, taken by the linker (--wrap) in programs that link
 * the static library: counted, recorded, made to fail, or to end the process.
 *
 * Calls relative to a folder (openat, renameat, ...) count as those that are not.
 *
 * Only what happens between calls_arm and calls_disarm counts. Calls of the shared libraries
 * (libc's own, zstd's, libsodium's) are not taken.
 */
#ifndef KVT_TEST_CALL_FAULTS_H
#define KVT_TEST_CALL_FAULTS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

typedef enum call_kind {
    CALL_OPEN,
    CALL_READ,
    CALL_PREAD,
    CALL_WRITE,
    CALL_PWRITE,
    CALL_FSYNC,
    CALL_CLOSE,
    CALL_RENAME,
    CALL_UNLINK,
    CALL_FTRUNCATE,
    CALL_FCHMOD,
    CALL_FSTAT,
    CALL_STAT,
    CALL_LSTAT,
    CALL_FSTATAT,
    CALL_MKDIR,
    CALL_FUTIMENS,
    CALL_FLOCK,
    CALL_FCNTL,
    CALL_GETRANDOM,
    CALL_MMAP,
    CALL_MUNMAP,
    CALL_OPENDIR, /* and fdopendir */
    CALL_READDIR,
    CALL_REALPATH,
    CALL_ALLOC, /* malloc, calloc, realloc, aligned_alloc, and calls_alloc */
    CALL_KINDS
} call_kind;

/* What a descriptor is for, or a path. */
typedef enum call_role {
    ROLE_NONE,
    ROLE_READ,   /* opened for reading */
    ROLE_OUT,    /* is written: a temporary, or the target in place */
    ROLE_LOCK,   /* the second descriptor of a temporary */
    ROLE_FOLDER, /* to sync it */
    ROLE_STALE   /* a temporary that somebody has left */
} call_role;

typedef struct call {
    call_kind kind;
    call_role role;
    int flags; /* of open; flock's operation */
    int file;  /* the number of the file that a descriptor is of, from 0, in order of opening */
    char path[128], other[128];
    unsigned char *data; /* of writes, if they are recorded */
    size_t n;
} call;

typedef enum call_fate {
    FATE_NONE,
    FATE_FAIL,        /* it does nothing and answers an error; close and munmap are done */
    FATE_SHORT,       /* read, pread, write, pwrite: a part; of one byte nothing is left out */
    FATE_END,         /* read, pread: 0 bytes */
    FATE_PRETEND,     /* nothing is done, and success answered: fsync, rename */
    FATE_KILL_BEFORE, /* the process ends by SIGKILL */
    FATE_KILL_AMID,   /* write, pwrite: a part of it is done */
    FATE_KILL_AFTER
} call_fate;

/* What is to happen: the call number `at` (from 0, of those that count) has a fate. */
typedef struct call_plan {
    long at; /* < 0: none */
    call_fate fate;
    int error;
    int times;         /* as many of the following calls of the same kind likewise; 0: one */
    uint32_t also;     /* bits of kinds all of whose calls fail, with EIO */
    int counts_memory; /* 1: allocations count, and nothing else; else all but them */
    int records;       /* 1: data of writes are kept */
} call_plan;

void calls_arm(const call_plan *plan);
void calls_disarm(void);
/* What was called since calls_arm, valid until the next one. */
const call *calls_made(size_t *n);
/* Whether the planned call was met. */
int calls_met(void);
const char *call_name(call_kind kind);

/* An allocator for caches whose allocations count as CALL_ALLOC; live counts them. */
void *calls_alloc(void *live, size_t bytes, size_t alignment);
void calls_free(void *live, void *memory, size_t bytes);

#endif
