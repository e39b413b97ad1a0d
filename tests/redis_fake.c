/*
 * Servers that do not behave: see redis_fake.h.
 */
#include "redis_fake.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int listen_at(int *port, int backlog)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t bytes = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_true(fd >= 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &bytes), 0);
    *port = ntohs(address.sin_port);
    if (backlog >= 0)
        assert_int_equal(listen(fd, backlog), 0);
    return fd;
}

static int listen_at_path(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_true(fd >= 0 && strlen(path) < sizeof address.sun_path);
    memcpy(address.sun_path, path, strlen(path) + 1);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(fd, 16), 0);
    return fd;
}

static int connect_to(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons((uint16_t)port);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        (void)close(fd);
        return -1;
    }
    return fd;
}

int port_of_nobody(void)
{
    int port, fd = listen_at(&port, -1);
    (void)close(fd);
    return port;
}

/* The queue of connections that wait to be accepted is full: the system drops what comes. */
int port_of_nowhere(int sockets[4])
{
    int port;
    sockets[0] = listen_at(&port, 0);
    for (int i = 1; i < 4; i++) {
        struct sockaddr_in address = {.sin_family = AF_INET};
        sockets[i] = socket(AF_INET, SOCK_STREAM, 0);
        assert_true(sockets[i] >= 0);
        (void)fcntl(sockets[i], F_SETFL, O_NONBLOCK);
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        address.sin_port = htons((uint16_t)port);
        (void)connect(sockets[i], (struct sockaddr *)&address, sizeof address);
        (void)poll(NULL, 0, 20);
    }
    return port;
}

/* ---- the thread ---- */

/* Wait for bytes on fd (or fd2 >= 0). 0: it is to stop, or the time is over. */
static int wait_for(fake *f, int fd, int fd2, int ms)
{
    struct pollfd polled[3] = {{f->stop[0], POLLIN, 0}, {fd, POLLIN, 0}, {fd2, POLLIN, 0}};
    return poll(polled, fd2 >= 0 ? 3 : 2, ms) > 0 && !(polled[0].revents);
}

static int stopped(fake *f)
{
    struct pollfd polled = {f->stop[0], POLLIN, 0};
    return poll(&polled, 1, 0) > 0;
}

static int send_all(int fd, const char *data, size_t n)
{
    while (n > 0) {
        ssize_t sent = send(fd, data, n, MSG_NOSIGNAL);
        if (sent <= 0)
            return 0;
        data += sent;
        n -= (size_t)sent;
    }
    return 1;
}

/* Say it again for whatever comes, until the other side closes. */
static void repeat(fake *f, int fd, size_t n)
{
    char bytes[4096];
    const char *text = f->then ? f->then : f->text;
    if (f->then)
        n = strlen(f->then);
    while (wait_for(f, fd, -1, -1))
        if (recv(fd, bytes, sizeof bytes, 0) <= 0 || !send_all(fd, text, n))
            return;
}

static void drip(fake *f, int fd)
{
    char bytes[4096];
    for (;;) {
        if (wait_for(f, fd, -1, f->pause_ms)) {
            if (recv(fd, bytes, sizeof bytes, 0) <= 0)
                return;
        } else if (stopped(f) || !send_all(fd, "x", 1)) {
            return;
        }
    }
}

/* Forward what can be read. 0: the connection has ended. */
static int pass(fake *f, int from, int to, rng *r, size_t *left)
{
    char bytes[65536];
    ssize_t n = recv(from, bytes, sizeof bytes, MSG_DONTWAIT);
    if (n < 0)
        return 1;
    if (n == 0)
        return 0;
    for (ssize_t at = 0; at < n;) {
        size_t piece = (size_t)(n - at);
        if (left && f->slice) {
            piece = 1 + rng_below(r, f->slice);
            if (piece > (size_t)(n - at))
                piece = (size_t)(n - at);
        }
        if (left && piece > *left)
            piece = *left;
        if (!send_all(to, bytes + at, piece))
            return 0;
        at += (ssize_t)piece;
        if (left && (*left -= piece) == 0)
            return 0;
        if (left && f->slice && f->pause_ms)
            (void)poll(NULL, 0, f->pause_ms);
        else if (left && f->slice)
            sched_yield();
    }
    return 1;
}

static void pass_all(fake *f, int fd, int first)
{
    int target = connect_to(f->target), on = 1;
    size_t left = first ? f->cut : SIZE_MAX;
    rng r = {(uint64_t)f->port};
    if (target < 0)
        return;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    (void)setsockopt(target, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    while (left > 0 && wait_for(f, fd, target, -1))
        if (!pass(f, fd, target, NULL, NULL) || !pass(f, target, fd, &r, &left))
            break;
    if (f->reset) {
        struct linger now = {1, 0};
        (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }
    (void)close(target);
}

static void *serve(void *user)
{
    fake *f = user;
    while (wait_for(f, f->listener, -1, -1)) {
        int fd = accept(f->listener, NULL, NULL);
        int first = atomic_fetch_add(&f->n_accepted, 1) == 0;
        char bytes[4096];
        size_t n = f->text_bytes || !f->text ? f->text_bytes : strlen(f->text);
        if (fd < 0)
            continue;
        if (f->kind == FAKE_DEAF) {
            while (wait_for(f, f->stop[0], -1, -1))
                ;
        } else if (f->kind == FAKE_PASSES) {
            pass_all(f, fd, first);
        } else if (wait_for(f, fd, -1, -1) && recv(fd, bytes, sizeof bytes, 0) > 0 &&
                   send_all(fd, f->text, n)) {
            if (f->kind == FAKE_SAYS)
                repeat(f, fd, n);
            else if (f->kind == FAKE_DRIPS)
                drip(f, fd);
        }
        (void)close(fd);
    }
    return NULL;
}

void fake_start(fake *f)
{
    f->listener = f->path ? listen_at_path(f->path) : listen_at(&f->port, 16);
    atomic_store(&f->n_accepted, 0);
    assert_int_equal(pipe(f->stop), 0);
    assert_int_equal(pthread_create(&f->thread, NULL, serve, f), 0);
}

void fake_stop(fake *f)
{
    assert_int_equal(write(f->stop[1], "x", 1), 1);
    assert_int_equal(pthread_join(f->thread, NULL), 0);
    (void)close(f->listener);
    if (f->path)
        (void)unlink(f->path);
    (void)close(f->stop[0]);
    (void)close(f->stop[1]);
}
