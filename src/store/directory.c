/*
 * A directory as a store: one file a value.
 */
#include "src/store/store.h"

kvt_status kvt_store_open_directory(const kvt_directory_config *config, kvt_store *store)
{
    (void)config;
    (void)store;
    return KVT_ERR_UNSUPPORTED;
}
