/*
 * Layers of a block in other types, for save and load.
 */
#ifndef KVT_SNAPSHOT_CONVERT_H
#define KVT_SNAPSHOT_CONVERT_H

#include "src/snapshot/format.h"

/*
 * A group of the cache's with the types of `group`, and memory for its rotations' signs.
 * KVT_ERR_ARG: it cannot have them.
 */
kvt_status kvt_snap_target_make(const kvt_snap_context *context, const kvt_group *of,
                                const kvt_snapshot_group *group, kvt_group *made, float **signs);
/* A zeroed one is fine. */
void kvt_snap_target_release(const kvt_snap_context *context, kvt_group *made, float *signs);
/*
 * The layer `from` of a block in `form` of a group, as the memory of a layer in to_form of another
 * group. KVT_ERR_VALUE: a value is beyond what its type can store.
 */
kvt_status kvt_convert_image(const kvt_snap_context *context, const kvt_group *group, uint32_t form,
                             const unsigned char *from, uint32_t tokens, const kvt_group *to_group,
                             uint32_t to_form, unsigned char *to, kvt_snap_buffer *scratch);

#endif /* KVT_SNAPSHOT_CONVERT_H */
