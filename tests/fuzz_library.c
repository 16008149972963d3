/* libfastnorm fed with bytes: each input is read as one forward and its backward.
 *
 * The first byte says which of two kinds. A fair input is a call that the header allows, of some
 * shape, types, flags, fusion, mask, level, threads and memory: it must be served, and its results
 * are compared with the formulas of fastnorm.h in double. A wild input has any sizes, numbers and
 * pointers, NULL or over each other: whatever the library answers, on an error nothing has changed.
 * Every buffer is an allocation of its own of just its size, for AddressSanitizer.
 *
 * LLVMFuzzerTestOneInput is libFuzzer's entry. With -DSTANDALONE it is a program for any compiler:
 *
 *     fuzz_library SECONDS CORPUS     the corpus (one input a line, in hexadecimal), then for so long
 *                                     inputs made of it and at random
 *
 * A failed check prints what failed and ends the program. */
#include <fastnorm.h>

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(condition)                                             \
    do {                                                               \
        if (!(condition)) {                                            \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition);    \
            abort();                                                   \
        }                                                              \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* ---- the input ------------------------------------------------------------------------------- */

typedef struct bytes {
    const uint8_t *next, *first, *end;
} bytes;

static uint8_t byte(bytes *in) { return in->next < in->end ? *in->next++ : 0; }

static int below(bytes *in, int n) { return byte(in) % n; }

static int64_t word(bytes *in)
{
    uint64_t value = 0;
    for (int at = 0; at < 8; at++) value = value << 8 | byte(in);
    return (int64_t)value;
}

/* Values repeat the bytes of the input, so that short inputs fill large arrays. */
static uint8_t again(bytes *in, size_t at) { return in->first[at % (size_t)(in->end - in->first)]; }

/* ---- elements -------------------------------------------------------------------------------- */

static size_t size_of(int32_t dtype)
{
    return dtype == FASTNORM_FLOAT64 ? 8 : dtype == FASTNORM_FLOAT32 ? 4 : 2;
}

static double get(const void *array, int32_t dtype, int64_t at)
{
    uint16_t half;
    uint32_t word;
    float single;
    double value;
    if (dtype == FASTNORM_FLOAT64) {
        memcpy(&value, (const char *)array + 8 * at, 8);
        return value;
    }
    if (dtype == FASTNORM_FLOAT32) {
        memcpy(&single, (const char *)array + 4 * at, 4);
        return single;
    }
    memcpy(&half, (const char *)array + 2 * at, 2);
    if (dtype == FASTNORM_BFLOAT16) {
        word = (uint32_t)half << 16;
        memcpy(&single, &word, 4);
        return single;
    }
    value = half & 0x3ff;
    if ((half & 0x7c00) == 0x7c00) value = value > 0 ? (double)NAN : (double)INFINITY;
    else if (half & 0x7c00) value = ldexp(value + 1024, (half >> 10 & 31) - 25);
    else value = ldexp(value, -24);
    return half & 0x8000 ? -value : value;
}

/* Sixteenths up to 8, which every type holds. */
static void put(void *array, int32_t dtype, int64_t at, int sixteenths)
{
    const double value = sixteenths / 16.0;
    const float single = (float)value;
    uint32_t word;
    uint16_t half;
    memcpy(&word, &single, 4);
    if (dtype == FASTNORM_FLOAT64) memcpy((char *)array + 8 * at, &value, 8);
    else if (dtype == FASTNORM_FLOAT32) memcpy((char *)array + 4 * at, &single, 4);
    else {
        half = (uint16_t)(word >> 16);
        if (dtype == FASTNORM_FLOAT16 && sixteenths)
            half = (uint16_t)((word >> 16 & 0x8000) | (((word >> 23 & 255) - 112) << 10)
                              | (word >> 13 & 0x3ff));
        memcpy((char *)array + 2 * at, &half, 2);
    }
}

/* ---- a call ---------------------------------------------------------------------------------- */

enum { X, DY, RESIDUAL, DSUM, WEIGHT, BIAS, MASK, RUNNING_MEAN, RUNNING_VAR, INPUTS,
       Y = INPUTS, SUM, DX, DRESIDUAL, DWEIGHT, DBIAS, MEAN, VAR, RSTD, BUFFERS };

typedef struct problem {
    fastnorm_geometry shape;
    fastnorm_options options;
    int32_t dtype, params, flags, activation;
    double slope, eps, momentum;
    char *at[BUFFERS]; /* NULL, or where it starts */
    char *memory[BUFFERS];
    size_t size[BUFFERS];
    int64_t count, sets, channels;
} problem;

static void free_all(problem *p)
{
    for (int which = 0; which < BUFFERS; which++) free(p->memory[which]);
    free(p->options.workspace);
}

static void allocate(problem *p, int which, size_t size, int shift)
{
    p->size[which] = size;
    p->memory[which] = malloc(size + (size_t)shift + !size);
    REQUIRE(p->memory[which]);
    p->at[which] = p->memory[which] + shift;
    memset(p->at[which], 0x55, size);
}

static void fill(problem *p, bytes *in, int which, int32_t dtype, int64_t n, int wild)
{
    allocate(p, which, (size_t)n * size_of(dtype), wild || below(in, 4) ? 0 : below(in, 8));
    for (int64_t at = 0; at < n; at++) {
        const size_t from = (size_t)at * 7 + (size_t)which;
        const int8_t value = (int8_t)again(in, from);
        put(p->at[which], dtype, at, which == RUNNING_VAR ? 1 + abs(value) : value);
        for (size_t j = 0; wild && j < size_of(dtype); j++)
            p->at[which][(size_t)at * size_of(dtype) + j] = (char)again(in, from + j);
    }
}

static fastnorm_status forward(const problem *p)
{
    fastnorm_forward_args a;
    memset(&a, 0, sizeof a);
    a.struct_size = sizeof a;
    a.dtype = p->dtype;
    a.param_dtype = p->params;
    a.flags = p->flags;
    a.activation = p->activation;
    a.negative_slope = p->slope;
    a.eps = p->eps;
    a.momentum = p->momentum;
    a.x = p->at[X];
    a.y = p->at[Y];
    a.weight = p->at[WEIGHT];
    a.bias = p->at[BIAS];
    a.running_mean = p->at[RUNNING_MEAN];
    a.running_var = p->at[RUNNING_VAR];
    a.mean = (double *)p->at[MEAN];
    a.var = (double *)p->at[VAR];
    a.rstd = (double *)p->at[RSTD];
    a.residual = p->at[RESIDUAL];
    a.sum = p->at[SUM];
    a.mask = (const uint8_t *)p->at[MASK];
    return fastnorm_forward(&p->shape, &a, &p->options);
}

static fastnorm_status backward(const problem *p)
{
    fastnorm_backward_args a;
    memset(&a, 0, sizeof a);
    a.struct_size = sizeof a;
    a.dtype = p->dtype;
    a.param_dtype = p->params;
    a.flags = p->flags & ~FASTNORM_BIASED_RUNNING_VAR;
    a.activation = p->activation;
    a.negative_slope = p->slope;
    a.dy = p->at[DY];
    a.x = p->at[SUM] ? p->at[SUM] : p->at[X];
    a.weight = p->at[WEIGHT];
    a.bias = p->at[BIAS];
    a.mean = (const double *)p->at[MEAN];
    a.rstd = (const double *)p->at[RSTD];
    a.dx = p->at[DX];
    a.dweight = p->at[DWEIGHT];
    a.dbias = p->at[DBIAS];
    a.residual = p->at[SUM] ? NULL : p->at[RESIDUAL];
    a.dresidual = p->at[DRESIDUAL];
    a.dsum = p->at[DSUM];
    a.mask = (const uint8_t *)p->at[MASK];
    return fastnorm_backward(&p->shape, &a, &p->options);
}

/* ---- fair calls ------------------------------------------------------------------------------ */

static void sizes(problem *p, bytes *in)
{
    static const int64_t known[] = {1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 49, 64, 65, 97,
                                    128, 200, 300, 1025, 2049};
    fastnorm_geometry *s = &p->shape;
    int64_t *axis[] = {&s->b, &s->o, &s->g, &s->k, &s->i, &s->s};
    const int order = below(in, 4); /* any, columns, rows, across */
    p->count = 1;
    for (int at = 0; at < 6; at++) {
        int64_t size = known[below(in, sizeof known / sizeof *known)];
        if (order == 1 && at == 4) size = 1;
        if (order == 2 && (at == 1 || at == 4)) size = 1;
        if (order == 3 ? at == 1 || at == 2 || at == 4 : at == 5) size = 1;
        while (size > 1 && p->count * size > 12000) size = size / 2;
        *axis[at] = size;
        p->count *= size;
    }
    p->sets = s->b * s->g * s->s;
    p->channels = s->g * s->k;
}

static double activated(int32_t kind, double slope, double z, double *derivative)
{
    const double root = sqrt(2 / 3.14159265358979323846), inner = root * (z + 0.044715 * z * z * z);
    const double logistic = 1 / (1 + exp(-z)), t = tanh(inner), normal = erfc(-z / sqrt(2.0)) / 2;
    switch (kind) {
    case FASTNORM_RELU: *derivative = z > 0; return z > 0 ? z : 0;
    case FASTNORM_LEAKY_RELU: *derivative = z > 0 ? 1 : slope; return z > 0 ? z : slope * z;
    case FASTNORM_SILU: *derivative = logistic * (1 + z * (1 - logistic)); return z * logistic;
    case FASTNORM_GELU:
        *derivative = normal + z * exp(-z * z / 2) / sqrt(2 * 3.14159265358979323846);
        return z * normal;
    case FASTNORM_GELU_TANH:
        *derivative = (1 + t) / 2 + z / 2 * (1 - t * t) * root * (1 + 3 * 0.044715 * z * z);
        return z * (1 + t) / 2;
    default: *derivative = 1; return z;
    }
}

/* The set and the channel of a place, and whether it counts. */
typedef struct place {
    int64_t set, channel;
    int valid;
} place;

static place place_of(const problem *p, int64_t at)
{
    const fastnorm_geometry *s = &p->shape;
    const int64_t side = at % s->s, i = at / s->s % s->i, k = at / s->s / s->i % s->k;
    const int64_t g = at / s->s / s->i / s->k % s->g, o = at / s->s / s->i / p->channels % s->o;
    const int64_t b = at / s->s / s->i / p->channels / s->o;
    place found = {(b * s->g + g) * s->s + side, g * s->k + k, 1};
    if (p->at[MASK]) found.valid = p->at[MASK][((b * s->o + o) * s->i + i) * s->s + side] != 0;
    return found;
}

static void near(double found, double wanted, double scale, double tolerance)
{
    if (fabs(found - wanted) <= tolerance * (scale + fabs(wanted))) return;
    fprintf(stderr, "found %.9g, wanted %.9g, scale %.3g\n", found, wanted, scale);
    abort();
}

static double parameter(const problem *p, const char *array, int64_t at, double otherwise)
{
    return array ? get(array, p->params ? p->params : p->dtype, at) : otherwise;
}

/* Both directions by the formulas of fastnorm.h, from copies x, dy, residual of the inputs. */
static void compare(const problem *p, double *x, const double *dy, const double *residual,
                    const double *running)
{
    static const double tolerances[] = {0, 1e-4, 1e-10, 1e-2, 6e-2};
    const double tolerance = tolerances[p->dtype];
    const int given = p->flags & FASTNORM_GIVEN_STATISTICS, no_mean = p->flags & FASTNORM_NO_MEAN;
    double *of_set = calloc((size_t)p->sets * 7, sizeof(double)), largest = 0, kink = INFINITY;
    double *mean = of_set, *var = mean + p->sets, *rstd = var + p->sets, *values = rstd + p->sets;
    double *gy = values + p->sets, *gyx = gy + p->sets, *most = gyx + p->sets;
    double *dz = malloc(sizeof(double) * (size_t)p->count);
    double *of_channel = calloc((size_t)p->channels * 3, sizeof(double));
    double *dweight = of_channel, *dbias = dweight + p->channels, *total = dbias + p->channels;
    REQUIRE(of_set && dz && of_channel);
    for (int64_t at = 0; p->at[SUM] && at < p->count; at++)
        x[at] = place_of(p, at).valid ? get(p->at[SUM], p->dtype, at) : 0;
    for (int64_t at = 0; at < p->count; at++) {
        const place here = place_of(p, at);
        values[here.set] += here.valid;
        if (here.valid && !no_mean) mean[here.set] += x[at];
    }
    for (int64_t set = 0; set < p->sets; set++) {
        if (values[set] > 0) mean[set] /= values[set];
        if (given) mean[set] = running[set];
    }
    for (int64_t at = 0; at < p->count; at++) {
        const place here = place_of(p, at);
        const double d = x[at] - mean[here.set];
        if (here.valid) var[here.set] += d * d / values[here.set];
    }
    for (int64_t set = 0; set < p->sets; set++) {
        if (given) var[set] = running[p->sets + set];
        rstd[set] = values[set] > 0 || given ? 1 / sqrt(var[set] + p->eps) : 0;
        if (p->at[MEAN]) near(((double *)p->at[MEAN])[set], mean[set], 8, 1e-6);
        if (p->at[VAR]) near(((double *)p->at[VAR])[set], var[set], 1, 1e-5);
    }
    for (int64_t at = 0; at < p->count; at++) {
        const place here = place_of(p, at);
        const double weight = parameter(p, p->at[WEIGHT], here.channel, 1);
        const double xhat = (x[at] - mean[here.set]) * rstd[here.set];
        double z = xhat * weight + parameter(p, p->at[BIAS], here.channel, 0), slope, y;
        if (p->at[RESIDUAL] && !p->at[SUM]) z += residual[at];
        y = here.valid ? activated(p->activation, p->slope, z, &slope) : 0;
        near(get(p->at[Y], p->dtype, at), y, 1 + fabs(xhat * weight) + fabs(z), tolerance);
        dz[at] = here.valid ? dy[at] * slope : 0;
        if (here.valid && p->activation) kink = fmin(kink, fabs(z));
        if (!here.valid) continue;
        gy[here.set] += no_mean ? 0 : dz[at] * weight / values[here.set];
        gyx[here.set] += dz[at] * weight * xhat / values[here.set];
        most[here.set] = fmax(most[here.set], fabs(dz[at] * weight) * (1 + fabs(xhat)));
        dweight[here.channel] += dz[at] * xhat;
        dbias[here.channel] += dz[at];
        total[here.channel] += fabs(dz[at]) * (1 + fabs(xhat));
        largest = fmax(largest, fabs(xhat));
    }
    /* Either side of ReLU's corner is right. */
    if (p->at[DX] && (kink > 1e-2 || p->activation > FASTNORM_LEAKY_RELU || !p->activation)) {
        for (int64_t at = 0; at < p->count; at++) {
            const place here = place_of(p, at);
            const double weight = parameter(p, p->at[WEIGHT], here.channel, 1);
            const double xhat = (x[at] - mean[here.set]) * rstd[here.set];
            double dx = dz[at] * weight;
            if (!given) dx -= gy[here.set] + xhat * gyx[here.set];
            dx *= rstd[here.set];
            if (p->at[DSUM]) dx += get(p->at[DSUM], p->dtype, at);
            if (!here.valid) dx = 0;
            near(get(p->at[DX], p->dtype, at), dx,
                 1 + rstd[here.set] * most[here.set] * (1 + fabs(xhat)), tolerance);
        }
        for (int64_t c = 0; p->at[DWEIGHT] && c < p->channels; c++)
            near(parameter(p, p->at[DWEIGHT], c, 0), dweight[c], 1 + total[c], tolerance);
        for (int64_t c = 0; p->at[DBIAS] && c < p->channels; c++)
            near(parameter(p, p->at[DBIAS], c, 0), dbias[c], 1 + total[c], tolerance);
    }
    free(of_set);
    free(dz);
    free(of_channel);
}

static void fair(bytes *in)
{
    problem p;
    size_t workspace;
    double *copies, *running;
    int rows, given, residual, sum;
    memset(&p, 0, sizeof p);
    sizes(&p, in);
    rows = p.shape.o == 1 && p.shape.i == 1 && p.shape.s == 1;
    p.dtype = 1 + below(in, 4);
    p.params = below(in, 2) ? p.dtype == FASTNORM_FLOAT64 ? FASTNORM_FLOAT64 : FASTNORM_FLOAT32 : 0;
    given = p.shape.b == 1 && p.shape.s == 1 && below(in, 4) == 0;
    p.flags = given ? FASTNORM_GIVEN_STATISTICS : below(in, 4) == 0 ? FASTNORM_NO_MEAN : 0;
    p.activation = below(in, 2) ? below(in, 6) : 0;
    p.slope = below(in, 17) / 16.0;
    p.eps = 1.0 / 64;
    p.momentum = 0.125;
    p.options.struct_size = sizeof p.options;
    p.options.num_threads = below(in, 4);
    p.options.isa = below(in, 3) ? 0 : 2 + below(in, 3);
    residual = below(in, 2);
    sum = residual && rows && !given && below(in, 2);
    fill(&p, in, X, p.dtype, p.count, 0);
    fill(&p, in, DY, p.dtype, p.count, 0);
    if (residual) fill(&p, in, RESIDUAL, p.dtype, p.count, 0);
    if (sum) fill(&p, in, SUM, p.dtype, p.count, 0);
    if (sum && below(in, 2)) fill(&p, in, DSUM, p.dtype, p.count, 0);
    if (below(in, 2)) fill(&p, in, WEIGHT, p.params ? p.params : p.dtype, p.channels, 0);
    if (below(in, 2)) fill(&p, in, BIAS, p.params ? p.params : p.dtype, p.channels, 0);
    if (given) {
        fill(&p, in, RUNNING_MEAN, p.params ? p.params : p.dtype, p.shape.g, 0);
        fill(&p, in, RUNNING_VAR, p.params ? p.params : p.dtype, p.shape.g, 0);
    }
    if (!given && below(in, 3) == 0) {
        const int mixed = below(in, 3);
        const int64_t n = p.count / p.channels;
        allocate(&p, MASK, (size_t)n, 0);
        for (int64_t at = 0; at < n; at++)
            p.at[MASK][at] = mixed ? (again(in, (size_t)at) & mixed) != 0 : at % 64 < 40;
    }
    fill(&p, in, Y, p.dtype, p.count, 0);
    fill(&p, in, DX, p.dtype, p.count, 0);
    if (residual && !sum && p.activation) fill(&p, in, DRESIDUAL, p.dtype, p.count, 0);
    if (below(in, 4)) fill(&p, in, DWEIGHT, p.params ? p.params : p.dtype, p.channels, 0);
    if (below(in, 4)) fill(&p, in, DBIAS, p.params ? p.params : p.dtype, p.channels, 0);
    for (int which = MEAN; which <= RSTD; which++)
        allocate(&p, which, (size_t)p.sets * sizeof(double), 0);
    copies = malloc(sizeof(double) * (size_t)p.count * 3);
    running = calloc((size_t)p.sets * 2, sizeof(double));
    REQUIRE(copies && running);
    for (int64_t at = 0; at < p.count; at++) {
        copies[at] = get(p.at[X], p.dtype, at);
        copies[p.count + at] = get(p.at[DY], p.dtype, at);
        copies[2 * p.count + at] = residual ? get(p.at[RESIDUAL], p.dtype, at) : 0;
    }
    for (int64_t set = 0; given && set < p.sets; set++) {
        running[set] = parameter(&p, p.at[RUNNING_MEAN], set, 0);
        running[p.sets + set] = parameter(&p, p.at[RUNNING_VAR], set, 0);
    }
    REQUIRE(fastnorm_workspace_size(&p.shape, (fastnorm_dtype)p.dtype, &workspace) == FASTNORM_OK);
    if (below(in, 2)) {
        p.options.workspace = malloc(workspace);
        p.options.workspace_size = workspace;
        REQUIRE(p.options.workspace);
    }
    if (forward(&p) == FASTNORM_BAD_ISA) p.options.isa = 0; /* this processor lacks the level */
    REQUIRE(forward(&p) == FASTNORM_OK);
    /* In place where the backward may be. */
    if (below(in, 3) == 0 && !(p.at[RESIDUAL] && p.activation)) {
        free(p.memory[DX]);
        p.memory[DX] = NULL;
        p.at[DX] = p.at[DY];
    }
    REQUIRE(backward(&p) == FASTNORM_OK);
    compare(&p, copies, copies + p.count, copies + 2 * p.count, running);
    free(copies);
    free(running);
    free_all(&p);
}

/* ---- wild calls ------------------------------------------------------------------------------ */

static void unchanged_on_error(const problem *p, fastnorm_status (*call)(const problem *))
{
    char *before[BUFFERS];
    fastnorm_status status;
    for (int which = 0; which < BUFFERS; which++) {
        before[which] = malloc(p->size[which] + 1);
        REQUIRE(before[which]);
        if (p->memory[which]) memcpy(before[which], p->memory[which], p->size[which]);
    }
    status = call(p);
    REQUIRE(strlen(fastnorm_status_string(status)) > 0);
    REQUIRE(strcmp(fastnorm_status_string(status), "unknown status") != 0);
    for (int which = 0; which < BUFFERS; which++) {
        if (status != FASTNORM_OK && p->memory[which])
            REQUIRE(memcmp(before[which], p->memory[which], p->size[which]) == 0);
        free(before[which]);
    }
}

static void wild(bytes *in)
{
    problem p;
    size_t needed = 0;
    int64_t lengths[4];
    uint8_t mask[4 * 16];
    memset(&p, 0, sizeof p);
    sizes(&p, in);
    p.dtype = 1 + below(in, 4);
    for (int which = 0; which < BUFFERS; which++) {
        const int parameters = which == WEIGHT || which == BIAS || which == RUNNING_MEAN ||
                               which == RUNNING_VAR || which == DWEIGHT || which == DBIAS;
        if (which >= MEAN) allocate(&p, which, (size_t)p.sets * sizeof(double), 0);
        else if (which == MASK) fill(&p, in, which, FASTNORM_FLOAT64, p.count / 8 + 1, 1);
        else fill(&p, in, which, parameters ? FASTNORM_FLOAT64 : p.dtype,
                  parameters ? p.channels : p.count, 1);
        if (below(in, 3) == 0) p.at[which] = NULL;
    }
    p.params = below(in, 3) ? 0 : (int8_t)byte(in);
    p.flags = below(in, 2) ? 0 : below(in, 2) ? below(in, 8) : (int32_t)word(in);
    p.activation = below(in, 3) ? 0 : (int8_t)byte(in);
    p.eps = below(in, 2) ? 1e-5 : ldexp((double)word(in), byte(in) * 8 - 1024);
    p.slope = below(in, 2) ? 0.5 : ldexp((double)word(in), byte(in) * 8 - 1024);
    p.momentum = below(in, 2) ? 0.1 : below(in, 2) ? (double)NAN : (double)word(in);
    p.options.struct_size = below(in, 8) ? sizeof p.options : byte(in);
    p.options.num_threads = below(in, 4) ? below(in, 4) : (int8_t)byte(in);
    p.options.isa = below(in, 4) ? 0 : (int8_t)byte(in);
    if (below(in, 3) == 0 && !fastnorm_workspace_size(&p.shape, (fastnorm_dtype)p.dtype, &needed)) {
        p.options.workspace_size = below(in, 2) ? needed : needed / (size_t)(2 + below(in, 30));
        p.options.workspace = malloc(p.options.workspace_size);
    }
    if (below(in, 3) == 0) { /* two buffers over each other, inside what both have */
        const int from = below(in, MEAN), to = below(in, MEAN);
        const size_t least = (size_t)p.count * size_of(p.dtype);
        if (p.memory[from] && p.size[from] >= least && to != MASK && p.size[to] <= p.size[from])
            p.at[to] = p.memory[from] + (p.size[from] - p.size[to]) / 2 * (size_t)below(in, 3);
    }
    if (below(in, 4) == 0) { /* sizes that are too large to be there, or negative: an error */
        int64_t *axis[] = {&p.shape.b, &p.shape.o, &p.shape.g, &p.shape.k, &p.shape.i, &p.shape.s};
        const int64_t size = word(in);
        if (size < 0 || size > INT64_MAX / 64) *axis[below(in, 6)] = size;
    }
    unchanged_on_error(&p, forward);
    unchanged_on_error(&p, backward);
    for (int at = 0; at < 4; at++) lengths[at] = below(in, 2) ? below(in, 17) : word(in);
    fastnorm_mask_of_lengths(4, 16, lengths, mask);
    free_all(&p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    bytes in = {data + 1, data, data + size};
    if (size < 2) return 0;
    if (data[0] % 2) fair(&in);
    else wild(&in);
    return 0;
}

#if defined(STANDALONE)
#include <time.h>

enum { MOST = 512 };

typedef struct input {
    size_t size;
    uint8_t data[MOST];
} input;

static uint32_t state = 1;

static uint32_t random_bits(void)
{
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

/* The inputs of a corpus: one a line, in hexadecimal. */
static size_t read_corpus(const char *path, input **inputs)
{
    static char line[2 * MOST + 2];
    size_t count = 0, room = 0;
    FILE *file = fopen(path, "r");
    REQUIRE(file);
    while (fgets(line, sizeof line, file)) {
        unsigned value;
        if (count == room) *inputs = realloc(*inputs, (room = 2 * room + 64) * sizeof **inputs);
        REQUIRE(*inputs);
        (*inputs)[count].size = 0;
        for (const char *at = line; sscanf(at, "%2x", &value) == 1; at += 2)
            (*inputs)[count].data[(*inputs)[count].size++] = (uint8_t)value;
        count += (*inputs)[count].size > 0;
    }
    fclose(file);
    return count;
}

int main(int count, char **arguments)
{
    const time_t stop = time(NULL) + (count > 1 ? atoi(arguments[1]) : 0);
    input *known = NULL, changed;
    const size_t kept = count > 2 ? read_corpus(arguments[2], &known) : 0;
    long calls = 0;
    for (size_t at = 0; at < kept; at++) LLVMFuzzerTestOneInput(known[at].data, known[at].size);
    for (; time(NULL) < stop; calls++) {
        changed.size = 32 + random_bits() % (MOST - 32);
        for (size_t at = 0; at < changed.size; at++) changed.data[at] = (uint8_t)random_bits();
        if (kept && random_bits() % 2) {
            const input *from = &known[random_bits() % kept];
            memcpy(changed.data, from->data, from->size); /* its beginning, and other values */
            changed.data[random_bits() % from->size] = (uint8_t)random_bits();
        }
        LLVMFuzzerTestOneInput(changed.data, changed.size);
    }
    free(known);
    printf("%ld inputs of the corpus, %ld others\n", (long)kept, calls);
    return 0;
}
#endif
