"""Inlined words of the kernels: sums over a run, and a run scaled and stored.

Sums keep LANES partial sums in the working type, a fixed number, so that every vector width
gives the same bits; after FLUSH steps the lanes are added to doubles, so that a lane never
sums more than FLUSH values in the working type.

Every word takes a chunk of LANES values into a local array, computes there and stores it:
the compiler vectorises this without knowing whether input and output are the same array.
"""

from libc.math cimport fabs, isfinite, sqrt
from libc.stdint cimport int64_t


cdef extern from "words.h" nogil:
    ctypedef float stored
    ctypedef float work
    work widen(stored v)
    stored narrow(work v)
    void stream_lanes(stored* y, const work* t)
    void stream_end()
    int64_t until_aligned(const stored* y)
    const stored* past(const stored* x, int64_t n)
    const work* past_weight(const work* x, int64_t n)
    double FN_TINY

    ctypedef struct fn_task:
        int64_t b, o, g, k, i
        int has_mean, given, stream
        const void* x
        const void* dy
        void* y
        const void* weight
        const void* bias
        double eps
        double* mean
        double* var
        double* rstd
        double* dweight
        double* dbias
        void* scratch
        int64_t l2
        int threads

    ctypedef void (*fn_body)(void* context, int64_t index) noexcept nogil
    void fn_parallel_for(const fn_task* task, int64_t n, fn_body body, void* context)


cdef enum:
    LANES = 32  # FN_LANES
    FLUSH = 64


cdef inline int64_t minimum(int64_t a, int64_t b) noexcept nogil:
    return a if a < b else b


cdef inline int64_t maximum(int64_t a, int64_t b) noexcept nogil:
    return a if a > b else b


cdef inline int64_t ceil_div(int64_t a, int64_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline double fold_lanes(double* lanes) noexcept nogil:
    """The sum of LANES doubles, pairwise, in an order that no vector width changes."""
    cdef int j
    for j in range(16):
        lanes[j] = lanes[j] + lanes[j + 16]
    for j in range(8):
        lanes[j] = lanes[j] + lanes[j + 8]
    for j in range(4):
        lanes[j] = lanes[j] + lanes[j + 4]
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])


cdef inline void load(const stored* x, int64_t n, work fill, work* t) noexcept nogil:
    """t = x[0..n), then `fill` up to LANES. Reads no byte behind x + n."""
    cdef int j
    if n == LANES:
        for j in range(LANES):
            t[j] = widen(x[j])
    else:
        for j in range(LANES):
            t[j] = widen(x[j]) if j < n else fill


cdef inline void store(stored* y, int64_t n, const work* t, bint stream) noexcept nogil:
    """y[0..n) = t."""
    cdef int j
    if n < LANES:
        for j in range(LANES):
            if j < n:
                y[j] = narrow(t[j])
    elif stream:
        stream_lanes(y, t)
    else:
        for j in range(LANES):
            y[j] = narrow(t[j])


# ---- sums over runs ----------------------------------------------------------------------


cdef inline void sum_chunk(
    const stored* x, const stored* dy, const work* weight, int64_t n, work about, work* s, work* q
) noexcept nogil:
    cdef work d[LANES]
    cdef work a[LANES]
    cdef int j
    load(x, n, about, d)
    for j in range(LANES):
        d[j] = d[j] - about
    if dy != NULL:
        load(dy, n, 0, a)
        if weight != NULL:
            for j in range(LANES):
                if j < n:
                    a[j] = a[j] * weight[j]
        for j in range(LANES):
            s[j] = s[j] + a[j]
            q[j] = q[j] + a[j] * d[j]
    else:
        for j in range(LANES):
            s[j] = s[j] + d[j]
            q[j] = q[j] + d[j] * d[j]


cdef inline void flush(work* a, double* into) noexcept nogil:
    cdef int j
    for j in range(LANES):
        into[j] = into[j] + <double> a[j]
        a[j] = 0


cdef inline void sum_runs(
    const stored* x, const stored* dy, const work* weight, int64_t runs, int64_t stride, int64_t n,
    work about, double* sums
) noexcept nogil:
    """Add to sums[0] and sums[1], over `runs` runs of n values, with d = x - about,

        d         and d*d          where dy is NULL
        dy        and dy*d         where weight is NULL
        dy*weight and dy*weight*d  with one weight for each place in the run
    """
    cdef work s[LANES]
    cdef work q[LANES]
    cdef double total_s[LANES]
    cdef double total_q[LANES]
    cdef int64_t _r, p, stop, steps = 0
    cdef int j
    for j in range(LANES):
        s[j] = q[j] = 0
        total_s[j] = total_q[j] = 0
    for _r in range(runs):
        p = 0
        while p < n:
            stop = minimum(n, p + FLUSH * LANES)
            steps += ceil_div(stop - p, LANES)
            while p + LANES <= stop:
                sum_chunk(x + p, past(dy, p), past_weight(weight, p), LANES, about, s, q)
                p += LANES
            if p < stop:
                sum_chunk(x + p, past(dy, p), past_weight(weight, p), stop - p, about, s, q)
                p = stop
            if steps >= FLUSH:
                flush(s, total_s)
                flush(q, total_q)
                steps = 0
        x += stride
        dy = past(dy, stride)
    flush(s, total_s)
    flush(q, total_q)
    sums[0] += fold_lanes(total_s)
    sums[1] += fold_lanes(total_q)


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
    sums[0] += fold_lanes(s)
    sums[1] += fold_lanes(q)


# ---- one run, mapped ---------------------------------------------------------------------


cdef inline void map_chunk(
    const stored* x, const stored* dy, stored* y, int64_t n, work hi, work scale, work shift,
    work dscale, bint stream
) noexcept nogil:
    cdef work t[LANES]
    cdef work u[LANES]
    cdef int j
    load(x, n, hi, t)
    for j in range(LANES):
        t[j] = (t[j] - hi) * scale + shift
    if dy != NULL:
        load(dy, n, 0, u)
        for j in range(LANES):
            t[j] = t[j] + u[j] * dscale
    store(y, n, t, stream)


cdef inline void map_run(
    const stored* x, const stored* dy, stored* y, int64_t n, work hi, work scale, work shift,
    work dscale, bint stream
) noexcept nogil:
    """y = (x - hi)*scale + shift, plus dy*dscale where dy is not NULL."""
    cdef int64_t p = 0
    if stream:
        p = minimum(n, until_aligned(y))
        if p > 0:
            map_chunk(x, dy, y, p, hi, scale, shift, dscale, False)
        elif p < 0:
            p = 0
            stream = False
    while p + LANES <= n:
        map_chunk(x + p, past(dy, p), y + p, LANES, hi, scale, shift, dscale, stream)
        p += LANES
    if p < n:
        map_chunk(x + p, past(dy, p), y + p, n - p, hi, scale, shift, dscale,
                  False)


# ---- from sums to statistics -------------------------------------------------------------


cdef inline bint cancels(double s, double q, double count) noexcept nogil:
    """Whether var = (q - s*s/count)/count would have lost too many digits: the squares left the
    range of the working type, or the values lie far from where they were taken about."""
    return not (isfinite(q) and q > FN_TINY * count and s * s <= 0.5 * q * count)


cdef inline work spread_sample(
    const stored* x, int64_t runs, int64_t stride, int64_t n
) noexcept nogil:
    """A value near the mean: the average of 16 values spread over the runs, exactly the
    constant for a constant input."""
    cdef int64_t j, at, count = minimum(16, runs * n)
    cdef double total = 0, first = <double> widen(x[0])
    for j in range(count):
        at = j * (runs * n) // count
        total += <double> widen(x[(at // n) * stride + at % n]) - first
    first += total / <double> count
    return <work> first if isfinite(first) and fabs(first) < 1e37 else <work> 0
