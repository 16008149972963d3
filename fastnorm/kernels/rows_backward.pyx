"""The rows loop order backward; see rows.pxd."""

from libc.string cimport memcpy, memset

from fastnorm.kernels.rows cimport *
from fastnorm.kernels.runs cimport *
from fastnorm.kernels.words cimport *


cdef struct terms:
    # dx = dy*rstd*weight + (x - hi)*scale + shift;  xhat = (x - hi)*rstd - lo*rstd
    work hi
    work scale
    work shift
    work offset  # -lo*rstd
    double lo
    double rstd


cdef inline void start_terms(const fn_task* t, int64_t set_, terms* c) noexcept nogil:
    cdef double mean = t.mean[set_] if t.has_mean else 0
    c.hi = <work> mean
    c.lo = mean - <double> c.hi
    c.rstd = t.rstd[set_]
    c.offset = <work> (-c.lo * c.rstd)


cdef inline void finish_terms(const plan* p, int64_t set_, double gy, double gyd, terms* c,
                              bint masked) noexcept nogil:
    """From the sums over the set of gy and of gy*(x - hi)."""
    cdef const fn_task* t = p.task
    cdef double inverse = p.inverse, count, m1, m2
    if masked:
        count = values_of(t, set_ // t.g)
        inverse = 1.0 / count if count > 0 else 0
    m1 = gy * inverse if t.has_mean else 0
    m2 = c.rstd * (gyd - c.lo * gy) * inverse
    if t.given or (masked and inverse == 0):
        m1 = m2 = 0
    c.scale = <work> (-c.rstd * c.rstd * m2)
    c.shift = <work> (c.rstd * (c.rstd * m2 * c.lo - m1))


cdef inline affine gate_of(const fn_task* t, int64_t set_, int64_t channel) noexcept nogil:
    """The input of the activation."""
    return affine_of(t, channel, t.mean[set_] if t.has_mean else 0, t.rstd[set_])


cdef void deactivate_channel(const plan* p, int64_t set_, int64_t k, int64_t at, int64_t runs,
                             int64_t n) noexcept nogil:
    """dy of some runs of a channel, from `at` on, taken back through the activation."""
    cdef const fn_task* t = p.task
    cdef affine c
    cdef int64_t r
    c = gate_of(t, set_, set_ % t.g * t.k + k)
    for r in range(runs):
        map_fused(t, at + r * p.stride, n, &c.hi, &c.scale, &c.shift, False, NULL, NULL)


cdef inline void sum_channel(const plan* p, int64_t set_, int64_t k, int64_t tile, work hi,
                             double* sums, bint masked) noexcept nogil:
    cdef int64_t r0, r1, p0, p1, at, r
    cdef affine z
    cdef vec gate[2]
    tile_bounds(p, tile, &r0, &r1, &p0, &p1)
    at = set_start(p.task, set_) + k * p.task.i + r0 * p.stride + p0
    if p.task.upstream != NULL:
        deactivate_channel(p, set_, k, at, r1 - r0, p1 - p0)
    if p.task.gated:
        z = gate_of(p.task, set_, set_ % p.task.g * p.task.k + k)
        gate[0] = splat(z.scale)
        gate[1] = splat(z.shift)
        sum_runs(<const stored*> p.task.x + at, <const stored*> p.task.dy + at, NULL, r1 - r0,
                 p.stride, p1 - p0, hi, gate, sums)
        return
    if not masked:
        sum_runs(<const stored*> p.task.x + at, <const stored*> p.task.dy + at, NULL, r1 - r0,
                 p.stride, p1 - p0, hi, NULL, sums)
        return
    for r in range(r1 - r0):
        sum_valid(p.task, at + r * p.stride, p1 - p0, hi, sums)


cdef inline void map_channel(const plan* p, int64_t set_, int64_t start, int64_t channel,
                             int64_t p0, int64_t p1, const terms* c, int64_t ahead,
                             bint masked) noexcept nogil:
    """Places [p0, p1) of the run at `start`, of one channel."""
    cdef const fn_task* t = p.task
    cdef int64_t at = start + p0
    cdef work dscale = <work> (c.rstd * <double> (<const work*> t.weight)[channel])
    cdef affine gate
    if t.gated:
        gate = gate_of(t, set_, channel)
        map_places(<const stored*> t.x + at, <const stored*> t.dy + at, <stored*> t.y + at, p1 - p0,
                   &c.hi, &c.scale, &c.shift, &dscale, False, NULL, NULL, &gate.scale, &gate.shift,
                   t.stream, ahead)
    elif not masked:
        map_run(<const stored*> t.x + at, <const stored*> t.dy + at, <stored*> t.y + at, p1 - p0,
                c.hi, c.scale, c.shift, dscale, t.stream, ahead)
    else:
        map_valid(t, at, p1 - p0, c.hi, c.scale, c.shift, dscale)


cdef inline void add_channel(const plan* p, int64_t channel, const double* sums, const terms* c,
                             double* dweight, double* dbias, double* over_set) noexcept nogil:
    cdef double weight = <double> (<const work*> p.task.weight)[channel]
    over_set[0] += weight * sums[0]
    over_set[1] += weight * sums[1]
    dweight[channel] += c.rstd * (sums[1] - c.lo * sums[0])
    dbias[channel] += sums[0]


cdef inline void sum_sets(const plan* p, int64_t first, int64_t sets, const terms* c,
                          double* dweight, double* dbias, double* over_sets,
                          bint masked) noexcept nogil:
    """The sums of neighbouring sets; over_sets gets those that their terms are finished with."""
    cdef double sums[2]
    cdef double over_set[2]
    cdef int64_t s, k, tile, channel = first % p.task.g * p.task.k
    for s in range(sets):
        over_set[0] = over_set[1] = 0
        for k in range(p.task.k):
            sums[0] = sums[1] = 0
            for tile in range(p.tiles):
                sum_channel(p, first + s, k, tile, c[s].hi, sums, masked)
            add_channel(p, channel, sums, &c[s], dweight, dbias, over_set)
            channel += 1
        memcpy(over_sets + 2 * s, over_set, sizeof(over_set))


cdef inline void sum_brief(const plan* p, int64_t first, int64_t sets, const terms* c,
                           double* dweight, double* dbias, double* over_sets) noexcept nogil:
    """sum_sets of short runs, which lie one behind the other."""
    cdef const fn_task* t = p.task
    cdef const stored* x = <const stored*> t.x + set_start(t, first)
    cdef const stored* dy = <const stored*> t.dy + set_start(t, first)
    cdef double s[ROWS]
    cdef double q[ROWS]
    cdef double sums[2]
    cdef double over_set[2]
    cdef vec lanes_s[ROWS * VECTORS]
    cdef vec lanes_q[ROWS * VECTORS]
    cdef int64_t runs = sets * t.k, done = 0, rows, r, set_ = 0, k = 0, summed = 0, at = 0
    cdef int64_t channel = first % t.g * t.k
    over_set[0] = over_set[1] = 0
    while done < runs:
        rows = minimum(ROWS, runs - done)
        for r in range(rows):
            if t.upstream != NULL:
                deactivate_channel(p, first + summed, at, set_start(t, first + summed) + at * t.i,
                                   1, t.i)
            sum_short(x, dy, NULL, t.i, c[summed].hi, lanes_s + r * VECTORS, lanes_q + r * VECTORS)
            x += t.i
            dy += t.i
            at += 1
            if at == t.k:
                at = 0
                summed += 1
        fold_rows(lanes_s, rows, s)
        fold_rows(lanes_q, rows, q)
        for r in range(rows):
            sums[0] = s[r]
            sums[1] = q[r]
            add_channel(p, channel + done + r, sums, &c[set_], dweight, dbias, over_set)
            k += 1
            if k == t.k:
                memcpy(over_sets + 2 * set_, over_set, sizeof(over_set))
                over_set[0] = over_set[1] = 0
                k = 0
                set_ += 1
        done += rows


cdef inline void differentiate_block(const plan* p, int64_t index, bint masked) noexcept nogil:
    """Blocks of groups, for a part of b."""
    cdef const fn_task* t = p.task
    cdef terms c[BLOCK]
    cdef double over_sets[2 * BLOCK]
    cdef double* over_set
    cdef int64_t b_tile = index // p.blocks, b, set_, s, stop, end, _k, r
    cdef int64_t start, channel, ahead
    cdef double* dweight = p.partial + 2 * b_tile * t.g * t.k
    for b in range(b_tile * t.b // p.b_tiles, (b_tile + 1) * t.b // p.b_tiles):
        set_ = b * t.g + index % p.blocks * p.block
        end = minimum((b + 1) * t.g, set_ + p.block)
        fetch_group(p, t.x, set_, minimum(p.group, end - set_))
        fetch_group(p, t.dy, set_, minimum(p.group, end - set_))
        while set_ < end:
            stop = minimum(end, set_ + p.group)
            ahead = look_ahead(p, stop < end)
            if t.upstream != NULL:
                fetch_group(p, t.upstream, set_, stop - set_)
            if t.residual != NULL:
                fetch_group(p, t.residual, set_, stop - set_)
            for s in range(set_, stop):
                start_terms(t, s, &c[s - set_])
            if brief(p):
                sum_brief(p, set_, stop - set_, c, dweight, dweight + t.g * t.k, over_sets)
            else:
                sum_sets(p, set_, stop - set_, c, dweight, dweight + t.g * t.k, over_sets, masked)
            for s in range(set_, stop):
                over_set = over_sets + 2 * (s - set_)
                finish_terms(p, s, over_set[0], over_set[1], &c[s - set_], masked)
            for r in range(t.o):
                start = set_start(t, set_) + r * p.stride
                channel = set_ % t.g * t.k
                for s in range(set_, stop):
                    for _k in range(t.k):
                        map_channel(p, s, start, channel, 0, p.n, &c[s - set_], ahead, masked)
                        start += t.i
                        channel += 1
            set_ = stop
    if t.stream:
        stream_end()


cdef void backward_block(void* context, int64_t index) noexcept nogil:
    if (<const plan*> context).task.mask == NULL:
        differentiate_block(<const plan*> context, index, False)
    else:
        differentiate_block(<const plan*> context, index, True)


cdef void backward_slabs(void* context, int64_t index) noexcept nogil:
    """backward_block in slabs."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef slab w
    cdef affine z
    cdef terms c[BLOCK]
    cdef double sums[2 * BLOCK]
    cdef double over_set[2]
    cdef int64_t first = index * p.block, end = minimum(p.sets, first + p.block), sets, s
    while first < end:
        sets = minimum(p.group, end - first)
        for s in range(sets):
            start_terms(t, first + s, &c[s])
            fill(w.hi + s * p.n, p.n, c[s].hi)
        if t.upstream != NULL or t.gated:
            for s in range(sets):
                z = gate_of(t, first + s, first + s)
                fill(w.gate_scale + s * p.n, p.n, z.scale)
                fill(w.gate_shift + s * p.n, p.n, z.shift)
        if t.upstream != NULL:
            for s in range(t.o):
                map_fused(t, first * p.n + s * p.stride, sets * p.n, w.hi, w.gate_scale,
                          w.gate_shift, True, NULL, NULL)
        sum_slabs(p, <const stored*> t.x + first * p.n, <const stored*> t.dy + first * p.n, sets,
                  &w, sums)
        for s in range(sets):
            over_set[0] = over_set[1] = 0
            add_channel(p, first + s, sums + 2 * s, &c[s], p.partial, p.partial + t.g, over_set)
            finish_terms(p, first + s, over_set[0], over_set[1], &c[s], False)
            fill(w.s + s * p.n, p.n, c[s].scale)
            fill(w.q + s * p.n, p.n, c[s].shift)
            fill(w.d + s * p.n, p.n, <work> (
                c[s].rstd * <double> (<const work*> t.weight)[first + s]))
        map_slabs(p, first * p.n, sets, &w)
        first += sets


cdef inline void backward_columns(
    const stored* x, const stored* dy, const stored* dsum, stored* y, int64_t stride, int64_t rows,
    int64_t n, const work* weight, const terms* c, work* sum_w, work* sum_b,
    bint streaming, int64_t ahead, int vectors
) noexcept nogil:
    """n = vectors*WIDTH columns, or fewer in one vec, of some rows."""
    cdef vec a[CHUNK]
    cdef vec b[CHUNK]
    cdef vec w[CHUNK]
    cdef vec dx[CHUNK]
    cdef vec d, u, hi, rstd, offset, scale, shift
    cdef bint whole = n == vectors * WIDTH
    cdef int64_t at, r
    cdef int v
    for v in range(vectors):
        a[v] = load_work(sum_w + v * WIDTH)
        b[v] = load_work(sum_b + v * WIDTH)
        w[v] = load_work(weight + v * WIDTH) if whole else load_work_part(weight, n, 0)
    for r in range(rows):
        hi = splat(c[r].hi)
        rstd = splat(<work> c[r].rstd)
        offset = splat(c[r].offset)
        scale = splat(c[r].scale)
        shift = splat(c[r].shift)
        for v in range(vectors):
            at = v * WIDTH
            if ahead:
                fetch(x + at + ahead)
                fetch(dy + at + ahead)
            d = (load(x + at) if whole else load_part(x + at, n, 0)) - hi
            u = load(dy + at) if whole else load_part(dy + at, n, 0)
            a[v] = plus(u * (d * rstd + offset), a[v])
            b[v] = b[v] + u
            d = d * scale + shift + u * w[v] * rstd
            if dsum != NULL:
                d = d + (load(dsum + at) if whole else load_part(dsum + at, n, 0))
            dx[v] = d
        if whole:
            put_all(y, dx, streaming, vectors)
        else:
            store_part(y, n, dx[0])
        x += stride
        dy += stride
        dsum = past(dsum, stride)
        y += stride
    for v in range(vectors):
        memcpy(sum_w + v * WIDTH, &a[v], sizeof(vec))
        memcpy(sum_b + v * WIDTH, &b[v], sizeof(vec))


cdef inline void backward_rows(
    const stored* x, const stored* dy, const stored* dsum, stored* y, int64_t stride, int64_t rows,
    int64_t n, const work* weight, const terms* c, work* sum_w, work* sum_b,
    bint streaming, int64_t ahead
) noexcept nogil:
    """dx of n columns of some rows; dweight and dbias onto sum_w and sum_b, which have room
    for whole vectors."""
    # Up to the first line of y that is streamed.
    cdef int64_t p = 0, lead = minimum(n, until_aligned(y)) if streaming else 0, step
    while p < n:
        while p >= lead and p + CHUNK * WIDTH <= n:
            backward_columns(x + p, dy + p, past(dsum, p), y + p, stride, rows, CHUNK * WIDTH,
                             weight + p, c, sum_w + p, sum_b + p, streaming, ahead, CHUNK)
            p += CHUNK * WIDTH
        while p >= lead and p + PAIR * WIDTH <= n:
            backward_columns(x + p, dy + p, past(dsum, p), y + p, stride, rows, PAIR * WIDTH,
                             weight + p, c, sum_w + p, sum_b + p, streaming, ahead, PAIR)
            p += PAIR * WIDTH
        if p < n:
            step = minimum(WIDTH, (lead if p < lead else n) - p)
            backward_columns(x + p, dy + p, past(dsum, p), y + p, stride, rows, step, weight + p,
                             c, sum_w + p, sum_b + p, False, ahead, 1)
            p += step


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
    cdef vec lanes_s[ROWS * VECTORS]
    cdef vec lanes_q[ROWS * VECTORS]
    cdef bint brief = n <= FLUSH * LANES
    cdef work rstd
    cdef int64_t at, r
    for r in range(rows):
        at = ((b + r) * t.g + g) * t.k + k
        start_terms(t, (b + r) * t.g + g, &c[r])
        if t.upstream != NULL:
            rstd = <work> c[r].rstd
            map_fused(t, at, n, &c[r].hi, &rstd, &c[r].offset, False, weight,
                      <const work*> t.bias + g * t.k + k)
        if brief:
            sum_short(x + at, dy + at, weight, n, c[r].hi, lanes_s + r * VECTORS,
                      lanes_q + r * VECTORS)
        else:
            sums[0] = sums[1] = 0
            sum_runs(x + at, dy + at, weight, 1, 0, n, c[r].hi, NULL, sums)
            s[r] = sums[0]
            q[r] = sums[1]
    if brief:
        fold_rows(lanes_s, rows, s)
        fold_rows(lanes_q, rows, q)


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

    All of a group (0.75 to 0.9 of the time two by two), but long ones that are streamed two by
    two, while they are in the first-level cache (all of them 1.05 to 1.15 times as long), or each
    alone where it starts anywhere in a line."""
    cdef int64_t lead = until_aligned(<const stored*> t.y)
    cdef bint lines = lead == 0 and t.k * <int64_t> sizeof(stored) % 64 == 0
    stream[0] = t.stream and (lines or (t.k >= SHORT_RUN and lead >= 0))
    if stream[0] and t.k >= SHORT_RUN:
        return 2 if lines else 1
    return ROWS


cdef inline void leave_row_back(const fn_task* t, int64_t at) noexcept nogil:
    memset(<stored*> t.y + at, 0, t.k * sizeof(stored))
    if t.upstream != NULL:
        memset(<stored*> t.dy + at, 0, t.k * sizeof(stored))


cdef void backward_elements(void* context, int64_t index) noexcept nogil:
    """i == 1 and o == 1: rows with a weight for each place; a part of b, one group."""
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef terms c[ROWS]
    cdef work sum_w[STRIP + MOST_WIDTH]
    cdef work sum_b[STRIP + MOST_WIDTH]
    cdef int64_t b_tile = index // t.g, g = index % t.g, size = t.g * t.k
    cdef int64_t b = b_tile * t.b // p.b_tiles, end = (b_tile + 1) * t.b // p.b_tiles
    cdef int64_t at, r, rows, count, k, n, done, ahead
    # By the geometry alone: dweight meets a double after this many rows.
    cdef int64_t group = maximum(2, minimum(ROWS, 8 * ELEMENTS // t.k)), step, few
    cdef const stored* x = <const stored*> t.x
    cdef const stored* dy = <const stored*> t.dy
    cdef const stored* dsum = <const stored*> t.dsum
    cdef stored* y = <stored*> t.y
    cdef const work* weight = <const work*> t.weight + g * t.k
    cdef double* dweight = p.partial + 2 * b_tile * size + g * t.k
    cdef bint first = True, stream
    step = rows_together(t, &stream)
    few = step if t.k <= STRIP else group
    while b < end:
        rows = valid_rows(t, b, minimum(group, end - b))
        if rows == 0:
            leave_row_back(t, b * size + g * t.k)
            b += 1
            continue
        ahead = group * size if t.stream and b + rows < end else 0
        done = 0
        while done < rows:
            count = minimum(few, rows - done)
            find_terms(p, b + done, g, count, c)
            k = 0
            while k < t.k:
                n = minimum(STRIP, t.k - k)
                if done == 0:
                    memset(sum_w, 0, (n + MOST_WIDTH) * sizeof(work))
                    memset(sum_b, 0, (n + MOST_WIDTH) * sizeof(work))
                r = 0
                while r < count:
                    at = (b + done + r) * size + g * t.k + k
                    backward_rows(x + at, dy + at, past(dsum, at), y + at, size,
                                  minimum(step, count - r), n, weight + k, c + r, sum_w, sum_b,
                                  stream, ahead)
                    r += step
                if done + count == rows:
                    add_strip(sum_w, n, first, dweight + k)
                    add_strip(sum_b, n, first, dweight + size + k)
                k += n
            done += count
        b += rows
        first = False
    if first:
        memset(dweight, 0, t.k * sizeof(double))
        memset(dweight + size, 0, t.k * sizeof(double))
    if stream:
        stream_end()


cdef inline bint wide(const plan* p) noexcept nogil:
    """Whether rows are too few for parts of b, and so long that they are cut into strips of
    columns instead: parts of dweight would cross from core to core (0.8 to 1.2 times as long as
    one thread)."""
    return (p.task.i == 1 and p.task.g == 1 and p.b_tiles == 1 and p.task.k >= 2 * STRIP
            and p.task.mask == NULL)


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
    cdef int64_t b = 0, at, rows, r, step, _strip
    cdef const stored* x = <const stored*> t.x
    cdef const stored* dy = <const stored*> t.dy
    cdef const stored* dsum = <const stored*> t.dsum
    cdef stored* y = <stored*> t.y
    cdef double* sums
    cdef double gy, gyd
    cdef bint stream
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
        memset(sum_w, 0, (n + MOST_WIDTH) * sizeof(work))
        memset(sum_b, 0, (n + MOST_WIDTH) * sizeof(work))
        r = 0
        while r < rows:
            at = (b + r) * t.k + k
            backward_rows(x + at, dy + at, past(dsum, at), y + at, t.k, minimum(step, rows - r), n,
                          <const work*> t.weight + k, c + r, sum_w, sum_b, stream, 0)
            r += step
        add_strip(sum_w, n, b == 0, t.dweight + k)
        add_strip(sum_b, n, b == 0, t.dbias + k)
        b += rows
    if stream:
        stream_end()


cdef void backward_wide(plan* p) noexcept nogil:
    """A thread's strips stay in its cache from the sums to the map, and only the sums of rows
    cross."""
    cdef int64_t strips = ceil_div(p.task.k, strip_width(p.task))
    fn_parallel_for(p.task, strips, sum_strip, p, False)
    fn_parallel_for(p.task, strips, map_strip, p, True)


cdef inline void unit_bounds(const plan* p, int64_t index, int64_t* set_, int64_t* k0, int64_t* k1,
                             int64_t* tile) noexcept nogil:
    """A split backward's unit: a tile of a channel, or whole channels where they are short."""
    cdef int64_t parts = ceil_div(p.task.k, p.channels)
    tile[0] = index % p.tiles
    k0[0] = index // p.tiles % parts * p.channels
    k1[0] = minimum(p.task.k, k0[0] + p.channels)
    set_[0] = index // p.tiles // parts


cdef void backward_tile_sums(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef int64_t set_, k0, k1, tile, k
    cdef double* sums
    cdef terms c
    unit_bounds(p, index, &set_, &k0, &k1, &tile)
    start_terms(p.task, set_, &c)
    for k in range(k0, k1):
        sums = p.partial + 2 * ((set_ * p.task.k + k) * p.tiles + tile)
        sums[0] = sums[1] = 0
        sum_channel(p, set_, k, tile, c.hi, sums, p.task.mask != NULL)


cdef void backward_tile_map(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef const fn_task* t = p.task
    cdef int64_t set_, k0, k1, tile, k, r0, r1, p0, p1, r
    cdef double* over_set
    cdef terms c
    unit_bounds(p, index, &set_, &k0, &k1, &tile)
    over_set = p.partial + 2 * (p.sets * t.k * p.tiles + set_)
    start_terms(t, set_, &c)
    finish_terms(p, set_, over_set[0], over_set[1], &c, t.mask != NULL)
    tile_bounds(p, tile, &r0, &r1, &p0, &p1)
    for r in range(r0, r1):
        for k in range(k0, k1):
            map_channel(p, set_, set_start(t, set_) + k * t.i + r * p.stride,
                        set_ % t.g * t.k + k, p0, p1, &c, 0, t.mask != NULL)
    if t.stream:
        stream_end()


cdef void backward_split(plan* p) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef int64_t units = p.sets * ceil_div(t.k, p.channels) * p.tiles, set_, k, _tile
    cdef double* part = p.partial
    cdef double* over_set
    cdef double sums[2]
    cdef terms c
    fn_parallel_for(t, units, backward_tile_sums, p, False)
    for set_ in range(p.sets):
        over_set = p.partial + 2 * (p.sets * t.k * p.tiles + set_)
        over_set[0] = over_set[1] = 0
        start_terms(t, set_, &c)
        for k in range(t.k):
            sums[0] = sums[1] = 0
            for _tile in range(p.tiles):
                sums[0] += part[0]
                sums[1] += part[1]
                part += 2
            add_channel(p, set_ % t.g * t.k + k, sums, &c, t.dweight, t.dbias, over_set)
    fn_parallel_for(t, units, backward_tile_map, p, True)


cdef public void rows_backward(const fn_task* task) noexcept nogil:
    cdef plan p
    cdef fn_task own = task[0]
    cdef const fn_task* t = &own
    cdef int64_t size = t.g * t.k, j, tile
    cut(&p, t, t.i)
    if t.gated and (t.i == 1 or brief(&p)):
        # Loops that have no gate find the gradient in front of the activation first.
        own.gated = own.stream = 0
        own.upstream = own.dy
        own.dy = own.y
    p.blocks = ceil_div(t.g, p.block)
    if wide(&p):
        backward_wide(&p)
        return
    for j in range(size):
        t.dweight[j] = t.dbias[j] = 0
    if t.i > 1 and few_and_large(&p):
        backward_split(&p)
        return
    if t.i == 1:
        fn_parallel_for(t, p.b_tiles * t.g, backward_elements, &p, False)
    else:
        memset(p.partial, 0, 2 * p.b_tiles * size * sizeof(double))
        if in_slabs(t):
            fn_parallel_for(t, p.blocks, backward_slabs, &p, False)
        else:
            fn_parallel_for(t, p.b_tiles * p.blocks, backward_block, &p, False)
    for tile in range(p.b_tiles):
        for j in range(size):
            t.dweight[j] += p.partial[2 * tile * size + j]
            t.dbias[j] += p.partial[(2 * tile + 1) * size + j]
