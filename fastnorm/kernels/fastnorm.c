/* The public calls: check everything, fill in every default, run the kernels.
 *
 * Nothing is written before the last check has passed. */
#include "fastnorm.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "task.h"

#define TRY(call)                                \
    do {                                         \
        fastnorm_status try_status = (call);     \
        if (try_status != FASTNORM_OK) return try_status; \
    } while (0)

/* Elsewhere `stream` of words.h is a plain store. */
#if defined(__SSE2__)
enum { HAS_STREAMING_STORES = 1 };
#else
enum { HAS_STREAMING_STORES = 0 };
#endif

/* Fused maps, and maps of rows whose inputs the last level may hold, ask for what lies so many bytes
 * ahead: processors do not look beyond a page. (0.5 to 1.0 of the time; where inputs come from memory
 * up to 1.15, in long runs of a channel up to 1.4.) */
enum { AHEAD = 8192 };

int32_t fastnorm_version(void)
{
    return FASTNORM_VERSION_MAJOR * 10000 + FASTNORM_VERSION_MINOR * 100 + FASTNORM_VERSION_PATCH;
}

const char *fastnorm_status_string(fastnorm_status status)
{
    switch ((int)status) {
    case FASTNORM_OK: return "success";
    case FASTNORM_NULL_POINTER: return "a required pointer is NULL";
    case FASTNORM_BAD_STRUCT_SIZE: return "struct_size is not the size of the struct";
    case FASTNORM_BAD_DTYPE: return "not a fastnorm_dtype";
    case FASTNORM_BAD_LAYOUT: return "not a fastnorm_layout";
    case FASTNORM_BAD_ISA: return "not a fastnorm_isa, or this processor lacks it";
    case FASTNORM_BAD_FLAGS: return "unknown flags, or flags that exclude each other";
    case FASTNORM_BAD_ACTIVATION: return "not a fastnorm_activation, or negative_slope is not finite";
    case FASTNORM_BAD_GEOMETRY: return "s is above 1, and one of o, g and i too";
    case FASTNORM_BAD_FUSION: return "sum, dsum or dresidual where this call has no use for it";
    case FASTNORM_NEGATIVE_SIZE: return "a size is negative";
    case FASTNORM_SIZE_OVERFLOW: return "the array would not fit the address space";
    case FASTNORM_NOT_DIVISIBLE: return "channels are not a multiple of groups";
    case FASTNORM_TOO_FEW_VALUES: return "the unbiased variance needs more than one value per channel";
    case FASTNORM_BAD_EPS: return "eps or momentum is not a finite number";
    case FASTNORM_OVERLAP: return "an output overlaps another buffer";
    case FASTNORM_WORKSPACE_TOO_SMALL: return "the workspace is smaller than fastnorm_workspace_size";
    case FASTNORM_OUT_OF_MEMORY: return "out of memory";
    }
    return "unknown status";
}

/* ---- checks ------------------------------------------------------------------------------ */

static fastnorm_status multiply(int64_t *product, int64_t factor)
{
    if (factor < 0) return FASTNORM_NEGATIVE_SIZE;
    if (__builtin_mul_overflow(*product, factor, product)) return FASTNORM_SIZE_OVERFLOW;
    return FASTNORM_OK;
}

/* Every product of sizes that is used anywhere fits, in bytes, also where another size is 0. */
static fastnorm_status check_geometry(const fastnorm_geometry *s)
{
    const int64_t sizes[] = {s->b, s->o, s->g, s->k, s->i, s->s};
    int64_t bytes = 64;
    for (int at = 0; at < 6; at++)
        if (sizes[at] < 0) return FASTNORM_NEGATIVE_SIZE;
    for (int at = 0; at < 6; at++) TRY(multiply(&bytes, sizes[at] > 0 ? sizes[at] : 1));
    if (s->s > 1 && (s->o != 1 || s->g != 1 || s->i != 1)) return FASTNORM_BAD_GEOMETRY;
    return FASTNORM_OK;
}

static fastnorm_status load_options(const fastnorm_options *given, fastnorm_options *options)
{
    memset(options, 0, sizeof *options);
    if (given) {
        if (given->struct_size != sizeof *options) return FASTNORM_BAD_STRUCT_SIZE;
        *options = *given;
    }
    if (options->num_threads < 0) return FASTNORM_NEGATIVE_SIZE;
    if (!fn_find_kernels(FASTNORM_FLOAT32, options->isa)) return FASTNORM_BAD_ISA;
    return FASTNORM_OK;
}

typedef struct span {
    const void *start;
    size_t bytes;
    unsigned twins; /* of an output: bit n allows span n to be the same */
} span;

static int overlap(span a, span b)
{
    uintptr_t from_a = (uintptr_t)a.start, from_b = (uintptr_t)b.start;
    return a.start && b.start && a.bytes && b.bytes && from_a < from_b + b.bytes &&
           from_b < from_a + a.bytes;
}

/* No span among the first `outputs` overlaps another one, but for its twins. */
static fastnorm_status check_overlap(const span *spans, int outputs, int count)
{
    for (int a = 0; a < outputs; a++)
        for (int b = a + 1; b < count; b++) {
            if (spans[a].twins >> b & 1 && spans[a].start == spans[b].start) continue;
            if (overlap(spans[a], spans[b])) return FASTNORM_OVERLAP;
        }
    return FASTNORM_OK;
}

/* ---- workspace --------------------------------------------------------------------------- */

/* Pieces of a workspace, each aligned to 64 bytes. With start NULL it only counts. */
typedef struct arena {
    char *start;
    size_t used;
} arena;

static void *take(arena *from, size_t bytes)
{
    char *piece = from->start ? from->start + from->used : NULL;
    from->used += (bytes + 63) & ~(size_t)63;
    return piece;
}

typedef struct pieces {
    double *mean, *var;       /* [g] */
    double *dweight, *dbias;  /* [g][k] */
    void *weight, *bias;      /* [g][k] */
    int64_t *counts;          /* [b] */
    void *scratch;
} pieces;

/* One row of channels that are a set each, as in inference of a single sample: as columns it takes 0.2
 * to 0.5 of the time from 64 channels on. Only rows know sums before the norm. */
static int one_row(const fn_task *task)
{
    return task->b == 1 && task->o == 1 && task->i == 1 && task->k == 1 && task->g > 1;
}

static int in_columns(const fn_task *task)
{
    if (one_row(task)) return !task->terms[0] && !task->dsum;
    return task->i == 1 && task->o > 1;
}

static size_t scratch_bytes(const fn_task *task, const fn_kernels *kernels)
{
    const fn_environment callers = fn_enter_environment(); /* the kernels' plans divide */
    size_t rows = 0, columns = 0;
    if (task->s > 1) {
        rows = kernels->across_scratch(task);
    } else {
        if (one_row(task) || !in_columns(task)) rows = kernels->rows_scratch(task);
        if (in_columns(task)) columns = kernels->columns_scratch(task);
    }
    fn_leave_environment(&callers);
    return rows > columns ? rows : columns;
}

/* Whether a mask cuts sets, rather than leaving out whole ones. */
static int has_counts(const fn_task *task) { return task->o * task->i > 1 || in_columns(task); }

static void lay_out(arena *from, const fn_task *task, int32_t dtype, const fn_kernels *kernels,
                    pieces *out)
{
    size_t groups = (size_t)task->g, channels = groups * (size_t)task->k;
    out->mean = take(from, groups * sizeof(double));
    out->var = take(from, groups * sizeof(double));
    out->dweight = take(from, channels * sizeof(double));
    out->dbias = take(from, channels * sizeof(double));
    out->weight = take(from, channels * fn_size_of(fn_work_dtype(dtype)));
    out->bias = take(from, channels * fn_size_of(fn_work_dtype(dtype)));
    out->counts = take(from, has_counts(task) ? (size_t)task->b * sizeof(int64_t) : 0);
    out->scratch = take(from, scratch_bytes(task, kernels));
}

static void set_geometry(fn_task *task, const fastnorm_geometry *s)
{
    memset(task, 0, sizeof *task);
    task->b = s->b;
    task->o = s->o;
    task->g = s->g;
    task->k = s->k;
    task->i = s->i;
    task->s = s->s > 1 ? s->s : 1;
    if (s->g == 1 && s->k == 1 && s->i == 1) { /* a single column is a run */
        task->i = s->o;
        task->o = 1;
    }
    task->l2 = fn_l2_bytes();
}

static int64_t sets_of(const fastnorm_geometry *s) { return s->b * s->g * (s->s > 1 ? s->s : 1); }

static int is_empty(const fastnorm_geometry *s)
{
    return s->b == 0 || s->o == 0 || s->g == 0 || s->k == 0 || s->i == 0;
}

enum { SLACK = 64 };

fastnorm_status fastnorm_workspace_size(const fastnorm_geometry *geometry, fastnorm_dtype dtype,
                                        size_t *bytes)
{
    fn_task task;
    arena count = {NULL, 0};
    pieces unused;
    if (!geometry || !bytes) return FASTNORM_NULL_POINTER;
    if (!fn_size_of(dtype)) return FASTNORM_BAD_DTYPE;
    TRY(check_geometry(geometry));
    set_geometry(&task, geometry);
    if (!is_empty(geometry))
        lay_out(&count, &task, dtype, fn_find_kernels(dtype, FASTNORM_ISA_BEST), &unused);
    *bytes = count.used + SLACK;
    return FASTNORM_OK;
}

/* The mask, and how much of it counts for each b. */
static void set_mask(fn_task *task, const uint8_t *mask, int64_t *counts)
{
    const int64_t n = task->o * task->i;
    task->mask = mask;
    if (!mask || !has_counts(task)) return;
    for (int64_t b = 0; b < task->b; b++, mask += n) {
        int64_t count = 0;
        for (int64_t at = 0; at < n; at++) count += mask[at] != 0;
        counts[b] = count;
    }
    task->counts = counts;
}

/* Of FN_STREAM_ALL runs of y, how many are streamed past the caches.
 *
 * None while all arrays fit half of the last-level cache, which may have other tenants, and does not
 * drop the oldest lines first. Plain stores over streaming, by the part of that cache that the arrays
 * fill: 1.3 to 1.8 at 0.8, 0.9 to 1.7 at 0.6, 0.4 to 1.2 at 0.4. Streaming over plain stores, of a
 * call and the one that reads its y: 0.7 to 1.1 at 0.75, 0.7 to 1.5 at 0.5, 0.8 to 2.1 at 0.25.
 *
 * Beyond, a forward streams what that half has no room for beside its inputs, a few runs of y between
 * others, so that memory is written while those are mapped: 0.8 to 1.0 of the time of streaming all.
 * Others stream all of it. (A part took a backward 0.93 to 1.13 times as long, Numba's kernels 0.85 to
 * 1.25, calls for which only the second level is nearer than memory 0.8 to 1.25, 1.06 in the mean.
 * There plain stores of calls that move 4 to 40 MB took, with the reader of their y, 1.05 to 1.4 times as
 * long where 400 MB of arrays are used in turn, as by a network; 0.8 to 1.25 where one set of arrays is
 * used again at once.) */
static int runs_to_stream(const fn_task *task, size_t traffic, size_t written)
{
    const size_t half = (size_t)fn_last_level_bytes() / 2, others = traffic - written;
    if (traffic <= half) return 0;
    if (task->dy || others >= half || task->near == task->l2) return FN_STREAM_ALL;
    return FN_STREAM_ALL - (int)(FN_STREAM_ALL * (half - others) / written);
}

/* The one place that decides between serial and parallel, plain and streaming stores.
 *
 * far: sums down columns ask for the next rows where the inputs are more than a quarter of the last
 * level (without, 1.0 to 1.4 times as long; below a quarter 0.94 to 1.0). beyond: rows with a weight
 * for each place ask for the next ones where the second-level caches no longer hold all arrays.
 * unseen: a processor that foresees what follows does so too late for memory, and for a last level as
 * far away. What is streamed asks AHEAD then, sums too (with 400 MB of arrays in turn, each call and the
 * reader of its y: rows, groups and inference that move 5 to 60 MB 0.88 to 1.0 of the time, training of
 * batch norm 0.91 to 1.02. Where one call follows itself, and finds up to 60 MB in the last level, 1.0
 * in the mean, rows of up to 1024 values 1.02 to 1.12. To read 100 MB from memory 0.65 to 0.8). */
static void choose_threads_and_stores(fn_task *task, const fastnorm_options *options, size_t size)
{
    size_t bytes = (size_t)(task->b * task->o * task->g * task->k * task->i * task->s) * size;
    size_t arrays = (task->dy ? 3 : 2) + (task->residual ? 1 : 0) + (task->terms[0] ? 2 : 0) +
                    (task->dsum ? 1 : 0) + (task->upstream && task->dy != task->y ? 1 : 0);
    size_t traffic = bytes * arrays, last_level = (size_t)fn_last_level_bytes();
    int apart = task->y != task->x && task->y != task->dy && task->y != task->residual &&
                task->y != task->dsum && task->y != task->terms[0] && task->y != task->terms[1];
    task->parallel_for = options->parallel_for;
    task->user = options->parallel_for_user;
    task->threads = options->num_threads ? options->num_threads : fn_available_threads();
    if (traffic < fn_serial_bytes(task)) task->threads = 1;
    task->near = fn_near_bytes(task->threads);
    const int distant = task->near == task->l2;
    task->stream = HAS_STREAMING_STORES && apart ? runs_to_stream(task, traffic, bytes) : 0;
    task->foreseen = fn_foresees();
    task->far = bytes * (task->dy ? 2 : 1) > last_level / 4;
    task->beyond = task->stream || (int64_t)traffic > task->threads * task->l2;
    task->unseen = task->foreseen && task->stream && (distant || traffic > last_level);
    task->ahead = task->stream && (task->unseen || bytes * (arrays - 1) <= last_level)
                      ? AHEAD / (int)size : 0;
}

/* ---- forward ----------------------------------------------------------------------------- */

static void zero(double *array, int64_t n)
{
    if (array && n) memset(array, 0, (size_t)n * sizeof *array);
}

static size_t mask_bytes(const fastnorm_geometry *s)
{
    return (size_t)(s->b * s->o * s->i * (s->s > 1 ? s->s : 1));
}

static fastnorm_status check_activation(int32_t activation, double negative_slope)
{
    if (activation < FASTNORM_NO_ACTIVATION || activation > FASTNORM_GELU_TANH ||
        !isfinite(negative_slope))
        return FASTNORM_BAD_ACTIVATION;
    return FASTNORM_OK;
}

static fastnorm_status check_forward(const fastnorm_geometry *s, const fastnorm_forward_args *a,
                                     const fastnorm_options *options, int32_t params)
{
    const int given = a->flags & FASTNORM_GIVEN_STATISTICS;
    const size_t size = fn_size_of(a->dtype), sets = (size_t)sets_of(s);
    const size_t bytes = sets * (size_t)(s->o * s->k * s->i) * size;
    const size_t channels = (size_t)(s->g * s->k) * fn_size_of(params);
    const size_t running = (size_t)s->g * fn_size_of(params);
    if (!size || !fn_size_of(params)) return FASTNORM_BAD_DTYPE;
    if (a->flags & ~(FASTNORM_NO_MEAN | FASTNORM_GIVEN_STATISTICS | FASTNORM_BIASED_RUNNING_VAR))
        return FASTNORM_BAD_FLAGS;
    if (given && (s->b != 1 || s->s > 1 || a->flags & FASTNORM_NO_MEAN)) return FASTNORM_BAD_FLAGS;
    if (s->s > 1 && (a->running_mean || a->running_var)) return FASTNORM_BAD_FLAGS;
    if (!isfinite(a->eps) || !isfinite(a->momentum)) return FASTNORM_BAD_EPS;
    TRY(check_activation(a->activation, a->negative_slope));
    if (a->sum && (!a->residual || given || s->o != 1 || s->i != 1 || s->s > 1))
        return FASTNORM_BAD_FUSION;
    if (bytes && (!a->x || !a->y)) return FASTNORM_NULL_POINTER;
    if (given && s->g && (!a->running_mean || !a->running_var)) return FASTNORM_NULL_POINTER;
    if (!given && s->b > 1 && bytes &&
        ((a->running_mean && !a->mean) || (a->running_var && !a->var)))
        return FASTNORM_NULL_POINTER;
    if (!given && a->running_var && bytes && s->o * s->k * s->i == 1 &&
        !(a->flags & FASTNORM_BIASED_RUNNING_VAR))
        return FASTNORM_TOO_FEW_VALUES;
    {
        enum { OUTPUTS = 8, X = OUTPUTS, RESIDUAL, COUNT = OUTPUTS + 7 };
        const unsigned elementwise = 1u << X | 1u << RESIDUAL;
        const span moved[COUNT] = {{a->y, bytes, elementwise},
                                   {a->sum, bytes, elementwise},
                                   {a->mean, sets * sizeof(double), 0},
                                   {a->var, sets * sizeof(double), 0},
                                   {a->rstd, sets * sizeof(double), 0},
                                   {options->workspace, options->workspace_size, 0},
                                   {given ? NULL : a->running_mean, running, 0},
                                   {given ? NULL : a->running_var, running, 0},
                                   {a->x, bytes, 0},
                                   {a->residual, bytes, 0},
                                   {a->weight, channels, 0},
                                   {a->bias, channels, 0},
                                   {given ? a->running_mean : NULL, running, 0},
                                   {given ? a->running_var : NULL, running, 0},
                                   {a->mask, mask_bytes(s), 0}};
        return check_overlap(moved, OUTPUTS, COUNT);
    }
}

/* The caller's workspace, or a fresh one, which *allocated then names. */
static fastnorm_status open_workspace(const fastnorm_geometry *s, int32_t dtype,
                                      const fastnorm_options *options, arena *from,
                                      void **allocated)
{
    size_t bytes;
    void *start = options->workspace;
    *allocated = NULL;
    TRY(fastnorm_workspace_size(s, (fastnorm_dtype)dtype, &bytes));
    if (start) {
        if (options->workspace_size < bytes) return FASTNORM_WORKSPACE_TOO_SMALL;
    } else {
        start = *allocated = malloc(bytes);
        if (!start) return FASTNORM_OUT_OF_MEMORY;
    }
    from->start = (char *)(((uintptr_t)start + 63) & ~(uintptr_t)63);
    from->used = 0;
    return FASTNORM_OK;
}

fastnorm_status fastnorm_forward(const fastnorm_geometry *geometry,
                                 const fastnorm_forward_args *args,
                                 const fastnorm_options *given_options)
{
    fastnorm_options options;
    fn_task task;
    arena from;
    pieces part;
    void *allocated;
    int32_t params;
    if (!geometry || !args) return FASTNORM_NULL_POINTER;
    if (args->struct_size != sizeof *args) return FASTNORM_BAD_STRUCT_SIZE;
    params = args->param_dtype ? args->param_dtype : args->dtype;
    TRY(load_options(given_options, &options));
    TRY(check_geometry(geometry));
    TRY(check_forward(geometry, args, &options, params));
    if (is_empty(geometry)) {
        zero(args->mean, sets_of(geometry));
        zero(args->var, sets_of(geometry));
        zero(args->rstd, sets_of(geometry));
        return FASTNORM_OK;
    }
    TRY(open_workspace(geometry, args->dtype, &options, &from, &allocated));

    const fn_environment callers = fn_enter_environment();
    const fn_kernels *kernels = fn_find_kernels(args->dtype, options.isa);
    set_geometry(&task, geometry);
    lay_out(&from, &task, args->dtype, kernels, &part);
    task.has_mean = !(args->flags & FASTNORM_NO_MEAN);
    task.scaled = !task.has_mean && !args->bias;
    task.given = (args->flags & FASTNORM_GIVEN_STATISTICS) != 0;
    task.x = args->sum ? args->sum : args->x;
    task.y = args->y;
    task.activation = args->activation;
    task.slope = args->negative_slope;
    if (args->sum) {
        task.terms[0] = args->x;
        task.terms[1] = args->residual;
    } else {
        task.residual = args->residual;
    }
    task.weight = fn_parameters(args->weight, params, 1, part.weight, args->dtype, geometry);
    task.bias = fn_parameters(args->bias, params, 0, part.bias, args->dtype, geometry);
    set_mask(&task, args->mask, part.counts);
    task.fused = task.activation || task.residual || task.mask;
    task.eps = args->eps;
    task.mean = args->mean;
    task.var = args->var;
    task.rstd = args->rstd;
    task.scratch = part.scratch;
    if (task.given || (geometry->b == 1 && task.s == 1)) {
        if (task.given || !task.mean) task.mean = part.mean;
        if (task.given || !task.var) task.var = part.var;
    }
    if (task.given) {
        const int64_t n = geometry->g;
        fn_get_all(task.mean, args->running_mean, params, n);
        fn_get_all(task.var, args->running_var, params, n);
        if (args->mean) memcpy(args->mean, task.mean, (size_t)n * sizeof *task.mean);
        if (args->var) memcpy(args->var, task.var, (size_t)n * sizeof *task.var);
        for (int64_t g = 0; args->rstd && g < n; g++)
            args->rstd[g] = 1.0 / sqrt(task.var[g] + task.eps);
    }
    choose_threads_and_stores(&task, &options, fn_size_of(args->dtype));
    (task.s > 1 ? kernels->across_forward
     : in_columns(&task) ? kernels->columns_forward : kernels->rows_forward)(&task);
    if (!task.given) {
        const int unbiased = !(args->flags & FASTNORM_BIASED_RUNNING_VAR);
        fn_move_running(args->running_mean, params, task.mean, 0, args->momentum, &task);
        fn_move_running(args->running_var, params, task.var, unbiased, args->momentum, &task);
    }
    fn_leave_environment(&callers);
    free(allocated);
    return FASTNORM_OK;
}

/* ---- backward ---------------------------------------------------------------------------- */

static fastnorm_status check_backward(const fastnorm_geometry *s, const fastnorm_backward_args *a,
                                      const fastnorm_options *options, int32_t params)
{
    const size_t size = fn_size_of(a->dtype), sets = (size_t)sets_of(s);
    const size_t bytes = sets * (size_t)(s->o * s->k * s->i) * size;
    const size_t channels = (size_t)(s->g * s->k) * fn_size_of(params);
    if (!size || !fn_size_of(params)) return FASTNORM_BAD_DTYPE;
    if (a->flags & ~(FASTNORM_NO_MEAN | FASTNORM_GIVEN_STATISTICS)) return FASTNORM_BAD_FLAGS;
    TRY(check_activation(a->activation, a->negative_slope));
    if (a->dsum && (s->o != 1 || s->i != 1 || s->s > 1)) return FASTNORM_BAD_FUSION;
    if (a->dresidual && !a->activation) return FASTNORM_BAD_FUSION;
    if (bytes && (!a->dy || !a->x || !a->dx || !a->rstd)) return FASTNORM_NULL_POINTER;
    if (bytes && !a->mean && !(a->flags & FASTNORM_NO_MEAN)) return FASTNORM_NULL_POINTER;
    {
        enum { OUTPUTS = 5, DY = OUTPUTS, X, RESIDUAL, DSUM, COUNT = OUTPUTS + 9 };
        const int active = a->activation != FASTNORM_NO_ACTIVATION;
        const unsigned elementwise = 1u << DY | 1u << RESIDUAL;
        const span moved[COUNT] = {
            {a->dx, bytes, elementwise | (!active || a->dresidual ? 1u << X | 1u << DSUM : 0)},
            {a->dresidual, bytes, elementwise},
            {a->dweight, channels, 0},
            {a->dbias, channels, 0},
            {options->workspace, options->workspace_size, 0},
            {a->dy, bytes, 0},
            {a->x, bytes, 0},
            {active ? a->residual : NULL, bytes, 0},
            {a->dsum, bytes, 0},
            {a->weight, channels, 0},
            {active ? a->bias : NULL, channels, 0},
            {a->mean, sets * sizeof(double), 0},
            {a->rstd, sets * sizeof(double), 0},
            {a->mask, mask_bytes(s), 0}};
        return check_overlap(moved, OUTPUTS, COUNT);
    }
}

/* dweight and dbias of many channels go to the caller from all threads, for each has its own of them
 * in its cache (layer norm of 16x4096 0.7 of the time). */
enum { GRADIENTS = 2048 };

typedef struct gradients {
    const fastnorm_backward_args *args;
    const pieces *part;
    int64_t channels;
    int32_t dtype;
} gradients;

static void put_gradients(void *context, int64_t index)
{
    const gradients *all = context;
    const int64_t first = index * GRADIENTS, left = all->channels - first;
    const int64_t n = left < GRADIENTS ? left : GRADIENTS;
    char *dweight = all->args->dweight, *dbias = all->args->dbias;
    const size_t skip = (size_t)first * fn_size_of(all->dtype);
    if (dweight) fn_put_all(dweight + skip, all->dtype, all->part->dweight + first, n);
    if (dbias) fn_put_all(dbias + skip, all->dtype, all->part->dbias + first, n);
}

fastnorm_status fastnorm_backward(const fastnorm_geometry *geometry,
                                  const fastnorm_backward_args *args,
                                  const fastnorm_options *given_options)
{
    fastnorm_options options;
    fn_task task;
    arena from;
    pieces part;
    void *allocated;
    int32_t params;
    if (!geometry || !args) return FASTNORM_NULL_POINTER;
    if (args->struct_size != sizeof *args) return FASTNORM_BAD_STRUCT_SIZE;
    params = args->param_dtype ? args->param_dtype : args->dtype;
    TRY(load_options(given_options, &options));
    TRY(check_geometry(geometry));
    TRY(check_backward(geometry, args, &options, params));

    const int64_t channels = geometry->g * geometry->k;
    if (is_empty(geometry)) {
        fn_put_all(args->dweight, params, NULL, channels);
        fn_put_all(args->dbias, params, NULL, channels);
        return FASTNORM_OK;
    }
    TRY(open_workspace(geometry, args->dtype, &options, &from, &allocated));

    const fn_environment callers = fn_enter_environment();
    const fn_kernels *kernels = fn_find_kernels(args->dtype, options.isa);
    set_geometry(&task, geometry);
    lay_out(&from, &task, args->dtype, kernels, &part);
    task.has_mean = !(args->flags & FASTNORM_NO_MEAN);
    task.scaled = !task.has_mean && !args->dbias;
    task.given = (args->flags & FASTNORM_GIVEN_STATISTICS) != 0;
    task.x = args->x;
    task.dy = args->dy;
    task.y = args->dx;
    task.weight = fn_parameters(args->weight, params, 1, part.weight, args->dtype, geometry);
    task.bias = fn_parameters(args->activation ? args->bias : NULL, params, 0, part.bias,
                              args->dtype, geometry);
    task.dsum = args->dsum;
    set_mask(&task, args->mask, part.counts);
    if (args->activation) {
        task.activation = args->activation;
        task.slope = args->negative_slope;
        task.residual = args->residual;
        task.gated = args->activation == FASTNORM_RELU && !args->residual && !args->dresidual &&
                     !args->mask && task.s == 1;
        if (!task.gated) {
            task.upstream = args->dy;
            task.dy = args->dresidual ? args->dresidual : args->dx;
        }
    }
    task.mean = (double *)args->mean; /* a backward only reads them */
    task.rstd = (double *)args->rstd;
    task.dweight = part.dweight;
    task.dbias = part.dbias;
    task.scratch = part.scratch;
    choose_threads_and_stores(&task, &options, fn_size_of(args->dtype));
    (task.s > 1 ? kernels->across_backward
     : in_columns(&task) ? kernels->columns_backward : kernels->rows_backward)(&task);
    gradients all = {args, &part, channels, params};
    fn_parallel_for(&task, (channels + GRADIENTS - 1) / GRADIENTS, put_gradients, &all, 0);
    fn_leave_environment(&callers);
    free(allocated);
    return FASTNORM_OK;
}
