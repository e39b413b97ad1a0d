/*
 * What file.c and replace.c share. What others use of them is in format.h.
 */
#ifndef KVT_SNAPSHOT_FILE_H
#define KVT_SNAPSHOT_FILE_H

#include "src/snapshot/format.h"

#include <sys/types.h>

/* No file yet. */
void kvt_snap_file_init(kvt_snap_file *file, const kvt_snap_context *context);
/* open, again where a signal interrupts it; closed on exec. */
int kvt_snap_open_again(const char *path, int flags, mode_t mode);
/* A kvt_writer's write; user is a kvt_snap_file. */
int kvt_snap_file_write(void *user, const void *data, size_t bytes);

/* A system call that failed, with its errno: KVT_ERR_IO. */
kvt_status kvt_snap_io_fail(const kvt_snap_context *context, const char *call, int error,
                            const char *path);
/* advice: what to do about it, or "". Before the path, which may be cut. */
kvt_status kvt_snap_io_fail_with(const kvt_snap_context *context, const char *call, int error,
                                 const char *advice, const char *path);
/* The same noted in the file: kvt_snap_file_failure tells of it. */
void kvt_snap_file_failed(kvt_snap_file *file, const char *call);

#endif /* KVT_SNAPSHOT_FILE_H */
