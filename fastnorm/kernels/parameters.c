/* Parameters and running statistics: arrays of any element type of fastnorm.h. */
#include <string.h>

#include "short.h"
#include "task.h"

size_t fn_size_of(int32_t dtype)
{
    switch (dtype) {
    case FASTNORM_FLOAT32: return 4;
    case FASTNORM_FLOAT64: return 8;
    case FASTNORM_FLOAT16:
    case FASTNORM_BFLOAT16: return 2;
    default: return 0;
    }
}

int32_t fn_work_dtype(int32_t dtype)
{
    return dtype == FASTNORM_FLOAT64 ? FASTNORM_FLOAT64 : FASTNORM_FLOAT32;
}

static double get(const void *array, int32_t dtype, int64_t at)
{
    switch (dtype) {
    case FASTNORM_FLOAT32: {
        float value;
        memcpy(&value, (const char *)array + at * 4, sizeof value);
        return value;
    }
    case FASTNORM_FLOAT64: {
        double value;
        memcpy(&value, (const char *)array + at * 8, sizeof value);
        return value;
    }
    default: {
        uint16_t bits;
        memcpy(&bits, (const char *)array + at * 2, sizeof bits);
        return dtype == FASTNORM_FLOAT16 ? fn_widen_float16(bits) : fn_widen_bfloat16(bits);
    }
    }
}

static void put(void *array, int32_t dtype, int64_t at, double value)
{
    const float narrowed = (float)value;
    if (dtype == FASTNORM_FLOAT32) {
        memcpy((char *)array + at * 4, &narrowed, sizeof narrowed);
    } else if (dtype == FASTNORM_FLOAT64) {
        memcpy((char *)array + at * 8, &value, sizeof value);
    } else {
        const uint16_t bits = dtype == FASTNORM_FLOAT16 ? fn_narrow_float16(narrowed)
                                                        : fn_narrow_bfloat16(narrowed);
        memcpy((char *)array + at * 2, &bits, sizeof bits);
    }
}

void fn_get_all(double *values, const void *array, int32_t dtype, int64_t n)
{
    if (dtype == FASTNORM_FLOAT32) {
        for (int64_t at = 0; at < n; at++) values[at] = get(array, FASTNORM_FLOAT32, at);
    } else {
        for (int64_t at = 0; at < n; at++) values[at] = get(array, dtype, at);
    }
}

/* To the working type from another. A loop for each, so that it is one of vectors: weights of 16 bits, or
 * dweight and dbias of 4096, took longer than a small call's sums otherwise. */
static void copy_all(void *to, int32_t to_dtype, const void *from, int32_t from_dtype, int64_t n)
{
    const fn_short *bits = from;
    float *narrow = to; /* of a workspace */
    if (to_dtype == FASTNORM_FLOAT64) {
        fn_get_all(to, from, from_dtype, n);
    } else if (from_dtype == FASTNORM_BFLOAT16) {
        for (int64_t at = 0; at < n; at++) narrow[at] = fn_widen_bfloat16(bits[at]);
    } else if (from_dtype == FASTNORM_FLOAT16) {
        for (int64_t at = 0; at < n; at++) narrow[at] = fn_widen_float16(bits[at]);
    } else {
        for (int64_t at = 0; at < n; at++) narrow[at] = (float)get(from, from_dtype, at);
    }
}

void fn_put_all(void *array, int32_t dtype, const double *values, int64_t n)
{
    if (!array) return;
    if (dtype == FASTNORM_FLOAT32) {
        for (int64_t at = 0; at < n; at++) {
            float narrowed = values ? (float)values[at] : 0.0f;
            memcpy((char *)array + at * 4, &narrowed, sizeof narrowed);
        }
    } else if (!values) {
        memset(array, 0, (size_t)n * fn_size_of(dtype));
    } else if (dtype == FASTNORM_FLOAT64) {
        memcpy(array, values, (size_t)n * sizeof *values);
    } else if (dtype == FASTNORM_BFLOAT16) {
        fn_short *bits = array;
        for (int64_t at = 0; at < n; at++) bits[at] = fn_narrow_bfloat16((float)values[at]);
    } else {
        for (int64_t at = 0; at < n; at++) put(array, dtype, at, values[at]);
    }
}

static void fill(void *array, int32_t dtype, double value, int64_t n)
{
    float *narrow = array;
    double *wide = array;
    for (int64_t at = 0; at < n; at++)
        if (dtype == FASTNORM_FLOAT32) narrow[at] = (float)value;
        else wide[at] = value;
}

/* Where many rows are multiplied by them in turn, a copy that starts at a cache line: loads that
 * straddle two make the whole call take 1.05 to 1.15 times as long in cache. */
const void *fn_parameters(const void *given, int32_t param_dtype, double otherwise, void *copy,
                          int32_t dtype, const fastnorm_geometry *s)
{
    const int64_t n = s->g * s->k;
    const int32_t work = fn_work_dtype(dtype);
    const size_t size = fn_size_of(work), start = s->i == 1 && s->o == 1 && s->b > 64 ? 64 : size;
    if (given && param_dtype == work) {
        if ((uintptr_t)given % start == 0) return given;
        memcpy(copy, given, (size_t)n * size);
    } else if (given) {
        copy_all(copy, work, given, param_dtype, n);
    } else {
        fill(copy, work, otherwise, n);
    }
    return copy;
}

/* Values of a set of b. */
static double values_of(const fn_task *task, int64_t b)
{
    if (!task->mask) return (double)(task->o * task->k * task->i);
    return (double)(task->k * (task->counts ? task->counts[b] : task->mask[b] != 0));
}

void fn_move_running(void *running, int32_t dtype, const double *batch, int unbiased,
                     double momentum, const fn_task *task)
{
    enum { BLOCK = 256 };
    double now[BLOCK], mean[BLOCK];
    int64_t sets = 0;
    if (!running) return;
    for (int64_t b = 0; b < task->b; b++) sets += values_of(task, b) > 0;
    for (int64_t first = 0; sets && first < task->g; first += BLOCK) {
        const int64_t n = task->g - first < BLOCK ? task->g - first : BLOCK;
        void *at = (char *)running + (size_t)first * fn_size_of(dtype);
        memset(mean, 0, sizeof mean);
        for (int64_t b = 0; b < task->b; b++) {
            const double count = values_of(task, b);
            const double factor = unbiased && count > 1 ? count / (count - 1.0) : 1.0;
            for (int64_t j = 0; j < n; j++) mean[j] += batch[b * task->g + first + j] * factor;
        }
        fn_get_all(now, at, dtype, n);
        for (int64_t j = 0; j < n; j++)
            now[j] = (1.0 - momentum) * now[j] + momentum * (mean[j] / (double)sets);
        fn_put_all(at, dtype, now, n);
    }
}
