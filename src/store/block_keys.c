/*
 * Keys: a hash chain over the prompt's rows.
 *
 *   H(0)     = SHA-256("kvt:seed" | version | namespace | salt | fingerprint | tag)
 *   H(r + 1) = SHA-256("kvt:rows" | H(r) | extra bytes | 64 ids | 64 positions)
 *   key      = SHA-256("kvt:bloc" | H(r + 1) | geometry of the group | form)
 *
 * What may be of any size has its size before it.
 *
 * So a key says what a block's numbers depend on: all tokens up to its end and where they stand,
 * the weights, and how they are stored. What does not change a sealed block is not in it: cuts,
 * threads, the residual window. The first rows of 4-bit groups are of another form; it is in the
 * key instead of fine_tokens, by which caches may differ.
 *
 * A checkpoint's key has the tokens behind the last full row, and the geometry of all groups; with
 * each the form that the row of these tokens is sealed in, if there are any: a truncate may have
 * left a sealed block there.
 */
#include "src/store/stored.h"

#define LABEL_BYTES 8

static void add32(kvt_store_sha256 *hash, uint32_t x)
{
    unsigned char bytes[4];
    kvt_put32(bytes, x);
    kvt_store_sha256_add(hash, bytes, sizeof bytes);
}

static void add64(kvt_store_sha256 *hash, uint64_t x)
{
    unsigned char bytes[8];
    kvt_put64(bytes, x);
    kvt_store_sha256_add(hash, bytes, sizeof bytes);
}

/* Bytes with their size before them, so that no two lists of them look the same. */
static void add_sized(kvt_store_sha256 *hash, const void *data, size_t bytes)
{
    add64(hash, bytes);
    if (bytes)
        kvt_store_sha256_add(hash, data, bytes);
}

static void begin(kvt_store_sha256 *hash, const char *label)
{
    kvt_store_sha256_begin(hash);
    kvt_store_sha256_add(hash, label, LABEL_BYTES);
}

static void hash_geometry(const kvt_cache *cache, uint32_t g, unsigned char *digest)
{
    const kvt_group_config *c = &cache->groups[g].config;
    kvt_store_sha256 hash;

    begin(&hash, "kvt:geom");
    add32(&hash, g);
    add32(&hash, c->n_layers);
    add32(&hash, c->n_q_heads);
    add32(&hash, c->n_kv_heads);
    add32(&hash, c->k_dim);
    add32(&hash, c->v_dim);
    add32(&hash, (uint32_t)c->k_type);
    add32(&hash, (uint32_t)c->v_type);
    add32(&hash, c->flags);
    add64(&hash, c->rotation_seed);
    add32(&hash, c->window_tokens);
    add32(&hash, c->sink_tokens);
    for (uint32_t layer = 0; layer < cache->n_layers; layer++)
        if (cache->layers[layer].group == g)
            add32(&hash, layer);
    kvt_store_sha256_end(&hash, digest);
}

void kvt_stored_chain_begin(kvt_stored_chain *chain, const kvt_seq *seq,
                            const kvt_prefix_options *options)
{
    const kvt_cache *cache = seq->cache;
    kvt_store_sha256 hash;

    memset(chain, 0, sizeof *chain);
    chain->cache = cache;
    chain->extras = options->extras;
    chain->n_extras = options->n_extras;
    begin(&hash, "kvt:seed");
    add32(&hash, KVT_VALUE_VERSION);
    add_sized(&hash, options->name_space, options->name_space_bytes);
    add_sized(&hash, options->salt, options->salt_bytes);
    add_sized(&hash, cache->fingerprint, cache->fingerprint_bytes);
    add_sized(&hash, seq->tag, seq->tag_bytes);
    kvt_store_sha256_end(&hash, chain->hash);
    for (uint32_t g = 0; g < cache->n_groups; g++)
        hash_geometry(cache, g, chain->geometry[g]);
}

void kvt_stored_chain_seek(kvt_stored_chain *chain, const kvt_prefix_options *options,
                           uint64_t rows, const unsigned char *hash)
{
    size_t before = 0, end = options->n_extras;

    while (before < end) { /* extras of the rows before */
        const size_t middle = before + (end - before) / 2;
        if (options->extras[middle].block < rows)
            before = middle + 1;
        else
            end = middle;
    }
    chain->extras = before ? options->extras + before : options->extras; /* which may be NULL */
    chain->n_extras = options->n_extras - before;
    chain->row = rows;
    memcpy(chain->hash, hash, sizeof chain->hash);
}

/* The extra bytes of the row that is next, which may be none. */
static void add_extra(kvt_store_sha256 *hash, const kvt_stored_chain *chain)
{
    if (chain->n_extras && chain->extras->block == chain->row)
        add_sized(hash, chain->extras->data, chain->extras->bytes);
    else
        add_sized(hash, NULL, 0);
}

static void add_tokens(kvt_store_sha256 *hash, const int32_t *ids, const int32_t *positions,
                       size_t n)
{
    kvt_store_sha256_add(hash, ids, n * sizeof *ids);
    kvt_store_sha256_add(hash, positions, n * sizeof *positions);
}

void kvt_stored_chain_add(kvt_stored_chain *chain, const int32_t *ids, const int32_t *positions)
{
    kvt_store_sha256 hash;

    begin(&hash, "kvt:rows");
    kvt_store_sha256_add(&hash, chain->hash, sizeof chain->hash);
    add_extra(&hash, chain);
    add_tokens(&hash, ids, positions, KVT_TOKENS);
    kvt_store_sha256_end(&hash, chain->hash);
    if (chain->n_extras && chain->extras->block == chain->row) {
        chain->extras++;
        chain->n_extras--;
    }
    chain->row++;
}

void kvt_stored_chain_key(const kvt_stored_chain *chain, uint32_t group, kvt_store_key *key)
{
    const size_t row = (size_t)chain->row - 1;
    kvt_store_sha256 hash;

    begin(&hash, "kvt:bloc");
    kvt_store_sha256_add(&hash, chain->hash, sizeof chain->hash);
    kvt_store_sha256_add(&hash, chain->geometry[group], sizeof chain->geometry[group]);
    add32(&hash, kvt_sealed_form(&chain->cache->groups[group], row));
    kvt_store_sha256_end(&hash, key->bytes);
}

void kvt_stored_chain_checkpoint(const kvt_stored_chain *chain, const int32_t *ids,
                                 const int32_t *positions, size_t n, kvt_store_key *key)
{
    kvt_store_sha256 hash;

    begin(&hash, "kvt:chec");
    kvt_store_sha256_add(&hash, chain->hash, sizeof chain->hash);
    add32(&hash, (uint32_t)n);
    if (n) {
        add_extra(&hash, chain);
        add_tokens(&hash, ids, positions, n);
    }
    for (uint32_t g = 0; g < chain->cache->n_groups; g++) {
        kvt_store_sha256_add(&hash, chain->geometry[g], sizeof chain->geometry[g]);
        if (n)
            add32(&hash, kvt_sealed_form(&chain->cache->groups[g], (size_t)chain->row));
    }
    kvt_store_sha256_end(&hash, key->bytes);
}
