/*
 * A model of random weights that stands for an engine's own, for the programs of engine.md.
 */
#ifndef ENGINE_H
#define ENGINE_H

#include <kvtile/kvtile.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    N_LAYERS = 4,
    Q_HEADS = 8,
    KV_HEADS = 2,
    DIM = 64,
    WIDTH = 32,
    N_VOCAB = 97,
    MAX_STEP = 128
};

static float x[MAX_STEP][WIDTH];
static float q[MAX_STEP * Q_HEADS * DIM], att[MAX_STEP * Q_HEADS * DIM];
static float k[MAX_STEP * KV_HEADS * DIM], v[MAX_STEP * KV_HEADS * DIM];

/* A weight, from its place alone. */
static float weight(uint32_t matrix, uint32_t row, uint32_t column)
{
    uint32_t h = (matrix * 7919u + row) * 104729u + column * 1299709u + 12345u;
    h = (h ^ (h >> 15)) * 2246822519u;
    h = (h ^ (h >> 13)) * 3266489917u;
    return (float)((h ^ (h >> 16)) >> 8) / 8388608.0f - 1.0f;
}

static void embed(const int32_t *ids, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        for (uint32_t d = 0; d < WIDTH; d++)
            x[i][d] = weight(0, (uint32_t)ids[i], d);
}

/* rows = x . weights, turned by RoPE where position is not negative */
static void matmul(float *rows, uint32_t matrix, uint32_t width, uint64_t n, int32_t position)
{
    for (uint64_t i = 0; i < n; i++) {
        float *row = rows + i * width;
        for (uint32_t j = 0; j < width; j++) {
            row[j] = 0;
            for (uint32_t d = 0; d < WIDTH; d++)
                row[j] += x[i][d] * weight(matrix, j, d);
        }
        for (uint32_t j = 0; position >= 0 && j < width; j += 2) {
            float angle = (float)(position + (int32_t)i) * powf(10000.0f, -(float)(j % DIM) / DIM);
            float a = row[j], b = row[j + 1];
            row[j] = a * cosf(angle) - b * sinf(angle);
            row[j + 1] = a * sinf(angle) + b * cosf(angle);
        }
    }
}

static void project(uint32_t layer, uint64_t n, int32_t position)
{
    matmul(q, 4 * layer + 1, Q_HEADS * DIM, n, position);
    matmul(k, 4 * layer + 2, KV_HEADS * DIM, n, position);
    matmul(v, 4 * layer + 3, KV_HEADS * DIM, n, -1);
}

static void feed_forward(uint32_t layer, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        for (uint32_t d = 0; d < WIDTH; d++) {
            float sum = 0;
            for (uint32_t j = 0; j < Q_HEADS * DIM; j += 16)
                sum += att[i * Q_HEADS * DIM + j] * weight(4 * layer + 4, d, j);
            x[i][d] = tanhf(x[i][d] + sum);
        }
}

static int32_t best_token(uint64_t row)
{
    int32_t best = 0;
    float most = -INFINITY;
    for (int32_t id = 0; id < N_VOCAB; id++) {
        float logit = 0;
        for (uint32_t d = 0; d < WIDTH; d++)
            logit += x[row][d] * weight(0, (uint32_t)id, d);
        if (logit > most) {
            most = logit;
            best = id;
        }
    }
    return best;
}

static int create(kvt_cache **cache, kvt_seq **seq)
{
    kvt_group_config group = kvt_group_config_init();
    group.n_layers = N_LAYERS;
    group.n_q_heads = Q_HEADS;
    group.n_kv_heads = KV_HEADS;
    group.k_dim = group.v_dim = DIM;
    group.k_type = group.v_type = KVT_TYPE_I8;
    kvt_config config = kvt_config_init();
    config.groups = &group;
    config.n_groups = 1;
    config.max_tokens = 8192;
    return kvt_cache_create(&config, cache) != KVT_OK || kvt_seq_create(*cache, seq) != KVT_OK;
}

#endif
