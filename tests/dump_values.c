/*
 * dump_values FOLDER: put prefixes of several geometries into a store that is a folder for each,
 * FOLDER/CASE, and write beside the values what tests/read_value.py needs to make the keys by
 * itself, and what kvt_read gives of the values. In each folder:
 *
 *   KEY.bin             a value, by its key in hex
 *   case.json           tokens, geometry, options, checkpoints
 *   rows.f32            of each row of the prefix, each layer: K and V of its 64 tokens
 *   checkpoint-N.f32    of each checkpoint, each row, each layer: K and V, 0xff where released
 *
 * What is read comes out of the store: each row and each checkpoint is got by a prompt that ends
 * behind it, so that also rows of a window can be read.
 */
#include <kvtile/store.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MOST = 420, LAYERS = 3, POINTS = 6, HEADS = 2, WIDEST = 64, PATH_BYTES = 1024 };

typedef struct example {
    const char *name;
    kvt_type k_type, v_type;
    uint32_t flags, k_dim, v_dim, kv_heads;
    uint32_t residual, window, sinks;
    uint32_t fine; /* fine_tokens of the first group */
    uint32_t n_layers;
    uint32_t n_groups;     /* 2: layer 1 is of a group of its own, K f16 of 8 dims, V i8 of 16 */
    uint32_t peak, cut_at; /* so many tokens, cut, then up to MOST */
    uint32_t points[POINTS];
    int named; /* namespace, salt, tag, extras, positions */
} example;

static const example examples[] = {
    {"i8", KVT_TYPE_I8, KVT_TYPE_I8, 0, 24, 40, 2, 0, 0, 0, 0, 3, 1, 0, 0, {0}, 0},
    {"i8-named", KVT_TYPE_I8, KVT_TYPE_I8, 0, 16, 16, 1, 0, 0, 0, 0, 3, 1, 0, 0, {0}, 1},
    {"i4-i5", KVT_TYPE_I4, KVT_TYPE_I5, 0, 40, 24, 2, 0, 0, 0, 130, 3, 1, 0, 0, {0}, 0},
    {"i4", KVT_TYPE_I4, KVT_TYPE_I4, 8, 16, 16, 1, 0, 0, 0, KVT_FINE_NONE, 3, 1, 0, 0, {0}, 0},
    {"f16-f32", KVT_TYPE_F16, KVT_TYPE_F32, 0, 8, 24, 1, 0, 0, 0, 0, 3, 1, 0, 0, {0}, 0},
    {"v-in-k",
     KVT_TYPE_I8,
     KVT_TYPE_I8,
     KVT_GROUP_V_IN_K,
     48,
     32,
     2,
     0,
     0,
     0,
     0,
     3,
     1,
     0,
     0,
     {0},
     0},
    {"window", KVT_TYPE_I8, KVT_TYPE_I8, 0, 24, 8, 1, 0, 100, 70, 0, 3, 2, 0, 0, {0}, 0},
    /* Inside of a row, at its end, less than a row, and one with a next position of its own. */
    {"checkpoints",
     KVT_TYPE_I8,
     KVT_TYPE_F16,
     0,
     16,
     8,
     1,
     0,
     90,
     0,
     0,
     3,
     2,
     0,
     0,
     {50, 192, 345, 384, 410},
     1},
    /* In rows that were sealed, cut, and are open again. */
    {"checkpoints-i4",
     KVT_TYPE_I4,
     KVT_TYPE_I4,
     0,
     16,
     24,
     1,
     KVT_RESIDUAL_NONE,
     0,
     0,
     0,
     3,
     1,
     370,
     300,
     {100, 300, 310, 330, 400},
     0},
    /* Of docs/format.md. */
    {"example", KVT_TYPE_I8, KVT_TYPE_I8, 9, 8, 8, 1, 0, 0, 0, 0, 1, 1, 0, 0, {0}, 0},
};
enum { N_EXAMPLES = sizeof examples / sizeof *examples };

static void die(const char *what, kvt_cache *cache)
{
    char text[256] = "";
    if (cache)
        (void)kvt_cache_error(cache, text, sizeof text);
    (void)fprintf(stderr, "%s: %s\n", what, text);
    exit(1);
}

/* ---- a folder as a store ---- */

typedef struct folder {
    char path[PATH_BYTES / 2];
} folder;

static FILE *open_value(const folder *f, const kvt_store_key *key, const char *mode)
{
    char path[PATH_BYTES];
    size_t at = (size_t)snprintf(path, sizeof path, "%s/", f->path);
    for (size_t i = 0; i < KVT_STORE_KEY_BYTES; i++)
        at += (size_t)snprintf(path + at, sizeof path - at, "%02x", key->bytes[i]);
    (void)snprintf(path + at, sizeof path - at, ".bin");
    return fopen(path, mode);
}

static kvt_status get(void *user, const kvt_store_key *keys, size_t n,
                      const kvt_store_receiver *receiver, kvt_store_error *error)
{
    (void)error;
    for (size_t i = 0; i < n; i++) {
        static unsigned char value[1 << 20];
        FILE *file = open_value(user, &keys[i], "rb");
        size_t bytes;
        if (!file)
            continue;
        bytes = fread(value, 1, sizeof value, file);
        (void)fclose(file);
        if (receiver->part(receiver->user, i, bytes, 0, value, bytes) == KVT_STORE_STOP)
            break;
    }
    return KVT_OK;
}

static kvt_status put(void *user, const kvt_store_key *keys, const kvt_store_value *values,
                      size_t n, size_t *n_put, kvt_store_error *error)
{
    for (*n_put = 0; *n_put < n; ++*n_put) {
        const kvt_store_value *value = &values[*n_put];
        FILE *file = open_value(user, &keys[*n_put], "wb");
        int bad = !file;
        for (size_t i = 0; !bad && i < value->n_parts; i++)
            bad = fwrite(value->parts[i].data, 1, value->parts[i].bytes, file) !=
                  value->parts[i].bytes;
        if (file && fclose(file) != 0)
            bad = 1;
        if (bad) {
            (void)snprintf(error->text, sizeof error->text, "%s", strerror(errno));
            return KVT_ERR_IO;
        }
    }
    return KVT_OK;
}

static kvt_status exists(void *user, const kvt_store_key *keys, size_t n, uint8_t *found,
                         kvt_store_error *error)
{
    (void)error;
    for (size_t i = 0; i < n; i++) {
        FILE *file = open_value(user, &keys[i], "rb");
        found[i] = file != NULL;
        if (file)
            (void)fclose(file);
    }
    return KVT_OK;
}

/* Nothing here is ever refused. */
static kvt_status remove_values(void *user, const kvt_store_key *keys, size_t n,
                                kvt_store_error *error)
{
    (void)user;
    (void)keys;
    (void)n;
    (void)snprintf(error->text, sizeof error->text, "nothing is removed from this store");
    return KVT_ERR_UNSUPPORTED;
}

/* ---- a sequence ---- */

static const char name_space[] = "a tenant", salt[] = "\x00\x01 salt", tag[] = "lora: 7",
                  fingerprint[] = "example";
static const unsigned char image[3] = {0xca, 0x00, 0xfe};
static const kvt_prefix_extra extras[] = {{1, image, sizeof image}, {4, "adapter", 7}};

static int32_t ids[MOST + 1], positions[MOST + 1];

/* A multiple of 1/64 in about -8 .. 8, keys of some dims offset by 12. */
static float number(uint32_t layer, uint32_t token, uint32_t i, int is_k)
{
    uint32_t x = (layer * 1000003u + token * 7919u + i * 31u + (is_k ? 17u : 0u)) * 2654435761u;
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    return ((float)(x & 511u) + (float)(x >> 9 & 511u) - 511.0f) / 64.0f +
           (is_k && i % 11 == 0 ? 12.0f : 0.0f);
}

static kvt_group_config groups[2];

static const kvt_group_config *group_of_layer(const example *e, uint32_t layer)
{
    return &groups[e->n_groups == 2 && layer == 1];
}

static kvt_cache *make_cache(const example *e)
{
    static const uint32_t split[2][LAYERS] = {{0, 2, 0}, {1, 0, 0}};
    kvt_config config = kvt_config_init();
    kvt_cache *cache = NULL;

    for (uint32_t g = 0; g < e->n_groups; g++) {
        kvt_group_config *c = &groups[g];
        *c = kvt_group_config_init();
        c->n_layers = e->n_groups == 1 ? e->n_layers : 2 - g;
        c->layers = e->n_groups == 1 ? NULL : split[g];
        c->n_kv_heads = g ? 2 : e->kv_heads;
        c->n_q_heads = 2 * c->n_kv_heads;
        c->k_dim = g ? 8 : e->k_dim;
        c->v_dim = g ? 16 : e->v_dim;
        c->k_type = g ? KVT_TYPE_F16 : e->k_type;
        c->v_type = g ? KVT_TYPE_I8 : e->v_type;
        c->flags = g ? 0 : e->flags;
        c->rotation_seed = 2026;
        c->residual_tokens = g ? 0 : e->residual;
        c->window_tokens = g ? 0 : e->window;
        c->sink_tokens = g ? 0 : e->sinks;
        c->fine_tokens = g ? 0 : e->fine;
    }
    config.groups = groups;
    config.n_groups = e->n_groups;
    config.max_tokens = MOST + 1;
    config.fingerprint = fingerprint;
    config.fingerprint_bytes = sizeof fingerprint - 1;
    if (kvt_cache_create(&config, &cache) != KVT_OK)
        die("kvt_cache_create", NULL);
    return cache;
}

static kvt_seq *make_seq(const example *e, kvt_cache *cache)
{
    kvt_seq *seq = NULL;
    if (kvt_seq_create(cache, &seq) != KVT_OK ||
        (e->named && kvt_seq_set_tag(seq, tag, sizeof tag - 1) != KVT_OK))
        die("a sequence", cache);
    return seq;
}

/* A step of n tokens that follow. */
static void step(const example *e, kvt_cache *cache, kvt_seq *seq, uint32_t n)
{
    static float k[MOST * HEADS * WIDEST], v[MOST * HEADS * WIDEST];
    const uint32_t first = (uint32_t)kvt_seq_length(seq);
    kvt_tensor keys = kvt_tensor_f32(k), values = kvt_tensor_f32(v);

    if (kvt_seq_begin(seq, n, positions + first) != KVT_OK)
        die("kvt_seq_begin", cache);
    for (uint32_t layer = 0; layer < e->n_layers; layer++) {
        const kvt_group_config *c = group_of_layer(e, layer);
        const uint32_t k_row = c->n_kv_heads * c->k_dim, v_row = c->n_kv_heads * c->v_dim;
        for (uint32_t t = 0; t < n; t++) {
            for (uint32_t i = 0; i < k_row; i++)
                k[t * k_row + i] = number(layer, first + t, i, 1);
            for (uint32_t i = 0; i < v_row; i++)
                v[t * v_row + i] = number(layer, first + t, i, 0);
        }
        if (kvt_append(seq, layer, &keys, c->flags & KVT_GROUP_V_IN_K ? NULL : &values) != KVT_OK)
            die("kvt_append", cache);
    }
    if (kvt_seq_commit(seq, ids + first) != KVT_OK)
        die("kvt_seq_commit", cache);
}

/* The blob of a checkpoint: as many bytes as its number of tokens modulo 50. */
static size_t make_blob(uint32_t n_tokens, unsigned char *blob)
{
    for (uint32_t i = 0; i < 50; i++)
        blob[i] = (unsigned char)(n_tokens + i * i);
    return n_tokens % 50;
}

/* A checkpoint where the sequence has as many tokens as one of them. */
static void mark(const example *e, kvt_cache *cache, kvt_seq *seq)
{
    const uint32_t length = (uint32_t)kvt_seq_length(seq);
    for (uint32_t i = 0; i < POINTS; i++)
        if (e->points[i] == length) {
            unsigned char blob[50];
            size_t bytes = make_blob(length, blob);
            if (i == 1 && kvt_seq_set_next_position(seq, positions[length] + 3) != KVT_OK)
                die("kvt_seq_set_next_position", cache);
            if (kvt_seq_checkpoint(seq, blob, bytes) != KVT_OK)
                die("kvt_seq_checkpoint", cache);
        }
}

/* Grow to n_tokens in steps that end at the checkpoints, putting all that there is to put. */
static void grow(const example *e, kvt_cache *cache, kvt_seq *seq, const kvt_store *store,
                 const kvt_prefix_options *options, uint32_t n_tokens, kvt_prefix_result *result)
{
    while (kvt_seq_length(seq) < n_tokens) {
        const uint32_t length = (uint32_t)kvt_seq_length(seq);
        uint32_t n = n_tokens - length < 40 ? n_tokens - length : 40;
        for (uint32_t i = 0; i < POINTS; i++)
            if (e->points[i] > length && e->points[i] - length < n)
                n = e->points[i] - length;
        step(e, cache, seq, n);
        if (n_tokens == MOST || length + n < e->cut_at) /* not where it will be cut off */
            mark(e, cache, seq);
        if (kvt_prefix_put(store, seq, options, result) != KVT_OK)
            die("kvt_prefix_put", cache);
    }
}

/* ---- what is written beside the values ---- */

static FILE *create(const folder *f, const char *name)
{
    char path[PATH_BYTES];
    FILE *file;
    (void)snprintf(path, sizeof path, "%s/%s", f->path, name);
    file = fopen(path, "wb");
    if (!file)
        die(path, NULL);
    return file;
}

static void write_hex(FILE *file, const char *name, const void *data, size_t bytes)
{
    (void)fprintf(file, "\"%s\": \"", name);
    for (size_t i = 0; i < bytes; i++)
        (void)fprintf(file, "%02x", ((const unsigned char *)data)[i]);
    (void)fprintf(file, "\"");
}

static void write_ints(FILE *file, const char *name, const int32_t *x, size_t n)
{
    (void)fprintf(file, "\"%s\": [", name);
    for (size_t i = 0; i < n; i++)
        (void)fprintf(file, "%s%d", i ? ", " : "", (int)x[i]);
    (void)fprintf(file, "],\n");
}

static void describe(const example *e, const folder *f, uint64_t n_tokens)
{
    FILE *file = create(f, "case.json");

    (void)fprintf(file, "{");
    write_hex(file, "name_space", name_space, e->named ? sizeof name_space - 1 : 0);
    (void)fprintf(file, ",\n");
    write_hex(file, "salt", salt, e->named ? sizeof salt - 1 : 0);
    (void)fprintf(file, ",\n");
    write_hex(file, "fingerprint", fingerprint, sizeof fingerprint - 1);
    (void)fprintf(file, ",\n");
    write_hex(file, "tag", tag, e->named ? sizeof tag - 1 : 0);
    (void)fprintf(file, ",\n\"extras\": [");
    for (size_t i = 0; e->named && i < sizeof extras / sizeof *extras; i++) {
        (void)fprintf(file, "%s{\"block\": %d, ", i ? ", " : "", (int)extras[i].block);
        write_hex(file, "data", extras[i].data, extras[i].bytes);
        (void)fprintf(file, "}");
    }
    (void)fprintf(file, "],\n\"groups\": [");
    for (uint32_t g = 0; g < e->n_groups; g++) {
        const kvt_group_config *c = &groups[g];
        const char *between = "";
        (void)fprintf(file,
                      "%s{\"n_q_heads\": %u, \"n_kv_heads\": %u, \"k_dim\": %u, \"v_dim\": %u, "
                      "\"k_type\": %d, \"v_type\": %d, \"flags\": %u, \"rotation_seed\": %llu, "
                      "\"window_tokens\": %u, \"sink_tokens\": %u, \"fine_tokens\": %u, "
                      "\"layers\": [",
                      g ? ", " : "", c->n_q_heads, c->n_kv_heads, c->k_dim, c->v_dim,
                      (int)c->k_type, (int)c->v_type, c->flags,
                      (unsigned long long)c->rotation_seed, c->window_tokens, c->sink_tokens,
                      c->fine_tokens == KVT_FINE_NONE ? 0
                      : c->fine_tokens                ? c->fine_tokens
                                                      : KVT_FINE_TOKENS);
        for (uint32_t layer = 0; layer < e->n_layers; layer++)
            if (group_of_layer(e, layer) == c) {
                (void)fprintf(file, "%s%u", between, layer);
                between = ", ";
            }
        (void)fprintf(file, "]}");
    }
    (void)fprintf(file, "],\n");
    write_ints(file, "ids", ids, MOST);
    write_ints(file, "positions", positions, MOST);
    (void)fprintf(file, "\"checkpoints\": [");
    for (uint32_t i = 0; i < POINTS && e->points[i]; i++) {
        unsigned char blob[50];
        size_t bytes = make_blob(e->points[i], blob);
        (void)fprintf(file, "%s{\"n_tokens\": %u, \"next_position\": %d, ", i ? ", " : "",
                      e->points[i], i == 1 ? (int)positions[e->points[i]] + 3 : -1);
        write_hex(file, "blob", blob, bytes);
        (void)fprintf(file, "}");
    }
    (void)fprintf(file, "],\n\"n_tokens\": %llu}\n", (unsigned long long)n_tokens);
    if (fclose(file) != 0)
        die("case.json", NULL);
}

/* A row's K and V of each layer. */
static void write_row(const example *e, const kvt_seq *seq, uint64_t first, uint64_t n, FILE *file)
{
    for (uint32_t layer = 0; layer < e->n_layers; layer++)
        for (int side = 0; side < 2; side++) {
            static float x[64 * HEADS * WIDEST];
            const kvt_group_config *c = group_of_layer(e, layer);
            const size_t row = c->n_kv_heads * (side ? c->v_dim : c->k_dim);
            kvt_tensor out = kvt_tensor_f32(x);
            if (kvt_read(seq, layer, side ? KVT_SIDE_V : KVT_SIDE_K, first, n, &out) != KVT_OK)
                memset(x, 0xff, sizeof x);
            (void)fwrite(x, sizeof *x, (size_t)n * row, file);
        }
}

/* A new sequence with what a prompt of n_tokens and one more token gets, which is all of it. */
static kvt_seq *got(const example *e, kvt_cache *cache, const kvt_store *store,
                    const kvt_prefix_options *options, uint64_t n_tokens)
{
    kvt_prefix_result result;
    kvt_seq *seq = make_seq(e, cache);
    if (kvt_prefix_get(store, seq, ids, n_tokens + 1, options, &result) != KVT_OK)
        die("kvt_prefix_get", cache);
    if (result.n_tokens != n_tokens || kvt_seq_length(seq) != n_tokens)
        die("kvt_prefix_get: not all of the prefix", NULL);
    return seq;
}

static void write_rows(const example *e, kvt_cache *cache, const kvt_store *store,
                       kvt_prefix_options options, uint64_t n_tokens, const folder *f)
{
    FILE *file = create(f, "rows.f32");

    options.checkpoints = KVT_PREFIX_BLOCKS;
    options.positions = positions;
    for (uint64_t first = 0; first < n_tokens; first += 64) {
        kvt_seq *seq = got(e, cache, store, &options, first + 64);
        write_row(e, seq, first, 64, file);
        kvt_seq_destroy(seq);
    }
    if (fclose(file) != 0)
        die("rows.f32", NULL);
    options.checkpoints = KVT_PREFIX_CHECKPOINT;
    for (uint32_t i = 0; i < POINTS && e->points[i]; i++) {
        const uint64_t n = e->points[i];
        char name[64];
        kvt_seq *seq;
        options.checkpoint_tokens = &n;
        options.n_checkpoint_tokens = 1;
        seq = got(e, cache, store, &options, n);
        (void)snprintf(name, sizeof name, "checkpoint-%u.f32", e->points[i]);
        file = create(f, name);
        for (uint64_t first = 0; first < n; first += 64)
            write_row(e, seq, first, n - first < 64 ? n - first : 64, file);
        if (fclose(file) != 0)
            die(name, NULL);
        kvt_seq_destroy(seq);
    }
}

static void dump(const example *e, const char *path)
{
    kvt_cache *cache = make_cache(e);
    kvt_seq *seq = make_seq(e, cache);
    kvt_prefix_options options = {.struct_size = sizeof options};
    kvt_prefix_result result;
    folder f;
    kvt_store store = {.struct_size = sizeof store,
                       .user = &f,
                       .get = get,
                       .put = put,
                       .exists = exists,
                       .remove = remove_values};

    for (int32_t t = 0; t <= MOST; t++) {
        ids[t] = t * 37 % 500;
        positions[t] = e->named ? 5 + t + t / 10 : t;
    }
    if (e->named) {
        options.name_space = name_space;
        options.name_space_bytes = sizeof name_space - 1;
        options.salt = salt;
        options.salt_bytes = sizeof salt - 1;
        options.extras = extras;
        options.n_extras = sizeof extras / sizeof *extras;
    }
    options.checkpoints = KVT_PREFIX_CHECKPOINT;
    (void)snprintf(f.path, sizeof f.path, "%s/%s", path, e->name);
    if (mkdir(f.path, 0777) != 0)
        die(f.path, NULL);
    if (e->peak) {
        grow(e, cache, seq, &store, &options, e->peak, &result);
        if (kvt_seq_truncate(seq, e->cut_at) != KVT_OK)
            die("kvt_seq_truncate", cache);
        mark(e, cache, seq);
    }
    grow(e, cache, seq, &store, &options, MOST, &result);
    describe(e, &f, result.n_tokens);
    write_rows(e, cache, &store, options, result.n_tokens, &f);
    kvt_seq_destroy(seq);
    kvt_cache_destroy(cache);
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    for (size_t i = 0; i < N_EXAMPLES; i++)
        dump(&examples[i], argv[1]);
    return 0;
}
