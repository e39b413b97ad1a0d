/*
 * What a Redis or Valkey server answers: receiving, replies, values, errors.
 *
 * Replies of one line go to hiredis line by line. What stands behind the line of a bulk string that
 * a receiver wants is its value: it never passes through hiredis, which would copy it twice and
 * need memory for all of it. The receiver's own memory (place) is received into, a few bytes more
 * into the buffer behind it; otherwise the receiver is given the buffer's bytes as they come. Other
 * replies (arrays) go to hiredis as a whole.
 */
#include "src/store/redis.h"

#ifdef KVT_HAVE_REDIS

#include <errno.h>
#include <string.h>

#define AHEAD_BYTES ((size_t)32 << 10) /* received behind bytes that are placed: they are copied */
#define LINE_BYTES ((size_t)16 << 10)  /* longer lines are no Redis */
#define REPLY_BYTES ((size_t)64 << 20) /* of a reply that hiredis holds, parsed or not */
#define REPLY_ELEMENTS 1000000 /* of its arrays: hiredis makes room for all that are announced */

#if HIREDIS_MAJOR >= 1
typedef size_t array_count;
#else
typedef int array_count;
#endif

static void *create_array(const redisReadTask *task, array_count n)
{
    kvt_redis_link *link = task->privdata;
    link->n_elements += (uint64_t)n;
    return link->n_elements > REPLY_ELEMENTS ? NULL : link->own_functions->createArray(task, n);
}

static void *create_string(const redisReadTask *task, char *text, size_t bytes)
{
    kvt_redis_link *link = task->privdata;
    link->n_string_bytes += bytes;
    return link->n_string_bytes > REPLY_BYTES
               ? NULL
               : link->own_functions->createString(task, text, bytes);
}

static void begin_reply(kvt_redis_link *link)
{
    link->n_elements = link->n_string_bytes = 0;
}

int kvt_redis_link_make_reader(kvt_redis_link *link)
{
    link->reader = redisReaderCreate();
    if (!link->reader)
        return 0;
    link->own_functions = link->reader->fn;
    link->functions = *link->reader->fn;
    link->functions.createArray = create_array;
    link->functions.createString = create_string;
    link->reader->fn = &link->functions;
    link->reader->privdata = link;
    begin_reply(link);
    return 1;
}

/* ---- texts ---- */

int kvt_redis_is_error(const redisReply *reply, const char *code)
{
    size_t n = strlen(code);
    return reply->type == REDIS_REPLY_ERROR && strncmp(reply->str, code, n) == 0 &&
           (reply->str[n] == ' ' || reply->str[n] == 0);
}

static const struct {
    const char *code, *meaning;
    kvt_status status;
} refusals[] = {
    {"NOAUTH", "the server needs a password", KVT_ERR_IO},
    {"WRONGPASS", "the server takes neither this user nor this password", KVT_ERR_IO},
    {"NOPERM", "the server does not permit this to the user", KVT_ERR_IO},
    {"LOADING", "the server is still loading its data", KVT_ERR_IO},
    {"OOM", "the server's memory is full", KVT_ERR_FULL},
    {"READONLY", "the server is a replica, which cannot be written to", KVT_ERR_IO},
    {"CLUSTERDOWN", "the cluster is down, or lacks the slot's node", KVT_ERR_IO},
    {"TRYAGAIN", "the cluster is moving the slot", KVT_ERR_IO},
    {"MASTERDOWN", "the server is a replica that has lost its master", KVT_ERR_IO},
    {"MISCONF", "the server cannot write its disk and takes no values", KVT_ERR_IO},
    {"BUSY", "the server is busy with a script", KVT_ERR_IO},
    {"WRONGTYPE", "the key has something else than a string", KVT_ERR_IO},
};

kvt_status kvt_redis_refused(const kvt_redis *redis, const kvt_redis_node *node,
                             const redisReply *reply, kvt_store_error *error)
{
    char text[128];
    size_t n = 0;

    if (reply->type != REDIS_REPLY_ERROR)
        return kvt_store_fail(error, KVT_ERR_IO, "%s answers with a reply of another type",
                              node->name);
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++)
        if (kvt_redis_is_error(reply, refusals[i].code))
            return kvt_store_fail(error, refusals[i].status, "%s: %s (%s)", node->name,
                                  refusals[i].meaning, refusals[i].code);
    if (strstr(reply->str, "invalid bulk length"))
        return kvt_store_fail(error, KVT_ERR_FULL,
                              "%s: the value is larger than the server takes "
                              "(proto-max-bulk-len)",
                              node->name);
    /* Servers quote what they were sent. */
    if (redis->password && *redis->password && strstr(reply->str, redis->password))
        return kvt_store_fail(error, KVT_ERR_IO, "%s answers with an error", node->name);
    for (; n + 1 < sizeof text && n < reply->len; n++)
        text[n] = (char)(reply->str[n] < ' ' || reply->str[n] > '~' ? '?' : reply->str[n]);
    text[n] = 0;
    return kvt_store_fail(error, KVT_ERR_IO, "%s answers: %s", node->name, text);
}

kvt_status kvt_redis_fail_errno(const kvt_redis_link *link, const char *what, int number,
                                kvt_store_error *error)
{
    return kvt_store_fail(error, KVT_ERR_IO, "%s: %s: %s", link->node->name, what,
                          strerror(number));
}

/* A server that expects TLS closes when it is spoken to without, or answers with an alert. */
static const char *hint(const kvt_redis_link *link)
{
    int may_be_tls = !link->tls && link->node->host &&
                     (link->first_byte < 0 || link->first_byte == KVT_TLS_ALERT);
    return may_be_tls ? ": does the server expect TLS?" : "";
}

static kvt_status fail_protocol(const kvt_redis_link *link, const char *what,
                                kvt_store_error *error)
{
    return kvt_store_fail(error, KVT_ERR_IO, "%s does not speak Redis' protocol: %s%s",
                          link->node->name, what, hint(link));
}

static kvt_status fail_io(const kvt_redis_link *link, const char *what, int number,
                          kvt_store_error *error)
{
    return kvt_store_fail(error, KVT_ERR_IO, "%s: %s: %s%s", link->node->name, what,
                          kvt_redis_tls_failure(link, number), hint(link));
}

/* ---- what is received ---- */

static ssize_t receive(kvt_redis_link *link, const struct iovec *pieces, int n_pieces)
{
    return link->tls ? kvt_redis_tls_receive(link, pieces, (size_t)n_pieces)
                     : readv(link->fd, pieces, n_pieces);
}

/* *moved: whether a byte has come. */
kvt_status kvt_redis_link_receive(kvt_redis_link *link, const kvt_store_receiver *receiver,
                                  int *moved, kvt_store_error *error)
{
    kvt_redis_incoming *value = &link->value;
    ssize_t n;

    if (link->in_begin == link->in_end)
        link->in_begin = link->in_end = 0;
    if (value->active && value->place && link->in_end == 0) {
        struct iovec pieces[2] = {
            {value->place + value->place_filled, value->place_bytes - value->place_filled},
            {link->in, AHEAD_BYTES}};
        n = receive(link, pieces, 2);
        if (n > 0) {
            size_t placed = (size_t)n < pieces[0].iov_len ? (size_t)n : pieces[0].iov_len;
            value->place_filled += placed;
            link->in_end = (size_t)n - placed;
        }
    } else {
        size_t room;
        if (link->in_begin > 0) {
            memmove(link->in, link->in + link->in_begin, link->in_end - link->in_begin);
            link->in_end -= link->in_begin;
            link->in_begin = 0;
        }
        room = KVT_REDIS_IN_BYTES - link->in_end;
        if (receiver && receiver->place && !value->no_place && room > AHEAD_BYTES)
            room = AHEAD_BYTES;
        if (room == 0)
            return KVT_OK;
        n = receive(link, &(struct iovec){link->in + link->in_end, room}, 1);
        if (n > 0)
            link->in_end += (size_t)n;
    }
    if (n > 0) {
        *moved = 1;
        if (link->first_byte < 0)
            link->first_byte = link->in[0]; /* no value has been announced */
        return KVT_OK;
    }
    if (n == 0)
        return link->send_error
                   ? fail_io(link, "sending failed", link->send_error, error)
                   : kvt_store_fail(error, KVT_ERR_IO, "%s has closed the connection%s",
                                    link->node->name, hint(link));
    if (errno == EINTR)
        return KVT_OK;
    if (errno != EAGAIN && errno != EWOULDBLOCK)
        return fail_io(link, "receiving failed", errno, error);
    return link->send_error ? fail_io(link, "sending failed", link->send_error, error) : KVT_OK;
}

/* Give bytes of the value to the receiver. Returns KVT_STORE_. */
static int give(kvt_redis_incoming *value, const kvt_store_receiver *receiver, const void *data,
                size_t bytes)
{
    int answer =
        receiver->part(receiver->user, value->index, value->total, value->done, data, bytes);
    value->done += bytes;
    value->place = NULL;
    value->place_filled = 0;
    value->no_place = 0;
    value->skip = answer == KVT_STORE_SKIP;
    return answer;
}

/* The value's bytes as far as they are there. */
static kvt_status next_of_value(kvt_redis_link *link, const kvt_store_receiver *receiver,
                                kvt_redis_event *event, kvt_store_error *error)
{
    kvt_redis_incoming *value = &link->value;

    *event = KVT_REDIS_NOTHING;
    while (value->done < value->total) {
        uint64_t left = value->total - value->done;
        size_t there = link->in_end - link->in_begin;
        size_t bytes = left < there ? (size_t)left : there;
        int answer = KVT_STORE_MORE;

        if (!value->skip && !value->place && !value->no_place) {
            size_t room = left < SIZE_MAX ? (size_t)left : SIZE_MAX;
            void *place = receiver->place ? receiver->place(receiver->user, value->index,
                                                            value->total, value->done, &room)
                                          : NULL;
            if (place && room) {
                value->place = place;
                value->place_bytes = room < left ? room : (size_t)left;
                value->place_filled = 0;
            } else {
                value->no_place = 1;
            }
        }
        if (value->place) {
            if (bytes > value->place_bytes - value->place_filled)
                bytes = value->place_bytes - value->place_filled;
            memcpy(value->place + value->place_filled, link->in + link->in_begin, bytes);
            link->in_begin += bytes;
            value->place_filled += bytes;
            if (value->place_filled < value->place_bytes)
                return KVT_OK;
            answer = give(value, receiver, value->place, value->place_bytes);
        } else {
            if (bytes == 0)
                return KVT_OK;
            link->in_begin += bytes;
            if (value->skip)
                value->done += bytes;
            else
                answer = give(value, receiver, link->in + link->in_begin - bytes, bytes);
        }
        if (answer == KVT_STORE_STOP) {
            *event = KVT_REDIS_STOPPED;
            return KVT_OK;
        }
    }
    if (link->in_end - link->in_begin < 2)
        return KVT_OK;
    if (memcmp(link->in + link->in_begin, "\r\n", 2) != 0)
        return fail_protocol(link, "a value has no end", error);
    link->in_begin += 2;
    value->active = 0;
    *event = KVT_REDIS_VALUE;
    return KVT_OK;
}

/* The line "$bytes\r\n" of a value. 0: it is another one. */
static int parse_head(const unsigned char *line, size_t n, uint64_t *total)
{
    uint64_t sum = 0;
    if (n < 4 || n > 18 + 3 || line[0] != '$' || line[n - 2] != '\r')
        return 0;
    for (size_t i = 1; i < n - 2; i++) {
        if (line[i] < '0' || line[i] > '9')
            return 0;
        sum = sum * 10 + (uint64_t)(line[i] - '0');
    }
    *total = sum;
    return 1;
}

kvt_status kvt_redis_link_next(kvt_redis_link *link, const kvt_store_receiver *receiver,
                               size_t index, kvt_redis_event *event, redisReply **reply,
                               kvt_store_error *error)
{
    const unsigned char *line = link->in + link->in_begin, *end;
    size_t n = link->in_end - link->in_begin;
    uint64_t total;
    void *parsed = NULL;

    *event = KVT_REDIS_NOTHING;
    if (link->value.active)
        return next_of_value(link, receiver, event, error);
    if (n == 0)
        return KVT_OK;
    end = memchr(line, '\n', n);
    if (!end)
        return n < LINE_BYTES ? KVT_OK : fail_protocol(link, "a line has no end", error);
    n = (size_t)(end - line) + 1;
    link->in_begin += n;
    if (receiver && parse_head(line, n, &total)) {
        link->value = (kvt_redis_incoming){.active = 1, .index = index, .total = total};
        if (total == 0 && receiver->part(receiver->user, index, 0, 0, line, 0) == KVT_STORE_STOP) {
            *event = KVT_REDIS_STOPPED;
            return KVT_OK;
        }
        return next_of_value(link, receiver, event, error);
    }
    /* A single line: not the beginning of something longer, for which hiredis would make room. */
    if (!memchr("+-:", line[0], 3) && (n != 5 || memcmp(line, "$-1\r\n", 5) != 0))
        return fail_protocol(link, "a reply of another type", error);
    if (redisReaderFeed(link->reader, (const char *)line, n) != REDIS_OK)
        return kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for a reply");
    if (redisReaderGetReply(link->reader, &parsed) != REDIS_OK)
        return fail_protocol(link, link->reader->errstr, error);
    if (!parsed)
        return fail_protocol(link, "a reply of another type", error);
    begin_reply(link);
    *reply = parsed;
    *event = KVT_REDIS_REPLY;
    return KVT_OK;
}

kvt_status kvt_redis_link_take(const kvt_redis *redis, kvt_redis_link *link,
                               const kvt_redis_clock *clock, redisReply **reply,
                               kvt_store_error *error)
{
    void *parsed = NULL;
    kvt_status status = KVT_OK;

    while (status == KVT_OK) {
        int moved = 0;
        struct pollfd polled;
        size_t n = link->in_end - link->in_begin;
        if (n &&
            redisReaderFeed(link->reader, (const char *)link->in + link->in_begin, n) != REDIS_OK)
            status = kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for a reply");
        else if (link->in_begin = link->in_end,
                 redisReaderGetReply(link->reader, &parsed) != REDIS_OK)
            status = fail_protocol(link, link->reader->errstr, error);
        if (status != KVT_OK)
            break;
        if (parsed) {
            *reply = parsed;
            link->since_ms = 0;
            begin_reply(link);
            return KVT_OK;
        }
        if (link->reader->len - link->reader->pos > REPLY_BYTES)
            status = fail_protocol(link, "a reply has no end", error);
        else
            status = kvt_redis_check_time(redis, clock, error);
        if (status == KVT_OK)
            status = kvt_redis_link_move(link, NULL, clock, &moved, error);
        if (status == KVT_OK && !moved)
            kvt_redis_wait(&link, 1, &polled, clock);
    }
    kvt_redis_link_close(link);
    return status;
}

#endif /* KVT_HAVE_REDIS */
