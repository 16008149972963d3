"""The columns loop order: i == 1 and o > 1, so that neighbouring values belong to neighbouring
channels, and sums run down the columns of an (o, g*k) matrix, one for each b. A single row of
channels that are a set each is one too.

Few columns would leave vectors empty. The matrix (o, c) is therefore read as (o/r, r*c), with
r*c a multiple of the vector; the r copies of a column are merged when its sums are finished.
What o/r leaves over is one more, shorter row. Rows that a mask leaves out are passed over; where
only some of the r rows in one count, a copy is summed that has in the others' place what adds
nothing.

A slice of b is done in three steps: sums of each tile of rows, statistics and coefficients of
each column, and the map, last tile first, so that the end of the sums' read is still in cache.
Slices that fit the second-level cache take all steps in one unit of work, as do strips of few and
wide rows, which are too few tiles for the threads. A larger x is read twice and y written once, but
for what of x the last-level cache still holds.

Tiles depend on the geometry alone and are merged in their order: the bits never depend on
threads.

What was tried instead, and its time over that of what is here:

- one row after the other, sums in the first-level cache: forward 1.2 to 1.3, backward 0.9 to 1.2;
- all rows of 64 columns before the next 64: 1.1 to 1.2 at 256 and 1024 channels, two threads;
- coefficients read again, and plain stores, for every row of 64 columns: 1.5 in inference;
- a few rows of 64 columns, for wide rows too: 1.2 to 1.5 with streaming, 1.0 in cache;
- all steps of a strip of columns that fits the second-level cache, where there are tiles for all
  threads: 1.1 to 1.5, within the caches 0.9 to 1.4;
- the sums of wide rows in strips of 2048 columns: 1.0;
- loops of their own for sums that ask for nothing early, and for maps that are not streamed: 1.0;
- two to sixteen rows of a few vectors mapped together, coefficients in registers: 1.0 to 1.3 in
  cache, 1.3 to 1.8 streamed;
- tiles of a quarter as many values where these would be one or two: 0.82 to 1.6, 1.04 in the mean.
"""

from libc.stdint cimport int64_t, uint8_t

from fastnorm.kernels.words cimport *

cdef enum:
    # Copies of few columns make rows whose width is a multiple of NARROW, better of CHUNKS, which
    # are CHUNK vectors at every level, and at least LEAST, in 16 bits CHUNKS (64 took 1.1 to 1.6
    # times as long at 3 and 24 channels).
    NARROW = 16
    LEAST = 48
    CHUNKS = 64
    SUMMED = 4096  # values whose rows are summed before the next columns are
    MAX_TILES = 32
    TILE = 65536  # values in a tile, at least, about
    LEAST_STRIP = 256  # columns that one thread takes all steps of
    STRIP = 1024  # columns mapped down a tile: their coefficients stay in the first-level cache
    MANY_CHANNELS = 256  # fewer are copied
    MOST_COPIES = 64
    FOLDED = 4096  # more values than a row of several copies has
    TILE_ROWS = 64  # rows in a tile, at least: the sums of fewer weigh as much as their values


cdef struct plan:
    const fn_task* task
    bint summed  # statistics, or a gradient's terms, are found
    int64_t channels
    int64_t copies  # r
    int64_t width  # r*channels
    int64_t rows  # of width values
    int64_t rest  # values left over
    int64_t tile_rows
    int64_t tiles
    int64_t b0  # the slices [b0, b0 + batch) are under way
    int64_t batch
    int64_t down  # vectors of whole channels that are mapped down all rows together, or 0
    int64_t padded  # width, in whole vectors
    int64_t step  # rows summed before the next columns are
    int64_t strip  # columns that are started and finished by one thread
    bint finishing  # which has all steps of them, since they fit its second-level cache
    int64_t tile_slot  # bytes of scratch for a tile
    int64_t slot  # and for a slice


cdef inline double* sums_of(const plan* p, int64_t b, int64_t tile) noexcept nogil:
    """[2][width] of a tile. Those of tile 0 hold the merged sums afterwards."""
    return <double*> (<char*> p.task.scratch + (b - p.b0) * p.slot + tile * p.tile_slot)


cdef inline work* lanes_of(const plan* p, int64_t b, int64_t tile) noexcept nogil:
    """[2][padded]: what a tile has summed since it last met a double."""
    return <work*> (sums_of(p, b, tile) + 2 * p.width)


cdef inline work* coefficients_of(const plan* p, int64_t b) noexcept nogil:
    """[6][padded]: about or hi, scale, shift, dscale, and scale and shift of a gate."""
    return <work*> sums_of(p, b, p.tiles)


cdef inline coefficients map_from(const plan* p, int64_t b, int64_t column) noexcept nogil:
    """Those of the columns from this one on."""
    cdef const work* hi = coefficients_of(p, b) + column
    cdef coefficients c = affine_map(OF_PLACES, hi, hi + p.padded, hi + 2 * p.padded)
    c.dscale = hi + 3 * p.padded
    if p.task.gated:
        c.gate_scale, c.gate_shift = hi + 4 * p.padded, hi + 5 * p.padded
    return c


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
