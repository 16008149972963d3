"""Inlined words of the kernels: sums over runs, and a run mapped and stored.

Sums keep LANES partial sums in the working type, a fixed number, so that every vector width
gives the same bits; after FLUSH steps the lanes are added to doubles, so that a lane never
sums more than 2*FLUSH values in the working type. Loops over VECTORS are unrolled, and arrays of
that many stay in registers.
"""

from libc.stdint cimport int64_t

from fastnorm.kernels.words cimport *


# ---- sums over runs ----------------------------------------------------------------------


cdef inline void sum_step(
    const stored* x, const stored* dy, const work* weight, int64_t n, vec about, work fill,
    const vec* gate, vec* s, vec* q, bint plain, int64_t ahead
) noexcept nogil:
    """LANES values; n of them where n is not LANES. Where s is NULL, only q. `plain` is about 0.
    With `ahead`, what lies so far ahead is asked for meanwhile."""
    cdef vec a, d
    cdef int v
    for v in range(VECTORS):
        if ahead and opens_line(v):
            fetch(x + v * WIDTH + ahead)
            if dy != NULL:
                fetch(dy + v * WIDTH + ahead)
        if n == LANES:
            d = load(x + v * WIDTH)
            if not plain:
                d = d - about
            a = d
            if dy != NULL:
                a = load(dy + v * WIDTH)
                if weight != NULL:
                    a = a * load_work(weight + v * WIDTH)
        else:
            d = load_part(x + v * WIDTH, n - v * WIDTH, fill)
            if not plain:
                d = d - about
            a = d
            if dy != NULL:
                a = load_part(dy + v * WIDTH, n - v * WIDTH, 0)
                if weight != NULL:
                    a = a * load_work_part(weight + v * WIDTH, n - v * WIDTH, 0)
        if gate != NULL:
            a = through_relu(d * gate[0] + gate[1], a)
        if s != NULL:
            s[v] = s[v] + a
        q[v] = plus_product(a, d, q[v]) if plain and weight == NULL else plus(a * d, q[v])


cdef inline void sum_lanes(
    const stored* x, const stored* dy, const work* weight, int64_t n, vec about, work fill,
    const vec* gate, vec* s, vec* q, bint plain, int64_t ahead
) noexcept nogil:
    """sum_step over n values."""
    cdef int64_t p = 0
    while p + LANES <= n:
        sum_step(x + p, past(dy, p), past_weight(weight, p), LANES, about, fill, gate, s,
                 q, plain, ahead)
        p += LANES
    if p < n:
        sum_step(x + p, past(dy, p), past_weight(weight, p), n - p, about, fill, gate, s,
                 q, plain, 0)


cdef inline void sum_short(
    const stored* x, const stored* dy, const work* weight, int64_t n, work about,
    eight_work* folded_s, eight_work* folded_q
) noexcept nogil:
    """sum_runs of one run of at most FLUSH*LANES values, folded to eight: storing and loading all
    lanes took 1.03 to 1.3 times as long at rows of 64 to 128. Where folded_s is NULL, about 0, and
    only the second sums: with a map that only scales, RMS norm takes 0.75 to 0.85 of the time in
    cache."""
    cdef vec s[VECTORS]
    cdef vec q[VECTORS]
    cdef int v
    for v in range(VECTORS):
        s[v] = q[v] = splat(0)
    if folded_s == NULL:
        sum_lanes(x, dy, weight, n, splat(0), 0, NULL, NULL, q, True, 0)
    elif EXACT and about == 0:
        sum_lanes(x, dy, weight, n, splat(0), 0, NULL, s, q, True, 0)
    else:
        sum_lanes(x, dy, weight, n, splat(about), about, NULL, s, q, False, 0)
    if folded_s != NULL:
        fold_to_eight(folded_s, s)
    fold_to_eight(folded_q, q)


cdef inline void sum_runs(
    const stored* x, const stored* dy, const work* weight, int64_t runs, int64_t stride, int64_t n,
    work about, const vec* gate, double* sums, int64_t ahead
) noexcept nogil:
    """Add to sums[0] and sums[1], over `runs` runs of n values, with d = x - about,

        d         and d*d          where dy is NULL
        dy        and dy*d         where weight is NULL
        dy*weight and dy*weight*d  with one weight for each place in the run

    Where gate is not NULL, dy is taken back through ReLU, whose input was d*gate[0] + gate[1].
    `ahead` as in sum_step.
    """
    if EXACT and about == 0:
        sum_runs_about(x, dy, weight, runs, stride, n, 0, gate, sums, True, ahead)
    else:
        sum_runs_about(x, dy, weight, runs, stride, n, about, gate, sums, False,
                       ahead)


cdef inline void sum_runs_about(
    const stored* x, const stored* dy, const work* weight, int64_t runs, int64_t stride, int64_t n,
    work about, const vec* gate, double* sums, bint plain, int64_t ahead
) noexcept nogil:
    cdef vec s[VECTORS]
    cdef vec q[VECTORS]
    cdef double total_s[LANES]
    cdef double total_q[LANES]
    cdef int64_t _r, p, stop, steps = 0
    cdef bint flushed = False
    cdef vec center = splat(about)
    cdef int v
    for v in range(VECTORS):
        s[v] = q[v] = splat(0)
    for _r in range(runs):
        p = 0
        while p < n:
            stop = minimum(n, p + FLUSH * LANES)
            steps += (stop - p + LANES - 1) // LANES
            sum_lanes(x + p, past(dy, p), past_weight(weight, p), stop - p, center, about, gate,
                      s, q, plain, ahead)
            p = stop
            if steps >= FLUSH:
                flush_lanes(s, total_s, flushed)
                flush_lanes(q, total_q, flushed)
                for v in range(VECTORS):
                    s[v] = q[v] = splat(0)
                flushed = True
                steps = 0
        x += stride
        dy = past(dy, stride)
    if flushed:
        sums[0] += fold_lanes(s, total_s)
        sums[1] += fold_lanes(q, total_q)
    else:
        sums[0] += fold_lanes(s, NULL)
        sums[1] += fold_lanes(q, NULL)


cdef inline void sum_runs_exact(
    const stored* x, int64_t runs, int64_t stride, int64_t n, double about, double* sums
) noexcept nogil:
    """sum_runs of x with every operation in double, for values whose squares leave the working
    type and for an `about` far from the mean."""
    cdef double s[LANES]
    cdef double q[LANES]
    cdef double d
    cdef int64_t _r, p
    cdef int j
    for j in range(LANES):
        s[j] = q[j] = 0
    for _r in range(runs):
        p = 0
        while p + LANES <= n:
            for j in range(LANES):
                d = <double> widen(x[p + j]) - about
                s[j] = s[j] + d
                q[j] = q[j] + d * d
            p += LANES
        for j in range(<int> (n - p)):
            d = <double> widen(x[p + j]) - about
            s[j] = s[j] + d
            q[j] = q[j] + d * d
        x += stride
    for j in range(LANES):
        sums[0] += s[j]
        sums[1] += q[j]


# ---- one run, mapped ---------------------------------------------------------------------


cdef inline vec mapped(vec x, vec dy, vec hi, vec scale, vec shift, vec dscale, bint with_dy,
                       const vec* gate, bint plain) noexcept nogil:
    """gate as in sum_runs; `plain` where hi is 0."""
    cdef vec d = x if plain else x - hi
    cdef vec y = d * scale + shift
    if gate != NULL:
        dy = through_relu(d * gate[0] + gate[1], dy)
    if with_dy:
        y = y + dy * dscale
    return y


cdef inline void load_batch(vec* a, vec* b, const stored* x, const stored* dy, int64_t ahead,
                            int vectors) noexcept nogil:
    """a = x, and b = dy."""
    cdef int v
    for v in range(vectors):
        a[v] = load(x + v * WIDTH)
        if dy != NULL:
            b[v] = load(dy + v * WIDTH)
        if ahead and opens_line(v):
            fetch(x + v * WIDTH + ahead)
            if dy != NULL:
                fetch(dy + v * WIDTH + ahead)


cdef inline void map_batch(
    vec* a, const vec* b, stored* y, int64_t p, const coefficients* c, const vec* one, bint with_dy,
    bint streaming, int vectors
) noexcept nogil:
    """The places from p on of y, from those of x in a and of dy in b. `one` holds hi, scale, shift,
    dscale and the gate where one serves every place."""
    cdef bint each = c.which == OF_PLACES
    cdef vec gate[2]
    cdef int64_t at
    cdef int v
    for v in range(vectors):
        at = p + v * WIDTH
        if c.gate_scale != NULL:
            gate[0] = load_work(c.gate_scale + at) if each else one[4]
            gate[1] = load_work(c.gate_shift + at) if each else one[5]
        if c.shift == NULL:
            a[v] = a[v] * one[1] * load_work(c.weight + at)
            continue
        a[v] = mapped(a[v], b[v], load_work(c.hi + at) if each and c.hi != NULL else one[0],
                      load_work(c.scale + at) if each else one[1],
                      load_work(c.shift + at) if each else one[2],
                      load_work(c.dscale + at) if each and with_dy else one[3], with_dy,
                      NULL if c.gate_scale == NULL else gate, c.hi == NULL)
        if c.weight != NULL:
            a[v] = a[v] * load_work(c.weight + at) + load_work(c.bias + at)
    put_all(y + p, a, streaming, vectors)


cdef inline vec mapped_part(const stored* x, const stored* dy, int64_t p, int64_t n,
                            const coefficients* c, const vec* one) noexcept nogil:
    """What map_batch makes of n places, at most WIDTH."""
    cdef bint each = c.which == OF_PLACES
    cdef vec gate[2]
    cdef vec d, u = splat(0)
    if c.shift == NULL:
        return load_part(x + p, n, 0) * one[1] * load_work_part(c.weight + p, n, 0)
    if dy != NULL:
        u = load_part(dy + p, n, 0)
    if c.gate_scale != NULL:
        gate[0] = load_work_part(c.gate_scale + p, n, 0) if each else one[4]
        gate[1] = load_work_part(c.gate_shift + p, n, 0) if each else one[5]
    d = mapped(load_part(x + p, n, 0 if c.hi == NULL else c.hi[0]), u,
               load_work_part(c.hi + p, n, 0) if each and c.hi != NULL else one[0],
               load_work_part(c.scale + p, n, 0) if each else one[1],
               load_work_part(c.shift + p, n, 0) if each else one[2],
               load_work_part(c.dscale + p, n, 0) if each and dy != NULL else one[3], dy != NULL,
               NULL if c.gate_scale == NULL else gate, c.hi == NULL)
    if c.weight != NULL:
        d = d * load_work_part(c.weight + p, n, 0) + load_work_part(c.bias + p, n, 0)
    return d


cdef inline int64_t map_batches(
    const stored* x, const stored* dy, stored* y, int64_t p, int64_t n, const coefficients* c,
    const vec* one, int64_t ahead
) noexcept nogil:
    """map_places of the places [p, n), as many as are whole batches, at least one; where they end.

    A batch is loaded before the one in front of it is stored: where y lies a little behind x
    modulo 4096, a load seems to depend on the store just before it (1.1 to 1.3 times as long in
    cache). Without a condition in the loop, for which gcc kept both batches on the stack (1.05)."""
    cdef vec now[BATCH]
    cdef vec now_dy[BATCH]
    cdef vec later[BATCH]
    cdef vec later_dy[BATCH]
    cdef int v
    load_batch(now, now_dy, x + p, past(dy, p), ahead, BATCH)
    while p + 2 * BATCH * WIDTH <= n:
        load_batch(later, later_dy, x + p + BATCH * WIDTH, past(dy, p + BATCH * WIDTH), ahead,
                   BATCH)
        map_batch(now, now_dy, y, p, c, one, dy != NULL, False, BATCH)
        for v in range(BATCH):
            now[v] = later[v]
            if dy != NULL:
                now_dy[v] = later_dy[v]
        p += BATCH * WIDTH
    map_batch(now, now_dy, y, p, c, one, dy != NULL, False, BATCH)
    return p + BATCH * WIDTH


cdef inline void load_one(vec* one, const coefficients* c, bint with_dy) noexcept nogil:
    one[0] = splat(0 if c.hi == NULL else c.hi[0])
    one[1] = splat(c.scale[0])
    one[2] = splat(0 if c.shift == NULL else c.shift[0])
    one[3] = splat(c.dscale[0] if with_dy else 0)
    if c.gate_scale != NULL:
        one[4] = splat(c.gate_scale[0])
        one[5] = splat(c.gate_shift[0])


cdef inline int64_t map_vectors(
    const stored* x, const stored* dy, stored* y, int64_t p, int64_t stop, const coefficients* c,
    const vec* one, bint streaming, int64_t ahead
) noexcept nogil:
    """map_places of the places [p, stop), as many as are whole vectors; where they end."""
    cdef vec now[BATCH]
    cdef vec now_dy[BATCH]
    while p + PAIR * WIDTH <= stop:
        load_batch(now, now_dy, x + p, past(dy, p), ahead, PAIR)
        map_batch(now, now_dy, y, p, c, one, dy != NULL, streaming, PAIR)
        p += PAIR * WIDTH
    while p + WIDTH <= stop:
        load_batch(now, now_dy, x + p, past(dy, p), ahead, 1)
        map_batch(now, now_dy, y, p, c, one, dy != NULL, streaming, 1)
        p += WIDTH
    return p


cdef inline void map_places(
    const stored* x, const stored* dy, stored* y, int64_t n, const coefficients* of_run,
    int stream, int64_t ahead, edge* ends
) noexcept nogil:
    """n values of y. With `ahead`, the values so far ahead are asked for meanwhile: they are the
    next to be summed, and memory would otherwise only be written here. `ends` joins the ends of
    runs that follow each other and are streamed; it may be NULL.

    Places that start anywhere in a line are not batched: 1.05 to 1.15 times as long. Neither are
    dy and x where 16 registers do not hold two batches of both: 0.9 to 1.3 times. (What lies before
    y's first line by map_end: 1.0 to 1.14.)"""
    cdef coefficients plain
    if EXACT and of_run.which != OF_PLACES and of_run.hi != NULL and of_run.hi[0] == 0:
        plain = of_run[0]
        plain.hi = NULL
        map_run(x, dy, y, n, &plain, stream, ahead, ends)
    else:
        map_run(x, dy, y, n, of_run, stream, ahead, ends)


cdef inline void map_run(
    const stored* x, const stored* dy, stored* y, int64_t n, const coefficients* of_run,
    int stream, int64_t ahead, edge* ends
) noexcept nogil:
    cdef coefficients c = of_run[0]  # in registers: y may lie anywhere
    cdef coefficients own
    cdef vec one[6]
    cdef bint streaming = streams(stream, y)
    cdef int64_t p = 0, lead = head(y, n, &streaming), stop
    load_one(one, &c, dy != NULL)
    if streaming:
        stop = n - (n - lead) % (64 // <int64_t> sizeof(stored))
        own = c  # of_run is put together in memory for no run that is not streamed
        if lead > 0:
            map_end(x, dy, y, 0, lead, &own, ends)
        map_vectors(x, dy, y, lead, stop, &c, one, True, ahead)
        if stop < n:
            map_end(x, dy, y, stop, n, &own, ends)
        return
    lead = plain_head(y, n)
    while p < lead:
        stop = minimum(WIDTH, lead - p)
        store_part(y + p, stop, mapped_part(x, dy, p, stop, &c, one))
        p += stop
    if (n - p >= BATCH * WIDTH and (c.which != OF_PLACES or until_aligned(y + p) == 0)
            and (dy == NULL or REGISTERS > 4 * BATCH)):
        p = map_batches(x, dy, y, p, n, &c, one, ahead)
    p = map_vectors(x, dy, y, p, n, &c, one, False, ahead)
    if p < n:
        store_part(y + p, n - p, mapped_part(x, dy, p, n - p, &c, one))


cdef inline void fetch_runs(const stored* x, int64_t runs, int64_t stride,
                            int64_t n) noexcept nogil:
    """Ask for `runs` runs of n values."""
    cdef int64_t r, p
    for r in range(runs):
        p = 0
        while p < n:
            fetch(x + r * stride + p)
            p += 64 // <int64_t> sizeof(stored)
