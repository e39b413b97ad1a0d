/*
 * The library's AMX kernels on a processor without AMX: its tile instructions are undefined there,
 * and a handler of SIGILL emulates them. So the checker runs the shipped object code, with its
 * encodings and the compiler's order of stores. The table's name is `amx_emulated`.
 *
 * The tiles follow the operation sections of Intel's manual (Software Developer's Manual,
 * volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBSSD, TDPBUSD, TILERELEASE): palette 1,
 * sums that wrap, bytes and rows beyond a tile's shape zeroed by loads and dot products, memory
 * accessed in the rows' bytes only. Where the manual has a fault, this aborts; so do uses that are
 * legal but wrong in a kernel: tiles left configured after a call, or read before they are written.
 */
#define _GNU_SOURCE /* names of registers in a signal's context */
#include "check.h"

#if defined(KVT_HAVE_AMX) && defined(__linux__)

#include <signal.h>
#include <stdlib.h>
#include <ucontext.h>

#include "src/cpu.h"

/* ---- tiles ---- */

#define N_TILES 8
#define MAX_ROWS 16
#define MAX_ROW_BYTES 64

typedef struct tile {
    unsigned char bytes[MAX_ROWS][MAX_ROW_BYTES];
    size_t rows, row_bytes;
    int written;
} tile;

static tile tiles[N_TILES];
static int is_configured;

static void expect(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "amx_emulated: %s\n", what);
    abort();
}

/* A tile that an instruction names. */
static tile *tile_of(unsigned number)
{
    expect(is_configured, "tiles are not configured");
    expect(tiles[number].rows > 0 && tiles[number].row_bytes > 0, "the tile has no shape");
    return &tiles[number];
}

/* 64 bytes: palette, first row, 14 zeros, 16 row lengths of 2 bytes, 16 numbers of rows. */
static void tile_configure(const unsigned char *config)
{
    expect((uintptr_t)config % 64 == 0, "a configuration that crosses a line is slow");
    expect(!is_configured, "tiles were not released");
    expect(config[0] == 1, "not palette 1");
    for (size_t i = 1; i < 16; i++)
        expect(config[i] == 0, "not from row 0, or reserved bytes that are not zero");
    memset(tiles, 0, sizeof tiles);
    for (size_t i = 0; i < 16; i++) {
        size_t row_bytes = config[16 + 2 * i] + 256u * config[17 + 2 * i], rows = config[48 + i];
        expect(rows <= MAX_ROWS && row_bytes <= MAX_ROW_BYTES, "the shape is too large");
        expect((rows == 0) == (row_bytes == 0), "half a shape");
        expect(i < N_TILES || rows == 0, "palette 1 has 8 tiles");
        if (i < N_TILES) {
            tiles[i].rows = rows;
            tiles[i].row_bytes = row_bytes;
        }
    }
    is_configured = 1;
}

static void tile_release(void)
{
    memset(tiles, 0, sizeof tiles);
    is_configured = 0;
}

static void tile_zero(unsigned number)
{
    tile *t = tile_of(number);
    memset(t->bytes, 0, sizeof t->bytes);
    t->written = 1;
}

static void tile_load(unsigned number, const unsigned char *from, ptrdiff_t stride)
{
    tile *t = tile_of(number);
    memset(t->bytes, 0, sizeof t->bytes);
    for (size_t i = 0; i < t->rows; i++)
        memcpy(t->bytes[i], from + (ptrdiff_t)i * stride, t->row_bytes);
    t->written = 1;
}

static void tile_store(unsigned number, unsigned char *to, ptrdiff_t stride)
{
    const tile *t = tile_of(number);
    expect(t->written, "a tile is stored that nothing was put into");
    for (size_t i = 0; i < t->rows; i++)
        memcpy(to + (ptrdiff_t)i * stride, t->bytes[i], t->row_bytes);
}

static int32_t element(unsigned char byte, int is_signed)
{
    return is_signed && byte >= 128 ? (int32_t)byte - 256 : (int32_t)byte;
}

static void tile_dot(unsigned number, unsigned number_a, unsigned number_b, int a_is_signed)
{
    tile *sum = tile_of(number);
    const tile *a = tile_of(number_a), *b = tile_of(number_b);
    expect(sum != a && sum != b && a != b, "a dot product of a tile with itself");
    expect(sum->row_bytes % 4 == 0 && a->row_bytes % 4 == 0 && b->row_bytes % 4 == 0,
           "rows of a dot product are not whole lanes");
    expect(sum->rows == a->rows, "rows of the sum and of A differ");
    expect(a->row_bytes / 4 == b->rows, "lanes of A and rows of B differ");
    expect(sum->row_bytes == b->row_bytes, "row bytes of the sum and of B differ");
    expect(sum->written && a->written && b->written, "a tile is used that nothing was put into");
    for (size_t m = 0; m < sum->rows; m++)
        for (size_t k = 0; k < b->rows; k++)
            for (size_t n = 0; n < sum->row_bytes / 4; n++) {
                uint32_t total;
                memcpy(&total, sum->bytes[m] + 4 * n, 4);
                for (size_t i = 0; i < 4; i++)
                    total += (uint32_t)(element(a->bytes[m][4 * k + i], a_is_signed) *
                                        element(b->bytes[k][4 * n + i], 1));
                memcpy(sum->bytes[m] + 4 * n, &total, 4);
            }
    for (size_t m = 0; m < MAX_ROWS; m++) {
        size_t live = m < sum->rows ? sum->row_bytes : 0;
        memset(sum->bytes[m] + live, 0, MAX_ROW_BYTES - live);
    }
}

/* ---- instructions ---- */

/*
 * All are VEX-coded with three bytes of prefix: c4 | R X B (inverted), map | W, vvvv (inverted), L,
 * pp | opcode | mod, reg, rm | sib | displacement. pp distinguishes instructions of one opcode.
 */
enum { PP_NONE, PP_66, PP_F3, PP_F2 };
enum { OPCODE_STATE = 0x49, OPCODE_MOVE = 0x4b, OPCODE_DOT = 0x5e };

static uint64_t register_of(const ucontext_t *context, unsigned number)
{
    static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                   REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                   REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)context->uc_mcontext.gregs[places[number]];
}

static void on_undefined(int signal_number, siginfo_t *info, void *context_of_signal)
{
    ucontext_t *context = context_of_signal;
    const unsigned char *code =
        (const unsigned char *)(uintptr_t)context->uc_mcontext.gregs[REG_RIP];
    unsigned x = !(code[1] >> 6 & 1) * 8u, b = !(code[1] >> 5 & 1) * 8u, pp = code[2] & 3;
    unsigned third = (unsigned)~code[2] >> 3 & 15, mod = code[4] >> 6, rm = code[4] & 7;
    unsigned reg = code[4] >> 3 & 7;
    size_t length = 5;
    uint64_t address = 0, stride = 0;
    unsigned char *memory;

    (void)signal_number;
    (void)info;
    expect(code[0] == 0xc4 && (code[1] & 0x9f) == 0x82 && (code[2] & 0x84) == 0,
           "an undefined instruction that is none of tiles");
    if (mod != 3) {
        unsigned base = rm;
        if (rm == 4) {
            unsigned sib = code[length++], index = (sib >> 3 & 7) + x;
            base = sib & 7;
            if (index != 4)
                stride = register_of(context, index) << (sib >> 6);
        }
        expect(mod != 0 || base != 5, "an address without a base register");
        address = register_of(context, base + b);
        if (mod == 1)
            address += (uint64_t)(int64_t)(signed char)code[length++];
        if (mod == 2) {
            int32_t displacement;
            memcpy(&displacement, code + length, 4);
            address += (uint64_t)(int64_t)displacement;
            length += 4;
        }
    }
    memory = (unsigned char *)(uintptr_t)address;
    if (code[3] == OPCODE_STATE && pp == PP_NONE && mod != 3 && reg == 0)
        tile_configure(memory + stride);
    else if (code[3] == OPCODE_STATE && pp == PP_NONE && code[4] == 0xc0)
        tile_release();
    else if (code[3] == OPCODE_STATE && pp == PP_F2 && mod == 3 && rm == 0)
        tile_zero(reg);
    else if (code[3] == OPCODE_MOVE && pp == PP_F2 && mod != 3 && rm == 4)
        tile_load(reg, memory, (ptrdiff_t)stride);
    else if (code[3] == OPCODE_MOVE && pp == PP_F3 && mod != 3 && rm == 4)
        tile_store(reg, memory, (ptrdiff_t)stride);
    else if (code[3] == OPCODE_DOT && (pp == PP_F2 || pp == PP_66) && mod == 3 && third < N_TILES)
        tile_dot(reg, rm, third, pp == PP_F2);
    else
        expect(0, "a tile instruction that no kernel uses");
    context->uc_mcontext.gregs[REG_RIP] += (greg_t)length;
}

kvt_kernels check_amx_emulated_table = {.isa = "amx_emulated"};

int check_amx_emulated(void)
{
    struct sigaction action;
    if (!kvt_cpu_has_avx512vnni() || kvt_cpu_take_amx())
        return 0;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_undefined;
    action.sa_flags = SA_SIGINFO;
    if (sigaction(SIGILL, &action, NULL) != 0)
        return 0;
    check_amx_emulated_table = kvt_kernels_amx;
    check_amx_emulated_table.isa = "amx_emulated";
    return 1;
}
#else
typedef int check_amx_emulated_is_empty; /* C has no empty files */
#endif
