"""Inlined words of the rows loop order for short runs of one channel each.

A group's runs of one sample lie one behind the other: a slab. Sums run down the o slabs, place by
place, as in the columns order, and a set's places are added up at the end. Where a slab holds all
sets, or where a set's runs do not stay in cache until they are mapped, threads take sheets of
samples instead of groups (0.3 to 0.9 of the time): the sums of each sheet, what is found from them
together, and the map of each.
"""

from libc.string cimport memcpy, memset

from fastnorm.kernels.down cimport *
from fastnorm.kernels.rows cimport *
from fastnorm.kernels.words cimport *


cdef struct slab:
    # For each place: the value that sums are about, sums, then what it is mapped with. With room
    # for a whole vec behind the last place.
    work hi[2 * SLAB + 16]
    work s[2 * SLAB + 16]
    work q[2 * SLAB + 16]
    work d[2 * SLAB + 16]
    work gate_scale[2 * SLAB + 16]
    work gate_shift[2 * SLAB + 16]


cdef inline coefficients slab_map(const fn_task* t, slab* w) noexcept nogil:
    cdef coefficients c = affine_map(OF_PLACES, w.hi, w.s, w.q)
    c.dscale = w.d
    if t.gated:
        c.gate_scale, c.gate_shift = w.gate_scale, w.gate_shift
    return c


cdef inline void fill(work* a, int64_t n, work value) noexcept nogil:
    """Whole vectors: what lies behind is filled afterwards, or is room."""
    cdef vec v = splat(value)
    cdef int64_t at = 0
    while at < n:
        memcpy(a + at, &v, sizeof(vec))
        at += WIDTH


cdef inline void sum_slabs(const plan* p, const stored* x, const stored* dy, int64_t row,
                           int64_t end, int64_t sets, slab* w, double* sums) noexcept nogil:
    """sums[set] = as in sum_runs, about w.hi, of the samples [row, end)."""
    cdef coefficients c = slab_map(p.task, w)
    cdef int64_t stop, count, s
    memset(sums, 0, 2 * sets * sizeof(double))
    while row < end:
        memset(w.s, 0, (sets * p.n + MOST_WIDTH) * sizeof(work))
        memset(w.q, 0, (sets * p.n + MOST_WIDTH) * sizeof(work))
        stop = minimum(end, row + RUN)
        while row < stop:
            count = minimum(STEP, stop - row)
            sum_rows(x + row * p.stride, past(dy, row * p.stride), count, p.stride, sets * p.n, &c,
                     w.s, w.q, count * p.stride if p.task.far else 0)
            row += count
        for s in range(sets):
            sums[2 * s] += sum_work(w.s + s * p.n, p.n)
            sums[2 * s + 1] += sum_work(w.q + s * p.n, p.n)


cdef inline void map_slabs(const plan* p, int64_t at, int64_t rows, int64_t sets,
                           slab* w) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef coefficients c = slab_map(t, w)
    cdef edge ends
    open_edge(&ends)
    if t.dy == NULL and t.fused:
        map_fused(t, at, sets * p.n, rows, p.stride, &c, &ends)
    else:
        map_rows_of_places(<const stored*> t.x + at, past(<const stored*> t.dy, at),
                           <stored*> t.y + at, rows, p.stride, sets * p.n, &c, t.stream, t.ahead,
                           &ends)
    close_edge(&ends)
    if t.stream:
        stream_end()


# ---- sheets --------------------------------------------------------------------------------


cdef struct sheet:
    int64_t row, stop  # samples
    int64_t first, sets
    double* sums


cdef inline sheet sheet_of(const plan* p, int64_t index) noexcept nogil:
    cdef sheet a
    cdef int64_t groups = ceil_div(p.sets, p.sheet_sets), part = index // groups
    a.row, a.stop = part * p.task.o // p.sheets, (part + 1) * p.task.o // p.sheets
    a.first = index % groups * p.sheet_sets
    a.sets = minimum(p.sheet_sets, p.sets - a.first)
    a.sums = p.partial + 2 * (part * p.sets + a.first)
    return a


cdef inline int64_t all_sheets(const plan* p) noexcept nogil:
    return p.sheets * ceil_div(p.sets, p.sheet_sets)


cdef inline void merge_sheets(const plan* p, int64_t set_, double* sums) noexcept nogil:
    cdef const double* part = p.partial + 2 * set_
    cdef int64_t _sheet
    sums[0] = sums[1] = 0
    for _sheet in range(p.sheets):
        sums[0] += part[0]
        sums[1] += part[1]
        part += 2 * p.sets


cdef inline double* of_all_sheets(const plan* p, int64_t set_) noexcept nogil:
    """Three values of a set, behind the sums of the sheets."""
    return p.partial + 2 * p.sets * p.sheets + 3 * set_
