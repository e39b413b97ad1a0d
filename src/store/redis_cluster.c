/*
 * A cluster's slots and nodes: which node has a key, and who says so (CLUSTER SLOTS, MOVED, ASK).
 *
 * A server is taken for a single one until it answers MOVED or CLUSTER SLOTS. Node 0 is the
 * config's address; the others are those that the cluster names. They are only added, so that a
 * number stays valid for all clients; a cluster that has had KVT_REDIS_NODES addresses in one
 * process's life needs a store opened anew.
 */
#include "src/store/redis.h"

#ifdef KVT_HAVE_REDIS

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* By four bits: x^16 + x^12 + x^5 + 1, the highest bit first, from 0. */
uint16_t kvt_redis_crc16(uint16_t crc, const void *data, size_t bytes)
{
    const unsigned char *byte = data;
    for (size_t i = 0; i < bytes; i++) {
        crc = (uint16_t)(crc ^ (unsigned)byte[i] << 8);
        for (int half = 0; half < 2; half++) {
            unsigned top = crc >> 12;
            crc = (uint16_t)((unsigned)crc << 4 ^ top << 12 ^ top << 5 ^ top);
        }
    }
    return crc;
}

/* Of a key with a brace, and one behind it that closes it, only what is between them counts, if
   it is something. A key's digits are no braces, so the prefix alone decides. */
void kvt_redis_prepare_slots(kvt_redis *redis)
{
    const char *open = strchr(redis->prefix, '{');
    const char *end = open ? strchr(open + 1, '}') : NULL;

    redis->slot_fixed = end && end > open + 1;
    redis->prefix_crc = redis->slot_fixed ? kvt_redis_crc16(0, open + 1, (size_t)(end - open) - 1)
                                          : kvt_redis_crc16(0, redis->prefix, redis->prefix_bytes);
}

uint32_t kvt_redis_slot(const kvt_redis *redis, const kvt_store_key *key)
{
    uint16_t crc = redis->prefix_crc;
    if (!redis->slot_fixed) {
        char hex[KVT_REDIS_HEX_BYTES];
        kvt_redis_hex(key, hex);
        crc = kvt_redis_crc16(crc, hex, sizeof hex);
    }
    return crc % KVT_REDIS_SLOTS;
}

static int find_node(const kvt_redis *redis, const char *host, uint32_t port)
{
    for (size_t i = 0; i < redis->n_nodes; i++) {
        const kvt_redis_node *node = redis->nodes[i];
        if (host && node->host ? node->port == port && strcmp(node->host, host) == 0
                               : !host && !node->host)
            return (int)i;
    }
    return -1;
}

int kvt_redis_add_node(kvt_redis *redis, const char *host, uint32_t port)
{
    kvt_redis_node *node;
    int found;

    (void)pthread_mutex_lock(&redis->lock);
    found = find_node(redis, host, port);
    if (found < 0 && redis->n_nodes < KVT_REDIS_NODES) {
        size_t bytes = host ? strlen(host) + 1 : 0;
        node = calloc(1, sizeof *node);
        if (node && host && !(node->host = malloc(bytes))) {
            free(node);
            node = NULL;
        }
        if (node) {
            if (host) {
                memcpy(node->host, host, bytes);
                (void)snprintf(node->name, sizeof node->name, "%.80s:%u", host, port);
            } else {
                (void)snprintf(node->name, sizeof node->name, "%.90s", redis->unix_path);
            }
            node->port = port;
            found = (int)redis->n_nodes;
            redis->nodes[redis->n_nodes++] = node;
        }
    }
    (void)pthread_mutex_unlock(&redis->lock);
    return found;
}

/* A host that a node does not name, as it does not know it, is its own. */
static const char *host_or_own(const kvt_redis_node *from, const char *host)
{
    if (host && *host && strcmp(host, "?") != 0)
        return host;
    return from->host ? from->host : "127.0.0.1";
}

int kvt_redis_parse_target(kvt_redis *redis, const kvt_redis_node *from, const char *text,
                           uint32_t *slot, int *node)
{
    char host[256], *end;
    const char *colon = strrchr(text, ':');
    unsigned long number = strtoul(text, &end, 10), port;

    if (!colon || end == text || *end != ' ' || number >= KVT_REDIS_SLOTS || colon <= end ||
        (size_t)(colon - end) > sizeof host)
        return 0;
    memcpy(host, end + 1, (size_t)(colon - end) - 1);
    host[colon - end - 1] = 0;
    port = strtoul(colon + 1, &end, 10);
    if (end == colon + 1 || *end != 0 || port == 0 || port > 65535)
        return 0;
    *slot = (uint32_t)number;
    *node = kvt_redis_add_node(redis, host_or_own(from, host), (uint32_t)port);
    return *node >= 0;
}

/* "host, port, ..." of a node in CLUSTER SLOTS; -1: it is none. */
static int node_of(kvt_redis *redis, const kvt_redis_node *from, const redisReply *reply)
{
    const redisReply *host, *port;
    if (reply->type != REDIS_REPLY_ARRAY || reply->elements < 2)
        return -1;
    host = reply->element[0];
    port = reply->element[1];
    if ((host->type != REDIS_REPLY_STRING && host->type != REDIS_REPLY_NIL) ||
        port->type != REDIS_REPLY_INTEGER || port->integer <= 0 || port->integer > 65535)
        return -1;
    return kvt_redis_add_node(redis, host_or_own(from, host->str), (uint32_t)port->integer);
}

/* Ranges of slots: "first, last, master, replica ..." each. 0: it is no map. */
static int take_map(kvt_redis *redis, const kvt_redis_node *from, const redisReply *reply,
                    int16_t *slots)
{
    size_t n_known = 0;

    memset(slots, -1, KVT_REDIS_SLOTS * sizeof *slots);
    for (size_t i = 0; i < reply->elements; i++) {
        const redisReply *range = reply->element[i];
        long long first, last;
        int node;

        if (range->type != REDIS_REPLY_ARRAY || range->elements < 3 ||
            range->element[0]->type != REDIS_REPLY_INTEGER ||
            range->element[1]->type != REDIS_REPLY_INTEGER)
            return 0;
        first = range->element[0]->integer;
        last = range->element[1]->integer;
        node = node_of(redis, from, range->element[2]);
        if (node < 0 || first < 0 || last < first || last >= KVT_REDIS_SLOTS)
            return 0;
        for (size_t r = 3; r < range->elements; r++) /* who tells the map when the master cannot */
            (void)node_of(redis, from, range->element[r]);
        for (long long s = first; s <= last; s++, n_known++)
            slots[s] = (int16_t)node;
    }
    return n_known > 0;
}

static kvt_status fetch_from(kvt_redis *redis, kvt_redis_client *client, int node,
                             const kvt_redis_clock *clock, int16_t *slots, kvt_store_error *error)
{
    kvt_redis_link *link;
    redisReply *reply;
    int is_cluster = 1;
    kvt_status status = kvt_redis_client_link(redis, client, node, clock, &link, error);

    if (status != KVT_OK)
        return status;
    kvt_redis_append_words(link, "CLUSTER", "SLOTS", (char *)NULL);
    status = kvt_redis_link_take(redis, link, clock, &reply, error);
    if (status != KVT_OK) {
        if (link->timed_out)
            kvt_redis_node_failed(redis, node, error);
        return status;
    }
    if (reply->type == REDIS_REPLY_ERROR && kvt_redis_is_error(reply, "ERR"))
        is_cluster = 0; /* "This instance has cluster support disabled", or it is unknown */
    else if (reply->type != REDIS_REPLY_ARRAY)
        status = kvt_redis_refused(redis, link->node, reply, error);
    else if (!take_map(redis, link->node, reply, slots))
        status = kvt_store_fail(error, KVT_ERR_IO, "%s knows of no node that has slots",
                                link->node->name);
    freeReplyObject(reply);
    if (status == KVT_OK) {
        (void)pthread_mutex_lock(&redis->lock);
        redis->is_cluster = is_cluster;
        if (is_cluster)
            memcpy(redis->slots, slots, sizeof redis->slots);
        (void)pthread_mutex_unlock(&redis->lock);
    }
    return status;
}

kvt_status kvt_redis_fetch_map(kvt_redis *redis, kvt_redis_client *client, int first, int avoid,
                               const kvt_redis_clock *clock, kvt_store_error *error)
{
    int16_t *slots = malloc(KVT_REDIS_SLOTS * sizeof *slots);
    kvt_status status = KVT_ERR_IO;
    size_t n_nodes;

    if (!slots)
        return kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for the cluster's slots");
    (void)pthread_mutex_lock(&redis->lock);
    n_nodes = redis->n_nodes;
    (void)pthread_mutex_unlock(&redis->lock);
    /* The one that knows best, those that are connected, the others, the one that is in doubt. */
    for (int pass = 0; pass < 4 && status != KVT_OK; pass++)
        for (size_t i = 0; i < n_nodes && status != KVT_OK; i++) {
            int connected = i < client->n_links && client->links[i] &&
                            kvt_redis_link_is_usable(client->links[i]);
            int turn = (int)i == avoid ? 3 : (int)i == first ? 0 : connected ? 1 : 2;
            if (turn == pass)
                status = kvt_redis_check_time(redis, clock, error);
            if (turn == pass && status == KVT_OK)
                status = fetch_from(redis, client, (int)i, clock, slots, error);
        }
    free(slots);
    return status;
}

size_t kvt_redis_masters(kvt_redis *redis, int *nodes)
{
    unsigned char seen[KVT_REDIS_NODES] = {0};
    size_t n = 0;

    (void)pthread_mutex_lock(&redis->lock);
    for (size_t s = 0; redis->is_cluster && s < KVT_REDIS_SLOTS; s++)
        if (redis->slots[s] >= 0 && !seen[redis->slots[s]]) {
            seen[redis->slots[s]] = 1;
            nodes[n++] = redis->slots[s];
        }
    (void)pthread_mutex_unlock(&redis->lock);
    if (n == 0)
        nodes[n++] = 0;
    return n;
}

#endif /* KVT_HAVE_REDIS */
