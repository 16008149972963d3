/* Threads, and what they compute with: the only file that knows about them.
 *
 * OpenMP where the build has it, with a num_threads clause, so that no setting of the caller
 * changes. Without it macOS's dispatch queues, or else threads that are created for a loop. The
 * caller's own pool, where one is given, goes before all.
 *
 * libgomp deadlocks when a region ran in the parent of a fork and another is opened in the
 * child, and a queue aborts, so that a child computes serially. */
#define _GNU_SOURCE
#include "task.h"

#if !defined(_WIN32)
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#endif

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#if defined(_OPENMP)
#define WITH_OPENMP
#include <omp.h>
#elif defined(__APPLE__)
#define WITH_DISPATCH
#include <dispatch/dispatch.h>
#elif !defined(_WIN32)
#define WITH_PTHREADS
#endif

static int forked;

#if !defined(_WIN32)
static void after_fork(void) { forked = 1; }

__attribute__((constructor)) static void watch_fork(void)
{
    pthread_atfork(NULL, NULL, after_fork);
}
#endif

int fn_available_threads(void)
{
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
#if !defined(_WIN32)
    long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count > 0 ? (int)count : 1;
#else
    return 1;
#endif
}

/* Rounding to nearest, no trap, subnormal numbers as they are: whatever the calling thread has set, and
 * anybody for a pool's threads and OpenMP's, of which results would depend otherwise. Kernels
 * are compiled for nobody looking at exceptions, so that they may raise what no formula does. */
#if defined(__SSE2__)
fn_environment fn_enter_environment(void)
{
    const unsigned flags = 0x3f, plain = 0x1f80, callers = _mm_getcsr();
    if ((callers & ~flags) != plain) _mm_setcsr(plain);
    return callers;
}

void fn_leave_environment(const fn_environment *callers)
{
    if (_mm_getcsr() != *callers) _mm_setcsr(*callers);
}
#else
fn_environment fn_enter_environment(void)
{
    fenv_t callers;
    fegetenv(&callers);
    fesetenv(FE_DFL_ENV);
    return callers;
}

void fn_leave_environment(const fn_environment *callers) { fesetenv(callers); }
#endif

/* Bytes moved from which more threads are worth their start. One that waits for work takes it at once;
 * one that is created for each loop comes 20 to 30 us late (with it a call that moves up to 2 MB takes
 * 2 to 13 times as long as without, one of 8 MB 0.7 to 1.6). */
#if !defined(FASTNORM_CREATE_BYTES)
#define FASTNORM_CREATE_BYTES (8 << 20)
#endif

size_t fn_serial_bytes(const fn_task *task)
{
#if defined(WITH_PTHREADS)
    if (!task->parallel_for) return FASTNORM_CREATE_BYTES;
#endif
    (void)task;
    return 192 << 10;
}

/* A thread's part of the indices: what was taken last time is in its cache, so it takes the same
 * part in every loop of as many units (1.5 to 3 times faster in cache than turns in order). One
 * that is done helps the others: from memory, and where not all threads came. In the second-level
 * caches what it took would move over from one to the other, and back in the next call (1.0 to 1.16
 * times as long on a Xeon). */
typedef struct share {
    _Alignas(64) int64_t taken; /* a line each */
} share;

enum { MOST_THREADS = 128 };

typedef struct crew {
    int64_t n;
    int threads, helping, backwards;
    fn_body body;
    void *context;
    share shares[MOST_THREADS];
} crew;

/* By one of `came` threads. */
static void work_from(crew *work, int thread, int came)
{
    const fn_environment threads = fn_enter_environment();
    const int turns = work->helping || came < work->threads ? work->threads : 1;
    for (int turn = 0; turn < turns; turn++) {
        int64_t part = (thread + turn) % work->threads;
        int64_t start = part * work->n / work->threads;
        int64_t count = (part + 1) * work->n / work->threads - start, at;
        while ((at = __atomic_fetch_add(&work->shares[part].taken, 1, __ATOMIC_RELAXED)) < count)
            work->body(work->context, start + (work->backwards ? count - 1 - at : at));
    }
    fn_leave_environment(&threads);
}

typedef struct loop {
    fn_body body;
    void *context;
} loop;

/* A turn of a loop, for the caller's pool. */
static void work_in_pool(void *context, int64_t index)
{
    const loop *work = context;
    const fn_environment threads = fn_enter_environment();
    work->body(work->context, index);
    fn_leave_environment(&threads);
}

#if defined(WITH_DISPATCH)
static void work_in_queue(void *context, size_t thread)
{
    crew *work = context;
    work_from(work, (int)thread, work->threads);
}
#elif defined(WITH_PTHREADS)
typedef struct worker {
    crew *work;
    int thread;
} worker;

static void *work_in_thread(void *argument)
{
    const worker *self = argument;
    work_from(self->work, self->thread, self->work->threads);
    return NULL;
}
#endif

static int most_threads(const fn_task *task, int64_t n)
{
    int threads = task->threads < MOST_THREADS ? task->threads : MOST_THREADS;
    if (forked) return 1;
#if defined(WITH_OPENMP)
    if (omp_in_parallel()) return 1;
#endif
    return threads < n ? threads : (int)n;
}

static void run_crew(int threads, int helping, int64_t n, fn_body body, void *context,
                     int backwards)
{
    crew work;
    work.n = n;
    work.threads = threads;
    work.helping = helping;
    work.backwards = backwards;
    work.body = body;
    work.context = context;
    for (int thread = 0; thread < threads; thread++) work.shares[thread].taken = 0;
#if defined(WITH_OPENMP)
#pragma omp parallel num_threads(threads)
    work_from(&work, omp_get_thread_num(), omp_get_num_threads());
#elif defined(WITH_DISPATCH)
    dispatch_apply_f((size_t)threads, DISPATCH_APPLY_AUTO, &work, work_in_queue);
#elif defined(WITH_PTHREADS)
    int started = 0;
    pthread_t ids[MOST_THREADS];
    worker workers[MOST_THREADS];
    while (started < threads - 1) {
        workers[started] = (worker){&work, started + 1};
        if (pthread_create(&ids[started], NULL, work_in_thread, &workers[started])) break;
        started++;
    }
    work_from(&work, 0, started + 1);
    while (started > 0) pthread_join(ids[--started], NULL);
#else
    work_from(&work, 0, 1);
#endif
}

void fn_parallel_for(const fn_task *task, int64_t n, fn_body body, void *context, int backwards)
{
    if (task->parallel_for && task->threads > 1 && n > 1) {
        loop work = {body, context};
        task->parallel_for(task->user, n, work_in_pool, &work);
    } else if (most_threads(task, n) > 1) {
        run_crew(most_threads(task, n), task->beyond, n, body, context, backwards);
    } else {
        for (int64_t index = 0; index < n; index++)
            body(context, backwards ? n - 1 - index : index);
    }
}
