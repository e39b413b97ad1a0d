/*
 * The calls that save a sequence: what their options say, and where the bytes go.
 */
#include "src/snapshot/saver.h"

#include "src/snapshot/convert.h"
#include "src/snapshot/crypt.h"
#include "src/sort.h"

/* ---- options ---- */

static kvt_status refuse(const kvt_seq *seq, const char *what)
{
    return kvt_fail(seq->cache, KVT_ERR_ARG, "save options: %s", what);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* No two of the pieces, whose names are sound, have the same. There may be many, of a file. */
static kvt_status check_twins(const kvt_seq *seq, const kvt_save_options *o)
{
    size_t bytes = o->n_pieces * sizeof(const char *), i;
    const char **names;
    int twins = 0;
    void *memory;
    kvt_status status;

    if (o->n_pieces < 2)
        return KVT_OK;
    status = kvt_mem_alloc_working(seq->cache, bytes, "the names of pieces", &memory);
    if (status != KVT_OK)
        return status;
    names = memory;
    for (i = 0; i < o->n_pieces; i++)
        names[i] = o->pieces[i].name;
    kvt_sort(names, o->n_pieces, sizeof *names, by_name);
    for (i = 1; i < o->n_pieces; i++)
        twins |= strcmp(names[i - 1], names[i]) == 0;
    kvt_mem_free_working(seq->cache, memory, bytes);
    return twins ? refuse(seq, "two pieces have the same name") : KVT_OK;
}

static kvt_status check_pieces(const kvt_seq *seq, const kvt_save_options *o)
{
    size_t i;

    if (o->n_pieces && !o->pieces)
        return refuse(seq, "pieces is NULL");
    if (o->n_pieces > UINT32_MAX || o->n_pieces > SIZE_MAX / sizeof *o->pieces)
        return refuse(seq, "too many pieces");
    for (i = 0; i < o->n_pieces; i++) {
        const kvt_snapshot_piece *piece = &o->pieces[i];
        if (!piece->name || !piece->name[0] || strlen(piece->name) > KVT_MAX_NAME)
            return refuse(seq, "a piece's name has to have 1 to 64 bytes");
        if (!piece->data && piece->bytes)
            return refuse(seq, "a piece's data is NULL");
        if (piece->bytes > SIZE_MAX / 4)
            return refuse(seq, "a piece is too large");
    }
    return check_twins(seq, o);
}

/* Whether a layer of group g is saved; layers are sound. */
static int saves_group(const kvt_seq *seq, const kvt_save_options *o, uint32_t g)
{
    uint32_t i;

    for (i = 0; i < o->n_layers; i++)
        if (seq->cache->layers[o->layers[i]].group == g)
            return 1;
    return o->n_layers == 0;
}

static kvt_status check_range(const kvt_seq *seq, kvt_save_options *o)
{
    uint32_t g;

    if (o->first_token % KVT_TOKENS)
        return refuse(seq, "first_token is no multiple of 64");
    if (o->first_token > seq->length || o->n_tokens > seq->length - o->first_token)
        return kvt_fail(seq->cache, KVT_ERR_ARG,
                        "save options: tokens %llu and %llu more, of %llu there are",
                        (unsigned long long)o->first_token, (unsigned long long)o->n_tokens,
                        (unsigned long long)seq->length);
    if (o->n_tokens == 0)
        o->n_tokens = seq->length - o->first_token;
    for (g = 0; g < seq->cache->n_groups; g++) {
        if (!saves_group(seq, o, g))
            continue;
        if (o->first_token == 0 && !kvt_window_group_reaches(seq, g, o->n_tokens))
            return kvt_fail(seq->cache, KVT_ERR_STATE,
                            "save: the window of group %u has released what a sequence of the "
                            "first %llu tokens needs",
                            (unsigned)g, (unsigned long long)o->n_tokens);
        if (o->first_token && seq->groups[g].first * KVT_TOKENS > o->first_token &&
            kvt_sink_rows(&seq->cache->groups[g]) * KVT_TOKENS < o->first_token + o->n_tokens)
            return kvt_fail(seq->cache, KVT_ERR_STATE,
                            "save: the window of group %u has released tokens from %llu on",
                            (unsigned)g, (unsigned long long)o->first_token);
    }
    return KVT_OK;
}

static kvt_status check_layers(const kvt_seq *seq, const kvt_save_options *o)
{
    uint32_t i;

    if (!o->layers != !o->n_layers)
        return refuse(seq, o->layers ? "n_layers is 0" : "layers is NULL");
    for (i = 0; i < o->n_layers; i++)
        if (o->layers[i] >= seq->cache->n_layers || (i && o->layers[i] <= o->layers[i - 1]))
            return refuse(seq, "layers are not ascending, or one is not there");
    return KVT_OK;
}

/* *copy: the options, or the defaults, with n_tokens resolved. */
static kvt_status admit(const kvt_seq *seq, const kvt_save_options *options, kvt_save_options *copy)
{
    kvt_status status;

    memset(copy, 0, sizeof *copy);
    if (options) {
        if (!kvt_copy_struct(copy, options, sizeof *copy))
            return refuse(seq, "unknown struct_size");
        if (copy->codec > KVT_CODEC_ZSTD || copy->no_fsync > 1 || copy->in_place > 1 ||
            copy->convert > 1)
            return kvt_fail(seq->cache, KVT_ERR_ARG,
                            "save options: codec %u, no_fsync %u, in_place %u or convert %u",
                            copy->codec, copy->no_fsync, copy->in_place, copy->convert);
        if (copy->reserved)
            return refuse(seq, "reserved is not 0");
        if (copy->zstd_level < -7 || copy->zstd_level > 19)
            return kvt_fail(seq->cache, KVT_ERR_ARG, "save options: zstd_level %d is not -7 to 19",
                            (int)copy->zstd_level);
        if (copy->convert ? !copy->k_types && !copy->v_types : copy->k_types || copy->v_types)
            return refuse(seq, copy->convert ? "convert, and neither k_types nor v_types"
                                             : "types, but convert is 0");
        if (copy->n_types > 1 && copy->n_types != seq->cache->n_groups)
            return kvt_fail(seq->cache, KVT_ERR_ARG, "save options: n_types is %u, of %u groups",
                            (unsigned)copy->n_types, (unsigned)seq->cache->n_groups);
        if (copy->parent && !*copy->parent)
            return refuse(seq, "parent is an empty path");
    }
    if (seq->pending)
        return kvt_fail(seq->cache, KVT_ERR_STATE, "save: a step is pending");
    status = check_layers(seq, copy);
    if (status == KVT_OK)
        status = check_range(seq, copy);
    return status == KVT_OK ? check_pieces(seq, copy) : status;
}

/* ---- a saver ---- */

/* The file's groups and layers, of those that are saved. */
static void choose_layers(kvt_snap_saver *s)
{
    const kvt_save_options *o = s->options;
    const kvt_cache *cache = s->seq->cache;
    kvt_snap_header *header = s->header;
    uint32_t g, n = 0, made = 0, i;
    uint32_t n_layers = o->layers ? o->n_layers : cache->n_layers;

    for (g = 0; g < cache->n_groups; g++) {
        uint32_t first = n;
        for (i = 0; i < n_layers; i++) {
            const kvt_layer *layer = &cache->layers[o->layers ? o->layers[i] : i];
            if (layer->group != g)
                continue;
            header->layers[n] = i;
            s->layer_of[n++] = layer->index;
        }
        if (n == first)
            continue;
        header->groups[made] = header->groups[g];
        header->groups[made].n_layers = n - first;
        s->group_of[made] = g;
        s->first_layer[made] = first;
        s->stored_as[made++] = &cache->groups[g];
    }
    header->n_groups = made;
    header->n_layers = n_layers;
}

/* With convert: the groups as they are stored. */
static kvt_status choose_types(kvt_snap_saver *s)
{
    const kvt_save_options *o = s->options;
    kvt_snap_header *header = s->header;
    void *memory;
    kvt_status status;
    uint32_t g;

    s->whole = header->n_layers == s->seq->cache->n_layers;
    if (!o->convert)
        return KVT_OK;
    status = kvt_snap_alloc(s->context, header->n_groups * sizeof *s->targets, "a snapshot's types",
                            &memory);
    if (status != KVT_OK)
        return status;
    s->targets = memory;
    memset(s->targets, 0, header->n_groups * sizeof *s->targets);
    s->whole = 0;
    for (g = 0; g < header->n_groups; g++) {
        kvt_snapshot_group *group = &header->groups[g];
        const kvt_group *from = s->stored_as[g];
        if (o->k_types)
            group->k_type = o->k_types[o->n_types == 1 ? 0 : s->group_of[g]];
        if (o->v_types)
            group->v_type = o->v_types[o->n_types == 1 ? 0 : s->group_of[g]];
        else if (group->flags & KVT_GROUP_V_IN_K)
            group->v_type = group->k_type;
        status = kvt_snap_target_make(s->context, from, group, &s->targets[g], &s->signs[g]);
        if (status != KVT_OK)
            return status;
        s->stored_as[g] = &s->targets[g];
    }
    return KVT_OK;
}

static kvt_status choose_rows(kvt_snap_saver *s)
{
    const kvt_seq *seq = s->seq;
    uint64_t end = s->options->first_token + s->options->n_tokens;
    uint32_t g;

    s->first_row = (size_t)(s->options->first_token / KVT_TOKENS);
    s->runs.n_groups = s->header->n_groups;
    for (g = 0; g < s->header->n_groups; g++) {
        uint32_t column = s->group_of[g];
        s->runs.sinks[g] = s->runs.first[g] = kvt_snap_sink_rows(&s->header->groups[g]);
        if (!s->first_row) {
            size_t first =
                kvt_window_first(seq, column, &seq->groups[column], end, KVT_DRAFT_TOKENS);
            if (s->targets && seq->groups[column].first &&
                kvt_sink_rows(&seq->cache->groups[column]) != s->runs.sinks[g])
                return kvt_fail(seq->cache, KVT_ERR_STATE,
                                "save: the window of group %u has released tokens, and the types "
                                "differ in what they need of the first ones",
                                (unsigned)column);
            if (first > s->runs.sinks[g] && kvt_rows(end) > s->runs.sinks[g])
                s->runs.first[g] = first; /* else no row of it is released: there are sinks alone */
        }
    }
    for (s->n_checkpoints = 0; !s->first_row && s->n_checkpoints < seq->n_checkpoints &&
                               seq->checkpoints[s->n_checkpoints]->n_tokens <= end;
         s->n_checkpoints++)
        ;
    return KVT_OK;
}

static void release(kvt_snap_saver *s)
{
    const kvt_snap_context *context = s->context;
    uint32_t g;

    kvt_snap_chain_close(context, s->chain);
    kvt_snap_jobs_release(&s->jobs);
    kvt_snap_release(context, &s->index);
    kvt_snap_release(context, &s->words);
    kvt_snap_release(context, &s->extras);
    kvt_snap_release(context, &s->heads);
    kvt_snap_release(context, &s->firsts);
    kvt_snap_release(context, &s->table);
    kvt_snap_release(context, &s->digests);
    kvt_snap_release(context, &s->stored);
    kvt_snap_release(context, &s->native_ids);
    kvt_snap_release(context, &s->out);
    for (g = 0; s->targets && g < s->header->n_groups; g++)
        kvt_snap_target_release(context, &s->targets[g], s->signs[g]);
    if (s->targets)
        kvt_snap_free(context, s->targets, s->header->n_groups * sizeof *s->targets);
    if (s->header)
        kvt_snap_free(context, s->header, sizeof *s->header);
}

static void codec_of(const kvt_save_options *o, kvt_snap_codec *codec)
{
    codec->raw = o->codec == KVT_CODEC_RAW;
    codec->samples = o->codec == KVT_CODEC_AUTO;
    codec->level = o->zstd_level;
}

/* The types of what is saved are not those in which it lies. */
static int converts(const kvt_snap_saver *s)
{
    for (uint32_t g = 0; g < s->header->n_groups; g++) {
        const kvt_snapshot_group *group = &s->header->groups[g];
        const kvt_group_config *own = &s->seq->cache->groups[s->group_of[g]].config;
        if (group->k_type != own->k_type || group->v_type != own->v_type)
            return 1;
    }
    return 0;
}

/*
 * What a load of the file could not tell by itself: shifts tell of a removal, where keys have moved
 * by it.
 */
static int is_unkeyed(const kvt_snap_saver *s)
{
    const kvt_save_options *o = s->options;
    const uint64_t from = s->seq->unkeyed_from;

    if (!o->n_tokens)
        return 0;
    if (o->first_token || converts(s))
        return 1;
    return from < o->n_tokens &&
           !kvt_shift_at(kvt_seq_meta(s->seq, (size_t)(from / KVT_TOKENS)), from % KVT_TOKENS);
}

/* All but the output. */
static kvt_status prepare(kvt_snap_saver *s, const kvt_seq *seq, const kvt_snap_context *context,
                          const kvt_save_options *options)
{
    void *memory;
    size_t i;
    kvt_status status;

    memset(s, 0, sizeof *s);
    s->context = context;
    s->seq = seq;
    s->options = options;
    s->native = options->codec == KVT_CODEC_RAW;
    status = kvt_snap_alloc(context, sizeof *s->header, "a snapshot's header", &memory);
    if (status != KVT_OK)
        return status;
    s->header = memory;
    kvt_snap_header_make(seq->cache, options->n_tokens, s->header);
    if (kvt_turns_needed(seq, options->first_token, options->n_tokens))
        s->header->flags = KVT_SNAP_MOVED;
    choose_layers(s);
    status = choose_types(s);
    if (status != KVT_OK)
        return status;
    if (is_unkeyed(s))
        s->header->flags |= KVT_SNAP_UNKEYED;
    status = choose_rows(s);
    if (status == KVT_OK)
        status = kvt_snap_jobs_make(&s->jobs, context, s->header);
    for (i = 0; i < s->jobs.n; i++)
        codec_of(options, &s->jobs.jobs[i].codec);
    return status;
}

/* path: of the file that is saved, NULL: by a descriptor, or, where fd is -1, a stream. */
static kvt_status open_parent(kvt_snap_saver *s, const char *path, int fd)
{
    const char *name = s->options->parent;
    size_t n;
    int same;
    kvt_status status;

    if (!name)
        return KVT_OK;
    status = kvt_snap_chain_open_path(s->context, name, s->options->key, s->header, &s->parent,
                                      &s->chain);
    if (status != KVT_OK)
        return status;
    n = kvt_snap_folder_bytes(name);
    same = path || fd >= 0 ? kvt_snap_chain_has_file(s->chain, path, fd) : 0;
    if (same < 0)
        return KVT_ERR_IO;
    if (same)
        return kvt_snap_fail(s->context, KVT_ERR_ARG,
                             "save: the file is its own parent, or a parent of that: %s",
                             path ? path : "the file descriptor");
    same = path ? kvt_snap_same_folder(s->context, name, path) : 1;
    if (same < 0)
        return KVT_ERR_IO;
    if (!same)
        return kvt_snap_fail(s->context, KVT_ERR_ARG,
                             "save: the parent is not in the folder of the file: %s", name);
    name += n;
    s->parent.name_bytes = (uint32_t)strlen(name);
    if (s->parent.name_bytes > KVT_SNAP_NAME_MAX)
        return kvt_snap_fail(s->context, KVT_ERR_LIMIT, "save: the parent's name is too long");
    memcpy(s->parent.name, name, s->parent.name_bytes + (size_t)1);
    return KVT_OK;
}

/*
 * The plain bytes to a writer, or encrypted where there is a key. write_parts: of the writer, NULL:
 * it has none.
 */
static kvt_status write_to(kvt_snap_saver *s, const kvt_writer *writer,
                           int (*write_parts)(void *user, const kvt_snap_part *parts, size_t n))
{
    kvt_snap_crypt crypt;
    kvt_writer plain;
    kvt_status status;

    s->output.writer = writer;
    if (!s->options->key) {
        s->output.write_parts = write_parts;
        return kvt_snap_write(s);
    }
    status = kvt_snap_encrypt_begin(s->context, s->options->key, writer, &crypt, &plain);
    if (status != KVT_OK)
        return status;
    crypt.write_parts = write_parts;
    s->output.writer = &plain;
    status = kvt_snap_write(s);
    if (status == KVT_OK)
        status = kvt_snap_encrypt_end(&crypt);
    else if (status == KVT_ERR_IO && kvt_snap_crypt_failure(&crypt) != KVT_OK)
        status = kvt_snap_crypt_failure(&crypt); /* not the writer: the encryption */
    kvt_snap_crypt_release(&crypt);
    return status;
}

/* What all saves begin with: the options, copied, and all but the output. */
static kvt_status begin(kvt_snap_saver *s, const kvt_seq *seq, const kvt_save_options *options,
                        kvt_snap_context *context, kvt_save_options *copy)
{
    kvt_status status = admit(seq, options, copy);

    if (status != KVT_OK)
        return status;
    memset(context, 0, sizeof *context);
    context->cache = seq->cache;
    status = prepare(s, seq, context, copy);
    if (status != KVT_OK)
        release(s);
    return status;
}

kvt_status kvt_seq_save_stream(const kvt_seq *seq, const kvt_writer *writer,
                               const kvt_save_options *options)
{
    kvt_snap_context context;
    kvt_save_options copy;
    kvt_snap_saver s;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!writer || !writer->write)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "save: no writer");
    status = begin(&s, seq, options, &context, &copy);
    if (status != KVT_OK)
        return status;
    status = open_parent(&s, NULL, -1);
    if (status == KVT_OK)
        status = write_to(&s, writer, NULL);
    release(&s);
    return status;
}

kvt_status kvt_seq_save_fd(const kvt_seq *seq, int fd, const kvt_save_options *options)
{
    kvt_snap_context context;
    kvt_save_options copy;
    kvt_snap_saver s;
    kvt_snap_file file;
    kvt_writer writer;
    kvt_status status, failure;

    if (!seq)
        return KVT_ERR_ARG;
    if (fd < 0)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "save: file descriptor %d", fd);
    status = begin(&s, seq, options, &context, &copy);
    if (status != KVT_OK)
        return status;
    kvt_snap_file_of_fd(&context, fd, &file, &writer, NULL);
    status = open_parent(&s, NULL, fd);
    if (status == KVT_OK)
        status = write_to(&s, &writer, kvt_snap_file_write_parts);
    if (status == KVT_ERR_IO) {
        failure = kvt_snap_file_failure(&file, "the file descriptor");
        status = failure != KVT_OK ? failure : status;
    }
    release(&s);
    return status;
}

/* Writing to memory by way of a writer: what is encrypted. */
typedef struct target {
    unsigned char *to;
    size_t room, bytes;
    int full;
} target;

static int write_memory(void *user, const void *data, size_t bytes)
{
    target *t = user;
    if (bytes > t->room - t->bytes) {
        t->full = 1;
        return -1;
    }
    memcpy(t->to + t->bytes, data, bytes);
    t->bytes += bytes;
    return 0;
}

kvt_status kvt_seq_save_memory(const kvt_seq *seq, void *to, size_t room, size_t *bytes,
                               const kvt_save_options *options)
{
    kvt_snap_context context;
    kvt_save_options copy;
    kvt_snap_saver s;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!to || !bytes)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "save: no memory");
    status = begin(&s, seq, options, &context, &copy);
    if (status != KVT_OK)
        return status;
    status = open_parent(&s, NULL, -1);
    if (status == KVT_OK && copy.key) {
        target t = {to, room, 0, 0};
        kvt_writer writer = {&t, write_memory};
        status = write_to(&s, &writer, NULL);
        if (status == KVT_ERR_IO && t.full)
            status =
                kvt_fail(seq->cache, KVT_ERR_FULL,
                         "save: the memory of %zu bytes is too small (kvt_seq_save_bound)", room);
        if (status == KVT_OK)
            *bytes = t.bytes;
    } else if (status == KVT_OK) {
        s.output.memory = to;
        s.output.room = room;
        status = kvt_snap_write(&s);
        if (status == KVT_OK)
            *bytes = (size_t)s.offset;
    }
    release(&s);
    return status;
}

/*
 * Upper bounds: every stream raw, every row of a checkpoint a block of its own. Where that is more
 * than there will be, images are aligned behind something else: each may need the most padding.
 */
static uint64_t bound_of(const kvt_snap_saver *s)
{
    const kvt_snap_header *header = s->header;
    const uint64_t summed = KVT_SNAP_SECTION_BYTES + KVT_SNAP_SUM_BYTES;
    uint64_t chunks = (header->n_tokens + KVT_SNAP_CHUNK_TOKENS - 1) / KVT_SNAP_CHUNK_TOKENS;
    uint64_t kinds = header->flags & KVT_SNAP_MOVED ? 3 : 2, notes = 1, row, bytes, blocks = 0,
             table = 0;
    uint64_t set = kvt_snap_set_room(0) - 8 - 2 * KVT_SNAP_STREAM_BYTES;
    size_t i;
    uint32_t g;

    bytes = kvt_snap_header_bytes(header);
    if (s->options->parent) {
        bytes += summed + KVT_SNAP_PARENT_BYTES + KVT_SNAP_NAME_MAX + 1;
        notes++;
    }
    if (s->seq->tag_bytes || (s->seq->next_position >= 0 &&
                              s->first_row * KVT_TOKENS + header->n_tokens == s->seq->length)) {
        bytes += summed + kvt_round_up(KVT_SNAP_STATE_BYTES + (size_t)s->seq->tag_bytes, 8);
        notes++;
    }
    for (i = 0; i < s->options->n_pieces; i++, notes++)
        bytes += summed + KVT_SNAP_PIECE_BYTES +
                 kvt_round_up(strlen(s->options->pieces[i].name), 8) +
                 kvt_round_up(s->options->pieces[i].bytes, 8);
    bytes += kinds * (chunks * set +
                      kvt_round_up((size_t)(header->n_tokens % KVT_SNAP_CHUNK_TOKENS) * 4, 8) +
                      header->n_tokens / KVT_SNAP_CHUNK_TOKENS * KVT_SNAP_CHUNK_TOKENS * 4);
    notes += kinds * chunks;
    for (g = 0; g < header->n_groups; g++) { /* all of the table: images are aligned behind it */
        table += kvt_rows(header->n_tokens) - (s->runs.first[g] - s->runs.sinks[g]);
        for (i = 0; i < s->n_checkpoints; i++)
            table += kvt_rows(s->seq->checkpoints[i]->n_tokens) -
                     s->seq->checkpoints[i]->from[s->group_of[g]];
    }
    bytes += summed + table * KVT_SNAP_ENTRY_BYTES;
    for (row = 0; row < kvt_rows(header->n_tokens); row++)
        for (g = 0; g < header->n_groups; g++) {
            const kvt_block *block = kvt_snap_own_block(s, row, g);
            if (!block)
                continue;
            blocks++;
            bytes = kvt_snap_block_bound(
                s, bytes, g,
                kvt_snap_stored_form(s, block, row, g, kvt_snap_row_tokens(header->n_tokens, row)));
        }
    for (i = 0; i < s->n_checkpoints; i++)
        for (g = 0; g < header->n_groups; g++) {
            const kvt_checkpoint *point = s->seq->checkpoints[i];
            uint64_t n = kvt_rows(point->n_tokens) - point->from[s->group_of[g]];
            for (; n; n--, blocks++) {
                uint64_t most = 0;
                uint32_t form;
                for (form = 0; form < KVT_FORMS; form++) {
                    uint64_t with = kvt_snap_has_form(&header->groups[g], form)
                                        ? kvt_snap_block_bound(s, bytes, g, form)
                                        : 0;
                    most = with > most ? with : most;
                }
                bytes = most;
            }
        }
    /* Behind all blocks, as in the file: the padding of one would hide what stands before it. */
    for (i = 0; i < s->n_checkpoints; i++, notes++) {
        const kvt_checkpoint *point = s->seq->checkpoints[i];
        bytes += summed + KVT_SNAP_POINT_BYTES + kvt_round_up(point->blob_bytes, 8) + 8;
        for (g = 0; g < header->n_groups; g++)
            bytes += 4 + 4 * (kvt_rows(point->n_tokens) - point->from[s->group_of[g]]);
    }
    if (s->native && (s->options->parent || s->n_checkpoints))
        bytes += blocks * (KVT_SNAP_ALIGN - 8); /* sections are multiples of 8 */
    notes += blocks;
    bytes += summed + notes * KVT_SNAP_NOTE_BYTES + KVT_SNAP_SECTION_BYTES + KVT_SNAP_END_BYTES;
    return bytes;
}

kvt_status kvt_seq_save_bound(const kvt_seq *seq, uint64_t *bytes, const kvt_save_options *options)
{
    kvt_snap_context context;
    kvt_save_options copy;
    kvt_snap_saver s;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!bytes)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "save: bytes is NULL");
    status = begin(&s, seq, options, &context, &copy);
    if (status != KVT_OK)
        return status;
    *bytes = copy.key ? kvt_snap_crypt_bound(bound_of(&s)) : bound_of(&s);
    release(&s);
    return status;
}

kvt_status kvt_seq_save(const kvt_seq *seq, const char *path, const kvt_save_options *options)
{
    kvt_snap_context context;
    kvt_save_options copy;
    kvt_snap_saver s;
    kvt_snap_file file;
    kvt_writer writer;
    kvt_status status, failure;

    if (!seq)
        return KVT_ERR_ARG;
    if (!path || !*path)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "save: no path");
    status = begin(&s, seq, options, &context, &copy);
    if (status != KVT_OK)
        return status;
    status = open_parent(&s, path, -1);
    if (status != KVT_OK) {
        release(&s);
        return status;
    }
    status = kvt_snap_file_create(&context, path, &copy, &file, &writer);
    if (status == KVT_OK)
        status = write_to(&s, &writer, kvt_snap_file_write_parts);
    if (status == KVT_ERR_IO) {
        failure = kvt_snap_file_failure(&file, path);
        status = failure != KVT_OK ? failure : status;
    }
    if (status == KVT_OK) {
        status = kvt_snap_file_commit(&file);
        if (status != KVT_OK)
            status = kvt_snap_file_failure(&file, path);
    }
    kvt_snap_file_close(&file);
    release(&s);
    return status;
}
