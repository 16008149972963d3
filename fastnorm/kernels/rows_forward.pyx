"""The rows loop order forward; see rows.pxd. Short runs are slabs.pyx."""

from libc.string cimport memcpy, memset

from fastnorm.kernels.rows cimport *
from fastnorm.kernels.rows_forward cimport *
from fastnorm.kernels.runs cimport *
from fastnorm.kernels.words cimport *


cdef extern from "kernels.h" nogil:
    void slabs_forward(void* context)


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
    if t.b == t.k == 1 and 1 < t.i < SHORT_RUN:  # in sheets, perhaps
        backward = maximum(backward, (2 * SHEETS + 3) * t.g)
    return maximum(forward, backward) * sizeof(double)


cdef inline void map_elements(const fn_task* t, const stored* x, int64_t at, int64_t channel,
                              int64_t n, double mean, double rstd, int64_t ahead,
                              edge* ends) noexcept nogil:
    """Normalize n values with a weight and a bias for each, the first of them `channel`'s. x is
    where they lie, t.x + at or a copy."""
    cdef work hi = 0 if t.scaled else hi_of(mean, rstd, far_of(t), t.eps), scale = <work> rstd
    cdef work shift = <work> (-(mean - <double> hi) * rstd)
    cdef coefficients c = affine_map(OF_ALL, &hi, &scale, &shift)
    cdef coefficients own  # c stays in registers
    c.weight = <const work*> t.weight + channel
    c.bias = <const work*> t.bias + channel
    if t.fused:
        own = c
        map_fused(t, at, n, 1, 0, &own, ends)
        return
    if t.scaled:
        c.hi = c.shift = c.bias = NULL
        map_places(x, NULL, <stored*> t.y + at, n, &c, t.stream, ahead, ends)
    else:
        map_places(x, NULL, <stored*> t.y + at, n, &c, t.stream, ahead, ends)


cdef inline void map_at(const fn_task* t, int64_t at, int64_t n, const coefficients* c,
                        int64_t ahead, edge* ends) noexcept nogil:
    """The n values of a run from `at` on."""
    cdef coefficients own  # what c points to stays in registers
    if t.fused:
        own = c[0]
        map_fused(t, at, n, 1, 0, &own, ends)
    else:
        map_places(<const stored*> t.x + at, NULL, <stored*> t.y + at, n, c, t.stream, ahead,
                   ends)


cdef inline void map_channels(const fn_task* t, int64_t set_, int64_t r, int64_t p0, int64_t p1,
                              double mean, double rstd, int64_t ahead, edge* ends) noexcept nogil:
    """Normalize the places [p0, p1) of run r of a set, i of them of each channel."""
    cdef int64_t start = set_start(t, set_) + r * t.g * t.k * t.i, at = p0, stop, j, n, channels
    cdef int64_t k = p0 // t.i, end = ceil_div(p1, t.i)
    cdef const work* weight = <const work*> t.weight + set_ % t.g * t.k
    cdef const work* bias = <const work*> t.bias + set_ % t.g * t.k
    cdef work his[BLOCK]
    cdef work scale[BLOCK]
    cdef work shift[BLOCK]
    cdef work hi = hi_of(mean, rstd, far_of(t), t.eps)
    cdef double lo = mean - <double> hi, scaled
    cdef coefficients c
    while k < end:
        channels = minimum(BLOCK, end - k)
        for j in range(channels):  # a loop of vectors
            scaled = rstd * <double> weight[k + j]
            scale[j] = <work> scaled
            shift[j] = <work> (<double> bias[k + j] - lo * scaled)
        stop = minimum(p1, (k + channels) * t.i)
        if t.fused and stop - at == channels * t.i:
            for j in range(channels):
                his[j] = hi
            c = affine_map(OF_ROWS, his, scale, shift)
            map_fused(t, start + at, t.i, channels, t.i, &c, ends)
            at = stop
        j = 0
        while at < stop:
            n = minimum(p1, (k + j + 1) * t.i) - at
            c = affine_map(OF_ALL, &hi, &scale[j], &shift[j])
            map_at(t, start + at, n, &c, ahead, ends)
            at += n
            j += 1
        k += channels


cdef void map_piece(const fn_task* t, int64_t set_, int64_t r, int64_t p0, int64_t p1,
                    double mean, double rstd, int64_t ahead, edge* ends) noexcept nogil:
    """Normalize the places [p0, p1) of run r of a set. (Callers with many short runs have the
    inlined loops themselves: by this function 1.03 to 1.13 times as long.)"""
    cdef int64_t at = set_start(t, set_) + r * t.g * t.k * t.i + p0
    if t.i == 1:
        map_elements(t, <const stored*> t.x + at, at, set_ % t.g * t.k + p0, p1 - p0, mean, rstd,
                     ahead, ends)
    else:
        map_channels(t, set_, r, p0, p1, mean, rstd, ahead, ends)


cdef inline void map_one(const fn_task* t, int64_t at, int64_t n, int64_t channel, double mean,
                         double rstd, int64_t ahead, edge* ends) noexcept nogil:
    """Normalize n values of one channel."""
    cdef affine a = affine_of(t, channel, mean, rstd)
    cdef coefficients c = map_of(&a)
    map_at(t, at, n, &c, ahead, ends)


cdef inline void map_group(const plan* p, int64_t first, int64_t sets, const double* mean,
                           const double* rstd, int64_t ahead, edge* ends) noexcept nogil:
    """map_piece for neighbouring sets of one channel each, in memory order."""
    cdef const fn_task* t = p.task
    cdef affine a
    cdef coefficients c
    cdef work hi[BLOCK]
    cdef work scale[BLOCK]
    cdef work shift[BLOCK]
    cdef int64_t s, at = set_start(t, first), _r
    cdef const stored* x
    cdef stored* y
    for s in range(sets):
        a = affine_of(t, (first + s) % t.g, mean[s], rstd[s])
        hi[s] = a.hi
        scale[s] = a.scale
        shift[s] = a.shift
    for _r in range(t.o):
        if t.fused:
            c = affine_map(OF_ROWS, hi, scale, shift)
            map_fused(t, at, p.n, sets, p.n, &c, ends)
        else:
            x = <const stored*> t.x + at
            y = <stored*> t.y + at
            for s in range(sets):
                c = affine_map(OF_ALL, &hi[s], &scale[s], &shift[s])
                map_places(x, NULL, y, p.n, &c, t.stream, ahead, ends)
                x += p.n
                y += p.n
        at += p.stride


cdef inline void find_sets(const plan* p, int64_t first, int64_t stop, double* mean, double* rstd,
                           bint masked) noexcept nogil:
    cdef double sums[2]
    cdef int64_t set_, tile
    cdef work about
    for set_ in range(first, stop):
        about = sample(p, set_, masked)
        sums[0] = sums[1] = 0
        for tile in range(p.tiles):
            sum_tile(p, set_, about, tile, sums, masked)
        finish_set(p, set_, about, sums, &mean[set_ - first], &rstd[set_ - first], masked)


cdef void forward_block(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef double mean[BLOCK]
    cdef double rstd[BLOCK]
    cdef int64_t first = index * p.block, end = minimum(p.sets, first + p.block), stop
    cdef int64_t set_, r, ahead
    cdef edge ends
    open_edge(&ends)
    fetch_group(p, t.x, first, minimum(p.group, end - first))
    while first < end:
        stop = minimum(end, first + p.group)
        ahead = look_ahead(p, stop < end)
        if t.fused:  # map_fused asks for nothing
            fetch_group(p, t.x, first, stop - first)
            if t.residual != NULL:
                fetch_group(p, t.residual, first, stop - first)
        if t.mask == NULL:
            find_sets(p, first, stop, mean, rstd, False)
        else:
            find_sets(p, first, stop, mean, rstd, True)
        if t.k == 1 and t.i > 1 and (t.o == 1 or t.b == 1):
            map_group(p, first, stop - first, mean, rstd, ahead, &ends)
            first = stop
            continue
        for r in range(t.o):
            for set_ in range(first, stop):
                map_piece(t, set_, r, 0, p.n, mean[set_ - first], rstd[set_ - first],
                          ahead, &ends)
        first = stop
    close_edge(&ends)
    if t.stream:
        stream_end()


cdef void leave_row(const fn_task* t, int64_t set_) noexcept nogil:
    """A row that does not count: zeros."""
    memset(<stored*> t.y + set_ * t.k, 0, t.k * sizeof(stored))
    if t.terms[0] != NULL:
        add_terms(t, set_ * t.k, t.k, NULL)
    if t.mean != NULL:
        t.mean[set_] = 0
    if t.var != NULL:
        t.var[set_] = 0
    if t.rstd != NULL:
        t.rstd[set_] = 0


cdef inline bint keeps_sums(const plan* p) noexcept nogil:
    """Whether x, the sum of two terms, passes the caches by too, and what is read of it again is a
    copy in them: else its lines are read before they are written."""
    cdef const fn_task* t = p.task
    cdef bint streaming = t.stream and t.terms[0] != NULL and not t.fused
    if streaming:
        head(<const stored*> t.x, p.n, &streaming)
    return streaming and p.n <= KEPT and t.x != t.terms[0] and t.x != t.terms[1]


cdef struct found:
    # Sets that are one run each, whose statistics are known.
    int64_t first
    int64_t rows
    const stored* x  # of the first
    double mean[ROWS]
    double rstd[ROWS]


cdef inline void find_rows(const plan* p, stored* kept, found* f) noexcept nogil:
    """The statistics of sets that are one run: of short ones folds, divisions and roots are those
    of vectors. With `kept`, there is a copy of x in it afterwards."""
    cdef const fn_task* t = p.task
    cdef work about[ROWS]
    cdef double s[ROWS]
    cdef double q[ROWS]
    cdef double var[ROWS]
    cdef eight_work folded_s[ROWS]
    cdef eight_work folded_q[ROWS]
    cdef double sums[2]
    cdef double count = <double> p.n, inverse = p.inverse, eps = t.eps
    cdef int64_t r
    cdef int again = 0
    cdef bint brief = p.n <= FLUSH * LANES
    cdef const stored* x = <const stored*> t.x + f.first * p.n
    f.x = x if kept == NULL else kept
    memset(about, 0, sizeof(about))
    memset(s, 0, sizeof(s))
    memset(q, 0, sizeof(q))
    for r in range(f.rows):
        if t.terms[0] != NULL:
            add_terms(t, (f.first + r) * p.n, p.n, NULL if kept == NULL else kept + r * p.n)
        x = f.x + r * p.n
        if t.has_mean:
            about[r] = sample_runs(x, 1, 0, p.n)
        if brief and t.has_mean:
            sum_short(x, NULL, NULL, p.n, about[r], &folded_s[r], &folded_q[r])
        elif brief:
            sum_short(x, NULL, NULL, p.n, 0, NULL, &folded_q[r])
        else:
            sums[0] = sums[1] = 0
            sum_runs(x, NULL, NULL, 1, 0, p.n, about[r], NULL, sums, p.sums_ahead)
            s[r] = sums[0]
            q[r] = sums[1]
    if brief:
        fold_rows(folded_q, f.rows, q)
    if brief and t.has_mean:
        fold_rows(folded_s, f.rows, s)
    if not t.has_mean:
        memset(s, 0, sizeof(s))
    for r in range(f.rows):
        again |= cancels(s[r], q[r], count) << r
    for r in range(ROWS):
        f.mean[r] = <double> about[r] + s[r] * inverse
        var[r] = (q[r] - s[r] * s[r] * inverse) * inverse
    if again:
        for r in range(f.rows):
            if again >> r & 1:
                exact_statistics(p, f.first + r, about[r], &f.mean[r], &var[r])
    for r in range(ROWS):
        f.rstd[r] = 1.0 / sqrt(var[r] + eps)
    if t.mean != NULL:
        memcpy(t.mean + f.first, f.mean, f.rows * sizeof(double))
    if t.var != NULL:
        memcpy(t.var + f.first, var, f.rows * sizeof(double))
    if t.rstd != NULL:
        memcpy(t.rstd + f.first, f.rstd, f.rows * sizeof(double))


cdef inline void map_found(const plan* p, const found* f, int64_t ahead,
                           edge* ends) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef int64_t r, k = 0, n, set_, channel, strip = STRIP
    if t.i > 1:
        for r in range(f.rows):
            set_ = f.first + r
            if t.k > 1:
                map_channels(t, set_, 0, 0, p.n, f.mean[r], f.rstd[r], ahead, ends)
            else:
                map_one(t, set_ * t.i, t.i, set_ % t.g, f.mean[r], f.rstd[r], ahead, ends)
        return
    if t.stream and p.n * <int64_t> sizeof(stored) % 64 != 0:
        strip = t.k  # so that a line is whole before another begins
    while k < t.k:
        n = minimum(strip, t.k - k)
        for r in range(f.rows):
            set_ = f.first + r
            channel = set_ % t.g * t.k + k if t.g > 1 else k
            map_elements(t, f.x + r * t.k + k, set_ * t.k + k, channel, n, f.mean[r], f.rstd[r],
                         ahead, ends)
        k += n


cdef void forward_few(void* context, int64_t index) noexcept nogil:
    """forward_block for o == 1, where a set is one run: short ones ROWS at a time.

    What was tried instead: to map sets only after the next ones are summed, so that nothing waits
    for divisions and roots (1.0 to 1.2 times as long for up to 128 values); where the last-level
    cache holds all arrays, rows one by one, nothing asked for, and y stored plainly (0.67 to 0.9 of
    the time where 16 to 24 MB of its 32 are moved and others leave it alone, 1.1 to 2 times as long
    where they do not)."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef int64_t set_ = index * p.block, end = minimum(p.sets, set_ + p.block), ahead = 0
    cdef bint foreseeing = t.stream or (t.beyond and t.i == 1)
    cdef int64_t group = minimum(2 if foreseeing else 4,
                                 t.l2 // 4 // (p.n * <int64_t> sizeof(stored)))
    cdef bint keeping = keeps_sums(p)
    cdef stored kept[KEPT]
    cdef found now
    cdef edge ends
    open_edge(&ends)
    group = maximum(1, minimum(ROWS, maximum(group, ELEMENTS // p.n)))
    if keeping:
        group = minimum(group, KEPT // p.n)
    while set_ < end:
        now.first, now.rows = set_, minimum(group, end - set_)
        if t.mask != NULL:
            if not t.mask[set_ // t.g]:
                leave_row(t, set_)
                set_ += 1
                continue
            now.rows = valid_rows(t, set_, now.rows) if t.g == 1 else 1
        set_ += now.rows
        find_rows(p, kept if keeping else NULL, &now)
        # The next sets are asked for, also those of the next block; not where sets have several
        # channels (the next block's then 1.0 to 1.3 times as long), nor long rows, which the
        # processor sees coming (1.0 to 1.3). Rows with a weight for each place are asked for from
        # the last-level cache too (0.65 to 1.0 of the time; images 1.0 to 1.2). All asked for
        # before the map, or before the sums, they gain half as much. A Xeon sees them coming where
        # it does not stream y (0.86 to 1.0 of the time unasked).
        ahead = 0
        if (foreseeing and (t.unseen or not t.foreseen) and t.terms[0] == NULL and p.n < ELEMENTS
                and set_ < (end if t.k > 1 and t.i > 1 else p.sets)):
            ahead = group * p.n
        map_found(p, &now, ahead, &ends)
    close_edge(&ends)
    if t.stream:
        stream_end()


cdef void forward_tile_sums(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef int64_t set_ = index // p.tiles
    cdef bint masked = p.task.mask != NULL
    p.partial[2 * index] = p.partial[2 * index + 1] = 0
    sum_tile(p, set_, sample(p, set_, masked), index % p.tiles, p.partial + 2 * index, masked)


cdef void forward_tile_map(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef int64_t r0, r1, p0, p1, r, set_
    cdef edge ends
    open_edge(&ends)
    # Last tile first: the end of what the sums read is what is still in cache.
    set_ = index // p.tiles
    tile_bounds(p, index % p.tiles, &r0, &r1, &p0, &p1)
    for r in range(r0, r1):
        map_piece(p.task, set_, r, p0, p1, p.partial[2 * (p.sets * p.tiles + set_)],
                  p.partial[2 * (p.sets * p.tiles + set_) + 1], 0, &ends)
    close_edge(&ends)
    if p.task.stream:
        stream_end()


cdef void given_tile(void* context, int64_t index) noexcept nogil:
    """A tile of the whole array in memory order; p.partial is rstd."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef int64_t p0 = index % p.pieces * p.piece, first = index // p.pieces * p.tile_runs, run, g
    cdef int64_t p1 = minimum(p.n, p0 + p.piece), ahead = t.ahead if t.unseen else 0
    cdef edge ends
    open_edge(&ends)
    for run in range(first, minimum(t.o * t.g, first + p.tile_runs)):
        g = run % t.g
        if t.k > 1 or t.i == 1:
            map_piece(t, g, run // t.g, p0, p1, t.mean[g], p.partial[g], ahead, &ends)
        elif ahead > 0:  # inlined: 0.88 to 0.98 of the time
            map_one(t, run * p.n + p0, p1 - p0, g, t.mean[g], p.partial[g], ahead, &ends)
        else:
            map_one(t, run * p.n + p0, p1 - p0, g, t.mean[g], p.partial[g], 0, &ends)
    close_edge(&ends)
    if t.stream:
        stream_end()


cdef void add_tile(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef int64_t r0, r1, p0, p1
    tile_bounds(p, index % p.tiles, &r0, &r1, &p0, &p1)
    add_terms(p.task, set_start(p.task, index // p.tiles) + p0, p1 - p0, NULL)


cdef public void rows_forward(const fn_task* t) noexcept nogil:
    cdef plan p
    cdef int64_t set_, tile
    cdef double sums[2]
    cdef double* found
    cut(&p, t, t.k * t.i)
    if in_slabs(t):
        slabs_forward(&p)
        return
    if t.given:
        for set_ in range(t.g):
            p.partial[set_] = 1.0 / sqrt(t.var[set_] + t.eps)
        if p.pieces == 1:  # no sums: tiles of all sets, as many for each thread
            p.tile_runs = minimum(p.tile_runs, ceil_div(t.o * t.g, maximum(1, t.threads)))
            p.tile_runs = ceil_div(t.o * t.g, shared_evenly(ceil_div(t.o * t.g, p.tile_runs)))
    if t.given:
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
            found = p.partial + 2 * (p.sets * p.tiles + set_)
            finish_set(&p, set_, sample(&p, set_, t.mask != NULL), sums, found, found + 1,
                       t.mask != NULL)
        fn_parallel_for(t, p.sets * p.tiles, forward_tile_map, &p, True)
    elif t.o == 1 and (t.i == 1 or t.mask == NULL):
        fn_parallel_for(t, ceil_div(p.sets, p.block), forward_few, &p, False)
    else:
        fn_parallel_for(t, ceil_div(p.sets, p.block), forward_block, &p, False)
