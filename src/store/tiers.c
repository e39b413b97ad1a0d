/*
 * Two stores as one, the nearer before the farther.
 */
#include "src/store/store.h"

kvt_status kvt_store_open_tiers(const kvt_store *near_store, const kvt_store *far_store,
                                kvt_store *store)
{
    (void)near_store;
    (void)far_store;
    (void)store;
    return KVT_ERR_UNSUPPORTED;
}
