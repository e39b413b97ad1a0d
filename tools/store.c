/*
 * kvtile store: what a store of prefixes holds, its bound, and whether its values are sound.
 */
#include "tool.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KEY_TEXT (2 * KVT_STORE_KEY_BYTES + 1)

static int failed(const tool_store *s, const tool_options *o, kvt_status status,
                  const kvt_store_error *error)
{
    return tool_fail(o, store_name(s), status, "%s",
                     *error->text ? error->text : kvt_status_string(status));
}

static int lacks(const tool_store *s, const tool_options *o, const char *what)
{
    return tool_fail(o, store_name(s), KVT_ERR_UNSUPPORTED, "%s", what);
}

static void key_text(const kvt_store_key *key, char text[KEY_TEXT])
{
    size_t i;

    for (i = 0; i < KVT_STORE_KEY_BYTES; i++)
        (void)snprintf(text + 2 * i, 3, "%02x", key->bytes[i]);
}

/* ---- all entries ---- */

typedef struct entries {
    kvt_store_entry *list; /* [n], from malloc */
    size_t n, room;
    int no_memory;
} entries;

static int add_entry(void *user, const kvt_store_entry *entry)
{
    entries *e = user;

    if (e->n == e->room) {
        size_t room = e->room ? 2 * e->room : 256;
        kvt_store_entry *list =
            room <= SIZE_MAX / sizeof *list ? realloc(e->list, room * sizeof *list) : NULL;
        e->no_memory = !list;
        if (!list)
            return 1;
        e->list = list;
        e->room = room;
    }
    e->list[e->n++] = *entry;
    return output_interrupted();
}

static int by_key(const void *a, const void *b)
{
    const kvt_store_entry *x = a, *y = b;
    return memcmp(&x->key, &y->key, sizeof x->key);
}

/* The largest first; unknown ones last. */
static int by_size(const void *a, const void *b)
{
    const kvt_store_entry *x = a, *y = b;
    uint64_t of_x = x->bytes + 1, of_y = y->bytes + 1; /* unknown: 0 */
    return of_x != of_y ? (of_x < of_y ? 1 : -1) : by_key(a, b);
}

/* Those that were not used for the longest time first; unknown ones last. */
static int by_age(const void *a, const void *b)
{
    const kvt_store_entry *x = a, *y = b;
    return x->used_seconds != y->used_seconds ? (x->used_seconds < y->used_seconds ? 1 : -1)
                                              : by_key(a, b);
}

/* A value that a server moves while it is listed may come twice. */
static void drop_doubles(entries *e)
{
    size_t i, n = 0;

    if (e->n)
        qsort(e->list, e->n, sizeof *e->list, by_key);
    for (i = 0; i < e->n; i++)
        if (n == 0 || by_key(&e->list[n - 1], &e->list[i]) != 0)
            e->list[n++] = e->list[i];
    e->n = n;
}

/* SOUND with all entries, each once, sorted, or reported. */
static int list_all(const tool_store *s, const tool_options *o, entries *e,
                    int (*how)(const void *, const void *))
{
    kvt_store_error error = {""};
    kvt_status status;

    if (!s->store.list)
        return lacks(s, o, "the store cannot be listed");
    status = s->store.list(s->store.user, add_entry, e, &error);
    if (status == KVT_OK && (e->no_memory || output_interrupted()))
        status = KVT_ERR_MEMORY;
    if (status != KVT_OK)
        return failed(s, o, status, &error);
    drop_doubles(e);
    if (how != by_key && e->n)
        qsort(e->list, e->n, sizeof *e->list, how);
    return SOUND;
}

/* ---- ls ---- */

/* A number with what stands before it, or what stands for an unknown one. */
static void print_number(const char *before, int known, uint64_t value, const char *unknown)
{
    if (known)
        printf("%s%" PRIu64, before, value);
    else
        printf("%s%s", before, unknown);
}

static void print_seconds(const char *before, int64_t value, const char *unknown)
{
    print_number(before, value >= 0, (uint64_t)value, unknown);
}

typedef struct listing {
    const tool_store *store;
    const tool_options *o;
    int has_names; /* the line of names is there */
} listing;

static void print_names(listing *l)
{
    if (!l->o->json && !l->o->quiet && !l->has_names)
        printf("key\tbytes\tused\tleft\n");
    l->has_names = 1;
}

static int print_entry(void *user, const kvt_store_entry *entry)
{
    listing *l = user;

    print_names(l); /* with the first one: nothing stands before an error */

    if (l->o->json) {
        json_begin(store_name(l->store), KVT_OK);
        printf(",\"key\":");
        json_hex(entry->key.bytes, KVT_STORE_KEY_BYTES);
        print_number(",\"bytes\":", entry->bytes != UINT64_MAX, entry->bytes, "null");
        print_seconds(",\"used_seconds\":", entry->used_seconds, "null");
        print_seconds(",\"left_seconds\":", entry->left_seconds, "null");
        printf("}\n");
    } else if (!l->o->quiet) {
        tool_print_hex(entry->key.bytes, KVT_STORE_KEY_BYTES);
        print_number("\t", entry->bytes != UINT64_MAX, entry->bytes, "-");
        print_seconds("\t", entry->used_seconds, "-");
        print_seconds("\t", entry->left_seconds, "-");
        printf("\n");
    }
    return output_interrupted();
}

static int list(const tool_store *s, const tool_options *o)
{
    static int (*const hows[])(const void *, const void *) = {NULL, by_key, by_size, by_age};
    listing l = {s, o, 0};
    kvt_store_error error = {""};
    entries e = {NULL, 0, 0, 0};
    kvt_status status;
    size_t i;
    int code;

    if (!o->sort) { /* as they come: nothing is held */
        if (!s->store.list)
            return lacks(s, o, "the store cannot be listed");
        status = s->store.list(s->store.user, print_entry, &l, &error);
        code = status == KVT_OK ? SOUND : failed(s, o, status, &error);
    } else {
        code = list_all(s, o, &e, hows[o->sort]);
        for (i = 0; code == SOUND && i < e.n; i++)
            (void)print_entry(&l, &e.list[i]);
        free(e.list);
    }
    if (code == SOUND)
        print_names(&l);
    return code;
}

/* ---- stats, gc ---- */

/* What the store says; what it does not know of its values is counted. */
static int count(const tool_store *s, const tool_options *o, kvt_store_stats *stats)
{
    kvt_store_error error = {""};
    entries e = {NULL, 0, 0, 0};
    kvt_status status;
    uint64_t bytes = 0;
    size_t i;
    int code;

    if (!s->store.stats)
        return lacks(s, o, "the store has no statistics");
    memset(stats, 0, sizeof *stats);
    status = s->store.stats(s->store.user, stats, &error);
    if (status != KVT_OK)
        return failed(s, o, status, &error);
    if ((stats->n_values != UINT64_MAX && stats->bytes != UINT64_MAX) || !s->store.list)
        return SOUND;
    code = list_all(s, o, &e, by_key);
    for (i = 0; i < e.n && bytes != UINT64_MAX; i++)
        bytes = e.list[i].bytes == UINT64_MAX ? UINT64_MAX : bytes + e.list[i].bytes;
    stats->n_values = e.n;
    stats->bytes = bytes;
    free(e.list);
    return code;
}

static void print_counts(const kvt_store_stats *stats)
{
    print_number(",\"n_values\":", stats->n_values != UINT64_MAX, stats->n_values, "null");
    print_number(",\"bytes\":", stats->bytes != UINT64_MAX, stats->bytes, "null");
    print_number(",\"max_bytes\":", stats->max_bytes != UINT64_MAX, stats->max_bytes, "null");
}

static int show_stats(const tool_store *s, const tool_options *o)
{
    kvt_store_stats stats;
    int code = count(s, o, &stats);

    if (code != SOUND)
        return code;
    if (o->json) {
        json_begin(store_name(s), KVT_OK);
        print_counts(&stats);
        printf("}\n");
    } else if (!o->quiet) {
        tool_print_name(stdout, store_name(s));
        printf("\n");
        print_number("  values  ", stats.n_values != UINT64_MAX, stats.n_values, "unknown");
        print_number("\n  bytes   ", stats.bytes != UINT64_MAX, stats.bytes, "unknown");
        print_number("\n  bound   ", stats.max_bytes && stats.max_bytes != UINT64_MAX,
                     stats.max_bytes, stats.max_bytes ? "unknown" : "none");
        printf("\n");
    }
    return SOUND;
}

static int collect(const tool_store *s, const tool_options *o)
{
    kvt_store_error error = {""};
    kvt_store_stats stats;
    kvt_status status;
    int code;

    if (!s->store.collect)
        return lacks(s, o, "there is nothing to collect in this store: it keeps its own order");
    status = s->store.collect(s->store.user, &error);
    if (status != KVT_OK)
        return failed(s, o, status, &error);
    code = count(s, o, &stats);
    if (code != SOUND)
        return code;
    if (o->json) {
        json_begin(store_name(s), KVT_OK);
        print_counts(&stats);
        print_number(",\"n_evicted\":", stats.n_evicted != UINT64_MAX, stats.n_evicted, "null");
        printf("}\n");
    } else if (!o->quiet) {
        tool_print_name(stdout, store_name(s));
        print_number(": ", stats.n_values != UINT64_MAX, stats.n_values, "?");
        print_number(" values, ", stats.bytes != UINT64_MAX, stats.bytes, "?");
        printf(" bytes");
        if (stats.max_bytes && stats.max_bytes != UINT64_MAX)
            printf(" of %" PRIu64, stats.max_bytes);
        if (stats.n_evicted != UINT64_MAX)
            printf(", %" PRIu64 " values evicted", stats.n_evicted);
        printf("\n");
    }
    return SOUND;
}

/* ---- verify ---- */

typedef struct checking {
    const tool_store *store;
    const tool_options *o;
    const kvt_store_key *key; /* of the value that is read */
    unsigned char *data;      /* [room] of it */
    size_t room;
    int done, no_memory; /* it has been checked; there was no room */
    uint64_t n_sound, n_damaged, n_other_version, n_removed, n_gone, bytes;
} checking;

static void report_damage(const checking *c, kvt_status status, const char *why)
{
    tool_options plain = *c->o; /* whose JSON is another */
    char key[KEY_TEXT];

    key_text(c->key, key);
    if (c->o->json) {
        json_begin(store_name(c->store), status);
        printf(",\"error\":");
        json_string(why);
        printf(",\"key\":\"%s\"}\n", key);
    }
    plain.json = 0;
    (void)tool_fail(&plain, store_name(c->store), status, "%s: %s", key, why);
    progress_resume();
}

/* Of a program that shares the store and has another version of the format of values, which is
   between the magic and the rest (docs/format.md). */
static int is_of_other_version(const unsigned char *data, uint64_t total)
{
    static const unsigned char ours[12] = {0x89, 'K', 'V', 'B', '\r', '\n', 0x1a, '\n', 1};

    return total >= 12 && memcmp(data, ours, 8) == 0 && memcmp(data + 8, ours + 8, 4) != 0;
}

static int on_part(void *user, size_t i, uint64_t total, uint64_t offset, const void *data,
                   size_t bytes)
{
    checking *c = user;
    kvt_value_info info;
    char text[TOOL_TEXT] = "";
    kvt_status status;

    (void)i;
    if (total > c->room) { /* with its first part */
        free(c->data);
        c->data = total <= SIZE_MAX ? malloc((size_t)total) : NULL;
        c->room = c->data ? (size_t)total : 0;
        c->no_memory = !c->data;
        if (!c->data)
            return KVT_STORE_STOP;
    }
    if (bytes)
        memcpy(c->data + offset, data, bytes);
    if (offset + bytes < total)
        return output_interrupted() ? KVT_STORE_STOP : KVT_STORE_MORE;
    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    status = kvt_value_check(c->key, total ? c->data : (const void *)"", (size_t)total, &info, text,
                             sizeof text);
    c->done = 1;
    c->bytes += total;
    c->n_sound += status == KVT_OK;
    if (status == KVT_ERR_FORMAT && is_of_other_version(c->data, total)) {
        c->n_other_version++;
        return KVT_STORE_MORE;
    }
    c->n_damaged += status != KVT_OK;
    if (status != KVT_OK)
        report_damage(c, status, *text ? text : kvt_status_string(status));
    return KVT_STORE_MORE;
}

/* Read and check one value; SOUND also where it is damaged. */
static int check_value(checking *c)
{
    const kvt_store_receiver receiver = {c, on_part, NULL};
    const kvt_store *store = &c->store->store;
    uint64_t before = c->n_damaged;
    kvt_store_error error = {""};
    kvt_status status;

    c->done = 0;
    status = store->get(store->user, c->key, 1, &receiver, &error);
    if (status == KVT_OK && (c->no_memory || output_interrupted()))
        status = KVT_ERR_MEMORY;
    if (status != KVT_OK)
        return failed(c->store, c->o, status, &error);
    c->n_gone += !c->done;
    if (c->n_damaged == before || !c->o->remove)
        return SOUND;
    status = store->remove(store->user, c->key, 1, &error);
    c->n_removed += status == KVT_OK;
    return status == KVT_OK ? SOUND : failed(c->store, c->o, status, &error);
}

static void print_result(const checking *c)
{
    const char *name = store_name(c->store);

    if (c->o->json) {
        json_begin(name, c->n_damaged ? KVT_ERR_CORRUPT : KVT_OK);
        if (c->n_damaged)
            printf(",\"error\":\"%" PRIu64 " damaged\"", c->n_damaged);
        printf(",\"n_sound\":%" PRIu64 ",\"n_damaged\":%" PRIu64 ",\"n_other_version\":%" PRIu64
               ",\"n_removed\":%" PRIu64 ",\"n_gone\":%" PRIu64 ",\"bytes\":%" PRIu64 "}\n",
               c->n_sound, c->n_damaged, c->n_other_version, c->n_removed, c->n_gone, c->bytes);
    } else if (!c->o->quiet) {
        tool_print_name(stdout, name);
        printf(": %" PRIu64 " sound, %" PRIu64 " damaged", c->n_sound, c->n_damaged);
        if (c->n_other_version)
            printf(", %" PRIu64 " of another version of the format", c->n_other_version);
        if (c->o->remove)
            printf(", %" PRIu64 " removed", c->n_removed);
        if (c->n_gone)
            printf(", %" PRIu64 " gone meanwhile", c->n_gone);
        printf(", %" PRIu64 " bytes\n", c->bytes);
    }
}

/*
 * One value a call, and those that were used the longest time ago first: to be read is to be used,
 * and so what is evicted next stays what it was.
 */
static int verify(const tool_store *s, const tool_options *o)
{
    entries e = {NULL, 0, 0, 0};
    checking c;
    size_t i;
    int code = list_all(s, o, &e, by_age);

    memset(&c, 0, sizeof c);
    c.store = s;
    c.o = o;
    progress_begin(o, store_name(s), "verifying");
    for (i = 0; code == SOUND && i < e.n; i++) {
        c.key = &e.list[i].key;
        code = check_value(&c);
        (void)progress_step(NULL, i + 1, e.n);
    }
    if (code == SOUND) {
        progress_end();
        print_result(&c);
        code = c.n_damaged ? DAMAGED : SOUND;
    }
    free(c.data);
    free(e.list);
    return code;
}

/* ---- the commands ---- */

static int run(const tool_options *o, int (*command)(const tool_store *s, const tool_options *o))
{
    tool_store s;
    int code;

    output_note_signals();
    code = store_open(&s, o->files[0], o);
    if (code == SOUND)
        code = command(&s, o);
    kvt_store_close(&s.store);
    return code;
}

int store_ls_run(const tool_options *o)
{
    return run(o, list);
}

int store_stats_run(const tool_options *o)
{
    return run(o, show_stats);
}

int store_gc_run(const tool_options *o)
{
    return run(o, collect);
}

int store_verify_run(const tool_options *o)
{
    return run(o, verify);
}
