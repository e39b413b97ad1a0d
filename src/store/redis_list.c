/*
 * What a server or a cluster's masters have: the values one by one (SCAN), and figures.
 *
 * A value that the server's table moves meanwhile may be listed twice (SCAN). Before Redis 7.2
 * (CLIENT NO-TOUCH) a list counts as a use of what it lists, as STRLEN does; the time since the
 * last use is read first.
 */
#include "src/store/redis.h"

#ifdef KVT_HAVE_REDIS

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE "512"         /* keys that a SCAN looks at */
#define COUNTED_KEYS 10000 /* no more keys than these are counted one by one */

typedef struct scan {
    kvt_redis *redis;
    kvt_redis_link *link;
    kvt_redis_clock clock;
    kvt_store_error *error;
    char *pattern;
    /* list: */
    int (*on_entry)(void *entry_user, const kvt_store_entry *entry);
    void *entry_user;
    int stopped;
    /* stats: */
    uint64_t n_counted;
} scan;

/* SCAN's pattern of all keys with the prefix. */
static char *make_pattern(const kvt_redis *redis)
{
    char *pattern = malloc(2 * redis->prefix_bytes + 2), *p = pattern;
    if (!pattern)
        return NULL;
    for (const char *c = redis->prefix; *c; c++) {
        if (strchr("*?[]\\^", *c))
            *p++ = '\\';
        *p++ = *c;
    }
    *p++ = '*';
    *p = 0;
    return pattern;
}

static int parse_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Whether a key on the server is one of ours. */
static int parse_key(const kvt_redis *redis, const redisReply *text, kvt_store_key *key)
{
    const char *digits;
    if (text->type != REDIS_REPLY_STRING ||
        text->len != redis->prefix_bytes + KVT_REDIS_HEX_BYTES ||
        memcmp(text->str, redis->prefix, redis->prefix_bytes) != 0)
        return 0;
    digits = text->str + redis->prefix_bytes;
    for (size_t i = 0; i < KVT_STORE_KEY_BYTES; i++) {
        int high = parse_digit(digits[2 * i]), low = parse_digit(digits[2 * i + 1]);
        if (high < 0 || low < 0)
            return 0;
        key->bytes[i] = (uint8_t)(high << 4 | low);
    }
    return 1;
}

static kvt_status take(scan *s, redisReply **reply)
{
    return kvt_redis_link_take(s->redis, s->link, &s->clock, reply, s->error);
}

/* The next answer as a number: it to *number; another: -1, and 0 to *is_number. */
static kvt_status take_number(scan *s, int64_t *number, int *is_number)
{
    redisReply *reply;
    kvt_status status = take(s, &reply);
    if (status != KVT_OK)
        return status;
    *is_number = reply->type == REDIS_REPLY_INTEGER;
    *number = *is_number ? reply->integer : -1;
    freeReplyObject(reply);
    return KVT_OK;
}

/* Tell of keys[n] of a page that are ours. */
static kvt_status tell(scan *s, redisReply *const *keys, size_t n)
{
    kvt_store_entry entry;

    for (size_t i = 0; i < n; i++) {
        if (!parse_key(s->redis, keys[i], &entry.key))
            continue;
        kvt_redis_append_words(s->link, "OBJECT", "IDLETIME", keys[i]->str, (char *)NULL);
        kvt_redis_append_words(s->link, "TTL", keys[i]->str, (char *)NULL);
        kvt_redis_append_words(s->link, "STRLEN", keys[i]->str, (char *)NULL);
    }
    for (size_t i = 0; i < n; i++) {
        int64_t bytes;
        int known;
        kvt_status status;

        if (!parse_key(s->redis, keys[i], &entry.key))
            continue;
        status = take_number(s, &entry.used_seconds, &known); /* unknown where LFU is counted */
        if (status == KVT_OK)
            status = take_number(s, &entry.left_seconds, &known);
        if (status == KVT_OK)
            status = take_number(s, &bytes, &known);
        if (status != KVT_OK)
            return status;
        if (s->stopped || !known || entry.left_seconds == -2) /* no string; gone */
            continue;
        entry.bytes = (uint64_t)bytes;
        s->stopped = s->on_entry(s->entry_user, &entry) != 0;
    }
    return KVT_OK;
}

static kvt_status count(scan *s, redisReply *const *keys, size_t n)
{
    kvt_store_key key;
    for (size_t i = 0; i < n; i++)
        s->n_counted += (uint64_t)parse_key(s->redis, keys[i], &key);
    return KVT_OK;
}

/* All pages of the link's node. */
static kvt_status
scan_node(scan *s, kvt_status (*on_keys)(scan *s, redisReply *const *keys, size_t n), size_t most)
{
    char cursor[32] = "0";
    kvt_status status;

    do {
        redisReply *reply, *const *part;
        kvt_redis_append_words(s->link, "SCAN", cursor, "MATCH", s->pattern, "COUNT", PAGE,
                               (char *)NULL);
        status = take(s, &reply);
        if (status != KVT_OK)
            return status;
        part = reply->element;
        if (reply->type != REDIS_REPLY_ARRAY || reply->elements != 2 ||
            part[0]->type != REDIS_REPLY_STRING || part[0]->len >= sizeof cursor ||
            part[1]->type != REDIS_REPLY_ARRAY) {
            status = kvt_redis_refused(s->redis, s->link->node, reply, s->error);
        } else {
            memcpy(cursor, part[0]->str, part[0]->len + 1);
            for (size_t i = 0; i < part[1]->elements && status == KVT_OK && !s->stopped; i += most)
                status = on_keys(s, part[1]->element + i,
                                 part[1]->elements - i < most ? part[1]->elements - i : most);
        }
        freeReplyObject(reply);
    } while (status == KVT_OK && !s->stopped && strcmp(cursor, "0") != 0);
    return status;
}

static kvt_status list_node(scan *s)
{
    redisReply *reply;
    int untouched;
    kvt_status status;

    kvt_redis_append_words(s->link, "CLIENT", "NO-TOUCH", "ON", (char *)NULL);
    status = take(s, &reply);
    if (status != KVT_OK)
        return status;
    untouched = reply->type == REDIS_REPLY_STATUS;
    freeReplyObject(reply);
    status = scan_node(s, tell, s->redis->pipeline);
    if (untouched) /* a get on this connection is a use */
        kvt_redis_link_close(s->link);
    return status;
}

/* Call `on_node` for each master, with the scan's link to it. */
static kvt_status for_masters(kvt_redis *redis, scan *s, kvt_status (*on_node)(scan *s))
{
    kvt_redis_client *client = kvt_redis_client_take(redis);
    int nodes[KVT_REDIS_NODES];
    size_t n;
    kvt_status status;

    s->redis = redis;
    kvt_redis_start_clock(redis, &s->clock);
    s->pattern = make_pattern(redis);
    if (!client || !s->pattern)
        status = kvt_store_fail(s->error, KVT_ERR_MEMORY, "no memory for the call");
    else
        status = kvt_redis_fetch_map(redis, client, -1, -1, &s->clock, s->error);
    n = status == KVT_OK ? kvt_redis_masters(redis, nodes) : 0;
    for (size_t i = 0; i < n && status == KVT_OK && !s->stopped; i++) {
        status = kvt_redis_client_link(redis, client, nodes[i], &s->clock, &s->link, s->error);
        if (status != KVT_OK)
            break;
        status = on_node(s);
        if (s->link->timed_out)
            kvt_redis_node_failed(redis, nodes[i], s->error);
    }
    if (client)
        kvt_redis_client_give(redis, client);
    free(s->pattern);
    return status;
}

kvt_status kvt_redis_list(kvt_redis *redis,
                          int (*on_entry)(void *entry_user, const kvt_store_entry *entry),
                          void *entry_user, kvt_store_error *error)
{
    scan s = {.on_entry = on_entry, .entry_user = entry_user, .error = error};
    return for_masters(redis, &s, list_node);
}

/* ---- figures ---- */

typedef struct figures {
    scan scan; /* first: on_node is given it */
    uint64_t n_keys, max_bytes;
    int count; /* 1: the second pass */
} figures;

static kvt_status measure_node(scan *s)
{
    figures *f = (figures *)s;
    redisReply *reply;
    int64_t n_keys;
    int known;
    const char *line;
    kvt_status status;

    if (f->count)
        return scan_node(s, count, SIZE_MAX);
    kvt_redis_append_words(s->link, "DBSIZE", (char *)NULL);
    kvt_redis_append_words(s->link, "INFO", "memory", (char *)NULL);
    status = take_number(s, &n_keys, &known);
    if (status != KVT_OK)
        return status;
    f->n_keys =
        known && n_keys >= 0 && f->n_keys != UINT64_MAX ? f->n_keys + (uint64_t)n_keys : UINT64_MAX;
    status = take(s, &reply);
    if (status != KVT_OK)
        return status;
    if (reply->type == REDIS_REPLY_ERROR && kvt_redis_is_error(reply, "NOAUTH"))
        status = kvt_redis_refused(s->redis, s->link->node, reply, s->error);
    line = reply->type == REDIS_REPLY_STRING ? strstr(reply->str, "\nmaxmemory:") : NULL;
    if (!line || f->max_bytes == UINT64_MAX)
        f->max_bytes = UINT64_MAX;
    else
        f->max_bytes += strtoull(line + strlen("\nmaxmemory:"), NULL, 10);
    freeReplyObject(reply);
    return status;
}

/*
 * What a server has besides our values is unknown to it: only few keys are looked at one by one.
 * Its memory is that of all it has, and more than the values' bytes, so these are unknown unless
 * there is no key at all.
 */
kvt_status kvt_redis_stats(kvt_redis *redis, kvt_store_stats *stats, kvt_store_error *error)
{
    figures f = {.scan = {.error = error}};
    kvt_status status = for_masters(redis, &f.scan, measure_node);

    if (status == KVT_OK && f.n_keys > 0 && f.n_keys <= COUNTED_KEYS) {
        f.count = 1;
        status = for_masters(redis, &f.scan, measure_node);
    }
    if (status != KVT_OK)
        return status;
    memset(stats, 0, sizeof *stats);
    stats->n_values = f.n_keys <= COUNTED_KEYS ? f.scan.n_counted : UINT64_MAX;
    stats->bytes = stats->n_values == 0 ? 0 : UINT64_MAX;
    stats->max_bytes = f.max_bytes;
    (void)pthread_mutex_lock(&redis->lock);
    stats->n_got = redis->n_got;
    stats->n_missed = redis->n_missed;
    stats->n_put = redis->n_put;
    stats->n_failed = redis->n_failed;
    (void)pthread_mutex_unlock(&redis->lock);
    return KVT_OK;
}

#endif /* KVT_HAVE_REDIS */
