/*
 * Dither for weights of one digit (V of 4 and 5 bits, and of 8 in fast mode).
 *
 * Rounded to nearest, weights that are alike are rounded alike: beside one heavy token the others
 * of a block, all a little below half a step, would all become 0, or all 1 a little above it, and
 * the sum would lose or gain what their values have in common. With a number of its slot added
 * before rounding, about as many of the tokens are rounded up as their weights have in fractions of
 * a step.
 *
 * The numbers of any run of slots are spread evenly over -1/2 to 1/2 (39/64 is near the golden
 * ratio), each is taken once in a block, and their sum is 0. None reaches 1/2: a weight of 0 stays
 * 0, and the largest stays the largest digit, up to 255. They depend on the slot alone: a row's
 * digits do not depend on the other rows, on threads or on the order of blocks.
 */
#ifndef KVT_DITHER_H
#define KVT_DITHER_H

/* Of slot t, in steps. */
#define KVT_DITHER(t) ((float)((39 * (t) + 32) % 64 * 2 - 63) / 128)

#define KVT_DITHER_8(t)                                                                            \
    KVT_DITHER(t), KVT_DITHER((t) + 1), KVT_DITHER((t) + 2), KVT_DITHER((t) + 3),                  \
        KVT_DITHER((t) + 4), KVT_DITHER((t) + 5), KVT_DITHER((t) + 6), KVT_DITHER((t) + 7)

static const _Alignas(64) float kvt_dither[64] = {
    KVT_DITHER_8(0),  KVT_DITHER_8(8),  KVT_DITHER_8(16), KVT_DITHER_8(24),
    KVT_DITHER_8(32), KVT_DITHER_8(40), KVT_DITHER_8(48), KVT_DITHER_8(56)};

#endif /* KVT_DITHER_H */
