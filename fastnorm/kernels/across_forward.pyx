"""The across loop order forward; see across.pxd."""

from libc.math cimport fabs, sqrt
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from fastnorm.kernels.across cimport *
from fastnorm.kernels.words cimport *


cdef public size_t across_scratch(const fn_task* t) noexcept nogil:
    """Bytes of scratch for a forward or a backward."""
    return maximum(scratch_of(t, 1), scratch_of(t, 2))


cdef inline void sample_sets(const fn_task* t, const stored* x, int64_t n,
                             strip* w) noexcept nogil:
    """hi = a value near each set's mean, exactly the constant of a constant set."""
    cdef int64_t count = minimum(SAMPLED, t.k), j, c
    cdef double inverse = 1.0 / <double> count, d
    cdef double* spread = w.total_q
    cdef const stored* row
    memset(w.hi, 0, (n + MOST_WIDTH) * sizeof(work))
    if not t.has_mean:
        return
    memset(w.total_s, 0, n * sizeof(double))
    if EXACT:
        memset(spread, 0, n * sizeof(double))
    for j in range(1, count):
        row = x + j * t.k // count * t.s
        for c in range(n):
            d = <double> widen(row[c]) - <double> widen(x[c])
            w.total_s[c] = w.total_s[c] + d
            if EXACT:
                spread[c] = spread[c] + fabs(d)
    for c in range(n):
        w.total_s[c] = <double> widen(x[c]) + w.total_s[c] * inverse
        w.hi[c] = about_of(<work> w.total_s[c], <work> (spread[c] * inverse))


cdef void exact_set(const fn_task* t, const stored* x, double about, double* mean,
                    double* var) noexcept nogil:
    """The mean, then the variance about it, in double."""
    cdef double s, q, d, count = <double> t.k
    cdef int64_t _turn, r
    mean[0] = about
    for _turn in range(2):
        s = q = 0
        for r in range(t.k):
            d = <double> widen(x[r * t.s]) - mean[0]
            s += d
            q += d * d
        if not t.has_mean:
            s = 0
        mean[0] += s / count
        # In the second turn s is what the first has left.
        var[0] = (q - s * s / count) / count


cdef void finish_sets(const fn_task* t, const stored* x, int64_t set_, int64_t n,
                      strip* w) noexcept nogil:
    """Statistics out, and into w the coefficients of y = (x - hi)*scale + shift.

    Whole loops over arrays, so that the divisions and roots are vectors'."""
    cdef double count = <double> t.k, inverse = 1.0 / count, eps = t.eps, s
    cdef double* mean = w.total_s
    cdef double* var = w.total_q
    cdef int64_t c
    cdef int any_cancels = 0
    if not t.has_mean:
        memset(w.total_s, 0, n * sizeof(double))
    if t.mask != NULL:
        for c in range(n):
            if left_out(t, set_ + c):
                w.hi[c] = 0
                w.total_s[c] = w.total_q[c] = 0
    for c in range(n):
        any_cancels |= <int> cancels(w.total_s[c], w.total_q[c], count)
    if any_cancels:
        for c in range(n):
            s = w.total_s[c]
            if left_out(t, set_ + c):
                continue
            if cancels(s, w.total_q[c], count):
                exact_set(t, x + c, w.hi[c], &mean[c], &var[c])
            else:
                mean[c] = <double> w.hi[c] + s * inverse
                var[c] = (w.total_q[c] - s * s * inverse) * inverse
    else:
        for c in range(n):
            s = w.total_s[c]
            mean[c] = <double> w.hi[c] + s * inverse
            var[c] = (w.total_q[c] - s * s * inverse) * inverse
    if t.mean != NULL:
        memcpy(t.mean + set_, mean, n * sizeof(double))
    if t.var != NULL:
        memcpy(t.var + set_, var, n * sizeof(double))
    for c in range(n):
        var[c] = 1.0 / sqrt(var[c] + eps)
    if t.mask != NULL:
        for c in range(n):
            if left_out(t, set_ + c):
                var[c] = 0
    if t.rstd != NULL:
        memcpy(t.rstd + set_, var, n * sizeof(double))
    for c in range(n):
        w.hi[c] = <work> mean[c]
        w.scale[c] = <work> var[c]
        w.shift[c] = <work> (-(mean[c] - <double> w.hi[c]) * var[c])


cdef void sum_strip(const fn_task* t, int64_t at, int64_t n, int64_t row, int64_t stop,
                    strip* w) noexcept nogil:
    """The sums of the rows [row, stop), about a value near each set's mean."""
    cdef const stored* x = <const stored*> t.x + at
    cdef coefficients c = affine_map(OF_PLACES, w.hi, NULL, NULL)
    cdef int64_t step = rows_at_once(n), count
    sample_sets(t, x, n, w)
    clear(w, n)
    while row < stop:
        count = minimum(RUN, stop - row)
        sum_rows(x + row * t.s, NULL, count, t.s, n, &c, w.s, w.q, step, step == STEP)
        flush(w, n)
        row += count


cdef void map_strip(const plan* p, int64_t at, int64_t n, int64_t row, int64_t stop, strip* w,
                    int64_t ahead) noexcept nogil:
    cdef coefficients c = affine_map(OF_PLACES, w.hi, w.scale, w.shift)
    if p.task.fused:
        map_fused_unit(p.task, at, n, row, stop, w)
    else:
        map_unit(p, at, n, row, stop, &c, ahead)
    if p.task.stream:
        stream_end()


cdef void forward_unit(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef strip w
    cdef int64_t n, set_, at = bounds(p, index, &n, &set_)
    sum_strip(t, at, n, 0, t.k, &w)
    finish_sets(t, <const stored*> t.x + at, set_, n, &w)
    map_strip(p, at, n, 0, t.k, &w, look_ahead(p, index, p.units))


# ---- a single strip ----------------------------------------------------------------------


cdef void part_sums(void* context, int64_t part) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef strip w
    cdef int64_t stop, row = rows_of(p, part, &stop)
    sum_strip(p.task, 0, p.places, row, stop, &w)
    keep_found(p, part, &w)


cdef void part_map(void* context, int64_t part) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef strip w
    cdef int64_t stop, row = rows_of(p, part, &stop), bytes = (p.places + 16) * sizeof(work)
    memcpy(w.hi, p.whole.hi, bytes)
    memcpy(w.scale, p.whole.scale, bytes)
    memcpy(w.shift, p.whole.shift, bytes)
    map_strip(p, 0, p.places, row, stop, &w, 0)


cdef public void across_forward(const fn_task* t) noexcept nogil:
    cdef plan p
    cut(&p, t, 1)
    if p.row_parts == 1:
        fn_parallel_for(t, p.units, forward_unit, &p, False)
        return
    fn_parallel_for(t, p.row_parts, part_sums, &p, False)
    sample_sets(t, <const stored*> t.x, p.places, p.whole)
    merge_found(&p, p.whole)
    finish_sets(t, <const stored*> t.x, 0, p.places, p.whole)
    fn_parallel_for(t, p.row_parts, part_map, &p, True)
