"""What comes after the affine map, a residual and an activation, on one run while it is mapped; and
in a backward, before the sums, the gradient taken back through the activation.

The backward finds z, the activation's input, again from x: that reads no more than y instead of x
would, and serves every activation. The gradient in front of the activation is written once, where
the residual's gradient goes, or without a residual where dx goes, and the sums and the map read it
there; x and it are in cache where a set is.
"""

from libc.stdint cimport int64_t

from fastnorm.kernels.words cimport (
    BATCH, WIDTH, fn_task, head, load, load_part, load_work, load_work_part, minimum, past, put,
    splat, store, store_part, stored, vec, work,
)


cdef extern from "activation.h" nogil:
    enum:
        FASTNORM_NO_ACTIVATION
        FASTNORM_RELU
    vec activated(vec z, int kind, work slope)
    vec deactivated(vec dy, vec z, int kind, work slope)


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


cdef inline void map_with(
    const fn_task* t, int64_t at, int64_t n, const work* hi, const work* scale,
    const work* shift, bint each, const work* weight, const work* bias, bint residual, int kind
) noexcept nogil:
    cdef const stored* dy = past(<const stored*> t.upstream, at)
    cdef stored* y = (<stored*> t.y if dy == NULL else <stored*> t.dy) + at
    cdef work slope = <work> t.slope
    cdef bint streaming = t.stream and dy == NULL
    cdef int64_t p = 0, part = head(y, n, &streaming), step
    cdef vec z[BATCH]
    cdef int v
    while p < n:
        if part == 0:
            while p + BATCH * WIDTH <= n:
                for v in range(BATCH):
                    z[v] = affine(t, at, p + v * WIDTH, WIDTH, hi, scale, shift, each, weight, bias,
                                  residual)
                    if dy == NULL:
                        z[v] = activated(z[v], kind, slope)
                    else:
                        z[v] = deactivated(load(dy + p + v * WIDTH), z[v], kind, slope)
                for v in range(BATCH):
                    put(y + p + v * WIDTH, z[v], streaming)
                p += BATCH * WIDTH
            while p + WIDTH <= n:
                z[0] = affine(t, at, p, WIDTH, hi, scale, shift, each, weight, bias, residual)
                if dy == NULL:
                    z[0] = activated(z[0], kind, slope)
                else:
                    z[0] = deactivated(load(dy + p), z[0], kind, slope)
                put(y + p, z[0], streaming)
                p += WIDTH
            part = n - p
        else:
            step = minimum(part, WIDTH)
            z[0] = affine(t, at, p, step, hi, scale, shift, each, weight, bias, residual)
            if dy == NULL:
                z[0] = activated(z[0], kind, slope)
            else:
                z[0] = deactivated(load_part(dy + p, step, 0), z[0], kind, slope)
            store_part(y + p, step, z[0])
            p += step
            part -= step


cdef public void map_fused(
    const fn_task* t, int64_t at, int64_t n, const work* hi, const work* scale, const work* shift,
    bint each, const work* weight, const work* bias
) noexcept nogil:
    """map_places with residual and activation, of the n values from `at` on; in a backward, the
    gradient of these values taken back through the activation. ReLU and none have loops of their
    own, so that they take no longer than memory."""
    if t.activation == FASTNORM_RELU:
        if t.residual == NULL:
            map_with(t, at, n, hi, scale, shift, each, weight, bias, False, FASTNORM_RELU)
        else:
            map_with(t, at, n, hi, scale, shift, each, weight, bias, True, FASTNORM_RELU)
    elif t.activation == FASTNORM_NO_ACTIVATION:
        map_with(t, at, n, hi, scale, shift, each, weight, bias, True, FASTNORM_NO_ACTIVATION)
    else:
        map_with(t, at, n, hi, scale, shift, each, weight, bias, t.residual != NULL, t.activation)


cdef public void add_terms(const fn_task* t, int64_t at, int64_t n) noexcept nogil:
    """x = terms[0] + terms[1], n values from `at` on, rounded as they are stored."""
    cdef const stored* a = <const stored*> t.terms[0] + at
    cdef const stored* b = <const stored*> t.terms[1] + at
    cdef stored* x = <stored*> t.x + at
    cdef int64_t p = 0
    while p + WIDTH <= n:
        store(x + p, load(a + p) + load(b + p))
        p += WIDTH
    if p < n:
        store_part(x + p, n - p, load_part(a + p, n - p, 0) + load_part(b + p, n - p, 0))
