"""The rows loop order: the statistics of a set whose sums in the working type do not give them; see
rows_forward.pxd."""

from libc.stdint cimport int64_t

from fastnorm.kernels.rows cimport plan, set_start
from fastnorm.kernels.rows_forward cimport sum_tile
from fastnorm.kernels.runs cimport sum_runs_exact
from fastnorm.kernels.words cimport (
    cancels, fn_task, on_grid, stored, sum_valid_exact, values_of, work,
)


cdef void sum_exact(const plan* p, int64_t set_, double about, double* sums) noexcept nogil:
    cdef int64_t at = set_start(p.task, set_), r
    sums[0] = sums[1] = 0
    if p.task.mask == NULL:
        sum_runs_exact(<const stored*> p.task.x + at, p.task.o, p.stride, p.n, about, sums)
    else:
        for r in range(p.task.o):
            sum_valid_exact(p.task, at + r * p.stride, p.n, about, sums)


cdef public void exact_statistics(const void* context, int64_t set_, work about, double* mean,
                                  double* var) noexcept nogil:
    """Where the sums about `about`, which gave this mean, lose too many digits. What lies far from
    the sample, as most of an image may from its first pixels, is summed about that mean; else
    come the mean, then the variance about it, in double: two more reads of the set."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef double count = values_of(t, set_ // t.g)
    cdef double sums[2]
    cdef work near = on_grid(<work> mean[0])
    cdef int64_t tile
    if t.has_mean and near != about:
        sums[0] = sums[1] = 0
        for tile in range(p.tiles):
            sum_tile(p, set_, near, tile, sums, t.mask != NULL)
        if not cancels(sums[0], sums[1], count):
            mean[0] = <double> near + sums[0] / count
            var[0] = (sums[1] - sums[0] * sums[0] / count) / count
            return
    mean[0] = 0
    if t.has_mean:
        sum_exact(p, set_, about, sums)
        mean[0] = about + sums[0] / count
    sum_exact(p, set_, mean[0], sums)
    if not t.has_mean:
        sums[0] = 0
    mean[0] += sums[0] / count
    var[0] = (sums[1] - sums[0] * sums[0] / count) / count
