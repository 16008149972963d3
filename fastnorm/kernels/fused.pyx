"""What comes after the affine map, a residual and an activation, on one run while it is mapped; and
in a backward, before the sums, the gradient taken back through the activation. What a mask leaves
out is written as 0.

The backward finds z, the activation's input, again from x: that reads no more than y instead of x
would, and serves every activation. The gradient in front of the activation is written once, where
the residual's gradient goes, or without a residual where dx goes, and the sums and the map read it
there; x and it are in cache where a set is. Behind ReLU alone it costs less to find it twice, in
registers, than to write it: the sums and the map have a gate (0.5 to 0.8 of the time).
"""

from libc.stdint cimport int64_t
from libc.string cimport memset

from fastnorm.kernels.words cimport (
    ALL_VALID, BATCH, NONE_VALID, SOME_VALID, WIDTH, blank_gaps, fn_task, head, load, load_part,
    load_work, load_work_part, minimum, past, past_weight, place_in_mask, put_all, splat, store,
    store_part, stored, stretch, vec, work,
)


cdef extern from "activation.h" nogil:
    enum:
        TOGETHER
        FASTNORM_NO_ACTIVATION
        FASTNORM_RELU
        FASTNORM_SILU
    void activate(vec* z, int kind, work slope)
    void deactivate(vec* z, const vec* dy, int kind, work slope)


cdef inline vec affine(
    const fn_task* t, int64_t at, int64_t p, int64_t n, const work* hi, const work* scale,
    const work* shift, bint each, const work* weight, const work* bias, bint residual
) noexcept nogil:
    """z of the places [p, p + n), n <= WIDTH: as map_places has it, so that a backward finds the
    same bits."""
    cdef vec z
    if n == WIDTH:
        z = load(<const stored*> t.x + at + p)
        if each:
            z = (z - load_work(hi + p)) * load_work(scale + p) + load_work(shift + p)
        else:
            z = (z - splat(hi[0])) * splat(scale[0]) + splat(shift[0])
        if weight != NULL:
            z = z * load_work(weight + p) + load_work(bias + p)
        if residual:
            z = z + load(<const stored*> t.residual + at + p)
        return z
    z = load_part(<const stored*> t.x + at + p, n, 0)
    if each:
        z = ((z - load_work_part(hi + p, n, 0)) * load_work_part(scale + p, n, 0)
             + load_work_part(shift + p, n, 0))
    else:
        z = (z - splat(hi[0])) * splat(scale[0]) + splat(shift[0])
    if weight != NULL:
        z = z * load_work_part(weight + p, n, 0) + load_work_part(bias + p, n, 0)
    if residual:
        z = z + load_part(<const stored*> t.residual + at + p, n, 0)
    return z


cdef inline int64_t map_step(
    const fn_task* t, int64_t at, int64_t p, int64_t n, const work* hi, const work* scale,
    const work* shift, bint each, const work* weight, const work* bias, bint residual, int kind,
    bint backward, bint streaming, bint whole
) noexcept nogil:
    """Places [p, n), at most TOGETHER vectors, which are `whole` and then may be streamed. All are
    loaded before the first is stored, as in map_places. Returns where the next step begins."""
    cdef const stored* dy = past(<const stored*> t.upstream, at + p)
    cdef stored* y = <stored*> (t.dy if backward else t.y) + at + p
    cdef vec z[TOGETHER]
    cdef vec u[TOGETHER]
    cdef int64_t count
    cdef int v
    for v in range(TOGETHER):
        count = WIDTH if whole else minimum(WIDTH, n - p - v * WIDTH)
        if count > 0:
            z[v] = affine(t, at, p + v * WIDTH, count, hi, scale, shift, each, weight, bias,
                          residual)
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
            if count > 0:
                store_part(y + v * WIDTH, count, z[v])
    return minimum(n, p + TOGETHER * WIDTH)


cdef inline void map_with(
    const fn_task* t, int64_t at, int64_t n, const work* hi, const work* scale,
    const work* shift, bint each, const work* weight, const work* bias, bint residual, int kind,
    bint backward, bint streaming
) noexcept nogil:
    cdef int64_t p = 0, whole = head(<const stored*> t.y + at, n, &streaming)
    while p < n:
        # Up to the first line of y that is streamed, or the last places.
        while p < whole:
            p = map_step(t, at, p, whole, hi, scale, shift, each, weight, bias, residual, kind,
                         backward, False, False)
        while p + TOGETHER * WIDTH <= n:
            p = map_step(t, at, p, n, hi, scale, shift, each, weight, bias, residual, kind,
                         backward, streaming, True)
        whole = n


cdef void map_all(
    const fn_task* t, int64_t at, int64_t n, const work* hi, const work* scale, const work* shift,
    bint each, const work* weight, const work* bias, bint streaming
) noexcept nogil:
    """What takes no longer than memory has loops of its own, and so has SiLU alone."""
    cdef bint residual = t.residual != NULL
    if t.upstream != NULL:
        if t.activation == FASTNORM_SILU and not residual:
            map_with(t, at, n, hi, scale, shift, each, weight, bias, False, FASTNORM_SILU, True,
                     streaming)
        else:
            map_with(t, at, n, hi, scale, shift, each, weight, bias, residual, t.activation, True,
                     streaming)
    elif t.activation == FASTNORM_RELU:
        if residual:
            map_with(t, at, n, hi, scale, shift, each, weight, bias, True, FASTNORM_RELU, False,
                     streaming)
        else:
            map_with(t, at, n, hi, scale, shift, each, weight, bias, False, FASTNORM_RELU, False,
                     streaming)
    elif t.activation == FASTNORM_NO_ACTIVATION:
        map_with(t, at, n, hi, scale, shift, each, weight, bias, residual, FASTNORM_NO_ACTIVATION,
                 False, streaming)
    elif t.activation == FASTNORM_SILU and not residual:
        map_with(t, at, n, hi, scale, shift, each, weight, bias, False, FASTNORM_SILU, False,
                 streaming)
    else:
        map_with(t, at, n, hi, scale, shift, each, weight, bias, residual, t.activation, False,
                 streaming)


cdef public void map_fused(
    const fn_task* t, int64_t at, int64_t n, const work* hi, const work* scale, const work* shift,
    bint each, const work* weight, const work* bias
) noexcept nogil:
    """map_places with residual, activation and mask, of the n values from `at` on; in a backward,
    the gradient of these values taken back through the activation."""
    cdef bint streaming = t.stream and t.upstream == NULL
    cdef stored* y = <stored*> t.y if t.upstream == NULL else <stored*> t.dy
    cdef int64_t p = 0, each_p, count
    cdef int valid
    if t.mask == NULL:
        map_all(t, at, n, hi, scale, shift, each, weight, bias, streaming)
        return
    while p < n:
        count = stretch(t, at + p, n - p, &valid)
        if valid == NONE_VALID:
            memset(y + at + p, 0, count * sizeof(stored))
        else:
            each_p = p if each else 0
            map_all(t, at + p, count, hi + each_p, scale + each_p, shift + each_p, each,
                    past_weight(weight, p), past_weight(bias, p), streaming and valid == ALL_VALID)
            if valid == SOME_VALID:
                blank_gaps(t, y + at + p, at + p, count)
        p += count


cdef public void add_terms(const fn_task* t, int64_t at, int64_t n) noexcept nogil:
    """x = terms[0] + terms[1], n values of a row from `at` on, rounded as they are stored."""
    cdef const stored* a = <const stored*> t.terms[0] + at
    cdef const stored* b = <const stored*> t.terms[1] + at
    cdef stored* x = <stored*> t.x + at
    cdef int64_t p = 0
    cdef vec sums[BATCH]
    cdef int v
    if t.mask != NULL and not t.mask[place_in_mask(t, at)]:
        memset(x, 0, n * sizeof(stored))
        return
    while p + BATCH * WIDTH <= n:
        for v in range(BATCH):
            sums[v] = load(a + p + v * WIDTH) + load(b + p + v * WIDTH)
        put_all(x + p, sums, False, BATCH)
        p += BATCH * WIDTH
    while p + WIDTH <= n:
        store(x + p, load(a + p) + load(b + p))
        p += WIDTH
    if p < n:
        store_part(x + p, n - p, load_part(a + p, n - p, 0) + load_part(b + p, n - p, 0))
