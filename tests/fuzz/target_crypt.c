/*
 * File 0 encrypted with a fixed key, in segments of the smallest size, and damaged as the controls
 * say; or a file that is encrypted already. From a stream, from memory and from a file the answer
 * is the same; an undamaged file's is that of the file itself; a damaged one is refused.
 */
#include "fuzz.h"
#include "src/snapshot/crypt.h"

#include <xxhash.h>

static unsigned char key[KVT_KEY_BYTES];
static unsigned char coded[1 << 21];
static size_t n_coded;

static int put(void *user, const void *data, size_t n)
{
    (void)user;
    if (n > sizeof coded - n_coded)
        return 1;
    memcpy(coded + n_coded, data, n);
    n_coded += n;
    return 0;
}

static int encrypt(const unsigned char *data, size_t n)
{
    static const kvt_snap_context context;
    static kvt_snap_crypt c;
    const kvt_writer to = {NULL, put};
    kvt_writer plain;
    int done;
    n_coded = 0;
    done = kvt_snap_encrypt_begin_sized(&context, key, &to, 4096, &c, &plain) == KVT_OK &&
           plain.write(plain.user, data, n) == 0 && kvt_snap_encrypt_end(&c) == KVT_OK;
    kvt_snap_crypt_release(&c);
    return done;
}

/* 1: the file is another one now. */
static int damage(const unsigned char *controls)
{
    const unsigned kind = controls[CONTROL_DAMAGE];
    const size_t segment = 4096 + 49;
    size_t at = controls[CONTROL_WHERE] | (size_t)controls[CONTROL_WHERE + 1] << 8;
    unsigned char other[4096 + 49];

    switch (kind % 8) {
    case 1: coded[at % n_coded] ^= (unsigned char)(kind | 1); return 1;
    case 2: n_coded = at % n_coded; return 1;
    case 3: /* a field of the head; its checksum holds */
        coded[8 + at % 48] ^= (unsigned char)(kind | 1);
        store64(coded + 56, XXH64(coded, 56, 0));
        return 1;
    case 4: /* two segments change places */
        if (n_coded < 64 + 2 * segment + 50)
            return 0;
        memcpy(other, coded + 64, segment);
        memcpy(coded + 64, coded + 64 + segment, segment);
        memcpy(coded + 64 + segment, other, segment);
        return 1;
    case 5: /* the first one twice, as the last one or besides */
        if (n_coded < 64 + segment || n_coded + segment > sizeof coded)
            return 0;
        memcpy(coded + n_coded, coded + 64, segment);
        n_coded += segment;
        return 1;
    case 6: /* the head of a segment */
        at = 64 + at % 4 * segment + at / 4 % 8;
        if (at >= n_coded)
            return 0;
        coded[at] ^= (unsigned char)(kind | 1);
        return 1;
    case 7: /* without the last one */
        if (n_coded < 64 + segment + 50)
            return 0;
        n_coded -= (n_coded - 64) % segment;
        return 1;
    default: return 0;
    }
}

static kvt_status load(place *p, const input *in, unsigned how, int with_key)
{
    kvt_load_options options;
    kvt_load_result result;
    view v = {coded, n_coded, 0, in->controls[CONTROL_CHUNK]};
    kvt_reader reader = view_reader(&v);
    kvt_status status;

    memset(&result, 0, sizeof result);
    options_of(in, p, &options);
    options.key = with_key ? key : NULL;
    if (how == 0)
        status = kvt_seq_load_stream(p->seq, &reader, &options, &result);
    else if (how == 1)
        status = kvt_seq_load_memory(p->seq, coded, n_coded, &options, &result);
    else
        status = kvt_seq_load(p->seq, memory_file(coded, n_coded), &options, &result);
    p->meter.countdown = 0;
    if (status != KVT_OK) {
        check_unchanged(p);
    } else {
        check_loaded(p, p->seq, &result, 0);
        place_reset(p);
    }
    return status;
}

/* What follows is not read, so the last segment alone may be followed by others in a stream. */
static int goes_on_behind(const unsigned char *controls)
{
    return controls[CONTROL_DAMAGE] % 8 == 5;
}

/* At any place, as the parents of a delta are read. user: counts down to the call that fails. */
static int64_t read_at(void *user, uint64_t offset, void *to, size_t n)
{
    unsigned *countdown = user;
    if (*countdown && --*countdown == 0)
        return -1;
    if (offset >= n_coded)
        return 0;
    n = n < n_coded - offset ? n : n_coded - (size_t)offset;
    memcpy(to, coded + offset, n);
    return (int64_t)n;
}

static void read_places(const input *in, int damaged)
{
    static const kvt_snap_context context;
    static kvt_snap_crypt c;
    unsigned countdown = in->controls[CONTROL_FAIL] % 8;
    const kvt_snap_source source = {&countdown, read_at, n_coded};
    static unsigned char part[9000];
    uint64_t n;

    if (kvt_snap_decrypt_open(&context, key, &source, &c, &n) == KVT_OK) {
        for (uint64_t at = 0; at < n + 9000; at += 7001) {
            size_t here = at < n ? (size_t)(n - at) : 1;
            kvt_status status;
            here = here < sizeof part ? here : sizeof part;
            status = kvt_snap_decrypt_at(&c, at, part, here);
            if (status == KVT_OK && in->bytes[0] == n)
                CHECK(memcmp(part, in->files[0] + at, here) == 0);
            CHECK(damaged || in->controls[CONTROL_FAIL] || (status == KVT_OK) == (at < n));
        }
    } else {
        CHECK(damaged || in->controls[CONTROL_FAIL]);
    }
    kvt_snap_crypt_release(&c);
}

int fuzz_crypt(const uint8_t *data, size_t size)
{
    input in;
    place *p;
    kvt_status plain = KVT_OK, status[3];
    kvt_snapshot_info info;
    char text[256];
    int damaged = 1, given;

    for (unsigned i = 0; i < sizeof key; i++)
        key[i] = (unsigned char)(i * 37 + 11);
    input_open(&in, data, size);
    given = in.bytes[0] >= 8 && kvt_snap_is_encrypted(in.files[0]);
    p = place_of(&in);
    if (given) {
        n_coded = in.bytes[0] < sizeof coded ? in.bytes[0] : sizeof coded;
        memcpy(coded, in.files[0], n_coded);
    } else {
        kvt_load_options options;
        if (in.bytes[0] > sizeof coded / 2 || !encrypt(in.files[0], in.bytes[0]))
            return 0;
        damaged = damage(in.controls);
        options_of(&in, p, &options);
        plain = kvt_seq_load_memory(p->seq, in.files[0], in.bytes[0], &options, NULL);
        place_reset(p);
    }
    for (unsigned how = 0; how < 3; how++)
        status[how] = load(p, &in, how, 1);
    CHECK(load(p, &in, 1, 0) != KVT_OK);
    if (!in.controls[CONTROL_FAIL] && !in.controls[CONTROL_CANCEL]) {
        CHECK((status[1] == KVT_OK) == (status[2] == KVT_OK));
        CHECK(status[1] != KVT_OK || status[0] == KVT_OK);
        if (!given)
            CHECK(damaged ? status[1] != KVT_OK : (status[1] == KVT_OK) == (plain == KVT_OK));
        if (damaged && !given && !goes_on_behind(in.controls))
            CHECK(status[0] != KVT_OK);
    }
    read_places(&in, damaged);
    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    (void)kvt_snapshot_inspect(memory_file(coded, n_coded), 1, &info, text, sizeof text);
    if (!given) {
        kvt_inspect_options options;
        memset(&options, 0, sizeof options);
        options.struct_size = sizeof options;
        options.verify = 1;
        options.key = key;
        if (kvt_snapshot_inspect_with(memory_file(coded, n_coded), &options, &info, text,
                                      sizeof text) == KVT_OK)
            CHECK(!damaged && info.encrypted);
    }
    return 0;
}
