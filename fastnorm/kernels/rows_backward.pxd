"""What the files of the rows loop order backward share: the terms that a set is mapped with."""

from libc.stdint cimport int64_t
from libc.string cimport memset

from fastnorm.kernels.rows cimport *
from fastnorm.kernels.words cimport *


cdef struct terms:
    # dx = dy*rstd*weight + (x - hi)*scale + shift;  xhat = (x - hi)*rstd - lo*rstd
    work hi
    work scale
    work shift
    work offset  # -lo*rstd
    double lo
    double rstd


cdef inline void start_terms(const fn_task* t, int64_t set_, terms* c) noexcept nogil:
    cdef double mean = t.mean[set_] if t.has_mean else 0
    c.rstd = t.rstd[set_]
    c.hi = hi_of(mean, c.rstd, far_of(t), 0) if t.has_mean else <work> 0
    c.lo = mean - <double> c.hi
    c.offset = <work> (-c.lo * c.rstd)


cdef inline void finish_terms(const plan* p, int64_t set_, double gy, double gyd, terms* c,
                              bint masked) noexcept nogil:
    """From the sums over the set of gy and of gy*(x - hi)."""
    cdef const fn_task* t = p.task
    cdef double inverse = p.inverse, count, m1, m2
    if masked:
        count = values_of(t, set_ // t.g)
        inverse = 1.0 / count if count > 0 else 0
    m1 = gy * inverse if t.has_mean else 0
    m2 = c.rstd * (gyd - c.lo * gy) * inverse
    if t.given or (masked and inverse == 0):
        m1 = m2 = 0
    c.scale = <work> (-c.rstd * c.rstd * m2)
    c.shift = <work> (c.rstd * (c.rstd * m2 * c.lo - m1))


cdef inline affine gate_of(const fn_task* t, int64_t set_, int64_t channel) noexcept nogil:
    """The input of the activation."""
    return affine_of(t, channel, t.mean[set_] if t.has_mean else 0, t.rstd[set_])


cdef inline void add_channel(const plan* p, int64_t channel, const double* sums, const terms* c,
                             double* dweight, double* dbias, double* over_set) noexcept nogil:
    cdef double weight = <double> (<const work*> p.task.weight)[channel]
    over_set[0] += weight * sums[0]
    over_set[1] += weight * sums[1]
    dweight[channel] += c.rstd * (sums[1] - c.lo * sums[0])
    dbias[channel] += sums[0]


cdef inline void merge_parts(const plan* p) noexcept nogil:
    """dweight and dbias from what parts of b have summed, in their order."""
    cdef const fn_task* t = p.task
    cdef int64_t size = t.g * t.k, part, j
    memset(t.dweight, 0, size * sizeof(double))
    memset(t.dbias, 0, size * sizeof(double))
    for part in range(p.b_tiles):
        for j in range(size):
            t.dweight[j] += p.partial[2 * part * size + j]
        if t.scaled:
            continue
        for j in range(size):
            t.dbias[j] += p.partial[(2 * part + 1) * size + j]
