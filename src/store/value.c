/*
 * The value of a block, or of a checkpoint, in a store: a head that says what it is and under which
 * key, with a digest of each layer's image, then the images as they are attended over
 * (docs/format.md, "Images").
 *
 * The head is verified by its checksum before anything of it is used, an image by its digest. The
 * key in it tells values that were swapped.
 */
#include "src/store/stored.h"

#include <stdio.h>

#define OFFSET_VERSION 8
#define OFFSET_FLAGS 12
#define OFFSET_KEY 16
#define OFFSET_BYTES 48
#define OFFSET_TOKENS 56
#define OFFSET_BLOB 64
#define OFFSET_POSITION 72
#define OFFSET_ENTRIES 76

static uint64_t digests_end(const kvt_value_head *head, uint64_t n_layers)
{
    uint64_t n = n_layers + (head->flags & KVT_VALUE_CHECKPOINT ? 1 : 0);
    return kvt_value_digests_at(head) + n * KVT_SNAP_ID_BYTES;
}

uint64_t kvt_value_head_bytes(const kvt_value_head *head, uint64_t n_layers)
{
    uint64_t bytes = digests_end(head, n_layers) + KVT_SNAP_SUM_BYTES;
    return (bytes + KVT_SNAP_ALIGN - 1) / KVT_SNAP_ALIGN * KVT_SNAP_ALIGN;
}

void kvt_value_put_fixed(const kvt_value_head *head, unsigned char *to)
{
    memcpy(to, KVT_VALUE_MAGIC, KVT_SNAP_MAGIC_BYTES);
    kvt_put32(to + OFFSET_VERSION, KVT_VALUE_VERSION);
    kvt_put32(to + OFFSET_FLAGS, head->flags);
    memcpy(to + OFFSET_KEY, head->key.bytes, KVT_STORE_KEY_BYTES);
    kvt_put64(to + OFFSET_BYTES, head->bytes);
    kvt_put64(to + OFFSET_TOKENS, head->n_tokens);
    kvt_put64(to + OFFSET_BLOB, head->blob_bytes);
    kvt_put32(to + OFFSET_POSITION, (uint32_t)head->next_position);
    kvt_put32(to + OFFSET_ENTRIES, head->n_entries);
}

void kvt_value_put_entry(const kvt_value_head *head, uint32_t i, const kvt_value_entry *entry,
                         unsigned char *to)
{
    unsigned char *p = to + KVT_VALUE_FIXED_BYTES + (size_t)i * KVT_VALUE_ENTRY_BYTES;
    assert(i < head->n_entries);
    (void)head;
    kvt_put64(p, entry->row);
    kvt_put32(p + 8, entry->group);
    kvt_put32(p + 12, entry->form);
    kvt_put32(p + 16, entry->tokens);
    kvt_put32(p + 20, entry->n_layers);
    kvt_put64(p + 24, entry->layer_bytes);
}

void kvt_value_put_sum(const kvt_value_head *head, uint64_t n_layers, unsigned char *to)
{
    size_t end = (size_t)digests_end(head, n_layers);
    size_t bytes = (size_t)kvt_value_head_bytes(head, n_layers);
    kvt_put64(to + end, kvt_snap_sum(to, end));
    memset(to + end + KVT_SNAP_SUM_BYTES, 0, bytes - end - KVT_SNAP_SUM_BYTES);
}

const char *kvt_value_get_fixed(const unsigned char *from, uint64_t total, kvt_value_head *head)
{
    if (memcmp(from, KVT_VALUE_MAGIC, KVT_SNAP_MAGIC_BYTES) != 0)
        return "it is no value of kvtile's";
    if (kvt_get32(from + OFFSET_VERSION) != KVT_VALUE_VERSION)
        return "it is of a version that this build cannot read";
    head->flags = kvt_get32(from + OFFSET_FLAGS);
    memcpy(head->key.bytes, from + OFFSET_KEY, KVT_STORE_KEY_BYTES);
    head->bytes = kvt_get64(from + OFFSET_BYTES);
    head->n_tokens = kvt_get64(from + OFFSET_TOKENS);
    head->blob_bytes = kvt_get64(from + OFFSET_BLOB);
    head->next_position = (int32_t)kvt_get32(from + OFFSET_POSITION);
    head->n_entries = kvt_get32(from + OFFSET_ENTRIES);
    if (head->flags > KVT_VALUE_CHECKPOINT)
        return "its flags are unknown";
    if (head->bytes != total)
        return "it is not as long as it says";
    if (head->n_tokens == 0 || head->n_tokens > KVT_MAX_TOKENS)
        return "its number of tokens is out of range";
    if (!(head->flags & KVT_VALUE_CHECKPOINT) &&
        (head->n_entries != 1 || head->blob_bytes || head->next_position != -1))
        return "it is neither a block's nor a checkpoint's";
    if (head->blob_bytes > total ||
        KVT_VALUE_FIXED_BYTES + (uint64_t)head->n_entries * KVT_VALUE_ENTRY_BYTES > total)
        return "its parts are larger than it";
    if (head->next_position < -1)
        return "its next position is out of range";
    if (head->n_entries == 0 && head->n_tokens % KVT_TOKENS)
        return "it lacks the blocks of its last tokens";
    return NULL;
}

/*
 * Whether a block is where it may be, by those before it: a block's value has the one that ends at
 * its tokens; a checkpoint's has for each group in turn rows up to the last one, open ones behind
 * sealed ones. Where the last row is not full there is no group without it.
 */
static const char *check_place(const kvt_value_head *head, uint32_t i, const unsigned char *from,
                               const kvt_value_entry *entry)
{
    const unsigned char *before =
        from + KVT_VALUE_FIXED_BYTES + (size_t)i * KVT_VALUE_ENTRY_BYTES - KVT_VALUE_ENTRY_BYTES;
    const uint64_t last = (head->n_tokens - 1) / KVT_TOKENS;
    const uint32_t step = head->n_tokens % KVT_TOKENS ? 1 : KVT_MAX_GROUPS; /* between groups */
    uint32_t group;

    if (!(head->flags & KVT_VALUE_CHECKPOINT)) {
        if (entry->row != last || entry->tokens != KVT_TOKENS)
            return "a block of it is of other tokens";
        return kvt_is_open(entry->form) ? "a block of it is not sealed" : NULL;
    }
    if (i + 1 == head->n_entries && entry->row != last)
        return "its last rows are missing";
    if (i == 0)
        return entry->group >= step ? "a group of it is missing" : NULL;
    group = kvt_get32(before + 8);
    if (entry->group == group)
        return entry->row != kvt_get64(before) + 1 ? "its rows do not follow each other"
               : !kvt_form_follows(kvt_get32(before + 12), entry->form)
                   ? "an open block of it is before one that cannot be there"
                   : NULL;
    if (kvt_get64(before) != last)
        return "its last rows are missing";
    if (entry->group < group)
        return "its groups do not ascend";
    return entry->group - group > step ? "a group of it is missing" : NULL;
}

const char *kvt_value_get_entry(const kvt_value_head *head, uint32_t i, const unsigned char *from,
                                kvt_value_entry *entry)
{
    const unsigned char *p = from + KVT_VALUE_FIXED_BYTES + (size_t)i * KVT_VALUE_ENTRY_BYTES;
    const uint64_t last = (head->n_tokens - 1) / KVT_TOKENS;

    entry->row = kvt_get64(p);
    entry->group = kvt_get32(p + 8);
    entry->form = kvt_get32(p + 12);
    entry->tokens = kvt_get32(p + 16);
    entry->n_layers = kvt_get32(p + 20);
    entry->layer_bytes = kvt_get64(p + 24);
    if (entry->row > last || entry->tokens != kvt_snap_row_tokens(head->n_tokens, entry->row))
        return "a block of it is of other tokens";
    if (entry->group >= KVT_MAX_GROUPS || entry->form >= KVT_FORMS || entry->n_layers == 0 ||
        entry->n_layers > KVT_MAX_LAYERS)
        return "a block of it is of no group, form or layer";
    if (entry->layer_bytes == 0 || entry->layer_bytes > head->bytes ||
        entry->layer_bytes % KVT_SNAP_ALIGN)
        return "a block of it is of another size";
    return check_place(head, i, from, entry);
}

const char *kvt_value_check_sizes(const kvt_value_head *head, uint64_t n_layers,
                                  uint64_t image_bytes)
{
    uint64_t sum;
    if (kvt_add_overflows(kvt_value_head_bytes(head, n_layers), image_bytes, &sum) ||
        kvt_add_overflows(sum, head->blob_bytes, &sum) || sum != head->bytes)
        return "its parts do not make its size";
    return NULL;
}

const char *kvt_value_check_sum(const kvt_value_head *head, uint64_t n_layers,
                                const unsigned char *from)
{
    size_t end = (size_t)digests_end(head, n_layers), i;
    if (!kvt_snap_same_sum(kvt_get64(from + end), kvt_snap_sum(from, end)))
        return "its head's checksum is wrong";
    for (i = end + KVT_SNAP_SUM_BYTES; i < kvt_value_head_bytes(head, n_layers); i++)
        if (from[i])
            return "its padding is not zero";
    return NULL;
}

/* ---- the check without a cache ---- */

static const char *check_blocks(const kvt_value_head *head, const unsigned char *data)
{
    uint64_t n_layers = 0, image_bytes = 0, bytes;
    const unsigned char *digest = data + kvt_value_digests_at(head), *at;
    unsigned char computed[KVT_SNAP_ID_BYTES];
    kvt_value_entry entry;
    const char *fault;
    uint32_t i, layer;

    for (i = 0; i < head->n_entries; i++) {
        fault = kvt_value_get_entry(head, i, data, &entry);
        if (fault)
            return fault;
        n_layers += entry.n_layers;
        if (kvt_mul_overflows(entry.n_layers, entry.layer_bytes, &bytes) ||
            kvt_add_overflows(image_bytes, bytes, &image_bytes))
            return "its parts are larger than it";
    }
    fault = kvt_value_check_sizes(head, n_layers, image_bytes);
    if (!fault)
        fault = kvt_value_check_sum(head, n_layers, data);
    if (fault)
        return fault;
    at = data + kvt_value_head_bytes(head, n_layers);
    for (i = 0; i < head->n_entries; i++) {
        (void)kvt_value_get_entry(head, i, data, &entry);
        for (layer = 0; layer < entry.n_layers; layer++, at += entry.layer_bytes) {
            kvt_snap_digest(at, (size_t)entry.layer_bytes, computed);
            if (memcmp(computed, digest, sizeof computed) != 0)
                return "a layer's digest is wrong";
            digest += KVT_SNAP_ID_BYTES;
        }
    }
    if (head->flags & KVT_VALUE_CHECKPOINT) {
        kvt_snap_digest(at, (size_t)head->blob_bytes, computed);
        if (memcmp(computed, digest, sizeof computed) != 0)
            return "the digest of the checkpoint's blob is wrong";
    }
    return NULL;
}

kvt_status kvt_value_check(const kvt_store_key *key, const void *data, size_t bytes,
                           kvt_value_info *info, char *error_text, size_t error_text_bytes)
{
    kvt_value_head head;
    kvt_value_info told;
    const char *fault;

    memset(&told, 0, sizeof told);
    if (!data || !info || info->struct_size != sizeof *info)
        return kvt_store_fail_open(error_text, error_text_bytes, KVT_ERR_ARG,
                                   "kvt_value_check: NULL, or an unknown struct_size");
    if (bytes < KVT_VALUE_FIXED_BYTES)
        return kvt_store_fail_open(error_text, error_text_bytes, KVT_ERR_FORMAT,
                                   "a stored value: it is shorter than any");
    fault = kvt_value_get_fixed(data, bytes, &head);
    if (fault)
        return kvt_store_fail_open(
            error_text, error_text_bytes,
            memcmp(data, KVT_VALUE_MAGIC, KVT_SNAP_MAGIC_BYTES) != 0 ||
                    kvt_get32((const unsigned char *)data + OFFSET_VERSION) != KVT_VALUE_VERSION
                ? KVT_ERR_FORMAT
                : KVT_ERR_CORRUPT,
            "a stored value: %s", fault);
    fault = check_blocks(&head, data);
    if (fault)
        return kvt_store_fail_open(error_text, error_text_bytes, KVT_ERR_CORRUPT,
                                   "a stored value: %s", fault);
    if (key && memcmp(key, &head.key, sizeof *key) != 0)
        return kvt_store_fail_open(error_text, error_text_bytes, KVT_ERR_MISMATCH,
                                   "a stored value: it was put under another key");
    told.struct_size = sizeof told;
    told.version = KVT_VALUE_VERSION;
    told.checkpoint = head.flags & KVT_VALUE_CHECKPOINT;
    told.n_tokens = head.n_tokens;
    told.n_blocks = head.n_entries;
    told.blob_bytes = head.blob_bytes;
    *info = told;
    return KVT_OK;
}
