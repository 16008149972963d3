"""Where a run that is streamed starts or ends within a line of y. Stored there, the line would be
read first, and stores wait for it: runs of 1001 values took 1.2 to 1.4 times as long. So what ends
within a line is kept until what follows in memory has made it whole, and is streamed then.
"""

from libc.stdint cimport int64_t

from fastnorm.kernels.runs cimport load_one, mapped_part
from fastnorm.kernels.words cimport (
    WIDTH, close_edge, coefficients, edge, minimum, open_edge, store_part, stored,
    stream, stream_line, until_aligned, vec,
)


cdef inline void put_end(edge* e, stored* y, int64_t n, vec v) noexcept nogil:
    """n places of one line."""
    cdef int64_t whole = 64 // <int64_t> sizeof(stored), lead = until_aligned(y)
    cdef int64_t place = whole - lead if lead > 0 else 0
    if n == whole:
        stream(y, v)
        return
    if y - place != e.line or place != e.n:
        close_edge(e)
        e.line = y - place
        e.first = place
    store_part(e.kept + place, n, v)
    e.n = place + n
    if e.n == whole and e.first == 0:
        stream_line(e.line, e.kept)
        open_edge(e)
    elif e.n == whole:
        close_edge(e)


cdef public void put_ends(edge* e, stored* y, int64_t n, const vec* v) noexcept nogil:
    """store_part of some vectors, where y is streamed: up to a line or from one on."""
    cdef int64_t p = 0
    while p < n:
        put_end(e, y + p, minimum(WIDTH, n - p), v[0])
        p += WIDTH
        v += 1


cdef public void map_end(
    const stored* x, const stored* dy, stored* y, int64_t first, int64_t stop,
    const coefficients* c, edge* ends
) noexcept nogil:
    """map_places of the places [first, stop) of a run, less than a line."""
    cdef vec one[6]
    cdef vec v
    cdef int64_t p = first, n
    load_one(one, c, dy != NULL)
    while p < stop:
        n = minimum(WIDTH, stop - p)
        v = mapped_part(x, dy, p, n, c, one)
        if ends == NULL:
            store_part(y + p, n, v)
        else:
            put_end(ends, y + p, n, v)
        p += n
