"""The columns loop order: sums, the map and the units of work; see columns.pxd."""

from libc.string cimport memcpy, memset

from fastnorm.kernels.runs cimport *
from fastnorm.kernels.words cimport *


cdef inline int64_t vectors_down(const plan* p) noexcept nogil:
    """The least vectors, but enough, that are whole channels and lines and divide a row; 0 where
    map_lines has no loop for as many."""
    cdef int64_t least = 3 if REGISTERS > 16 else 6, most = 6 if REGISTERS > 16 else 8
    cdef int64_t lines = maximum(WIDTH, 64 // <int64_t> sizeof(stored)), n = p.channels
    while n % lines != 0 or n < least * WIDTH:
        n += p.channels
    if p.width % n != 0 or n > most * WIDTH or n == 7 * WIDTH:
        return 0
    return n // WIDTH


cdef void cut(plan* p, const fn_task* t) noexcept nogil:
    cdef int64_t fit, least, strips
    cdef bint each
    p.task = t
    p.summed = t.dy != NULL or not t.given
    p.channels = t.g * t.k
    p.copies = 1
    p.width = p.channels
    if p.channels < MANY_CHANNELS:
        least = LEAST if sizeof(stored) > 2 else CHUNKS  # whole lines
        while p.width % NARROW != 0 or p.width < least:
            p.copies += 1
            p.width += p.channels
        # Whole chunks of vectors, where many rows are left (0.7 to 0.95 of the time at 80 to 160
        # channels).
        while CHUNKS < p.width <= 5 * CHUNKS and p.width % CHUNKS != 0 and p.copies * 64 <= t.o:
            p.copies *= 2
            p.width *= 2
        p.copies = minimum(p.copies, t.o)
        p.width = p.copies * p.channels
    p.rows = t.o // p.copies
    p.rest = t.o % p.copies * p.channels
    p.tile_rows = maximum(TILE_ROWS, maximum(ceil_div(p.rows, MAX_TILES), ceil_div(TILE, p.width)))
    p.tiles = ceil_div(p.rows, p.tile_rows)
    if t.b == 1:
        p.tiles = shared_evenly(p.tiles)  # 0.7 to 1.0 of the time
    p.tile_rows = ceil_div(p.rows, p.tiles)
    p.tiles = ceil_div(p.rows, p.tile_rows)
    p.down = vectors_down(p)
    p.padded = ceil_div(p.width, MOST_WIDTH) * MOST_WIDTH
    # All rows of a run at once where the sums fit registers: memory is read in its order then.
    p.step = RUN if p.width <= CHUNK * WIDTH else maximum(STEP, SUMMED // p.width)
    # Row by row, so that dy and x come from memory in its order, where registers hold the sums of
    # but 32 columns: 0.73 to 1.1 of the time (rows of 64 columns, x alone, or what the last-level
    # cache holds: 1.0 to 1.7).
    if REGISTERS == 16 and t.stream == STREAM_ALL and t.dy != NULL and p.width >= 2 * CHUNKS:
        p.step = 1
    p.strip = p.width
    if t.k == 1 and p.copies == 1:
        # Half the sums of several tiles are in another thread's cache: narrower strips, so that all
        # threads finish some (0.9 to 1.0 of the time; in a backward 1.0).
        each = p.tiles > 1 and p.width >= STRIP and t.dy == NULL
        p.strip = LEAST_STRIP if each else STRIP
    # Where tiles are too few for the threads, each takes all steps of some strips of columns (0.5
    # to 1.0 of the time; at 600 to 1024 columns 0.9 to 1.4), as many as the others (0.75 to 0.9
    # at 3072 columns).
    fit = t.l2 // 2 // (p.rows * <int64_t> sizeof(stored) * (1 if t.dy == NULL else 2))
    p.finishing = (t.k == 1 and p.copies == 1 and p.tiles < t.threads
                   and p.channels > STRIP and fit >= LEAST_STRIP)
    if p.finishing:
        strips = ceil_div(ceil_div(p.width, minimum(STRIP, fit)), t.threads) * t.threads
        p.strip = maximum(LEAST_STRIP, ceil_div(ceil_div(p.width, strips), CHUNKS) * CHUNKS)
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


# ---- sums --------------------------------------------------------------------------------


cdef inline void flush_columns(int64_t width, work* lanes, double* total) noexcept nogil:
    cdef int64_t c
    for c in range(width):
        total[c] = total[c] + <double> lanes[c]
    memset(lanes, 0, width * sizeof(work))


cdef inline int64_t before_lines(const plan* p, int64_t at, int64_t n) noexcept nogil:
    """Values of y from `at` on before its first line, where rows are whole lines and streamed, or
    so few vectors that their ends weigh."""
    cdef int64_t first = until_aligned(<const stored*> p.task.y + at)
    if ((p.task.stream == 0 and p.width >= LONG) or n < p.width or p.width > STRIP
            or p.width * <int64_t> sizeof(stored) % 64 != 0):
        return 0
    return maximum(0, first)


cdef inline coefficients turned_by(const plan* p, int64_t b, int64_t first,
                                   work* room) noexcept nogil:
    """Those of rows that start as much later, at a line (0.7 to 1.0 of the time of streaming rows
    that do not)."""
    cdef coefficients m = map_from(p, b, 0)
    cdef int64_t arrays = 6 if p.task.gated else 4, j
    cdef work* to = room
    for j in range(arrays):
        memcpy(to, m.hi + j * p.padded + first, (p.width - first) * sizeof(work))
        memcpy(to + p.width - first, m.hi + j * p.padded, first * sizeof(work))
        to += STRIP
    m = affine_map(OF_PLACES, room, room + STRIP, room + 2 * STRIP)
    m.dscale = room + 3 * STRIP
    if p.task.gated:
        m.gate_scale, m.gate_shift = room + 4 * STRIP, room + 5 * STRIP
    return m


cdef void map_fused_rows(const plan* p, int64_t b, int64_t row, int64_t rows, int64_t c,
                         int64_t n) noexcept nogil:
    """Columns [c, c + n) of these rows, with a forward's coefficients."""
    cdef const fn_task* t = p.task
    cdef coefficients m = map_from(p, b, c)
    cdef work room[6 * STRIP]
    cdef int64_t at = b * t.o * p.channels + row * p.width + c, first = 0, end
    cdef edge ends
    if t.mask == NULL and t.upstream == NULL:
        first = before_lines(p, at, n)
    open_edge(&ends)
    if first > 0:
        end = at + (rows - 1) * n
        map_fused(t, at, first, 1, 0, &m, NULL)
        m = map_from(p, b, first)
        map_fused(t, end + first, n - first, 1, 0, &m, NULL)
        m = turned_by(p, b, first, room)
        at += first
        rows -= 1
    map_fused(t, at, n, rows, p.width, &m, &ends)
    close_edge(&ends)


cdef void sum_gaps(const plan* p, int64_t b, int64_t row, int64_t copies, const coefficients* m,
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
        store_part(kept + c, minimum(WIDTH, n - c), load_work(m.hi + c))
        c += WIDTH
    memset(kept_dy, 0, n * sizeof(stored))
    for c in range(copies):
        if mask_of(p, b, row)[c]:
            memcpy(kept + c * p.channels, <const stored*> t.x + at + c * p.channels, bytes)
            if t.dy != NULL:
                memcpy(kept_dy + c * p.channels, <const stored*> t.dy + at + c * p.channels, bytes)
    sum_rows(kept, NULL if t.dy == NULL else kept_dy, 1, 0, n, m, s, q, 1, False)


cdef void sum_tile(const plan* p, int64_t b, int64_t tile, int64_t c0,
                   int64_t c1) noexcept nogil:
    """The columns [c0, c1), p.step rows at a time: memory is read in order, and the sums of the
    other columns wait in the first-level cache."""
    cdef const fn_task* t = p.task
    cdef int64_t row = tile * p.tile_rows, stop = minimum(p.rows, row + p.tile_rows), count, whole
    cdef int64_t at = b * t.o * p.channels + c0, since = 0, n = c1 - c0
    cdef const stored* x = <const stored*> t.x + at
    cdef const stored* dy = past(<const stored*> t.dy, at)
    cdef coefficients m = map_from(p, b, c0)
    cdef double* total = sums_of(p, b, tile) + c0
    cdef work* s = lanes_of(p, b, tile) + c0
    cdef work* q = s + p.padded
    memset(total, 0, n * sizeof(double))
    memset(total + p.width, 0, n * sizeof(double))
    memset(s, 0, n * sizeof(work))
    memset(q, 0, n * sizeof(work))
    while row < stop:
        count = minimum(RUN - since, stop - row)
        if t.upstream != NULL:  # what map_fused has found is summed while it is in cache
            count = minimum(count, p.step)
        whole = valid_rows(t, b * t.o + row * p.copies, count * p.copies) // p.copies
        count = maximum(1, whole)
        if t.upstream != NULL:
            map_fused_rows(p, b, row, count, c0, n)
        if whole > 0:
            sum_rows(x + row * p.width, past(dy, row * p.width), count, p.width, n, &m, s, q,
                     p.step, t.far and (p.step < RUN or (t.unseen and t.dy == NULL)))
        elif p.copies > 1:
            sum_gaps(p, b, row, p.copies, &m, s, q)
        row += count
        since += count
        if since == RUN:
            flush_columns(n, s, total)
            flush_columns(n, q, total + p.width)
            since = 0
    if since > 0:
        flush_columns(n, s, total)
        flush_columns(n, q, total + p.width)
    if tile == p.tiles - 1 and p.rest > 0:
        if t.upstream != NULL:
            map_fused_rows(p, b, stop, 1, 0, p.rest)
        if t.mask == NULL:
            sum_rows(x + stop * p.width, past(dy, stop * p.width), 1, 0, p.rest, &m, s, q, 1,
                     False)
        else:
            sum_gaps(p, b, stop, p.rest // p.channels, &m, s, q)
        flush_columns(p.rest, s, total)
        flush_columns(p.rest, q, total + p.width)


# ---- the map -----------------------------------------------------------------------------


cdef inline void map_down(
    const stored* x, const stored* dy, stored* y, int64_t rows, const coefficients* m,
    bint streaming, int64_t ahead, int vectors
) noexcept nogil:
    """map_each for whole rows of a few vectors: the coefficients stay in registers, or, where those
    are few, on the stack (0.6 to 1.15 of the time)."""
    cdef vec hi[DOWN]
    cdef vec scale[DOWN]
    cdef vec shift[DOWN]
    cdef vec dscale[DOWN]
    cdef vec y_row[DOWN]
    cdef vec gates[2 * DOWN]
    cdef vec d = splat(0)
    cdef bint gated = m.gate_scale != NULL
    cdef int64_t _row
    cdef int v
    for v in range(vectors):
        hi[v] = load_work(m.hi + v * WIDTH)
        scale[v] = load_work(m.scale + v * WIDTH)
        shift[v] = load_work(m.shift + v * WIDTH)
        dscale[v] = d if dy == NULL else load_work(m.dscale + v * WIDTH)
        if gated:
            gates[2 * v] = load_work(m.gate_scale + v * WIDTH)
            gates[2 * v + 1] = load_work(m.gate_shift + v * WIDTH)
    for _row in range(rows):
        for v in range(vectors):
            if ahead and opens_line(v):
                fetch(x + v * WIDTH + ahead)
            if dy != NULL:
                d = load(dy + v * WIDTH)
            y_row[v] = mapped(load(x + v * WIDTH), d, hi[v], scale[v], shift[v], dscale[v],
                              dy != NULL, gates + 2 * v if gated else NULL, False)
        put_all(y, y_row, streaming, vectors)
        x += vectors * WIDTH
        y += vectors * WIDTH
        dy = past(dy, vectors * WIDTH)


cdef inline void map_all_down(const fn_task* t, const stored* x, const stored* dy, stored* y,
                              int64_t rows, const coefficients* m, bint streaming,
                              int vectors) noexcept nogil:
    """map_down, in a loop of its own where it asks ahead (one for both took 1.05 to 1.08 times as
    long where it does not)."""
    if t.unseen and dy == NULL:
        map_down(x, NULL, y, rows, m, streaming, t.ahead, vectors)
    else:
        map_down(x, dy, y, rows, m, streaming, 0, vectors)


cdef inline void map_some(const plan* p, int64_t b, int64_t at, int64_t rows, int64_t c, int64_t n,
                          int stream, int64_t ahead, edge* ends) noexcept nogil:
    """Columns [c, c + n) of rows, the first of which starts at `at`."""
    cdef const fn_task* t = p.task
    cdef coefficients m = map_from(p, b, c)
    map_rows_of_places(<const stored*> t.x + at + c, past(<const stored*> t.dy, at + c),
                       <stored*> t.y + at + c, rows, p.width, n, &m, stream, ahead, ends)


cdef inline void map_lines(const plan* p, int64_t b, int64_t at, int64_t rows, int64_t first,
                           edge* ends) noexcept nogil:
    """Whole rows from `at` on; with `first`, as turned_by has them."""
    cdef const fn_task* t = p.task
    cdef work room[6 * STRIP]
    cdef coefficients m = map_from(p, b, 0)
    cdef int part = 1 if REGISTERS > 16 else 2  # of as many values
    cdef stored* y
    cdef const stored* x
    cdef const stored* dy
    cdef int64_t down
    cdef bint streaming
    if first > 0:
        rows -= 1
        map_some(p, b, at, 1, 0, first, False, 0, NULL)
        map_some(p, b, at + rows * p.width, 1, first, p.width - first, False, 0, NULL)
        m = turned_by(p, b, first, room)
    y = <stored*> t.y + at + first
    x = <const stored*> t.x + at + first
    dy = past(<const stored*> t.dy, at + first)
    streaming = streams(t.stream, y) and until_aligned(y) == 0
    down = 0 if p.down == 0 else rows * (p.width // (p.down * WIDTH))
    if p.down == 3 * part:
        map_all_down(t, x, dy, y, down, &m, streaming, 3 * part)
    elif p.down == 4 * part:
        map_all_down(t, x, dy, y, down, &m, streaming, 4 * part)
    elif REGISTERS > 16 and p.down == 5:  # 0.85 to 1.0 of the time in cache, and 6
        map_all_down(t, x, dy, y, down, &m, streaming, 5)
    elif REGISTERS > 16 and p.down == 6:
        map_all_down(t, x, dy, y, down, &m, streaming, 6)
    else:
        map_rows_of_places(x, dy, y, rows, p.width, p.width, &m, t.stream,
                           ahead_of(t, p.width, p.width), ends)


cdef void map_whole_rows(const plan* p, int64_t b, int64_t row, int64_t stop, int64_t c0,
                         int64_t c1) noexcept nogil:
    """The columns [c0, c1) of some rows, all of which count."""
    cdef const fn_task* t = p.task
    cdef int64_t start = b * t.o * p.channels + row * p.width, n, c = c0, rows = stop - row
    cdef int64_t first = before_lines(p, start, c1 - c0)
    cdef bint down = p.down > 0
    cdef edge ends
    open_edge(&ends)
    if down or first > 0:
        if down and 0 < t.stream < STREAM_ALL:  # as many as are streamed or not together
            rows = PATCH // (p.width * <int64_t> sizeof(stored))
        while row < stop:
            n = minimum(rows, stop - row)
            map_lines(p, b, start, n, first, &ends)
            row += n
            start += n * p.width
    else:
        while c < c1:
            n = minimum(STRIP, c1 - c)
            map_some(p, b, start, stop - row, c, n, t.stream, ahead_of(t, n, p.width), &ends)
            c += n
    close_edge(&ends)


cdef void map_gaps(const plan* p, int64_t b, int64_t row, int64_t n) noexcept nogil:
    """The first n values of a row whose copies may count or not."""
    cdef const fn_task* t = p.task
    cdef int64_t at = b * t.o * p.channels + row * p.width
    if valid_among(mask_of(p, b, row), n // p.channels) == NONE_VALID:
        memset(<stored*> t.y + at, 0, n * sizeof(stored))
        return
    map_some(p, b, at, 1, 0, n, False, 0, NULL)
    blank_gaps(t, <stored*> t.y + at, at, n)


cdef void map_tile(const plan* p, int64_t b, int64_t tile, int64_t c0, int64_t c1) noexcept nogil:
    cdef const fn_task* t = p.task
    cdef int64_t row = tile * p.tile_rows, stop = minimum(p.rows, row + p.tile_rows)
    cdef int64_t rest = p.rest if tile == p.tiles - 1 else 0
    cdef int64_t at = (b + 1) * t.o * p.channels - rest, n, c = c0
    if t.dy == NULL and (t.activation != 0 or t.residual != NULL):
        while c < c1:
            n = minimum(STRIP, c1 - c)
            map_fused_rows(p, b, row, stop - row, c, n)
            c += n
        if rest > 0:
            map_fused_rows(p, b, p.rows, 1, 0, rest)
    elif t.mask == NULL:
        map_whole_rows(p, b, row, stop, c0, c1)
        if rest > 0:
            map_some(p, b, at, 1, 0, rest, t.stream, 0, NULL)
    else:
        while row < stop:
            n = valid_rows(t, b * t.o + row * p.copies, (stop - row) * p.copies) // p.copies
            if n > 0:
                map_whole_rows(p, b, row, row + n, c0, c1)
            elif p.copies == 1:
                memset(<stored*> t.y + b * t.o * p.channels + row * p.width + c0, 0,
                       (c1 - c0) * sizeof(stored))
            else:
                map_gaps(p, b, row, p.width)
            row += maximum(1, n)
        if rest > 0:
            map_gaps(p, b, p.rows, rest)
    if t.stream:
        stream_end()


# ---- units of work -----------------------------------------------------------------------


cdef inline void strip_bounds(const plan* p, int64_t index, int64_t* b, int64_t* c0,
                              int64_t* c1) noexcept nogil:
    cdef int64_t strips = ceil_div(p.width, p.strip)
    b[0] = p.b0 + index // strips
    c0[0] = index % strips * p.strip
    c1[0] = minimum(p.width, c0[0] + p.strip)


cdef void unit_start(void* context, int64_t index) noexcept nogil:
    cdef int64_t b, c0, c1
    strip_bounds(<const plan*> context, index, &b, &c0, &c1)
    start_columns(<const plan*> context, b, c0, c1)


cdef void unit_sums(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    sum_tile(p, p.b0 + index // p.tiles, index % p.tiles, 0, p.width)


cdef void unit_finish(void* context, int64_t index) noexcept nogil:
    cdef int64_t b, c0, c1
    strip_bounds(<const plan*> context, index, &b, &c0, &c1)
    finish_columns(<const plan*> context, b, c0, c1)


cdef void unit_map(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    map_tile(p, p.b0 + index // p.tiles, index % p.tiles, 0, p.width)


cdef void do_columns(const plan* p, int64_t b, int64_t c0, int64_t c1) noexcept nogil:
    """All steps of some columns."""
    cdef int64_t tile
    if p.summed:
        start_columns(p, b, c0, c1)
        for tile in range(p.tiles):
            sum_tile(p, b, tile, c0, c1)
    finish_columns(p, b, c0, c1)
    for tile in range(p.tiles - 1, -1, -1):
        map_tile(p, b, tile, c0, c1)


cdef void unit_whole(void* context, int64_t index) noexcept nogil:
    cdef const plan* p = <const plan*> context
    do_columns(p, p.b0 + index, 0, p.width)


cdef void unit_strip(void* context, int64_t index) noexcept nogil:
    cdef int64_t b, c0, c1
    strip_bounds(<const plan*> context, index, &b, &c0, &c1)
    do_columns(<const plan*> context, b, c0, c1)


cdef void run_batch(plan* p) noexcept nogil:
    """All steps of the slices [b0, b0 + batch)."""
    cdef const fn_task* t = p.task
    cdef int64_t bytes = t.o * p.channels * <int64_t> sizeof(stored) * (1 if t.dy == NULL else 2)
    cdef int64_t strips = p.batch * ceil_div(p.width, p.strip)
    if p.batch > 1 and (bytes < t.l2 or p.batch >= 32):
        fn_parallel_for(t, p.batch, unit_whole, p, False)
    elif p.finishing:
        fn_parallel_for(t, strips, unit_strip, p, False)
    else:
        if p.summed:
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
