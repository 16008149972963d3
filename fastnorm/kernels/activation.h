/* Activations and their derivatives, after words.h.
 *
 * They work on TOGETHER vectors in step: one alone would wait for itself at every operation of the
 * polynomials (1.1 to 1.4 times as long with AVX-512, 1.6 to 2.2 times at x86-64-v3).
 *
 * No contraction and no table: the same bits at every level. exp and erfc are good to a few units
 * in the last place of what a network sees; NaN stays NaN, and infinities go where the limits do. */
#ifndef FASTNORM_ACTIVATION_H
#define FASTNORM_ACTIVATION_H

#include "words.h"

/* exp as 2^(n/8) times a polynomial of what is left: the powers from the square's on, and the bits
 * of 2^(j/8), j in [0, 8), less j in the places to which n is added. */
#if defined(FN_TYPE_float64)
enum { MANTISSA = 52 };
typedef uint64_t power_vec __attribute__((vector_size(FN_VECTOR)));
#define LN2_HIGH 6.93147180369123816490e-01 /* its low 32 bits are 0, so that n*LN2_HIGH is exact */
#define LN2_LOW 1.90821492927058770002e-10
#define EXP_MOST 708.0
/* Taylor's. */
static const double exp_powers[] = {1.0 / 2,   1.0 / 6,    1.0 / 24,   1.0 / 120,
                                    1.0 / 720, 1.0 / 5040, 1.0 / 40320};
static const uint64_t exp_eighths[] = {0x3ff0000000000000, 0x3fef72b83c7d517b,
                                       0x3fef06fe0a31b715, 0x3feebfdad5362a27,
                                       0x3feea09e667f3bcd, 0x3feeace5422aa0db,
                                       0x3feee89f995ad3ad, 0x3fef5818dcfba487};
#else
enum { MANTISSA = 23 };
typedef uint32_t power_vec __attribute__((vector_size(FN_VECTOR)));
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#define EXP_MOST 87.25f
/* Of least relative error, 2.6e-8. */
static const float exp_powers[] = {0.5000645f, 0.16666858f};
static const uint32_t exp_eighths[] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                       0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
#endif

enum { TOGETHER = 4 };
#define EACH for (int j = 0; j < TOGETHER; j++)

/* The larger, the smaller; v where it is NaN. */
static inline vec at_least(vec v, work bound)
{
#if defined(__AVX512F__) && defined(FN_TYPE_float64)
    return (vec)_mm512_max_pd((__m512d)splat(bound), (__m512d)v);
#elif defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)splat(bound), (__m512)v);
#else
    return choose(v < splat(bound), splat(bound), v);
#endif
}

static inline vec at_most(vec v, work bound)
{
#if defined(__AVX512F__) && defined(FN_TYPE_float64)
    return (vec)_mm512_min_pd((__m512d)splat(bound), (__m512d)v);
#elif defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)splat(bound), (__m512)v);
#else
    return choose(v > splat(bound), splat(bound), v);
#endif
}

/* From where on exp would leave the normal numbers. */
static inline vec within(vec v) { return at_most(at_least(v, -EXP_MOST), EXP_MOST); }

/* exp_eighths of the lowest three bits of every lane. */
static inline power_vec eighth_of(power_vec n)
{
#if defined(__AVX512F__) && defined(FN_TYPE_float64)
    return (power_vec)_mm512_permutexvar_epi64((__m512i)n, _mm512_loadu_si512(exp_eighths));
#elif defined(__AVX512F__)
    const __m256i eight = _mm256_loadu_si256((const __m256i *)exp_eighths);
    return (power_vec)_mm512_permutexvar_epi32((__m512i)n, _mm512_broadcast_i64x4(eight));
#elif defined(__AVX2__) && !defined(FN_TYPE_float64)
    const __m256i eight = _mm256_loadu_si256((const __m256i *)exp_eighths);
    return (power_vec)_mm256_permutevar8x32_epi32(eight, (__m256i)n);
#else
    power_vec bits;
    for (int j = 0; j < WIDTH; j++) bits[j] = exp_eighths[n[j] & 7];
    return bits;
#endif
}

/* v = exp(sign*v), sign 1 or -1, |v| <= EXP_MOST or NaN. (As 2^n times a polynomial of degree 6, or
 * 13 in double: it took 1.1 and 1.2 times as long.) */
static inline void exponential(vec *v, const int sign)
{
    enum { HIGHEST = sizeof exp_powers / sizeof *exp_powers - 1 };
    /* Adding it rounds to a whole number, which the lowest bits then are. */
    const vec magic = splat((work)1.5 * (work)(1LL << MANTISSA));
    const vec high = splat(LN2_HIGH / 8), low = splat(LN2_LOW / 8);
    vec n[TOGETHER], r[TOGETHER];
    power_vec power[TOGETHER];
    EACH n[j] = v[j] * splat(sign * (work)(8 * 1.4426950408889634)) + magic;
    EACH power[j] = eighth_of((power_vec)n[j]) + ((power_vec)n[j] << (MANTISSA - 3));
    EACH n[j] -= magic;
    EACH r[j] = (sign > 0 ? v[j] - n[j] * high : n[j] * -high - v[j]) - n[j] * low;
    EACH v[j] = splat(exp_powers[HIGHEST]);
#pragma GCC unroll 16
    for (int at = HIGHEST - 1; at >= 0; at--) EACH v[j] = v[j] * r[j] + splat(exp_powers[at]);
    EACH v[j] = v[j] * (r[j] * r[j]) + r[j];
    EACH v[j] = v[j] * (vec)power[j] + (vec)power[j];
}

/* x = erfc(x)/2 of x >= 0, as t*exp(P(2t - 1) - x*x)/2 with t = 2/(2 + x). P is the Chebyshev
 * series of log(erfc(x)/t) + x*x, computed to 60 digits, cut off under the type's precision, by
 * powers. */
static inline void half_erfc(vec *x)
{
#if defined(FN_TYPE_float64)
    static const double powers[] = {
        -0.67179408405669227, 0.67264322397765673, 0.047343306841904428, -0.046895610231175296,
        -0.0098726893663899586, 0.0088249385570606232, 0.0017589335577990161,
        -0.0023458125004828534, -0.00014624686337800336, 0.00067367879558023496,
        -9.3735031170981705e-5, -0.00017430294720307622, 7.1401014127570306e-5,
        3.1745179749437404e-5, -3.0187884551394244e-5, 1.3772664134464418e-7,
        8.5626234201212856e-6, -2.9479868769982593e-6, -1.27231190486887e-6,
        1.2500276612569754e-6, -1.6849800720653297e-7, -2.495832761719667e-7,
        1.5334345920908177e-7, 1.4448658046252675e-9, -3.9171820510271858e-8,
        1.1172352263623758e-8, 4.0608821469697202e-9, -1.8902306008944537e-9};
#else
    static const float powers[] = {
        -0.67179407605433415f,  0.67264221715548793f,  0.047343106290901012f,
        -0.046874888178861336f, -0.0098737687473313921f, 0.0087038120352188045f,
        0.0017765646350106872f, -0.0020487347604965729f, -0.00020790912059481927f,
        0.00033373589390861394f};
#endif
    enum { LAST = sizeof powers / sizeof *powers - 1 };
    vec t[TOGETHER], u[TOGETHER], sum[TOGETHER];
    EACH t[j] = splat(2) / (splat(2) + x[j]);
    EACH u[j] = splat(2) * t[j] - splat(1);
    EACH sum[j] = splat(powers[LAST]);
#pragma GCC unroll 32
    for (int power = LAST - 1; power >= 0; power--)
        EACH sum[j] = sum[j] * u[j] + splat(powers[power]);
    EACH x[j] = at_least(sum[j] - x[j] * x[j], -EXP_MOST);
    exponential(x, 1);
    EACH x[j] *= splat((work)0.5) * t[j];
}

/* v = sigmoid(v), |v| <= EXP_MOST; rest = 1 minus it, without cancellation. */
static inline void sigmoid(vec *v, vec *rest)
{
    exponential(v, -1);
    EACH rest[j] = v[j];
    EACH v[j] = splat(1) / (splat(1) + v[j]);
    EACH rest[j] *= v[j];
}

/* v = the normal distribution's probability below v. */
static inline void normal_cdf(vec *v)
{
    vec tail[TOGETHER];
    EACH tail[j] = choose(v[j] > splat(0), v[j], -v[j]) * splat((work)0.7071067811865476);
    half_erfc(tail);
    EACH v[j] = choose(v[j] > splat(0), splat(1) - tail[j], tail[j]);
}

/* 2*sqrt(2/pi)*(v + 0.044715*v^3): gelu_tanh(v) = v*sigmoid of it, since (1 + tanh(a))/2 is
 * sigmoid(2a). */
#define GELU_SCALE ((work)1.5957691216057308)
#define GELU_CUBE ((work)0.044715)

/* z = activation(z). kind is a fastnorm_activation; slope is leaky_relu's. */
static inline void activate(vec *z, int kind, work slope)
{
    vec gate[TOGETHER];
    if (kind == FASTNORM_NO_ACTIVATION) return;
    if (kind == FASTNORM_RELU) {
        EACH z[j] = choose(z[j] <= splat(0), splat(0), z[j]);
        return;
    }
    if (kind == FASTNORM_LEAKY_RELU) {
        EACH z[j] = choose(z[j] <= splat(0), z[j] * splat(slope), z[j]);
        return;
    }
    EACH z[j] = at_least(z[j], -EXP_MOST); /* or -inf*0 would be NaN */
    EACH gate[j] = at_most(z[j], EXP_MOST);
    if (kind == FASTNORM_GELU) {
        normal_cdf(gate);
        EACH z[j] *= gate[j];
        return;
    }
    if (kind == FASTNORM_GELU_TANH)
        EACH gate[j] = within(splat(GELU_SCALE) * gate[j] *
                              (splat(1) + splat(GELU_CUBE) * gate[j] * gate[j]));
    exponential(gate, -1);
    EACH z[j] /= splat(1) + gate[j];
}

/* z = dy*activation'(z). */
static inline void deactivate(vec *z, const vec *dy, int kind, work slope)
{
    vec gate[TOGETHER], change[TOGETHER];
    const vec one = splat(1);
    if (kind == FASTNORM_RELU) {
        EACH z[j] = through_relu(z[j], dy[j]);
        return;
    }
    if (kind == FASTNORM_LEAKY_RELU) {
        EACH z[j] = choose(z[j] <= splat(0), dy[j] * splat(slope), dy[j]);
        return;
    }
    /* The rest are z*gate(z), with the derivative gate + z*gate'. */
    EACH z[j] = within(z[j]);
    EACH gate[j] = z[j];
    if (kind == FASTNORM_GELU) {
        normal_cdf(gate);
        EACH change[j] = at_least(splat((work)-0.5) * z[j] * z[j], -EXP_MOST);
        exponential(change, 1);
        EACH change[j] *= splat((work)0.3989422804014327);
    } else if (kind == FASTNORM_SILU) {
        sigmoid(gate, change);
        EACH change[j] *= gate[j];
    } else {
        EACH gate[j] = within(splat(GELU_SCALE) * z[j] *
                              (one + splat(GELU_CUBE) * z[j] * z[j]));
        sigmoid(gate, change);
        EACH change[j] *= gate[j] * splat(GELU_SCALE) * (one + splat(3 * GELU_CUBE) * z[j] * z[j]);
    }
    EACH z[j] = dy[j] * (gate[j] + z[j] * change[j]);
}

#endif
