/* The loop order of a task. */
#include "least.h"

/* 1, or 0 where it was not written for such a shape. */
int least(const task *t)
{
    int done = 1;
    for (int64_t at = 0; t->backward && at < t->g * t->k; at++) t->dweight[at] = t->dbias[at] = 0;
    if (t->stream && (t->s > 1 ? t->s : t->i > 1 ? t->i : t->g * t->k) % W) return 0;
    if (t->s > 1)
        least_across(t);
    else if (t->o == 1 && t->i == 1)
        least_rows(t);
    else if (t->i > 1)
        least_runs(t);
    else
        done = least_columns(t);
    _mm_sfence();
    return done;
}
