"""The columns loop order: from the sums of tiles to statistics and coefficients of each column; see
columns.pxd."""

from libc.math cimport fabs, sqrt
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memcpy, memset

from fastnorm.kernels.columns cimport (
    MANY_CHANNELS, MOST_COPIES, coefficients_of, count_of, counts_of, left_out, mask_of, plan,
    sums_of,
)
from fastnorm.kernels.words cimport (
    EXACT, SAMPLES, about_of, cancels, eight, far_of, fn_task, fold_eight, hi_of, maximum, minimum,
    on_grid, size, stored, values_of, widen, work,
)


cdef void count_copies(const plan* p, int64_t b) noexcept nogil:
    cdef int64_t* counts = counts_of(p, b)
    cdef int64_t _row, j, copies = p.copies, rest = p.rest // p.channels
    cdef const uint8_t* mask = mask_of(p, b, 0)
    memset(counts, 0, MOST_COPIES * sizeof(int64_t))
    for _row in range(p.rows):
        for j in range(copies):
            counts[j] += mask[j] != 0
        mask += copies
    for j in range(rest):
        counts[j] += mask[j] != 0


cdef void merge_tiles(const plan* p, int64_t b, int64_t c0, int64_t c1) noexcept nogil:
    """Into the sums of tile 0."""
    cdef double* into = sums_of(p, b, 0)
    cdef const double* part
    cdef int64_t tile, c
    for tile in range(1, p.tiles):
        part = sums_of(p, b, tile)
        for c in range(c0, c1):
            into[c] = into[c] + part[c]
        for c in range(p.width + c0, p.width + c1):
            into[c] = into[c] + part[c]


# ---- forward -----------------------------------------------------------------------------


cdef void sample_valid_columns(const plan* p, int64_t b, int64_t c0, int64_t c1) noexcept nogil:
    """sample_columns of what counts: from rows of one copy, for all copies."""
    cdef const fn_task* t = p.task
    cdef const stored* x = <const stored*> t.x + b * t.o * p.channels
    cdef const uint8_t* mask = t.mask + b * t.o
    cdef work* about = coefficients_of(p, b)
    cdef int64_t first = 0, row, c, j, last = minimum(p.channels, c1)
    cdef double near, total
    if p.copies > 1:
        count_copies(p, b)
    while first < t.o - 1 and not mask[first]:
        first += 1
    for c in range(c0, last):
        near = <double> widen(x[first * p.channels + c])
        total = 0
        for j in range(1, SAMPLES):
            row = j * t.o // SAMPLES
            if mask[row]:
                total += <double> widen(x[row * p.channels + c]) - near
        near += total * (1.0 / SAMPLES)
        about[c] = on_grid(<work> near) if t.has_mean and fabs(near) < 1e37 else <work> 0
    for j in range(1, p.copies):
        memcpy(about + j * p.channels, about, p.channels * sizeof(work))


cdef void sample_columns(const plan* p, int64_t b, int64_t c0, int64_t c1) noexcept nogil:
    """about = a value near each column's mean, exactly the constant for a constant column."""
    cdef const fn_task* t = p.task
    cdef const stored* x = <const stored*> t.x + b * t.o * p.channels
    cdef work* about = coefficients_of(p, b)
    cdef work* spread = about + p.padded
    cdef const stored* sampled
    cdef int64_t c, j, count = minimum(p.rows, minimum(2 * SAMPLES, maximum(4, p.rows // 8)))
    cdef work inverse = <work> (1.0 / <double> count), d
    if t.mask != NULL:
        sample_valid_columns(p, b, c0, c1)
        return
    memset(about + c0, 0, (c1 - c0) * sizeof(work))
    if EXACT:
        memset(spread + c0, 0, (c1 - c0) * sizeof(work))
    if not t.has_mean:
        return
    for j in range(1, count):
        sampled = x + j * p.rows // count * p.width
        for c in range(c0, c1):
            d = widen(sampled[c]) - widen(x[c])
            about[c] = about[c] + d
            if EXACT:
                spread[c] = spread[c] + size(d)
    for c in range(c0, c1):
        about[c] = about_of(widen(x[c]) + about[c] * inverse, spread[c] * inverse)


cdef void exact_column(const plan* p, int64_t b, int64_t column, double about,
                       double* sums) noexcept nogil:
    """Sums down one column in double."""
    cdef const fn_task* t = p.task
    cdef const stored* x = <const stored*> t.x + b * t.o * p.channels + column
    cdef int64_t row
    cdef double d
    sums[0] = sums[1] = 0
    for row in range(p.rows + (1 if column < p.rest else 0)):
        if left_out(p, b, row, column):
            continue
        d = <double> widen(x[row * p.width]) - about
        sums[0] += d
        sums[1] += d * d


cdef void exact_moments(const plan* p, int64_t b, int64_t c, double count, double* sums,
                        double* squares) noexcept nogil:
    """The mean of a column and its sum of squares about it, in double: two more reads of it."""
    cdef double again[2]
    cdef double mean = 0
    if p.task.has_mean:
        exact_column(p, b, c, coefficients_of(p, b)[c], again)
        mean = coefficients_of(p, b)[c] + again[0] / count
    exact_column(p, b, c, mean, again)
    if not p.task.has_mean:
        again[0] = 0
    sums[0] = mean + again[0] / count
    squares[0] = again[1] - again[0] * again[0] / count


cdef inline void equal_moments(const plan* p, int64_t b, int64_t c0, int64_t c1,
                               int64_t rows) noexcept nogil:
    """column_moments of columns with as many rows: loops of vectors where no column cancels."""
    cdef const work* about = coefficients_of(p, b)
    cdef double* s = sums_of(p, b, 0)
    cdef double* q = s + p.width
    cdef double count = <double> rows, inverse = 1.0 / count, mean
    cdef int64_t c, again = 0
    for c in range(c0, c1):
        again += cancels(s[c], q[c], count)
    if again == 0:
        for c in range(c0, c1):
            mean = s[c] * inverse
            s[c] = about[c] + mean
            q[c] = q[c] - mean * mean * count
        return
    for c in range(c0, c1):
        if cancels(s[c], q[c], count):
            exact_moments(p, b, c, count, s + c, q + c)
        else:
            mean = s[c] * inverse
            s[c] = about[c] + mean
            q[c] = q[c] - mean * mean * count


cdef void column_moments(const plan* p, int64_t b, int64_t c0, int64_t c1) noexcept nogil:
    """Turn the merged sums of each column into its mean and its sum of squares about it."""
    cdef const work* about = coefficients_of(p, b)
    cdef double* s = sums_of(p, b, 0)
    cdef double* q = s + p.width
    cdef double count, mean
    cdef int64_t c, longer = minimum(c1, maximum(c0, p.rest))
    if not p.task.has_mean:
        memset(s + c0, 0, (c1 - c0) * sizeof(double))
    if p.task.mask == NULL:
        equal_moments(p, b, c0, longer, p.rows + 1)
        equal_moments(p, b, longer, c1, p.rows)
        return
    for c in range(c0, c1):
        count = <double> count_of(p, b, c)
        if count == 0:
            s[c] = q[c] = 0
        elif cancels(s[c], q[c], count):
            exact_moments(p, b, c, count, s + c, q + c)
        else:
            mean = s[c] / count
            s[c] = about[c] + mean
            q[c] = q[c] - mean * mean * count


# Sums over the columns of a group: in eight lanes, since one sum would wait for each addition; few
# columns one after the other.


cdef inline double fold(const double* lanes) noexcept nogil:
    cdef eight v
    memcpy(&v, lanes, sizeof(eight))
    return fold_eight(&v)


cdef inline double sum_about(const double* a, double about, int64_t n) noexcept nogil:
    cdef double[8] lanes
    cdef double total = 0
    cdef int64_t c = 0, j
    if n >= 8:
        memset(lanes, 0, sizeof(lanes))
        while c + 8 <= n:
            for j in range(8):
                lanes[j] = lanes[j] + (a[c + j] - about)
            c += 8
        total = fold(lanes)
    for j in range(c, n):
        total += a[j] - about
    return total


cdef inline double sum_squares_about(const double* a, const double* squares, double about,
                                     double count, int64_t n) noexcept nogil:
    """The sum of squares + (a - about)^2*count."""
    cdef double[8] lanes
    cdef double d, total = 0
    cdef int64_t c = 0, j
    if n >= 8:
        memset(lanes, 0, sizeof(lanes))
        while c + 8 <= n:
            for j in range(8):
                d = a[c + j] - about
                lanes[j] = lanes[j] + (squares[c + j] + d * d * count)
            c += 8
        total = fold(lanes)
    for j in range(c, n):
        d = a[j] - about
        total += squares[j] + d * d * count
    return total


cdef inline double sum_weighted(const double* a, const work* weight, int64_t n) noexcept nogil:
    cdef double[8] lanes
    cdef double total = 0
    cdef int64_t c = 0, j
    if n >= 8:
        memset(lanes, 0, sizeof(lanes))
        while c + 8 <= n:
            for j in range(8):
                lanes[j] = lanes[j] + a[c + j] * <double> weight[c + j]
            c += 8
        total = fold(lanes)
    for j in range(c, n):
        total += a[j] * <double> weight[j]
    return total


cdef void merge_copies(const plan* p, int64_t b) noexcept nogil:
    """Chan's merge: the moments of all copies of a channel, in place of the first."""
    cdef double[MANY_CHANNELS] merged
    cdef double* means = sums_of(p, b, 0)
    cdef double* squares = means + p.width
    cdef double d, count, total = values_of(p.task, b) / <double> p.task.k
    cdef double inverse = 1.0 / total if total > 0 else 0
    cdef int64_t c, r, at
    memset(merged, 0, p.channels * sizeof(double))
    for r in range(1, p.copies):
        at = r * p.channels
        count = <double> count_of(p, b, at)
        for c in range(p.channels):
            merged[c] = merged[c] + (means[at + c] - means[c]) * count
    for c in range(p.channels):
        merged[c] = means[c] + merged[c] * inverse
    count = <double> count_of(p, b, 0)
    for c in range(p.channels):
        d = means[c] - merged[c]
        squares[c] = squares[c] + d * d * count
    for r in range(1, p.copies):
        at = r * p.channels
        count = <double> count_of(p, b, at)
        for c in range(p.channels):
            d = means[at + c] - merged[c]
            squares[c] = squares[c] + (squares[at + c] + d * d * count)
    memcpy(means, merged, p.channels * sizeof(double))


cdef void merge_channels(const plan* p, int64_t b) noexcept nogil:
    """Chan's merge: the moments of each channel become those of each group, g in place g, where
    only channels of the groups before it were."""
    cdef const fn_task* t = p.task
    cdef double* means = sums_of(p, b, 0)
    cdef double* squares = means + p.width
    cdef double mean, count = values_of(t, b) / <double> t.k
    cdef int64_t g, c
    for g in range(t.g):
        c = g * t.k
        mean = means[c]
        mean += sum_about(means + c, mean, t.k) / <double> t.k
        squares[g] = sum_squares_about(means + c, squares + c, mean, count, t.k)
        means[g] = mean


cdef void forward_coefficients(const plan* p, int64_t b, int64_t g0, int64_t g1) noexcept nogil:
    """Statistics of the groups [g0, g1) out, coefficients of their columns in.

    Whole loops over arrays, so that the divisions and roots are vectors'."""
    cdef const fn_task* t = p.task
    cdef double* means = sums_of(p, b, 0)
    cdef double* rstds = means + p.width
    cdef const work* weight = <const work*> t.weight
    cdef const work* bias = <const work*> t.bias
    cdef work* hi = coefficients_of(p, b)
    cdef work* scale = hi + p.padded
    cdef work* shift = scale + p.padded
    cdef double values = values_of(t, b), eps = t.eps, far = far_of(t), scaled
    cdef double inverse = 1.0 / values if values > 0 else 0
    cdef int64_t g, c, r, at = b * t.g
    if not t.given:
        if t.mean != NULL:
            memcpy(t.mean + at + g0, means + g0, (g1 - g0) * sizeof(double))
        for g in range(g0, g1):
            rstds[g] = rstds[g] * inverse
        if t.var != NULL:
            memcpy(t.var + at + g0, rstds + g0, (g1 - g0) * sizeof(double))
    for g in range(g0, g1):
        rstds[g] = 1.0 / sqrt(rstds[g] + eps)
    if values == 0 and not t.given:
        memset(rstds + g0, 0, (g1 - g0) * sizeof(double))
    if not t.given and t.rstd != NULL:
        memcpy(t.rstd + at + g0, rstds + g0, (g1 - g0) * sizeof(double))
    if t.k == 1:
        for c in range(g0, g1):
            scaled = rstds[c] * <double> weight[c]
            hi[c] = hi_of(means[c], rstds[c], far, eps)
            scale[c] = <work> scaled
            shift[c] = <work> (<double> bias[c] - (means[c] - <double> hi[c]) * scaled)
    else:
        for g in range(g0, g1):
            for c in range(g * t.k, (g + 1) * t.k):
                scaled = rstds[g] * <double> weight[c]
                hi[c] = hi_of(means[g], rstds[g], far, eps)
                scale[c] = <work> scaled
                shift[c] = <work> (<double> bias[c] - (means[g] - <double> hi[c]) * scaled)
    for r in range(1, p.copies):
        for c in range(3):
            memcpy(hi + c * p.padded + r * p.channels, hi + c * p.padded,
                   p.channels * sizeof(work))


cdef void finish_forward(const plan* p, int64_t b, int64_t c0, int64_t c1) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef int64_t last = minimum(t.g, c1)  # strips cut columns that are groups
    if t.given:
        memcpy(sums_of(p, b, 0) + c0, t.mean + c0, (last - c0) * sizeof(double))
        memcpy(sums_of(p, b, 0) + p.width + c0, t.var + c0, (last - c0) * sizeof(double))
    else:
        merge_tiles(p, b, c0, c1)
        column_moments(p, b, c0, c1)
        if p.copies > 1:
            merge_copies(p, b)
        if t.k > 1:
            merge_channels(p, b)
    forward_coefficients(p, b, c0, last)


# ---- backward ----------------------------------------------------------------------------


cdef void start_backward(const plan* p, int64_t b, int64_t c0, int64_t c1) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef work* hi = coefficients_of(p, b)
    cdef work* z
    cdef const double* mean = t.mean + b * t.g
    cdef const double* rstds = t.rstd + b * t.g
    cdef int64_t c, g, r
    cdef double scale, rstd, lo, far = far_of(t)
    if not t.has_mean:
        memset(hi + c0, 0, (c1 - c0) * sizeof(work))
    elif t.k == 1:
        for c in range(c0, minimum(t.g, c1)):
            hi[c] = hi_of(mean[c], rstds[c], far, 0)
    else:
        for g in range(t.g):
            for c in range(g * t.k, (g + 1) * t.k):
                hi[c] = hi_of(mean[g], rstds[g], far, 0)
    for r in range(1, p.copies):
        memcpy(hi + r * p.channels, hi, p.channels * sizeof(work))
    if t.upstream == NULL and not t.gated:
        return
    # A forward's coefficients, from what it found: those of the gate, or in the places that
    # finish_backward fills.
    z = hi + 4 * p.padded if t.gated else hi + p.padded
    for g in range(c0 // t.k, minimum(t.g, c1 // t.k)):
        rstd = rstds[g]
        for c in range(g * t.k, (g + 1) * t.k):
            scale = rstd * <double> (<const work*> t.weight)[c]
            lo = mean[g] - <double> hi[c] if t.has_mean else 0
            z[c] = <work> scale
            z[p.padded + c] = <work> (<double> (<const work*> t.bias)[c] - lo * scale)
    for r in range(1, p.copies):
        for c in range(2):
            memcpy(z + c * p.padded + r * p.channels, z + c * p.padded, p.channels * sizeof(work))


cdef void finish_backward(const plan* p, int64_t b, int64_t c0, int64_t c1) noexcept nogil:
    """Merged sums of each channel, the means over each group, and the coefficients of

        dx = dy*rstd*weight + (x - hi)*scale + shift.

    The sums of tile 0 become this slice's terms of dbias and dweight."""
    cdef const fn_task* t = p.task
    cdef const work* weight = <const work*> t.weight
    cdef double* s = sums_of(p, b, 0)
    cdef double* q = s + p.width
    cdef work* hi = coefficients_of(p, b)
    cdef double mean, lo, rstd, m1, m2, count = values_of(t, b)
    cdef double inverse = 1.0 / count if count > 0 and not t.given else 0
    cdef double about_mean = inverse if t.has_mean else 0
    cdef const double* means = t.mean + b * t.g
    cdef const double* rstds = t.rstd + b * t.g
    cdef int64_t g, c, r
    merge_tiles(p, b, c0, c1)
    for r in range(1, p.copies):
        for c in range(p.channels):
            s[c] += s[r * p.channels + c]
            q[c] += q[r * p.channels + c]
    if t.k == 1 and t.has_mean:  # in whole loops, those of vectors
        for c in range(c0, minimum(t.g, c1)):
            q[c] = rstds[c] * (q[c] - (means[c] - <double> hi[c]) * s[c])
        for c in range(c0, minimum(t.g, c1)):
            rstd = rstds[c]
            m1 = <double> weight[c] * s[c] * about_mean
            m2 = <double> weight[c] * q[c] * inverse
            hi[p.padded + c] = <work> (-rstd * rstd * m2)
            hi[2 * p.padded + c] = <work> (
                rstd * (rstd * m2 * (means[c] - <double> hi[c]) - m1))
            hi[3 * p.padded + c] = <work> (rstd * <double> weight[c])
        c1 = c0
    for g in range(c0 // t.k, minimum(t.g, c1 // t.k)):
        mean = means[g] if t.has_mean else 0
        rstd = rstds[g]
        lo = mean - <double> hi[g * t.k]
        for c in range(g * t.k, (g + 1) * t.k):
            q[c] = rstd * (q[c] - lo * s[c])
        m1 = sum_weighted(s + g * t.k, weight + g * t.k, t.k) * about_mean
        m2 = sum_weighted(q + g * t.k, weight + g * t.k, t.k) * inverse
        for c in range(g * t.k, (g + 1) * t.k):
            hi[p.padded + c] = <work> (-rstd * rstd * m2)
            hi[2 * p.padded + c] = <work> (rstd * (rstd * m2 * lo - m1))
            hi[3 * p.padded + c] = <work> (rstd * <double> weight[c])
    for r in range(1, p.copies):
        for c in range(1, 4):
            memcpy(hi + c * p.padded + r * p.channels, hi + c * p.padded,
                   p.channels * sizeof(work))


cdef public void start_columns(const void* context, int64_t b, int64_t c0,
                               int64_t c1) noexcept nogil:
    """What the sums of columns [c0, c1) of a plan's slice are taken about."""
    if (<const plan*> context).task.dy == NULL:
        sample_columns(<const plan*> context, b, c0, c1)
    else:
        start_backward(<const plan*> context, b, c0, c1)


cdef public void finish_columns(const void* context, int64_t b, int64_t c0,
                                int64_t c1) noexcept nogil:
    """From the sums, coefficients of these columns; statistics out, or terms of dweight and dbias
    in the sums of tile 0."""
    if (<const plan*> context).task.dy == NULL:
        finish_forward(<const plan*> context, b, c0, c1)
    else:
        finish_backward(<const plan*> context, b, c0, c1)
