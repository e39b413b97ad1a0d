/*
 * A Redis or Valkey server, or a cluster of them, as a store: one string a value.
 */
#include "src/store/store.h"

kvt_status kvt_store_open_redis(const kvt_redis_config *config, kvt_store *store)
{
    (void)config;
    (void)store;
    return KVT_ERR_UNSUPPORTED;
}
