/*
 * Layers of a block in other types, for save and load.
 */
#ifndef KVT_SNAPSHOT_CONVERT_H
#define KVT_SNAPSHOT_CONVERT_H

#include "src/snapshot/format.h"

/*
 * The layer `from` of a block in `form` of a group, as the memory of a layer in to_form of another
 * group. KVT_ERR_VALUE: a value is beyond what its type can store.
 */
kvt_status kvt_convert_image(const kvt_snap_context *context, const kvt_group *group, uint32_t form,
                             const unsigned char *from, uint32_t tokens, const kvt_group *to_group,
                             uint32_t to_form, unsigned char *to, kvt_snap_buffer *scratch);

#endif /* KVT_SNAPSHOT_CONVERT_H */
