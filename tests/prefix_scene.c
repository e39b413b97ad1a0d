#include "prefix_scene.h"

void prefix_open(prefix_scene *c, size_t geometry, uint64_t n)
{
    kvt_group_config group = geometry_group(geometry);
    rng r = {geometry + 7};

    memset(c, 0, sizeof *c);
    open_subject(&c->s, &group, 1, &r);
    open_cache(&c->s, NULL);
    c->store = memory_store_open(&c->m);
    make_prompt(c->prompt, MOST + 1);
    c->source = sequence_of(&c->s, n);
    c->to = seq_of(&c->s);
    if (n)
        expect_ok(c->s.cache, kvt_prefix_put(&c->store, c->source, NULL, NULL));
}

void prefix_close(prefix_scene *c)
{
    kvt_seq_destroy(c->source);
    kvt_seq_destroy(c->to);
    memory_store_free(&c->m);
    close_subject(&c->s);
}

uint64_t prefix_get(prefix_scene *c, const int32_t *prompt, uint64_t n,
                    const kvt_prefix_options *options)
{
    kvt_prefix_result probed, got;
    const size_t gets = c->m.n_gets;
    expect_ok(c->s.cache, kvt_prefix_probe(&c->store, c->to, prompt, n, options, &probed));
    assert_int_equal(c->m.n_gets, gets);
    expect_ok(c->s.cache, kvt_prefix_get(&c->store, c->to, prompt, n, options, &got));
    assert_int_equal(probed.n_tokens, got.n_tokens);
    assert_int_equal(probed.n_values + probed.n_bytes + probed.n_refused, 0);
    assert_int_equal(got.n_refused, 0);
    assert_int_equal(kvt_seq_length(c->to), got.n_tokens);
    expect_ok(c->s.cache, kvt_seq_clear(c->to));
    return got.n_tokens;
}
