"""Inlined words of the across order and of rows backward: rows put together in the first-level
cache, to be streamed as whole lines."""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memmove

from fastnorm.kernels.words cimport *

cdef enum:
    JOINED = 4096  # values of rows that are put together


cdef struct joint:
    # n values of rows of y that lie one behind the other, and where the first of them goes.
    stored* to
    int64_t n
    stored kept[JOINED + 64]


cdef inline void stream_joint(joint* j, int64_t more, bint last) noexcept nogil:
    """Out with the whole lines, and with the rest where it is the last."""
    cdef int64_t line = 64 // <int64_t> sizeof(stored), p
    j.n += more
    p = minimum(j.n, until_aligned(j.to))
    memcpy(j.to, j.kept, p * sizeof(stored))
    while p + line <= j.n:
        stream_line(j.to + p, j.kept + p)
        p += line
    if last:
        memcpy(j.to + p, j.kept + p, (j.n - p) * sizeof(stored))
        return
    j.n -= p
    j.to += p
    memmove(j.kept, j.kept + p, j.n * sizeof(stored))
