"""The columns loop order: i == 1 and o > 1, so that neighbouring values belong to neighbouring
channels, and sums run down the columns of an (o, g*k) matrix, one for each b.

Few columns would leave vectors empty. The matrix (o, c) is therefore read as (o/r, r*c), with
r*c a multiple of the vector; the r copies of a column are merged when its sums are finished.
What o/r leaves over is one more, shorter row. Rows that a mask leaves out are passed over; where
only some of the r rows in one count, a copy is summed that has in the others' place what adds
nothing.

A slice of b is done in three steps: sums of each tile of rows, statistics and coefficients of
each column, and the map, last tile first, so that the end of the sums' read is still in cache.
Slices that fit the second-level cache take all steps in one unit of work. A larger x is read
twice and y written once, but for what of x the last-level cache still holds.

What lost: one row after the other, sums in the first-level cache (1.2 to 1.3 times as long in a
forward, 0.9 to 1.2 in a backward); all rows of 64 columns before the next 64 (1.1 to 1.2 times as
long at 256 and 1024 channels, two threads); coefficients read again, and plain stores, for every
row of 64 columns (1.5 times in inference); a few rows of 64 columns, for wide rows too (1.2 to 1.5
times with streaming, the same in cache); all steps of a strip of columns that fits the second-level
cache (1.1 to 1.5 times); two to sixteen rows of a few vectors mapped together, coefficients in
registers (1.0 to 1.3 times in cache, 1.3 to 1.8 streamed).

Tiles depend on the geometry alone and are merged in their order: the bits never depend on
threads.
"""

from libc.stdint cimport uint8_t
from libc.string cimport memcpy, memset

from fastnorm.kernels.down cimport *
from fastnorm.kernels.runs cimport *
from fastnorm.kernels.words cimport *

cdef enum:
    NARROW = 16  # the width of few columns becomes a multiple of this
    WIDE = 64  # and at least this
    MAX_TILES = 32
    TILE = 65536  # values in a tile, about, at least
    STRIP = 1024  # columns mapped down a tile: their coefficients stay in the first-level cache
    MOST_COPIES = 64
    FOLDED = 4096  # more values than a row of several copies has
    TILE_ROWS = 64  # and rows: fewer, and the tiles' sums weigh as much as their values


cdef struct plan:
    const fn_task* task
    int64_t channels
    int64_t copies  # r
    int64_t width  # r*channels
    int64_t rows  # of width values
    int64_t rest  # values left over
    int64_t tile_rows
    int64_t tiles
    int64_t b0  # the slices [b0, b0 + batch) are under way
    int64_t batch
    int64_t padded  # width, in whole vectors
    int64_t step  # rows summed before the next columns are
    int64_t strip  # columns that are started and finished by one thread
    int64_t tile_slot  # bytes of scratch for a tile
    int64_t slot  # and for a slice


cdef void cut(plan* p, const fn_task* t) noexcept nogil:
    p.task = t
    p.channels = t.g * t.k
    p.copies = 1
    if p.channels < 256:
        while p.copies * p.channels % NARROW != 0 or p.copies * p.channels < WIDE:
            p.copies += 1
        p.copies = minimum(p.copies, t.o)
    p.width = p.copies * p.channels
    p.rows = t.o // p.copies
    p.rest = t.o % p.copies * p.channels
    p.tile_rows = maximum(TILE_ROWS, maximum(ceil_div(p.rows, MAX_TILES), ceil_div(TILE, p.width)))
    p.tile_rows = ceil_div(p.rows, ceil_div(p.rows, p.tile_rows))
    p.tiles = ceil_div(p.rows, p.tile_rows)
    p.padded = ceil_div(p.width, MOST_WIDTH) * MOST_WIDTH
    # All rows of a run at once where the sums fit registers: memory is read in its order then.
    p.step = RUN if p.width <= CHUNK * WIDTH else STEP
    p.strip = STRIP if t.k == 1 and p.copies == 1 else p.width
    # Per tile: two sums of each column, and their lanes; then about or hi, scale, shift, dscale
    # and the gate; then the rows that count of each copy.
    p.tile_slot = (2 * p.width * <int64_t> sizeof(double)
                   + 2 * p.padded * <int64_t> sizeof(work) + 63) // 64 * 64
    p.slot = p.tiles * p.tile_slot + (6 * p.padded * <int64_t> sizeof(work) + 63) // 64 * 64
    p.slot += MOST_COPIES * sizeof(int64_t)
    p.batch = minimum(t.b, maximum(1, (1 << 20) // p.slot))


cdef public size_t columns_scratch(const fn_task* t) noexcept nogil:
    """Bytes of scratch for a forward or a backward."""
    cdef plan p
    cut(&p, t)
    return p.batch * p.slot


cdef inline double* sums_of(const plan* p, int64_t b, int64_t tile) noexcept nogil:
    """[2][width] of a tile. Those of tile 0 hold the merged sums afterwards."""
    return <double*> (<char*> p.task.scratch + (b - p.b0) * p.slot + tile * p.tile_slot)


cdef inline work* lanes_of(const plan* p, int64_t b, int64_t tile) noexcept nogil:
    """[2][padded]: what a tile has summed since it last met a double."""
    return <work*> (sums_of(p, b, tile) + 2 * p.width)


cdef inline work* coefficients_of(const plan* p, int64_t b) noexcept nogil:
    """[6][padded]: about or hi, scale, shift, dscale, and scale and shift of a gate."""
    return <work*> sums_of(p, b, p.tiles)


cdef inline const work* gate_of(const plan* p, int64_t b) noexcept nogil:
    return coefficients_of(p, b) + 4 * p.padded if p.task.gated else NULL


cdef inline int64_t* counts_of(const plan* p, int64_t b) noexcept nogil:
    """[copies]: rows that a mask lets count."""
    return <int64_t*> (<char*> p.task.scratch + (b - p.b0 + 1) * p.slot) - MOST_COPIES


cdef inline int64_t count_of(const plan* p, int64_t b, int64_t column) noexcept nogil:
    if p.task.mask == NULL:
        return p.rows + (1 if column < p.rest else 0)
    return p.task.counts[b] if p.copies == 1 else counts_of(p, b)[column // p.channels]


cdef inline const uint8_t* mask_of(const plan* p, int64_t b, int64_t row) noexcept nogil:
    """Of the copies in a row."""
    return p.task.mask + b * p.task.o + row * p.copies


cdef inline bint left_out(const plan* p, int64_t b, int64_t row, int64_t column) noexcept nogil:
    return p.task.mask != NULL and not mask_of(p, b, row)[column // p.channels]


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


# ---- sums --------------------------------------------------------------------------------


cdef inline void flush_columns(int64_t width, work* lanes, double* total) noexcept nogil:
    cdef int64_t c
    for c in range(width):
        total[c] = total[c] + <double> lanes[c]
    memset(lanes, 0, width * sizeof(work))


cdef void map_fused_rows(const plan* p, int64_t b, int64_t row, int64_t rows, int64_t c,
                         int64_t n) noexcept nogil:
    """Columns [c, c + n) of these rows, with a forward's coefficients."""
    cdef const work* hi = coefficients_of(p, b) + c
    cdef int64_t at = b * p.task.o * p.channels + row * p.width + c, _r
    for _r in range(rows):
        map_fused(p.task, at, n, hi, hi + p.padded, hi + 2 * p.padded, True, NULL, NULL)
        at += p.width


cdef void sum_gaps(const plan* p, int64_t b, int64_t row, int64_t copies, const work* about,
                   work* s, work* q) noexcept nogil:
    """sum_rows of a row whose copies may count or not."""
    cdef const fn_task* t = p.task
    cdef stored kept[FOLDED]
    cdef stored kept_dy[FOLDED]
    cdef int64_t at = b * t.o * p.channels + row * p.width, n = copies * p.channels, c = 0
    cdef int64_t bytes = p.channels * sizeof(stored)
    if valid_among(mask_of(p, b, row), copies) == NONE_VALID:
        return
    while c < n:
        store_part(kept + c, minimum(WIDTH, n - c), load_work(about + c))
        c += WIDTH
    memset(kept_dy, 0, n * sizeof(stored))
    for c in range(copies):
        if mask_of(p, b, row)[c]:
            memcpy(kept + c * p.channels, <const stored*> t.x + at + c * p.channels, bytes)
            if t.dy != NULL:
                memcpy(kept_dy + c * p.channels, <const stored*> t.dy + at + c * p.channels, bytes)
    sum_rows(kept, NULL if t.dy == NULL else kept_dy, 1, 0, n, about, NULL, NULL, s, q, 0)


cdef void sum_tile(const plan* p, int64_t b, int64_t tile) noexcept nogil:
    """A few rows of all columns at a time: memory is read in order, and the sums of the other
    columns wait in the first-level cache."""
    cdef const fn_task* t = p.task
    cdef int64_t row = tile * p.tile_rows, stop = minimum(p.rows, row + p.tile_rows), count, whole
    cdef int64_t at = b * t.o * p.channels, since = 0
    cdef const stored* x = <const stored*> t.x + at
    cdef const stored* dy = past(<const stored*> t.dy, at)
    cdef const work* about = coefficients_of(p, b)
    cdef const work* gate = gate_of(p, b)
    cdef double* total = sums_of(p, b, tile)
    cdef work* s = lanes_of(p, b, tile)
    cdef work* q = s + p.padded
    memset(total, 0, 2 * p.width * sizeof(double))
    memset(s, 0, 2 * p.padded * sizeof(work))
    while row < stop:
        count = minimum(minimum(p.step, stop - row), RUN - since)
        whole = valid_rows(t, b * t.o + row * p.copies, count * p.copies) // p.copies
        count = maximum(1, whole)
        if t.upstream != NULL:
            map_fused_rows(p, b, row, count, 0, p.width)
        if whole > 0:
            sum_rows(x + row * p.width, past(dy, row * p.width), count, p.width, p.width, about,
                     gate, past_weight(gate, p.padded), s, q,
                     count * p.width if p.step == STEP else 0)
        elif p.copies > 1:
            sum_gaps(p, b, row, p.copies, about, s, q)
        row += count
        since += count
        if since == RUN:
            flush_columns(p.width, s, total)
            flush_columns(p.width, q, total + p.width)
            since = 0
    if since > 0:
        flush_columns(p.width, s, total)
        flush_columns(p.width, q, total + p.width)
    if tile == p.tiles - 1 and p.rest > 0:
        if t.upstream != NULL:
            map_fused_rows(p, b, stop, 1, 0, p.rest)
        if t.mask == NULL:
            sum_rows(x + stop * p.width, past(dy, stop * p.width), 1, 0, p.rest, about, gate,
                     past_weight(gate, p.padded), s, q, 0)
        else:
            sum_gaps(p, b, stop, p.rest // p.channels, about, s, q)
        flush_columns(p.rest, s, total)
        flush_columns(p.rest, q, total + p.width)


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


# ---- the map -----------------------------------------------------------------------------


cdef inline void map_down(
    const stored* x, const stored* dy, stored* y, int64_t rows, const work* hi, const work* scale,
    const work* shift, const work* dscale, const work* gate_scale, const work* gate_shift,
    bint streaming, int vectors
) noexcept nogil:
    """map_row for whole rows of a few vectors: the coefficients stay in registers."""
    cdef vec h[CHUNK]
    cdef vec a[CHUNK]
    cdef vec b[CHUNK]
    cdef vec c[CHUNK]
    cdef vec y_row[CHUNK]
    cdef vec gates[2 * CHUNK]
    cdef vec d = splat(0)
    cdef int64_t _row
    cdef int v
    for v in range(vectors):
        h[v] = load_work(hi + v * WIDTH)
        a[v] = load_work(scale + v * WIDTH)
        b[v] = load_work(shift + v * WIDTH)
        c[v] = d if dy == NULL else load_work(dscale + v * WIDTH)
        if gate_scale != NULL:
            gates[2 * v] = load_work(gate_scale + v * WIDTH)
            gates[2 * v + 1] = load_work(gate_shift + v * WIDTH)
    for _row in range(rows):
        for v in range(vectors):
            if dy != NULL:
                d = load(dy + v * WIDTH)
            y_row[v] = mapped(load(x + v * WIDTH), d, h[v], a[v], b[v], c[v], dy != NULL,
                              NULL if gate_scale == NULL else gates + 2 * v)
        put_all(y, y_row, streaming, vectors)
        x += vectors * WIDTH
        y += vectors * WIDTH
        dy = past(dy, vectors * WIDTH)


cdef inline void map_part(const plan* p, int64_t row, int64_t c, int64_t n, const work* hi,
                          const work* gate) noexcept nogil:
    """Columns [c, c + n) of the row that starts at `row`."""
    cdef const fn_task* t = p.task
    map_row(<const stored*> t.x + row + c, past(<const stored*> t.dy, row + c),
            <stored*> t.y + row + c, n, hi + c, hi + p.padded + c, hi + 2 * p.padded + c,
            hi + 3 * p.padded + c, past_weight(gate, c), past_weight(gate, p.padded + c), False)


cdef inline void map_rows_down(
    const plan* p, int64_t at, int64_t rows, const work* hi, const work* gate, int vectors
) noexcept nogil:
    """Rows of `vectors` vectors. Where y is streamed and does not start at a line, whole lines from
    there on are rows too, with the coefficients turned by as much."""
    cdef const fn_task* t = p.task
    cdef stored* y = <stored*> t.y
    cdef bint streaming = t.stream and until_aligned(y + at) >= 0
    cdef int64_t first = until_aligned(y + at) if streaming else 0, last = at + rows * p.width, c
    cdef const stored* dy = past(<const stored*> t.dy, at + first)
    cdef int64_t arrays = 4 if gate == NULL else 6
    cdef work turned[6][CHUNK * MOST_WIDTH]
    if first == 0:
        map_down(<const stored*> t.x + at, dy, y + at, rows, hi, hi + p.padded, hi + 2 * p.padded,
                 hi + 3 * p.padded, gate, past_weight(gate, p.padded), streaming, vectors)
        return
    first = first % p.width
    for c in range(arrays):
        memcpy(turned[c], hi + c * p.padded + first, (p.width - first) * sizeof(work))
        memcpy(turned[c] + p.width - first, hi + c * p.padded, first * sizeof(work))
    map_part(p, at, 0, first, hi, gate)
    map_down(<const stored*> t.x + at + first, dy, y + at + first, rows - 1, turned[0], turned[1],
             turned[2], turned[3], NULL if gate == NULL else turned[4], turned[5], True, vectors)
    map_part(p, last - p.width, first, p.width - first, hi, gate)


cdef void map_whole_rows(const plan* p, int64_t b, int64_t row, int64_t stop) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef int64_t at = b * t.o * p.channels + row * p.width, n, c = 0, _r
    cdef const work* hi = coefficients_of(p, b)
    cdef const work* scale = hi + p.padded
    cdef const work* shift = scale + p.padded
    cdef const work* dscale = shift + p.padded
    cdef const work* gate = gate_of(p, b)
    if p.width == 4 * WIDTH:
        map_rows_down(p, at, stop - row, hi, gate, 4)
        return
    if p.width == 3 * WIDTH:
        map_rows_down(p, at, stop - row, hi, gate, 3)
        return
    while c < p.width:
        n = minimum(STRIP, p.width - c)
        at = b * t.o * p.channels + row * p.width + c
        for _r in range(row, stop):
            map_row(<const stored*> t.x + at, past(<const stored*> t.dy, at), <stored*> t.y + at, n,
                    hi + c, scale + c, shift + c, dscale + c, past_weight(gate, c),
                    past_weight(gate, p.padded + c), t.stream)
            at += p.width
        c += n


cdef void map_gaps(const plan* p, int64_t b, int64_t row, int64_t n) noexcept nogil:
    """The first n values of a row whose copies may count or not."""
    cdef const fn_task* t = p.task
    cdef const work* hi = coefficients_of(p, b)
    cdef int64_t at = b * t.o * p.channels + row * p.width
    if valid_among(mask_of(p, b, row), n // p.channels) == NONE_VALID:
        memset(<stored*> t.y + at, 0, n * sizeof(stored))
        return
    map_row(<const stored*> t.x + at, past(<const stored*> t.dy, at), <stored*> t.y + at, n, hi,
            hi + p.padded, hi + 2 * p.padded, hi + 3 * p.padded, NULL, NULL, False)
    blank_gaps(t, <stored*> t.y + at, at, n)


cdef void map_tile(const plan* p, int64_t b, int64_t tile) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef int64_t row = tile * p.tile_rows, stop = minimum(p.rows, row + p.tile_rows)
    cdef int64_t rest = p.rest if tile == p.tiles - 1 else 0
    cdef int64_t at = (b + 1) * t.o * p.channels - rest, n, c = 0
    cdef const work* hi = coefficients_of(p, b)
    cdef const work* gate = gate_of(p, b)
    if t.dy == NULL and (t.activation != 0 or t.residual != NULL):
        while c < p.width:
            n = minimum(STRIP, p.width - c)
            map_fused_rows(p, b, row, stop - row, c, n)
            c += n
        if rest > 0:
            map_fused_rows(p, b, p.rows, 1, 0, rest)
    elif t.mask == NULL:
        map_whole_rows(p, b, row, stop)
        if rest > 0:
            map_row(<const stored*> t.x + at, past(<const stored*> t.dy, at), <stored*> t.y + at,
                    rest, hi, hi + p.padded, hi + 2 * p.padded, hi + 3 * p.padded, gate,
                    past_weight(gate, p.padded), t.stream)
    else:
        while row < stop:
            n = valid_rows(t, b * t.o + row * p.copies, (stop - row) * p.copies) // p.copies
            if n > 0:
                map_whole_rows(p, b, row, row + n)
            else:
                map_gaps(p, b, row, p.width)
            row += maximum(1, n)
        if rest > 0:
            map_gaps(p, b, p.rows, rest)
    if t.stream:
        stream_end()


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
    cdef const stored* sampled
    cdef int64_t c, j, count = minimum(p.rows, minimum(2 * SAMPLES, maximum(4, p.rows // 8)))
    cdef work inverse = <work> (1.0 / <double> count)
    if t.mask != NULL:
        sample_valid_columns(p, b, c0, c1)
        return
    for c in range(c0, c1):
        about[c] = 0
    if not t.has_mean:
        return
    for j in range(1, count):
        sampled = x + j * p.rows // count * p.width
        for c in range(c0, c1):
            about[c] = about[c] + (widen(sampled[c]) - widen(x[c]))
    for c in range(c0, c1):
        about[c] = widen(x[c]) + about[c] * inverse
        about[c] = on_grid(about[c]) if fabs(<double> about[c]) < 1e37 else <work> 0


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


# Sums over the columns of a group: in eight lanes, since one sum would wait for each addition.


cdef inline double fold(const double* lanes) noexcept nogil:
    cdef eight v
    memcpy(&v, lanes, sizeof(eight))
    return fold_eight(&v)


cdef inline double sum_about(const double* a, double about, int64_t n) noexcept nogil:
    cdef double[8] lanes = [0, 0, 0, 0, 0, 0, 0, 0]
    cdef int64_t c = 0, j
    while c + 8 <= n:
        for j in range(8):
            lanes[j] = lanes[j] + (a[c + j] - about)
        c += 8
    for j in range(n - c):
        lanes[j] = lanes[j] + (a[c + j] - about)
    return fold(lanes)


cdef inline double sum_squares_about(const double* a, const double* squares, double about,
                                     double count, int64_t n) noexcept nogil:
    """The sum of squares + (a - about)^2*count."""
    cdef double[8] lanes = [0, 0, 0, 0, 0, 0, 0, 0]
    cdef int64_t c = 0, j
    cdef double d
    while c + 8 <= n:
        for j in range(8):
            d = a[c + j] - about
            lanes[j] = lanes[j] + (squares[c + j] + d * d * count)
        c += 8
    for j in range(n - c):
        d = a[c + j] - about
        lanes[j] = lanes[j] + (squares[c + j] + d * d * count)
    return fold(lanes)


cdef inline double sum_weighted(const double* a, const work* weight, int64_t n) noexcept nogil:
    cdef double[8] lanes = [0, 0, 0, 0, 0, 0, 0, 0]
    cdef int64_t c = 0, j
    while c + 8 <= n:
        for j in range(8):
            lanes[j] = lanes[j] + a[c + j] * <double> weight[c + j]
        c += 8
    for j in range(n - c):
        lanes[j] = lanes[j] + a[c + j] * <double> weight[c + j]
    return fold(lanes)


cdef void merge_columns(const plan* p, int64_t b) noexcept nogil:
    """Chan's merge: the moments of each column become those of each group, g in place g, where
    only columns of the groups before it were."""
    cdef const fn_task* t = p.task
    cdef double* means = sums_of(p, b, 0)
    cdef double* squares = means + p.width
    cdef double first, mean, m2, count = values_of(t, b)
    cdef int64_t g, c, r
    for g in range(t.g):
        first = means[g * t.k]
        mean = m2 = 0
        for r in range(p.copies):
            c = r * p.channels + g * t.k
            mean += sum_about(means + c, first, t.k) * <double> count_of(p, b, c)
        mean = first + mean / count if count > 0 else 0
        for r in range(p.copies):
            c = r * p.channels + g * t.k
            m2 += sum_squares_about(means + c, squares + c, mean, <double> count_of(p, b, c), t.k)
        means[g] = mean
        squares[g] = m2


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
    cdef double values = values_of(t, b), eps = t.eps, scaled
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
            hi[c] = <work> means[c]
            scale[c] = <work> scaled
            shift[c] = <work> (<double> bias[c] - (means[c] - <double> hi[c]) * scaled)
    else:
        for g in range(g0, g1):
            for c in range(g * t.k, (g + 1) * t.k):
                scaled = rstds[g] * <double> weight[c]
                hi[c] = <work> means[g]
                scale[c] = <work> scaled
                shift[c] = <work> (<double> bias[c] - (means[g] - <double> hi[c]) * scaled)
    for r in range(1, p.copies):
        for c in range(3):
            memcpy(hi + c * p.padded + r * p.channels, hi + c * p.padded,
                   p.channels * sizeof(work))


cdef void finish_forward(const plan* p, int64_t b, int64_t c0, int64_t c1) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef double* means = sums_of(p, b, 0)
    if t.given:
        memcpy(means, t.mean, t.g * sizeof(double))
        memcpy(means + p.width, t.var, t.g * sizeof(double))
    else:
        merge_tiles(p, b, c0, c1)
        column_moments(p, b, c0, c1)
        if t.k > 1 or p.copies > 1:
            merge_columns(p, b)
    # Strips cut columns that are groups.
    forward_coefficients(p, b, c0, minimum(t.g, c1))


# ---- units of work -------------------------------------------------------------------------


cdef void start_strip(const plan* p, int64_t b, int64_t c0, int64_t c1) noexcept nogil:
    if p.task.dy == NULL:
        sample_columns(p, b, c0, c1)
    else:
        start_backward(p, b, c0, c1)


cdef void finish_strip(const plan* p, int64_t b, int64_t c0, int64_t c1) noexcept nogil:
    if p.task.dy == NULL:
        finish_forward(p, b, c0, c1)
    else:
        finish_backward(p, b, c0, c1)


cdef inline void strip_bounds(const plan* p, int64_t index, int64_t* b, int64_t* c0,
                              int64_t* c1) noexcept nogil:
    cdef int64_t strips = ceil_div(p.width, p.strip)
    b[0] = p.b0 + index // strips
    c0[0] = index % strips * p.strip
    c1[0] = minimum(p.width, c0[0] + p.strip)


cdef void unit_start(void* context, int64_t index) noexcept nogil:
    cdef int64_t b, c0, c1
    strip_bounds(<const plan*> context, index, &b, &c0, &c1)
    start_strip(<const plan*> context, b, c0, c1)


cdef void unit_sums(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    sum_tile(p, p.b0 + index // p.tiles, index % p.tiles)


cdef void unit_finish(void* context, int64_t index) noexcept nogil:
    cdef int64_t b, c0, c1
    strip_bounds(<const plan*> context, index, &b, &c0, &c1)
    finish_strip(<const plan*> context, b, c0, c1)


cdef void unit_map(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    map_tile(p, p.b0 + index // p.tiles, index % p.tiles)


cdef void unit_whole(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    cdef int64_t b = p.b0 + index, tile
    start_strip(p, b, 0, p.width)
    for tile in range(p.tiles):
        sum_tile(p, b, tile)
    finish_strip(p, b, 0, p.width)
    for tile in range(p.tiles - 1, -1, -1):
        map_tile(p, b, tile)


cdef void run_batch(plan* p) noexcept nogil:
    """All steps of the slices [b0, b0 + batch)."""
    cdef const fn_task* t = p.task
    cdef int64_t bytes = t.o * p.channels * <int64_t> sizeof(stored) * (1 if t.dy == NULL else 2)
    cdef int64_t strips = p.batch * ceil_div(p.width, p.strip)
    if t.given and t.dy == NULL:
        finish_forward(p, p.b0, 0, p.width)
        fn_parallel_for(t, p.tiles, unit_map, p, True)
    elif p.batch > 1 and (bytes < t.l2 or p.batch >= 32):
        fn_parallel_for(t, p.batch, unit_whole, p, False)
    else:
        fn_parallel_for(t, strips, unit_start, p, False)
        fn_parallel_for(t, p.batch * p.tiles, unit_sums, p, False)
        fn_parallel_for(t, strips, unit_finish, p, False)
        fn_parallel_for(t, p.batch * p.tiles, unit_map, p, True)


cdef public void columns_forward(const fn_task* t) noexcept nogil:
    cdef plan p
    cut(&p, t)
    p.b0 = 0
    while p.b0 < t.b:
        p.batch = minimum(p.batch, t.b - p.b0)
        run_batch(&p)
        p.b0 += p.batch


# ---- backward ----------------------------------------------------------------------------


cdef void start_backward(const plan* p, int64_t b, int64_t c0, int64_t c1) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef work* hi = coefficients_of(p, b)
    cdef work* z
    cdef const double* mean = t.mean + b * t.g
    cdef int64_t c, channel, g, r
    cdef double scale, lo
    if not t.has_mean:
        memset(hi + c0, 0, (c1 - c0) * sizeof(work))
    elif t.k == 1:
        for c in range(c0, minimum(t.g, c1)):
            hi[c] = <work> mean[c]
    else:
        for g in range(t.g):
            for c in range(g * t.k, (g + 1) * t.k):
                hi[c] = <work> mean[g]
    for r in range(1, p.copies):
        memcpy(hi + r * p.channels, hi, p.channels * sizeof(work))
    if t.upstream == NULL and not t.gated:
        return
    # A forward's coefficients, from what it found: those of the gate, or in the places that
    # finish_backward fills.
    z = hi + 4 * p.padded if t.gated else hi + p.padded
    for c in range(c0, c1):
        channel = c % p.channels
        g = b * t.g + channel // t.k
        scale = t.rstd[g] * <double> (<const work*> t.weight)[channel]
        lo = t.mean[g] - <double> hi[c] if t.has_mean else 0
        z[c] = <work> scale
        z[p.padded + c] = <work> (<double> (<const work*> t.bias)[channel] - lo * scale)


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
        lo = mean - <double> (<work> mean)
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


cdef public void columns_backward(const fn_task* t) noexcept nogil:
    cdef plan p
    cdef int64_t b, c
    cdef const double* s
    cut(&p, t)
    for c in range(p.channels):
        t.dweight[c] = t.dbias[c] = 0
    p.b0 = 0
    while p.b0 < t.b:
        p.batch = minimum(p.batch, t.b - p.b0)
        run_batch(&p)
        for b in range(p.b0, p.b0 + p.batch):
            s = sums_of(&p, b, 0)
            for c in range(p.channels):
                t.dbias[c] += s[c]
                t.dweight[c] += s[p.width + c]
        p.b0 += p.batch
