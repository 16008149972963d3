"""The rows loop order for short runs of one channel each; see rows.pxd.

A group's runs of one sample lie one behind the other: a slab. Sums run down the o slabs, place by
place, as in the columns order, and a set's places are added up at the end. Where a slab holds all
sets, or where a set's runs do not stay in cache until they are mapped, threads take sheets of
samples instead of groups (0.3 to 0.9 of the time): the sums of each sheet, what is found from them
together, and the map of each.
"""

from libc.math cimport sqrt
from libc.stdint cimport int64_t
from libc.string cimport memset

from fastnorm.kernels.rows cimport *
from fastnorm.kernels.rows_backward cimport *
from fastnorm.kernels.rows_forward cimport *
from fastnorm.kernels.words cimport *


cdef struct slab:
    # For each place: the value that sums are about, sums, then what it is mapped with. With room
    # for a whole vec behind the last place.
    work hi[2 * PLACES + 16]
    work s[2 * PLACES + 16]
    work q[2 * PLACES + 16]
    work d[2 * PLACES + 16]
    work gate_scale[2 * PLACES + 16]
    work gate_shift[2 * PLACES + 16]


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
        store_work(a + at, v)
        at += WIDTH


cdef inline void sum_slabs(const plan* p, const stored* x, const stored* dy, int64_t row,
                           int64_t end, int64_t sets, slab* w, double* sums) noexcept nogil:
    """sums[set] = as in sum_runs, about w.hi, of the samples [row, end)."""
    cdef coefficients c = slab_map(p.task, w)
    cdef int64_t count, s
    memset(sums, 0, 2 * sets * sizeof(double))
    while row < end:
        memset(w.s, 0, (sets * p.n + MOST_WIDTH) * sizeof(work))
        memset(w.q, 0, (sets * p.n + MOST_WIDTH) * sizeof(work))
        count = minimum(RUN, end - row)
        sum_rows(x + row * p.stride, past(dy, row * p.stride), count, p.stride, sets * p.n, &c,
                 w.s, w.q, STEP, p.task.far)
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
                           <stored*> t.y + at, rows, p.stride, sets * p.n, &c, t.stream,
                           ahead_of(t, sets * p.n, p.stride), &ends)
    close_edge(&ends)
    if t.stream:
        stream_end()


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


# ---- forward -----------------------------------------------------------------------------


cdef inline void fill_forward(const plan* p, int64_t set_, double mean, double rstd, int64_t s,
                              slab* w) noexcept nogil:
    """What a set is mapped with, into its places of a slab, the s-th ones."""
    cdef affine c = affine_of(p.task, set_, mean, rstd)
    fill(w.hi + s * p.n, p.n, c.hi)
    fill(w.s + s * p.n, p.n, c.scale)
    fill(w.q + s * p.n, p.n, c.shift)


cdef void forward_slabs(void* context, int64_t index) noexcept nogil:
    """A block of sets, a group at a time."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef slab w
    cdef work about[BLOCK]
    cdef double sums[2 * BLOCK]
    cdef double mean, rstd
    cdef int64_t first = index * p.block, end = minimum(p.sets, first + p.block), sets, s
    while first < end:
        sets = minimum(p.group, end - first)
        if not t.given:
            for s in range(sets):
                about[s] = sample(p, first + s, False)
                fill(w.hi + s * p.n, p.n, about[s])
            sum_slabs(p, <const stored*> t.x + first * p.n, NULL, 0, t.o, sets, &w, sums)
        for s in range(sets):
            if t.given:
                mean = t.mean[first + s]
                rstd = p.partial[first + s]
            else:
                finish_set(p, first + s, about[s], sums + 2 * s, &mean, &rstd, False)
            fill_forward(p, first + s, mean, rstd, s, &w)
        map_slabs(p, first * p.n, t.o, sets, &w)
        first += sets


cdef void forward_sheet_sums(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef sheet a = sheet_of(p, index)
    cdef slab w
    cdef int64_t s
    for s in range(a.sets):
        fill(w.hi + s * p.n, p.n, <work> of_all_sheets(p, a.first + s)[0])
    sum_slabs(p, <const stored*> p.task.x + a.first * p.n, NULL, a.row, a.stop, a.sets, &w, a.sums)


cdef void forward_sheet_map(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef sheet a = sheet_of(p, index)
    cdef slab w
    cdef double* found
    cdef int64_t s
    for s in range(a.sets):
        found = of_all_sheets(p, a.first + s)
        fill_forward(p, a.first + s, found[1], found[2], s, &w)
    map_slabs(p, a.row * p.stride + a.first * p.n, a.stop - a.row, a.sets, &w)


cdef void forward_sheets(plan* p) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef double sums[2]
    cdef double* found
    cdef int64_t s
    for s in range(p.sets):
        of_all_sheets(p, s)[0] = 0 if t.given else sample(p, s, False)
    if not t.given:
        fn_parallel_for(t, all_sheets(p), forward_sheet_sums, p, False)
    for s in range(p.sets):
        found = of_all_sheets(p, s)
        if t.given:
            found[1], found[2] = t.mean[s], 1.0 / sqrt(t.var[s] + t.eps)
        else:
            merge_sheets(p, s, sums)
            finish_set(p, s, <work> found[0], sums, found + 1, found + 2, False)
    fn_parallel_for(t, all_sheets(p), forward_sheet_map, p, True)


cdef public void slabs_forward(void* context) noexcept nogil:
    cdef plan* p = <plan*> context
    cdef const fn_task* t = p.task
    cdef int64_t s
    if p.sheets > 1:
        forward_sheets(p)
        return
    if t.given:
        for s in range(t.g):
            p.partial[s] = 1.0 / sqrt(t.var[s] + t.eps)
    fn_parallel_for(t, ceil_div(p.sets, p.block), forward_slabs, p, False)


# ---- backward ----------------------------------------------------------------------------


cdef inline void start_slab(const plan* p, int64_t set_, int64_t s, terms* c,
                            slab* w) noexcept nogil:
    """The start of a set's terms, and what its sums are taken about in its places of a slab."""
    cdef affine z
    start_terms(p.task, set_, c)
    fill(w.hi + s * p.n, p.n, c.hi)
    if p.task.upstream != NULL or p.task.gated:
        z = gate_of(p.task, set_, set_)
        fill(w.gate_scale + s * p.n, p.n, z.scale)
        fill(w.gate_shift + s * p.n, p.n, z.shift)


cdef inline void sum_slabs_back(const plan* p, int64_t at, int64_t row, int64_t stop, int64_t sets,
                                slab* w, double* sums) noexcept nogil:
    """sum_slabs of samples whose first set is at `at` in the first sample."""
    cdef const fn_task* t = p.task
    cdef coefficients input
    if t.upstream != NULL:
        input = affine_map(OF_PLACES, w.hi, w.gate_scale, w.gate_shift)
        map_fused(t, at + row * p.stride, sets * p.n, stop - row, p.stride, &input, NULL)
    sum_slabs(p, <const stored*> t.x + at, <const stored*> t.dy + at, row, stop, sets, w, sums)


cdef inline void finish_slab(const plan* p, int64_t set_, int64_t s, const double* over_set,
                             terms* c, slab* w) noexcept nogil:
    """What a set is mapped with."""
    finish_terms(p, set_, over_set[0], over_set[1], c, False)
    fill(w.s + s * p.n, p.n, c.scale)
    fill(w.q + s * p.n, p.n, c.shift)
    fill(w.d + s * p.n, p.n, <work> (
        c.rstd * <double> (<const work*> p.task.weight)[set_]))


cdef void backward_slabs(void* context, int64_t index) noexcept nogil:
    """A block of sets, a group at a time."""
    cdef const plan* p = <const plan*> context
    cdef slab w
    cdef terms c[BLOCK]
    cdef double sums[2 * BLOCK]
    cdef double over_set[2]
    cdef int64_t first = index * p.block, end = minimum(p.sets, first + p.block), sets, s
    while first < end:
        sets = minimum(p.group, end - first)
        for s in range(sets):
            start_slab(p, first + s, s, &c[s], &w)
        sum_slabs_back(p, first * p.n, 0, p.task.o, sets, &w, sums)
        for s in range(sets):
            over_set[0] = over_set[1] = 0
            add_channel(p, first + s, sums + 2 * s, &c[s], p.partial, p.partial + p.sets, over_set)
            finish_slab(p, first + s, s, over_set, &c[s], &w)
        map_slabs(p, first * p.n, p.task.o, sets, &w)
        first += sets


cdef void backward_sheet_sums(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef sheet a = sheet_of(p, index)
    cdef slab w
    cdef terms c
    cdef int64_t s
    for s in range(a.sets):
        start_slab(p, a.first + s, s, &c, &w)
    sum_slabs_back(p, a.first * p.n, a.row, a.stop, a.sets, &w, a.sums)


cdef void backward_sheet_map(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef sheet a = sheet_of(p, index)
    cdef slab w
    cdef terms c
    cdef int64_t s
    for s in range(a.sets):
        start_slab(p, a.first + s, s, &c, &w)
        finish_slab(p, a.first + s, s, of_all_sheets(p, a.first + s), &c, &w)
    map_slabs(p, a.row * p.stride + a.first * p.n, a.stop - a.row, a.sets, &w)


cdef void backward_sheets(plan* p) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef double sums[2]
    cdef double* over_set
    cdef terms c
    cdef int64_t s
    fn_parallel_for(t, all_sheets(p), backward_sheet_sums, p, False)
    for s in range(p.sets):
        over_set = of_all_sheets(p, s)
        over_set[0] = over_set[1] = t.dweight[s] = t.dbias[s] = 0
        start_terms(t, s, &c)
        merge_sheets(p, s, sums)
        add_channel(p, s, sums, &c, t.dweight, t.dbias, over_set)
    fn_parallel_for(t, all_sheets(p), backward_sheet_map, p, True)


cdef public void slabs_backward(void* context) noexcept nogil:
    cdef plan* p = <plan*> context
    if p.sheets > 1:
        backward_sheets(p)
        return
    memset(p.partial, 0, 2 * p.b_tiles * p.sets * sizeof(double))
    fn_parallel_for(p.task, p.blocks, backward_slabs, p, False)
    merge_parts(p)
