/*
 * kvtile in a ggml graph: nodes that append K and V to kvtile's sequences and attend over them, run
 * by ggml's own threads.
 *
 * A forward pass is a step: kvt_ggml_begin, compute a graph that has a kvt_ggml_attention in each
 * layer, kvt_ggml_commit. The graph may be built anew for each step or computed many times: what
 * changes from step to step (lengths, sequences) is looked up when it runs. Only the number of
 * tokens is in the graph's shapes.
 *
 * The nodes are custom operators: they run on ggml's CPU backend. All of one layer run before
 * those of the next where the graph says so, as it does when a layer's K and V are computed from
 * the layer before. A kvt_ggml computes one graph at a time; several of them may share a cache.
 *
 * Copy the two files into your project, or look here for how it is done.
 */
#ifndef KVTILE_GGML_H
#define KVTILE_GGML_H

#include <ggml.h>
#include <kvtile/kvtile.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvt_ggml kvt_ggml;

/* A sequence's tokens of a step. */
typedef struct kvt_ggml_item {
    kvt_seq *seq;
    uint64_t n_tokens; /* of the graph's, behind those of the items before */
} kvt_ggml_item;

/* As in kvt_attend_args; zero is the default. Pointers must stay as long as the graph. */
typedef struct kvt_ggml_options {
    uint32_t flags; /* KVT_ATTEND_F32, KVT_ATTEND_FAST; KVT_ATTEND_CAUSAL is always set */
    float scale, softcap;
    const float *sink_logits, *alibi_slopes; /* [n_q_heads] */
} kvt_ggml_options;

/*
 * config: that which the cache was made with: the graph's shapes are checked against it. NULL: no
 * memory, or an argument is NULL.
 */
kvt_ggml *kvt_ggml_create(kvt_cache *cache, const kvt_config *config);
/* After its graphs; a step that is pending is dropped. NULL is fine. */
void kvt_ggml_destroy(kvt_ggml *g);

/*
 * Begin a step of all items, in the order in which their tokens stand in the graph. A sequence is
 * in one item only. positions: [all tokens], or NULL: they count on.
 *
 * KVT_ERR_STATE: a step is pending here. Else the errors of kvt_seq_begin; on any of them no
 * sequence has a step.
 */
kvt_status kvt_ggml_begin(kvt_ggml *g, const kvt_ggml_item *items, size_t n_items,
                          const int32_t *positions);

/*
 * Add a layer's attention to a graph; returns its output, [v_dim, n_q_heads, n_tokens] f32, as
 * ggml_flash_attn_ext would.
 *
 * q: [k_dim, n_q_heads, n_tokens], k: [k_dim, n_kv_heads, n_tokens], v: [v_dim, n_kv_heads,
 *    n_tokens], q and k after RoPE, f32, f16 or bf16, with the first dimension dense: views into
 *    fused QKV are fine. v is NULL where V is in K. k and v NULL: nothing is appended, and
 *    attention is over what the layer has: all of the step, if the node that appends is in the
 *    graph already (ggml_build_forward_expand), which nothing else makes it run before this one.
 * options: copied, of this node; NULL: the defaults. Other options for a layer take memory, once
 *    for each that differs.
 *
 * Aborts, as ggml does, on shapes and types that ggml could have checked here. What fails while the
 * graph runs shows in kvt_ggml_commit.
 */
struct ggml_tensor *kvt_ggml_attention(kvt_ggml *g, struct ggml_context *ctx, uint32_t layer,
                                       struct ggml_tensor *q, struct ggml_tensor *k,
                                       struct ggml_tensor *v, const kvt_ggml_options *options);

/*
 * After the graph was computed: make the step's tokens part of the sequences. token_ids: [all
 * tokens], or NULL.
 *
 * On any error all sequences are as they were before kvt_ggml_begin, and the outputs of the nodes
 * that did not run are NaN:
 * KVT_ERR_STATE  no step is pending, or the graph has not appended to all layers of the cache
 * KVT_ERR_ARG    a token id is below -1; a tensor does not fit the cache
 * and what kvt_append and kvt_attend report, KVT_ERR_VALUE for numbers that are not finite.
 */
kvt_status kvt_ggml_commit(kvt_ggml *g, const int32_t *token_ids);

/* Drop the step, if there is one: a graph that was not computed, or whose result is not wanted. */
void kvt_ggml_abort(kvt_ggml *g);

/* Why the last call or graph failed: one line, "" where none has. */
const char *kvt_ggml_error(const kvt_ggml *g);

#ifdef __cplusplus
}
#endif

#endif
