/*
 * A connection to one Redis or Valkey server: connecting, sending, receiving, each with a deadline.
 *
 * The socket does not block. kvt_redis_link_move sends and receives what it can, so that a server
 * which answers while it is sent to is always read from; kvt_redis_wait waits for one of several.
 */
#include "src/store/redis.h"

#ifdef KVT_HAVE_REDIS

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SEND_SEGMENTS 64
#define SEND_BYTES ((size_t)1 << 30) /* of one system call, which takes no more than SSIZE_MAX */

uint64_t kvt_redis_now_ms(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

kvt_status kvt_redis_check_time(const kvt_redis *redis, const kvt_redis_clock *clock,
                                kvt_store_error *error)
{
    if (kvt_redis_now_ms() < clock->end_ms)
        return KVT_OK;
    return kvt_store_fail(error, KVT_ERR_IO, "the call has taken longer than %u ms",
                          redis->call_timeout_ms);
}

/* ---- memory and state ---- */

kvt_redis_link *kvt_redis_link_make(const kvt_redis_node *node, size_t ring_capacity)
{
    kvt_redis_link *link = calloc(1, sizeof *link);
    if (!link)
        return NULL;
    link->fd = -1;
    link->node = node;
    link->queue = link->queue_last = SIZE_MAX;
    link->in = malloc(KVT_REDIS_IN_BYTES);
    link->ring = calloc(ring_capacity, sizeof *link->ring);
    link->ring_capacity = ring_capacity;
    if (!link->in || !link->ring) {
        kvt_redis_link_free(link);
        return NULL;
    }
    return link;
}

void kvt_redis_link_close(kvt_redis_link *link)
{
    kvt_redis_tls_end(link);
    link->receive_events = POLLIN;
    link->send_events = POLLOUT;
    link->tls_moved = 0;
    link->first_byte = -1;
    if (link->fd >= 0)
        (void)close(link->fd);
    link->fd = -1;
    if (link->reader)
        redisReaderFree(link->reader);
    link->reader = NULL;
    link->in_begin = link->in_end = 0;
    memset(&link->value, 0, sizeof link->value);
    link->text_bytes = link->first = link->n_segments = link->sent = 0;
    link->no_memory = link->send_error = link->demoted = 0;
    link->since_ms = 0;
    link->queue = link->queue_last = SIZE_MAX;
    link->ring_first = link->ring_count = link->n_flying = 0;
    link->flying_bytes = 0;
}

void kvt_redis_link_free(kvt_redis_link *link)
{
    if (!link)
        return;
    kvt_redis_link_close(link);
    free(link->in);
    free(link->text);
    free(link->segments);
    free(link->ring);
    free(link);
}

int kvt_redis_link_is_clean(const kvt_redis_link *link)
{
    return link->fd >= 0 && link->ring_count == 0 && !link->value.active &&
           link->in_begin == link->in_end && link->first == link->n_segments && !link->no_memory &&
           !link->send_error && !link->reader->err && link->reader->pos == link->reader->len &&
           link->reader->ridx < 0;
}

int kvt_redis_link_is_usable(kvt_redis_link *link)
{
    char byte;
    /* A server closes idle connections, or has been restarted: then there is an end to be read. */
    if (!kvt_redis_link_is_clean(link))
        return 0;
    if (link->tls)
        return kvt_redis_tls_is_quiet(link);
    return recv(link->fd, &byte, 1, MSG_PEEK) < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
}

/* ---- what is to be sent ---- */

static int grow(void **memory, size_t *capacity, size_t needed, size_t item_bytes)
{
    size_t more = *capacity ? *capacity : 64;
    void *grown;
    if (needed <= *capacity)
        return 1;
    while (more < needed) {
        if (more > SIZE_MAX / 2 / item_bytes)
            return 0;
        more *= 2;
    }
    grown = realloc(*memory, more * item_bytes);
    if (!grown)
        return 0;
    *memory = grown;
    *capacity = more;
    return 1;
}

static void append_segment(kvt_redis_link *link, const void *data, size_t offset, size_t bytes)
{
    kvt_redis_segment *last =
        link->n_segments > link->first ? &link->segments[link->n_segments - 1] : NULL;
    if (!data && last && !last->data && last->offset + last->bytes == offset) {
        last->bytes += bytes;
        return;
    }
    if (!grow((void **)&link->segments, &link->segment_capacity, link->n_segments + 1,
              sizeof *link->segments)) {
        link->no_memory = 1;
        return;
    }
    link->segments[link->n_segments++] = (kvt_redis_segment){data, offset, bytes};
}

void kvt_redis_append_text(kvt_redis_link *link, const void *text, size_t bytes)
{
    if (bytes > SIZE_MAX - link->text_bytes ||
        !grow((void **)&link->text, &link->text_capacity, link->text_bytes + bytes, 1)) {
        link->no_memory = 1;
        return;
    }
    memcpy(link->text + link->text_bytes, text, bytes);
    append_segment(link, NULL, link->text_bytes, bytes);
    link->text_bytes += bytes;
}

void kvt_redis_append_data(kvt_redis_link *link, const void *data, size_t bytes)
{
    if (bytes)
        append_segment(link, data, 0, bytes);
}

void kvt_redis_append_array(kvt_redis_link *link, size_t n)
{
    char head[32];
    int bytes = snprintf(head, sizeof head, "*%zu\r\n", n);
    kvt_redis_append_text(link, head, (size_t)bytes);
}

void kvt_redis_append_string(kvt_redis_link *link, const void *text, size_t bytes)
{
    char head[32];
    int n = snprintf(head, sizeof head, "$%zu\r\n", bytes);
    kvt_redis_append_text(link, head, (size_t)n);
    kvt_redis_append_text(link, text, bytes);
    kvt_redis_append_text(link, "\r\n", 2);
}

void kvt_redis_append_words(kvt_redis_link *link, ...)
{
    va_list words;
    const char *word;
    size_t n = 0;

    va_start(words, link);
    while (va_arg(words, const char *))
        n++;
    va_end(words);
    kvt_redis_append_array(link, n);
    va_start(words, link);
    while ((word = va_arg(words, const char *)) != NULL)
        kvt_redis_append_string(link, word, strlen(word));
    va_end(words);
}

/* After a failure nothing is sent, but replies are read still: a server that closes a connection
   has often said why. Of commands without memory a piece may be missing. */
int kvt_redis_link_send(kvt_redis_link *link)
{
    int moved = 0;

    if (link->no_memory || link->send_error)
        return 0;
    while (link->first < link->n_segments) {
        struct iovec pieces[SEND_SEGMENTS];
        struct msghdr message = {0};
        size_t n = 0, total = 0, skip = link->sent;
        ssize_t sent;

        for (size_t i = link->first; i < link->n_segments && n < SEND_SEGMENTS; i++, n++) {
            const kvt_redis_segment *s = &link->segments[i];
            const char *data = s->data ? s->data : link->text + s->offset;
            size_t bytes = s->bytes - skip;
            if (bytes > SEND_BYTES - total)
                bytes = SEND_BYTES - total;
            if (bytes == 0)
                break;
            pieces[n].iov_base = (char *)(uintptr_t)(data + skip);
            pieces[n].iov_len = bytes;
            total += bytes;
            skip = 0;
        }
        message.msg_iov = pieces;
        message.msg_iovlen = (__typeof__(message.msg_iovlen))n; /* POSIX: int; glibc: size_t */
        sent = link->tls ? kvt_redis_tls_send(link, pieces, n)
                         : sendmsg(link->fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0) {
            if (errno == EAGAIN || errno == EWOULDBLOCK)
                return moved;
            link->send_error = errno;
            break;
        }
        moved = 1;
        for (size_t left = (size_t)sent; left > 0;) {
            size_t rest = link->segments[link->first].bytes - link->sent;
            if (left < rest) {
                link->sent += left;
                break;
            }
            left -= rest;
            link->sent = 0;
            link->first++;
        }
    }
    link->first = link->n_segments = link->sent = link->text_bytes = 0;
    return moved;
}

kvt_status kvt_redis_link_move(kvt_redis_link *link, const kvt_store_receiver *receiver,
                               const kvt_redis_clock *clock, int *moved, kvt_store_error *error)
{
    kvt_status status;

    if (link->no_memory)
        return kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for a command");
    *moved = kvt_redis_link_send(link);
    status = kvt_redis_link_receive(link, receiver, moved, error);
    *moved |= link->tls_moved;
    link->tls_moved = 0;
    if (status != KVT_OK)
        return status;
    if (*moved) {
        link->since_ms = 0;
        return KVT_OK;
    }
    if (link->since_ms == 0)
        link->since_ms = kvt_redis_now_ms();
    else if (kvt_redis_now_ms() - link->since_ms >= clock->idle_ms) {
        link->timed_out = 1;
        return kvt_store_fail(error, KVT_ERR_IO, "%s has not answered for %u ms", link->node->name,
                              (unsigned)clock->idle_ms);
    }
    return KVT_OK;
}

void kvt_redis_wait(kvt_redis_link *const *links, size_t n, struct pollfd *polled,
                    const kvt_redis_clock *clock)
{
    uint64_t now = kvt_redis_now_ms(), until = clock->end_ms;
    size_t n_polled = 0;

    for (size_t i = 0; i < n; i++) {
        const kvt_redis_link *link = links[i];
        if (!link || link->fd < 0 || link->since_ms == 0)
            continue;
        polled[n_polled].fd = link->fd;
        polled[n_polled].events = link->receive_events;
        if (link->first < link->n_segments)
            polled[n_polled].events |= link->send_events;
        polled[n_polled].revents = 0;
        n_polled++;
        if (link->since_ms + clock->idle_ms < until)
            until = link->since_ms + clock->idle_ms;
    }
    if (n_polled && now < until)
        (void)poll(polled, (nfds_t)n_polled,
                   until - now > 60000 ? 60000 : (int)(until - now)); /* else the caller's turn */
}

/* ---- connecting ---- */

/* -1: errno says why not. Between socket and fcntl another thread's fork and exec would keep it. */
static int make_socket(int family)
{
    int on = 1;
#if defined(SOCK_CLOEXEC) && defined(SOCK_NONBLOCK)
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return fd;
#else
    int fd = socket(family, SOCK_STREAM, 0);
    if (fd < 0)
        return fd;
    (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
    (void)fcntl(fd, F_SETFL, O_NONBLOCK);
#endif
    (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
#ifdef SO_NOSIGPIPE
    (void)setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
    if (family != AF_UNIX)
        (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
}

/* Connect to an address until end_ms. Returns the socket; -1: *number is an errno. */
static int connect_address(int family, const struct sockaddr *address, socklen_t bytes,
                           uint64_t end_ms, int *number)
{
    int fd = make_socket(family);

    if (fd < 0) {
        *number = errno;
        return -1;
    }
    while (connect(fd, address, bytes) != 0 && errno != EISCONN) {
        uint64_t now = kvt_redis_now_ms();
        struct pollfd polled = {fd, POLLOUT, 0};
        socklen_t length = sizeof *number;
        *number = errno;
        if (now >= end_ms)
            *number = ETIMEDOUT;
        else if (*number == EAGAIN) { /* a Unix socket's queue is full: there is nothing to poll */
            (void)poll(NULL, 0, 5);
            continue;
        } else if (*number == EINPROGRESS || *number == EINTR || *number == EALREADY) {
            if (poll(&polled, 1, (int)(end_ms - now > 60000 ? 60000 : end_ms - now)) <= 0)
                continue; /* interrupted, or the time is over */
            if (getsockopt(fd, SOL_SOCKET, SO_ERROR, number, &length) != 0)
                *number = errno;
            if (*number == 0)
                break;
        }
        (void)close(fd);
        return -1;
    }
    return fd;
}

static int connect_socket(kvt_redis_link *link, const char *path, uint64_t end_ms,
                          kvt_store_error *error)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int number = 0, fd;

    if (strlen(path) >= sizeof address.sun_path) {
        (void)kvt_store_fail(error, KVT_ERR_IO, "the socket's path is too long");
        return -1;
    }
    memcpy(address.sun_path, path, strlen(path) + 1);
    fd = connect_address(AF_UNIX, (const struct sockaddr *)&address, (socklen_t)sizeof address,
                         end_ms, &number);
    if (fd < 0)
        (void)kvt_redis_fail_errno(link, "cannot connect", number, error);
    return fd;
}

static int connect_host(kvt_redis_link *link, uint64_t end_ms, kvt_store_error *error)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    char port[16];
    int number = 0, fd = -1;

    (void)snprintf(port, sizeof port, "%u", link->node->port);
    number =
        getaddrinfo(link->node->host, port, &hints, &found); /* its time is not ours to bound */
    if (number != 0) {
        (void)kvt_store_fail(error, KVT_ERR_IO, "%s: cannot find the host: %s", link->node->name,
                             gai_strerror(number));
        return -1;
    }
    /* Each has its part of the time: one that leads nowhere leaves the others theirs. */
    for (const struct addrinfo *a = found; a && fd < 0; a = a->ai_next) {
        uint64_t now = kvt_redis_now_ms(), n_left = 0;
        for (const struct addrinfo *left = a; left; left = left->ai_next)
            n_left++;
        fd = connect_address(a->ai_family, a->ai_addr, a->ai_addrlen,
                             now < end_ms ? now + (end_ms - now) / n_left : end_ms, &number);
    }
    freeaddrinfo(found);
    if (fd < 0)
        (void)kvt_redis_fail_errno(link, "cannot connect", number, error);
    return fd;
}

/* AUTH and SELECT, sent at once. What the server answers to AUTH is not quoted. */
static kvt_status greet(const kvt_redis *redis, kvt_redis_link *link, const kvt_redis_clock *clock,
                        kvt_store_error *error)
{
    char number[16];
    redisReply *reply;
    kvt_status status = KVT_OK;

    (void)snprintf(number, sizeof number, "%u", redis->database);
    if (redis->password && redis->username)
        kvt_redis_append_words(link, "AUTH", redis->username, redis->password, (char *)NULL);
    else if (redis->password)
        kvt_redis_append_words(link, "AUTH", redis->password, (char *)NULL);
    if (redis->database)
        kvt_redis_append_words(link, "SELECT", number, (char *)NULL);
    if (redis->password) {
        status = kvt_redis_link_take(redis, link, clock, &reply, error);
        if (status != KVT_OK)
            return status;
        if (reply->type == REDIS_REPLY_ERROR) {
            const char *why = kvt_redis_is_error(reply, "WRONGPASS") ? " (WRONGPASS)"
                              : kvt_redis_is_error(reply, "LOADING") ? " (LOADING)"
                              : kvt_redis_is_error(reply, "ERR")     ? " (ERR)"
                                                                     : "";
            status = kvt_store_fail(error, KVT_ERR_IO, "%s refuses the user or the password%s",
                                    link->node->name, why);
        } else if (reply->type != REDIS_REPLY_STATUS) {
            status = kvt_redis_refused(redis, link->node, reply, error);
        }
        freeReplyObject(reply);
    }
    if (status == KVT_OK && redis->database) {
        status = kvt_redis_link_take(redis, link, clock, &reply, error);
        if (status != KVT_OK)
            return status;
        if (reply->type != REDIS_REPLY_STATUS)
            status = kvt_redis_refused(redis, link->node, reply, error);
        freeReplyObject(reply);
    }
    return status;
}

kvt_status kvt_redis_link_open(const kvt_redis *redis, kvt_redis_link *link,
                               const kvt_redis_clock *clock, kvt_store_error *error)
{
    uint64_t end_ms = kvt_redis_now_ms() + redis->connect_timeout_ms;
    kvt_status status;

    kvt_redis_link_close(link);
    link->timed_out = 0;
    if (end_ms > clock->end_ms)
        end_ms = clock->end_ms;
    if (!kvt_redis_link_make_reader(link))
        return kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for a connection");
    link->fd = link->node->host ? connect_host(link, end_ms, error)
                                : connect_socket(link, redis->unix_path, end_ms, error);
    status = link->fd < 0 ? KVT_ERR_IO : KVT_OK;
    if (status == KVT_OK && redis->tls)
        status = kvt_redis_tls_connect(redis->tls, link, end_ms, error);
    if (status == KVT_OK)
        status = greet(redis, link, clock, error);
    if (status == KVT_OK && !kvt_redis_link_is_clean(link))
        status =
            kvt_store_fail(error, KVT_ERR_IO, "%s answers what it was not asked", link->node->name);
    if (status != KVT_OK)
        kvt_redis_link_close(link);
    return status;
}

#endif /* KVT_HAVE_REDIS */
