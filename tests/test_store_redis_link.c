/*
 * A connection to a Redis server: how its socket is made; what it sends when a command could not be
 * appended for lack of memory. A test of src/store/redis_connection.c alone, whose calls of socket
 * are taken by the linker.
 */
#include "support.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "src/store/redis.h"

int __real_socket(int family, int type, int protocol);
int __wrap_socket(int family, int type, int protocol);
static int last_type;

int __wrap_socket(int family, int type, int protocol)
{
    last_type = type;
    return __real_socket(family, type, protocol);
}

/* No program that is started meanwhile keeps it open. */
static void test_socket(void **state)
{
    static const kvt_redis_node node = {.name = "node"};
    const kvt_redis_clock clock = {UINT64_MAX, 1000};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    kvt_redis redis = {.unix_path = address.sun_path, .connect_timeout_ms = 20000};
    kvt_redis_link *link = kvt_redis_link_make(&node, 4);
    kvt_store_error error;
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    (void)state;

    assert_true(link && listener >= 0);
    (void)snprintf(address.sun_path, sizeof address.sun_path, "/tmp/kvt-redis-link-%ld",
                   (long)getpid());
    assert_int_equal(bind(listener, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(listener, 1), 0);
    assert_int_equal(kvt_redis_link_open(&redis, link, &clock, &error), KVT_OK);
    assert_true(fcntl(link->fd, F_GETFD) & FD_CLOEXEC);
    assert_true(fcntl(link->fd, F_GETFL) & O_NONBLOCK);
#if defined(SOCK_CLOEXEC) && defined(SOCK_NONBLOCK)
    assert_int_equal(last_type, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK);
#endif
    kvt_redis_link_free(link);
    (void)close(listener);
    (void)unlink(address.sun_path);
}

static void test_no_memory(void **state)
{
    static const kvt_redis_node node = {.name = "node"};
    const kvt_redis_clock clock = {UINT64_MAX, 1000};
    kvt_redis_link *link = kvt_redis_link_make(&node, 4);
    kvt_store_error error;
    char bytes[16];
    int pair[2], moved = 0;
    (void)state;

    assert_non_null(link);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    link->fd = pair[0];
    kvt_redis_append_text(link, "before", 6);
    assert_int_equal(kvt_redis_link_send(link), 1);
    assert_int_equal(recv(pair[1], bytes, sizeof bytes, MSG_DONTWAIT), 6);
    kvt_redis_append_text(link, "a piece", 7);
    kvt_redis_append_text(link, "more than there is", SIZE_MAX);
    kvt_redis_append_text(link, "a piece", 7);
    assert_int_equal(kvt_redis_link_send(link), 0);
    assert_int_equal(recv(pair[1], bytes, sizeof bytes, MSG_DONTWAIT), -1);
    assert_int_equal(kvt_redis_link_move(link, NULL, &clock, &moved, &error), KVT_ERR_MEMORY);
    assert_int_equal(recv(pair[1], bytes, sizeof bytes, MSG_DONTWAIT), -1);
    kvt_redis_link_free(link);
    (void)close(pair[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_socket),
                                       cmocka_unit_test(test_no_memory)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
