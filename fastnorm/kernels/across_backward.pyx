"""The across loop order backward; see across.pxd."""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from fastnorm.kernels.across cimport *
from fastnorm.kernels.words cimport *


cdef inline void sum_vec_back(
    const stored* x, const stored* dy, int64_t stride, int64_t n, strip* w, int64_t at,
    const work* weight, vec* a, vec* b, int rows
) noexcept nogil:
    """The places from `at` on of some rows: WIDTH of them, or n where they are fewer. What they
    have for dweight and dbias goes to a and b, LANES for each row."""
    cdef vec hi = load_work(w.hi + at)
    cdef vec scale = load_work(w.scale + at)
    cdef vec shift = load_work(w.shift + at)
    cdef vec s = load_work(w.s + at)
    cdef vec q = load_work(w.q + at)
    cdef vec d, u
    cdef int r
    for r in range(rows):
        fetch(x + (rows + r) * stride + at)
        fetch(dy + (rows + r) * stride + at)
        d = (load(x + r * stride + at) if n == WIDTH else
             load_part(x + r * stride + at, n, 0)) - hi
        u = (load(dy + r * stride + at) if n == WIDTH else
             load_part(dy + r * stride + at, n, 0))
        a[r * VECTORS] = plus(u * (d * scale + shift), a[r * VECTORS])
        b[r * VECTORS] = b[r * VECTORS] + u
        u = u * splat(weight[r])
        s = s + u
        q = plus(u * d, q)
    store_work(w.s + at, s)
    store_work(w.q + at, q)


cdef inline void sum_narrow_back(
    const stored* x, const stored* dy, int64_t stride, int64_t n, strip* w, const work* weight,
    eight_work* folded, int rows, int vectors
) noexcept nogil:
    """sum_vec_back of all n places, which are few: `vectors` vecs, the last may be a part. The
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
        store_work(w.s + v * WIDTH, s[v])
        store_work(w.q + v * WIDTH, q[v])


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
            for v in range(VECTORS):
                sum_vec_back(x, dy, stride, WIDTH, w, p + v * WIDTH, weight, lanes + v,
                             lanes + STEP * VECTORS + v, rows)
            p += LANES
        v = 0
        while p + WIDTH <= n:
            sum_vec_back(x, dy, stride, WIDTH, w, p, weight, lanes + v,
                         lanes + STEP * VECTORS + v, rows)
            p += WIDTH
            v += 1
        if p < n:
            sum_vec_back(x, dy, stride, n - p, w, p, weight, lanes + v,
                         lanes + STEP * VECTORS + v, rows)
        for r in range(2 * STEP):
            fold_to_eight(&folded[r], lanes + r * VECTORS)
    fold_rows(folded, 2 * STEP, sums)
    for r in range(rows):
        dweight[r] += sums[r]
        dbias[r] += sums[STEP + r]


cdef void start_sets(const fn_task* t, int64_t set_, int64_t n, strip* w) noexcept nogil:
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


cdef void finish_terms(const fn_task* t, int64_t set_, int64_t n, strip* w) noexcept nogil:
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


cdef void sum_strip(const plan* p, int64_t at, int64_t set_, int64_t n, int64_t row, int64_t stop,
                    double* dweight, strip* w) noexcept nogil:
    """The sums of the rows [row, stop), and their terms of dweight and dbias."""
    cdef const fn_task* t = p.task
    cdef stored kept[PLACES]
    cdef stored kept_dy[PLACES]
    cdef const work* weight = <const work*> t.weight
    cdef const stored* x
    cdef const stored* dy
    cdef int64_t count
    start_sets(t, set_, n, w)
    if t.upstream != NULL:
        map_fused_unit(t, at, n, row, stop, w)
    clear(w, n)
    while row < stop:
        count = STEP if t.mask == NULL and row + STEP <= stop else 1
        x = <const stored*> t.x + at + row * t.s
        dy = <const stored*> t.dy + at + row * t.s
        if t.mask != NULL:
            keep_valid(x, t.mask + set_, n, 0, kept)
            keep_valid(dy, t.mask + set_, n, 0, kept_dy)
            x, dy = kept, kept_dy
        if count == STEP:
            sum_rows_back(x, dy, t.s, n, w, weight + row, dweight + row, dweight + t.k + row, STEP)
        else:
            sum_rows_back(x, dy, t.s, n, w, weight + row, dweight + row, dweight + t.k + row, 1)
        row += count
        if row % RUN == 0 or row == stop:
            flush(w, n)


cdef void map_strip(const plan* p, int64_t at, int64_t set_, int64_t n, int64_t row, int64_t stop,
                    strip* w, int64_t ahead) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef coefficients c = affine_map(OF_PLACES, w.hi, w.row_scale, w.row_shift)
    c.dscale = w.scale
    map_unit(p, at, n, row, stop, &c, ahead)
    if t.mask != NULL:
        for row in range(row, stop):
            blank(<stored*> t.y + at + row * t.s, t.mask + set_, n)


cdef void backward_part(void* context, int64_t part) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef strip w
    cdef int64_t unit, n, set_, at, stop = (part + 1) * p.units // p.parts
    cdef double* dweight = p.partial + 2 * part * t.k
    memset(dweight, 0, 2 * t.k * sizeof(double))
    for unit in range(part * p.units // p.parts, stop):
        at = bounds(p, unit, &n, &set_)
        sum_strip(p, at, set_, n, 0, t.k, dweight, &w)
        finish_terms(t, set_, n, &w)
        map_strip(p, at, set_, n, 0, t.k, &w, look_ahead(p, unit, stop))
    if t.stream:
        stream_end()


# ---- a single strip ----------------------------------------------------------------------


cdef void part_sums(void* context, int64_t part) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef strip w
    cdef int64_t stop, row = rows_of(p, part, &stop)
    memset(p.partial + row, 0, (stop - row) * sizeof(double))
    memset(p.partial + p.task.k + row, 0, (stop - row) * sizeof(double))
    sum_strip(p, 0, 0, p.places, row, stop, p.partial, &w)
    keep_found(p, part, &w)


cdef void part_map(void* context, int64_t part) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef strip w
    cdef int64_t stop, row = rows_of(p, part, &stop), bytes = (p.places + 16) * sizeof(work)
    memcpy(w.hi, p.whole.hi, bytes)
    memcpy(w.scale, p.whole.scale, bytes)
    memcpy(w.row_scale, p.whole.row_scale, bytes)
    memcpy(w.row_shift, p.whole.row_shift, bytes)
    map_strip(p, 0, 0, p.places, row, stop, &w, 0)
    if p.task.stream:
        stream_end()


cdef public void across_backward(const fn_task* t) noexcept nogil:
    cdef plan p
    cdef int64_t part, row
    cut(&p, t, 2)
    if p.row_parts == 1:
        fn_parallel_for(t, p.parts, backward_part, &p, False)
    else:
        fn_parallel_for(t, p.row_parts, part_sums, &p, False)
        start_sets(t, 0, p.places, p.whole)
        merge_found(&p, p.whole)
        finish_terms(t, 0, p.places, p.whole)
        fn_parallel_for(t, p.row_parts, part_map, &p, True)
    for row in range(t.k):
        t.dweight[row] = t.dbias[row] = 0
    for part in range(p.parts):
        for row in range(t.k):
            t.dweight[row] += p.partial[2 * part * t.k + row]
            t.dbias[row] += p.partial[(2 * part + 1) * t.k + row]
