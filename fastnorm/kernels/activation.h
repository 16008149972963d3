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

#if defined(FN_TYPE_float64)
enum { MANTISSA = 52, BIAS = 1023 };
#define LN2_HIGH 6.93147180369123816490e-01 /* its low 32 bits are 0, so that n*LN2_HIGH is exact */
#define LN2_LOW 1.90821492927058770002e-10
#define EXP_MOST 709.0
/* Taylor's. */
static const double exp_powers[] = {
    1.0,           1.0,            1.0 / 2,         1.0 / 6,        1.0 / 24,
    1.0 / 120,     1.0 / 720,      1.0 / 5040,      1.0 / 40320,    1.0 / 362880,
    1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
#else
enum { MANTISSA = 23, BIAS = 127 };
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#define EXP_MOST 88.0f
/* The first two fixed, the others of least relative error, 3e-9; one fewer would have 1e-7. */
static const float exp_powers[] = {1.0f,         1.0f,          0.49999994f,  0.16666521f,
                                   0.041668389f, 0.0083687454f, 0.0013814541f};
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

/* v = exp(sign*v), |v| <= EXP_MOST or NaN, as 2^n times a polynomial of sign*r, |r| <= ln(2)/2. The
 * sign, 1 or -1, is in the constants. */
static inline void exponential(vec *v, const int sign)
{
    enum { DEGREE = sizeof exp_powers / sizeof *exp_powers - 1 };
    /* Adding it rounds to a whole number, which with the exponent's bias the lowest bits then are:
     * from -BIAS, which makes 2^n 0, to BIAS. */
    const vec magic = splat((work)1.5 * (work)(1LL << MANTISSA) + BIAS);
    vec n[TOGETHER], r[TOGETHER], power[TOGETHER];
    EACH n[j] = v[j] * splat(sign * (work)1.4426950408889634) + magic;
    EACH power[j] = (vec)((whole_vec)n[j] << MANTISSA);
    EACH n[j] -= magic;
    EACH r[j] = v[j] - n[j] * splat(sign * LN2_HIGH) - n[j] * splat(sign * LN2_LOW);
#pragma GCC unroll 16
    for (int degree = DEGREE; degree >= 0; degree--) {
        const vec factor = splat(degree % 2 ? sign * exp_powers[degree] : exp_powers[degree]);
        EACH v[j] = degree == DEGREE ? factor : v[j] * r[j] + factor;
    }
    EACH v[j] *= power[j];
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
