"""What comes after the affine map, a residual and an activation, on one run while it is mapped; and
in a backward, before the sums, the gradient taken back through the activation. What a mask leaves
out is written as 0.

The backward finds z, the activation's input, again from x: that reads no more than y instead of x
would, and serves every activation. The gradient in front of the activation is written once, where
the residual's gradient goes, or without a residual where dx goes, and the sums and the map read it
there; x and it are in cache where a set is. Behind ReLU alone it costs less to find it twice, in
registers, than to write it: the sums and the map have a gate (0.5 to 0.8 of the time). (SiLU's
found twice, 2048 values at a time, where a set is larger than the second-level cache: 0.93.)
"""

from libc.stdint cimport int64_t
from libc.string cimport memset

from fastnorm.kernels.words cimport (
    ALL_VALID, BATCH, NONE_VALID, OF_ALL, OF_PLACES, OF_ROWS, SOME_VALID, WIDTH, affine_map,
    ahead_of, blank_gaps, coefficients, edge, fetch, fn_task, head, load, load_part, load_work,
    load_work_part, minimum, opens_line, past, past_weight, place_in_mask, plain_head, put, put_all,
    put_ends, splat, store, store_part, stored, streams, stretch, vec, work,
)


cdef extern from "activation.h" nogil:
    enum:
        TOGETHER
        FASTNORM_NO_ACTIVATION
        FASTNORM_RELU
        FASTNORM_SILU
    void activate(vec* z, int kind, work slope)
    void deactivate(vec* z, const vec* dy, int kind, work slope)


cdef inline vec affine(const fn_task* t, int64_t at, int64_t p, int64_t n, const coefficients* c,
                       bint residual) noexcept nogil:
    """z of the places [p, p + n), n <= WIDTH: as map_places has it, so that a backward finds the
    same bits."""
    cdef vec z
    if n == WIDTH:
        z = load(<const stored*> t.x + at + p)
        if c.which == OF_PLACES:
            z = (z - load_work(c.hi + p)) * load_work(c.scale + p) + load_work(c.shift + p)
        else:
            z = (z - splat(c.hi[0])) * splat(c.scale[0]) + splat(c.shift[0])
        if c.weight != NULL:
            z = z * load_work(c.weight + p) + load_work(c.bias + p)
        if residual:
            z = z + load(<const stored*> t.residual + at + p)
        return z
    z = load_part(<const stored*> t.x + at + p, n, 0)
    if c.which == OF_PLACES:
        z = ((z - load_work_part(c.hi + p, n, 0)) * load_work_part(c.scale + p, n, 0)
             + load_work_part(c.shift + p, n, 0))
    else:
        z = (z - splat(c.hi[0])) * splat(c.scale[0]) + splat(c.shift[0])
    if c.weight != NULL:
        z = z * load_work_part(c.weight + p, n, 0) + load_work_part(c.bias + p, n, 0)
    if residual:
        z = z + load_part(<const stored*> t.residual + at + p, n, 0)
    return z


cdef inline int64_t map_step(
    const fn_task* t, int64_t at, int64_t p, int64_t n, const coefficients* c, bint residual,
    int kind, bint backward, bint streaming, bint whole, edge* ends
) noexcept nogil:
    """Places [p, n), at most TOGETHER vectors, perhaps all `whole`. All are loaded before the first
    is stored, as in map_places. Returns where the next step begins."""
    cdef const stored* dy = past(<const stored*> t.upstream, at + p)
    cdef stored* y = <stored*> (t.dy if backward else t.y) + at + p
    cdef vec z[TOGETHER]
    cdef vec u[TOGETHER]
    cdef vec apart[TOGETHER]  # z stays in registers
    cdef int64_t count
    cdef int v
    for v in range(TOGETHER):
        count = WIDTH if whole else minimum(WIDTH, n - p - v * WIDTH)
        if count > 0:
            z[v] = affine(t, at, p + v * WIDTH, count, c, residual)
            if backward:
                u[v] = load(dy + v * WIDTH) if whole else load_part(dy + v * WIDTH, count, 0)
        else:
            z[v] = u[v] = splat(0)
    if backward:
        deactivate(z, u, kind, <work> t.slope)
    else:
        activate(z, kind, <work> t.slope)
    if whole:
        put_all(y, z, streaming, TOGETHER)
    else:
        for v in range(TOGETHER):
            count = minimum(WIDTH, n - p - v * WIDTH)
            if streaming and ends != NULL:
                apart[v] = z[v]
            elif count > 0:
                store_part(y + v * WIDTH, count, z[v])
        if streaming and ends != NULL:
            put_ends(ends, y, minimum(TOGETHER * WIDTH, n - p), apart)
    return minimum(n, p + TOGETHER * WIDTH)


cdef int64_t map_end_of_fused(const fn_task* t, int64_t at, int64_t p, int64_t stop,
                              const coefficients* c, edge* ends) noexcept nogil:
    """Places [p, stop) of a run that is streamed, up to its first line or the last ones."""
    while p < stop:
        p = map_step(t, at, p, stop, c, t.residual != NULL, t.activation, False, True, False, ends)
    return p


cdef inline void map_with(
    const fn_task* t, int64_t at, int64_t n, int64_t rows, int64_t stride,
    const coefficients* first, bint residual, int kind, bint backward, int stream, edge* ends
) noexcept nogil:
    cdef bint simple = kind == FASTNORM_RELU or kind == FASTNORM_NO_ACTIVATION, streaming
    # Where a channel's runs are so long, what is asked for behind them leaves the cache again
    # before its turn: 1.0 to 1.1 times as long.
    cdef bint long_runs = t.unseen and not t.given and t.i > 1 and n >= t.ahead
    cdef int64_t ahead = ahead_of(t, n, stride) if simple and not long_runs else 0, p, lead, _r
    cdef int64_t next_row = 1 if first.which == OF_ROWS else 0
    cdef coefficients c = first[0]
    cdef coefficients own  # c stays in registers
    cdef int v
    for _r in range(rows):
        streaming = streams(stream, <const stored*> t.y + at)
        lead = head(<const stored*> t.y + at, n, &streaming)
        if simple and not streaming and not backward:
            lead = plain_head(<const stored*> t.y + at, n)
        p = 0
        if lead > 0:
            own = c
            p = map_end_of_fused(t, at, 0, lead, &own, ends if streaming else NULL)
        while p + TOGETHER * WIDTH <= n:
            if ahead:
                for v in range(TOGETHER):
                    if not opens_line(v):
                        continue
                    fetch(<const stored*> t.x + at + p + v * WIDTH + ahead)
                    if residual:
                        fetch(<const stored*> t.residual + at + p + v * WIDTH + ahead)
            p = map_step(t, at, p, n, &c, residual, kind, backward, streaming, True, NULL)
        if p < n and streaming:
            own = c
            map_end_of_fused(t, at, p, n, &own, ends)
        elif p < n:
            map_step(t, at, p, n, &c, residual, kind, backward, False, False, NULL)
        at += stride
        c.hi += next_row
        c.scale += next_row
        c.shift += next_row


cdef void map_all(
    const fn_task* t, int64_t at, int64_t n, int64_t rows, int64_t stride, const coefficients* c,
    int stream, edge* ends
) noexcept nogil:
    """What takes no longer than memory has loops of its own, and so has SiLU alone, where they take
    0.85 of the time."""
    cdef bint plus = t.residual != NULL
    cdef int kind = t.activation
    if t.upstream != NULL:
        if kind == FASTNORM_SILU and not plus:
            map_with(t, at, n, rows, stride, c, False, FASTNORM_SILU, True, stream, ends)
        else:
            map_with(t, at, n, rows, stride, c, plus, kind, True, stream, ends)
    elif kind == FASTNORM_RELU and plus:
        map_with(t, at, n, rows, stride, c, True, FASTNORM_RELU, False, stream, ends)
    elif kind == FASTNORM_RELU:
        map_with(t, at, n, rows, stride, c, False, FASTNORM_RELU, False, stream, ends)
    elif kind == FASTNORM_NO_ACTIVATION and plus:
        map_with(t, at, n, rows, stride, c, True, FASTNORM_NO_ACTIVATION, False, stream, ends)
    elif kind == FASTNORM_NO_ACTIVATION:
        map_with(t, at, n, rows, stride, c, False, FASTNORM_NO_ACTIVATION, False, stream, ends)
    elif kind == FASTNORM_SILU and not plus:
        map_with(t, at, n, rows, stride, c, False, FASTNORM_SILU, False, stream, ends)
    else:
        map_with(t, at, n, rows, stride, c, plus, kind, False, stream, ends)


cdef public void map_fused(const fn_task* t, int64_t at, int64_t n, int64_t rows, int64_t stride,
                           const coefficients* c, edge* ends) noexcept nogil:
    """map_places with residual, activation and mask, of the n values from `at` on, and of as many
    in each of the rows that start `stride` further; in a backward, the gradient of these values
    taken back through the activation."""
    cdef int stream = t.stream if t.upstream == NULL else 0
    cdef stored* y = <stored*> t.y if t.upstream == NULL else <stored*> t.dy
    cdef int64_t p, count, first, row
    cdef coefficients part
    cdef int valid
    if t.mask == NULL:
        map_all(t, at, n, rows, stride, c, stream, ends)
        return
    for row in range(rows):
        p = 0
        while p < n:
            count = stretch(t, at + p, n - p, &valid)
            if valid == NONE_VALID:
                memset(y + at + p, 0, count * sizeof(stored))
            else:
                first = row if c.which == OF_ROWS else p if c.which == OF_PLACES else 0
                part = affine_map(OF_PLACES if c.which == OF_PLACES else OF_ALL, c.hi + first,
                                  c.scale + first, c.shift + first)
                part.weight, part.bias = past_weight(c.weight, p), past_weight(c.bias, p)
                map_all(t, at + p, count, 1, 0, &part, stream if valid == ALL_VALID else 0, NULL)
                if valid == SOME_VALID:
                    blank_gaps(t, y + at + p, at + p, count)
            p += count
        at += stride


cdef public void add_terms(const fn_task* t, int64_t at, int64_t n, stored* kept) noexcept nogil:
    """x = terms[0] + terms[1], n values of a row from `at` on, rounded as they are stored. With
    `kept` they are streamed, and kept there too."""
    cdef const stored* a = <const stored*> t.terms[0] + at
    cdef const stored* b = <const stored*> t.terms[1] + at
    cdef stored* x = <stored*> t.x + at
    cdef bint streaming = kept != NULL
    cdef int64_t p = 0, part = head(x, n, &streaming), step
    cdef int64_t stop = n - (n - part) % (64 // <int64_t> sizeof(stored)) if streaming else n
    cdef vec sums[BATCH]
    cdef int v
    if t.mask != NULL and not t.mask[place_in_mask(t, at)]:
        memset(x, 0, n * sizeof(stored))
        return
    while p < n:
        if part == 0:
            while p + BATCH * WIDTH <= stop:
                for v in range(BATCH):
                    sums[v] = load(a + p + v * WIDTH) + load(b + p + v * WIDTH)
                put_all(x + p, sums, streaming, BATCH)
                if kept != NULL:
                    put_all(kept + p, sums, False, BATCH)
                p += BATCH * WIDTH
            while p + WIDTH <= stop:
                sums[0] = load(a + p) + load(b + p)
                put(x + p, sums[0], streaming)
                if kept != NULL:
                    store(kept + p, sums[0])
                p += WIDTH
            part = n - p
        else:
            # Up to the first line of x, or the last places.
            step = minimum(part, WIDTH)
            sums[0] = load_part(a + p, step, 0) + load_part(b + p, step, 0)
            store_part(x + p, step, sums[0])
            if kept != NULL:
                store_part(kept + p, step, sums[0])
            p += step
            part -= step
