/*
 * What holds of a sequence before and after a load, and what the targets share.
 */
#include "fuzz.h"

#include <math.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PARENT_BYTES = 300 << 10 }; /* of each parent: kvt_working_forecast */

void fuzz_fail(const char *file, int line, const char *what)
{
    (void)fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what);
    abort();
}

/* ---- state ---- */

blob state_of(const kvt_seq *seq)
{
    blob b = {NULL, 0};
    kvt_save_options options;
    kvt_status status;
    uint64_t most;

    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.codec = KVT_CODEC_RAW;
    status = kvt_seq_save_bound(seq, &most, &options);
    if (status == KVT_ERR_CORRUPT)
        return b;
    CHECK(status == KVT_OK);
    b.data = malloc((size_t)most + 1);
    CHECK(b.data);
    status = kvt_seq_save_memory(seq, b.data, (size_t)most, &b.n, &options);
    if (status != KVT_OK && status != KVT_ERR_CORRUPT)
        fuzz_fail(__FILE__, __LINE__, kvt_status_string(status));
    if (status != KVT_OK) {
        free(b.data);
        b.data = NULL;
    }
    return b;
}

int same_blob(const blob *a, const blob *b)
{
    return a->n == b->n && memcmp(a->data, b->data, a->n) == 0;
}

void check_unchanged(place *p)
{
    blob now, before = {p->before, p->n_before};
    p->meter.countdown = 0;
    now = state_of(p->seq);
    CHECK(now.data && same_blob(&now, &before));
    free(now.data);
}

void check_memory(place *p, const input *in, size_t before)
{
    uint64_t bytes = 0, entries, block = 0, tokens;
    for (size_t i = 0; i < in->n; i++)
        bytes += in->bytes[i];
    if (in->bytes[0] < 64)
        return;
    tokens = load64(in->files[0] + 24);
    tokens = tokens < p->config.max_tokens ? tokens : p->config.max_tokens;
    if (!p->working || tokens != p->working_tokens)
        CHECK(kvt_working_forecast(&p->config, tokens, &p->working) == KVT_OK);
    p->working_tokens = tokens;
    entries = load64(in->files[0] + 48);
    entries = entries < bytes / 32 ? entries : bytes / 32;
    for (uint32_t g = 0; g < p->config.n_groups; g++) {
        const kvt_group_config *group = &p->groups[g];
        block += (uint64_t)group->n_layers * group->n_kv_heads *
                 (64 * 4 * (group->k_dim + group->v_dim + 32) + 16 * (group->k_dim + 16) + 1024);
    }
    CHECK(p->meter.peak - before <= p->working + 2 * (entries + 4) * block + 4 * bytes +
                                        16 * tokens + 65536 + (in->n - 1) * PARENT_BYTES);
}

/* ---- after a load ---- */

static void attend(place *p, const kvt_seq *seq, int lazy)
{
    static float q[16 * 256], out[16 * 256];
    if (!kvt_seq_length(seq))
        return;
    for (size_t i = 0; i < sizeof q / sizeof *q; i++)
        q[i] = 0.01f * (float)(i % 17);
    for (uint32_t g = 0; g < p->config.n_groups; g++) {
        const kvt_group_config *group = &p->groups[g];
        for (uint32_t i = 0; i < group->n_layers; i++) {
            kvt_attend_args args = kvt_attend_args_init();
            kvt_attend_item item;
            kvt_status status;
            memset(&item, 0, sizeof item);
            item.seq = seq;
            item.n_queries = 1;
            args.layer = group->layers ? group->layers[i] : i;
            args.items = &item;
            args.n_items = 1;
            args.q = kvt_tensor_f32(q);
            args.out = kvt_tensor_f32(out);
            status = kvt_attend(p->cache, &args);
            /* Blocks for the next query suffice; the last token's may see one more. */
            CHECK(status == KVT_OK || status == KVT_ERR_VALUE ||
                  (status == KVT_ERR_STATE && group->window_tokens) ||
                  (status == KVT_ERR_CORRUPT && lazy));
            for (uint32_t j = 0; status == KVT_OK && j < group->n_q_heads * group->v_dim; j++)
                CHECK(isfinite(out[j]));
        }
    }
}

static int visitor(void *user, const kvt_token_view *token)
{
    double *sum = user;
    *sum += (double)token->k[0] + (double)token->v[0];
    return 0;
}

static void read_back(place *p, const kvt_seq *seq, int lazy)
{
    static float out[64 * 8 * 256];
    uint64_t n = kvt_seq_length(seq), at;
    kvt_tensor rows = kvt_tensor_f32(out);
    double sum = 0;
    for (uint32_t g = 0; g < p->config.n_groups; g++)
        for (int side = 0; side < 2; side++)
            for (uint64_t first = 0; first<n; first += n> 1024 ? 4096 : 64) {
                uint64_t here = n - first < 64 ? n - first : 64;
                uint32_t layer = p->groups[g].layers ? p->groups[g].layers[0] : 0;
                kvt_status status = kvt_read(seq, layer, (kvt_side)side, first, here, &rows);
                CHECK(status == KVT_OK || (status == KVT_ERR_STATE && p->groups[g].window_tokens) ||
                      (status == KVT_ERR_CORRUPT && lazy));
            }
    if (n && n < 300)
        (void)kvt_visit(seq, 0, 0, n, visitor, &sum, &at);
}

/* Tokens out of the newest ones, singly: V stays as it is. */
static void take_out(place *p, kvt_seq *seq)
{
    enum { BEHIND = 20 };
    static float before[BEHIND * 8 * 256], after[BEHIND * 8 * 256];
    const uint64_t n = kvt_seq_length(seq), gone = 3 + n % 40;
    const uint32_t layer = p->groups[0].layers ? p->groups[0].layers[0] : 0;
    const size_t floats = (size_t)BEHIND * p->groups[0].n_kv_heads * p->groups[0].v_dim;
    kvt_tensor x = kvt_tensor_f32(before), y = kvt_tensor_f32(after);
    kvt_status status;
    blob a;
    if (n < BEHIND + gone || kvt_read(seq, layer, KVT_SIDE_V, n - BEHIND, BEHIND, &x) != KVT_OK)
        return;
    status = kvt_seq_remove(seq, n - BEHIND - gone, gone);
    CHECK(status == KVT_OK || status == KVT_ERR_UNSUPPORTED || status == KVT_ERR_STATE ||
          (status == KVT_ERR_BUDGET && p->config.memory_budget_bytes));
    if (status != KVT_OK)
        return;
    CHECK(kvt_read(seq, layer, KVT_SIDE_V, n - gone - BEHIND, BEHIND, &y) == KVT_OK);
    if (!(p->groups[0].flags & KVT_GROUP_V_IN_K))
        CHECK(memcmp(before, after, floats * sizeof *before) == 0);
    attend(p, seq, 0);
    a = state_of(seq);
    CHECK(a.data);
    status = kvt_seq_load_memory(seq, a.data, a.n, NULL, NULL);
    CHECK(status == KVT_OK || (status == KVT_ERR_BUDGET && p->config.memory_budget_bytes));
    free(a.data);
}

void check_loaded(place *p, kvt_seq *seq, const kvt_load_result *result, int lazy)
{
    uint64_t n = kvt_seq_length(seq), points[8];
    size_t n_points, size;
    unsigned char piece[64];
    blob a, b;

    CHECK(result->n_tokens == n);
    CHECK(result->reuse_tokens <= result->prefix_tokens || !result->prefix_tokens);
    attend(p, seq, lazy);
    read_back(p, seq, lazy);
    a = state_of(seq);
    CHECK(a.data || lazy);
    if (a.data) {
        kvt_status status;
        CHECK(kvt_seq_clear(p->other) == KVT_OK);
        status = kvt_seq_load_memory(p->other, a.data, a.n, NULL, NULL);
        CHECK(status == KVT_OK || (status == KVT_ERR_BUDGET && p->config.memory_budget_bytes));
        if (status == KVT_OK) {
            b = state_of(p->other);
            CHECK(b.data && same_blob(&a, &b));
            free(b.data);
            take_out(p, p->other);
        }
        free(a.data);
    }
    /* Back to each checkpoint, and on from there. */
    CHECK(kvt_seq_checkpoints(seq, points, 8, &n_points) == KVT_OK);
    for (size_t i = n_points < 8 ? n_points : 8; i-- > 0;) {
        kvt_status status;
        CHECK(kvt_seq_checkpoint_read(seq, points[i], piece, sizeof piece, &size) == KVT_OK);
        status = kvt_seq_truncate(seq, points[i]);
        CHECK(status == KVT_OK || (status == KVT_ERR_CORRUPT && lazy) ||
              (status == KVT_ERR_BUDGET && p->config.memory_budget_bytes));
        if (status != KVT_OK)
            break;
        attend(p, seq, lazy);
        a = state_of(seq);
        CHECK(a.data || lazy);
        free(a.data);
        place_append(p, seq, 70);
    }
    n = kvt_seq_length(seq);
    if (n) {
        (void)kvt_seq_truncate(seq, kvt_seq_reachable(seq, n - 1));
        place_append(p, seq, 3);
        (void)kvt_seq_truncate(seq, kvt_seq_reachable(seq, n - n / 3));
        attend(p, seq, lazy);
        place_append(p, seq, 80);
        (void)kvt_seq_remove(seq, 64, 64);
        attend(p, seq, lazy);
        a = state_of(seq);
        CHECK(a.data || lazy);
        free(a.data);
    }
}

/* ---- options ---- */

static unsigned n_pieces, n_progress, cancel_at;

static int on_piece(void *user, const kvt_snapshot_piece *piece)
{
    (void)user;
    CHECK(piece->name[0] && strlen(piece->name) <= KVT_MAX_NAME);
    for (size_t i = 0; i < piece->bytes; i++)
        n_pieces += ((const unsigned char *)piece->data)[i];
    n_pieces++;
    return cancel_at == 255;
}

static int on_progress(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    CHECK(done <= total);
    return ++n_progress == cancel_at;
}

void options_of(const input *in, place *p, kvt_load_options *options)
{
    static int32_t prompt[1024];
    static uint32_t layers[32];
    const unsigned reuse = in->controls[CONTROL_REUSE], mask = in->controls[CONTROL_LAYERS];
    uint32_t n = 0;

    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
    options->reuse = reuse % 3;
    if (reuse % 3 || reuse >= 4) {
        /* Ids of a section that is raw, as the seeds have them; or others. */
        static const unsigned char zeros[4];
        const unsigned char *ids = NULL;
        size_t header = in->bytes[0] >= 64 ? load32(in->files[0] + 12) : 0, at = 0;
        for (size_t i = header; header && i + 80 < in->bytes[0] && i < header + 1024; i += 8)
            if (load32(in->files[0] + i) == 1 && load32(in->files[0] + i + 4) == 1) {
                ids = in->files[0] + i + 72;
                at = (in->bytes[0] - i - 72) / 4;
                break;
            }
        options->n_prompt = in->controls[CONTROL_PROMPT] * 4u;
        for (uint32_t i = 0; i < options->n_prompt; i++)
            prompt[i] = (int32_t)load32(ids && i < at ? ids + 4 * i : zeros);
        for (uint32_t i = 0; i < options->n_prompt; i++)
            prompt[i] = prompt[i] < -1 ? 0 : prompt[i];
        options->prompt = options->n_prompt ? prompt : NULL;
    }
    options->convert = in->controls[CONTROL_TYPES] != 0;
    if (mask) {
        uint32_t all = in->bytes[0] >= 64 ? load32(in->files[0] + 36) : 0;
        for (uint32_t i = 0; i < all && i < 32; i++)
            if (mask >> i % 8 & 1)
                layers[n++] = i;
        options->layers = n ? layers : NULL;
        options->n_layers = n;
    }
    options->on_piece = on_piece;
    options->progress = on_progress;
    n_progress = 0;
    cancel_at = in->controls[CONTROL_CANCEL];
    p->meter.countdown = in->controls[CONTROL_FAIL];
    p->meter.peak = p->meter.live;
}

void save_options_of(const input *in, const place *p, kvt_save_options *options)
{
    static kvt_type k_types[KVT_MAX_GROUPS], v_types[KVT_MAX_GROUPS];
    static const kvt_snapshot_piece piece = {"fuzz", "a piece", 7};
    const unsigned codec = in->controls[CONTROL_CODEC], range = in->controls[CONTROL_RANGE];

    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
    options->codec = codec % 3;
    options->no_fsync = 1;
    options->in_place = codec >> 2 & 1;
    options->zstd_level = (int32_t)(codec >> 3 & 3);
    options->pieces = codec & 32 ? &piece : NULL;
    options->n_pieces = codec & 32 ? 1 : 0;
    options->first_token = range % 4 * 64;
    options->n_tokens = range / 4;
    if (codec & 64) {
        for (uint32_t g = 0; g < p->config.n_groups; g++) {
            k_types[g] = (kvt_type)((codec + g) % 4);
            v_types[g] = p->groups[g].flags & KVT_GROUP_V_IN_K ? k_types[g]
                                                               : (kvt_type)((codec / 3 + g) % 5);
        }
        options->convert = 1;
        options->n_types = p->config.n_groups;
        options->k_types = k_types;
        options->v_types = codec & 128 ? NULL : v_types;
        if (codec & 16)
            options->n_types = 1;
        if ((codec & 144) == 144) {
            options->v_types = v_types;
            options->k_types = NULL;
        }
    }
}

/* ---- files ---- */

static int64_t view_read(void *user, void *to, size_t n)
{
    view *v = user;
    if (n > v->n - v->at)
        n = v->n - v->at;
    if (v->most && n > v->most)
        n = v->most;
    if (n)
        memcpy(to, v->data + v->at, n);
    v->at += n;
    return (int64_t)n;
}

kvt_reader view_reader(view *v)
{
    kvt_reader reader = {v, view_read};
    return reader;
}

static void put_all(int fd, const unsigned char *data, size_t n)
{
    while (n) {
        ssize_t done = write(fd, data, n);
        CHECK(done > 0);
        data += done;
        n -= (size_t)done;
    }
}

int memfd_create(const char *name, unsigned flags); /* of Linux; the headers hide it */

const char *memory_file(const unsigned char *data, size_t n)
{
    static int fds[4] = {-1, -1, -1, -1};
    static char paths[4][32];
    static unsigned next;
    unsigned i = next++ % 4;
    if (fds[i] >= 0)
        (void)close(fds[i]);
    fds[i] = memfd_create("fuzz", 0);
    CHECK(fds[i] >= 0);
    put_all(fds[i], data, n);
    (void)snprintf(paths[i], sizeof paths[i], "/proc/self/fd/%d", fds[i]);
    return paths[i];
}

static char folder[64];

static void remove_folder(void)
{
    for (size_t i = 0; i < 10; i++)
        (void)unlink(folder_file(i, NULL, 0));
    (void)rmdir(folder);
}

const char *fuzz_folder(void)
{
    if (!folder[0]) {
        (void)snprintf(folder, sizeof folder, "/dev/shm/kvt-fuzz-XXXXXX");
        if (!mkdtemp(folder)) {
            (void)snprintf(folder, sizeof folder, "/tmp/kvt-fuzz-XXXXXX");
            CHECK(mkdtemp(folder));
        }
        (void)atexit(remove_folder);
    }
    return folder;
}

const char *folder_file(size_t i, const unsigned char *data, size_t n)
{
    static char paths[10][80];
    (void)snprintf(paths[i], sizeof paths[i], "%s/p%zu.kvt", fuzz_folder(), i);
    if (data) {
        FILE *f;
        (void)unlink(paths[i]); /* it may be mapped */
        f = fopen(paths[i], "wb");
        CHECK(f);
        CHECK(fwrite(data, 1, n, f) == n);
        CHECK(fclose(f) == 0);
    }
    return paths[i];
}
