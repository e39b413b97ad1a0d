/*
 * A load's stage: what the reader delivers, until all of it is verified. load.c makes one, match.c
 * holds the file's header against the cache, stage.c takes the data.
 */
#ifndef KVT_SNAPSHOT_STAGE_H
#define KVT_SNAPSHOT_STAGE_H

#include "src/snapshot/map.h"

typedef struct kvt_snap_stage {
    const kvt_snap_context *context;
    kvt_seq *seq;
    const kvt_load_options *options;
    /*
     * By the file's groups: the cache's, UINT32_MAX: none; and by its layers, in the group's order.
     */
    uint32_t group_of[KVT_MAX_GROUPS], first_layer[KVT_MAX_GROUPS];
    uint32_t layer_of[KVT_MAX_LAYERS];  /* in the cache's group; UINT32_MAX: not wanted */
    kvt_group *sources[KVT_MAX_GROUPS]; /* where types are converted, else NULL */
    float *signs[KVT_MAX_GROUPS];       /* of their rotations */
    int whole;                          /* all layers: ids hold, of groups without other types */
    uint32_t n_groups;                  /* of the file */
    uint64_t n_tokens;                  /* of the file */
    uint64_t prefix_tokens;             /* equal to the prompt's, as far as ids have come */
    uint64_t keep_tokens;               /* no more is wanted: rows behind are not staged */
    kvt_snap_maps maps;
    kvt_snap_buffer table;  /* kvt_block *[rows][n_columns]; NULL where there is none yet */
    size_t rows;            /* begun: they have a block of positions and ids */
    kvt_snap_buffer extras; /* kvt_block *[n_extras]: blocks that checkpoints alone have */
    size_t n_extras;
    kvt_seq made; /* what the sequence becomes; it has the table and the checkpoints */
} kvt_snap_stage;

/* An empty stage, and the sink that fills it. */
void kvt_snap_stage_begin(kvt_snap_stage *st, const kvt_snap_context *context, kvt_seq *seq,
                          const kvt_load_options *options, kvt_snap_sink *sink);
/* The sink's header: which layers and groups are the cache's, and what is to be converted. */
kvt_status kvt_snap_stage_header(void *user, const kvt_snap_header *header);
/* All has been read and verified: st->made is what the sequence becomes. */
kvt_status kvt_snap_stage_complete(kvt_snap_stage *st, const kvt_snap_header *header);
/* Whether any group has other types in the file. */
int kvt_snap_stage_converts(const kvt_snap_stage *st);
/* Give the blocks back, when the load fails. */
void kvt_snap_stage_drop(kvt_snap_stage *st);
/* What is of the load alone, whether it fails or not. */
void kvt_snap_stage_release(kvt_snap_stage *st);

#endif /* KVT_SNAPSHOT_STAGE_H */
