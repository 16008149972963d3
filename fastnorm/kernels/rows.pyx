"""The rows loop order: i > 1, or o == 1, so that a set is `o` contiguous runs of k*i values.

Sets are numbered in memory order, set = b_index*g + g_index. A set, or a block of neighbouring
ones, is finished while it is in the second-level cache, so that a forward reads x once and
writes y once, a backward reads dy and x once and writes dx once. Sets too few and too large
for that are split into tiles and read twice; sets of short runs are summed as slabs (1.3 to 1.5
times faster at 7x7 than run by run).

What lost, measured on one core with AVX-512: the sums of four rows of 768 before the first map
(1.2 times as long), asking for the next row early where sets are one run (1.0 to 1.1 times), and
-funroll-loops (1.2 times in cache).

Sums are taken tile by tile and added in the order of the tiles. Tiles depend on the geometry
alone; which thread takes which never changes a bit.
"""

from libc.string cimport memcpy, memset

from fastnorm.kernels.words cimport *

cdef enum:
    TILE = 65536  # values in a tile of a set
    FEW = 16  # sets, below which large ones are split
    BLOCK = 64
    SLAB = 1024  # places of a slab, twice as many where outputs are streamed
    SHORT_RUN = 256  # values in a run, below which sets are summed and mapped as slabs
    GIVEN_SHORT_RUN = 100  # or only mapped
    SHORT = 1024  # values in a run, below which the next one is not foreseen
    ROWS = 8  # rows with a weight for each place that are summed before the first is mapped,
    ELEMENTS = 4096  # but in a forward no more values than this, or than fit a cache
    STRIP = 1024  # columns whose weights and sums stay in the first-level cache


cdef struct plan:
    const fn_task* task
    int64_t sets
    int64_t n  # values in a contiguous run: k*i, of one channel in a backward: i
    int64_t stride  # from one run of a set to the next
    double inverse  # 1 / (o*n)
    int64_t pieces  # of a run, where it is longer than a tile
    int64_t piece  # values in one
    int64_t tile_runs  # runs in a tile, where they are shorter
    int64_t tiles  # in a set (in a backward: in a channel)
    int64_t block  # neighbouring sets in a unit of work
    int64_t group  # of them whose sums are taken before the first is mapped, at most BLOCK
    int64_t blocks
    int64_t channels  # of a set in a unit of work of a split backward
    int64_t b_tiles  # parts of b that sum dweight each for themselves
    double* partial


cdef inline bint in_slabs(const fn_task* t) noexcept nogil:
    """Whether runs are so short that their ends and their sums by run would cost the most."""
    return (t.b == 1 and t.k == 1 and t.o >= 8
            and 1 < t.i < (GIVEN_SHORT_RUN if t.given and t.dy == NULL else SHORT_RUN))


cdef void cut(plan* p, const fn_task* t, int64_t n) noexcept nogil:
    """Cut sets whose contiguous runs have n values into tiles and blocks."""
    cdef int64_t bytes = t.o * t.k * t.i * <int64_t> sizeof(stored) * (1 if t.dy == NULL else 2)
    p.task = t
    p.sets = t.b * t.g
    p.n = n
    p.stride = t.g * t.k * t.i
    p.inverse = 1.0 / <double> (t.o * n)
    p.pieces = ceil_div(n, TILE)
    p.piece = ceil_div(ceil_div(n, p.pieces), LANES) * LANES
    p.pieces = ceil_div(n, p.piece)
    p.tile_runs = maximum(1, TILE // n) if p.pieces == 1 else 1
    p.tiles = ceil_div(t.o, p.tile_runs) * p.pieces
    if t.o == 1:
        p.block = maximum(1, TILE // 4 // (t.k * t.i))
        p.group = 1
    else:
        # Half the cache for what is under way, half for what map_run asks for.
        p.group = maximum(1, minimum(minimum(BLOCK, ceil_div(t.g, 8)), t.l2 * 3 // 8 // bytes))
        if in_slabs(t):
            p.group = maximum(1, minimum(p.group, (2 * SLAB if t.stream else SLAB) // n))
        p.block = maximum(1, t.g // (8 * maximum(1, t.threads)) // p.group) * p.group
    p.channels = minimum(t.k, maximum(1, TILE // (t.o * t.i)))
    p.b_tiles = minimum(t.b if t.i > 1 else ceil_div(t.b, ROWS),
                        minimum(32, maximum(4, (1 << 16) // (t.g * t.k))))
    p.partial = <double*> t.scratch


cdef inline void tile_bounds(const plan* p, int64_t tile, int64_t* r0, int64_t* r1, int64_t* p0,
                             int64_t* p1) noexcept nogil:
    r0[0] = tile // p.pieces * p.tile_runs
    r1[0] = minimum(p.task.o, r0[0] + p.tile_runs)
    p0[0] = tile % p.pieces * p.piece
    p1[0] = minimum(p.n, p0[0] + p.piece)


cdef inline int64_t set_start(const fn_task* t, int64_t set_) noexcept nogil:
    return (set_ // t.g * t.o * t.g + set_ % t.g) * t.k * t.i


cdef inline int64_t look_ahead(const plan* p, bint more) noexcept nogil:
    """Places from a group of sets to the next, where it is worth asking for them early: where
    they come from memory, or in runs too short for the processor to see them coming."""
    if more and (p.task.stream or (p.task.o > 1 and p.n < SHORT)):
        return p.group * p.task.k * p.task.i
    return 0


cdef inline bint few_and_large(const plan* p) noexcept nogil:
    return p.sets < FEW and p.task.o * p.task.k * p.task.i > TILE


cdef public size_t rows_scratch(const fn_task* t) noexcept nogil:
    """Bytes of scratch for a forward or a backward."""
    cdef plan p
    cdef int64_t forward, backward
    cut(&p, t, t.k * t.i)
    forward = maximum(t.g, 2 * p.sets * (p.tiles + 1) if few_and_large(&p) else 0)
    cut(&p, t, t.i)
    backward = 2 * p.b_tiles * t.g * t.k
    if few_and_large(&p):
        backward = maximum(backward, 2 * p.sets * (t.k * p.tiles + 1))
    return maximum(forward, backward) * sizeof(double)


# ---- forward -----------------------------------------------------------------------------


cdef inline work sample(const plan* p, const stored* x) noexcept nogil:
    return spread_sample(x, p.task.o, p.stride, p.n) if p.task.has_mean else <work> 0


cdef inline void sum_tile(const plan* p, const stored* x, work about, int64_t tile,
                          double* sums) noexcept nogil:
    cdef int64_t r0, r1, p0, p1
    tile_bounds(p, tile, &r0, &r1, &p0, &p1)
    sum_runs(x + r0 * p.stride + p0, NULL, NULL, r1 - r0, p.stride, p1 - p0, about, sums)


cdef void exact_statistics(const plan* p, const stored* x, work about, double* mean,
                           double* var) noexcept nogil:
    """The mean, then the variance about it, in double: two more reads of the set."""
    cdef const fn_task* t = p.task
    cdef double count = <double> (t.o * p.n)
    cdef double sums[2]
    mean[0] = 0
    if t.has_mean:
        sums[0] = sums[1] = 0
        sum_runs_exact(x, t.o, p.stride, p.n, about, sums)
        mean[0] = about + sums[0] / count
    sums[0] = sums[1] = 0
    sum_runs_exact(x, t.o, p.stride, p.n, mean[0], sums)
    if not t.has_mean:
        sums[0] = 0
    mean[0] += sums[0] / count
    var[0] = (sums[1] - sums[0] * sums[0] / count) / count


cdef inline void finish_set(const plan* p, int64_t set_, const stored* x, work about,
                            const double* sums, double* mean, double* rstd) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef double s = sums[0] if t.has_mean else 0, var
    if cancels(s, sums[1], <double> (t.o * p.n)):
        exact_statistics(p, x, about, mean, &var)
    else:
        mean[0] = about + s * p.inverse
        var = (sums[1] - s * s * p.inverse) * p.inverse
    rstd[0] = 1.0 / sqrt(var + t.eps)
    if t.mean != NULL:
        t.mean[set_] = mean[0]
    if t.var != NULL:
        t.var[set_] = var
    if t.rstd != NULL:
        t.rstd[set_] = rstd[0]


cdef struct affine:
    # y = (x - hi)*scale + shift
    work hi
    work scale
    work shift


cdef inline affine affine_of(const fn_task* t, int64_t channel, double mean,
                             double rstd) noexcept nogil:
    cdef affine c
    cdef double scale = rstd * <double> (<const work*> t.weight)[channel]
    c.hi = <work> mean
    c.scale = <work> scale
    c.shift = <work> (<double> (<const work*> t.bias)[channel] - (mean - <double> c.hi) * scale)
    return c


cdef inline void map_elements(const fn_task* t, int64_t at, int64_t channel, int64_t n,
                              double mean, double rstd, int64_t ahead) noexcept nogil:
    """Normalize n values with a weight and a bias for each, the first of them `channel`'s."""
    cdef const work* weight = <const work*> t.weight + channel
    cdef const work* bias = <const work*> t.bias + channel
    cdef work hi = <work> mean, scale = <work> rstd
    cdef work shift = <work> (-(mean - <double> hi) * rstd)
    if fused(t):
        map_fused(t, at, n, &hi, &scale, &shift, False, weight, bias)
    else:
        map_places(<const stored*> t.x + at, NULL, <stored*> t.y + at, n, &hi, &scale, &shift, NULL,
                   False, weight, bias, t.stream, ahead)


cdef inline void map_piece(const fn_task* t, int64_t set_, int64_t r, int64_t p0, int64_t p1,
                           double mean, double rstd, int64_t ahead) noexcept nogil:
    """Normalize the places [p0, p1) of run r of a set."""
    cdef int64_t start = set_start(t, set_) + r * t.g * t.k * t.i, at = p0, stop
    cdef int64_t channel = set_ % t.g * t.k
    cdef const stored* x = <const stored*> t.x + start
    cdef stored* y = <stored*> t.y + start
    cdef affine c
    if t.i == 1:
        map_elements(t, start + p0, channel + p0, p1 - p0, mean, rstd, ahead)
        return
    while at < p1:
        stop = minimum(p1, (at // t.i + 1) * t.i)
        c = affine_of(t, channel + at // t.i, mean, rstd)
        if fused(t):
            map_fused(t, start + at, stop - at, &c.hi, &c.scale, &c.shift, False, NULL, NULL)
        else:
            map_run(x + at, NULL, y + at, stop - at, c.hi, c.scale, c.shift, 0, t.stream, ahead)
        at = stop


cdef inline void fetch_group(const plan* p, const void* x, int64_t first,
                             int64_t sets) noexcept nogil:
    """Ask for a group in memory order, where its sets alone would be read in short runs."""
    if p.task.o > 1 and p.n < SHORT:
        fetch_runs(<const stored*> x + set_start(p.task, first), p.task.o, p.stride,
                   sets * p.task.k * p.task.i)


cdef inline void map_group(const plan* p, int64_t first, int64_t sets, const double* mean,
                           const double* rstd, int64_t ahead) noexcept nogil:
    """map_piece for neighbouring sets of one channel each, in memory order."""
    cdef const fn_task* t = p.task
    cdef affine c[BLOCK]
    cdef int64_t s, r, at = set_start(t, first)
    cdef const stored* x
    cdef stored* y
    for s in range(sets):
        c[s] = affine_of(t, (first + s) % t.g, mean[s], rstd[s])
    for r in range(t.o):
        x = <const stored*> t.x + at + r * p.stride
        y = <stored*> t.y + at + r * p.stride
        for s in range(sets):
            if fused(t):
                map_fused(t, at + r * p.stride + s * p.n, p.n, &c[s].hi, &c[s].scale, &c[s].shift,
                          False, NULL, NULL)
            else:
                map_run(x, NULL, y, p.n, c[s].hi, c[s].scale, c[s].shift, 0, t.stream, ahead)
            x += p.n
            y += p.n


cdef void forward_block(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef double mean[BLOCK]
    cdef double rstd[BLOCK]
    cdef double sums[2]
    cdef int64_t first = index * p.block, end = minimum(p.sets, first + p.block), stop
    cdef int64_t set_, tile, r, ahead
    cdef const stored* x
    cdef work about
    fetch_group(p, t.x, first, minimum(p.group, end - first))
    while first < end:
        stop = minimum(end, first + p.group)
        ahead = look_ahead(p, stop < end)
        if fused(t):  # map_fused asks for nothing
            fetch_group(p, t.x, first, stop - first)
            if t.residual != NULL:
                fetch_group(p, t.residual, first, stop - first)
        for set_ in range(first, stop):
            x = <const stored*> t.x + set_start(t, set_)
            about = sample(p, x)
            sums[0] = sums[1] = 0
            for tile in range(p.tiles):
                sum_tile(p, x, about, tile, sums)
            finish_set(p, set_, x, about, sums, &mean[set_ - first], &rstd[set_ - first])
        if t.k == 1 and t.i > 1 and (t.o == 1 or t.b == 1):
            map_group(p, first, stop - first, mean, rstd, ahead)
            first = stop
            continue
        for r in range(t.o):
            for set_ in range(first, stop):
                map_piece(t, set_, r, 0, p.n, mean[set_ - first], rstd[set_ - first],
                          ahead)
        first = stop
    if t.stream:
        stream_end()


cdef void forward_elements(void* context, int64_t index) noexcept nogil:
    """forward_block for o == 1 and i == 1, rows with a weight for each place: a few rows at a time,
    so that divisions and roots of one row do not wait for those of the one before."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef work about[ROWS]
    cdef double sums[2 * ROWS]
    cdef double mean[ROWS]
    cdef double var[ROWS]
    cdef double s, count = <double> t.k
    cdef int64_t set_ = index * p.block, end = minimum(p.sets, set_ + p.block), r, rows, g
    cdef int64_t group = minimum(4, t.l2 // 4 // (t.k * <int64_t> sizeof(stored))), ahead, k, n
    cdef const stored* x = <const stored*> t.x + set_ * t.k
    group = maximum(1, minimum(ROWS, maximum(group, ELEMENTS // t.k)))
    while set_ < end:
        rows = minimum(group, end - set_)
        for r in range(rows):
            if t.terms[0] != NULL:
                add_terms(t, (set_ + r) * t.k, t.k)
            about[r] = spread_sample(x + r * t.k, 1, 0, t.k) if t.has_mean else <work> 0
            sums[2 * r] = sums[2 * r + 1] = 0
            sum_runs(x + r * t.k, NULL, NULL, 1, 0, t.k, about[r], sums + 2 * r)
        for r in range(rows):
            s = sums[2 * r] if t.has_mean else 0
            if cancels(s, sums[2 * r + 1], count):
                exact_statistics(p, x + r * t.k, about[r], &mean[r], &var[r])
            else:
                mean[r] = about[r] + s * p.inverse
                var[r] = (sums[2 * r + 1] - s * s * p.inverse) * p.inverse
        if t.mean != NULL:
            memcpy(t.mean + set_, mean, rows * sizeof(double))
        if t.var != NULL:
            memcpy(t.var + set_, var, rows * sizeof(double))
        for r in range(rows):
            var[r] = 1.0 / sqrt(var[r] + t.eps)
        if t.rstd != NULL:
            memcpy(t.rstd + set_, var, rows * sizeof(double))
        ahead = group * t.k if t.stream and set_ + rows < end else 0
        k = 0
        while k < t.k:
            n = minimum(STRIP, t.k - k)
            for r in range(rows):
                g = (set_ + r) % t.g * t.k + k if t.g > 1 else k
                map_elements(t, (set_ + r) * t.k + k, g, n, mean[r], var[r], ahead)
            k += n
        x += rows * t.k
        set_ += rows
    if t.stream:
        stream_end()


# ---- slabs: short runs of one channel each -------------------------------------------------
#
# A group's runs of one sample lie one behind the other: a slab. Sums run down the o slabs,
# place by place, as in the columns order, and a set's places are added up at the end.


cdef struct slab:
    # For each place: the value that sums are about, sums, then what map_row reads. With room
    # for a whole vec behind the last place.
    work hi[2 * SLAB + 16]
    work s[2 * SLAB + 16]
    work q[2 * SLAB + 16]
    work d[2 * SLAB + 16]


cdef inline void fill(work* a, int64_t n, work value) noexcept nogil:
    cdef int64_t j
    for j in range(n):
        a[j] = value


cdef inline double sum_places(const work* a, int64_t n) noexcept nogil:
    cdef double t[8]
    cdef int64_t at = 0
    cdef int j
    for j in range(8):
        t[j] = 0
    while at + 8 <= n:
        for j in range(8):
            t[j] = t[j] + <double> a[at + j]
        at += 8
    for j in range(<int> (n - at)):
        t[j] = t[j] + <double> a[at + j]
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]))


cdef inline void sum_slabs(const plan* p, const stored* x, const stored* dy, int64_t sets, slab* w,
                           double* sums) noexcept nogil:
    """sums[set] = as in sum_runs, about w.hi."""
    cdef int64_t row = 0, stop, count, s
    memset(sums, 0, 2 * sets * sizeof(double))
    while row < p.task.o:
        memset(w.s, 0, sizeof(w.s))
        memset(w.q, 0, sizeof(w.q))
        stop = minimum(p.task.o, row + RUN)
        while row < stop:
            count = minimum(STEP, stop - row)
            sum_rows(x + row * p.stride, past(dy, row * p.stride), count, p.stride, sets * p.n,
                     w.hi, w.s, w.q)
            row += count
        for s in range(sets):
            sums[2 * s] += sum_places(w.s + s * p.n, p.n)
            sums[2 * s + 1] += sum_places(w.q + s * p.n, p.n)


cdef inline void map_slabs(const plan* p, int64_t at, int64_t sets, const slab* w) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef int64_t _r
    for _r in range(t.o):
        if t.dy == NULL and fused(t):
            map_fused(t, at, sets * p.n, w.hi, w.s, w.q, True, NULL, NULL)
        else:
            map_row(<const stored*> t.x + at, past(<const stored*> t.dy, at), <stored*> t.y + at,
                    sets * p.n, w.hi, w.s, w.q, w.d, t.stream)
        at += p.stride
    if t.stream:
        stream_end()


cdef void forward_slabs(void* context, int64_t index) noexcept nogil:
    """forward_block in slabs."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef slab w
    cdef affine c
    cdef work about[BLOCK]
    cdef double sums[2 * BLOCK]
    cdef double mean, rstd
    cdef int64_t first = index * p.block, end = minimum(p.sets, first + p.block), sets, s
    cdef const stored* x
    while first < end:
        sets = minimum(p.group, end - first)
        x = <const stored*> t.x + first * p.n
        if not t.given:
            for s in range(sets):
                about[s] = sample(p, x + s * p.n)
                fill(w.hi + s * p.n, p.n, about[s])
            sum_slabs(p, x, NULL, sets, &w, sums)
        for s in range(sets):
            if t.given:
                mean = t.mean[first + s]
                rstd = p.partial[first + s]
            else:
                finish_set(p, first + s, x + s * p.n, about[s], sums + 2 * s, &mean, &rstd)
            c = affine_of(t, first + s, mean, rstd)
            fill(w.hi + s * p.n, p.n, c.hi)
            fill(w.s + s * p.n, p.n, c.scale)
            fill(w.q + s * p.n, p.n, c.shift)
        map_slabs(p, first * p.n, sets, &w)
        first += sets


cdef void forward_tile_sums(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef const stored* x = <const stored*> p.task.x + set_start(p.task, index // p.tiles)
    p.partial[2 * index] = p.partial[2 * index + 1] = 0
    sum_tile(p, x, sample(p, x), index % p.tiles, p.partial + 2 * index)


cdef void forward_tile_map(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef int64_t r0, r1, p0, p1, r, set_
    # Last tile first: the end of what the sums read is what is still in cache.
    set_ = index // p.tiles
    tile_bounds(p, index % p.tiles, &r0, &r1, &p0, &p1)
    for r in range(r0, r1):
        map_piece(p.task, set_, r, p0, p1, p.partial[2 * (p.sets * p.tiles + set_)],
                  p.partial[2 * (p.sets * p.tiles + set_) + 1], 0)
    if p.task.stream:
        stream_end()


cdef void given_tile(void* context, int64_t index) noexcept nogil:
    """A tile of the whole array in memory order; p.partial is rstd."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef int64_t p0 = index % p.pieces * p.piece, first = index // p.pieces * p.tile_runs, run
    for run in range(first, minimum(t.o * t.g, first + p.tile_runs)):
        map_piece(t, run % t.g, run // t.g, p0, minimum(p.n, p0 + p.piece), t.mean[run % t.g],
                  p.partial[run % t.g], 0)
    if t.stream:
        stream_end()


cdef void add_tile(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef int64_t r0, r1, p0, p1
    tile_bounds(p, index % p.tiles, &r0, &r1, &p0, &p1)
    add_terms(p.task, set_start(p.task, index // p.tiles) + p0, p1 - p0)


cdef public void rows_forward(const fn_task* t) noexcept nogil:
    cdef plan p
    cdef int64_t set_, tile
    cdef double sums[2]
    cdef double* found
    cdef const stored* x
    cut(&p, t, t.k * t.i)
    if t.given:
        for set_ in range(t.g):
            p.partial[set_] = 1.0 / sqrt(t.var[set_] + t.eps)
    if in_slabs(t):
        fn_parallel_for(t, ceil_div(p.sets, p.block), forward_slabs, &p, False)
    elif t.given:
        fn_parallel_for(t, ceil_div(t.o * t.g, p.tile_runs) * p.pieces, given_tile, &p, False)
    elif few_and_large(&p):
        if t.terms[0] != NULL:
            fn_parallel_for(t, p.sets * p.tiles, add_tile, &p, False)
        fn_parallel_for(t, p.sets * p.tiles, forward_tile_sums, &p, False)
        for set_ in range(p.sets):
            sums[0] = sums[1] = 0
            for tile in range(set_ * p.tiles, (set_ + 1) * p.tiles):
                sums[0] += p.partial[2 * tile]
                sums[1] += p.partial[2 * tile + 1]
            x = <const stored*> t.x + set_start(t, set_)
            found = p.partial + 2 * (p.sets * p.tiles + set_)
            finish_set(&p, set_, x, sample(&p, x), sums, found, found + 1)
        fn_parallel_for(t, p.sets * p.tiles, forward_tile_map, &p, True)
    elif t.o == 1 and t.i == 1:
        fn_parallel_for(t, ceil_div(p.sets, p.block), forward_elements, &p, False)
    else:
        fn_parallel_for(t, ceil_div(p.sets, p.block), forward_block, &p, False)


# ---- backward ----------------------------------------------------------------------------


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
    c.hi = <work> mean
    c.lo = mean - <double> c.hi
    c.rstd = t.rstd[set_]
    c.offset = <work> (-c.lo * c.rstd)


cdef inline void finish_terms(const fn_task* t, double gy, double gyd, terms* c) noexcept nogil:
    """From the sums over the set of gy and of gy*(x - hi)."""
    cdef double count = <double> (t.o * t.k * t.i)
    cdef double m1 = gy / count if t.has_mean else 0
    cdef double m2 = c.rstd * (gyd - c.lo * gy) / count
    if t.given:
        m1 = m2 = 0
    c.scale = <work> (-c.rstd * c.rstd * m2)
    c.shift = <work> (c.rstd * (c.rstd * m2 * c.lo - m1))


cdef void deactivate_channel(const plan* p, int64_t set_, int64_t k, int64_t at, int64_t runs,
                             int64_t n) noexcept nogil:
    """dy of some runs of a channel, from `at` on, taken back through the activation."""
    cdef const fn_task* t = p.task
    cdef affine c
    cdef int64_t r
    c = affine_of(t, set_ % t.g * t.k + k, t.mean[set_] if t.has_mean else 0, t.rstd[set_])
    for r in range(runs):
        map_fused(t, at + r * p.stride, n, &c.hi, &c.scale, &c.shift, False, NULL, NULL)


cdef inline void sum_channel(const plan* p, int64_t set_, int64_t k, int64_t tile, work hi,
                             double* sums) noexcept nogil:
    cdef int64_t r0, r1, p0, p1, at
    tile_bounds(p, tile, &r0, &r1, &p0, &p1)
    at = set_start(p.task, set_) + k * p.task.i + r0 * p.stride + p0
    if p.task.upstream != NULL:
        deactivate_channel(p, set_, k, at, r1 - r0, p1 - p0)
    sum_runs(<const stored*> p.task.x + at, <const stored*> p.task.dy + at, NULL, r1 - r0, p.stride,
             p1 - p0, hi, sums)


cdef inline void map_channel(const plan* p, int64_t start, int64_t channel, int64_t p0, int64_t p1,
                             const terms* c, int64_t ahead) noexcept nogil:
    """Places [p0, p1) of the run at `start`, of one channel."""
    cdef const fn_task* t = p.task
    cdef int64_t at = start + p0
    cdef work weight = (<const work*> t.weight)[channel]
    map_run(<const stored*> t.x + at, <const stored*> t.dy + at, <stored*> t.y + at, p1 - p0, c.hi,
            c.scale, c.shift, <work> (c.rstd * <double> weight), t.stream, ahead)


cdef inline void add_channel(const plan* p, int64_t set_, int64_t k, const double* sums,
                             const terms* c, double* dweight, double* dbias,
                             double* over_set) noexcept nogil:
    cdef int64_t channel = set_ % p.task.g * p.task.k + k
    cdef double weight = <double> (<const work*> p.task.weight)[channel]
    over_set[0] += weight * sums[0]
    over_set[1] += weight * sums[1]
    dweight[channel] += c.rstd * (sums[1] - c.lo * sums[0])
    dbias[channel] += sums[0]


cdef void backward_block(void* context, int64_t index) noexcept nogil:
    """Blocks of groups, for a part of b."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef terms c[BLOCK]
    cdef double sums[2]
    cdef double over_set[2]
    cdef int64_t b_tile = index // p.blocks, b, set_, s, stop, end, k, _k, tile, r
    cdef int64_t start, channel, ahead
    cdef double* dweight = p.partial + 2 * b_tile * t.g * t.k
    for b in range(b_tile * t.b // p.b_tiles, (b_tile + 1) * t.b // p.b_tiles):
        set_ = b * t.g + index % p.blocks * p.block
        end = minimum((b + 1) * t.g, set_ + p.block)
        fetch_group(p, t.x, set_, minimum(p.group, end - set_))
        fetch_group(p, t.dy, set_, minimum(p.group, end - set_))
        while set_ < end:
            stop = minimum(end, set_ + p.group)
            ahead = look_ahead(p, stop < end)
            if t.upstream != NULL:
                fetch_group(p, t.upstream, set_, stop - set_)
            if t.residual != NULL:
                fetch_group(p, t.residual, set_, stop - set_)
            for s in range(set_, stop):
                start_terms(t, s, &c[s - set_])
                over_set[0] = over_set[1] = 0
                for k in range(t.k):
                    sums[0] = sums[1] = 0
                    for tile in range(p.tiles):
                        sum_channel(p, s, k, tile, c[s - set_].hi, sums)
                    add_channel(p, s, k, sums, &c[s - set_], dweight, dweight + t.g * t.k, over_set)
                finish_terms(t, over_set[0], over_set[1], &c[s - set_])
            for r in range(t.o):
                start = set_start(t, set_) + r * p.stride
                channel = set_ % t.g * t.k
                for s in range(set_, stop):
                    for _k in range(t.k):
                        map_channel(p, start, channel, 0, p.n, &c[s - set_], ahead)
                        start += t.i
                        channel += 1
            set_ = stop
    if t.stream:
        stream_end()


cdef void backward_slabs(void* context, int64_t index) noexcept nogil:
    """backward_block in slabs."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef slab w
    cdef affine z
    cdef terms c[BLOCK]
    cdef double sums[2 * BLOCK]
    cdef double over_set[2]
    cdef int64_t first = index * p.block, end = minimum(p.sets, first + p.block), sets, s
    while first < end:
        sets = minimum(p.group, end - first)
        for s in range(sets):
            start_terms(t, first + s, &c[s])
            fill(w.hi + s * p.n, p.n, c[s].hi)
        if t.upstream != NULL:
            for s in range(sets):
                z = affine_of(t, first + s, t.mean[first + s] if t.has_mean else 0,
                              t.rstd[first + s])
                fill(w.s + s * p.n, p.n, z.scale)
                fill(w.q + s * p.n, p.n, z.shift)
            for s in range(t.o):
                map_fused(t, first * p.n + s * p.stride, sets * p.n, w.hi, w.s, w.q, True, NULL,
                          NULL)
        sum_slabs(p, <const stored*> t.x + first * p.n, <const stored*> t.dy + first * p.n, sets,
                  &w, sums)
        for s in range(sets):
            over_set[0] = over_set[1] = 0
            add_channel(p, first + s, 0, sums + 2 * s, &c[s], p.partial, p.partial + t.g, over_set)
            finish_terms(t, over_set[0], over_set[1], &c[s])
            fill(w.s + s * p.n, p.n, c[s].scale)
            fill(w.q + s * p.n, p.n, c[s].shift)
            fill(w.d + s * p.n, p.n, <work> (
                c[s].rstd * <double> (<const work*> t.weight)[first + s]))
        map_slabs(p, first * p.n, sets, &w)
        first += sets


cdef inline void backward_vec(
    const stored* x, const stored* dy, const stored* dsum, stored* y, int64_t stride, int64_t n,
    const work* weight, const vec* hi, const vec* rstd, const vec* offset, const vec* scale,
    const vec* shift, work* sum_w, work* sum_b, bint streaming, int64_t ahead, int rows
) noexcept nogil:
    """One vec of columns of one or two rows, or a tail of n."""
    cdef vec d, u
    cdef vec a = load_work(sum_w)
    cdef vec b = load_work(sum_b)
    cdef vec w = load_work(weight) if n == WIDTH else load_work_part(weight, n, 0)
    cdef int r
    for r in range(rows):
        if ahead:
            fetch(x + r * stride + ahead)
            fetch(dy + r * stride + ahead)
        if n == WIDTH:
            d = load(x + r * stride) - hi[r]
            u = load(dy + r * stride)
        else:
            d = load_part(x + r * stride, n, 0) - hi[r]
            u = load_part(dy + r * stride, n, 0)
        a = a + u * (d * rstd[r] + offset[r])
        b = b + u
        d = d * scale[r] + shift[r] + u * w * rstd[r]
        if dsum != NULL:
            d = d + (load(dsum + r * stride) if n == WIDTH else load_part(dsum + r * stride, n, 0))
        if n == WIDTH:
            put(y + r * stride, d, streaming)
        else:
            store_part(y + r * stride, n, d)
    memcpy(sum_w, &a, sizeof(vec))
    memcpy(sum_b, &b, sizeof(vec))


cdef inline void backward_rows(
    const stored* x, const stored* dy, const stored* dsum, stored* y, int64_t stride, int64_t n,
    const work* weight, const terms* c, work* sum_w, work* sum_b, bint streaming, int64_t ahead,
    int rows
) noexcept nogil:
    """dx of n columns of one or two rows; dweight and dbias onto sum_w and sum_b, which have room
    for whole vectors."""
    cdef vec hi[2]
    cdef vec rstd[2]
    cdef vec offset[2]
    cdef vec scale[2]
    cdef vec shift[2]
    cdef int64_t p = 0
    cdef int r
    for r in range(rows):
        hi[r] = splat(c[r].hi)
        rstd[r] = splat(<work> c[r].rstd)
        offset[r] = splat(c[r].offset)
        scale[r] = splat(c[r].scale)
        shift[r] = splat(c[r].shift)
    while p + WIDTH <= n:
        backward_vec(x + p, dy + p, past(dsum, p), y + p, stride, WIDTH, weight + p, hi, rstd,
                     offset, scale, shift, sum_w + p, sum_b + p, streaming, ahead, rows)
        p += WIDTH
    if p < n:
        backward_vec(x + p, dy + p, past(dsum, p), y + p, stride, n - p, weight + p, hi, rstd,
                     offset, scale, shift, sum_w + p, sum_b + p, False, ahead, rows)


cdef void backward_elements(void* context, int64_t index) noexcept nogil:
    """i == 1 and o == 1: rows with a weight for each place; a part of b, one group."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef terms c[ROWS]
    cdef work sum_w[STRIP + MOST_WIDTH]
    cdef work sum_b[STRIP + MOST_WIDTH]
    cdef double sums[2]
    cdef int64_t b_tile = index // t.g, g = index % t.g, size = t.g * t.k
    cdef int64_t b, at, r, rows, k, n, j, ahead
    cdef int64_t end = (b_tile + 1) * t.b // p.b_tiles
    # By the geometry alone: dweight meets a double after this many rows.
    cdef int64_t group = maximum(2, minimum(ROWS, 8 * ELEMENTS // t.k))
    cdef const stored* x = <const stored*> t.x
    cdef const stored* dy = <const stored*> t.dy
    cdef const stored* dsum = <const stored*> t.dsum
    cdef stored* y = <stored*> t.y
    cdef const work* weight = <const work*> t.weight + g * t.k
    cdef double* dweight = p.partial + 2 * b_tile * size + g * t.k
    cdef work rstd
    cdef bint stream = (t.stream and until_aligned(y) == 0
                        and t.k * <int64_t> sizeof(stored) % 64 == 0)
    b = b_tile * t.b // p.b_tiles
    while b < end:
        rows = minimum(group, end - b)
        for r in range(rows):
            at = (b + r) * size + g * t.k
            start_terms(t, (b + r) * t.g + g, &c[r])
            if t.upstream != NULL:
                rstd = <work> c[r].rstd
                map_fused(t, at, t.k, &c[r].hi, &rstd, &c[r].offset, False, weight,
                          <const work*> t.bias + g * t.k)
            sums[0] = sums[1] = 0
            sum_runs(x + at, dy + at, weight, 1, 0, t.k, c[r].hi, sums)
            finish_terms(t, sums[0], sums[1], &c[r])
        ahead = group * size if t.stream and b + rows < end else 0
        k = 0
        while k < t.k:
            n = minimum(STRIP, t.k - k)
            memset(sum_w, 0, (n + MOST_WIDTH) * sizeof(work))
            memset(sum_b, 0, (n + MOST_WIDTH) * sizeof(work))
            at = b * size + g * t.k + k
            for r in range(0, rows - 1, 2):
                backward_rows(x + at, dy + at, past(dsum, at), y + at, size, n, weight + k, c + r,
                              sum_w, sum_b, stream, ahead, 2)
                at += 2 * size
            if rows % 2 == 1:
                backward_rows(x + at, dy + at, past(dsum, at), y + at, size, n, weight + k,
                              c + rows - 1, sum_w, sum_b, stream, ahead, 1)
            for j in range(n):
                dweight[k + j] += <double> sum_w[j]
                dweight[size + k + j] += <double> sum_b[j]
            k += n
        b += rows
    if stream:
        stream_end()


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
        sum_channel(p, set_, k, tile, c.hi, sums)


cdef void backward_tile_map(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef int64_t set_, k0, k1, tile, k, r0, r1, p0, p1, r
    cdef double* over_set
    cdef terms c
    unit_bounds(p, index, &set_, &k0, &k1, &tile)
    over_set = p.partial + 2 * (p.sets * t.k * p.tiles + set_)
    start_terms(t, set_, &c)
    finish_terms(t, over_set[0], over_set[1], &c)
    tile_bounds(p, tile, &r0, &r1, &p0, &p1)
    for r in range(r0, r1):
        for k in range(k0, k1):
            map_channel(p, set_start(t, set_) + k * t.i + r * p.stride, set_ % t.g * t.k + k, p0,
                        p1, &c, 0)
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
            add_channel(p, set_, k, sums, &c, t.dweight, t.dbias, over_set)
    fn_parallel_for(t, units, backward_tile_map, p, True)


cdef public void rows_backward(const fn_task* t) noexcept nogil:
    cdef plan p
    cdef int64_t size = t.g * t.k, j, tile
    cut(&p, t, t.i)
    p.blocks = ceil_div(t.g, p.block)
    for j in range(size):
        t.dweight[j] = t.dbias[j] = 0
    if t.i > 1 and few_and_large(&p):
        backward_split(&p)
        return
    for j in range(2 * p.b_tiles * size):
        p.partial[j] = 0
    if t.i == 1:
        fn_parallel_for(t, p.b_tiles * t.g, backward_elements, &p, False)
    elif in_slabs(t):
        fn_parallel_for(t, p.blocks, backward_slabs, &p, False)
    else:
        fn_parallel_for(t, p.b_tiles * p.blocks, backward_block, &p, False)
    for tile in range(p.b_tiles):
        for j in range(size):
            t.dweight[j] += p.partial[2 * tile * size + j]
            t.dbias[j] += p.partial[(2 * tile + 1) * size + j]
