/* Threads: the only file that knows about them.
 *
 * OpenMP where the build has it, with a num_threads clause, so that no setting of the caller
 * changes. Without it, or where FASTNORM_PTHREADS is defined (gcc's ThreadSanitizer reports
 * false races with libgomp), threads are created for the call. The caller's own pool, where one
 * is given, goes before both.
 *
 * libgomp deadlocks when a region ran in the parent of a fork and another is opened in the
 * child, so that a child computes serially. */
#define _GNU_SOURCE
#include "task.h"

#if !defined(_WIN32)
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#endif

#if defined(_OPENMP) && !defined(FASTNORM_PTHREADS)
#include <omp.h>
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

#if !(defined(_OPENMP) && !defined(FASTNORM_PTHREADS)) && !defined(_WIN32)
typedef struct crew {
    int64_t next, n;
    fn_body body;
    void *context;
} crew;

static void *take_turns(void *argument)
{
    crew *work = argument;
    int64_t index;
    while ((index = __atomic_fetch_add(&work->next, 1, __ATOMIC_ACQ_REL)) < work->n)
        work->body(work->context, index);
    return NULL;
}
#endif

void fn_parallel_for(const fn_task *task, int64_t n, fn_body body, void *context)
{
    int threads = task->threads < n ? task->threads : (int)n;
    if (task->parallel_for && threads > 1) {
        task->parallel_for(task->user, n, body, context);
        return;
    }
    if (threads > 1 && !forked) {
#if defined(_OPENMP) && !defined(FASTNORM_PTHREADS)
        if (!omp_in_parallel()) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
            for (int64_t index = 0; index < n; index++) body(context, index);
            return;
        }
#elif !defined(_WIN32)
        enum { MOST = 256 };
        pthread_t ids[MOST];
        crew work = {0, n, body, context};
        int started = 0;
        if (threads > MOST) threads = MOST;
        while (started < threads - 1 &&
               pthread_create(&ids[started], NULL, take_turns, &work) == 0)
            started++;
        take_turns(&work);
        while (started > 0) pthread_join(ids[--started], NULL);
        return;
#endif
    }
    for (int64_t index = 0; index < n; index++) body(context, index);
}
