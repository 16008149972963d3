"""The across loop order: o, g and i are 1 and s > 1. A set's k values lie s apart, and s sets lie
side by side, as where an image with its channels first is normalized over them at every place.

A strip of neighbouring sets is finished while its values are in the second-level cache: sums run
down its columns, each with its own set, and the map goes along its rows, each with its own weight.
x is read once and y written once; in a backward dy and x are read once and dx is written once.

A few rows are summed and mapped at a time, so that what belongs to their columns is read once for
all of them (the map, with finish_sets in vectors, 1.2 to 1.35 times faster than row by row).

Rows of neighbouring places are short and start anywhere in a line. Where they come from memory and
lie one behind the other, they are put together in the first-level cache, and y is streamed.

Which thread takes which strip never changes a bit: dweight is summed by parts of the strips that
depend on the geometry alone, and merged in their order.
"""

from libc.string cimport memcpy, memset

from fastnorm.kernels.down cimport *
from fastnorm.kernels.joint cimport *
from fastnorm.kernels.words cimport *

cdef enum:
    SMALL = 196608  # bytes of a strip that leave room in a second-level cache
    PLACES = 1024  # in a strip, at most
    PARTS = 32  # of the strips, that sum dweight each for themselves
    SAMPLED = 4  # values of a set whose average its sums are taken about


cdef struct plan:
    const fn_task* task
    int64_t places  # in a strip
    int64_t strips  # of a slice of b
    int64_t units
    int64_t parts
    double* partial  # [parts][2][k]


cdef struct strip:
    # Of one strip, for each place: coefficients of its set, sums, and coefficients of the row that
    # is under way. With room for a whole vec behind the last place.
    work hi[PLACES + 16]
    work scale[PLACES + 16]
    work shift[PLACES + 16]
    work s[PLACES + 16]
    work q[PLACES + 16]
    work row_scale[PLACES + 16]
    work row_shift[PLACES + 16]
    double total_s[PLACES]
    double total_q[PLACES]


cdef inline int64_t most_parts(const fn_task* t) noexcept nogil:
    return minimum(PARTS, maximum(4, (1 << 16) // t.k))


cdef void cut(plan* p, const fn_task* t) noexcept nogil:
    cdef int64_t row = t.k * <int64_t> sizeof(stored)
    p.task = t
    # Strips as wide as each other, of whole lines of every type, but all places where they are not
    # many: what lies in one piece is foreseen (0.8 to 0.9 of the time). By the geometry alone.
    p.places = minimum(PLACES, maximum(64, SMALL // row))
    p.places = ceil_div(ceil_div(t.s, ceil_div(t.s, p.places)), 64) * 64
    if t.s * row <= (4 if t.dy == NULL else 2) * SMALL:
        p.places = minimum(t.s, PLACES)
    p.strips = ceil_div(t.s, p.places)
    p.units = t.b * p.strips
    p.parts = minimum(p.units, most_parts(t))
    p.partial = <double*> t.scratch


cdef public size_t across_scratch(const fn_task* t) noexcept nogil:
    """Bytes of scratch for a forward or a backward."""
    return 2 * most_parts(t) * t.k * sizeof(double)


cdef inline int64_t bounds(const plan* p, int64_t unit, int64_t* n, int64_t* set_) noexcept nogil:
    """Where a unit's strip starts, its places and the number of its first set."""
    cdef int64_t b = unit // p.strips, first = unit % p.strips * p.places
    n[0] = minimum(p.places, p.task.s - first)
    set_[0] = b * p.task.s + first
    return b * p.task.k * p.task.s + first


cdef inline int64_t look_ahead(const plan* p, int64_t unit, int64_t stop) noexcept nogil:
    """Places from a strip to the next before `stop`, where it comes from memory of a processor that
    does not foresee it (else 1.0 to 1.2 times as long)."""
    cdef int64_t n, set_
    if not p.task.stream or p.task.foreseen or unit + 1 >= stop:
        return 0
    return bounds(p, unit + 1, &n, &set_) - bounds(p, unit, &n, &set_)


cdef inline int64_t rows_at_once(int64_t n) noexcept nogil:
    """All of a run where what belongs to their columns stays in registers: memory is read in its
    order then."""
    return RUN if n <= CHUNK * WIDTH else STEP


cdef inline void flush(strip* w, int64_t n) noexcept nogil:
    cdef int64_t c
    for c in range(n):
        w.total_s[c] = w.total_s[c] + <double> w.s[c]
        w.total_q[c] = w.total_q[c] + <double> w.q[c]
    memset(w.s, 0, n * sizeof(work))
    memset(w.q, 0, n * sizeof(work))


cdef inline void clear(strip* w, int64_t n) noexcept nogil:
    memset(w.s, 0, (n + MOST_WIDTH) * sizeof(work))
    memset(w.q, 0, (n + MOST_WIDTH) * sizeof(work))
    memset(w.total_s, 0, n * sizeof(double))
    memset(w.total_q, 0, n * sizeof(double))


# ---- forward -----------------------------------------------------------------------------


cdef inline void sample_sets(const fn_task* t, const stored* x, int64_t n,
                             strip* w) noexcept nogil:
    """hi = a value near each set's mean, exactly the constant of a constant set."""
    cdef int64_t count = minimum(SAMPLED, t.k), j, c
    cdef double inverse = 1.0 / <double> count
    cdef const stored* row
    memset(w.hi, 0, (n + MOST_WIDTH) * sizeof(work))
    if not t.has_mean:
        return
    memset(w.total_s, 0, n * sizeof(double))
    for j in range(1, count):
        row = x + j * t.k // count * t.s
        for c in range(n):
            w.total_s[c] = w.total_s[c] + (<double> widen(row[c]) - <double> widen(x[c]))
    for c in range(n):
        w.total_s[c] = <double> widen(x[c]) + w.total_s[c] * inverse
        w.hi[c] = on_grid(<work> w.total_s[c]) if fabs(w.total_s[c]) < 1e37 else <work> 0


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


cdef inline bint left_out(const fn_task* t, int64_t set_) noexcept nogil:
    return t.mask != NULL and not t.mask[set_]


cdef inline void finish_sets(const fn_task* t, const stored* x, int64_t set_, int64_t n,
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


cdef inline void map_columns(
    const stored* x, const stored* dy, stored* y, int64_t rows, int64_t stride, int64_t first,
    int64_t n, const coefficients* c, bint streaming, int64_t ahead, int vectors
) noexcept nogil:
    """map_rows of n columns from `first` on: `vectors` vecs, the last of several as far back as it
    must be to be whole (0.93 to 1.0 of the time of a part). y may be x or dy: a row is loaded
    before it is stored."""
    cdef vec hi[CHUNK]
    cdef vec scale[CHUNK]
    cdef vec shift[CHUNK]
    cdef vec dscale[CHUNK]
    cdef vec z[CHUNK]
    cdef vec u
    cdef int64_t end = n - WIDTH, row, at
    cdef bint part = vectors == 1 and n < WIDTH
    cdef int v
    x += first
    dy = past(dy, first)
    y += first
    for v in range(vectors):
        at = first + (end if vectors > 1 and v == vectors - 1 else v * WIDTH)
        hi[v] = load_work(c.hi + at)
        scale[v] = load_work(c.scale + at)
        shift[v] = load_work(c.shift + at)
        if dy != NULL:
            dscale[v] = load_work(c.dscale + at)
    for row in range(rows):
        for v in range(vectors):
            at = end if vectors > 1 and v == vectors - 1 else v * WIDTH
            if ahead:
                fetch(x + at + ahead)
                if dy != NULL:
                    fetch(dy + at + ahead)
            z[v] = load_part(x + at, n, 0) if part else load(x + at)
            z[v] = (z[v] - hi[v]) * scale[v] + shift[v]
            if dy == NULL:
                z[v] = z[v] * splat(c.weight[row]) + splat(c.bias[row])
                continue
            u = load_part(dy + at, n, 0) if part else load(dy + at)
            z[v] = z[v] + u * (dscale[v] * splat(c.weight[row]))
        if part:
            store_part(y, n, z[0])
        elif n == vectors * WIDTH:
            put_all(y, z, streaming, vectors)
        else:
            put_all(y, z, False, vectors - 1)
            store(y + (end if vectors > 1 else 0), z[vectors - 1])
        x += stride
        dy = past(dy, stride)
        y += stride


cdef inline void map_rows(
    const stored* x, const stored* dy, stored* y, int64_t rows, int64_t stride, int64_t n,
    const coefficients* c, int stream, int64_t ahead
) noexcept nogil:
    """y = ((x - hi)*scale + shift)*weight + bias, or where dy is not NULL,
    y = (x - hi)*scale + shift + dy*(dscale*weight); hi, scale, shift and dscale of a column, weight
    and bias of a row. Rows are streamed where each starts at a line."""
    cdef int64_t at = 0
    cdef bint lines = (streams(stream, y) and until_aligned(y) == 0
                       and stride * <int64_t> sizeof(stored) % 64 == 0)
    while at + CHUNK * WIDTH <= n:
        map_columns(x, dy, y, rows, stride, at, CHUNK * WIDTH, c, lines, ahead, CHUNK)
        at += CHUNK * WIDTH
    if n - at > 3 * WIDTH:
        map_columns(x, dy, y, rows, stride, at, n - at, c, False, ahead, 4)
    elif n - at > 2 * WIDTH:
        map_columns(x, dy, y, rows, stride, at, n - at, c, False, ahead, 3)
    elif n - at > WIDTH:
        map_columns(x, dy, y, rows, stride, at, n - at, c, False, ahead, 2)
    elif n > at:
        map_columns(x, dy, y, rows, stride, at, n - at, c, False, ahead, 1)


cdef inline bint joins(const plan* p) noexcept nogil:
    """Whether rows are put together (0.55 to 0.9 of the time): where they start anywhere in a line,
    or much of them would not be streamed (where little is, 1.0 to 1.06)."""
    cdef const fn_task* t = p.task
    cdef int64_t lead = until_aligned(<const stored*> t.y)
    return (t.stream and p.strips == 1 and t.mask == NULL and lead >= 0
            and (lead > 0 or t.s * <int64_t> sizeof(stored) % 64 != 0
                 or t.s % (CHUNK * WIDTH) > t.s // 8))


cdef inline void map_unit(const plan* p, int64_t at, int64_t n, const coefficients* of_columns,
                          int64_t ahead) noexcept nogil:
    """map_rows of the strip of n places at `at`."""
    cdef const fn_task* t = p.task
    cdef coefficients c = of_columns[0]
    cdef const stored* x = <const stored*> t.x + at
    cdef const stored* dy = past(<const stored*> t.dy, at)
    cdef stored* y = <stored*> t.y + at
    cdef int64_t row = 0, step = rows_at_once(n), count
    cdef bint joining = joins(p)
    cdef joint j
    c.weight, c.bias = <const work*> t.weight, <const work*> t.bias
    if joining:
        step = minimum(step, JOINED // n)
        j.to = y
        j.n = 0
    while row < t.k:
        count = minimum(step, t.k - row)
        map_rows(x, dy, &j.kept[j.n] if joining else y, count, t.s, n, &c,
                 0 if joining or t.mask != NULL else t.stream, ahead)
        row += count
        if joining:
            stream_joint(&j, count * n, row == t.k)
        x += count * t.s
        dy = past(dy, count * t.s)
        y += count * t.s
        c.weight += count
        c.bias += count


cdef inline void load_row(strip* w, int64_t n, work weight, work bias) noexcept nogil:
    cdef int64_t c
    for c in range(n):
        w.row_scale[c] = w.scale[c] * weight
        w.row_shift[c] = w.shift[c] * weight + bias


cdef inline void map_fused_unit(const fn_task* t, int64_t at, int64_t n, strip* w) noexcept nogil:
    """map_fused of the strip of n places at `at`, row by row."""
    cdef const work* weight = <const work*> t.weight
    cdef const work* bias = <const work*> t.bias
    cdef coefficients c = affine_map(OF_PLACES, w.hi, w.row_scale, w.row_shift)
    cdef int64_t row
    cdef edge ends
    open_edge(&ends)
    for row in range(t.k):
        load_row(w, n, weight[row], bias[row])
        map_fused(t, at + row * t.s, n, 1, 0, &c, &ends)
    close_edge(&ends)


cdef void forward_unit(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef strip w
    cdef int64_t n, set_, row = 0, count, since = 0, ahead = look_ahead(p, index, p.units)
    cdef int64_t at = bounds(p, index, &n, &set_), step = rows_at_once(n)
    cdef const stored* x = <const stored*> t.x + at
    cdef coefficients c = affine_map(OF_PLACES, w.hi, w.scale, w.shift)
    sample_sets(t, x, n, &w)
    clear(&w, n)
    while row < t.k:
        count = minimum(step, t.k - row)
        sum_rows(x + row * t.s, NULL, count, t.s, n, &c, w.s, w.q,
                 count * t.s if step == STEP else 0)
        row += count
        since += count
        if since >= RUN or row == t.k:
            flush(&w, n)
            since = 0
    finish_sets(t, x, set_, n, &w)
    if t.fused:
        map_fused_unit(t, at, n, &w)
    else:
        map_unit(p, at, n, &c, ahead)
    if t.stream:
        stream_end()


cdef public void across_forward(const fn_task* t) noexcept nogil:
    cdef plan p
    cut(&p, t)
    fn_parallel_for(t, p.units, forward_unit, &p, False)


# ---- backward ----------------------------------------------------------------------------


cdef inline void sum_step_back(
    const stored* x, const stored* dy, int64_t stride, int64_t n, strip* w, int64_t p,
    const work* weight, vec* a, vec* b, int rows
) noexcept nogil:
    """LANES places of some rows; n of them where n is not LANES."""
    cdef vec hi, scale, shift, s, q, d, u
    cdef int64_t at, count
    cdef int v, r
    for v in range(VECTORS):
        at = p + v * WIDTH
        count = minimum(WIDTH, n - v * WIDTH)
        if count <= 0:
            return
        hi = load_work(w.hi + at)
        scale = load_work(w.scale + at)
        shift = load_work(w.shift + at)
        s = load_work(w.s + at)
        q = load_work(w.q + at)
        for r in range(rows):
            if n == LANES:
                d = load(x + r * stride + at) - hi
                u = load(dy + r * stride + at)
                fetch(x + (rows + r) * stride + at)
                fetch(dy + (rows + r) * stride + at)
            else:
                d = load_part(x + r * stride + at, count, 0) - hi
                u = load_part(dy + r * stride + at, count, 0)
            a[r * VECTORS + v] = plus(u * (d * scale + shift), a[r * VECTORS + v])
            b[r * VECTORS + v] = b[r * VECTORS + v] + u
            u = u * splat(weight[r])
            s = s + u
            q = plus(u * d, q)
        memcpy(w.s + at, &s, sizeof(vec))
        memcpy(w.q + at, &q, sizeof(vec))


cdef inline void sum_narrow_back(
    const stored* x, const stored* dy, int64_t stride, int64_t n, strip* w, const work* weight,
    eight_work* folded, int rows, int vectors
) noexcept nogil:
    """sum_step_back of all n places, which are few: `vectors` vecs, the last may be a part. The
    sums of each row are folded to eight. (Of 7 and 8 vecs only those sums are in registers, and it
    takes 0.75 of the time.)"""
    cdef vec hi[DOWN]
    cdef vec scale[DOWN]
    cdef vec shift[DOWN]
    cdef vec s[DOWN]
    cdef vec q[DOWN]
    cdef vec a[VECTORS]
    cdef vec b[VECTORS]
    cdef vec d, u
    cdef int64_t last = n - (vectors - 1) * WIDTH
    cdef bint part = last < WIDTH
    cdef int v, r, lane
    for v in range(vectors):
        hi[v] = load_work(w.hi + v * WIDTH)
        scale[v] = load_work(w.scale + v * WIDTH)
        shift[v] = load_work(w.shift + v * WIDTH)
        s[v] = load_work(w.s + v * WIDTH)
        q[v] = load_work(w.q + v * WIDTH)
    for r in range(rows):
        for lane in range(VECTORS):
            a[lane] = b[lane] = splat(0)
        for v in range(vectors):
            lane = v % VECTORS
            d = load_part(x + v * WIDTH, last, 0) if part and v == vectors - 1 else (
                load(x + v * WIDTH))
            u = load_part(dy + v * WIDTH, last, 0) if part and v == vectors - 1 else (
                load(dy + v * WIDTH))
            d = d - hi[v]
            a[lane] = plus(u * (d * scale[v] + shift[v]), a[lane])
            b[lane] = b[lane] + u
            u = u * splat(weight[r])
            s[v] = s[v] + u
            q[v] = plus(u * d, q[v])
        fold_to_eight(&folded[r], a)
        fold_to_eight(&folded[STEP + r], b)
        x += stride
        dy += stride
    for v in range(vectors):
        memcpy(w.s + v * WIDTH, &s[v], sizeof(vec))
        memcpy(w.q + v * WIDTH, &q[v], sizeof(vec))


cdef inline void sum_rows_back(const stored* x, const stored* dy, int64_t stride, int64_t n,
                               strip* w, const work* weight, double* dweight, double* dbias,
                               int rows) noexcept nogil:
    """Onto w.s and w.q the terms of each set, onto dweight and dbias those of each row.

    Several rows at once, so that a set's terms are loaded and stored once for all of them (0.7 to
    0.85 of the time), while the next ones are asked for (0.7 to 0.9)."""
    cdef vec lanes[2 * STEP * VECTORS]
    cdef eight_work folded[2 * STEP]  # for dweight, then for dbias
    cdef double sums[2 * STEP]
    cdef int64_t p = 0
    cdef int v, r
    if rows < STEP:
        memset(folded, 0, sizeof(folded))
    if n > 3 * WIDTH and n <= 4 * WIDTH:
        sum_narrow_back(x, dy, stride, n, w, weight, folded, rows, 4)
    elif REGISTERS == 16 and n > 6 * WIDTH and n <= 7 * WIDTH:
        sum_narrow_back(x, dy, stride, n, w, weight, folded, rows, 7)
    elif REGISTERS == 16 and n > 7 * WIDTH and n <= 8 * WIDTH:
        sum_narrow_back(x, dy, stride, n, w, weight, folded, rows, 8)
    else:
        for v in range(2 * STEP * VECTORS):
            lanes[v] = splat(0)
        while p + LANES <= n:
            sum_step_back(x, dy, stride, LANES, w, p, weight, lanes, lanes + STEP * VECTORS, rows)
            p += LANES
        if p < n:
            sum_step_back(x, dy, stride, n - p, w, p, weight, lanes, lanes + STEP * VECTORS, rows)
        for r in range(2 * STEP):
            fold_to_eight(&folded[r], lanes + r * VECTORS)
    fold_rows(folded, 2 * STEP, sums)
    for r in range(rows):
        dweight[r] += sums[r]
        dbias[r] += sums[STEP + r]


cdef inline void start_sets(const fn_task* t, int64_t set_, int64_t n, strip* w) noexcept nogil:
    """Into w a forward's coefficients, from what it found; 0 behind the last place."""
    cdef double mean
    cdef int64_t c
    memset(w.hi, 0, (n + MOST_WIDTH) * sizeof(work))
    memset(w.scale, 0, (n + MOST_WIDTH) * sizeof(work))
    memset(w.shift, 0, (n + MOST_WIDTH) * sizeof(work))
    for c in range(n):
        mean = t.mean[set_ + c] if t.has_mean else 0
        w.hi[c] = <work> mean
        w.scale[c] = <work> t.rstd[set_ + c]
        w.shift[c] = <work> (-(mean - <double> w.hi[c]) * t.rstd[set_ + c])


cdef inline void finish_terms(const fn_task* t, int64_t set_, int64_t n,
                              strip* w) noexcept nogil:
    """From the sums of gy and gy*(x - hi), the coefficients of

        dx = dy*rstd*weight + (x - hi)*row_scale + row_shift,

    while scale stays rstd."""
    cdef double inverse = 1.0 / <double> t.k, lo, rstd, m1, m2
    cdef int64_t c
    for c in range(n):
        rstd = t.rstd[set_ + c]
        lo = t.mean[set_ + c] - <double> w.hi[c] if t.has_mean else 0
        m1 = w.total_s[c] * inverse if t.has_mean else 0
        m2 = rstd * (w.total_q[c] - lo * w.total_s[c]) * inverse
        if t.given:
            m1 = m2 = 0
        w.row_scale[c] = <work> (-rstd * rstd * m2)
        w.row_shift[c] = <work> (rstd * (rstd * m2 * lo - m1))


cdef void backward_part(void* context, int64_t part) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef strip w
    cdef stored kept[PLACES]
    cdef stored kept_dy[PLACES]
    cdef int64_t unit, n, set_, at, row, count, ahead, stop = (part + 1) * p.units // p.parts
    cdef double* dweight = p.partial + 2 * part * t.k
    cdef const work* weight = <const work*> t.weight
    cdef const stored* x
    cdef const stored* dy
    cdef coefficients c = affine_map(OF_PLACES, w.hi, w.row_scale, w.row_shift)
    c.dscale = w.scale
    memset(dweight, 0, 2 * t.k * sizeof(double))
    for unit in range(part * p.units // p.parts, stop):
        at = bounds(p, unit, &n, &set_)
        ahead = look_ahead(p, unit, stop)
        x = <const stored*> t.x + at
        dy = <const stored*> t.dy + at
        start_sets(t, set_, n, &w)
        if t.upstream != NULL:
            map_fused_unit(t, at, n, &w)
        clear(&w, n)
        row = 0
        while row < t.k:
            if t.mask != NULL:
                count = 1
                keep_valid(x + row * t.s, t.mask + set_, n, 0, kept)
                keep_valid(dy + row * t.s, t.mask + set_, n, 0, kept_dy)
                sum_rows_back(kept, kept_dy, 0, n, &w, weight + row, dweight + row,
                              dweight + t.k + row, 1)
            elif row + STEP <= t.k:
                count = STEP
                sum_rows_back(x + row * t.s, dy + row * t.s, t.s, n, &w, weight + row,
                              dweight + row, dweight + t.k + row, STEP)
            else:
                count = 1
                sum_rows_back(x + row * t.s, dy + row * t.s, t.s, n, &w, weight + row,
                              dweight + row, dweight + t.k + row, 1)
            row += count
            if row % RUN == 0 or row == t.k:
                flush(&w, n)
        finish_terms(t, set_, n, &w)
        map_unit(p, at, n, &c, ahead)
        if t.mask != NULL:
            for row in range(t.k):
                blank(<stored*> t.y + at + row * t.s, t.mask + set_, n)
    if t.stream:
        stream_end()


cdef public void across_backward(const fn_task* t) noexcept nogil:
    cdef plan p
    cdef int64_t part, row
    cut(&p, t)
    fn_parallel_for(t, p.parts, backward_part, &p, False)
    for row in range(t.k):
        t.dweight[row] = t.dbias[row] = 0
    for part in range(p.parts):
        for row in range(t.k):
            t.dweight[row] += p.partial[2 * part * t.k + row]
            t.dbias[row] += p.partial[(2 * part + 1) * t.k + row]
