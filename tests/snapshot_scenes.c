/*
 * See snapshot_scenes.h.
 */
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700
#endif

#include "snapshot_scenes.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <xxhash.h>

const char *const scene_names[SCENES] = {"save, new file",
                                         "save over a file",
                                         "save by a link",
                                         "save, stale temporary",
                                         "save in place",
                                         "save in place, new",
                                         "save a delta",
                                         "save encrypted",
                                         "save encrypted delta",
                                         "save to descriptor",
                                         "load",
                                         "load native",
                                         "load and cut",
                                         "load mapped",
                                         "load mapped lazy",
                                         "load chain",
                                         "load chain lazy",
                                         "load encrypted",
                                         "load encrypted chain",
                                         "load descriptor",
                                         "merge a chain",
                                         "merge encrypted",
                                         "inspect a chain"};

char scene_folder[64];

static const unsigned char key[KVT_KEY_BYTES] = "a key of thirty-two bytes, 12345";
static const char *const names[FILES] = {"base",   "delta",  "again",        "whole",
                                         "native", "secret", "secret-delta", "target"};

const char *scene_path(scene_file file)
{
    static char paths[FILES][96];
    (void)snprintf(paths[file], sizeof paths[file], "%s/%s", scene_folder, names[file]);
    return paths[file];
}

static const char *in_folder(const char *name)
{
    static char path[384];
    (void)snprintf(path, sizeof path, "%s/%s", scene_folder, name);
    return path;
}

/* ---- files ---- */

bytes slurp(const char *path)
{
    bytes b = {NULL, 0, 0, 0, -1, 0};
    FILE *f = fopen(path, "rb");
    if (!f)
        return b;
    b.data = malloc((size_t)1 << 20);
    assert_non_null(b.data);
    b.n = fread(b.data, 1, (size_t)1 << 20, f);
    assert_true(b.n < (size_t)1 << 20);
    (void)fclose(f);
    return b;
}

void spill(const char *path, const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static int is_same(const bytes *a, const bytes *b)
{
    return a->n == b->n && (a->n == 0 || memcmp(a->data, b->data, a->n) == 0);
}

/* ---- what is left behind ---- */

/* Of a folder: descriptors (/proc/self/fd), or entries that begin so. */
static int count_of(const char *folder, const char *begin)
{
    DIR *dir = opendir(folder);
    struct dirent *entry;
    int n = 0;
    assert_non_null(dir);
    while ((entry = readdir(dir)) != NULL)
        n += strncmp(entry->d_name, begin, strlen(begin)) == 0;
    (void)closedir(dir);
    return n;
}

static int count_descriptors(void)
{
    int n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) != -1;
    return n;
}

/* Mappings of files in the folder. */
static int count_mappings(void)
{
    FILE *f = fopen("/proc/self/maps", "r");
    char line[512];
    int n = 0;
    if (!f)
        return 0;
    while (fgets(line, sizeof line, f))
        n += strstr(line, scene_folder) != NULL;
    (void)fclose(f);
    return n;
}

int scene_temporaries(void)
{
    return count_of(scene_folder, ".kvtile-");
}

/* ---- options ---- */

static kvt_save_options save_options(void)
{
    kvt_save_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

static kvt_load_options load_options(void)
{
    kvt_load_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

static int is_save(scene_kind kind)
{
    return kind <= SAVE_FD;
}

static int is_load(scene_kind kind)
{
    return kind >= LOAD_WHOLE && kind <= LOAD_FD;
}

int scene_writes(scene_kind kind)
{
    return is_save(kind) || kind == CONVERT_MERGE || kind == CONVERT_SECRET;
}

int scene_is_possible(scene_kind kind)
{
#if defined(KVT_TEST_CRYPT)
    (void)kind;
    return 1;
#else
    return kind != SAVE_SECRET && kind != SAVE_SECRET_DELTA && kind != LOAD_SECRET &&
           kind != LOAD_SECRET_CHAIN && kind != CONVERT_SECRET;
#endif
}

static int is_new(scene_kind kind)
{
    return kind == SAVE_NEW || kind == SAVE_IN_PLACE_NEW;
}

/* ---- the sequences and files ---- */

/* Tasks in order, on this thread: what happens does not depend on chance. */
static void run_in_order(void *user, void (*task)(void *arg, size_t i), void *arg, size_t n)
{
    (void)user;
    for (size_t i = 0; i < n; i++)
        task(arg, i);
}

static kvt_cache *make_cache(scenes *s, scene_threads threads)
{
    kvt_group_config groups[2];
    kvt_config config = model_config(&s->m, groups);
    kvt_cache *cache = NULL;

    config.allocator.user = &s->live;
    config.allocator.alloc = calls_alloc;
    config.allocator.free = calls_free;
    if (threads == THREADS_EXECUTOR) {
        config.executor.run = run_in_order;
        config.executor.n_threads = 2;
    }
    config.n_threads = threads == THREADS_1 ? 1 : threads == THREADS_POOL ? pool_threads(2) : 2;
    expect_ok(NULL, kvt_cache_create(&config, &cache));
    return cache;
}

static void save_file(scenes *s, const kvt_seq *seq, scene_file file, uint32_t codec,
                      const char *parent, int secret)
{
    static const kvt_snapshot_piece piece = {"note", "of the caller", 13};
    kvt_save_options o = save_options();
    o.codec = codec;
    o.parent = parent;
    o.key = secret ? key : NULL;
    o.pieces = &piece;
    o.n_pieces = 1;
    expect_ok(s->cache, kvt_seq_save(seq, scene_path(file), &o));
    s->files[file] = slurp(scene_path(file));
    assert_true(s->files[file].n > 100);
}

void scenes_open(scenes *s, scene_threads threads)
{
    kvt_seq *small, *reuse;

    memset(s, 0, sizeof *s);
    s->m = model_of(2, 1, 16, 8, KVT_TYPE_I8, KVT_TYPE_I4);
    s->m.groups[0].residual_tokens = KVT_RESIDUAL_NONE;
    s->cache = make_cache(s, threads);
    s->full = model_seq(s->cache);
    s->half = model_seq(s->cache);
    small = model_seq(s->cache);
    model_append(&s->m, s->cache, small, 64, 64);
    model_append(&s->m, s->cache, s->half, 64, 64);
    expect_ok(s->cache, kvt_seq_checkpoint(s->half, "blob", 4));
    model_append(&s->m, s->cache, s->half, 64, 64);
    model_append(&s->m, s->cache, s->full, 64, 64);
    expect_ok(s->cache, kvt_seq_checkpoint(s->full, "blob", 4));
    model_append(&s->m, s->cache, s->full, 86, 64);
    s->small_hash = state_hash(&s->m, s->cache, small);
    s->half_hash = state_hash(&s->m, s->cache, s->half);
    s->full_hash = state_hash(&s->m, s->cache, s->full);
    save_file(s, small, FILE_BASE, KVT_CODEC_RAW, NULL, 0);
    save_file(s, s->half, FILE_DELTA, KVT_CODEC_AUTO, scene_path(FILE_BASE), 0);
    save_file(s, s->full, FILE_AGAIN, KVT_CODEC_RAW, scene_path(FILE_DELTA), 0);
    save_file(s, s->full, FILE_WHOLE, KVT_CODEC_ZSTD, NULL, 0);
    save_file(s, s->full, FILE_NATIVE, KVT_CODEC_RAW, NULL, 0);
    if (scene_is_possible(SAVE_SECRET)) {
        save_file(s, small, FILE_SECRET, KVT_CODEC_AUTO, NULL, 1);
        save_file(s, s->half, FILE_SECRET_DELTA, KVT_CODEC_RAW, scene_path(FILE_SECRET), 1);
    }
    save_file(s, small, FILE_TARGET, KVT_CODEC_AUTO, NULL, 0);
    expect_ok(s->cache, kvt_seq_token_ids(s->full, 0, 150, s->prompt));
    reuse = model_seq(s->cache); /* token 3 has no id, which no prompt has */
    expect_ok(s->cache, kvt_seq_load(reuse, scene_path(FILE_WHOLE), NULL, NULL));
    expect_ok(s->cache, kvt_seq_truncate(reuse, 3));
    s->reuse_hash = state_hash(&s->m, s->cache, reuse);
    kvt_seq_destroy(reuse);
    kvt_seq_destroy(small);
    s->fd = -1;
    s->descriptors = count_descriptors();
}

void scenes_close(scenes *s)
{
    for (int i = 0; i < FILES; i++) {
        bytes_free(&s->files[i]);
        (void)unlink(scene_path((scene_file)i));
    }
    kvt_seq_destroy(s->loads);
    kvt_seq_destroy(s->full);
    kvt_seq_destroy(s->half);
    kvt_cache_destroy(s->cache);
    assert_int_equal(s->live, 0);
}

/* ---- a scene ---- */

static void remove_others(void)
{
    DIR *dir = opendir(scene_folder);
    struct dirent *entry;
    assert_non_null(dir);
    while ((entry = readdir(dir)) != NULL) {
        int known = strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0;
        for (int i = 0; i < FILE_TARGET; i++)
            known |= strcmp(entry->d_name, names[i]) == 0;
        if (!known)
            (void)unlink(in_folder(entry->d_name));
    }
    (void)closedir(dir);
}

/* Named after the target, and nobody has it locked. */
static void make_stale(void)
{
    char name[64];
    (void)snprintf(name, sizeof name, ".kvtile-%016llx-0123456789abcdef.tmp",
                   (unsigned long long)XXH64("target", 6, 0));
    spill(in_folder(name), "left", 4);
}

void scene_begin(scenes *s, scene_kind kind)
{
    remove_others();
    if (scene_writes(kind) && !is_new(kind)) {
        spill(scene_path(FILE_TARGET), s->files[FILE_TARGET].data, s->files[FILE_TARGET].n);
        assert_int_equal(chmod(scene_path(FILE_TARGET), 0600), 0);
    }
    if (kind == SAVE_LINK)
        assert_int_equal(symlink("target", in_folder("link")), 0);
    if (kind == SAVE_STALE)
        make_stale();
    if (kind == SAVE_FD)
        s->fd = open(scene_path(FILE_TARGET), O_WRONLY | O_TRUNC);
    if (kind == LOAD_FD)
        s->fd = open(scene_path(FILE_WHOLE), O_RDONLY);
    expect_ok(s->cache, kvt_cache_trim(s->cache));
    s->live_before = s->live;
    if (is_load(kind)) {
        s->loads = model_seq(s->cache);
        model_append(&s->m, s->cache, s->loads, 70, 35);
        if (!s->loads_hash)
            s->loads_hash = state_hash(&s->m, s->cache, s->loads);
        expect_ok(s->cache, kvt_cache_trim(s->cache)); /* loads have to allocate */
    }
    s->text[0] = '\0';
}

static kvt_status save(scenes *s, scene_kind kind)
{
    static const kvt_snapshot_piece piece = {"note", "of the caller", 13};
    kvt_save_options o = save_options();
    const char *path = kind == SAVE_LINK ? in_folder("link") : scene_path(FILE_TARGET);

    o.pieces = &piece;
    o.n_pieces = 1;
    o.codec = kind == SAVE_STALE ? KVT_CODEC_RAW : KVT_CODEC_ZSTD;
    o.in_place = kind == SAVE_IN_PLACE || kind == SAVE_IN_PLACE_NEW;
    if (kind == SAVE_DELTA)
        o.parent = scene_path(FILE_DELTA);
    if (kind == SAVE_SECRET_DELTA)
        o.parent = scene_path(FILE_SECRET_DELTA);
    if (kind == SAVE_SECRET || kind == SAVE_SECRET_DELTA)
        o.key = key;
    return kind == SAVE_FD ? kvt_seq_save_fd(s->full, s->fd, &o) : kvt_seq_save(s->full, path, &o);
}

static scene_file loaded_file(scene_kind kind)
{
    return kind == LOAD_CHAIN || kind == LOAD_CHAIN_LAZY ? FILE_AGAIN
           : kind == LOAD_NATIVE || kind == LOAD_VERIFY  ? FILE_NATIVE
           : kind == LOAD_LAZY                           ? FILE_NATIVE
           : kind == LOAD_SECRET                         ? FILE_SECRET
           : kind == LOAD_SECRET_CHAIN                   ? FILE_SECRET_DELTA
                                                         : FILE_WHOLE;
}

static kvt_status load(scenes *s, scene_kind kind)
{
    kvt_load_options o = load_options();

    if (kind == LOAD_VERIFY)
        o.map = KVT_MAP_VERIFY;
    if (kind == LOAD_LAZY || kind == LOAD_CHAIN_LAZY)
        o.map = KVT_MAP_LAZY;
    if (kind == LOAD_SECRET || kind == LOAD_SECRET_CHAIN)
        o.key = key;
    if (kind == LOAD_PREFIX) {
        o.prompt = s->prompt;
        o.n_prompt = 150;
        o.reuse = KVT_REUSE_PREFIX;
    }
    return kind == LOAD_FD ? kvt_seq_load_fd(s->loads, s->fd, &o, NULL)
                           : kvt_seq_load(s->loads, scene_path(loaded_file(kind)), &o, NULL);
}

static kvt_status convert(scenes *s, scene_kind kind)
{
    kvt_load_options from = load_options();
    kvt_save_options to = save_options();
    if (kind == CONVERT_SECRET)
        from.key = to.key = key;
    return kvt_snapshot_convert(scene_path(kind == CONVERT_SECRET ? FILE_SECRET_DELTA : FILE_AGAIN),
                                &from, scene_path(FILE_TARGET), &to, s->text, sizeof s->text);
}

static kvt_status inspect(scenes *s)
{
    kvt_snapshot_info info;
    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    return kvt_snapshot_inspect(scene_path(FILE_AGAIN), 1, &info, s->text, sizeof s->text);
}

kvt_status scene_run(scenes *s, scene_kind kind)
{
    kvt_status status;

    if (kind == INSPECT_CHAIN)
        return inspect(s);
    if (kind == CONVERT_MERGE || kind == CONVERT_SECRET)
        return convert(s, kind);
    status = is_save(kind) ? save(s, kind) : load(s, kind);
    if (status != KVT_OK)
        (void)kvt_cache_error(s->cache, s->text, sizeof s->text);
    return status;
}

/* What a load has to give. */
static uint64_t loaded_hash(const scenes *s, scene_kind kind)
{
    return kind == LOAD_PREFIX         ? s->reuse_hash
           : kind == LOAD_SECRET       ? s->small_hash
           : kind == LOAD_SECRET_CHAIN ? s->half_hash
                                       : s->full_hash;
}

scene_target scene_target_of(scenes *s, scene_kind kind)
{
    bytes now = slurp(scene_path(FILE_TARGET));
    int is_secret = kind == SAVE_SECRET || kind == SAVE_SECRET_DELTA || kind == CONVERT_SECRET;
    scene_target answer = now.data ? TARGET_OTHER : TARGET_NONE;

    if (now.data && is_same(&now, &s->files[FILE_TARGET]) && !is_new(kind)) {
        answer = TARGET_OLD;
    } else if (now.data) {
        kvt_load_options o = load_options();
        kvt_seq *seq = model_seq(s->cache);
        kvt_status status;
        o.key = is_secret ? key : NULL;
        status = kvt_seq_load(seq, scene_path(FILE_TARGET), &o, NULL);
        if (status == KVT_OK && state_hash(&s->m, s->cache, seq) ==
                                    (kind == CONVERT_SECRET ? s->half_hash : s->full_hash))
            answer = TARGET_NEW;
        else if (status == KVT_ERR_CORRUPT || status == KVT_ERR_FORMAT)
            answer = TARGET_PART;
        kvt_seq_destroy(seq);
    }
    bytes_free(&now);
    return answer;
}

scene_target scene_end(scenes *s, scene_kind kind, kvt_status status, int leaves)
{
    scene_target target = TARGET_NONE;
    struct stat attributes;

    if (s->fd >= 0)
        assert_int_equal(close(s->fd), 0);
    s->fd = -1;
    if (is_load(kind)) {
        uint64_t want = status == KVT_OK ? loaded_hash(s, kind) : s->loads_hash;
        if (state_hash(&s->m, s->cache, s->loads) != want)
            fail_msg("%s: status %d, another sequence of %u tokens", scene_names[kind], (int)status,
                     (unsigned)kvt_seq_length(s->loads));
        kvt_seq_destroy(s->loads);
        s->loads = NULL;
    } else if (is_save(kind)) {
        assert_true(state_hash(&s->m, s->cache, s->full) == s->full_hash);
    }
    for (int i = 0; i < FILE_TARGET; i++) {
        bytes now = slurp(scene_path((scene_file)i));
        assert_true(is_same(&now, &s->files[i]));
        bytes_free(&now);
    }
    assert_int_equal(count_descriptors(), s->descriptors);
    assert_int_equal(count_mappings(), 0);
    assert_true(scene_temporaries() <= leaves);
    if (scene_writes(kind))
        target = scene_target_of(s, kind);
    if (kind == SAVE_LINK)
        assert_true(lstat(in_folder("link"), &attributes) == 0 && S_ISLNK(attributes.st_mode));
    if (scene_writes(kind) && !is_new(kind)) /* never wider than the old one */
        assert_true(stat(scene_path(FILE_TARGET), &attributes) == 0 &&
                    (attributes.st_mode & 0777) == 0600);
    expect_ok(s->cache, kvt_cache_trim(s->cache));
    assert_int_equal(s->live, s->live_before);
    return target;
}
