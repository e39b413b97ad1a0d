/*
 * What rows.c has for reserve.c: spare blocks, and which blocks are a sequence's own.
 */
#ifndef KVT_ROWS_H
#define KVT_ROWS_H

#include "src/cache/cache.h"

/*
 * Have at least `want` spare blocks of a class. On an error there are as many as before. *added:
 * how many are new.
 */
kvt_status kvt_rows_add_spares(kvt_seq *seq, uint32_t class_index, size_t want, size_t *added);
/* Give spare blocks back to where they came from. */
void kvt_rows_undo_spares(kvt_seq *seq, uint32_t class_index, size_t n);
/*
 * Hold `exempt` bytes of the sequence not against the budget. Where that passes it, free blocks
 * are given back. If it still does, and by this sequence, nothing is changed.
 */
kvt_status kvt_rows_set_exempt(kvt_seq *seq, uint64_t exempt);
/* Blocks of a form, of rows from .. to - 1, in a column, that are the sequence's own. */
size_t kvt_rows_count_own(const kvt_seq *seq, size_t from, size_t to, uint32_t column,
                          uint32_t form);
/* Those of KVT_OPEN, which can serve other rows: a reopened one is for its own row alone. */
size_t kvt_rows_own_open(const kvt_seq *seq, size_t from, size_t to, uint32_t column);
/* The same of a group that are kept beside their sealed form for a truncate. */
size_t kvt_rows_own_kept(const kvt_seq *seq, uint32_t g);
/*
 * Whether the next begin opens the last row again, which a truncate has cut: its K has 4 bits, with
 * scales that all 64 tokens share (reopen.c).
 */
int kvt_rows_reopens(const kvt_seq *seq, uint32_t g);
/* Rows from .. to - 1 that are sealed as KVT_FINE. */
size_t kvt_rows_fine(const kvt_group *group, size_t from, size_t to);
/*
 * The block that a step writes its first tokens into, of one column, if it is shared: begin has to
 * copy it.
 */
kvt_block *kvt_rows_shared_block(const kvt_seq *seq, uint32_t column);

#endif /* KVT_ROWS_H */
