/*
 * The constants of softmax's exponential, which every instruction set but scalar has inline: a call
 * into SLEEF clobbers all vector registers, and x > 0, subnormal results and the last half ulp,
 * which it takes instructions for, are not needed.
 *
 * For x <= 0:
 *     x = max(x, KVT_EXP_LEAST)              x stays a NaN where it is one
 *     t = x * KVT_EXP_LOG2E + KVT_EXP_MAGIC  one rounding: t's low bits hold n + 127, n being
 *                                            x / ln 2 rounded to an integer
 *     n = t - KVT_EXP_MAGIC                  exact
 *     r = x - n * KVT_EXP_LN2                one rounding; |r| < 0.3467
 *     p = 1 + r (1 + r (C2 + r (C3 + r (C4 + r (C5 + r C6)))))    six FMAs, or in another order
 *     exp(x) = p * 2^n                       2^n has the bits t << 23
 *
 * exp(0) is 1 and nothing is above 1: for n = 0, where r <= 0, what is added to 1 is not positive.
 * KVT_EXP_LEAST gives n = -127, for which t << 23 is zero: results are 0 from x = -126.5 ln 2
 * (-87.7) down, also for -inf.
 *
 * ln 2 in one f32 is off by 2^-28.4 of itself: |x| / 22 * 2^-24 in the result, which is little
 * beside what x itself is off by, being a rounded difference.
 *
 * C2 to C6 are minimax in the relative error on |r| <= 0.34661, behind the coefficients 1 and 1
 * (Remez's algorithm; one after the other was rounded to f32 and those behind it fitted again):
 * 0.07 * 2^-24. In all, measured for every f32 from -87.3 to 0: at most (1.2 + |x| / 20) * 2^-24
 * of the result; from -1 to 0, 0.75 ulp by Horner's rule and 0.85 in NEON's order.
 */
#ifndef KVT_EXP_H
#define KVT_EXP_H

#define KVT_EXP_LEAST (-88.0f)
#define KVT_EXP_LOG2E 0x1.715476p+0f
#define KVT_EXP_MAGIC (0x1.8p+23f + 127.0f)
#define KVT_EXP_LN2 0x1.62e43p-1f
#define KVT_EXP_C2 0x1.fffffcp-2f
#define KVT_EXP_C3 0x1.555492p-3f
#define KVT_EXP_C4 0x1.555878p-5f
#define KVT_EXP_C5 0x1.123c08p-7f
#define KVT_EXP_C6 0x1.6ac924p-10f

#endif /* KVT_EXP_H */
