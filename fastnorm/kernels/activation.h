/* Activations and their derivatives on a vec, after words.h.
 *
 * No contraction and no table: the same bits at every level. exp and erfc are good to a few units
 * in the last place of what a network sees; NaN stays NaN, and infinities go where the limits do. */
#ifndef FASTNORM_ACTIVATION_H
#define FASTNORM_ACTIVATION_H

#include "words.h"

#if defined(FN_TYPE_float64)
typedef int64_t whole_vec __attribute__((vector_size(FN_VECTOR)));
enum { MANTISSA = 52, BIAS = 1023, EXP_DEGREE = 13, ERFC_TERMS = 28 };
#define LN2_HIGH 6.93147180369123816490e-01 /* its low 32 bits are 0, so that n*LN2_HIGH is exact */
#define LN2_LOW 1.90821492927058770002e-10
#define EXP_LEAST -708.0
#define EXP_MOST 709.0
#else
typedef int32_t whole_vec __attribute__((vector_size(FN_VECTOR)));
enum { MANTISSA = 23, BIAS = 127, EXP_DEGREE = 7, ERFC_TERMS = 10 };
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#define EXP_LEAST -87.0f
#define EXP_MOST 88.0f
#endif

/* Where mask, a vector comparison, a, else b. */
static inline vec choose(whole_vec mask, vec a, vec b)
{
    return (vec)((mask & (whole_vec)a) | (~mask & (whole_vec)b));
}

static inline vec at_least(vec v, work bound) { return choose(v < splat(bound), splat(bound), v); }
static inline vec at_most(vec v, work bound) { return choose(v > splat(bound), splat(bound), v); }

/* exp(v) as 2^n * exp(r), |r| <= ln(2)/2, and Taylor's polynomial. */
static inline vec exponential(vec v)
{
    /* Adding it rounds to a whole number, which the lowest bits then are. */
    const vec magic = splat((work)1.5 * (work)(1LL << MANTISSA));
    vec n, r, sum = splat(1);
    v = at_most(at_least(v, EXP_LEAST), EXP_MOST);
    n = v * splat((work)1.4426950408889634) + magic;
    const vec power = (vec)(((whole_vec)n - (whole_vec)magic + BIAS) << MANTISSA);
    n -= magic;
    r = v - n * splat(LN2_HIGH) - n * splat(LN2_LOW);
#pragma GCC unroll 16
    for (int degree = EXP_DEGREE; degree > 0; degree--)
        sum = sum * (r * splat((work)1 / (work)degree)) + splat(1);
    return sum * power;
}

/* erfc(x)/2 of x >= 0, as t*exp(P(2t - 1) - x*x)/2 with t = 2/(2 + x). P is the Chebyshev series of
 * log(erfc(x)/t) + x*x, computed to 60 digits and cut off under the type's precision. */
static inline vec half_erfc(vec x)
{
    static const double series[28] = {
        -0.6513268598908547171,    0.6419697923564902603,    0.019476473204185836312,
        -0.0095615147868086316419, -0.0009465953444820368663, 0.00036683949785276145187,
        0.000042523324806907771645, -0.000020278578112534243154, -1.6242900046470255135e-6,
        1.3036558355805232018e-6,  1.5626441722066143178e-8, -8.5238095914926542525e-8,
        6.5290544390988514964e-9,  5.0593434955514689418e-9, -9.9136415649303308674e-10,
        -2.2736512229318358557e-10, 9.646791102015526802e-11, 2.3940380830391147447e-12,
        -6.8860275264975533984e-12, 8.9448792730907257167e-13, 3.1309213993429580783e-13,
        -1.1270822361367252366e-13, 3.8109052551892320552e-16, 7.1060976136092369878e-15,
        -1.5230282014571043043e-15, -9.4574945712912340005e-17, 1.2102371892242789923e-16,
        -2.8166630877471769718e-17};
    const vec t = splat(2) / (splat(2) + x), u = splat(2) * t - splat(1), twice = u + u;
    vec one = splat(0), two = splat(0);
#pragma GCC unroll 32
    for (int term = ERFC_TERMS - 1; term > 0; term--) {
        const vec next = twice * one - two + splat((work)series[term]);
        two = one;
        one = next;
    }
    return splat((work)0.5) * t * exponential(u * one - two + splat((work)series[0]) - x * x);
}

/* sigmoid(v), and 1 minus it without cancellation. */
static inline vec sigmoid(vec v, vec *rest)
{
    const vec e = exponential(-v), s = splat(1) / (splat(1) + e);
    *rest = e * s;
    return s;
}

/* The distribution function of the normal distribution. */
static inline vec normal_cdf(vec v)
{
    const whole_vec positive = v > splat(0);
    const vec tail = half_erfc(choose(positive, v, -v) * splat((work)0.7071067811865476));
    return choose(positive, splat(1) - tail, tail);
}

/* 2*sqrt(2/pi)*(v + 0.044715*v^3): gelu_tanh(v) = v*sigmoid of it, since (1 + tanh(a))/2 is
 * sigmoid(2a). */
#define GELU_SCALE ((work)1.5957691216057308)
#define GELU_CUBE ((work)0.044715)

/* kind is a fastnorm_activation; slope is leaky_relu's. */
static inline vec activated(vec z, int kind, work slope)
{
    const vec low = at_least(z, -EXP_MOST); /* or -inf*0 would be NaN */
    vec rest;
    switch (kind) {
    case FASTNORM_RELU: return choose(z <= splat(0), splat(0), z);
    case FASTNORM_LEAKY_RELU: return choose(z <= splat(0), z * splat(slope), z);
    case FASTNORM_SILU: return low * sigmoid(z, &rest);
    case FASTNORM_GELU: return low * normal_cdf(low);
    case FASTNORM_GELU_TANH: {
        const vec v = at_most(low, EXP_MOST); /* or its cube would overflow */
        return low * sigmoid(splat(GELU_SCALE) * (v + splat(GELU_CUBE) * v * v * v), &rest);
    }
    default: return z;
    }
}

/* dy times the derivative by z. */
static inline vec deactivated(vec dy, vec z, int kind, work slope)
{
    const vec v = at_most(at_least(z, -EXP_MOST), EXP_MOST), one = splat(1);
    vec rest;
    switch (kind) {
    case FASTNORM_RELU: return choose(z <= splat(0), splat(0), dy);
    case FASTNORM_LEAKY_RELU: return choose(z <= splat(0), dy * splat(slope), dy);
    case FASTNORM_SILU: {
        const vec s = sigmoid(v, &rest);
        return dy * (s * (one + v * rest));
    }
    case FASTNORM_GELU:
        return dy * (normal_cdf(v) + v * splat((work)0.3989422804014327) *
                                         exponential(splat((work)-0.5) * v * v));
    case FASTNORM_GELU_TANH: {
        const vec square = v * v;
        const vec s = sigmoid(splat(GELU_SCALE) * v * (one + splat(GELU_CUBE) * square), &rest);
        return dy * (s + v * (s * rest) * splat(GELU_SCALE) *
                             (one + splat(3 * GELU_CUBE) * square));
    }
    default: return dy;
    }
}

#endif
