/*
 * kvt_group_split_ends: types by layer, made of groups.
 */
#include <kvtile/kvtile.h>

kvt_status kvt_group_split_ends(const kvt_group_config *group, uint32_t n_first, uint32_t n_last,
                                kvt_type k_type, kvt_type v_type, kvt_group_config groups[2],
                                uint32_t *n_groups, uint32_t *layers)
{
    uint32_t n, middle, n_middle = 0, n_ends = 0;
    kvt_group_config all;

    if (!group || !groups || !n_groups || !layers || group->struct_size != sizeof all ||
        group->n_layers == 0)
        return KVT_ERR_ARG;
    all = *group; /* groups may overlap it */
    n = all.n_layers;
    n_first = n_first < n ? n_first : n;
    n_last = n_last < n - n_first ? n_last : n - n_first;
    middle = n - n_first - n_last;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t layer = all.layers ? all.layers[i] : i;
        if (i >= n_first && i < n_first + middle)
            layers[n_middle++] = layer;
        else
            layers[middle + n_ends++] = layer;
    }
    *n_groups = 0;
    if (n_middle > 0) {
        groups[*n_groups] = all;
        groups[*n_groups].n_layers = n_middle;
        groups[(*n_groups)++].layers = layers;
    }
    if (n_ends > 0) {
        groups[*n_groups] = all;
        groups[*n_groups].n_layers = n_ends;
        groups[*n_groups].layers = layers + n_middle;
        groups[*n_groups].k_type = k_type;
        groups[(*n_groups)++].v_type = v_type;
    }
    return KVT_OK;
}
