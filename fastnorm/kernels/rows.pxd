"""The rows loop order: i > 1, or o == 1, so that a set is `o` contiguous runs of k*i values (a
single row of sets of one value is columns).

Sets are numbered in memory order, set = b_index*g + g_index. A set, or a block of neighbouring
ones, is finished while it is in the second-level cache, so that a forward reads x once and
writes y once, a backward reads dy and x once and writes dx once. Sets too few and too large
for that are split into tiles and read twice, as are few and wide rows in a backward with a weight
for each place (0.5 to 0.75 of the time of rows in parts); sets of short runs are summed as slabs
(1.3 to 1.5 times faster at 7x7 than run by run).

Sums are taken tile by tile and added in the order of the tiles. Tiles depend on the geometry
alone; which thread takes which never changes a bit.

What was tried instead, and its time over that of what is here (one core with AVX-512):

- the sums of four rows of 768 before the first map: 1.2;
- one row summed while another is mapped: 0.75 to 0.95 from the last-level cache, but 1.0 to 1.15
  in the second-level cache and 1.0 to 2 where y is streamed;
- the next row asked for early where sets are one run: 1.0 to 1.1; by the loop of the sums too: 1.05
  to 1.2;
- a sample folded as a vector: 1.02 to 1.3 (no sample at all: 0.9 at rows of 64); the samples of
  eight rows before their sums: 1.0 to 1.1;
- four vectors of all rows mapped before the next four, their weights in registers: 0.96 to 1.2;
- lines of y asked for while x is summed: 1.1 to 1.15;
- rows that end within a line put together before they are streamed: 1.0 to 1.35 (it wins in a
  backward);
- -funroll-loops: 1.2 in cache;
- in a backward, the parts of dweight merged by all threads: 1.1 to 1.3; loops of their own for what
  asks for nothing early: 0.95 to 1.05;
- fused multiply-adds everywhere, which the same bits at x86-64-v2 forbid: 0.99 to 1.03, in cache
  and out of it. Loads, stores and the caches are the bound.
"""

from libc.string cimport memcpy, memset

from fastnorm.kernels.runs cimport *
from fastnorm.kernels.words cimport *

cdef enum:
    TILE = 65536  # values in a tile of a set
    FEW = 16  # sets, below which large ones are split
    BLOCK = 64
    SHORT_RUN = 256  # values in a run, below which sets are summed and mapped as slabs
    # With given statistics, which leave only the map, runs of fewer bytes are slabs. Where y is
    # streamed, the limit is SHORTEST, from which on runs are (0.8 of the time at 14x14; with a
    # residual slabs took 1.0 to 1.3 times as long), with an activation alone GIVEN_ACTIVATED (0.6
    # of the time at 15x15).
    GIVEN_SHORT_RUN = 700
    GIVEN_ACTIVATED = 1024
    SHEETS = 8  # parts of the samples, at most (32 took 0.97 to 1.17 times as long)
    SHEET = 8192  # values in one, about
    SCATTERED = 256  # runs, from which a set is slower to gather than to read twice
    CROWDED = 3 << 18  # bytes of a set that do not stay in a second-level cache
    SHORT = 1024  # values in a run, below which processors do not see the next one coming
    ELEMENTS = 4096  # values of all rows, up to which ROWS of them are summed together
    KEPT = 8192  # values of rows that are kept where their sum of two terms is streamed
    LONG_RUN = 16384  # values of a run that is asked for while it is summed, in a backward too
    STRIP = 1024  # columns whose weights and sums stay in the first-level cache


cdef struct plan:
    const fn_task* task
    int64_t sets
    int64_t n  # values in a contiguous run: k*i, of one channel in a backward: i
    int64_t stride  # from one run of a set to the next
    double inverse  # 1 / (o*k*i)
    int64_t pieces  # of a run, where it is longer than a tile
    int64_t piece  # values in one
    int64_t tile_runs  # runs in a tile, where they are shorter
    int64_t tiles  # in a set (in a backward: in a channel)
    int64_t block  # neighbouring sets in a unit of work
    int64_t group  # of them whose sums are taken before the first is mapped, at most BLOCK
    int64_t sheets  # parts of the samples, where these are summed in memory order
    int64_t sheet_sets  # whose slabs are summed and mapped together
    int64_t blocks
    int64_t sums_ahead  # values ahead that sums ask for, or 0
    int64_t channels  # of a set in a unit of work of a split backward
    int64_t b_tiles  # parts of b that sum dweight each for themselves
    double* partial


cdef inline bint in_slabs(const fn_task* t) noexcept nogil:
    """Whether runs are so short that their ends and their sums by run would cost the most."""
    if t.b != 1 or t.k != 1 or t.mask != NULL or t.i == 1 or t.i >= SHORT_RUN:
        return False
    if not t.given or t.dy != NULL:
        return t.o >= 8 or (t.o > 1 and t.o * 16 >= t.i)  # 0.55 to 1.0 of the time
    # Given statistics: slabs pay for few runs of a channel too (0.5 to 0.9 of the time), but not
    # for a single one (1.0 to 2.1 times as long), unless an activation comes on top.
    return (t.fused or t.o > 1) and t.i * <int64_t> sizeof(stored) < (
        GIVEN_SHORT_RUN if not t.stream or t.residual != NULL
        else GIVEN_ACTIVATED if t.fused else SHORTEST)


cdef inline bint brief(const plan* p) noexcept nogil:
    """Whether runs are so short that those of ROWS sets or channels are summed before one fold."""
    return p.task.o == 1 and p.n <= SHORT_RUN and p.task.mask == NULL


cdef inline int64_t whole_lines(int64_t n) noexcept nogil:
    """How many runs of n values are whole lines."""
    cdef int64_t runs = 1
    while runs * n * <int64_t> sizeof(stored) % 64 != 0:
        runs *= 2
    return runs


cdef inline void cut_sheets(plan* p) noexcept nogil:
    """Sheets (slabs.pyx) where a slab holds all sets, which would share lines, and where the runs
    of one are many or crowd into a part of the cache. By the geometry alone."""
    cdef const fn_task* t = p.task
    cdef int64_t lines = whole_lines(t.i), sample = t.g * t.i, bytes = sample * sizeof(stored)
    cdef int64_t apart = maximum(minimum(4096, bytes & -bytes), t.i * <int64_t> sizeof(stored))
    cdef int64_t least = 2 * SHEET
    p.sheets = 1
    if not in_slabs(t):
        return
    # Smaller arrays are taken in groups of sets (sheets took 1.1 to 1.6 times as long).
    if sample > PLACES:
        least = 3 << 16
    elif t.g > lines and t.g % lines == 0 and lines * t.i >= SHORT_RUN:
        least = 1 << 16
    if t.o * sample < least or (sample > 2 * PLACES and t.o < SCATTERED and t.o * apart < CROWDED):
        return
    while p.sheets < SHEETS and t.o * sample >= 2 * p.sheets * SHEET:
        p.sheets *= 2
    p.sheet_sets = minimum(t.g, maximum(1, PLACES // t.i))
    if sample <= 2 * PLACES:
        p.sheet_sets = t.g
    elif p.sheet_sets > lines:
        p.sheet_sets -= p.sheet_sets % lines


cdef inline void cut(plan* p, const fn_task* t, int64_t n) noexcept nogil:
    """Cut sets whose contiguous runs have n values into tiles and blocks."""
    cdef int64_t bytes = t.o * t.k * t.i * <int64_t> sizeof(stored) * (1 if t.dy == NULL else 2)
    cdef int64_t blocks, most, lines, threads = maximum(1, t.threads)
    cdef int64_t values = t.o * t.k * t.i, tile = TILE
    p.task = t
    p.sets = t.b * t.g
    p.n = n
    p.stride = t.g * t.k * t.i
    p.inverse = 1.0 / <double> (t.o * t.k * t.i)
    # One or three sets would leave a thread waiting: smaller tiles take 0.5 to 0.95 of the time
    # (for two sets 1.0 to 1.15).
    if (p.sets == 1 or p.sets == 3) and values <= TILE < 2 * p.sets * values and (
            t.dy == NULL or t.i > 1):
        tile = TILE // 4
    p.pieces = shared_evenly(ceil_div(n, tile))
    p.piece = ceil_div(ceil_div(n, p.pieces), LANES) * LANES
    p.pieces = ceil_div(n, p.piece)
    p.tile_runs = maximum(1, tile // n) if p.pieces == 1 else 1
    if p.tile_runs > 1 and not t.given:
        p.tile_runs = ceil_div(t.o, shared_evenly(ceil_div(t.o, p.tile_runs)))
    p.tiles = ceil_div(t.o, p.tile_runs) * p.pieces
    if t.o == 1:
        blocks = ceil_div(p.sets, maximum(1, TILE // 4 // (t.k * t.i)))
        p.block = ceil_div(p.sets, ceil_div(blocks, threads) * threads)  # as many for each thread
        p.group = 1
        if brief(p):
            p.group = maximum(1, minimum(ceil_div(ROWS, t.k), t.l2 // 4 // bytes))
    else:
        # Half the cache for what is under way, half for what map_places asks for.
        most = minimum(BLOCK, t.l2 * 3 // 8 // bytes)
        p.group = ceil_div(t.g, 8)
        if in_slabs(t):
            most = minimum(most, (2 * PLACES if t.stream else PLACES) // n)
            # As many that each row of a group starts at a line: 0.5 to 0.95 of the time in cache.
            lines = whole_lines(n)
            if lines <= most and lines * threads <= t.g:
                p.group = maximum(p.group, lines)
            p.group = minimum(p.group, most)
            p.group -= p.group % lines if p.group > lines else 0
        p.group = maximum(1, minimum(p.group, most))
        p.block = maximum(1, t.g // (8 * threads) // p.group) * p.group
        # One block for each thread, where few blocks would not be shared evenly: 0.83 to 0.95 of
        # the time.
        most = ceil_div(ceil_div(t.g, p.block), threads) * p.block
        if not in_slabs(t) and 20 * most > 21 * ceil_div(t.g, threads):
            p.block = ceil_div(t.g, threads)
    cut_sheets(p)
    # Runs of sets that do not stay in cache (else the map of the ones before asks for them), and in
    # a backward long ones (else up to 1.2 times as long).
    p.sums_ahead = 0
    if t.unseen and (n >= LONG_RUN if t.dy != NULL
                     else 2 * bytes > t.near or (t.o == 1 and n >= ELEMENTS)):
        p.sums_ahead = t.ahead
    p.channels = minimum(t.k, maximum(1, TILE // (t.o * t.i)))
    # Each part's sums of dweight cross from core to core: four times as many parts took 1.1 to 1.7
    # times as long where all arrays are a few MB.
    p.b_tiles = minimum(32, maximum(4, (1 << 16) // (t.g * t.k)))
    if t.i > 1:
        p.b_tiles = minimum(t.b, p.b_tiles)
    else:  # evenly: 0.8 to 1.0 of the time
        p.b_tiles = shared_evenly(minimum(ceil_div(t.b, 4 * ROWS), p.b_tiles))
    p.partial = <double*> t.scratch


cdef inline void tile_bounds(const plan* p, int64_t tile, int64_t* r0, int64_t* r1, int64_t* p0,
                             int64_t* p1) noexcept nogil:
    r0[0] = tile // p.pieces * p.tile_runs
    r1[0] = minimum(p.task.o, r0[0] + p.tile_runs)
    p0[0] = tile % p.pieces * p.piece
    p1[0] = minimum(p.n, p0[0] + p.piece)


cdef inline int64_t set_start(const fn_task* t, int64_t set_) noexcept nogil:
    return (set_ // t.g * t.o * t.g + set_ % t.g) * t.k * t.i


cdef inline bint unforeseen(const plan* p) noexcept nogil:
    """Whether the runs of a set are too short for the processor to see the next one coming, and
    come from far enough to wait for (from the second level 1.15 to 1.3 times as long asked for)."""
    cdef const fn_task* t = p.task
    return t.o > 1 and p.n < SHORT and (t.stream or (t.beyond and not t.foreseen))


cdef inline int64_t look_ahead(const plan* p, bint more) noexcept nogil:
    """Places from a group of sets to the next, where it is worth asking for them early: where
    they come from memory and are kept until their turn comes (else 1.1 to 1.4 times as long), or
    in runs too short for the processor to see them coming."""
    cdef int64_t bytes = p.group * p.task.o * p.task.k * p.task.i * <int64_t> sizeof(stored)
    cdef bint kept = 2 * bytes * (1 if p.task.dy == NULL else 2) <= p.task.near
    if more and ((p.task.stream and kept) or unforeseen(p)):
        return p.group * p.task.k * p.task.i
    return 0


cdef inline bint few_and_large(const plan* p) noexcept nogil:
    return p.sets < FEW and (p.tiles > 1 or p.task.o * p.task.k * p.task.i > TILE)


cdef inline void fetch_group(const plan* p, const void* x, int64_t first,
                             int64_t sets) noexcept nogil:
    """Ask for a group in memory order, where its sets alone would be read in short runs."""
    if unforeseen(p) and sets < p.task.g:
        fetch_runs(<const stored*> x + set_start(p.task, first), p.task.o, p.stride,
                   sets * p.task.k * p.task.i)


cdef struct affine:
    # y = (x - hi)*scale + shift
    work hi
    work scale
    work shift


cdef inline affine affine_of(const fn_task* t, int64_t channel, double mean,
                             double rstd) noexcept nogil:
    cdef affine c
    cdef double scale = rstd * <double> (<const work*> t.weight)[channel]
    c.hi = hi_of(mean, rstd, far_of(t), t.eps)
    c.scale = <work> scale
    c.shift = <work> (<double> (<const work*> t.bias)[channel] - (mean - <double> c.hi) * scale)
    return c


cdef inline coefficients map_of(const affine* a) noexcept nogil:
    return affine_map(OF_ALL, &a.hi, &a.scale, &a.shift)
