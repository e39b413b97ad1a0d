/*
 * tinylm's models: a file that is read has finite weights, of the sizes that its header says.
 */
#include "fuzz.h"
#include "tinylm.h"

#include <math.h>

int fuzz_model(const uint8_t *data, size_t size)
{
    tl_model model;
    tl_error error;
    int status;

    error.text[0] = 0;
    status = tl_model_load(&model, memory_file(data, size), &error);
    CHECK(status == 0 || (error.text[0] && !model.layers && !model.embedding));
    if (status == 0) {
        const tl_config *c = &model.config;
        CHECK(c->dim == c->n_heads * c->head_dim && c->kv_dim == c->n_kv_heads * c->head_dim);
        CHECK(model.classifier.rows == c->vocab_size && model.classifier.cols == c->dim);
        for (size_t i = 0; i < (size_t)c->vocab_size * c->dim; i++)
            CHECK(isfinite(model.embedding[i]));
        for (uint32_t i = 0; i < c->n_layers; i++)
            CHECK(model.layers[i].w2.cols == c->hidden_dim &&
                  isfinite(model.layers[i].ffn_norm[c->dim - 1]));
        tl_model_free(&model);
    }
    return 0;
}
