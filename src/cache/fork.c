/*
 * Sequences that share blocks: the fork, and the copy before the first write.
 *
 * A block with several references is never written. Only the last block of a sequence can be
 * written, where it is not full, by a step: begin copies it if it is shared (rows.c), the filled
 * tiles alone. Full open blocks that are shared are sealed by whoever comes first: the first commit
 * makes its sealed form that of the open block (kvt_block.twin), and the others take it.
 */
#include "src/cache/cache.h"

kvt_status kvt_seq_fork(kvt_seq *seq, uint64_t n_tokens, kvt_seq **copy_out)
{
    const kvt_checkpoint *checkpoint;
    kvt_seq *copy;
    kvt_status status;

    if (!seq)
        return KVT_ERR_ARG;
    if (!copy_out)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_fork: copy is NULL");
    if (n_tokens > seq->length)
        return kvt_fail(seq->cache, KVT_ERR_ARG, "kvt_seq_fork: %llu of %llu tokens",
                        (unsigned long long)n_tokens, (unsigned long long)seq->length);
    checkpoint = kvt_checkpoint_at(seq, n_tokens);
    if (!checkpoint && !kvt_window_reaches(seq, n_tokens))
        return kvt_fail(seq->cache, KVT_ERR_STATE,
                        "kvt_seq_fork: at %llu tokens: a window has released what they need; the "
                        "next that can be reached is %llu",
                        (unsigned long long)n_tokens,
                        (unsigned long long)kvt_seq_reachable(seq, n_tokens));
    status = kvt_seq_create(seq->cache, &copy);
    if (status != KVT_OK)
        return status;
    copy->tag_bytes = seq->tag_bytes;
    memcpy(copy->tag, seq->tag, seq->tag_bytes);
    if (n_tokens == seq->length)
        copy->next_position = seq->next_position;
    else if (checkpoint)
        copy->next_position = checkpoint->next_position;
    kvt_rows_share(seq, n_tokens, copy);
    if (checkpoint)
        kvt_rows_restore(copy, checkpoint);
    status = kvt_turns_copy(seq->cache, seq->turns, &copy->turns);
    if (status == KVT_OK)
        status = kvt_checkpoints_share(seq, n_tokens, copy);
    /*
     * A pending step writes behind the committed tokens of a last block that is not full, which is
     * its own: begin has verified it where it was mapped, and copied it where it was shared.
     * Before the charge, which is of what stays shared, and which no error may follow.
     */
    if (status == KVT_OK && seq->pending && seq->length % KVT_TOKENS && !checkpoint &&
        copy->n_rows == kvt_rows(seq->length))
        status = kvt_rows_own_last(copy);
    if (status == KVT_OK)
        status = kvt_rows_charge(seq);
    if (status != KVT_OK) {
        kvt_seq_destroy(copy);
        return status;
    }
    *copy_out = copy;
    return KVT_OK;
}
