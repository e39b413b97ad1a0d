/*
 * What kvtile diff has found: compared in diff.c, printed in diff_print.c.
 */
#ifndef KVTILE_TOOLS_DIFF_H
#define KVTILE_TOOLS_DIFF_H

#include "tool.h"

/* One side of a layer. */
typedef struct rows {
    uint64_t tokens, blocks; /* that differ */
    uint64_t first;          /* token that does */
    uint64_t missing;        /* tokens that a window has released in one of the files */
    double largest;          /* difference of two elements */
    uint64_t last_block;     /* that was counted */
    int compared;            /* 0: the shapes differ */
} rows;

/* A checkpoint that both have; 1: equal. */
typedef struct point {
    uint64_t tokens;
    int blob, next_position, rows;
    int32_t next[2];
} point;

typedef struct diff {
    const tool_options *o;
    tool_source a, b;
    int fingerprint, geometry, types, tag, next_position; /* 1: equal */
    int lengths;   /* 1: both have checkpoints of the same lengths: points */
    point *points; /* [n_points], ascending */
    size_t n_points;
    tool_pairs pieces;
    uint64_t n;              /* tokens that both have, by number */
    uint64_t ids, positions; /* how many of them, from the first one on, are equal */
    rows (*layers)[2];       /* [layers that both have] */
    uint32_t n_layers;
    float *part[2];
} diff;

int diff_rows(const rows *r);     /* whether a side differs */
int diff_is_equal(const diff *d); /* whether all is equal */
void diff_print_json(const diff *d);
void diff_print_text(const diff *d);

#endif
