"""The rows loop order backward, of runs of one channel; see rows.pxd. Rows with a weight for each
place are elements_backward.pyx, short runs slabs.pyx."""

from libc.string cimport memcpy, memset

from fastnorm.kernels.rows cimport *
from fastnorm.kernels.rows_backward cimport *
from fastnorm.kernels.runs cimport *
from fastnorm.kernels.words cimport *


cdef extern from "kernels.h" nogil:
    void elements_backward(void* context)
    void slabs_backward(void* context)


cdef void deactivate_channel(const plan* p, int64_t set_, int64_t k, int64_t at, int64_t runs,
                             int64_t n) noexcept nogil:
    """dy of some runs of a channel, from `at` on, taken back through the activation."""
    cdef const fn_task* t = p.task
    cdef affine z = gate_of(t, set_, set_ % t.g * t.k + k)
    cdef coefficients c = map_of(&z)
    map_fused(t, at, n, runs, p.stride, &c, NULL)


cdef inline void deactivate_runs(const plan* p, int64_t first, int64_t run, int64_t runs,
                                 int64_t at) noexcept nogil:
    """dy of short runs that lie one behind the other from `at` on, taken back through the
    activation; `run` counts from the first of set `first`."""
    cdef const fn_task* t = p.task
    cdef affine z
    cdef coefficients c
    cdef work hi[ROWS]
    cdef work scale[ROWS]
    cdef work shift[ROWS]
    cdef int64_t r, set_
    for r in range(runs):
        set_ = first + (run + r) // t.k
        z = gate_of(t, set_, set_ % t.g * t.k + (run + r) % t.k)
        hi[r] = z.hi
        scale[r] = z.scale
        shift[r] = z.shift
    c = affine_map(OF_ROWS, hi, scale, shift)
    map_fused(t, at, t.i, runs, t.i, &c, NULL)


cdef inline void sum_channel(const plan* p, int64_t set_, int64_t k, int64_t tile, work hi,
                             double* sums, bint masked) noexcept nogil:
    cdef int64_t r0, r1, p0, p1, at, r
    cdef affine z
    cdef vec gate[2]
    tile_bounds(p, tile, &r0, &r1, &p0, &p1)
    at = set_start(p.task, set_) + k * p.task.i + r0 * p.stride + p0
    if p.task.upstream != NULL:
        deactivate_channel(p, set_, k, at, r1 - r0, p1 - p0)
    if masked:
        for r in range(r1 - r0):
            sum_valid(p.task, at + r * p.stride, p1 - p0, hi, sums)
    elif p.task.gated:
        z = gate_of(p.task, set_, set_ % p.task.g * p.task.k + k)
        gate[0] = splat(z.scale)
        gate[1] = splat(z.shift)
        sum_runs(<const stored*> p.task.x + at, <const stored*> p.task.dy + at, NULL, r1 - r0,
                 p.stride, p1 - p0, hi, gate, sums, 0)
    else:
        sum_runs(<const stored*> p.task.x + at, <const stored*> p.task.dy + at, NULL, r1 - r0,
                 p.stride, p1 - p0, hi, NULL, sums, p.sums_ahead)


cdef inline void map_channel(const plan* p, int64_t set_, int64_t start, int64_t channel,
                             int64_t p0, int64_t p1, const terms* c, int64_t ahead,
                             edge* ends, bint masked) noexcept nogil:
    """Places [p0, p1) of the run at `start`, of one channel."""
    cdef const fn_task* t = p.task
    cdef int64_t at = start + p0
    cdef const stored* x = <const stored*> t.x + at
    cdef const stored* dy = <const stored*> t.dy + at
    cdef work dscale = <work> (c.rstd * <double> (<const work*> t.weight)[channel])
    cdef coefficients m = affine_map(OF_ALL, &c.hi, &c.scale, &c.shift)
    cdef affine z
    m.dscale = &dscale
    if masked:
        map_valid(t, at, p1 - p0, &m)
    elif t.gated:
        z = gate_of(t, set_, channel)
        m.gate_scale, m.gate_shift = &z.scale, &z.shift
        map_places(x, dy, <stored*> t.y + at, p1 - p0, &m, t.stream, ahead, ends)
    else:
        map_places(x, dy, <stored*> t.y + at, p1 - p0, &m, t.stream, ahead, ends)


cdef inline void sum_sets(const plan* p, int64_t first, int64_t sets, const terms* c,
                          double* dweight, double* dbias, double* over_sets,
                          bint masked) noexcept nogil:
    """The sums of neighbouring sets; over_sets gets those that their terms are finished with."""
    cdef double sums[2]
    cdef double over_set[2]
    cdef int64_t s, k, tile, channel = first % p.task.g * p.task.k
    for s in range(sets):
        over_set[0] = over_set[1] = 0
        for k in range(p.task.k):
            sums[0] = sums[1] = 0
            for tile in range(p.tiles):
                sum_channel(p, first + s, k, tile, c[s].hi, sums, masked)
            add_channel(p, channel, sums, &c[s], dweight, dbias, over_set)
            channel += 1
        memcpy(over_sets + 2 * s, over_set, sizeof(over_set))


cdef inline void sum_brief(const plan* p, int64_t first, int64_t sets, const terms* c,
                           double* dweight, double* dbias, double* over_sets) noexcept nogil:
    """sum_sets of short runs, which lie one behind the other."""
    cdef const fn_task* t = p.task
    cdef const stored* x = <const stored*> t.x + set_start(t, first)
    cdef const stored* dy = <const stored*> t.dy + set_start(t, first)
    cdef double s[ROWS]
    cdef double q[ROWS]
    cdef double sums[2]
    cdef double over_set[2]
    cdef eight_work folded_s[ROWS]
    cdef eight_work folded_q[ROWS]
    cdef int64_t runs = sets * t.k, done = 0, rows, r, set_ = 0, k = 0, summed = 0, at = 0
    cdef int64_t channel = first % t.g * t.k
    over_set[0] = over_set[1] = 0
    while done < runs:
        rows = minimum(ROWS, runs - done)
        if t.upstream != NULL:
            deactivate_runs(p, first, done, rows, set_start(t, first) + done * t.i)
        for r in range(rows):
            sum_short(x, dy, NULL, t.i, c[summed].hi, &folded_s[r], &folded_q[r])
            x += t.i
            dy += t.i
            at += 1
            if at == t.k:
                at = 0
                summed += 1
        fold_rows(folded_s, rows, s)
        fold_rows(folded_q, rows, q)
        for r in range(rows):
            sums[0] = s[r]
            sums[1] = q[r]
            add_channel(p, channel + done + r, sums, &c[set_], dweight, dbias, over_set)
            k += 1
            if k == t.k:
                memcpy(over_sets + 2 * set_, over_set, sizeof(over_set))
                over_set[0] = over_set[1] = 0
                k = 0
                set_ += 1
        done += rows


cdef inline void differentiate_block(const plan* p, int64_t index, bint masked) noexcept nogil:
    """Blocks of groups, for a part of b."""
    cdef const fn_task* t = p.task
    cdef terms c[BLOCK]
    cdef double over_sets[2 * BLOCK]
    cdef double* over_set
    cdef int64_t b_tile = index // p.blocks, b, set_, s, stop, end, _k, r
    cdef int64_t start, channel, ahead
    cdef double* dweight = p.partial + 2 * b_tile * t.g * t.k
    cdef edge ends
    open_edge(&ends)
    for b in range(b_tile * t.b // p.b_tiles, (b_tile + 1) * t.b // p.b_tiles):
        set_ = b * t.g + index % p.blocks * p.block
        end = minimum((b + 1) * t.g, set_ + p.block)
        fetch_group(p, t.x, set_, minimum(p.group, end - set_))
        fetch_group(p, t.dy, set_, minimum(p.group, end - set_))
        while set_ < end:
            stop = minimum(end, set_ + p.group)
            # The next block is asked for too where sets have one channel: 0.9 to 0.95 of the time
            # (else 1.0 to 1.3).
            ahead = look_ahead(p, stop < end or (t.k == 1 and p.b_tiles == t.b
                                                 and stop < p.sets))
            if t.upstream != NULL:
                fetch_group(p, t.upstream, set_, stop - set_)
            if t.residual != NULL:
                fetch_group(p, t.residual, set_, stop - set_)
            for s in range(set_, stop):
                start_terms(t, s, &c[s - set_])
            if not masked and brief(p):
                sum_brief(p, set_, stop - set_, c, dweight, dweight + t.g * t.k, over_sets)
            else:
                sum_sets(p, set_, stop - set_, c, dweight, dweight + t.g * t.k, over_sets, masked)
            for s in range(set_, stop):
                over_set = over_sets + 2 * (s - set_)
                finish_terms(p, s, over_set[0], over_set[1], &c[s - set_], masked)
            # From the last run on, which the sums have just read: 0.87 of the time where a set is
            # larger than the second-level cache (in a forward 1.0).
            for r in range(t.o - 1, -1, -1):
                start = set_start(t, set_) + r * p.stride
                channel = set_ % t.g * t.k
                for s in range(set_, stop):
                    for _k in range(t.k):
                        if ahead == 0:  # a loop of its own: 0.65 to 0.8 of the time in cache
                            map_channel(p, s, start, channel, 0, p.n, &c[s - set_], 0, &ends,
                                        masked)
                        else:
                            map_channel(p, s, start, channel, 0, p.n, &c[s - set_], ahead, &ends,
                                        masked)
                        start += t.i
                        channel += 1
            set_ = stop
    close_edge(&ends)
    if t.stream:
        stream_end()


cdef void backward_block(void* context, int64_t index) noexcept nogil:
    if (<const plan*> context).task.mask == NULL:
        differentiate_block(<const plan*> context, index, False)
    else:
        differentiate_block(<const plan*> context, index, True)


cdef inline void unit_bounds(const plan* p, int64_t index, int64_t* set_, int64_t* k0, int64_t* k1,
                             int64_t* tile) noexcept nogil:
    """A split backward's unit: a tile of a channel, or whole channels where they are short."""
    cdef int64_t parts = ceil_div(p.task.k, p.channels)
    tile[0] = index % p.tiles
    k0[0] = index // p.tiles % parts * p.channels
    k1[0] = minimum(p.task.k, k0[0] + p.channels)
    set_[0] = index // p.tiles // parts


cdef void backward_tile_sums(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef int64_t set_, k0, k1, tile, k
    cdef double* sums
    cdef terms c
    unit_bounds(p, index, &set_, &k0, &k1, &tile)
    start_terms(p.task, set_, &c)
    for k in range(k0, k1):
        sums = p.partial + 2 * ((set_ * p.task.k + k) * p.tiles + tile)
        sums[0] = sums[1] = 0
        sum_channel(p, set_, k, tile, c.hi, sums, p.task.mask != NULL)


cdef void backward_tile_map(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef int64_t set_, k0, k1, tile, k, r0, r1, p0, p1, r
    cdef double* over_set
    cdef terms c
    cdef edge ends
    open_edge(&ends)
    unit_bounds(p, index, &set_, &k0, &k1, &tile)
    over_set = p.partial + 2 * (p.sets * t.k * p.tiles + set_)
    start_terms(t, set_, &c)
    finish_terms(p, set_, over_set[0], over_set[1], &c, t.mask != NULL)
    tile_bounds(p, tile, &r0, &r1, &p0, &p1)
    for r in range(r0, r1):
        for k in range(k0, k1):
            map_channel(p, set_, set_start(t, set_) + k * t.i + r * p.stride,
                        set_ % t.g * t.k + k, p0, p1, &c, 0, &ends, t.mask != NULL)
    close_edge(&ends)
    if t.stream:
        stream_end()


cdef void backward_split(plan* p) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef int64_t units = p.sets * ceil_div(t.k, p.channels) * p.tiles, set_, k, _tile
    cdef double* part = p.partial
    cdef double* over_set
    cdef double sums[2]
    cdef terms c
    fn_parallel_for(t, units, backward_tile_sums, p, False)
    for set_ in range(p.sets):
        over_set = p.partial + 2 * (p.sets * t.k * p.tiles + set_)
        over_set[0] = over_set[1] = 0
        start_terms(t, set_, &c)
        for k in range(t.k):
            sums[0] = sums[1] = 0
            for _tile in range(p.tiles):
                sums[0] += part[0]
                sums[1] += part[1]
                part += 2
            add_channel(p, set_ % t.g * t.k + k, sums, &c, t.dweight, t.dbias, over_set)
    fn_parallel_for(t, units, backward_tile_map, p, True)


cdef public void rows_backward(const fn_task* task) noexcept nogil:
    cdef plan p
    cdef fn_task own = task[0]
    cdef const fn_task* t = &own
    cut(&p, t, t.i)
    if t.gated and (t.i == 1 or brief(&p)):
        # Loops that have no gate find the gradient in front of the activation first.
        own.gated = own.stream = 0
        own.upstream = own.dy
        own.dy = own.y
    p.blocks = ceil_div(t.g, p.block)
    if p.sheets > 1:
        slabs_backward(&p)
    elif t.i == 1:
        elements_backward(&p)
    elif few_and_large(&p):
        memset(t.dweight, 0, t.g * t.k * sizeof(double))
        memset(t.dbias, 0, t.g * t.k * sizeof(double))
        backward_split(&p)
    elif in_slabs(t):
        slabs_backward(&p)
    else:
        memset(p.partial, 0, 2 * p.b_tiles * t.g * t.k * sizeof(double))
        fn_parallel_for(t, p.b_tiles * p.blocks, backward_block, &p, False)
        merge_parts(&p)
