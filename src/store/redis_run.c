/*
 * One command a key, pipelined, to the node that has it; to several nodes side by side.
 *
 * A job runs in rounds. In a round each command that is not done goes into the queue of its slot's
 * node; every link sends up to `pipeline` commands before their answers are there; the round ends
 * when no link has anything left. A receiver is given one value after the other: while one link is
 * in the middle of one, the others only send.
 *
 * A redirection (MOVED, ASK) or a lost node of a cluster leaves commands for another round, before
 * which the map of slots is fetched. A single server that is lost ends the job, as does a lost node
 * that the map still has: a new master is used by the next call.
 *
 * An answer that is an error ends the job, too: nothing more is sent, but what was sent is
 * answered, so that it is known what has been put and the connection stays in order. A connection
 * with answers outstanding is closed.
 */
#include "src/store/redis.h"

#ifdef KVT_HAVE_REDIS

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROUNDS 16
#define PAUSE_MS 10                       /* before a round that waits for the cluster */
#define FLYING_BYTES ((uint64_t)32 << 20) /* of values under way to or from one node */

enum { MAIN, ASKING, RENEW }; /* kvt_redis_request.kind: the command; what goes before, behind it */

typedef struct command {
    size_t next;           /* in a link's queue */
    int node, failed_node; /* failed_node: that was lost with it; -1: none */
    uint8_t finished;
    uint8_t asking; /* goes to `node`, whatever the map says, with ASKING */
    uint8_t del;    /* sent as DEL */
} command;

typedef struct run {
    kvt_redis *redis;
    kvt_redis_client *client;
    const kvt_redis_job *job;
    kvt_redis_clock clock;
    command *commands;
    kvt_status status; /* of the job's first failure, which *error tells */
    kvt_store_error *error;
    int stopped;                  /* by the receiver */
    const kvt_redis_link *giving; /* whose value the receiver has some of: no other's is given */
    int is_cluster, del, has_ttl;
    char expire[16]; /* ttl_seconds */
    /* Of a round. */
    int want_map, pause;
    int moved_node; /* that MOVED has named last; -1: none */
    int lost_node;  /* -1: none; why: lost */
    kvt_store_error lost;
    uint8_t down[KVT_REDIS_NODES];
} run;

static void fail(run *r, kvt_status status, const kvt_store_error *error)
{
    if (r->status != KVT_OK)
        return;
    r->status = status;
    *r->error = *error;
}

/* ---- sending ---- */

static void push(kvt_redis_link *link, int kind, size_t index, uint64_t bytes)
{
    size_t at = (link->ring_first + link->ring_count++) % link->ring_capacity;
    link->ring[at] = (kvt_redis_request){.index = index, .bytes = bytes, .kind = kind};
    link->n_flying += kind == MAIN;
    link->flying_bytes += bytes;
}

static void append_key(const run *r, kvt_redis_link *link, const kvt_store_key *key)
{
    char head[32], hex[KVT_REDIS_HEX_BYTES];
    int n = snprintf(head, sizeof head, "$%zu\r\n", r->redis->prefix_bytes + sizeof hex);
    kvt_redis_hex(key, hex);
    kvt_redis_append_text(link, head, (size_t)n);
    kvt_redis_append_text(link, r->redis->prefix, r->redis->prefix_bytes);
    kvt_redis_append_text(link, hex, sizeof hex);
    kvt_redis_append_text(link, "\r\n", 2);
}

static void append_value(kvt_redis_link *link, const kvt_store_value *value)
{
    char head[32];
    uint64_t bytes = 0; /* that will be sent, whatever value->bytes is */
    int n;

    for (size_t p = 0; p < value->n_parts; p++)
        bytes += value->parts[p].bytes;
    n = snprintf(head, sizeof head, "$%llu\r\n", (unsigned long long)bytes);
    kvt_redis_append_text(link, head, (size_t)n);
    for (size_t p = 0; p < value->n_parts; p++)
        kvt_redis_append_data(link, value->parts[p].data, value->parts[p].bytes);
    kvt_redis_append_text(link, "\r\n", 2);
}

static void append_asking(const command *c, kvt_redis_link *link, size_t index)
{
    if (!c->asking)
        return;
    kvt_redis_append_words(link, "ASKING", (char *)NULL);
    push(link, ASKING, index, 0);
}

static void append_command(run *r, kvt_redis_link *link, size_t index)
{
    static const char *const names[] = {"GET", "SET", "EXISTS", "UNLINK"};
    const kvt_redis_job *job = r->job;
    command *c = &r->commands[index];
    int set = job->operation == KVT_REDIS_SET;
    const char *name = names[job->operation];

    append_asking(c, link, index);
    c->del = job->operation == KVT_REDIS_UNLINK && r->del;
    if (c->del)
        name = "DEL";
    kvt_redis_append_array(link, set ? (r->has_ttl ? 5 : 3) : 2);
    kvt_redis_append_string(link, name, strlen(name));
    append_key(r, link, &job->keys[index]);
    if (set) {
        append_value(link, &job->values[index]);
        if (r->has_ttl) {
            kvt_redis_append_string(link, "EX", 2);
            kvt_redis_append_string(link, r->expire, strlen(r->expire));
        }
    }
    push(link, MAIN, index, set ? job->values[index].bytes : 0);
    /* Of a key that is not there: nothing. A question renews, too: a put asks for all blocks of its
       prompt, and the first ones would else be the first to go. */
    if ((job->operation == KVT_REDIS_GET || job->operation == KVT_REDIS_EXISTS) && r->has_ttl) {
        append_asking(c, link, index);
        kvt_redis_append_array(link, 3);
        kvt_redis_append_string(link, "EXPIRE", 6);
        append_key(r, link, &job->keys[index]);
        kvt_redis_append_string(link, r->expire, strlen(r->expire));
        push(link, RENEW, index, 0);
    }
    c->asking = 0;
}

/*
 * Whether one more command may be under way. Bytes are bounded, too: of values to a server, so that
 * little is in doubt when it is lost; of values from it, as far as their sizes can be guessed, as
 * a server holds the answers to all commands that it has read before it sends the first one.
 */
static int has_room(const run *r, const kvt_redis_link *link)
{
    uint64_t bytes = link->flying_bytes;
    if (link->n_flying == 0)
        return 1;
    if (r->job->operation == KVT_REDIS_GET && link->value_bytes)
        bytes =
            link->value_bytes < FLYING_BYTES ? link->n_flying * link->value_bytes : FLYING_BYTES;
    return link->n_flying < r->redis->pipeline && link->ring_capacity - link->ring_count >= 4 &&
           bytes < FLYING_BYTES;
}

static void fill(run *r, kvt_redis_link *link)
{
    while (link->queue != SIZE_MAX && has_room(r, link)) {
        size_t index = link->queue;
        link->queue = r->commands[index].next;
        append_command(r, link, index);
    }
}

/* ---- answers ---- */

/* An error as the answer to a command. */
static void take_error(run *r, kvt_redis_link *link, size_t index, const redisReply *reply)
{
    command *c = &r->commands[index];
    kvt_store_error error;
    uint32_t slot;
    int node, ask = kvt_redis_is_error(reply, "ASK");

    if (kvt_redis_is_error(reply, "WRONGTYPE") && r->job->operation == KVT_REDIS_GET) {
        c->finished = 1; /* somebody else's: as if it were not there */
        return;
    }
    if (strncmp(reply->str, "ERR unknown command", 19) == 0 &&
        r->job->operation == KVT_REDIS_UNLINK && !c->del) {
        r->del = 1;
        return;
    }
    if ((ask || kvt_redis_is_error(reply, "MOVED")) &&
        kvt_redis_parse_target(r->redis, link->node, reply->str + (ask ? 3 : 5), &slot, &node)) {
        (void)pthread_mutex_lock(&r->redis->lock);
        if (!r->redis->is_cluster)
            memset(r->redis->slots, -1, sizeof r->redis->slots);
        r->redis->is_cluster = 1;
        if (!ask)
            r->redis->slots[slot] = (int16_t)node;
        (void)pthread_mutex_unlock(&r->redis->lock);
        r->is_cluster = 1;
        if (ask) {
            c->asking = 1;
            c->node = node;
        } else {
            r->moved_node = node;
            r->want_map = 1;
        }
        (void)kvt_store_fail(&r->lost, KVT_ERR_IO, "the cluster redirects without end");
        return;
    }
    if (r->is_cluster &&
        (kvt_redis_is_error(reply, "TRYAGAIN") || kvt_redis_is_error(reply, "READONLY"))) {
        r->pause = r->want_map = 1;
        (void)kvt_redis_refused(r->redis, link->node, reply, &r->lost);
        return;
    }
    if (kvt_redis_is_error(reply, "READONLY") || kvt_redis_is_error(reply, "MASTERDOWN"))
        link->demoted = 1;
    fail(r, kvt_redis_refused(r->redis, link->node, reply, &error), &error);
}

static void take_reply(run *r, kvt_redis_link *link, size_t index, const redisReply *reply)
{
    command *c = &r->commands[index];
    uint8_t *done = &r->job->done[index];
    kvt_store_error error;
    int fits = 0;

    if (reply->type == REDIS_REPLY_ERROR) {
        take_error(r, link, index, reply);
        return;
    }
    switch (r->job->operation) {
    case KVT_REDIS_GET: fits = reply->type == REDIS_REPLY_NIL; break;
    case KVT_REDIS_SET:
        fits = reply->type == REDIS_REPLY_STATUS;
        *done = (uint8_t)fits;
        break;
    case KVT_REDIS_EXISTS:
    case KVT_REDIS_UNLINK:
        fits = reply->type == REDIS_REPLY_INTEGER;
        *done = fits && reply->integer > 0;
        break;
    }
    c->finished = 1;
    if (!fits)
        fail(r, kvt_redis_refused(r->redis, link->node, reply, &error), &error);
}

/* ASKING that a node refuses: the command behind it is redirected again, in circles. */
static void take_asking(run *r, const kvt_redis_link *link, const redisReply *reply)
{
    kvt_store_error why, error;
    kvt_status status;

    if (reply->type != REDIS_REPLY_ERROR)
        return;
    status = kvt_redis_refused(r->redis, link->node, reply, &why);
    (void)kvt_store_fail(&error, status, "%.240s: ASKING", why.text);
    fail(r, status, &error);
}

static void pop(kvt_redis_link *link)
{
    const kvt_redis_request *head = &link->ring[link->ring_first];
    link->n_flying -= head->kind == MAIN;
    link->flying_bytes -= head->bytes;
    link->ring_first = (link->ring_first + 1) % link->ring_capacity;
    link->ring_count--;
}

/* Send, receive and take what has come, without waiting. */
static kvt_status step(run *r, kvt_redis_link *link, int *moved, kvt_store_error *error)
{
    kvt_status status;

    if (r->status == KVT_OK)
        fill(r, link);
    else
        link->queue = SIZE_MAX;
    if (link->ring_count == 0)
        return KVT_OK;
    if (r->giving && r->giving != link) { /* what it has to give waits in the socket */
        *moved = kvt_redis_link_send(link);
        link->since_ms = 0;
        return KVT_OK;
    }
    status = kvt_redis_link_move(link, r->job->receiver, &r->clock, moved, error);
    while (status == KVT_OK && link->ring_count > 0) {
        kvt_redis_request head = link->ring[link->ring_first];
        const kvt_store_receiver *receiver = head.kind == MAIN ? r->job->receiver : NULL;
        kvt_redis_event event = KVT_REDIS_NOTHING;
        redisReply *reply = NULL;

        status = kvt_redis_link_next(link, receiver, head.index, &event, &reply, error);
        if (status != KVT_OK || event == KVT_REDIS_NOTHING)
            break;
        if (event == KVT_REDIS_STOPPED) {
            r->stopped = 1;
            return KVT_OK;
        }
        pop(link);
        if (event == KVT_REDIS_VALUE) {
            r->commands[head.index].finished = r->job->done[head.index] = 1;
            link->value_bytes = link->value.total;
            if (kvt_redis_now_ms() >= r->clock.end_ms) /* the receiver has taken long: others may
                                                          have come with it, and do not count */
                break;
        }
        if (event == KVT_REDIS_REPLY && head.kind == MAIN)
            take_reply(r, link, head.index, reply);
        if (event == KVT_REDIS_REPLY && head.kind == ASKING)
            take_asking(r, link, reply);
        if (reply)
            freeReplyObject(reply);
    }
    r->giving = link->value.active ? link : NULL;
    if (status == KVT_OK && link->ring_count == 0) {
        link->since_ms = 0;
        if (!kvt_redis_link_is_clean(link))
            status = kvt_store_fail(error, KVT_ERR_IO, "%s answers what it was not asked",
                                    link->node->name);
    }
    return status;
}

/* ---- rounds ---- */

/* A node cannot be reached, or is lost: other nodes of a cluster may know who has its slots. */
static void lose_node(run *r, int node, kvt_status status, const kvt_store_error *error)
{
    r->down[node] = 1;
    if (!r->is_cluster || status == KVT_ERR_MEMORY) {
        fail(r, status, error);
        return;
    }
    r->lost_node = node;
    r->lost = *error;
    r->want_map = 1;
}

static void lose_link(run *r, int node, kvt_status status, const kvt_store_error *error)
{
    kvt_redis_link *link = r->client->links[node];

    if (link->timed_out)
        kvt_redis_node_failed(r->redis, node, error);
    if (link->value.active) /* the receiver has some of it and cannot be given it from the start */
        fail(r, status, error);
    for (size_t i = 0; i < link->ring_count; i++)
        r->commands[link->ring[(link->ring_first + i) % link->ring_capacity].index].failed_node =
            node;
    for (size_t i = link->queue; i != SIZE_MAX; i = r->commands[i].next)
        r->commands[i].failed_node = node;
    if (r->giving == link)
        r->giving = NULL;
    kvt_redis_link_close(link);
    lose_node(r, node, status, error);
}

/* Put the commands that are not finished into their nodes' queues. Returns whether there are
   any. */
static int assign(run *r)
{
    kvt_redis *redis = r->redis;
    int any = 0;

    (void)pthread_mutex_lock(&redis->lock);
    r->is_cluster = redis->is_cluster;
    for (size_t i = 0; i < r->job->n; i++) {
        command *c = &r->commands[i];
        int node;
        if (c->finished || c->asking)
            continue;
        node = r->is_cluster ? redis->slots[kvt_redis_slot(redis, &r->job->keys[i])] : 0;
        c->node = node < 0 ? 0 : node;
    }
    (void)pthread_mutex_unlock(&redis->lock);

    for (size_t i = 0; i < r->job->n && r->status == KVT_OK; i++) {
        command *c = &r->commands[i];
        kvt_redis_link *link = NULL;
        kvt_store_error error;
        kvt_status status;

        if (c->finished)
            continue;
        any = 1;
        if (!r->down[c->node]) {
            link = (size_t)c->node < r->client->n_links ? r->client->links[c->node] : NULL;
            if (!link || link->queue == SIZE_MAX) {
                status = kvt_redis_client_link(redis, r->client, c->node, &r->clock, &link, &error);
                if (status != KVT_OK)
                    lose_node(r, c->node, status, &error);
            }
        }
        if (r->down[c->node]) {
            c->failed_node = c->node;
            continue;
        }
        c->next = SIZE_MAX;
        if (link->queue == SIZE_MAX)
            link->queue = i;
        else
            r->commands[link->queue_last].next = i;
        link->queue_last = i;
    }
    return any;
}

static int is_busy(const kvt_redis_link *link)
{
    return link && link->fd >= 0 && (link->queue != SIZE_MAX || link->ring_count > 0);
}

/* Until no link has anything left. */
static void run_round(run *r)
{
    kvt_redis_client *client = r->client;
    for (;;) {
        int busy = 0, moved = 0;
        kvt_store_error error;
        kvt_status status;

        for (size_t i = 0; i < client->n_links && !r->stopped; i++) {
            int link_moved = 0;
            if (!is_busy(client->links[i]))
                continue;
            busy = 1;
            status = step(r, client->links[i], &link_moved, &error);
            if (status != KVT_OK) {
                lose_link(r, (int)i, status, &error);
                link_moved = 1;
            }
            moved |= link_moved || !is_busy(client->links[i]);
        }
        if (!busy || r->stopped)
            return;
        status = kvt_redis_check_time(r->redis, &r->clock, &error);
        if (status != KVT_OK) {
            fail(r, status, &error);
            return;
        }
        if (!moved)
            kvt_redis_wait(client->links, client->n_links, client->polled, &r->clock);
    }
}

/* What another round needs: the map, the cluster's time. */
static void prepare_round(run *r)
{
    kvt_store_error error;
    kvt_status status = KVT_OK;

    if (r->pause)
        (void)poll(NULL, 0, PAUSE_MS);
    if (r->want_map)
        status = kvt_redis_fetch_map(r->redis, r->client, r->moved_node, r->lost_node, &r->clock,
                                     &error);
    if (r->lost_node >= 0) {
        (void)pthread_mutex_lock(&r->redis->lock);
        for (size_t i = 0; i < r->job->n; i++) {
            command *c = &r->commands[i];
            if (c->finished || c->failed_node < 0)
                continue;
            if (status != KVT_OK || !r->redis->is_cluster ||
                r->redis->slots[kvt_redis_slot(r->redis, &r->job->keys[i])] == c->failed_node)
                fail(r, KVT_ERR_IO, &r->lost);
            c->failed_node = -1;
            c->asking = 0;
        }
        (void)pthread_mutex_unlock(&r->redis->lock);
    }
    /* A map that cannot be had after MOVED is none: what MOVED has said is known. */
    status = kvt_redis_check_time(r->redis, &r->clock, &error);
    if (status != KVT_OK)
        fail(r, status, &error);
    r->want_map = r->pause = 0;
    r->moved_node = r->lost_node = -1;
    memset(r->down, 0, sizeof r->down);
}

static void finish(run *r)
{
    kvt_redis *redis = r->redis;
    uint64_t n = 0;

    for (size_t i = 0; i < r->job->n; i++)
        n += r->job->done[i];
    (void)pthread_mutex_lock(&redis->lock);
    redis->no_unlink |= r->del;
    switch (r->job->operation) {
    case KVT_REDIS_GET: redis->n_got += n; /* fall through */
    case KVT_REDIS_EXISTS:
        for (size_t i = 0; i < r->job->n; i++)
            redis->n_missed += r->commands[i].finished && !r->job->done[i];
        break;
    case KVT_REDIS_SET: redis->n_put += n; break;
    case KVT_REDIS_UNLINK: break;
    }
    (void)pthread_mutex_unlock(&redis->lock);
}

kvt_status kvt_redis_run(kvt_redis *redis, const kvt_redis_job *job, kvt_store_error *error)
{
    run *r;
    kvt_status status;

    if (job->n == 0)
        return KVT_OK;
    r = calloc(1, sizeof *r);
    if (r)
        r->commands = calloc(job->n, sizeof *r->commands);
    if (r && r->commands)
        r->client = kvt_redis_client_take(redis);
    if (!r || !r->client) {
        if (r)
            free(r->commands);
        free(r);
        return kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for the call");
    }
    r->redis = redis;
    r->job = job;
    r->error = error;
    r->moved_node = r->lost_node = -1;
    for (size_t i = 0; i < job->n; i++)
        r->commands[i].failed_node = -1;
    kvt_redis_start_clock(redis, &r->clock);
    r->has_ttl = redis->ttl_seconds > 0;
    (void)snprintf(r->expire, sizeof r->expire, "%u", redis->ttl_seconds);
    (void)pthread_mutex_lock(&redis->lock);
    r->del = redis->no_unlink;
    (void)pthread_mutex_unlock(&redis->lock);

    for (int round = 0; assign(r) && r->status == KVT_OK; round++) {
        if (round == ROUNDS) {
            fail(r, KVT_ERR_IO, &r->lost);
            break;
        }
        run_round(r);
        if (r->stopped || r->status != KVT_OK)
            break;
        if (r->want_map || r->pause)
            prepare_round(r);
    }
    finish(r);
    kvt_redis_client_give(redis, r->client);
    status = r->status;
    free(r->commands);
    free(r);
    return status;
}

#endif /* KVT_HAVE_REDIS */
