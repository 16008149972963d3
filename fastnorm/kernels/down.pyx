"""Rows of places that have coefficients of their own: sums down their columns, and their map.

Functions, not inlined words: a call of one has several rows, and the loops for each kind of sum and
of map are once in the library.
"""

from libc.stdint cimport int64_t

from fastnorm.kernels.runs cimport map_places
from fastnorm.kernels.words cimport (
    CHUNK, EXACT, OF_PLACES, STEP, WIDTH, affine_map, all_zero, coefficients, edge, fetch, load,
    load_part, load_work, minimum, opens_line, past, plus, plus_product, store_work, stored,
    through_relu, vec, work, zeros,
)


cdef inline void sum_down(
    const stored* x, const stored* dy, int64_t rows, int64_t stride, int64_t last, const vec* about,
    const vec* gate_scale, const vec* gate_shift, vec* s, vec* q, int64_t ahead, int vectors
) noexcept nogil:
    """The loop of sum_columns; about is NULL for 0. `last` columns are in the last vec, or more."""
    cdef bint part = last < WIDTH
    cdef vec d, e
    cdef int64_t _row
    cdef int v
    for _row in range(rows):
        for v in range(vectors):
            d = load_part(x + v * WIDTH, last, 0) if part and v == vectors - 1 else (
                load(x + v * WIDTH))
            if about != NULL:
                d = d - about[v]
            e = d
            if ahead and opens_line(v):
                fetch(x + v * WIDTH + ahead)
                if dy != NULL:
                    fetch(dy + v * WIDTH + ahead)
            if dy != NULL:
                e = load_part(dy + v * WIDTH, last, 0) if part and v == vectors - 1 else (
                    load(dy + v * WIDTH))
            if gate_scale != NULL:
                e = through_relu(d * gate_scale[v] + gate_shift[v], e)
            s[v] = s[v] + e
            q[v] = plus_product(e, d, q[v]) if about == NULL else plus(e * d, q[v])
        x += stride
        dy = past(dy, stride)


cdef inline void sum_columns(
    const stored* x, const stored* dy, int64_t rows, int64_t stride, int64_t at, int64_t n,
    const coefficients* c, work* s, work* q, int64_t ahead, int vectors
) noexcept nogil:
    """Add to s and q the terms of sum_runs down n columns from `at` on, about c.hi: `vectors` vecs,
    the last may be a part.

    With `ahead`, the values so far ahead are asked for meanwhile: the same columns of the next
    rows, which the processor does not foresee (1.25 to 1.4 times faster on x from memory). Where
    rows follow each other it does (0.84 to 0.97 of the time without)."""
    cdef vec sum_s[CHUNK]
    cdef vec sum_q[CHUNK]
    cdef vec about[CHUNK]
    cdef vec gates[2 * CHUNK]
    cdef int64_t last = n - (vectors - 1) * WIDTH
    cdef const vec* gate = NULL if c.gate_scale == NULL else gates
    cdef int v
    x += at
    dy = past(dy, at)
    for v in range(vectors):
        about[v] = load_work(c.hi + at + v * WIDTH)
        sum_s[v] = load_work(s + at + v * WIDTH)
        sum_q[v] = load_work(q + at + v * WIDTH)
        if gate != NULL:
            gates[v] = load_work(c.gate_scale + at + v * WIDTH)
            gates[CHUNK + v] = load_work(c.gate_shift + at + v * WIDTH)
    if EXACT and all_zero(about, vectors):
        sum_down(x, dy, rows, stride, last, NULL, gate, gates + CHUNK, sum_s, sum_q, ahead, vectors)
    else:
        sum_down(x, dy, rows, stride, last, about, gate, gates + CHUNK, sum_s, sum_q, ahead,
                 vectors)
    for v in range(vectors):
        store_work(s + at + v * WIDTH, sum_s[v])
        store_work(q + at + v * WIDTH, sum_q[v])


cdef inline void sum_all_columns(
    const stored* x, const stored* dy, int64_t rows, int64_t stride, int64_t width,
    const coefficients* c, work* s, work* q, int64_t ahead
) noexcept nogil:
    cdef int64_t at = 0
    while at + CHUNK * WIDTH <= width:
        sum_columns(x, dy, rows, stride, at, CHUNK * WIDTH, c, s, q, ahead, CHUNK)
        at += CHUNK * WIDTH
    if width - at > 3 * WIDTH:
        sum_columns(x, dy, rows, stride, at, width - at, c, s, q, ahead, 4)
    elif width - at > 2 * WIDTH:
        sum_columns(x, dy, rows, stride, at, width - at, c, s, q, ahead, 3)
    elif width - at > WIDTH:
        sum_columns(x, dy, rows, stride, at, width - at, c, s, q, ahead, 2)
    elif width > at:
        sum_columns(x, dy, rows, stride, at, width - at, c, s, q, ahead, 1)


cdef inline void sum_steps(
    const stored* x, const stored* dy, int64_t rows, int64_t stride, int64_t width,
    const coefficients* c, work* s, work* q, int64_t step, bint asking
) noexcept nogil:
    cdef int64_t count
    # Unrolled: 0.95 to 1.0 of the time in cache.
    while step == STEP and rows >= STEP:
        sum_all_columns(x, dy, STEP, stride, width, c, s, q, STEP * stride if asking else 0)
        x += STEP * stride
        dy = past(dy, STEP * stride)
        rows -= STEP
    while rows > 0:
        count = minimum(step, rows)
        sum_all_columns(x, dy, count, stride, width, c, s, q, count * stride if asking else 0)
        x += count * stride
        dy = past(dy, count * stride)
        rows -= count


cdef public void sum_rows(
    const stored* x, const stored* dy, int64_t rows, int64_t stride, int64_t width,
    const coefficients* c, work* s, work* q, int64_t step, bint asking
) noexcept nogil:
    """sum_columns over all columns, of `step` rows before the next ones, for which it is `asking`
    meanwhile. s, q and the coefficients have room for whole vectors. (A call for each step: 1.0 to
    1.04 of the time in cache.)"""
    cdef coefficients own = affine_map(OF_PLACES, c.hi, NULL, NULL)
    if dy == NULL:
        sum_steps(x, NULL, rows, stride, width, &own, s, q, step, asking)
    elif c.gate_scale == NULL:
        sum_steps(x, dy, rows, stride, width, &own, s, q, step, asking)
    else:
        own.gate_scale, own.gate_shift = c.gate_scale, c.gate_shift
        sum_steps(x, dy, rows, stride, width, &own, s, q, step, asking)


cdef inline void map_each(
    const stored* x, const stored* dy, stored* y, int64_t rows, int64_t stride, int64_t n,
    const coefficients* c, int stream, int64_t ahead, edge* ends
) noexcept nogil:
    cdef int64_t _row
    for _row in range(rows):
        map_places(x, dy, y, n, c, stream, ahead, ends)
        x += stride
        dy = past(dy, stride)
        y += stride


cdef inline void map_rows_about(
    const stored* x, const stored* dy, stored* y, int64_t rows, int64_t stride, int64_t n,
    const work* hi, const coefficients* c, int stream, int64_t ahead, edge* ends
) noexcept nogil:
    """map_rows_of_places about hi, or NULL for 0."""
    cdef coefficients own = affine_map(OF_PLACES, hi, c.scale, c.shift)
    if dy == NULL and ahead:
        map_each(x, NULL, y, rows, stride, n, &own, stream, ahead, ends)
        return
    if dy == NULL:
        map_each(x, NULL, y, rows, stride, n, &own, stream, 0, ends)
        return
    own.dscale = c.dscale
    if c.gate_scale != NULL:
        own.gate_scale, own.gate_shift = c.gate_scale, c.gate_shift
        map_each(x, dy, y, rows, stride, n, &own, stream, 0, ends)
    elif ahead:
        map_each(x, dy, y, rows, stride, n, &own, stream, ahead, ends)
    else:
        map_each(x, dy, y, rows, stride, n, &own, stream, 0, ends)


cdef public void map_rows_of_places(
    const stored* x, const stored* dy, stored* y, int64_t rows, int64_t stride, int64_t n,
    const coefficients* c, int stream, int64_t ahead, edge* ends
) noexcept nogil:
    """map_places of rows with coefficients for each place, but neither weight nor bias. (A loop
    that may ask ahead takes 1.02 times as long where it does not.)"""
    if EXACT and zeros(c.hi, n):
        map_rows_about(x, dy, y, rows, stride, n, NULL, c, stream, ahead, ends)
    else:
        map_rows_about(x, dy, y, rows, stride, n, c.hi, c, stream, ahead, ends)
