"""Sums over the values that a mask lets count, for sets that it cuts within a run (i > 1).

Where a stretch of a run counts only in part, the sums are taken over a copy of it in the
first-level cache, with values in the gaps that add nothing; so they are those of sum_runs, and what
lies in the gaps, NaN too, is never met. A map writes all of such a stretch, and 0 in its gaps
afterwards (map_fused, map_valid). Whole rows that do not count are left out by the loop orders.
"""

from libc.math cimport fabs
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memset

from fastnorm.kernels.runs cimport map_places, sum_runs, sum_runs_exact
from fastnorm.kernels.words cimport (
    ALL_VALID, NONE_VALID, OF_ALL, SAMPLES, SOME_VALID, STRETCH, affine_map, blank_gaps,
    coefficients, fn_task, keep_valid, on_grid, past, place_in_mask, stored, stretch, widen, work,
)


cdef public void sum_valid(const fn_task* t, int64_t at, int64_t n, work about,
                           double* sums) noexcept nogil:
    """sum_runs of the run of n values at `at`."""
    cdef stored kept[STRETCH]
    cdef stored kept_dy[STRETCH]
    cdef const stored* x
    cdef const stored* dy
    cdef const uint8_t* mask
    cdef int64_t count
    cdef int valid
    while n > 0:
        count = stretch(t, at, n, &valid)
        if valid != NONE_VALID:
            x = <const stored*> t.x + at
            dy = past(<const stored*> t.dy, at)
            if valid == SOME_VALID:
                mask = t.mask + place_in_mask(t, at)
                keep_valid(x, mask, count, about, kept)
                x = kept
                if dy != NULL:
                    keep_valid(dy, mask, count, 0, kept_dy)
                    dy = kept_dy
            sum_runs(x, dy, NULL, 1, 0, count, about, NULL, sums, 0)
        at += count
        n -= count


cdef public void sum_valid_exact(const fn_task* t, int64_t at, int64_t n, double about,
                                 double* sums) noexcept nogil:
    """sum_runs_exact of the run of n values at `at`."""
    cdef const stored* x
    cdef int64_t count, j
    cdef double d
    cdef int valid
    while n > 0:
        count = stretch(t, at, n, &valid)
        x = <const stored*> t.x + at
        if valid == ALL_VALID:
            sum_runs_exact(x, 1, 0, count, about, sums)
        elif valid == SOME_VALID:
            for j in range(count):
                if t.mask[place_in_mask(t, at) + j]:
                    d = <double> widen(x[j]) - about
                    sums[0] += d
                    sums[1] += d * d
        at += count
        n -= count


cdef public void map_valid(const fn_task* t, int64_t at, int64_t n,
                           const coefficients* c) noexcept nogil:
    """A backward's map_places of the run of n values at `at`, with one of each coefficient."""
    cdef coefficients own = affine_map(OF_ALL, c.hi, c.scale, c.shift)
    cdef stored* y = <stored*> t.y
    cdef int64_t count
    cdef int valid
    own.dscale = c.dscale
    while n > 0:
        count = stretch(t, at, n, &valid)
        if valid == NONE_VALID:
            memset(y + at, 0, count * sizeof(stored))
        else:
            map_places(<const stored*> t.x + at, <const stored*> t.dy + at, y + at, count, &own,
                       t.stream if valid == ALL_VALID else 0, 0, NULL)
        if valid == SOME_VALID:
            blank_gaps(t, y + at, at, count)
        at += count
        n -= count


cdef public work sample_valid(const fn_task* t, int64_t set_, int64_t at,
                              int64_t stride) noexcept nogil:
    """sample_runs, spread, of the values that count of a set of the rows order, whose runs start at
    `at` and `stride` apart; 0 where there are none."""
    cdef const stored* x = <const stored*> t.x + at
    cdef const uint8_t* mask = t.mask + set_ // t.g * t.o * t.i
    cdef int64_t first = 0, row, place
    cdef double about, total = 0
    cdef int j
    while first < t.o * t.i and not mask[first]:
        first += 1
    if first == t.o * t.i:
        return 0
    about = <double> widen(x[first // t.i * stride + first % t.i])
    for j in range(1, SAMPLES):
        row = j * t.o // SAMPLES
        place = j * t.k * t.i // SAMPLES
        if mask[row * t.i + place % t.i]:
            total += <double> widen(x[row * stride + place]) - about
    about += total * (1.0 / SAMPLES)
    return on_grid(<work> about) if fabs(about) < 1e37 else <work> 0
