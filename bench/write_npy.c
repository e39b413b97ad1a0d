/*
 * Test data for kvt-bench fidelity --qkv: write_npy DIR writes sets of three .npy files into DIR,
 * a few sound ones and many damaged ones, and prints a line for each damaged one: its name, a tab,
 * and a part of the message that it has to lead to.
 */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *folder;
static uint64_t state = 1;

/* A sum of four uniform numbers: near normal. */
static float number(void)
{
    float sum = 0.0f;
    for (int i = 0; i < 4; i++) {
        state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        sum += (float)(state >> 40) * 0x1p-24f - 0.5f;
    }
    return sum * 1.7f;
}

/* To f16, of normal numbers only; cut, not rounded. */
static uint16_t half(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int exponent = (int)(bits >> 23 & 255) - 127;
    if (exponent < -14)
        return 0;
    return (uint16_t)((bits >> 16 & 0x8000) | (uint32_t)(exponent + 15) << 10 |
                      (bits >> 13 & 1023));
}

/* What one file is to be. Zero stands for what is usual. */
typedef struct spec {
    const char *name, *side;
    size_t shape[4];
    const char *header; /* the whole dict instead */
    int version, item;  /* 4: f32 */
    long header_bytes;  /* as the file has it */
    long more;          /* bytes at the end; negative: fewer */
    float bad;          /* the value of element bad_at */
    size_t bad_at;
    bool no_magic, zero_byte;
} spec;

static void write_file(const spec *s)
{
    char path[1024], header[512], padded[1024];
    snprintf(path, sizeof path, "%s/%s.%s.npy", folder, s->name, s->side);
    FILE *out = fopen(path, "wb");
    if (!out) {
        perror(path);
        exit(1);
    }
    int item = s->item ? s->item : 2, version = s->version ? s->version : 1;
    if (s->header)
        snprintf(header, sizeof header, "%s", s->header);
    else
        snprintf(header, sizeof header,
                 "{'descr': '<f%d', 'fortran_order': False, 'shape': (%zu, %zu, %zu, %zu), }", item,
                 s->shape[0], s->shape[1], s->shape[2], s->shape[3]);
    /* NumPy pads to a multiple of 64 with spaces and a line's end */
    size_t start = version == 1 ? 10 : 12, length = strlen(header) + 1;
    length += (64 - (start + length) % 64) % 64;
    snprintf(padded, sizeof padded, "%-*s\n", (int)length - 1, header);
    if (s->zero_byte)
        padded[length - 1] = 0;
    unsigned long told = s->header_bytes ? (unsigned long)s->header_bytes : length;
    fputs(s->no_magic ? "NUMPY.." : "\x93NUMPY", out);
    if (!s->no_magic)
        fputc(version, out);
    fputc(0, out);
    for (int i = 0; i < (version == 1 ? 2 : 4); i++)
        fputc((int)(told >> 8 * i & 255), out);
    fwrite(padded, 1, length, out);
    size_t n = s->shape[0] * s->shape[1] * s->shape[2] * s->shape[3];
    long bytes = (long)(n * (size_t)item) + s->more;
    for (size_t i = 0; i < n || bytes > 0; i++) {
        float x = s->bad != 0.0f && i == s->bad_at ? s->bad : number();
        uint32_t bits = 0;
        memcpy(&bits, &x, sizeof bits);
        if (item == 2)
            bits = isfinite(x) ? half(x) : 0x7c00;
        for (int j = 0; j < item && bytes > 0; j++, bytes--)
            fputc((int)(bits >> 8 * j & 255), out);
    }
    if (fclose(out) != 0) {
        perror(path);
        exit(1);
    }
}

enum { L = 2, T = 150, H = 2, D = 16 };

/* A sound set but for one file; NULL: sound. */
static void write_set(const char *name, spec bad, const char *message)
{
    static const char *const sides[3] = {"q", "k", "v"};
    for (int i = 0; i < 3; i++) {
        spec s = {.shape = {L, T, i == 0 ? 2 * H : H, D}};
        if (bad.side && !strcmp(bad.side, sides[i]))
            s = bad;
        if (s.shape[0] == 0)
            memcpy(s.shape, (size_t[4]){L, T, i == 0 ? 2 * H : H, D}, sizeof s.shape);
        s.name = name;
        s.side = sides[i];
        write_file(&s);
    }
    if (message)
        printf("%s\t%s\n", name, message);
}

#define DICT(descr, order, shape)                                                                  \
    "{'descr': " descr ", 'fortran_order': " order ", 'shape': " shape ", }"
#define SHAPE "(2, 150, 2, 16)"

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "write_npy DIR\n");
        return 2;
    }
    folder = argv[1];
    write_set("sound", (spec){0}, NULL);
    write_set("versions", (spec){.side = "k", .version = 2}, NULL);
    write_set(
        "double_quotes",
        (spec){.side = "v",
               .version = 3,
               .header = "{\"shape\":(2,150,2,16),\"fortran_order\":False,\"descr\":\"<f2\"}"},
        NULL);
    write_set("mixed", (spec){.side = "q", .item = 4}, NULL);
    write_set("v_dim", (spec){.side = "v", .shape = {L, T, H, 24}}, NULL);
    write_set("cross", (spec){.side = "q", .shape = {L, 70, 2 * H, D}}, NULL);

    write_set("magic", (spec){.side = "k", .no_magic = true}, "not a .npy file");
    write_set("version", (spec){.side = "k", .version = 4}, "version 4.0");
    write_set("long_header", (spec){.side = "k", .header_bytes = 65535}, "ends in its header");
    write_set("huge_header", (spec){.side = "k", .version = 2, .header_bytes = 0x7fffffff},
              "a header of");
    write_set("cut_header", (spec){.side = "k", .header_bytes = 40}, "the header");
    write_set("zero_byte", (spec){.side = "k", .zero_byte = true}, "has a zero byte");
    write_set("no_dict", (spec){.side = "k", .header = "shape"}, "is no dict");
    write_set("open_string", (spec){.side = "k", .header = "{'descr': '<f2}"}, "without an end");
    write_set("f64", (spec){.side = "k", .header = DICT("'<f8'", "False", SHAPE)}, "dtype <f8");
    write_set("big_endian", (spec){.side = "k", .header = DICT("'>f2'", "False", SHAPE)},
              "dtype >f2");
    write_set("integers", (spec){.side = "k", .header = DICT("'<i2'", "False", SHAPE)},
              "dtype <i2");
    write_set("structured", (spec){.side = "k", .header = DICT("[('a', '<f2')]", "False", SHAPE)},
              "structured");
    write_set("fortran", (spec){.side = "k", .header = DICT("'<f2'", "True", SHAPE)},
              "Fortran order");
    write_set("order", (spec){.side = "k", .header = DICT("'<f2'", "0", SHAPE)}, "no False");
    write_set("no_shape", (spec){.side = "k", .header = "{'descr': '<f2', 'fortran_order': False}"},
              "lacks shape");
    write_set("twice", (spec){.side = "k", .header = "{'descr': '<f2', 'descr': '<f2'}"},
              "twice: descr");
    write_set("unknown", (spec){.side = "k", .header = "{'dtype': '<f2'}"}, "key.*dtype");
    write_set("behind", (spec){.side = "k", .header = DICT("'<f2'", "False", SHAPE) " x"},
              "goes on behind");
    write_set("dims3", (spec){.side = "k", .header = DICT("'<f2'", "False", "(2, 150, 32)")},
              "3 dimensions");
    write_set("dims5", (spec){.side = "k", .header = DICT("'<f2'", "False", "(2, 150, 2, 4, 4)")},
              "more than 4");
    write_set("dims0", (spec){.side = "k", .header = DICT("'<f2'", "False", "()")}, "0 dimensions");
    write_set("zero", (spec){.side = "k", .header = DICT("'<f2'", "False", "(2, 0, 2, 16)")},
              "is 0");
    write_set("negative", (spec){.side = "k", .header = DICT("'<f2'", "False", "(2, -1, 2, 16)")},
              "than numbers");
    write_set(
        "digits",
        (spec){.side = "k", .header = DICT("'<f2'", "False", "(2, 99999999999999999999, 2, 16)")},
        "overflows");
    write_set(
        "product",
        (spec){.side = "k", .header = DICT("'<f2'", "False", "(4294967296, 4294967296, 2, 16)")},
        "product overflows");
    write_set("short", (spec){.side = "v", .more = -1}, "bytes of data");
    write_set("long", (spec){.side = "v", .more = 2}, "bytes of data");
    write_set("infinite", (spec){.side = "v", .bad = INFINITY, .bad_at = 4831},
              "v.npy: .1..0..1..15. is not finite");
    write_set("nan", (spec){.side = "q", .item = 4, .bad = NAN, .bad_at = 1}, "is not finite");
    write_set("large", (spec){.side = "k", .item = 4, .bad = 65536.0f}, "beyond f16");

    write_set("layers", (spec){.side = "q", .shape = {1, T, 2 * H, D}}, "layers of q, k and v");
    write_set("tokens", (spec){.side = "v", .shape = {L, T - 1, H, D}}, "tokens of k and");
    write_set("fewer_queries", (spec){.side = "q", .shape = {L, T - 1, 2 * H, D}}, "--full is for");
    write_set("v_heads", (spec){.side = "v", .shape = {L, T, 1, D}}, "heads of k and");
    write_set("group", (spec){.side = "q", .shape = {L, T, 3, D}}, "no multiple of k");
    write_set("q_dim", (spec){.side = "q", .shape = {L, T, 2 * H, 8}}, "q has 8 dims");
    write_set("odd_dim", (spec){.side = "v", .shape = {L, T, H, 12}}, "multiples of 8");
    printf("missing\tmissing.q.npy: ");
    return fflush(stdout) != 0;
}
