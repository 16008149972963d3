"""The rows loop order backward where i == 1 and o == 1: rows with a weight for each place, as layer
and RMS norm have them; see rows.pxd."""

from libc.string cimport memset

from fastnorm.kernels.joint cimport *
from fastnorm.kernels.rows cimport *
from fastnorm.kernels.rows_backward cimport *
from fastnorm.kernels.runs cimport *
from fastnorm.kernels.words cimport *


cdef struct strip:
    # n columns of some rows; dweight and dbias go onto sum_w and sum_b, which have room for whole
    # vectors, or into them where the rows are the first. Where sum_b is NULL, the forward only
    # scales.
    const stored* x
    const stored* dy
    const stored* dsum
    stored* y
    int64_t rows
    int64_t stride
    int64_t n
    const terms* c  # of each row
    const work* weight
    bint first
    work* sum_w
    work* sum_b
    edge* ends  # of rows that are streamed one by one


cdef inline void backward_columns(const strip* s, int64_t first, int64_t n, bint streaming,
                                  int64_t ahead, int vectors) noexcept nogil:
    """The columns [first, first + n): `vectors` whole vecs, or one that may be a part."""
    cdef const stored* x = s.x + first
    cdef const stored* dy = s.dy + first
    cdef const stored* dsum = past(s.dsum, first)
    cdef stored* y = s.y + first
    cdef vec a[CHUNK]
    cdef vec b[CHUNK]
    cdef vec w[CHUNK]
    cdef vec dx[CHUNK]
    cdef vec d, u, hi, rstd, offset, scale, shift, apart
    cdef bint whole = n == vectors * WIDTH
    cdef int64_t at, r
    cdef int v
    for v in range(vectors):
        at = first + v * WIDTH
        a[v] = b[v] = splat(0)
        if not s.first:
            a[v] = load_work(s.sum_w + at)
            if s.sum_b != NULL:
                b[v] = load_work(s.sum_b + at)
        w[v] = load_work(s.weight + at) if whole else load_work_part(s.weight + at, n, 0)
    for r in range(s.rows):
        hi = splat(s.c[r].hi)
        rstd = splat(<work> s.c[r].rstd)
        offset = splat(s.c[r].offset)
        scale = splat(s.c[r].scale)
        shift = splat(s.c[r].shift)
        for v in range(vectors):
            at = v * WIDTH
            if ahead and opens_line(v):
                fetch(x + at + ahead)
                fetch(dy + at + ahead)
            d = load(x + at) if whole else load_part(x + at, n, 0)
            u = load(dy + at) if whole else load_part(dy + at, n, 0)
            if s.sum_b == NULL:
                a[v] = a[v] + u * (d * rstd)
                d = d * scale + u * w[v] * rstd
            else:
                d = d - hi
                a[v] = plus(u * (d * rstd + offset), a[v])
                b[v] = b[v] + u
                d = d * scale + shift + u * w[v] * rstd
            if dsum != NULL:
                d = d + (load(dsum + at) if whole else load_part(dsum + at, n, 0))
            dx[v] = d
        if streaming and vectors == 1:
            apart = dx[0]  # which stays in registers
            put_ends(s.ends, y, n, &apart)
        elif whole:
            put_all(y, dx, streaming, vectors)
        else:
            store_part(y, n, dx[0])
        x += s.stride
        dy += s.stride
        dsum = past(dsum, s.stride)
        y += s.stride
    for v in range(vectors):
        at = first + v * WIDTH
        store_work(s.sum_w + at, a[v])
        if s.sum_b != NULL:
            store_work(s.sum_b + at, b[v])


cdef inline void backward_rows(const strip* of_rows, bint streaming, int64_t ahead) noexcept nogil:
    cdef strip s = of_rows[0]  # in registers: y may lie anywhere
    # Up to the first line of y, where it is streamed or that of every row.
    cdef int64_t p = 0, lead = minimum(s.n, until_aligned(s.y)) if streaming else 0, step
    if s.stride * <int64_t> sizeof(stored) % 64 == 0:
        lead = maximum(lead, plain_head(s.y, s.n))
    # 16 registers hold the sums of a pair, not of a chunk: pairs take 0.9 to 1.0 of the time (of
    # short rows 1.05 to 1.15).
    cdef bint chunks = REGISTERS > 16 or s.n < SHORT // 2
    while p < s.n:
        while chunks and p >= lead and p + CHUNK * WIDTH <= s.n:
            backward_columns(&s, p, CHUNK * WIDTH, streaming, ahead, CHUNK)
            p += CHUNK * WIDTH
        while p >= lead and p + PAIR * WIDTH <= s.n:
            backward_columns(&s, p, PAIR * WIDTH, streaming, ahead, PAIR)
            p += PAIR * WIDTH
        if p < s.n:
            step = minimum(WIDTH, (lead if p < lead else s.n) - p)
            backward_columns(&s, p, step, streaming, ahead, 1)
            p += step


cdef void backward_strip(
    const fn_task* t, stored* y, int64_t at, int64_t channel, int64_t rows, int64_t n,
    const terms* c, bint first, work* sum_w, work* sum_b, bint streaming, int64_t ahead,
    edge* ends
) noexcept nogil:
    """n columns of some rows, the first of them `channel`'s and at `at`; y: where they go. (A loop
    of its own where a forward only scales: 0.9 to 1.0 of the time of RMS norm.)"""
    cdef strip s
    s.x = <const stored*> t.x + at
    s.dy = <const stored*> t.dy + at
    s.dsum = past(<const stored*> t.dsum, at)
    s.y = y
    s.rows, s.stride, s.n = rows, t.g * t.k, n
    s.c = c
    s.weight = <const work*> t.weight + channel
    s.first, s.sum_w = first, sum_w
    s.ends = ends
    if t.scaled:
        s.sum_b = NULL
        backward_rows(&s, streaming, ahead)
    else:
        s.sum_b = sum_b
        backward_rows(&s, streaming, ahead)


cdef inline void add_strip(const work* sums, int64_t n, bint first, double* into) noexcept nogil:
    cdef int64_t j
    for j in range(n):
        into[j] = <double> sums[j] if first else into[j] + <double> sums[j]


cdef inline void sum_places(const plan* p, int64_t b, int64_t g, int64_t rows, int64_t k, int64_t n,
                            terms* c, double* s, double* q) noexcept nogil:
    """Start the terms of rows b to b + rows of group g; s and q get the sums of gy and gy*(x - hi)
    over the places [k, k + n) of each."""
    cdef const fn_task* t = p.task
    cdef const stored* x = <const stored*> t.x
    cdef const stored* dy = <const stored*> t.dy
    cdef const work* weight = <const work*> t.weight + g * t.k + k
    cdef double sums[2]
    cdef eight_work folded_s[ROWS]
    cdef eight_work folded_q[ROWS]
    cdef bint brief = n <= FLUSH * LANES
    cdef work rstd
    cdef coefficients input
    cdef int64_t at, r
    for r in range(rows):
        at = ((b + r) * t.g + g) * t.k + k
        start_terms(t, (b + r) * t.g + g, &c[r])
        if t.upstream != NULL:
            rstd = <work> c[r].rstd
            input = affine_map(OF_ALL, &c[r].hi, &rstd, &c[r].offset)
            input.weight, input.bias = weight, <const work*> t.bias + g * t.k + k
            map_fused(t, at, n, 1, 0, &input, NULL)
        if brief and t.has_mean:
            sum_short(x + at, there(dy + at), there_weight(weight), n, c[r].hi, &folded_s[r],
                      &folded_q[r])
        elif brief:
            sum_short(x + at, dy + at, weight, n, 0, NULL, &folded_q[r])
            s[r] = 0
        else:
            sums[0] = sums[1] = 0
            sum_runs(x + at, dy + at, weight, 1, 0, n, c[r].hi, NULL, sums, 0)
            s[r] = sums[0]
            q[r] = sums[1]
    if brief:
        fold_rows(folded_q, rows, q)
    if brief and t.has_mean:
        fold_rows(folded_s, rows, s)


cdef inline void find_terms(const plan* p, int64_t b, int64_t g, int64_t rows,
                            terms* c) noexcept nogil:
    """The sums of rows b to b + rows of group g, and what they are mapped with."""
    cdef double s[ROWS]
    cdef double q[ROWS]
    cdef int64_t r
    sum_places(p, b, g, rows, 0, p.task.k, c, s, q)
    for r in range(rows):
        finish_terms(p, (b + r) * p.task.g + g, s[r], q[r], &c[r], False)


cdef inline int64_t rows_together(const fn_task* t, bint* stream) noexcept nogil:
    """Rows mapped together, their sums of dweight in registers; whether they are streamed.

    They are all rows of a group (0.75 to 0.9 of the time that pairs take); but long ones that are
    streamed are pairs, which are still in the first-level cache (all of them took 1.05 to 1.15
    times as long), or single where they start anywhere in a line. (Pairs of rows that lie in the
    same sets of the first-level cache: 0.95 in the second-level cache, 1.0 to 1.3 out of it.)"""
    cdef int64_t lead = until_aligned(<const stored*> t.y)
    cdef bint lines = lead == 0 and t.k * <int64_t> sizeof(stored) % 64 == 0
    stream[0] = t.stream and (lines or (t.k >= SHORT_RUN and lead >= 0))
    if stream[0] and t.k >= SHORT_RUN:
        return 2 if lines else 1
    return ROWS


cdef inline bint joins(const fn_task* t) noexcept nogil:
    """Whether rows that end within a line are put together before they are streamed (0.7 to 1.1
    of the time of each alone, with its ends in `ends`)."""
    cdef int64_t lead = until_aligned(<const stored*> t.y), bytes = t.k * <int64_t> sizeof(stored)
    return (t.stream and lead >= 0 and t.g == 1 and t.mask == NULL and t.k <= STRIP
            and bytes >= SHORTEST and (lead > 0 or bytes % 64 != 0))


cdef inline void leave_row_back(const fn_task* t, int64_t at) noexcept nogil:
    memset(<stored*> t.y + at, 0, t.k * sizeof(stored))
    if t.upstream != NULL:
        memset(<stored*> t.dy + at, 0, t.k * sizeof(stored))


cdef void backward_part(void* context, int64_t index) noexcept nogil:
    """i == 1 and o == 1: rows with a weight for each place; a part of b, one group."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef terms c[ROWS]
    cdef work sum_w[STRIP + MOST_WIDTH]
    cdef work sum_b[STRIP + MOST_WIDTH]
    cdef int64_t b_tile = index // t.g, g = index % t.g, size = t.g * t.k
    cdef int64_t b = b_tile * t.b // p.b_tiles, end = (b_tile + 1) * t.b // p.b_tiles
    cdef int64_t r, rows, count, k, n, done, ahead, at
    # By the geometry alone: dweight meets a double after this many rows.
    cdef int64_t group = maximum(2, minimum(ROWS, 8 * ELEMENTS // t.k)), step, few
    cdef double* dweight = p.partial + 2 * b_tile * size + g * t.k
    cdef bint first = True, stream
    cdef stored* y
    # Each row's where it is mapped in strips, else one for all.
    cdef edge ends[ROWS]
    for r in range(ROWS):
        open_edge(&ends[r])
    cdef bint joining = joins(t)
    cdef joint j
    j.to = <stored*> t.y + b * size
    j.n = 0
    step = rows_together(t, &stream)
    if joining:
        step = minimum(ROWS, JOINED // t.k)
        stream = False
    few = step if t.k <= STRIP else group
    while b < end:
        rows = valid_rows(t, b, minimum(group, end - b))
        if rows == 0:
            leave_row_back(t, b * size + g * t.k)
            b += 1
            continue
        ahead = group * size if t.beyond and b + rows < end else 0
        done = 0
        while done < rows:
            count = minimum(few, rows - done)
            find_terms(p, b + done, g, count, c)
            k = 0
            while k < t.k:
                n = minimum(STRIP, t.k - k)
                r = 0
                while r < count:
                    at = (b + done + r) * size + g * t.k + k
                    y = &j.kept[j.n] if joining else <stored*> t.y + at
                    backward_strip(t, y, at, g * t.k + k, minimum(step, count - r), n, c + r,
                                   done + r == 0, sum_w, sum_b, stream, ahead,
                                   &ends[r if t.k > STRIP else 0])
                    if joining:
                        stream_joint(&j, minimum(step, count - r) * t.k, False)
                    r += step
                if done + count == rows:
                    add_strip(sum_w, n, first, dweight + k)
                    add_strip(sum_b, 0 if t.scaled else n, first, dweight + size + k)
                k += n
            done += count
        b += rows
        first = False
    if first:
        memset(dweight, 0, t.k * sizeof(double))
        memset(dweight + size, 0, t.k * sizeof(double))
    for r in range(ROWS):
        close_edge(&ends[r])
    if joining:
        stream_joint(&j, 0, True)
    if t.stream:
        stream_end()


cdef inline bint wide(const plan* p) noexcept nogil:
    """Whether rows are so long, and too few for parts of b or all in cache, that they are cut into
    strips of columns instead: parts of dweight would cross from core to core (0.75 to 1.05 of the
    time; shorter rows 1.0 to 1.4)."""
    return (p.task.i == 1 and p.task.g == 1 and p.task.mask == NULL and p.task.k >= 2 * STRIP
            and (p.b_tiles == 1 or p.sets * p.task.k <= 8 * TILE))


cdef inline int64_t strip_width(const fn_task* t) noexcept nogil:
    """Columns of a strip: whole lines, and as many strips as two or four threads share evenly."""
    return ceil_div(ceil_div(t.k, 4 * ceil_div(t.k, 4 * STRIP)), LANES) * LANES


cdef void sum_strip(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef terms c[ROWS]
    cdef double s[ROWS]
    cdef double q[ROWS]
    cdef int64_t k = index * strip_width(t), b = 0, rows, r
    cdef double* sums = p.partial + 2 * index * t.b
    while b < t.b:
        rows = minimum(ROWS, t.b - b)
        sum_places(p, b, 0, rows, k, minimum(strip_width(t), t.k - k), c, s, q)
        for r in range(rows):
            sums[0] = s[r]
            sums[1] = q[r]
            sums += 2
        b += rows


cdef void map_strip(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef terms c[ROWS]
    cdef work sum_w[STRIP + MOST_WIDTH]
    cdef work sum_b[STRIP + MOST_WIDTH]
    cdef int64_t width = strip_width(t), k = index * width, n = minimum(width, t.k - k)
    cdef int64_t b = 0, rows, r, step, at, _strip
    cdef double* sums
    cdef double gy, gyd
    cdef bint stream
    cdef edge ends
    open_edge(&ends)
    step = rows_together(t, &stream)
    while b < t.b:
        rows = minimum(ROWS, t.b - b)
        for r in range(rows):
            gy = gyd = 0
            sums = p.partial + 2 * (b + r)
            for _strip in range(ceil_div(t.k, width)):
                gy += sums[0]
                gyd += sums[1]
                sums += 2 * t.b
            start_terms(t, b + r, &c[r])
            finish_terms(p, b + r, gy, gyd, &c[r], False)
        r = 0
        while r < rows:
            at = (b + r) * t.k + k
            backward_strip(t, <stored*> t.y + at, at, k, minimum(step, rows - r), n, c + r,
                           r == 0, sum_w, sum_b, stream, 0, &ends)
            r += step
        add_strip(sum_w, n, b == 0, t.dweight + k)
        add_strip(sum_b, 0 if t.scaled else n, b == 0, t.dbias + k)
        b += rows
    close_edge(&ends)
    if stream:
        stream_end()


cdef void backward_wide(plan* p) noexcept nogil:
    """A thread's strips stay in its cache from the sums to the map, and only the sums of rows
    cross."""
    cdef int64_t strips = ceil_div(p.task.k, strip_width(p.task))
    fn_parallel_for(p.task, strips, sum_strip, p, False)
    fn_parallel_for(p.task, strips, map_strip, p, True)


cdef public void elements_backward(void* context) noexcept nogil:
    cdef plan* p = <plan*> context
    if wide(p):
        backward_wide(p)
        return
    fn_parallel_for(p.task, p.b_tiles * p.task.g, backward_part, p, False)
    merge_parts(p)
