"""Inlined words of the kernels: those of words.h, of masks, of stores, and from sums to statistics.

A vec is one register of the working type. The loops are in runs.pxd and down.pyx.
"""

from libc.math cimport INFINITY, fabs, sqrt
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memchr, memcpy, memset


cdef extern from "words.h" nogil:
    enum:
        WIDTH  # values in a vec
        VECTORS  # in LANES values
        REGISTERS  # vecs that a processor holds
        PLACES  # of a strip, at most, and of a slab; twice as many where outputs are streamed
        NARROWED  # vectors that a store rounds at once
        EXACT  # products of stored values are
        ROWS "FN_ROWS"  # sets whose statistics are found together
        STREAM_ALL "FN_STREAM_ALL"
        NONE_VALID, SOME_VALID, ALL_VALID
    ctypedef float stored
    ctypedef float work
    ctypedef float vec
    ctypedef double eight
    ctypedef work eight_work
    work widen(stored v)
    work on_grid(work value)
    vec splat(work value)
    vec plus(vec a, vec b)
    vec plus_product(vec a, vec b, vec c)
    int all_zero(const vec* v, int vectors)
    int zeros(const work* a, int64_t n)
    vec through_relu(vec z, vec dy)
    vec load(const stored* x)
    vec load_work(const work* x)
    void store_work(work* y, vec v)
    vec load_part(const stored* x, int64_t n, work fill)
    vec load_work_part(const work* x, int64_t n, work fill)
    void store(stored* y, vec v)
    void store_two(stored* y, vec a, vec b)
    void store_part(stored* y, int64_t n, vec v)
    void stream(stored* y, vec v)
    void stream_two(stored* y, vec a, vec b)
    void stream_line(stored* y, const stored* x)
    void stream_end()
    void fetch(const stored* x)
    void flush_lanes(const vec* lanes, double* total, bint add)
    double fold_eight(const eight* v)
    double sum_work(const work* a, int64_t n)
    double fold_lanes(const vec* lanes, const double* total)
    void fold_to_eight(eight_work* folded, const vec* lanes)
    void fold_rows(const eight_work* folded, int64_t rows, double* sums)
    int64_t until_aligned(const stored* y)
    const stored* there(const stored* x)
    const work* there_weight(const work* x)
    const stored* past(const stored* x, int64_t n)
    const work* past_weight(const work* x, int64_t n)
    int valid_among(const uint8_t* mask, int64_t n)
    void keep_valid(const stored* x, const uint8_t* mask, int64_t n, work otherwise, stored* kept)
    void blank(stored* y, const uint8_t* mask, int64_t n)
    double FN_TINY

    ctypedef struct fn_task:
        int64_t b, o, g, k, i, s
        int has_mean, scaled, given, fused, stream, far, beyond, foreseen, unseen, ahead
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
        int64_t near
        int threads

    ctypedef void (*fn_body)(void* context, int64_t index) noexcept nogil
    void fn_parallel_for(const fn_task* task, int64_t n, fn_body body, void* context,
                         bint backwards)


cdef extern from "kernels.h" nogil:
    enum:
        OF_ALL, OF_ROWS, OF_PLACES
    ctypedef struct coefficients:
        int which
        const work* hi
        const work* scale
        const work* shift
        const work* dscale
        const work* gate_scale
        const work* gate_shift
        const work* weight
        const work* bias

    # Of edges.pyx.
    ctypedef struct edge:
        stored* line
        int64_t first
        int64_t n
        stored* kept
    void put_ends(edge* ends, stored* y, int64_t n, const vec* v)
    void map_end(const stored* x, const stored* dy, stored* y, int64_t first, int64_t stop,
                 const coefficients* c, edge* ends)

    # Of down.pyx.
    void sum_rows(const stored* x, const stored* dy, int64_t rows, int64_t stride, int64_t width,
                  const coefficients* c, work* s, work* q, int64_t step, bint asking)
    void map_rows_of_places(const stored* x, const stored* dy, stored* y, int64_t rows,
                            int64_t stride, int64_t n, const coefficients* c, int stream,
                            int64_t ahead, edge* ends)

    # Of fused.pyx.
    void map_fused(const fn_task* task, int64_t at, int64_t n, int64_t rows, int64_t stride,
                   const coefficients* c, edge* ends)
    void add_terms(const fn_task* task, int64_t at, int64_t n, stored* kept)

    # Of rows_statistics.pyx.
    void exact_statistics(const void* context, int64_t set_, work about, double* mean, double* var)

    # Of columns_statistics.pyx.
    void start_columns(const void* context, int64_t b, int64_t c0, int64_t c1)
    void finish_columns(const void* context, int64_t b, int64_t c0, int64_t c1)

    # Of masks.pyx.
    void sum_valid(const fn_task* task, int64_t at, int64_t n, work about, double* sums)
    void sum_valid_exact(const fn_task* task, int64_t at, int64_t n, double about, double* sums)
    void map_valid(const fn_task* task, int64_t at, int64_t n, const coefficients* c)
    work sample_valid(const fn_task* task, int64_t set_, int64_t at, int64_t stride)


cdef enum:
    LANES = 32  # FN_LANES
    FLUSH = 64
    SAMPLES = 8
    FAR = 3  # deviations that a mean may be from 0 to be taken for 0 where elements are EXACT
    CLOSE = 8192  # values of a set whose samples are the first ones
    CHUNK = 4  # vectors of columns summed in registers
    PAIR = 2  # vectors that are stored together
    DOWN = 8  # vectors of a row, at most, that is mapped as a whole
    BATCH = 4  # vectors loaded before the ones in front of them are stored
    STEP = 4  # rows of columns summed at a time, while the next ones are asked for
    RUN = 128  # values of a column summed in the working type before they meet a double
    MOST_WIDTH = 16  # of a vec
    SHORTEST = 800  # bytes of a run that is streamed though its ends are not whole lines
    LONG = 128  # values of a run whose plain stores start at a line
    STRETCH = 1024  # values of a run whose mask is looked at together
    PATCH = 1 << 14  # bytes of memory: the runs that start there are streamed, or none of them is


cdef inline int64_t minimum(int64_t a, int64_t b) noexcept nogil:
    return a if a < b else b


cdef inline int64_t maximum(int64_t a, int64_t b) noexcept nogil:
    return a if a > b else b


cdef inline int64_t ceil_div(int64_t a, int64_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline int64_t shared_evenly(int64_t units) noexcept nogil:
    """About as many units of work, as many for each of 2 threads, or, where they are many, of 4
    or 8."""
    cdef int64_t threads = 8 if units > 16 else 4
    return units // threads * threads if units > 8 else units + (units > 1) * units % 2


cdef inline bint opens_line(int v) noexcept nogil:
    """Whether the v-th vector from a place on is the first of 64 bytes: a line is asked for once
    (0.97 to 1.0 of the time, with AVX2 or 16 bits, of asking with every vector)."""
    return v * WIDTH * <int> sizeof(stored) % 64 == 0


cdef inline int64_t ahead_of(const fn_task* t, int64_t n, int64_t stride) noexcept nogil:
    """Places ahead that a map of rows of n values asks for: in the next row where its own ends
    before."""
    return maximum(t.ahead, stride) if n < t.ahead else t.ahead


cdef inline coefficients affine_map(int which, const work* hi, const work* scale,
                                    const work* shift) noexcept nogil:
    """Coefficients of (x - hi)*scale + shift."""
    cdef coefficients c
    c.which = which
    c.hi, c.scale, c.shift = hi, scale, shift
    c.dscale = c.gate_scale = c.gate_shift = c.weight = c.bias = NULL
    return c


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


cdef inline bint streams(int stream, const stored* y) noexcept nogil:
    """Whether a run that starts at y is streamed, where `stream` of STREAM_ALL runs are: by its
    place in memory, so that the same ones stay in the caches in every call."""
    # Fibonacci hashing: as many of those that any power of two lies between.
    cdef uint32_t spread = <uint32_t> (<uintptr_t> y // PATCH) * <uint32_t> 2654435769
    return stream == STREAM_ALL or <int64_t> spread * STREAM_ALL >> 32 < stream


cdef inline int64_t plain_head(const stored* y, int64_t n) noexcept nogil:
    """Values before y's first line, where a run is long enough to be stored in whole lines from
    there on: vectors that straddle two take up to 1.5 times as long."""
    return maximum(0, until_aligned(y)) if n >= LONG else 0


cdef inline int64_t head(const stored* y, int64_t n, bint* streaming) noexcept nogil:
    """Values before y can be streamed; where it never can, 0, and streaming is off."""
    cdef int64_t count = until_aligned(y) if streaming[0] else 0
    # Lines that are put together (edges.pyx) cost more than streaming saves where there are few:
    # short runs must be whole lines. (Those of 6 to 11 took 1.0 to 1.35 times as long streamed,
    # those of 12 and more 0.6 to 0.9 times.)
    if count < 0 or (n < SHORTEST // <int64_t> sizeof(stored) and (count > 0 or n % WIDTH != 0)):
        streaming[0] = False
        return 0
    return minimum(count, n)


cdef inline void open_edge(edge* e) noexcept nogil:
    e.line = NULL
    e.first = e.n = 0


cdef inline void close_edge(edge* e) noexcept nogil:
    if e.n > e.first:
        memcpy(e.line + e.first, e.kept + e.first, (e.n - e.first) * sizeof(stored))
    open_edge(e)


# ---- from sums to statistics -------------------------------------------------------------


cdef inline bint cancels(double s, double q, double count) noexcept nogil:
    """Whether var = (q - s*s/count)/count would have lost too many digits: the squares left the
    range of the working type, or the values lie far from where they were taken about."""
    # Without branches: it is asked of whole arrays.
    return 1 - ((q < INFINITY) & (q > FN_TINY * count)
                & (s * s <= (0.9 if EXACT else 0.75) * q * count))


cdef inline work size(work value) noexcept nogil:
    return <work> fabs(<double> value)


cdef inline work about_of(work near, work spread) noexcept nogil:
    """What sums are taken about, from a value near the mean and how far values lie from each other,
    in the mean. Where elements have 16 bits, 0 if that is near: nothing is to be subtracted then,
    and products are EXACT (calls take 0.85 to 1.0 of the time)."""
    if EXACT and size(near) <= FAR * spread:
        return 0
    # Neither inf nor NaN is smaller.
    return on_grid(near) if -<work> 1e37 < near < <work> 1e37 else <work> 0


cdef inline double far_of(const fn_task* t) noexcept nogil:
    """How many deviations a mean may be from the 0 that hi_of takes for it. None with an
    activation: a backward must find the sign of its input as the forward did."""
    return FAR if EXACT and t.activation == 0 else -1


cdef inline work hi_of(double mean, double rstd, double far, double eps) noexcept nogil:
    """hi: the mean, or 0 as in about_of, but for what is almost constant: it is mapped to the bias
    exactly."""
    # Without branches: it is asked of whole arrays.
    cdef bint near = (fabs(mean) * rstd <= far) & (eps * rstd * rstd <= 0.5)
    return 0 if EXACT and near else <work> mean


cdef inline work sample_runs(
    const stored* x, int64_t runs, int64_t stride, int64_t n
) noexcept nogil:
    """A value near the mean: the average of a few values, exactly the constant for a constant
    input. They are the first four, since to touch a line here and there costs more than the line
    (1.15 to 1.35 times as long for runs of 768 to 4096 in the last-level cache), and since sums
    wait for it (of eight, one after the other, rows of 64 took 1.12 times as long); or, where the
    set is so large that it costs nothing, SAMPLES values spread over it."""
    cdef work first = widen(x[0]), total = 0, spread = 0, d, e, f
    cdef uint64_t j  # a division of what may be negative takes four instructions more
    if n >= 4 and runs * n <= CLOSE:
        d, e, f = widen(x[1]) - first, widen(x[2]) - first, widen(x[3]) - first
        total = (d + e) + f
        return about_of(first + total * <work> 0.25, (size(d) + size(e) + size(f)) * <work> 0.25)
    for j in range(1, SAMPLES):
        d = widen(x[j * runs // SAMPLES * stride + j * n // SAMPLES]) - first
        total += d
        spread += size(d)
    return about_of(first + total * <work> (1.0 / SAMPLES), spread * <work> (1.0 / SAMPLES))
