"""Inlined words of the kernels: sums over runs, and a run mapped and stored.

Sums keep LANES partial sums in the working type, a fixed number, so that every vector width
gives the same bits; after FLUSH steps the lanes are added to doubles, so that a lane never
sums more than 2*FLUSH values in the working type. A vec is one register; loops over VECTORS are
unrolled, and arrays of that many stay in registers.
"""

from libc.math cimport INFINITY, fabs, isfinite, sqrt
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memchr, memcpy, memset


cdef extern from "words.h" nogil:
    enum:
        WIDTH  # values in a vec
        VECTORS  # in LANES values
        NARROWED  # vectors that a store rounds at once
        ROWS "FN_ROWS"  # sets whose statistics are found together
        NONE_VALID, SOME_VALID, ALL_VALID
    ctypedef float stored
    ctypedef float work
    ctypedef float vec
    work widen(stored v)
    work on_grid(work value)
    vec splat(work value)
    vec plus(vec a, vec b)
    vec through_relu(vec z, vec dy)
    vec load(const stored* x)
    vec load_work(const work* x)
    vec load_part(const stored* x, int64_t n, work fill)
    vec load_work_part(const work* x, int64_t n, work fill)
    void store(stored* y, vec v)
    void store_two(stored* y, vec a, vec b)
    void store_part(stored* y, int64_t n, vec v)
    void stream(stored* y, vec v)
    void stream_two(stored* y, vec a, vec b)
    void stream_end()
    void fetch(const stored* x)
    void flush_lanes(const vec* lanes, double* total, bint add)
    double sum_work(const work* a, int64_t n)
    double fold_lanes(const vec* lanes, const double* total)
    void fold_rows(const vec* lanes, int64_t rows, double* sums)
    int64_t until_aligned(const stored* y)
    const stored* past(const stored* x, int64_t n)
    const work* past_weight(const work* x, int64_t n)
    int valid_among(const uint8_t* mask, int64_t n)
    void keep_valid(const stored* x, const uint8_t* mask, int64_t n, work otherwise, stored* kept)
    void blank(stored* y, const uint8_t* mask, int64_t n)
    double FN_TINY

    ctypedef struct fn_task:
        int64_t b, o, g, k, i, s
        int has_mean, given, fused, stream
        const void* x
        const void* dy
        void* y
        const void* weight
        const void* bias
        int activation
        int gated
        double slope
        const void* residual
        const void* upstream
        const void* terms[2]
        const void* dsum
        const uint8_t* mask
        const int64_t* counts
        double eps
        double* mean
        double* var
        double* rstd
        double* dweight
        double* dbias
        void* scratch
        int64_t l2
        int threads

    # Of fused.pyx.
    void map_fused(const fn_task* task, int64_t at, int64_t n, const work* hi, const work* scale,
                   const work* shift, bint each, const work* weight, const work* bias)
    void add_terms(const fn_task* task, int64_t at, int64_t n)

    # Of masks.pyx.
    void sum_valid(const fn_task* task, int64_t at, int64_t n, work about, double* sums)
    void sum_valid_exact(const fn_task* task, int64_t at, int64_t n, double about, double* sums)
    void map_valid(const fn_task* task, int64_t at, int64_t n, work hi, work scale, work shift,
                   work dscale)
    work sample_valid(const fn_task* task, int64_t set_, int64_t at, int64_t stride)

    ctypedef void (*fn_body)(void* context, int64_t index) noexcept nogil
    void fn_parallel_for(const fn_task* task, int64_t n, fn_body body, void* context,
                         bint backwards)


cdef enum:
    LANES = 32  # FN_LANES
    FLUSH = 64
    SAMPLES = 8
    CHUNK = 4  # vectors of columns summed in registers
    PAIR = 2  # vectors that are stored together
    BATCH = 4  # vectors loaded before the ones in front of them are stored
    STEP = 4  # rows of columns summed at a time, while the next ones are asked for
    RUN = 128  # values of a column summed in the working type before they meet a double
    MOST_WIDTH = 16  # of a vec
    SHORTEST = 1024  # bytes of a run that is streamed though its ends are not whole lines
    STRETCH = 1024  # values of a run whose mask is looked at together


cdef inline int64_t minimum(int64_t a, int64_t b) noexcept nogil:
    return a if a < b else b


cdef inline int64_t maximum(int64_t a, int64_t b) noexcept nogil:
    return a if a > b else b


cdef inline int64_t ceil_div(int64_t a, int64_t b) noexcept nogil:
    return (a + b - 1) // b


# ---- masks -------------------------------------------------------------------------------


cdef inline int64_t place_in_mask(const fn_task* t, int64_t at) noexcept nogil:
    cdef int64_t inner = t.i * t.s
    return at // (t.g * t.k * inner) * inner + at % inner


cdef inline int64_t stretch(const fn_task* t, int64_t at, int64_t n, int* valid) noexcept nogil:
    """How many of the n values from `at` on, of one run, to take together, and which of them
    count: as many as can be of which all or none do."""
    cdef int64_t inner = t.i * t.s, count, more
    if inner == 1:
        more = place_in_mask(t, at)
        valid[0] = valid_among(t.mask + more, place_in_mask(t, at + n - 1) + 1 - more)
        return n
    count = minimum(minimum(n, STRETCH), inner - at % inner)
    valid[0] = valid_among(t.mask + place_in_mask(t, at), count)
    while count < n and valid[0] != SOME_VALID:
        more = minimum(minimum(n - count, STRETCH), inner - (at + count) % inner)
        if valid_among(t.mask + place_in_mask(t, at + count), more) != valid[0]:
            break
        count += more
    return count


cdef inline void blank_gaps(const fn_task* t, stored* y, int64_t at, int64_t n) noexcept nogil:
    """What does not count of a stretch of y, which is where `at` is in x."""
    cdef int64_t first = place_in_mask(t, at), width = t.g * t.k, row, start, stop
    if t.i * t.s > 1:
        blank(y, t.mask + first, n)
        return
    for row in range(first, place_in_mask(t, at + n - 1) + 1):
        if not t.mask[row]:
            start = maximum(0, row * width - at)
            stop = minimum(n, (row + 1) * width - at)
            memset(y + start, 0, (stop - start) * sizeof(stored))


cdef inline int64_t valid_rows(const fn_task* t, int64_t row, int64_t most) noexcept nogil:
    """Where i is 1: how many rows of (b, o) from `row` on count, one after the other."""
    cdef const void* gap
    if t.mask == NULL:
        return most
    gap = memchr(t.mask + row, 0, most)
    return most if gap == NULL else <const uint8_t*> gap - (t.mask + row)


cdef inline double values_of(const fn_task* t, int64_t b) noexcept nogil:
    """Values of a set of b."""
    if t.mask == NULL:
        return <double> (t.o * t.k * t.i)
    if t.counts == NULL:
        return <double> t.k if t.mask[b] else 0
    return <double> (t.k * t.counts[b])


cdef inline void put(stored* y, vec v, bint streaming) noexcept nogil:
    if streaming:
        stream(y, v)
    else:
        store(y, v)


cdef inline void put_all(stored* y, const vec* v, bint streaming, int vectors) noexcept nogil:
    """One behind the other; those of 16 bits are rounded and streamed two at a time."""
    cdef int at
    for at in range(0, vectors - 1, 2):
        if streaming:
            stream_two(y + at * WIDTH, v[at], v[at + 1])
        else:
            store_two(y + at * WIDTH, v[at], v[at + 1])
    if vectors % 2:
        put(y + (vectors - 1) * WIDTH, v[vectors - 1], streaming)


cdef inline int64_t head(const stored* y, int64_t n, bint* streaming) noexcept nogil:
    """Values before y can be streamed; where it never can, 0, and streaming is off."""
    cdef int64_t count = until_aligned(y) if streaming[0] else 0
    # Lines that are half streamed cost more than they save: short runs must be whole lines. (Those
    # of 8 lines took 1.2 to 1.4 times as long streamed, those of 16 and more 0.8 to 0.95 times.)
    if count < 0 or (n < SHORTEST // <int64_t> sizeof(stored) and (count > 0 or n % WIDTH != 0)):
        streaming[0] = False
        return 0
    return minimum(count, n)


# ---- sums over runs ----------------------------------------------------------------------


cdef inline void sum_step(
    const stored* x, const stored* dy, const work* weight, int64_t n, vec about, work fill,
    const vec* gate, vec* s, vec* q
) noexcept nogil:
    """LANES values; n of them where n is not LANES."""
    cdef vec a, d
    cdef int v
    for v in range(VECTORS):
        if n == LANES:
            d = load(x + v * WIDTH) - about
            a = d
            if dy != NULL:
                a = load(dy + v * WIDTH)
                if weight != NULL:
                    a = a * load_work(weight + v * WIDTH)
        else:
            d = load_part(x + v * WIDTH, n - v * WIDTH, fill) - about
            a = d
            if dy != NULL:
                a = load_part(dy + v * WIDTH, n - v * WIDTH, 0)
                if weight != NULL:
                    a = a * load_work_part(weight + v * WIDTH, n - v * WIDTH, 0)
        if gate != NULL:
            a = through_relu(d * gate[0] + gate[1], a)
        s[v] = s[v] + a
        q[v] = plus(a * d, q[v])


cdef inline void sum_lanes(
    const stored* x, const stored* dy, const work* weight, int64_t n, vec about, work fill,
    const vec* gate, vec* s, vec* q
) noexcept nogil:
    """sum_step over n values."""
    cdef int64_t p = 0
    while p + LANES <= n:
        sum_step(x + p, past(dy, p), past_weight(weight, p), LANES, about, fill, gate, s,
                 q)
        p += LANES
    if p < n:
        sum_step(x + p, past(dy, p), past_weight(weight, p), n - p, about, fill, gate, s,
                 q)


cdef inline void sum_short(
    const stored* x, const stored* dy, const work* weight, int64_t n, work about, vec* lanes_s,
    vec* lanes_q
) noexcept nogil:
    """sum_runs of one run of at most FLUSH*LANES values, but for the fold."""
    cdef vec s[VECTORS]
    cdef vec q[VECTORS]
    cdef int v
    for v in range(VECTORS):
        s[v] = q[v] = splat(0)
    sum_lanes(x, dy, weight, n, splat(about), about, NULL, s, q)
    for v in range(VECTORS):
        lanes_s[v] = s[v]
        lanes_q[v] = q[v]


cdef inline void sum_runs(
    const stored* x, const stored* dy, const work* weight, int64_t runs, int64_t stride, int64_t n,
    work about, const vec* gate, double* sums
) noexcept nogil:
    """Add to sums[0] and sums[1], over `runs` runs of n values, with d = x - about,

        d         and d*d          where dy is NULL
        dy        and dy*d         where weight is NULL
        dy*weight and dy*weight*d  with one weight for each place in the run

    Where gate is not NULL, dy is taken back through ReLU, whose input was d*gate[0] + gate[1].
    """
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
                      s, q)
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
                       const vec* gate) noexcept nogil:
    """gate as in sum_runs."""
    cdef vec d = x - hi
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
        if ahead:
            fetch(x + v * WIDTH + ahead)
            if dy != NULL:
                fetch(dy + v * WIDTH + ahead)


cdef inline void map_batch(
    vec* a, const vec* b, stored* y, const work* hi, const work* scale, const work* shift,
    const work* dscale, bint each, const work* weight, const work* bias, const vec* one,
    bint with_dy, const work* gate_scale, const work* gate_shift, bint streaming, int vectors
) noexcept nogil:
    """`one` holds hi, scale, shift, dscale and the gate where one serves every place."""
    cdef vec gate[2]
    cdef int v, at
    for v in range(vectors):
        at = v * WIDTH
        if gate_scale != NULL:
            gate[0] = load_work(gate_scale + at) if each else one[4]
            gate[1] = load_work(gate_shift + at) if each else one[5]
        a[v] = mapped(a[v], b[v], load_work(hi + at) if each else one[0],
                      load_work(scale + at) if each else one[1],
                      load_work(shift + at) if each else one[2],
                      load_work(dscale + at) if each and with_dy else one[3], with_dy,
                      NULL if gate_scale == NULL else gate)
        if weight != NULL:
            a[v] = a[v] * load_work(weight + at) + load_work(bias + at)
    put_all(y, a, streaming, vectors)


cdef inline int64_t map_batches(
    const stored* x, const stored* dy, stored* y, int64_t n, const work* hi, const work* scale,
    const work* shift, const work* dscale, bint each, const work* weight, const work* bias,
    const vec* one, const work* gate_scale, const work* gate_shift, int64_t ahead
) noexcept nogil:
    """map_places of whole batches, at least one; how many values they were.

    A batch is loaded before the one in front of it is stored: where y lies a little behind x
    modulo 4096, a load seems to depend on the store just before it (1.1 to 1.3 times as long in
    cache). Without a condition in the loop, for which gcc kept both batches on the stack (1.05)."""
    cdef vec now[BATCH]
    cdef vec now_dy[BATCH]
    cdef vec later[BATCH]
    cdef vec later_dy[BATCH]
    cdef int64_t p = 0, e = 0
    cdef int v
    load_batch(now, now_dy, x, dy, ahead, BATCH)
    while p + 2 * BATCH * WIDTH <= n:
        load_batch(later, later_dy, x + p + BATCH * WIDTH, past(dy, p + BATCH * WIDTH), ahead,
                   BATCH)
        map_batch(now, now_dy, y + p, hi + e, scale + e, shift + e, past_weight(dscale, e), each,
                  past_weight(weight, p), past_weight(bias, p), one, dy != NULL,
                  past_weight(gate_scale, e), past_weight(gate_shift, e), False, BATCH)
        for v in range(BATCH):
            now[v] = later[v]
            if dy != NULL:
                now_dy[v] = later_dy[v]
        p += BATCH * WIDTH
        if each:
            e = p
    map_batch(now, now_dy, y + p, hi + e, scale + e, shift + e, past_weight(dscale, e), each,
              past_weight(weight, p), past_weight(bias, p), one, dy != NULL,
              past_weight(gate_scale, e), past_weight(gate_shift, e), False, BATCH)
    return p + BATCH * WIDTH


cdef inline void map_places(
    const stored* x, const stored* dy, stored* y, int64_t n, const work* hi, const work* scale,
    const work* shift, const work* dscale, bint each, const work* weight, const work* bias,
    const work* gate_scale, const work* gate_shift, bint streaming, int64_t ahead
) noexcept nogil:
    """y = (x - hi)*scale + shift, plus dy*dscale where dy is not NULL; where weight is not NULL,
    that times weight plus bias; where gate_scale is not NULL, with dy taken back through ReLU,
    whose input was (x - hi)*gate_scale + gate_shift.

    weight and bias have a value for each place; the others have with `each`, and otherwise one.
    With `ahead`, the values so far ahead are asked for meanwhile: they are the next to be summed,
    and memory would otherwise only be written here.

    Places that start anywhere in a line are not batched: 1.05 to 1.15 times as long."""
    cdef vec one[6]
    cdef vec gate[2]
    cdef vec d
    cdef vec now[BATCH]
    cdef vec now_dy[BATCH]
    cdef int64_t p = 0, part = head(y, n, &streaming), step, e
    # A line that is streamed in part is read, and written twice.
    cdef int64_t stop = n - (n - part) % (64 // <int64_t> sizeof(stored)) if streaming else n
    one[0] = splat(hi[0])
    one[1] = splat(scale[0])
    one[2] = splat(shift[0])
    one[3] = d = splat(0 if dy == NULL else dscale[0])
    if gate_scale != NULL:
        one[4] = splat(gate_scale[0])
        one[5] = splat(gate_shift[0])
    while p < n:
        if part == 0:
            if not streaming and n >= BATCH * WIDTH and (not each or until_aligned(y) == 0):
                p = map_batches(x, dy, y, n, hi, scale, shift, dscale, each, weight, bias, one,
                                gate_scale, gate_shift, ahead)
            while p + PAIR * WIDTH <= stop:
                load_batch(now, now_dy, x + p, past(dy, p), ahead, PAIR)
                e = p if each else 0
                map_batch(now, now_dy, y + p, hi + e, scale + e, shift + e,
                          past_weight(dscale, e), each, past_weight(weight, p),
                          past_weight(bias, p), one, dy != NULL, past_weight(gate_scale, e),
                          past_weight(gate_shift, e), streaming, PAIR)
                p += PAIR * WIDTH
            while p + WIDTH <= stop:
                load_batch(now, now_dy, x + p, past(dy, p), ahead, 1)
                e = p if each else 0
                map_batch(now, now_dy, y + p, hi + e, scale + e, shift + e,
                          past_weight(dscale, e), each, past_weight(weight, p),
                          past_weight(bias, p), one, dy != NULL, past_weight(gate_scale, e),
                          past_weight(gate_shift, e), streaming, 1)
                p += WIDTH
            part = n - p
        else:
            # Up to the first line of y, which may be several vectors away, or the last places.
            step = minimum(part, WIDTH)
            if dy != NULL:
                d = load_part(dy + p, step, 0)
            if gate_scale != NULL:
                gate[0] = load_work_part(gate_scale + p, step, 0) if each else one[4]
                gate[1] = load_work_part(gate_shift + p, step, 0) if each else one[5]
            d = mapped(
                load_part(x + p, step, hi[0]), d,
                load_work_part(hi + p, step, 0) if each else one[0],
                load_work_part(scale + p, step, 0) if each else one[1],
                load_work_part(shift + p, step, 0) if each else one[2],
                load_work_part(dscale + p, step, 0) if each and dy != NULL else one[3],
                dy != NULL, NULL if gate_scale == NULL else gate)
            if weight != NULL:
                d = (d * load_work_part(weight + p, step, 0)
                     + load_work_part(bias + p, step, 0))
            store_part(y + p, step, d)
            p += step
            part -= step


cdef inline void map_run(
    const stored* x, const stored* dy, stored* y, int64_t n, work hi, work scale, work shift,
    work dscale, bint streaming, int64_t ahead
) noexcept nogil:
    map_places(x, dy, y, n, &hi, &scale, &shift, &dscale, False, NULL, NULL, NULL, NULL, streaming,
               ahead)


cdef inline void fetch_runs(const stored* x, int64_t runs, int64_t stride,
                            int64_t n) noexcept nogil:
    """Ask for `runs` runs of n values."""
    cdef int64_t r, p
    for r in range(runs):
        p = 0
        while p < n:
            fetch(x + r * stride + p)
            p += WIDTH


# ---- down columns -------------------------------------------------------------------------


cdef inline void sum_columns(
    const stored* x, const stored* dy, int64_t rows, int64_t stride, const work* about,
    const work* gate_scale, const work* gate_shift, int64_t n, work* s, work* q, int64_t ahead,
    int vectors
) noexcept nogil:
    """Add to s and q the terms of sum_runs down n columns: `vectors` vecs, the last may be a part.

    With `ahead`, the values so far ahead are asked for meanwhile: the same columns of the next
    rows, which the processor does not foresee (1.25 to 1.4 times faster on x from memory). Where
    rows follow each other it does (0.84 to 0.97 of the time without)."""
    cdef vec a[CHUNK]
    cdef vec c[CHUNK]
    cdef vec k[CHUNK]
    cdef vec g[CHUNK]
    cdef vec h[CHUNK]
    cdef vec d, e
    cdef int64_t last = n - (vectors - 1) * WIDTH, _row
    cdef bint part = last < WIDTH
    cdef int v
    for v in range(vectors):
        k[v] = load_work(about + v * WIDTH)
        a[v] = load_work(s + v * WIDTH)
        c[v] = load_work(q + v * WIDTH)
        if gate_scale != NULL:
            g[v] = load_work(gate_scale + v * WIDTH)
            h[v] = load_work(gate_shift + v * WIDTH)
    for _row in range(rows):
        for v in range(vectors):
            d = load_part(x + v * WIDTH, last, 0) if part and v == vectors - 1 else (
                load(x + v * WIDTH))
            d = d - k[v]
            e = d
            if ahead:
                fetch(x + v * WIDTH + ahead)
                if dy != NULL:
                    fetch(dy + v * WIDTH + ahead)
            if dy != NULL:
                e = load_part(dy + v * WIDTH, last, 0) if part and v == vectors - 1 else (
                    load(dy + v * WIDTH))
            if gate_scale != NULL:
                e = through_relu(d * g[v] + h[v], e)
            a[v] = a[v] + e
            c[v] = plus(e * d, c[v])
        x += stride
        dy = past(dy, stride)
    for v in range(vectors):
        memcpy(s + v * WIDTH, &a[v], sizeof(vec))
        memcpy(q + v * WIDTH, &c[v], sizeof(vec))


cdef inline void sum_all_columns(
    const stored* x, const stored* dy, int64_t rows, int64_t stride, int64_t width,
    const work* about, const work* gate_scale, const work* gate_shift, work* s, work* q,
    int64_t ahead
) noexcept nogil:
    cdef int64_t c = 0
    while c + CHUNK * WIDTH <= width:
        sum_columns(x + c, past(dy, c), rows, stride, about + c, past_weight(gate_scale, c),
                    past_weight(gate_shift, c), CHUNK * WIDTH, s + c, q + c, ahead, CHUNK)
        c += CHUNK * WIDTH
    x += c
    dy = past(dy, c)
    gate_scale = past_weight(gate_scale, c)
    gate_shift = past_weight(gate_shift, c)
    if width - c > 3 * WIDTH:
        sum_columns(x, dy, rows, stride, about + c, gate_scale, gate_shift, width - c, s + c,
                    q + c, ahead, 4)
    elif width - c > 2 * WIDTH:
        sum_columns(x, dy, rows, stride, about + c, gate_scale, gate_shift, width - c, s + c,
                    q + c, ahead, 3)
    elif width - c > WIDTH:
        sum_columns(x, dy, rows, stride, about + c, gate_scale, gate_shift, width - c, s + c,
                    q + c, ahead, 2)
    elif width > c:
        sum_columns(x, dy, rows, stride, about + c, gate_scale, gate_shift, width - c, s + c,
                    q + c, ahead, 1)


cdef inline void sum_rows(
    const stored* x, const stored* dy, int64_t rows, int64_t stride, int64_t width,
    const work* about, const work* gate_scale, const work* gate_shift, work* s, work* q,
    int64_t ahead
) noexcept nogil:
    """sum_columns over all columns. s, q and about have room for whole vectors."""
    if dy == NULL:
        sum_all_columns(x, NULL, rows, stride, width, about, NULL, NULL, s, q, ahead)
    elif gate_scale == NULL:
        sum_all_columns(x, dy, rows, stride, width, about, NULL, NULL, s, q, ahead)
    else:
        sum_all_columns(x, dy, rows, stride, width, about, gate_scale, gate_shift, s, q, ahead)


cdef inline void map_row(
    const stored* x, const stored* dy, stored* y, int64_t n, const work* hi, const work* scale,
    const work* shift, const work* dscale, const work* gate_scale, const work* gate_shift,
    bint streaming
) noexcept nogil:
    """map_places with coefficients for each place."""
    if dy == NULL:
        map_places(x, NULL, y, n, hi, scale, shift, NULL, True, NULL, NULL, NULL, NULL, streaming,
                   0)
    elif gate_scale == NULL:
        map_places(x, dy, y, n, hi, scale, shift, dscale, True, NULL, NULL, NULL, NULL, streaming,
                   0)
    else:
        map_places(x, dy, y, n, hi, scale, shift, dscale, True, NULL, NULL, gate_scale, gate_shift,
                   streaming, 0)


# ---- from sums to statistics -------------------------------------------------------------


cdef inline bint cancels(double s, double q, double count) noexcept nogil:
    """Whether var = (q - s*s/count)/count would have lost too many digits: the squares left the
    range of the working type, or the values lie far from where they were taken about."""
    # Without branches: it is asked of whole arrays.
    return 1 - ((q < INFINITY) & (q > FN_TINY * count) & (s * s <= 0.75 * q * count))


cdef inline work spread_sample(
    const stored* x, int64_t runs, int64_t stride, int64_t n
) noexcept nogil:
    """A value near the mean: the average of SAMPLES values spread over the runs, exactly the
    constant for a constant input."""
    cdef double odd = 0, even = 0, first = <double> widen(x[0])
    cdef int j
    for j in range(1, SAMPLES, 2):
        odd += <double> widen(x[(j * runs // SAMPLES) * stride + j * n // SAMPLES]) - first
    for j in range(2, SAMPLES, 2):
        even += <double> widen(x[(j * runs // SAMPLES) * stride + j * n // SAMPLES]) - first
    first += (odd + even) * (1.0 / SAMPLES)
    return on_grid(<work> first) if isfinite(first) and fabs(first) < 1e37 else <work> 0
