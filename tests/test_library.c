/* The C contract, from C: status codes, untouched outputs, workspace, thread pools.
 *
 * Prints a line for each failed check and one with the counts. */
#define _POSIX_C_SOURCE 200112L
#include <fastnorm.h>

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int passed, failed;

static void check(int holds, const char *what, int line)
{
    if (holds) {
        passed++;
    } else {
        failed++;
        printf("line %d: %s\n", line, what);
    }
}

#define CHECK(condition) check((condition), #condition, __LINE__)

enum { B = 3, O = 4, G = 5, K = 2, I = 700, SIZE = B * O * G * K * I, CHANNELS = G * K, SETS = B * G };

static float x[SIZE], dy[SIZE], y[SIZE], dx[SIZE];
static float weight[CHANNELS], bias[CHANNELS], dweight[CHANNELS], dbias[CHANNELS];
static float running_mean[G], running_var[G];
static double mean[SETS], var[SETS], rstd[SETS];
static const fastnorm_geometry shape = {B, O, G, K, I, 1};

static fastnorm_forward_args forward_args(void)
{
    fastnorm_forward_args args;
    memset(&args, 0, sizeof args);
    args.struct_size = sizeof args;
    args.dtype = FASTNORM_FLOAT32;
    args.eps = 1e-5;
    args.momentum = 0.1;
    args.x = x;
    args.y = y;
    args.weight = weight;
    args.bias = bias;
    args.mean = mean;
    args.var = var;
    args.rstd = rstd;
    return args;
}

static fastnorm_backward_args backward_args(void)
{
    fastnorm_backward_args args;
    memset(&args, 0, sizeof args);
    args.struct_size = sizeof args;
    args.dtype = FASTNORM_FLOAT32;
    args.dy = dy;
    args.x = x;
    args.weight = weight;
    args.mean = mean;
    args.rstd = rstd;
    args.dx = dx;
    args.dweight = dweight;
    args.dbias = dbias;
    return args;
}

static fastnorm_options default_options(void)
{
    fastnorm_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    return options;
}

static void poison(void)
{
    for (int at = 0; at < SIZE; at++) y[at] = dx[at] = 7;
    for (int at = 0; at < SETS; at++) mean[at] = var[at] = rstd[at] = 7;
    for (int at = 0; at < CHANNELS; at++) dweight[at] = dbias[at] = 7;
    for (int at = 0; at < G; at++) running_mean[at] = running_var[at] = 7;
}

static int untouched(void)
{
    for (int at = 0; at < SIZE; at++)
        if (y[at] != 7 || dx[at] != 7) return 0;
    for (int at = 0; at < SETS; at++)
        if (mean[at] != 7 || var[at] != 7 || rstd[at] != 7) return 0;
    for (int at = 0; at < CHANNELS; at++)
        if (dweight[at] != 7 || dbias[at] != 7) return 0;
    for (int at = 0; at < G; at++)
        if (running_mean[at] != 7 || running_var[at] != 7) return 0;
    return 1;
}

#define REFUSED_FORWARD(change, wanted)                                     \
    do {                                                                    \
        fastnorm_geometry s = shape;                                        \
        fastnorm_forward_args a = forward_args();                           \
        fastnorm_options o = default_options();                             \
        change;                                                             \
        CHECK(fastnorm_forward(&s, &a, &o) == (wanted) && untouched());     \
    } while (0)

#define REFUSED_BACKWARD(change, wanted)                                    \
    do {                                                                    \
        fastnorm_geometry s = shape;                                        \
        fastnorm_backward_args a = backward_args();                         \
        fastnorm_options o = default_options();                             \
        change;                                                             \
        CHECK(fastnorm_backward(&s, &a, &o) == (wanted) && untouched());    \
    } while (0)

static void test_errors(void)
{
    static char small[64];
    poison();
    CHECK(fastnorm_forward(NULL, NULL, NULL) == FASTNORM_NULL_POINTER);
    CHECK(fastnorm_backward(&shape, NULL, NULL) == FASTNORM_NULL_POINTER);
    REFUSED_FORWARD(a.x = NULL, FASTNORM_NULL_POINTER);
    REFUSED_FORWARD(a.y = NULL, FASTNORM_NULL_POINTER);
    REFUSED_FORWARD(a.struct_size = 3, FASTNORM_BAD_STRUCT_SIZE);
    REFUSED_FORWARD(o.struct_size = 3, FASTNORM_BAD_STRUCT_SIZE);
    REFUSED_FORWARD(a.dtype = 99, FASTNORM_BAD_DTYPE);
    REFUSED_FORWARD(a.param_dtype = 99, FASTNORM_BAD_DTYPE);
    REFUSED_FORWARD(a.flags = 1 << 20, FASTNORM_BAD_FLAGS);
    REFUSED_FORWARD(a.flags = FASTNORM_GIVEN_STATISTICS, FASTNORM_BAD_FLAGS);
    REFUSED_FORWARD(s.b = 1; a.flags = FASTNORM_GIVEN_STATISTICS, FASTNORM_NULL_POINTER);
    REFUSED_FORWARD(a.eps = NAN, FASTNORM_BAD_EPS);
    REFUSED_FORWARD(a.momentum = INFINITY, FASTNORM_BAD_EPS);
    REFUSED_FORWARD(s.o = -1, FASTNORM_NEGATIVE_SIZE);
    REFUSED_FORWARD(s.i = INT64_MAX / 2, FASTNORM_SIZE_OVERFLOW);
    REFUSED_FORWARD(s.b = 0; s.o = s.g = s.k = s.i = (int64_t)1 << 31, FASTNORM_SIZE_OVERFLOW);
    REFUSED_FORWARD(s.s = -1, FASTNORM_NEGATIVE_SIZE);
    REFUSED_FORWARD(s.s = 2, FASTNORM_BAD_GEOMETRY); /* o, g and i are not 1 */
    REFUSED_FORWARD(s.o = s.g = s.i = 1; s.s = 9; a.flags = FASTNORM_GIVEN_STATISTICS; s.b = 1,
                    FASTNORM_BAD_FLAGS);
    REFUSED_FORWARD(o.num_threads = -1, FASTNORM_NEGATIVE_SIZE);
    REFUSED_FORWARD(o.isa = 77, FASTNORM_BAD_ISA);
    REFUSED_FORWARD(o.workspace = small; o.workspace_size = 64, FASTNORM_WORKSPACE_TOO_SMALL);
    REFUSED_FORWARD(a.y = x + 1, FASTNORM_OVERLAP);
    REFUSED_FORWARD(a.weight = y, FASTNORM_OVERLAP);
    REFUSED_FORWARD(a.var = mean, FASTNORM_OVERLAP);
    REFUSED_FORWARD(a.mean = NULL; a.running_mean = running_mean, FASTNORM_NULL_POINTER);
    REFUSED_FORWARD(s.b = s.o = s.k = s.i = 1; a.running_var = running_var,
                    FASTNORM_TOO_FEW_VALUES);
    REFUSED_BACKWARD(a.dy = NULL, FASTNORM_NULL_POINTER);
    REFUSED_BACKWARD(a.x = NULL, FASTNORM_NULL_POINTER);
    REFUSED_BACKWARD(a.dx = NULL, FASTNORM_NULL_POINTER);
    REFUSED_BACKWARD(a.rstd = NULL, FASTNORM_NULL_POINTER);
    REFUSED_BACKWARD(a.mean = NULL, FASTNORM_NULL_POINTER);
    REFUSED_BACKWARD(a.dtype = 0, FASTNORM_BAD_DTYPE);
    REFUSED_BACKWARD(a.flags = FASTNORM_BIASED_RUNNING_VAR, FASTNORM_BAD_FLAGS);
    REFUSED_BACKWARD(a.dx = dy + 1, FASTNORM_OVERLAP);
    REFUSED_BACKWARD(a.dbias = dweight, FASTNORM_OVERLAP);
    REFUSED_FORWARD(a.activation = 6, FASTNORM_BAD_ACTIVATION);
    REFUSED_FORWARD(a.activation = -1, FASTNORM_BAD_ACTIVATION);
    REFUSED_FORWARD(a.negative_slope = NAN, FASTNORM_BAD_ACTIVATION);
    REFUSED_FORWARD(a.residual = x; a.sum = dx, FASTNORM_BAD_FUSION); /* sets are not rows */
    REFUSED_FORWARD(s.o = s.i = 1; a.sum = dx, FASTNORM_BAD_FUSION);
    REFUSED_FORWARD(s.o = s.i = 1; a.residual = x; a.sum = y, FASTNORM_OVERLAP);
    REFUSED_FORWARD(a.residual = y + 1, FASTNORM_OVERLAP);
    REFUSED_BACKWARD(a.activation = 6, FASTNORM_BAD_ACTIVATION);
    REFUSED_BACKWARD(a.dsum = y, FASTNORM_BAD_FUSION);
    REFUSED_BACKWARD(a.dresidual = y, FASTNORM_BAD_FUSION); /* it is dy without an activation */
    REFUSED_BACKWARD(a.activation = FASTNORM_RELU; a.dx = x, FASTNORM_OVERLAP);
    REFUSED_BACKWARD(a.activation = FASTNORM_RELU; a.dresidual = dx, FASTNORM_OVERLAP);
    REFUSED_BACKWARD(a.activation = FASTNORM_RELU; a.dresidual = x, FASTNORM_OVERLAP);
    REFUSED_BACKWARD(a.struct_size = 0, FASTNORM_BAD_STRUCT_SIZE);
    CHECK(fastnorm_batch_norm(FASTNORM_FLOAT32, (fastnorm_layout)9, 1, 2, 3, x, NULL, NULL, 1e-5, y,
                              NULL, NULL, NULL) == FASTNORM_BAD_LAYOUT);
    CHECK(fastnorm_group_norm(FASTNORM_FLOAT32, FASTNORM_NHWC, 2, 10, 7, 3, x, NULL, NULL, 1e-5, y,
                              NULL, NULL, NULL) == FASTNORM_NOT_DIVISIBLE);
    CHECK(fastnorm_group_norm(FASTNORM_FLOAT32, FASTNORM_NHWC, 2, 10, 7, 0, x, NULL, NULL, 1e-5, y,
                              NULL, NULL, NULL) == FASTNORM_NOT_DIVISIBLE);
    CHECK(fastnorm_batch_norm(FASTNORM_FLOAT32, FASTNORM_NHWC, INT64_MAX, 2, 3, x, NULL, NULL, 1e-5,
                              y, NULL, NULL, NULL) == FASTNORM_SIZE_OVERFLOW);
    CHECK(fastnorm_layer_norm(FASTNORM_FLOAT32, -1, 3, x, NULL, NULL, 1e-5, y, NULL, NULL, NULL) ==
          FASTNORM_NEGATIVE_SIZE);
    CHECK(untouched());
    for (int status = -1; status < 70; status++)
        CHECK(strlen(fastnorm_status_string((fastnorm_status)status)) > 0);
}

static void fill(void)
{
    unsigned state = 1;
    for (int at = 0; at < SIZE; at++) {
        state = state * 1664525u + 1013904223u;
        x[at] = (float)(state >> 8) / (1 << 24) * 4 + 1;
        state = state * 1664525u + 1013904223u;
        dy[at] = (float)(state >> 8) / (1 << 24) - 0.5f;
    }
    for (int c = 0; c < CHANNELS; c++) {
        weight[c] = 0.5f + (float)c;
        bias[c] = (float)c - 3;
    }
}

/* The definition, in double. */
static void test_values(void)
{
    fastnorm_forward_args forward = forward_args();
    fastnorm_backward_args backward = backward_args();
    double worst_y = 0, worst_dx = 0;
    const double count = (double)O * K * I;
    CHECK(fastnorm_forward(&shape, &forward, NULL) == FASTNORM_OK);
    CHECK(fastnorm_backward(&shape, &backward, NULL) == FASTNORM_OK);
    for (int b = 0; b < B; b++)
        for (int g = 0; g < G; g++) {
            double s = 0, q = 0, m1 = 0, m2 = 0, r;
#define EACH(...)                                                               \
    for (int o = 0; o < O; o++)                                                 \
        for (int k = 0; k < K; k++)                                             \
            for (int i = 0; i < I; i++) {                                       \
                const int at = (((b * O + o) * G + g) * K + k) * I + i;         \
                __VA_ARGS__                                                     \
            }
            EACH(s += x[at];)
            s /= count;
            EACH(q += (x[at] - s) * (x[at] - s);)
            r = 1 / sqrt(q / count + 1e-5);
            EACH(m1 += dy[at] * weight[g * K + k] / count;
                 m2 += dy[at] * weight[g * K + k] * (x[at] - s) * r / count;)
            EACH(
                const double xhat = (x[at] - s) * r, gy = dy[at] * weight[g * K + k];
                worst_y = fmax(worst_y, fabs(y[at] - (xhat * weight[g * K + k] + bias[g * K + k])));
                worst_dx = fmax(worst_dx, fabs(dx[at] - r * (gy - m1 - xhat * m2)));)
            CHECK(fabs(mean[b * G + g] - s) < 1e-6 && fabs(rstd[b * G + g] - r) < 1e-6);
        }
    CHECK(worst_y < 2e-5);
    CHECK(worst_dx < 2e-5);
}

/* Rows without a mean, as RMS norm has them, which have a loop of their own without a bias. */
static void test_rows_without_mean(void)
{
    enum { ROWS = 12 };
    const fastnorm_geometry rows = {ROWS, 1, 1, CHANNELS, 1, 1};
    for (int biased = 0; biased < 2; biased++) {
        fastnorm_forward_args forward = forward_args();
        fastnorm_backward_args backward = backward_args();
        double wanted_w[CHANNELS] = {0}, wanted_b[CHANNELS] = {0}, worst = 0;
        forward.flags = backward.flags = FASTNORM_NO_MEAN;
        forward.mean = NULL;
        backward.mean = NULL;
        forward.bias = biased ? bias : NULL;
        backward.dbias = biased ? dbias : NULL;
        for (int c = 0; c < CHANNELS; c++) dweight[c] = dbias[c] = 7;
        CHECK(fastnorm_forward(&rows, &forward, NULL) == FASTNORM_OK);
        CHECK(fastnorm_backward(&rows, &backward, NULL) == FASTNORM_OK);
        for (int row = 0; row < ROWS; row++) {
            const float *xs = x + row * CHANNELS, *dys = dy + row * CHANNELS;
            double q = 0, m2 = 0, r;
            for (int c = 0; c < CHANNELS; c++) q += (double)xs[c] * xs[c] / CHANNELS;
            r = 1 / sqrt(q + 1e-5);
            for (int c = 0; c < CHANNELS; c++) m2 += dys[c] * weight[c] * xs[c] * r / CHANNELS;
            for (int c = 0; c < CHANNELS; c++) {
                const double xhat = xs[c] * r;
                const int at = row * CHANNELS + c;
                wanted_w[c] += dys[c] * xhat;
                wanted_b[c] += dys[c];
                worst = fmax(worst, fabs(y[at] - (xhat * weight[c] + (biased ? bias[c] : 0))));
                worst = fmax(worst, fabs(dx[at] - r * (dys[c] * weight[c] - xhat * m2)));
            }
        }
        for (int c = 0; c < CHANNELS; c++) {
            worst = fmax(worst, fabs(dweight[c] - wanted_w[c]));
            worst = fmax(worst, fabs(dbias[c] - (biased ? wanted_b[c] : 7)));
        }
        CHECK(worst < 2e-5);
    }
}

/* y = relu(affine + residual) and its gradient, from the calls without. */
static void test_fusion(void)
{
    static float z[SIZE], dz[SIZE], wanted[SIZE], residual[SIZE], dresidual[SIZE];
    fastnorm_forward_args forward = forward_args();
    fastnorm_backward_args backward = backward_args();
    int right = 1;
    for (int at = 0; at < SIZE; at++) residual[at] = dy[SIZE - 1 - at] * 5;
    forward.y = z;
    CHECK(fastnorm_forward(&shape, &forward, NULL) == FASTNORM_OK);
    forward.y = y;
    forward.residual = residual;
    forward.activation = FASTNORM_RELU;
    CHECK(fastnorm_forward(&shape, &forward, NULL) == FASTNORM_OK);
    for (int at = 0; at < SIZE; at++) {
        const float before = z[at] + residual[at];
        right = right && y[at] == (before > 0 ? before : 0);
        dz[at] = before > 0 ? dy[at] : 0;
    }
    CHECK(right);
    backward.dy = dz;
    backward.dx = wanted;
    CHECK(fastnorm_backward(&shape, &backward, NULL) == FASTNORM_OK);
    backward.dy = dy;
    backward.dx = dx;
    backward.bias = bias;
    backward.residual = residual;
    backward.dresidual = dresidual;
    backward.activation = FASTNORM_RELU;
    CHECK(fastnorm_backward(&shape, &backward, NULL) == FASTNORM_OK);
    CHECK(memcmp(dresidual, dz, sizeof dz) == 0 && memcmp(dx, wanted, sizeof dx) == 0);
    backward.dresidual = NULL;
    CHECK(fastnorm_backward(&shape, &backward, NULL) == FASTNORM_OK);
    CHECK(memcmp(dx, wanted, sizeof dx) == 0);
}

/* Rows with their sum, and what else arrives at its gradient; sets of one value in a row as well. */
static void test_sum(fastnorm_geometry rows)
{
    static float z[SIZE], wanted[SIZE], residual[SIZE], sum[SIZE];
    static double row_mean[SIZE], row_rstd[SIZE];
    fastnorm_forward_args forward = forward_args();
    fastnorm_backward_args backward = backward_args();
    int right = 1;
    for (int at = 0; at < SIZE; at++) {
        residual[at] = dy[SIZE - 1 - at] * 5;
        sum[at] = y[at] = dx[at] = NAN;
    }
    if (rows.k != CHANNELS) {
        forward.weight = forward.bias = backward.weight = NULL;
        backward.dweight = backward.dbias = NULL;
    }
    forward.residual = residual;
    forward.sum = sum;
    forward.mean = row_mean;
    forward.var = NULL;
    forward.rstd = row_rstd;
    CHECK(fastnorm_forward(&rows, &forward, NULL) == FASTNORM_OK);
    for (int at = 0; at < SIZE; at++) right = right && sum[at] == x[at] + residual[at];
    CHECK(right);
    forward.x = sum;
    forward.residual = forward.sum = NULL;
    forward.y = z;
    CHECK(fastnorm_forward(&rows, &forward, NULL) == FASTNORM_OK && memcmp(y, z, sizeof y) == 0);
    backward.mean = row_mean;
    backward.rstd = row_rstd;
    backward.dx = wanted;
    CHECK(fastnorm_backward(&rows, &backward, NULL) == FASTNORM_OK);
    backward.dx = dx;
    backward.dsum = residual;
    CHECK(fastnorm_backward(&rows, &backward, NULL) == FASTNORM_OK);
    for (int at = 0; at < SIZE; at++) right = right && dx[at] == wanted[at] + residual[at];
    CHECK(right);
}

/* Padded sequences, channels first, against the packed ones. */
static void test_mask(void)
{
    enum { N = 3, C = 4, L = 17, VALID = 7 + 0 + 17 };
    static const int64_t lengths[N] = {7, 0, 17}, long_[N] = {7, 0, L + 1}, negative[N] = {7, -1, 2};
    static float in[N * C * L], grad[N * C * L], out[N * C * L], dout[N * C * L];
    static float packed[VALID * C], packed_grad[VALID * C], wanted[VALID * C], dwanted[VALID * C];
    static uint8_t mask[N * L];
    double batch_mean[C], batch_rstd[C], packed_mean[C], packed_rstd[C];
    float running[2][C] = {{0}}, sums[2][2][C];
    fastnorm_geometry sequences = {1, N, C, 1, L, 1};
    fastnorm_forward_args forward = forward_args();
    fastnorm_backward_args backward = backward_args();
    int at = 0;
    memset(mask, 9, sizeof mask);
    CHECK(fastnorm_mask_of_lengths(N, L, long_, mask) == FASTNORM_SIZE_OVERFLOW);
    CHECK(fastnorm_mask_of_lengths(N, L, negative, mask) == FASTNORM_NEGATIVE_SIZE);
    CHECK(fastnorm_mask_of_lengths(N, -1, lengths, mask) == FASTNORM_NEGATIVE_SIZE);
    CHECK(fastnorm_mask_of_lengths(N, INT64_MAX, lengths, mask) == FASTNORM_SIZE_OVERFLOW);
    CHECK(fastnorm_mask_of_lengths(N, L, NULL, mask) == FASTNORM_NULL_POINTER);
    CHECK(fastnorm_mask_of_lengths(N, L, lengths, NULL) == FASTNORM_NULL_POINTER);
    CHECK(mask[0] == 9 && memcmp(mask, mask + 1, sizeof mask - 1) == 0);
    CHECK(fastnorm_mask_of_lengths(0, L, NULL, NULL) == FASTNORM_OK);
    CHECK(fastnorm_mask_of_lengths(N, L, lengths, mask) == FASTNORM_OK);
    for (int n = 0; n < N; n++)
        for (int l = 0; l < L; l++) {
            CHECK(mask[n * L + l] == (l < lengths[n]));
            for (int c = 0; c < C; c++) {
                const int here = (n * C + c) * L + l;
                in[here] = l < lengths[n] ? (float)(here * 7 % 31) : NAN;
                grad[here] = l < lengths[n] ? (float)(here * 5 % 23) : NAN;
                if (l < lengths[n]) {
                    packed[at * C + c] = in[here];
                    packed_grad[at * C + c] = grad[here];
                }
            }
            at += l < lengths[n];
        }
    forward.x = in;
    forward.y = out;
    forward.mean = batch_mean;
    forward.var = NULL;
    forward.rstd = batch_rstd;
    forward.running_mean = running[0];
    forward.running_var = running[1];
    forward.momentum = 1;
    forward.mask = mask;
    CHECK(fastnorm_forward(&sequences, &forward, NULL) == FASTNORM_OK);
    CHECK(fastnorm_batch_norm(FASTNORM_FLOAT32, FASTNORM_NHWC, VALID, C, 1, packed, weight, bias,
                              1e-5, wanted, packed_mean, packed_rstd, NULL) == FASTNORM_OK);
    backward.dy = grad;
    backward.x = in;
    backward.dx = dout;
    backward.mean = batch_mean;
    backward.rstd = batch_rstd;
    backward.dweight = sums[0][0];
    backward.dbias = sums[0][1];
    backward.mask = mask;
    CHECK(fastnorm_backward(&sequences, &backward, NULL) == FASTNORM_OK);
    CHECK(fastnorm_batch_norm_backward(FASTNORM_FLOAT32, FASTNORM_NHWC, VALID, C, 1, packed_grad,
                                       packed, weight, packed_mean, packed_rstd, dwanted,
                                       sums[1][0], sums[1][1], NULL) == FASTNORM_OK);
    at = 0;
    for (int n = 0; n < N; n++)
        for (int l = 0; l < L; l++) {
            for (int c = 0; c < C; c++) {
                const int here = (n * C + c) * L + l;
                const int counts = l < lengths[n];
                const float y_wanted = counts ? wanted[at * C + c] : 0;
                const float dx_wanted = counts ? dwanted[at * C + c] : 0;
                CHECK(fabsf(out[here] - y_wanted) < 1e-5f && fabsf(dout[here] - dx_wanted) < 1e-5f);
            }
            at += l < lengths[n];
        }
    for (int c = 0; c < C; c++) {
        const double var = 1 / (packed_rstd[c] * packed_rstd[c]) - 1e-5;
        CHECK(fabs(batch_mean[c] - packed_mean[c]) < 1e-6);
        CHECK(fabs(running[0][c] - packed_mean[c]) < 1e-5);
        CHECK(fabs(running[1][c] - var * VALID / (VALID - 1.0)) < 1e-3);
        CHECK(fabsf(sums[0][0][c] - sums[1][0][c]) < 1e-3f && sums[0][1][c] == sums[1][1][c]);
    }
}

/* Ones and their negatives, of which each type holds the values exactly: bits of 1.0 are known. */
static void test_short_types(void)
{
    const struct {
        fastnorm_dtype dtype;
        uint16_t one, three; /* 1.0 and 3.0 */
    } types[] = {{FASTNORM_FLOAT16, 0x3c00, 0x4200}, {FASTNORM_BFLOAT16, 0x3f80, 0x4040}};
    enum { N = 70 };
    for (int t = 0; t < 2; t++) {
        uint16_t in[N], out[N + 1], w[N];
        double found_mean, found_rstd;
        int right = 1;
        for (int at = 0; at < N; at++) {
            in[at] = (uint16_t)(types[t].one | (at % 2 ? 0x8000 : 0));
            w[at] = types[t].three;
        }
        out[N] = 0x1234;
        CHECK(fastnorm_layer_norm(types[t].dtype, 1, N, in, w, NULL, 1e-30, out, &found_mean,
                                  &found_rstd, NULL) == FASTNORM_OK);
        for (int at = 0; at < N; at++)
            right = right && out[at] == (uint16_t)(types[t].three | (at % 2 ? 0x8000 : 0));
        CHECK(right);
        CHECK(out[N] == 0x1234);
        CHECK(found_mean == 0 && found_rstd == 1);
    }
}

static int pool_calls;

static void backwards_pool(void *user, int64_t n, void (*body)(void *, int64_t), void *context)
{
    *(int *)user += 1;
    for (int64_t index = n - 1; index >= 0; index--) body(context, index);
}

static void test_options(void)
{
    static float again[SIZE];
    static char odd[sizeof x + 4], odd_y[sizeof y + 4];
    fastnorm_forward_args args = forward_args();
    fastnorm_options options = default_options();
    size_t bytes = 0;
    char *memory;
    CHECK(fastnorm_forward(&shape, &args, NULL) == FASTNORM_OK);
    memcpy(again, y, sizeof y);
    CHECK(fastnorm_workspace_size(&shape, FASTNORM_FLOAT32, &bytes) == FASTNORM_OK && bytes > 0);
    memory = malloc(bytes + 1);
    memset(memory, 0xff, bytes + 1);
    options.workspace = memory + 1; /* of any alignment */
    options.workspace_size = bytes;
    options.num_threads = 2;
    options.parallel_for = backwards_pool;
    options.parallel_for_user = &pool_calls;
    poison();
    CHECK(fastnorm_forward(&shape, &args, &options) == FASTNORM_OK);
    CHECK(pool_calls > 0 && memcmp(again, y, sizeof y) == 0);
    memcpy(odd + 1, x, sizeof x); /* misaligned */
    args.x = odd + 1;
    args.y = odd_y + 3;
    options = default_options();
    CHECK(fastnorm_forward(&shape, &args, &options) == FASTNORM_OK);
    CHECK(memcmp(again, odd_y + 3, sizeof y) == 0);
    args.x = x;
    args.y = x; /* in place */
    options = default_options();
    CHECK(fastnorm_forward(&shape, &args, &options) == FASTNORM_OK);
    CHECK(memcmp(again, x, sizeof x) == 0);
    fill();
    free(memory);
}

typedef struct job {
    float *result;
    double mean[SETS], var[SETS], rstd[SETS];
    fastnorm_status status;
} job;

static void *run_job(void *argument)
{
    job *mine = argument;
    fastnorm_forward_args args = forward_args();
    args.y = mine->result;
    args.mean = mine->mean;
    args.var = mine->var;
    args.rstd = mine->rstd;
    mine->status = FASTNORM_OK;
    for (int turn = 0; turn < 20 && mine->status == FASTNORM_OK; turn++)
        mine->status = fastnorm_forward(&shape, &args, NULL);
    return NULL;
}

static void test_threads(void)
{
    enum { THREADS = 8 };
    static job jobs[THREADS];
    pthread_t ids[THREADS];
    fastnorm_forward_args args = forward_args();
    CHECK(fastnorm_forward(&shape, &args, NULL) == FASTNORM_OK);
    for (int t = 0; t < THREADS; t++) {
        jobs[t].result = malloc(sizeof y);
        CHECK(pthread_create(&ids[t], NULL, run_job, &jobs[t]) == 0);
    }
    for (int t = 0; t < THREADS; t++) {
        pthread_join(ids[t], NULL);
        CHECK(jobs[t].status == FASTNORM_OK && memcmp(jobs[t].result, y, sizeof y) == 0);
        free(jobs[t].result);
    }
}

static void test_fork(void)
{
    fastnorm_forward_args args = forward_args();
    int status = -1;
    pid_t child = fork();
    if (child == 0) {
        alarm(30);
        _exit(fastnorm_forward(&shape, &args, NULL) == FASTNORM_OK ? 0 : 1);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

int main(void)
{
    fill();
    test_errors();
    test_values();
    test_rows_without_mean();
    test_fusion();
    test_sum((fastnorm_geometry){SIZE / CHANNELS, 1, 1, CHANNELS, 1, 1});
    test_sum((fastnorm_geometry){1, 1, SIZE, 1, 1, 1});
    test_sum((fastnorm_geometry){1, 1, 1, SIZE, 1, 1});
    test_mask();
    test_short_types();
    test_options();
    test_threads();
    test_fork();
    CHECK(fastnorm_version() == FASTNORM_VERSION_MAJOR * 10000 + FASTNORM_VERSION_MINOR * 100 +
                                    FASTNORM_VERSION_PATCH);
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
