"""The across loop order: o, g and i are 1 and s > 1. A set's k values lie s apart, and s sets lie
side by side, as where an image with its channels first is normalized over them at every place.

A strip of neighbouring sets is finished while its values are in the second-level cache: sums run
down its columns, each with its own set, and the map goes along its rows, each with its own weight.
x is read once and y written once; in a backward dy and x are read once and dx is written once.
Where no strip's values stay there, strips are wide: memory is read twice, but in longer pieces.

A single strip, as of a single image, is cut into parts of its rows for several threads: the sums of
each, what is found from them together, and the map of each.

A few rows are summed and mapped at a time, so that what belongs to their columns is read once for
all of them (the map, with finish_sets in vectors, 1.2 to 1.35 times faster than row by row).

Rows of neighbouring places are short and start anywhere in a line. Where they come from memory and
lie one behind the other, they are put together in the first-level cache, and y is streamed.

Which thread takes which strip never changes a bit: dweight is summed by parts of the strips that
depend on the geometry alone, as do parts of rows, and merged in their order.
"""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from fastnorm.kernels.joint cimport *
from fastnorm.kernels.words cimport *

cdef enum:
    SMALL = 196608  # bytes of a strip that leave room in a second-level cache
    CACHED = 1 << 20  # of strips that are there until they are mapped, at most
    PAGE = 4096
    SHORT = 1024  # bytes from row to row, up to which memory is read as it lies
    PARTS = 32  # of the strips, that sum dweight each for themselves
    ROW_PARTS = 8  # of a single strip, at most
    PART_ROWS = 64  # and in one, at least: fewer, and what is merged of each weighs too much
    PART = 16384  # and values
    SAMPLED = 4  # values of a set whose average its sums are taken about


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


cdef struct plan:
    const fn_task* task
    int64_t places  # in a strip
    int64_t strips  # of a slice of b
    int64_t units
    int64_t parts
    double* partial  # [parts][2][k]
    int64_t row_parts  # of a single strip
    double* found  # [row_parts][2][PLACES], their sums
    strip* whole  # what is found from all of them


cdef inline int64_t most_parts(const fn_task* t) noexcept nogil:
    return minimum(PARTS, maximum(4, (1 << 16) // t.k))


cdef inline bint in_lines(const fn_task* t) noexcept nogil:
    """Whether rows of y start at lines, so that parts of them can be streamed."""
    return (until_aligned(<const stored*> t.y) == 0
            and t.s * <int64_t> sizeof(stored) % 64 == 0)


cdef inline int64_t places_of(const fn_task* t, int64_t inputs) noexcept nogil:
    """In a strip; by the geometry alone where dweight is summed by strips.

    Narrow strips stay in the cache, unless their rows start a page apart, or a part of one, and
    crowd into a part of it, or lie in more pages than the processor keeps in mind. Wide ones are
    read in longer pieces, and fewer of their lines are stored in two halves, as the ends of rows
    are that do not start at lines. (0.35 to 0.9 of the time of strips that are narrow always.)"""
    cdef int64_t row = t.s * <int64_t> sizeof(stored), least = 64 if inputs == 1 else 128
    cdef int64_t apart = minimum(PAGE, row & -row)
    cdef int64_t crowded = maximum(least * <int64_t> sizeof(stored), apart) * t.k * inputs
    cdef int64_t places = SMALL // (t.k * <int64_t> sizeof(stored)), strips
    if row <= SHORT or row % 64 != 0 or t.k * row <= 4 // inputs * SMALL or crowded > CACHED:
        places = PLACES
    if t.b == 1 and t.s <= PLACES:  # whose rows are parts (0.6 to 1.0; forward up to 1.17)
        places = PLACES
    if inputs == 1 and t.stream and not in_lines(t):
        places = PLACES
    places = minimum(PLACES, maximum(least, places))
    if t.s <= places:
        return t.s
    # As wide as each other, of whole lines of every type; of one image an even number.
    strips = ceil_div(t.s, places)
    strips += strips & t.b & 1
    return ceil_div(ceil_div(t.s, strips), 32) * 32


cdef inline void cut(plan* p, const fn_task* t, int64_t inputs) noexcept nogil:
    p.task = t
    p.places = places_of(t, inputs)
    p.strips = ceil_div(t.s, p.places)
    p.units = t.b * p.strips
    p.parts = minimum(p.units, most_parts(t))
    p.row_parts = 1
    while (p.units == 1 and p.row_parts < ROW_PARTS and t.k >= 2 * p.row_parts * PART_ROWS
           and t.k * t.s >= 2 * p.row_parts * PART):
        p.row_parts *= 2
    p.partial = <double*> t.scratch
    p.found = p.partial + 2 * most_parts(t) * t.k
    p.whole = <strip*> (p.found + 2 * p.row_parts * PLACES)


cdef inline size_t scratch_of(const fn_task* t, int64_t inputs) noexcept nogil:
    cdef plan p
    cut(&p, t, inputs)
    if p.row_parts == 1:
        return 2 * most_parts(t) * t.k * sizeof(double)
    return 2 * (most_parts(t) * t.k + p.row_parts * PLACES) * sizeof(double) + sizeof(strip)


cdef inline int64_t rows_of(const plan* p, int64_t part, int64_t* stop) noexcept nogil:
    """Where a part of the only strip's rows starts, and where it ends."""
    stop[0] = (part + 1) * p.task.k // p.row_parts
    return part * p.task.k // p.row_parts


cdef inline double* found_by(const plan* p, int64_t part) noexcept nogil:
    return p.found + 2 * part * PLACES


cdef inline void keep_found(const plan* p, int64_t part, const strip* w) noexcept nogil:
    memcpy(found_by(p, part), w.total_s, p.places * sizeof(double))
    memcpy(found_by(p, part) + PLACES, w.total_q, p.places * sizeof(double))


cdef inline void merge_found(const plan* p, strip* w) noexcept nogil:
    """Into w the sums of all parts."""
    cdef int64_t part, c
    cdef const double* s
    memset(w.total_s, 0, p.places * sizeof(double))
    memset(w.total_q, 0, p.places * sizeof(double))
    for part in range(p.row_parts):
        s = found_by(p, part)
        for c in range(p.places):
            w.total_s[c] = w.total_s[c] + s[c]
            w.total_q[c] = w.total_q[c] + s[PLACES + c]


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


cdef inline bint left_out(const fn_task* t, int64_t set_) noexcept nogil:
    return t.mask != NULL and not t.mask[set_]


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


cdef inline void map_range(
    const stored* x, const stored* dy, stored* y, int64_t rows, int64_t stride, int64_t at,
    int64_t stop, const coefficients* c, bint streaming, int64_t ahead
) noexcept nogil:
    """map_rows of the columns [at, stop)."""
    cdef int64_t n
    while at + CHUNK * WIDTH <= stop:
        map_columns(x, dy, y, rows, stride, at, CHUNK * WIDTH, c, streaming, ahead, CHUNK)
        at += CHUNK * WIDTH
    n = stop - at
    if n > 3 * WIDTH:
        map_columns(x, dy, y, rows, stride, at, n, c, streaming, ahead, 4)
    elif n > 2 * WIDTH:
        map_columns(x, dy, y, rows, stride, at, n, c, streaming, ahead, 3)
    elif n > WIDTH:
        map_columns(x, dy, y, rows, stride, at, n, c, streaming, ahead, 2)
    elif n > 0:
        map_columns(x, dy, y, rows, stride, at, n, c, streaming, ahead, 1)


cdef inline void whole_pairs(const stored* y, int64_t n, int64_t* bounds) noexcept nogil:
    """The columns of a row between which it is streamed.

    A part of a line is stored plainly, and so is the other one of its pair: processors bring lines
    by pairs, and one that is in the cache must leave it before it is streamed (0.8 to 1.0 of the
    time of streaming every whole line)."""
    cdef int64_t line = 64 // <int64_t> sizeof(stored), first = until_aligned(y), last = n
    if first > 0 and <size_t> (y + first) % 128 != 0:
        first = minimum(n, first + line)
    if <size_t> (y + n) % 64 != 0:
        last = maximum(first, n - <int64_t> (<size_t> (y + n) % 128 // sizeof(stored)))
    bounds[0], bounds[1], bounds[2], bounds[3] = 0, first, last, n


cdef inline void map_rows(
    const stored* x, const stored* dy, stored* y, int64_t rows, int64_t stride, int64_t n,
    const coefficients* c, int stream, int64_t ahead
) noexcept nogil:
    """y = ((x - hi)*scale + shift)*weight + bias, or where dy is not NULL,
    y = (x - hi)*scale + shift + dy*(dscale*weight); hi, scale, shift and dscale of a column, weight
    and bias of a row. Whole lines of each row are streamed: row by row where they are not the same
    columns in each."""
    cdef int64_t first = until_aligned(y), row = 0, step = rows
    cdef int64_t bounds[4]
    cdef coefficients own
    cdef int part
    if not streams(stream, y) or first < 0 or first >= n:
        map_range(x, dy, y, rows, stride, 0, n, c, False, ahead)
        return
    if stride * <int64_t> sizeof(stored) % 64 != 0:
        step = 1
    own = c[0]
    while row < rows:
        whole_pairs(y, n, bounds)
        for part in range(3):
            map_range(x, dy, y, step, stride, bounds[part], bounds[part + 1], &own, part == 1,
                      ahead)
        row += step
        own.weight += step
        own.bias += step
        x += step * stride
        dy = past(dy, step * stride)
        y += step * stride


cdef inline bint joins(const plan* p) noexcept nogil:
    """Whether rows are put together (0.55 to 0.9 of the time): where they start anywhere in a
    line."""
    cdef const fn_task* t = p.task
    cdef int64_t lead = until_aligned(<const stored*> t.y)
    return (t.stream and p.strips == 1 and t.mask == NULL and lead >= 0
            and not in_lines(t))


cdef inline void map_unit(const plan* p, int64_t at, int64_t n, int64_t row, int64_t stop,
                          const coefficients* of_columns, int64_t ahead) noexcept nogil:
    """map_rows of the rows [row, stop) of the strip of n places at `at`."""
    cdef const fn_task* t = p.task
    cdef coefficients c = of_columns[0]
    cdef const stored* x = <const stored*> t.x + at + row * t.s
    cdef const stored* dy = past(<const stored*> t.dy, at + row * t.s)
    cdef stored* y = <stored*> t.y + at + row * t.s
    cdef int64_t step = rows_at_once(n), count
    cdef bint joining = joins(p)
    cdef joint j
    c.weight, c.bias = <const work*> t.weight + row, <const work*> t.bias + row
    if joining:
        step = minimum(step, JOINED // n)
        j.to = y
        j.n = 0
    while row < stop:
        count = minimum(step, stop - row)
        map_rows(x, dy, &j.kept[j.n] if joining else y, count, t.s, n, &c,
                 0 if joining or t.mask != NULL else t.stream, ahead)
        row += count
        if joining:
            stream_joint(&j, count * n, row == stop)
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


cdef inline void map_fused_unit(const fn_task* t, int64_t at, int64_t n, int64_t row, int64_t stop,
                                strip* w) noexcept nogil:
    """map_fused of the rows [row, stop) of the strip of n places at `at`, one by one."""
    cdef const work* weight = <const work*> t.weight
    cdef const work* bias = <const work*> t.bias
    cdef coefficients c = affine_map(OF_PLACES, w.hi, w.row_scale, w.row_shift)
    cdef edge ends
    open_edge(&ends)
    for row in range(row, stop):
        load_row(w, n, weight[row], bias[row])
        map_fused(t, at + row * t.s, n, 1, 0, &c, &ends)
    close_edge(&ends)
