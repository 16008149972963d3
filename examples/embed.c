/* fastnorm from C: a batch norm, a group norm's backward, an error.
 *
 *     export PKG_CONFIG_PATH="$(fastnorm config --pkgconfigdir)"
 *     cc $(pkg-config --cflags fastnorm) embed.c $(pkg-config --libs fastnorm) -lm -o embed
 */
#include <fastnorm.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { N = 8, CHANNELS = 16, SPATIAL = 24 * 24, GROUPS = 4, SIZE = N * CHANNELS * SPATIAL };

static int failed(const char *what, fastnorm_status status)
{
    fprintf(stderr, "%s: %s\n", what, fastnorm_status_string(status));
    return EXIT_FAILURE;
}

int main(void)
{
    float *x = malloc(SIZE * sizeof *x), *y = malloc(SIZE * sizeof *y);
    float *dx = malloc(SIZE * sizeof *dx);
    float weight[CHANNELS], bias[CHANNELS], dweight[CHANNELS], dbias[CHANNELS];
    double mean[N * GROUPS], rstd[N * GROUPS], sum = 0, squares = 0, slope = 0;
    fastnorm_status status;
    if (!x || !y || !dx) return EXIT_FAILURE;
    for (int at = 0; at < SIZE; at++) x[at] = 100.0f + (float)(at * 7919 % 1000) / 100.0f;
    for (int c = 0; c < CHANNELS; c++) {
        weight[c] = 1.0f;
        bias[c] = 0.0f;
    }

    status = fastnorm_batch_norm(FASTNORM_FLOAT32, FASTNORM_NCHW, N, CHANNELS, SPATIAL, x, weight,
                                 bias, 1e-5, y, NULL, NULL, NULL);
    if (status != FASTNORM_OK) return failed("batch norm", status);
    for (int at = 0; at < SIZE; at++) {
        sum += y[at];
        squares += (double)y[at] * y[at];
    }
    printf("batch norm: mean %.1e, variance %.4f\n", sum / SIZE, squares / SIZE);
    if (fabs(sum / SIZE) > 1e-5 || fabs(squares / SIZE - 1) > 1e-4) return EXIT_FAILURE;

    status = fastnorm_group_norm(FASTNORM_FLOAT32, FASTNORM_NCHW, N, CHANNELS, SPATIAL, GROUPS, x,
                                 weight, bias, 1e-5, y, mean, rstd, NULL);
    if (status != FASTNORM_OK) return failed("group norm", status);
    /* y itself as its gradient: scaling x changes nothing, so that dx is orthogonal to x - mean. */
    status = fastnorm_group_norm_backward(FASTNORM_FLOAT32, FASTNORM_NCHW, N, CHANNELS, SPATIAL,
                                          GROUPS, y, x, weight, mean, rstd, dx, dweight, dbias,
                                          NULL);
    if (status != FASTNORM_OK) return failed("group norm backward", status);
    for (int at = 0; at < SIZE; at++) slope += (double)dx[at] * y[at];
    printf("group norm backward: dx . xhat = %.1e, dweight[0] = %.1f\n", slope, dweight[0]);
    if (fabs(slope) > 1e-1 || !(dweight[0] > 0)) return EXIT_FAILURE;

    status = fastnorm_group_norm(FASTNORM_FLOAT32, FASTNORM_NCHW, N, CHANNELS, SPATIAL, 5, x, weight,
                                 bias, 1e-5, y, NULL, NULL, NULL);
    printf("5 groups of 16 channels: %s\n", fastnorm_status_string(status));
    free(x);
    free(y);
    free(dx);
    return status == FASTNORM_NOT_DIVISIBLE ? EXIT_SUCCESS : EXIT_FAILURE;
}
