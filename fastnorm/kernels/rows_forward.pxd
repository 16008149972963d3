"""What the files of the rows loop order forward share: the statistics of a set."""

from libc.math cimport sqrt
from libc.stdint cimport int64_t

from fastnorm.kernels.rows cimport *
from fastnorm.kernels.runs cimport sum_runs
from fastnorm.kernels.words cimport *


# What every set goes through is told whether there is a mask: where there is none, its words are
# not in the loops at all (with them, sets of 64 values took 1.2 to 1.4 times as long).


cdef inline work sample(const plan* p, int64_t set_, bint masked) noexcept nogil:
    cdef int64_t at = set_start(p.task, set_)
    if not p.task.has_mean:
        return 0
    if masked:
        return sample_valid(p.task, set_, at, p.stride)
    return sample_runs(<const stored*> p.task.x + at, p.task.o, p.stride, p.n)


cdef inline void sum_tile(const plan* p, int64_t set_, work about, int64_t tile, double* sums,
                          bint masked) noexcept nogil:
    cdef int64_t r0, r1, p0, p1, r, at = set_start(p.task, set_)
    tile_bounds(p, tile, &r0, &r1, &p0, &p1)
    if not masked and p.sums_ahead > 0:
        sum_runs(<const stored*> p.task.x + at + r0 * p.stride + p0, NULL, NULL, r1 - r0, p.stride,
                 p1 - p0, about, NULL, sums, p.sums_ahead)
    elif not masked:
        sum_runs(<const stored*> p.task.x + at + r0 * p.stride + p0, NULL, NULL, r1 - r0, p.stride,
                 p1 - p0, about, NULL, sums, 0)
    else:
        for r in range(r0, r1):
            sum_valid(p.task, at + r * p.stride + p0, p1 - p0, about, sums)


cdef inline void finish_set(const plan* p, int64_t set_, work about, const double* sums,
                            double* mean, double* rstd, bint masked) noexcept nogil:
    """Statistics from the sums; 0 where no value counts."""
    cdef const fn_task* t = p.task
    cdef double s = sums[0] if t.has_mean else 0, var, count = <double> (t.o * p.n)
    cdef double inverse = p.inverse
    if masked:
        count = values_of(t, set_ // t.g)
        inverse = 1.0 / count if count > 0 else 0
    mean[0] = about + s * inverse
    var = (sums[1] - s * s * inverse) * inverse
    if masked and count == 0:
        mean[0] = var = 0
    elif cancels(s, sums[1], count):
        exact_statistics(p, set_, about, mean, &var)
    rstd[0] = 1.0 / sqrt(var + t.eps)
    if masked and count == 0:
        rstd[0] = 0
    if t.mean != NULL:
        t.mean[set_] = mean[0]
    if t.var != NULL:
        t.var[set_] = var
    if t.rstd != NULL:
        t.rstd[set_] = rstd[0]
