/*
 * The caller's pieces of two snapshots, compared by name while the second one is loaded: only those
 * of the first are held in memory.
 */
#include "tool.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* NULL: no memory. */
static tool_pair *add(tool_pairs *pairs, const char *name)
{
    tool_pair *pair;

    if (pairs->n == pairs->room) {
        size_t room = pairs->room ? 2 * pairs->room : 8;
        tool_pair *list = realloc(pairs->list, room * sizeof *list);
        if (!list)
            return NULL;
        pairs->list = list;
        pairs->room = room;
    }
    pair = &pairs->list[pairs->n++];
    memset(pair, 0, sizeof *pair);
    (void)snprintf(pair->name, sizeof pair->name, "%s", name);
    return pair;
}

int pieces_first(void *user, const kvt_snapshot_piece *piece)
{
    tool_pair *pair = add(user, piece->name);

    if (!pair)
        return 1;
    pair->has[0] = 1;
    pair->bytes[0] = piece->bytes;
    pair->data = malloc(piece->bytes + 1);
    if (!pair->data)
        return 1;
    if (piece->bytes)
        memcpy(pair->data, piece->data, piece->bytes);
    return 0;
}

int pieces_second(void *user, const kvt_snapshot_piece *piece)
{
    tool_pairs *pairs = user;
    tool_pair *pair = NULL;
    size_t i;

    for (i = 0; i < pairs->n && !pair; i++)
        if (strcmp(pairs->list[i].name, piece->name) == 0)
            pair = &pairs->list[i];
    if (!pair)
        pair = add(pairs, piece->name);
    if (!pair)
        return 1;
    pair->has[1] = 1;
    pair->bytes[1] = piece->bytes;
    pair->equal = pair->has[0] && pair->bytes[0] == piece->bytes &&
                  (piece->bytes == 0 || memcmp(pair->data, piece->data, piece->bytes) == 0);
    free(pair->data);
    pair->data = NULL;
    return 0;
}

int pieces_equal(const tool_pairs *pairs)
{
    size_t i;

    for (i = 0; i < pairs->n; i++)
        if (!pairs->list[i].equal)
            return 0;
    return 1;
}

void pieces_release(tool_pairs *pairs)
{
    size_t i;

    for (i = 0; i < pairs->n; i++)
        free(pairs->list[i].data);
    free(pairs->list);
    memset(pairs, 0, sizeof *pairs);
}
