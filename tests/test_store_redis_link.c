/*
 * A connection to a Redis server: what it sends when a command could not be appended for lack of
 * memory. A test of src/store/redis_connection.c alone.
 */
#include "support.h"

#include <sys/socket.h>
#include <unistd.h>

#include "src/store/redis.h"

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
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_no_memory)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
