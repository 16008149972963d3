/* The element types of 16 bits, one at a time: what words.h does for whole registers, bit for bit.
 *
 * Rounding is to nearest, ties to even; a NaN stays one, made quiet, and keeps its sign. */
#ifndef FASTNORM_SHORT_H
#define FASTNORM_SHORT_H

#include <stdint.h>
#include <string.h>

/* The bits of one, in an array that may lie anywhere. */
typedef uint16_t fn_short __attribute__((aligned(1)));

static inline uint32_t fn_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float fn_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* bfloat16: the upper half of a float. */
static inline float fn_widen_bfloat16(uint16_t x) { return fn_of_bits((uint32_t)x << 16); }

static inline uint16_t fn_narrow_bfloat16(float value)
{
    const uint32_t bits = fn_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* IEEE binary16: 1 sign, 5 exponent and 10 mantissa bits. */
static inline float fn_widen_float16(uint16_t x)
{
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = (uint32_t)(x & 0x7fff) << 13;
    const uint32_t exponent = rest & 0x0f800000;
    if (exponent == 0x0f800000) /* Inf and NaN */
        return fn_of_bits(sign | 0x70000000 | rest | (rest > 0x0f800000 ? 0x400000 : 0));
    if (exponent == 0) /* 0 and subnormal: with an exponent of its own, less the 1 that gives it */
        return fn_of_bits(sign | fn_bits(fn_of_bits(rest + 0x38800000) - 0x1p-14f));
    return fn_of_bits(sign | (rest + 0x38000000));
}

static inline uint16_t fn_narrow_float16(float value)
{
    const uint32_t bits = fn_bits(value), sign = bits >> 16 & 0x8000;
    const uint32_t rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more: Inf */
    if (rest < 0x38800000) /* subnormal: the sum rounds at the last place of 2^-24 */
        return (uint16_t)(sign | (fn_bits(fn_of_bits(rest) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

#endif
