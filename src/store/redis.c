/*
 * A Redis or Valkey server, or a cluster of them, as a store: one string a value. Opening, closing,
 * the functions of the store, and the clients and nodes that its calls share.
 *
 * Only commands of one key are used, so that a cluster can take them: GET, SET, EXISTS, UNLINK (DEL
 * where a server lacks it), EXPIRE, and for lists and figures CLUSTER SLOTS, SCAN, STRLEN, TTL,
 * OBJECT IDLETIME, DBSIZE, INFO. A key is the prefix and 64 lower-case hexadecimal digits.
 *
 * A child of a fork shares its parent's sockets: it has to open a store of its own.
 */
#include "src/store/redis.h"

#ifdef KVT_HAVE_REDIS

#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

#define IDLE_CLIENTS 8 /* kept for later calls; as many calls as there are threads run at once */

void kvt_redis_hex(const kvt_store_key *key, char *hex)
{
    for (size_t i = 0; i < KVT_STORE_KEY_BYTES; i++) {
        hex[2 * i] = "0123456789abcdef"[key->bytes[i] >> 4];
        hex[2 * i + 1] = "0123456789abcdef"[key->bytes[i] & 15];
    }
}

void kvt_redis_start_clock(const kvt_redis *redis, kvt_redis_clock *clock)
{
    clock->end_ms = kvt_redis_now_ms() + redis->call_timeout_ms;
    clock->idle_ms = redis->timeout_ms;
}

/* ---- clients ---- */

static void free_client(kvt_redis_client *client)
{
    for (size_t i = 0; i < client->n_links; i++)
        kvt_redis_link_free(client->links[i]);
    free(client);
}

kvt_redis_client *kvt_redis_client_take(kvt_redis *redis)
{
    kvt_redis_client *client;

    (void)pthread_mutex_lock(&redis->lock);
    client = redis->idle;
    if (client) {
        redis->idle = client->next;
        redis->n_idle--;
    }
    (void)pthread_mutex_unlock(&redis->lock);
    return client ? client : calloc(1, sizeof *client);
}

void kvt_redis_client_give(kvt_redis *redis, kvt_redis_client *client)
{
    for (size_t i = 0; i < client->n_links; i++) {
        kvt_redis_link *link = client->links[i];
        if (!link)
            continue;
        /* What a call that ended early had not sent yet: it is no state of the connection. */
        link->queue = link->queue_last = SIZE_MAX;
        if (!kvt_redis_link_is_clean(link) || link->demoted)
            kvt_redis_link_close(link);
    }
    (void)pthread_mutex_lock(&redis->lock);
    if (redis->n_idle < IDLE_CLIENTS) {
        client->next = redis->idle;
        redis->idle = client;
        redis->n_idle++;
        client = NULL;
    }
    (void)pthread_mutex_unlock(&redis->lock);
    if (client)
        free_client(client);
}

void kvt_redis_node_failed(kvt_redis *redis, int node, const kvt_store_error *error)
{
    (void)pthread_mutex_lock(&redis->lock);
    redis->nodes[node]->retry_at_ms = kvt_redis_now_ms() + redis->retry_ms;
    memcpy(redis->nodes[node]->failure, error->text, sizeof error->text);
    (void)pthread_mutex_unlock(&redis->lock);
}

/*
 * Whether a connecting since start_ms has ended with the call, which had spent most of its time
 * before: that says nothing of the node, to which other calls may connect.
 */
static int is_late(const kvt_redis *redis, const kvt_redis_clock *clock, uint64_t start_ms)
{
    uint64_t now = kvt_redis_now_ms(), took = now - start_ms;
    return now >= clock->end_ms && took < redis->connect_timeout_ms &&
           took < redis->call_timeout_ms / 2;
}

kvt_status kvt_redis_client_link(kvt_redis *redis, kvt_redis_client *client, int number,
                                 const kvt_redis_clock *clock, kvt_redis_link **result,
                                 kvt_store_error *error)
{
    size_t at = (size_t)number;
    kvt_redis_node *node;
    kvt_redis_link *link;
    uint64_t start_ms;
    kvt_status status = KVT_OK;

    (void)pthread_mutex_lock(&redis->lock);
    node = redis->nodes[at];
    (void)pthread_mutex_unlock(&redis->lock);
    if (!client->links[at])
        client->links[at] = kvt_redis_link_make(node, 4 * (size_t)redis->pipeline);
    link = client->links[at];
    if (!link)
        return kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for a connection");
    if (client->n_links <= at)
        client->n_links = at + 1;
    *result = link;
    if (kvt_redis_link_is_usable(link))
        return KVT_OK;

    (void)pthread_mutex_lock(&redis->lock);
    if (kvt_redis_now_ms() < node->retry_at_ms)
        status = kvt_store_fail(error, KVT_ERR_IO, "not tried again yet: %.230s", node->failure);
    (void)pthread_mutex_unlock(&redis->lock);
    if (status != KVT_OK)
        return status;
    start_ms = kvt_redis_now_ms();
    status = kvt_redis_link_open(redis, link, clock, error);
    if (status == KVT_ERR_IO && !is_late(redis, clock, start_ms))
        kvt_redis_node_failed(redis, number, error);
    return status;
}

/* ---- the functions of the store ---- */

static kvt_status count_failure(kvt_redis *redis, kvt_status status)
{
    if (status != KVT_OK) {
        (void)pthread_mutex_lock(&redis->lock);
        redis->n_failed++;
        (void)pthread_mutex_unlock(&redis->lock);
    }
    return status;
}

/* Run a job whose done[] is kept here. *n_first: how many of its first ones are 1. */
static kvt_status run_counted(kvt_redis *redis, kvt_redis_job *job, size_t *n_first,
                              kvt_store_error *error)
{
    kvt_status status;
    size_t n = 0;

    job->done = calloc(job->n ? job->n : 1, 1);
    if (!job->done)
        status = kvt_store_fail(error, KVT_ERR_MEMORY, "no memory for the call");
    else
        status = kvt_redis_run(redis, job, error);
    while (job->done && n < job->n && job->done[n])
        n++;
    free(job->done);
    if (n_first)
        *n_first = n;
    return count_failure(redis, status);
}

static kvt_status get(void *user, const kvt_store_key *keys, size_t n,
                      const kvt_store_receiver *receiver, kvt_store_error *error)
{
    kvt_redis_job job = {.operation = KVT_REDIS_GET, .keys = keys, .n = n, .receiver = receiver};
    return run_counted(user, &job, NULL, error);
}

static kvt_status put(void *user, const kvt_store_key *keys, const kvt_store_value *values,
                      size_t n, size_t *n_put, kvt_store_error *error)
{
    kvt_redis_job job = {.operation = KVT_REDIS_SET, .keys = keys, .n = n, .values = values};
    return run_counted(user, &job, n_put, error);
}

static kvt_status exists(void *user, const kvt_store_key *keys, size_t n, uint8_t *found,
                         kvt_store_error *error)
{
    kvt_redis_job job = {.operation = KVT_REDIS_EXISTS, .keys = keys, .n = n, .done = found};
    if (n)
        memset(found, 0, n);
    return count_failure(user, kvt_redis_run(user, &job, error));
}

static kvt_status remove_keys(void *user, const kvt_store_key *keys, size_t n,
                              kvt_store_error *error)
{
    kvt_redis_job job = {.operation = KVT_REDIS_UNLINK, .keys = keys, .n = n};
    return run_counted(user, &job, NULL, error);
}

static kvt_status list(void *user, int (*on_entry)(void *entry_user, const kvt_store_entry *entry),
                       void *entry_user, kvt_store_error *error)
{
    return count_failure(user, kvt_redis_list(user, on_entry, entry_user, error));
}

static kvt_status stats(void *user, kvt_store_stats *result, kvt_store_error *error)
{
    return count_failure(user, kvt_redis_stats(user, result, error));
}

static void close_store(void *user)
{
    kvt_redis *redis = user;
    volatile char *secret = redis->password;

    while (redis->idle) {
        kvt_redis_client *client = redis->idle;
        redis->idle = client->next;
        free_client(client);
    }
    for (size_t i = 0; i < redis->n_nodes; i++) {
        free(redis->nodes[i]->host);
        free(redis->nodes[i]);
    }
    while (secret && *secret)
        *secret++ = 0;
    free(redis->password);
    free(redis->host);
    free(redis->unix_path);
    free(redis->username);
    free(redis->prefix);
    kvt_redis_tls_free(redis->tls);
    (void)pthread_mutex_destroy(&redis->lock);
    free(redis);
}

/* ---- opening ---- */

static char *copy_text(const char *text, int *no_memory)
{
    size_t bytes = text ? strlen(text) + 1 : 0;
    char *copy = text ? malloc(bytes) : NULL;
    if (copy)
        memcpy(copy, text, bytes);
    *no_memory |= text && !copy;
    return copy;
}

static uint32_t or_default(uint32_t value, uint32_t by_default)
{
    return value ? value : by_default;
}

static const char *find_mistake(const kvt_redis_config *config)
{
    if (config->port > 65535)
        return "port is above 65535";
    if (config->username && !config->password)
        return "there is a username without a password";
    if (config->tls > 1)
        return "tls is neither 0 nor 1";
    if (!config->tls && (config->tls_ca_file || config->tls_cert_file || config->tls_key_file))
        return "there is a file for TLS, but tls is 0";
    if (!config->tls_cert_file != !config->tls_key_file)
        return "of tls_cert_file and tls_key_file there is one without the other";
    if (config->tls && config->unix_path)
        return "tls is for a host and port: unix_path has no host that could be verified";
    if (config->reserved)
        return "reserved is not 0";
    if (config->pipeline > 65536)
        return "pipeline is above 65536";
    if (config->unix_path &&
        strlen(config->unix_path) >= sizeof((struct sockaddr_un *)NULL)->sun_path)
        return "unix_path is too long for a socket";
    return NULL;
}

kvt_status kvt_store_open_redis(const kvt_redis_config *config, kvt_store *store)
{
    kvt_redis *redis;
    const char *mistake;
    kvt_store_error error;
    kvt_status status = KVT_OK;
    int no_memory = 0;

    if (!config || config->struct_size != sizeof *config || !store)
        return KVT_ERR_ARG;
    mistake = find_mistake(config);
    if (mistake)
        return kvt_store_fail_open(config->error_text, config->error_text_bytes, KVT_ERR_ARG, "%s",
                                   mistake);
    redis = calloc(1, sizeof *redis);
    if (!redis)
        return kvt_store_fail_open(config->error_text, config->error_text_bytes, KVT_ERR_MEMORY,
                                   "no memory for the store");
    (void)pthread_mutex_init(&redis->lock, NULL);
    redis->host = copy_text(config->unix_path ? NULL
                            : config->host    ? config->host
                                              : "127.0.0.1",
                            &no_memory);
    redis->unix_path = copy_text(config->unix_path, &no_memory);
    redis->username = copy_text(config->username, &no_memory);
    redis->password = copy_text(config->password, &no_memory);
    redis->prefix = copy_text(config->prefix ? config->prefix : "kvt:", &no_memory);
    redis->port = or_default(config->port, 6379);
    redis->database = config->database;
    redis->ttl_seconds = config->ttl_seconds;
    redis->connect_timeout_ms = or_default(config->connect_timeout_ms, 500);
    redis->timeout_ms = or_default(config->timeout_ms, 1000);
    redis->call_timeout_ms = or_default(config->call_timeout_ms, 30000);
    redis->retry_ms = or_default(config->retry_ms, 1000);
    redis->pipeline = or_default(config->pipeline, 16);
    memset(redis->slots, -1, sizeof redis->slots);
    if (no_memory || kvt_redis_add_node(redis, redis->host, redis->port) < 0)
        status = kvt_store_fail(&error, KVT_ERR_MEMORY, "no memory for the store");
    else if (config->tls)
        status = kvt_redis_tls_make(config, &redis->tls, &error);
    if (status != KVT_OK) {
        close_store(redis);
        return kvt_store_fail_open(config->error_text, config->error_text_bytes, status, "%s",
                                   error.text);
    }
    redis->prefix_bytes = strlen(redis->prefix);
    kvt_redis_prepare_slots(redis);

    *store = (kvt_store){.struct_size = sizeof *store,
                         .user = redis,
                         .get = get,
                         .put = put,
                         .exists = exists,
                         .remove = remove_keys,
                         .list = list,
                         .stats = stats,
                         .close = close_store};
    return KVT_OK;
}

#else

kvt_status kvt_store_open_redis(const kvt_redis_config *config, kvt_store *store)
{
    if (!config || config->struct_size != sizeof *config || !store)
        return KVT_ERR_ARG;
    return kvt_store_fail_open(config->error_text, config->error_text_bytes, KVT_ERR_UNSUPPORTED,
                               "the library was built without hiredis");
}

#endif /* KVT_HAVE_REDIS */
