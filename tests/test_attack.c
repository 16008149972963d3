/* libfastnorm attacked: buffers against unreadable pages, allocations that fail, random bad calls,
 * and what belongs to the caller looked at before and after.
 *
 * Prints a line for each failed check and one with the counts, and a digest of the results, which are
 * the same bits on every processor. */
#define _GNU_SOURCE
#include <fastnorm.h>

#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

static int passed, failed;

static int check(int holds, const char *what, int line)
{
    if (holds) {
        passed++;
    } else {
        failed++;
        printf("line %d: %s\n", line, what);
    }
    return holds;
}

#define CHECK(condition) check((condition), #condition, __LINE__)

static uint32_t state = 1;

static uint32_t random_bits(void)
{
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static int64_t below(int64_t n) { return (int64_t)(random_bits() % (uint32_t)n); }

/* ---- buffers ------------------------------------------------------------------------------- */

enum { X, DY, RESIDUAL, DSUM, WEIGHT, BIAS, MASK, INPUTS, Y = INPUTS, SUM, DX, DRESIDUAL, DWEIGHT, DBIAS,
       MEAN, VAR, RSTD, BUFFERS };

typedef struct buffer {
    char *start;
    size_t bytes;
    void *mapping;
    size_t mapped;
} buffer;

typedef enum place { ORDINARY, PAGE_BEHIND, PAGE_BEFORE } place;

/* A buffer that ends, or begins, where reading or writing one byte more is a signal. */
static buffer allocate(size_t bytes, place where)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page;
    buffer made = {NULL, bytes, NULL, (pages + 2) * page};
    made.mapping = mmap(NULL, made.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made.mapping == MAP_FAILED) abort();
    made.start = (char *)made.mapping + page;
    if (where == PAGE_BEHIND) made.start += pages * page - bytes;
    if (where != ORDINARY) {
        mprotect(made.mapping, page, PROT_NONE);
        mprotect((char *)made.mapping + (pages + 1) * page, page, PROT_NONE);
    }
    return made;
}

/* ---- one problem, run in different places ---------------------------------------------------- */

typedef struct problem {
    fastnorm_geometry shape;
    int32_t dtype, flags, activation;
    int residual, sum, mask;
} problem;

static size_t size_of(int32_t dtype)
{
    return dtype == FASTNORM_FLOAT64 ? 8 : dtype == FASTNORM_FLOAT32 ? 4 : 2;
}

static size_t count_of(const problem *p, int which)
{
    const fastnorm_geometry *s = &p->shape;
    if (which == WEIGHT || which == BIAS || which == DWEIGHT || which == DBIAS)
        return (size_t)(s->g * s->k);
    if (which >= MEAN) return (size_t)(s->b * s->g * (s->s > 1 ? s->s : 1));
    if (which == MASK) return (size_t)(s->b * s->o * s->i * (s->s > 1 ? s->s : 1));
    return (size_t)(s->b * s->o * s->g * s->k * s->i * (s->s > 1 ? s->s : 1));
}

static void store(buffer *into, size_t at, int32_t dtype, float value)
{
    const double wide = value;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (dtype == FASTNORM_FLOAT64) {
        memcpy(into->start + 8 * at, &wide, 8);
    } else if (dtype == FASTNORM_FLOAT32) {
        memcpy(into->start + 4 * at, &value, 4);
    } else {
        /* Values between 1 and 2, or their negatives, cut off. */
        const uint16_t brain = (uint16_t)(bits >> 16);
        const uint16_t half = (uint16_t)((brain & 0x8000) | 0x3c00 | (bits >> 13 & 0x3ff));
        memcpy(into->start + 2 * at, dtype == FASTNORM_BFLOAT16 ? &brain : &half, 2);
    }
}

static fastnorm_status run(const problem *p, buffer *all, const fastnorm_options *options)
{
    fastnorm_forward_args f;
    fastnorm_backward_args b;
    fastnorm_status status;
    memset(&f, 0, sizeof f);
    f.struct_size = sizeof f;
    f.dtype = p->dtype;
    f.flags = p->flags;
    f.activation = p->activation;
    f.negative_slope = 0.25;
    f.eps = 1e-5;
    f.x = all[X].start;
    f.residual = p->residual ? all[RESIDUAL].start : NULL;
    f.sum = p->sum ? all[SUM].start : NULL;
    f.mask = p->mask ? (const uint8_t *)all[MASK].start : NULL;
    f.weight = all[WEIGHT].start;
    f.bias = all[BIAS].start;
    f.y = all[Y].start;
    f.mean = (double *)all[MEAN].start;
    f.var = (double *)all[VAR].start;
    f.rstd = (double *)all[RSTD].start;
    status = fastnorm_forward(&p->shape, &f, options);
    if (status != FASTNORM_OK) return status;
    memset(&b, 0, sizeof b);
    b.struct_size = sizeof b;
    b.dtype = p->dtype;
    b.flags = p->flags;
    b.activation = p->activation;
    b.negative_slope = 0.25;
    b.dy = all[DY].start;
    b.x = p->sum ? f.sum : f.x;
    b.weight = f.weight;
    b.bias = f.bias;
    b.mean = f.mean;
    b.rstd = f.rstd;
    b.dx = all[DX].start;
    b.dweight = all[DWEIGHT].start;
    b.dbias = all[DBIAS].start;
    b.residual = p->residual && !p->sum ? f.residual : NULL;
    b.dresidual = p->residual && !p->sum && p->activation ? all[DRESIDUAL].start : NULL;
    b.dsum = p->sum ? all[DSUM].start : NULL;
    b.mask = f.mask;
    return fastnorm_backward(&p->shape, &b, options);
}

static size_t element_of(const problem *p, int which)
{
    return which >= MEAN ? sizeof(double) : which == MASK ? 1 : size_of(p->dtype);
}

static void open_buffers(const problem *p, buffer *all, place where)
{
    for (int which = 0; which < BUFFERS; which++) {
        const size_t count = count_of(p, which), size = element_of(p, which);
        all[which] = allocate(count * size, where);
        state = (uint32_t)which;
        for (size_t at = 0; which == MASK && at < count; at++) {
            /* Whole stretches that count, that do not, and mixed ones. */
            const int stretch = (int)(at / 37 % 3);
            all[MASK].start[at] = (char)(stretch == 2 ? (int)(random_bits() % 2) : stretch);
        }
        for (size_t at = 0; which < MASK && at < count; at++) {
            const float value = 1 + (float)random_bits() / (1 << 24);
            store(&all[which], at, p->dtype, which != WEIGHT && random_bits() % 2 ? -value : value);
        }
    }
}

static void close_buffers(buffer *all)
{
    for (int which = 0; which < BUFFERS; which++) munmap(all[which].mapping, all[which].mapped);
}

static int same_bits(const buffer *a, const buffer *b)
{
    for (int which = INPUTS; which < BUFFERS; which++)
        if (memcmp(a[which].start, b[which].start, a[which].bytes)) return 0;
    return 1;
}

/* FNV-1a of elements, not of bytes, whose order is the processor's. */
static uint64_t digest = 0xcbf29ce484222325;

static uint64_t bits_at(const char *at, size_t size)
{
    uint16_t two;
    uint32_t four;
    uint64_t eight;
    if (size == 2) return memcpy(&two, at, size), two;
    if (size == 4) return memcpy(&four, at, size), four;
    return memcpy(&eight, at, size), eight;
}

static void digest_results(const problem *p, const buffer *all)
{
    for (int which = INPUTS; which < BUFFERS; which++)
        for (size_t at = 0, size = element_of(p, which); at < all[which].bytes; at += size)
            digest = (digest ^ bits_at(all[which].start + at, size)) * 0x100000001b3;
}

static void test_guard_pages(const problem *p)
{
    buffer wanted[BUFFERS], found[BUFFERS];
    fastnorm_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    open_buffers(p, wanted, ORDINARY);
    CHECK(run(p, wanted, NULL) == FASTNORM_OK);
    digest_results(p, wanted);
    for (options.isa = 0; options.isa <= FASTNORM_ISA_V4; options.isa++)
        for (place where = PAGE_BEHIND; where <= PAGE_BEFORE; where++) {
            fastnorm_status status;
            state = 7;
            options.num_threads = 1 + options.isa % 3;
            open_buffers(p, found, where);
            status = run(p, found, &options);
            if (status != FASTNORM_BAD_ISA &&
                !CHECK(status == FASTNORM_OK && same_bits(wanted, found)))
                printf("  shape %d %d %d %d %d %d, dtype %d, flags %d, activation %d, mask %d, "
                       "level %d\n",
                       (int)p->shape.b, (int)p->shape.o, (int)p->shape.g, (int)p->shape.k,
                       (int)p->shape.i, (int)p->shape.s, p->dtype, p->flags, p->activation,
                       p->mask, options.isa);
            close_buffers(found);
        }
    close_buffers(wanted);
}

static void test_shapes(int turns)
{
    static const int64_t sizes[] = {1, 1, 1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 49, 63, 65, 100, 129};
    static const fastnorm_geometry large[] = {
        {1, 3, 2, 1, 40001, 1}, {2, 1, 1, 70001, 1, 1}, {1, 4001, 17, 1, 1, 1},
        {1, 40, 70, 1, 49, 1}, {1, 1, 1, 50, 1, 1500}, {1, 70, 11, 1, 35, 1},
        {1, 260, 60, 1, 36, 1}, {1, 1, 1, 600, 1, 130}, {1, 1, 1300, 1, 1, 1}};
    for (int turn = 0; turn < turns; turn++) {
        problem p;
        uint32_t seed = (uint32_t)turn * 2654435761u + 1;
        memset(&p, 0, sizeof p);
        state = seed;
        do {
            int64_t *axis[] = {&p.shape.b, &p.shape.o, &p.shape.g, &p.shape.k, &p.shape.i};
            for (int at = 0; at < 5; at++) *axis[at] = sizes[below(sizeof sizes / sizeof *sizes)];
            if (below(2)) p.shape.i = 1;
            if (below(3) == 0) p.shape.o = p.shape.i = 1;
            if (below(4) == 0) p.shape.o = p.shape.g = p.shape.i = 1;
        } while (p.shape.b * p.shape.o * p.shape.g * p.shape.k * p.shape.i > 20000);
        if (p.shape.o == 1 && p.shape.g == 1 && p.shape.i == 1 && below(2))
            p.shape.s = sizes[below(sizeof sizes / sizeof *sizes)];
        if (turn % 9 == 0) p.shape = large[turn / 9 % 9];
        p.dtype = FASTNORM_FLOAT32 + turn % 4;
        p.flags = below(4) == 0 ? FASTNORM_NO_MEAN : 0;
        p.activation = (int32_t)below(6);
        p.residual = (int)below(2);
        p.sum = p.residual && p.shape.o == 1 && p.shape.i == 1 && p.shape.s < 2 && below(2);
        p.mask = below(3) == 0;
        test_guard_pages(&p);
    }
}

/* ---- allocations ----------------------------------------------------------------------------- */

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define COUNTED_MALLOC 1
extern void *__libc_malloc(size_t);
extern void __libc_free(void *);
static int counting, allocations, releases, failing; /* the failing-th returns NULL */

void *malloc(size_t bytes)
{
    if (counting && ++allocations == failing) return NULL;
    return __libc_malloc(bytes);
}

void free(void *memory)
{
    if (counting && memory) releases++;
    __libc_free(memory);
}
#endif

static void test_allocations(void)
{
#if defined(COUNTED_MALLOC)
    const problem p = {{3, 1, 5, 4, 50, 1}, FASTNORM_FLOAT32, 0, FASTNORM_SILU, 1, 0, 1};
    buffer all[BUFFERS], before[BUFFERS];
    fastnorm_options options;
    size_t bytes = 0;
    void *volatile memory;
    fastnorm_status status = FASTNORM_OUT_OF_MEMORY;
    counting = 1;
    memory = malloc(1);
    free(memory);
    counting = 0;
    if (allocations == 0) return; /* valgrind has put its own malloc in the place of this one */
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.num_threads = 1;
    open_buffers(&p, all, ORDINARY);
    open_buffers(&p, before, ORDINARY);
    for (failing = 1; status != FASTNORM_OK && failing < 10; failing++) {
        allocations = releases = 0;
        counting = 1;
        status = run(&p, all, &options);
        counting = 0;
        CHECK(status == FASTNORM_OK || status == FASTNORM_OUT_OF_MEMORY);
        CHECK(releases == allocations - (status == FASTNORM_OUT_OF_MEMORY));
        if (failing == 1) CHECK(same_bits(all, before));
    }
    CHECK(status == FASTNORM_OK && failing > 2);
    CHECK(fastnorm_workspace_size(&p.shape, FASTNORM_FLOAT32, &bytes) == FASTNORM_OK);
    memory = malloc(bytes);
    options.workspace = memory;
    options.workspace_size = bytes;
    allocations = failing = 0;
    counting = 1;
    status = run(&p, all, &options);
    counting = 0;
    CHECK(status == FASTNORM_OK && allocations == 0);
    free(memory);
    close_buffers(all);
    close_buffers(before);
#endif
}

/* ---- random bad calls --------------------------------------------------------------------------- */

static void test_bad_calls(int turns)
{
    const problem p = {{2, 1, 3, 4, 5, 1}, FASTNORM_FLOAT32, 0, 0, 0, 0, 0};
    buffer all[BUFFERS], before[BUFFERS];
    int refused = 0;
    open_buffers(&p, all, PAGE_BEHIND);
    open_buffers(&p, before, ORDINARY);
    state = 99;
    for (int turn = 0; turn < turns; turn++) {
        fastnorm_geometry shape = p.shape;
        fastnorm_options options;
        fastnorm_status status;
        int64_t *axis[] = {&shape.b, &shape.o, &shape.g, &shape.k, &shape.i};
        const int backward = (int)below(2), slip = (int)below(backward ? 11 : 14);
        fastnorm_forward_args f;
        fastnorm_backward_args b;
        memset(&options, 0, sizeof options);
        options.struct_size = sizeof options;
        memset(&f, 0, sizeof f);
        memset(&b, 0, sizeof b);
        f.struct_size = sizeof f;
        b.struct_size = sizeof b;
        f.dtype = b.dtype = FASTNORM_FLOAT32;
        f.eps = 1e-5;
        f.x = b.x = all[X].start;
        f.y = all[Y].start;
        f.mean = (double *)all[MEAN].start;
        f.var = (double *)all[VAR].start;
        f.rstd = (double *)all[RSTD].start;
        b.dy = all[DY].start;
        b.mean = f.mean;
        b.rstd = f.rstd;
        b.dx = all[DX].start;
        b.dweight = all[DWEIGHT].start;
        switch (slip) {
        case 0: *axis[below(5)] = -1 - below(1000); break;
        case 1: *axis[below(5)] = INT64_MAX - below(1000); break;
        case 2: f.struct_size = b.struct_size = (size_t)below(64); break;
        case 3: options.struct_size = (size_t)below(16); break;
        case 4: f.dtype = b.dtype = (int32_t)(5 + below(1000)); break;
        case 5: f.param_dtype = b.param_dtype = (int32_t)(-1 - below(1000)); break;
        case 6: f.flags = b.flags = (int32_t)(8 << below(20)); break;
        case 7: f.activation = b.activation = (int32_t)(6 + below(1000)); break;
        case 8: options.isa = (int32_t)(5 + below(1000)); break;
        case 9: options.num_threads = (int32_t)(-1 - below(1000)); break;
        case 10:
            options.workspace = all[SUM].start;
            options.workspace_size = (size_t)below(64);
            break;
        case 11: f.eps = below(2) ? (double)NAN : (double)INFINITY; break;
        case 12: f.y = all[X].start + 4 * (1 + below(100)); break;
        default: f.var = f.mean + below(3); break;
        }
        status = backward ? fastnorm_backward(&shape, &b, &options)
                          : fastnorm_forward(&shape, &f, &options);
        refused += status != FASTNORM_OK && strlen(fastnorm_status_string(status)) > 0;
        if (status == FASTNORM_OK) printf("slip %d, backward %d, was taken\n", slip, backward);
    }
    CHECK(refused == turns);
    CHECK(same_bits(all, before));
    close_buffers(all);
    close_buffers(before);
}

/* ---- what is the caller's ------------------------------------------------------------------------ */

/* Rounds up, takes subnormal numbers for zeros, and traps. */
static void set_odd_environment(void)
{
    fesetround(FE_UPWARD);
#if defined(__SSE2__)
    _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
#if defined(__GLIBC__)
    feenableexcept(FE_ALL_EXCEPT);
#endif
}

typedef struct turns {
    void (*body)(void *context, int64_t index);
    void *context;
    int64_t n;
} turns;

static void *take_turns(void *work)
{
    const turns *all = work;
    set_odd_environment();
    for (int64_t index = 0; index < all->n; index++) all->body(all->context, index);
    return NULL;
}

/* A pool of one thread. */
static void new_thread(void *user, int64_t n, void (*body)(void *context, int64_t index),
                       void *context)
{
    turns all = {body, context, n};
    pthread_t thread;
    (void)user;
    if (CHECK(pthread_create(&thread, NULL, take_turns, &all) == 0)) pthread_join(thread, NULL);
}

/* Of this thread, of OpenMP's where it is compiled with that, and of a pool's. */
static void test_the_callers_state(void)
{
    const problem p = {{4, 1, 30, 2, 700, 1}, FASTNORM_FLOAT32, 0, FASTNORM_GELU, 1, 0, 0};
    buffer wanted[BUFFERS], all[BUFFERS];
    sigset_t signals, after;
    fenv_t environment;
    fastnorm_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.num_threads = 1;
    open_buffers(&p, wanted, ORDINARY);
    open_buffers(&p, all, ORDINARY);
    for (size_t at = 0; at < 15; at++) { /* whose gradients are subnormal numbers */
        store(&wanted[WEIGHT], at, p.dtype, 1e-39f);
        store(&all[WEIGHT], at, p.dtype, 1e-39f);
    }
    CHECK(run(&p, wanted, &options) == FASTNORM_OK);
    options.num_threads = 2;
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    sigprocmask(SIG_SETMASK, &signals, NULL);
    setenv("OMP_NUM_THREADS", "3", 1);
    fegetenv(&environment);
    for (int pool = 0; pool < 2; pool++) {
        options.parallel_for = pool ? new_thread : NULL;
#if defined(_OPENMP)
#pragma omp parallel num_threads(2)
#endif
        set_odd_environment();
        CHECK(run(&p, all, &options) == FASTNORM_OK);
        CHECK(fegetround() == FE_UPWARD);
#if defined(_OPENMP)
#pragma omp parallel num_threads(2)
#endif
        fesetenv(&environment);
        CHECK(same_bits(wanted, all));
        memset(all[Y].start, 0, all[Y].bytes);
        memset(all[DX].start, 0, all[DX].bytes);
    }
    CHECK(strcmp(getenv("OMP_NUM_THREADS"), "3") == 0);
    sigprocmask(SIG_SETMASK, NULL, &after);
    CHECK(sigismember(&after, SIGUSR1) == 1 && sigismember(&after, SIGUSR2) == 0);
    sigemptyset(&signals);
    sigprocmask(SIG_SETMASK, &signals, NULL);
    close_buffers(wanted);
    close_buffers(all);
}

/* A child, its child and its child, after the parent had threads. */
static void test_nested_forks(void)
{
    const problem p = {{4, 1, 30, 2, 700, 1}, FASTNORM_FLOAT32, 0, 0, 0, 0, 0};
    buffer wanted[BUFFERS], found[BUFFERS];
    int status = -1;
    pid_t child;
    open_buffers(&p, wanted, ORDINARY);
    open_buffers(&p, found, ORDINARY);
    CHECK(run(&p, wanted, NULL) == FASTNORM_OK);
    fflush(stdout);
    child = fork();
    if (child == 0) {
        alarm(30);
        for (int depth = 0; depth < 2; depth++) {
            if (run(&p, found, NULL) != FASTNORM_OK || !same_bits(wanted, found)) _exit(1);
            child = fork();
            if (child > 0) {
                waitpid(child, &status, 0);
                _exit(status != 0);
            }
        }
        _exit(run(&p, found, NULL) != FASTNORM_OK || !same_bits(wanted, found));
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    close_buffers(wanted);
    close_buffers(found);
}

static void *shapes_of_a_thread(void *turns)
{
    test_shapes(*(const int *)turns);
    return NULL;
}

/* test_shapes with as much stack as the header promises to be enough; behind it is no memory. */
static void test_shapes_on_little_stack(int turns)
{
    pthread_attr_t attributes;
    pthread_t thread;
    CHECK(pthread_attr_init(&attributes) == 0);
    CHECK(pthread_attr_setstacksize(&attributes, 128 << 10) == 0);
    if (CHECK(pthread_create(&thread, &attributes, shapes_of_a_thread, &turns) == 0))
        pthread_join(thread, NULL);
    pthread_attr_destroy(&attributes);
}

int main(int count, char **arguments)
{
    const int turns = count > 1 ? atoi(arguments[1]) : 300;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__x86_64__)
    /* Sanitizers' frames are larger; and QEMU often aborts where a thread with OpenMP's ends. */
    (void)test_shapes_on_little_stack;
    test_shapes(turns);
#else
    test_shapes_on_little_stack(turns);
#endif
    test_allocations();
    test_bad_calls(1000);
    test_the_callers_state();
    test_nested_forks();
    printf("%d passed, %d failed, results %016llx\n", passed, failed, (unsigned long long)digest);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
