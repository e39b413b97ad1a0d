/*
 * kvtile diff: its findings as JSON and as text.
 */
#include "diff.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

int diff_rows(const rows *r)
{
    return !r->compared || r->tokens || r->missing;
}

static int equal_points(const diff *d)
{
    size_t i;

    for (i = 0; i < d->n_points; i++)
        if (!d->points[i].blob || !d->points[i].next_position || !d->points[i].rows)
            return 0;
    return d->lengths;
}

int diff_is_equal(const diff *d)
{
    uint32_t layer;
    int equal = d->fingerprint && d->geometry && d->types && d->tag && d->next_position &&
                equal_points(d) && pieces_equal(&d->pieces) &&
                d->a.info.n_tokens == d->b.info.n_tokens && d->ids == d->n && d->positions == d->n;

    for (layer = 0; layer < d->n_layers; layer++)
        equal = equal && !diff_rows(&d->layers[layer][0]) && !diff_rows(&d->layers[layer][1]);
    return equal;
}

static void print_json_points(const diff *d)
{
    const char *comma = "";
    size_t i;

    printf(",\"checkpoints\":[");
    for (i = 0; i < d->n_points; i++) {
        const point *p = &d->points[i];
        if (p->blob && p->next_position && p->rows)
            continue;
        printf("%s{\"tokens\":%" PRIu64 ",\"blob\":", comma, p->tokens);
        json_bool(p->blob);
        printf(",\"next_position\":");
        json_bool(p->next_position);
        printf(",\"rows\":");
        json_bool(p->rows);
        printf("}");
        comma = ",";
    }
    printf("]");
}

static void print_json_pieces(const tool_pairs *pieces)
{
    const char *comma = "";
    size_t i;
    int j;

    printf(",\"pieces\":[");
    for (i = 0; i < pieces->n; i++) {
        const tool_pair *pair = &pieces->list[i];
        if (pair->equal)
            continue;
        printf("%s{\"name\":", comma);
        json_string(pair->name);
        printf(",\"bytes\":[");
        for (j = 0; j < 2; j++) {
            printf("%s", j ? "," : "");
            if (pair->has[j])
                printf("%" PRIu64, pair->bytes[j]);
            else
                printf("null");
        }
        printf("]}");
        comma = ",";
    }
    printf("]");
}

void diff_print_json(const diff *d)
{
    const char *comma = "";
    uint32_t layer;
    int side;

    json_begin(d->a.path, KVT_OK);
    printf(",\"other\":");
    json_string(d->b.path);
    printf(",\"equal\":");
    json_bool(diff_is_equal(d));
    printf(",\"same\":{\"fingerprint\":");
    json_bool(d->fingerprint);
    printf(",\"geometry\":");
    json_bool(d->geometry);
    printf(",\"types\":");
    json_bool(d->types);
    printf(",\"tag\":");
    json_bool(d->tag);
    printf(",\"next_position\":");
    json_bool(d->next_position);
    printf(",\"checkpoints\":");
    json_bool(equal_points(d));
    printf(",\"pieces\":");
    json_bool(pieces_equal(&d->pieces));
    printf("},\"n_tokens\":[%" PRIu64 ",%" PRIu64 "],\"equal_token_ids\":%" PRIu64
           ",\"equal_positions\":%" PRIu64,
           d->a.info.n_tokens, d->b.info.n_tokens, d->ids, d->positions);
    print_json_points(d);
    print_json_pieces(&d->pieces);
    printf(",\"layers\":[");
    for (layer = 0; layer < d->n_layers; layer++)
        for (side = 0; side < 2; side++) {
            const rows *r = &d->layers[layer][side];
            if (!diff_rows(r))
                continue;
            printf("%s{\"layer\":%" PRIu32 ",\"side\":\"%c\",\"compared\":", comma, layer,
                   "kv"[side]);
            json_bool(r->compared);
            printf(",\"tokens\":%" PRIu64 ",\"blocks\":%" PRIu64 ",\"released\":%" PRIu64,
                   r->tokens, r->blocks, r->missing);
            if (r->tokens)
                printf(",\"first\":%" PRIu64 ",\"largest\":%.9g", r->first, r->largest);
            printf("}");
            comma = ",";
        }
    printf("]}\n");
}

static void print_points(const diff *d)
{
    size_t i;

    if (!d->lengths)
        printf("  checkpoints differ\n");
    for (i = 0; i < d->n_points; i++) {
        const point *p = &d->points[i];
        if (!p->blob)
            printf("  checkpoint of %" PRIu64 " tokens: blobs differ\n", p->tokens);
        if (!p->next_position)
            printf("  checkpoint of %" PRIu64 " tokens: next positions differ: %" PRId32
                   ", %" PRId32 "\n",
                   p->tokens, p->next[0], p->next[1]);
        if (!p->rows)
            printf("  checkpoint of %" PRIu64 " tokens: keys or values differ\n", p->tokens);
    }
}

static void print_pieces(const tool_pairs *pieces)
{
    size_t i;

    for (i = 0; i < pieces->n; i++) {
        const tool_pair *pair = &pieces->list[i];
        if (pair->equal)
            continue;
        printf("  piece ");
        tool_print_tag((const uint8_t *)pair->name, (uint32_t)strlen(pair->name));
        if (pair->has[0] && pair->has[1])
            printf(": %" PRIu64 " bytes, %" PRIu64 " bytes, which differ\n", pair->bytes[0],
                   pair->bytes[1]);
        else
            printf(": %" PRIu64 " bytes, in the %s file alone\n", pair->bytes[pair->has[1]],
                   pair->has[0] ? "first" : "second");
    }
}

void diff_print_text(const diff *d)
{
    uint32_t layer;
    int side;

    tool_print_name(stdout, d->a.path);
    printf(" and ");
    tool_print_name(stdout, d->b.path);
    if (diff_is_equal(d)) {
        printf(" are equal: %" PRIu64 " tokens\n", d->n);
        return;
    }
    printf(" differ\n");
    if (!d->fingerprint)
        printf("  fingerprints differ\n");
    if (!d->geometry)
        printf("  geometries differ\n");
    if (!d->types)
        printf("  types, flags or rotations differ\n");
    if (!d->tag)
        printf("  tags differ\n");
    if (!d->next_position)
        printf("  next positions differ: %" PRId32 ", %" PRId32 "\n", d->a.info.next_position,
               d->b.info.next_position);
    print_points(d);
    print_pieces(&d->pieces);
    printf("  tokens: %" PRIu64 ", %" PRIu64 "; the first %" PRIu64
           " have equal ids, the first %" PRIu64 " equal positions\n",
           d->a.info.n_tokens, d->b.info.n_tokens, d->ids, d->positions);
    for (layer = 0; layer < d->n_layers; layer++)
        for (side = 0; side < 2; side++) {
            const rows *r = &d->layers[layer][side];
            if (!r->compared)
                printf("  layer %" PRIu32 " %c: another shape\n", layer, "KV"[side]);
            if (r->tokens)
                printf("  layer %" PRIu32 " %c: %" PRIu64 " token%s in %" PRIu64
                       " block%s differ%s, the first is %" PRIu64 ", by up to %.4g\n",
                       layer, "KV"[side], r -> tokens, r -> tokens == 1 ? "" : "s", r->blocks,
                       r->blocks == 1 ? "" : "s", r->tokens == 1 ? "s" : "", r->first, r->largest);
            if (r->missing)
                printf("  layer %" PRIu32 " %c: %" PRIu64 " tokens are there in one alone\n", layer,
                       "KV"[side], r -> missing);
        }
}
