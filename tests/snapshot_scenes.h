/*
 * Saves, loads and conversions in a folder of their own, as tests repeat them with each call or
 * allocation failing, or the process ending: the same files before each, and what has to be there
 * behind it.
 */
#ifndef KVT_TEST_SNAPSHOT_SCENES_H
#define KVT_TEST_SNAPSHOT_SCENES_H

#include "snapshot_support.h"

#include "call_faults.h"

/* The files; those before FILE_TARGET are there in every scene, and are only read. */
typedef enum scene_file {
    FILE_BASE,   /* 64 tokens, raw */
    FILE_DELTA,  /* 128 tokens: a delta of it */
    FILE_AGAIN,  /* 150 tokens: a delta of that */
    FILE_WHOLE,  /* 150 tokens, with a checkpoint and a piece; coded */
    FILE_NATIVE, /* the same, raw */
    FILE_SECRET, /* 64 tokens, encrypted */
    FILE_SECRET_DELTA,
    FILE_TARGET, /* what is written */
    FILES
} scene_file;

typedef enum scene_kind {
    SAVE_NEW,
    SAVE_OVER,
    SAVE_LINK,  /* the path is a link to the target */
    SAVE_STALE, /* raw; and a temporary is there whose writer is gone */
    SAVE_IN_PLACE,
    SAVE_IN_PLACE_NEW,
    SAVE_DELTA, /* of FILE_DELTA */
    SAVE_SECRET,
    SAVE_SECRET_DELTA,
    SAVE_FD,
    LOAD_WHOLE,
    LOAD_NATIVE,
    LOAD_PREFIX, /* with a prompt, cut to it */
    LOAD_VERIFY, /* mapped */
    LOAD_LAZY,
    LOAD_CHAIN,
    LOAD_CHAIN_LAZY,
    LOAD_SECRET,
    LOAD_SECRET_CHAIN,
    LOAD_FD,
    CONVERT_MERGE,  /* FILE_AGAIN, into the target */
    CONVERT_SECRET, /* FILE_SECRET_DELTA likewise, encrypted */
    INSPECT_CHAIN,
    SCENES
} scene_kind;

extern const char *const scene_names[SCENES];

/* Who runs the tasks of a save or load. */
typedef enum scene_threads { THREADS_1, THREADS_EXECUTOR, THREADS_POOL } scene_threads;

typedef struct scenes {
    model m;
    long live; /* allocations of the cache's */
    kvt_cache *cache;
    kvt_seq *full, *half; /* of 150 and of 128 tokens */
    uint64_t full_hash, half_hash, small_hash, reuse_hash;
    bytes files[FILES]; /* as they are before a scene; FILE_TARGET: the old one */
    int32_t prompt[150];
    kvt_seq *loads; /* of a load: holds 70 tokens before */
    uint64_t loads_hash;
    char text[256]; /* of the failure */
    int descriptors;
    long live_before;
    int fd; /* of SAVE_FD, LOAD_FD */
} scenes;

/* 0: it encrypts, and the library was built without libsodium. */
int scene_is_possible(scene_kind kind);

extern char scene_folder[64];
const char *scene_path(scene_file file);

void scenes_open(scenes *s, scene_threads threads);
void scenes_close(scenes *s);
/* All files as they are to be, no other, and what a load loads into. */
void scene_begin(scenes *s, scene_kind kind);
/* The calls themselves; to be armed around. */
kvt_status scene_run(scenes *s, scene_kind kind);
/*
 * Behind it: files that are only read have not changed; the sequence that is saved, or was not
 * loaded, neither; what was loaded is right; no descriptor, mapping, allocation or temporary is
 * left. leaves: so many temporaries may be left. Then the target of a save is one of:
 */
typedef enum scene_target {
    TARGET_NONE,
    TARGET_OLD,
    TARGET_NEW,
    TARGET_PART,
    TARGET_OTHER
} scene_target;
scene_target scene_end(scenes *s, scene_kind kind, kvt_status status, int leaves);
/* The target, without anything else. */
scene_target scene_target_of(scenes *s, scene_kind kind);
int scene_temporaries(void);
/* Whether it writes the target. */
int scene_writes(scene_kind kind);

bytes slurp(const char *path);
void spill(const char *path, const void *data, size_t n);

#endif
