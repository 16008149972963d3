"""The memory floor for Python."""

cimport numpy as cnp
from libc.stdint cimport int64_t

cnp.import_array()


cdef extern from "floor.h" nogil:
    void floor_move(
        char* out, char* also, const char* a, const char* b, int64_t bytes, int how,
        int threads)
    void floor_twice(
        char* out, char* also, const char* a, const char* b, int64_t bytes, int how,
        int threads)


def move(cnp.ndarray out, also, cnp.ndarray a, b, int how, int threads, bint twice=False):
    """out = a, or a + b in float32 lanes, and the same at `also`; arrays of one size, aligned to 64
    bytes, also and b may be None; how: 0 by plain stores, 1 streamed, 2 streamed and a and b asked
    for early. With `twice`, a and b are read once before that."""
    cdef const char* second = NULL
    cdef char* other = NULL
    if also is not None:
        other = cnp.PyArray_BYTES(<cnp.ndarray> also)
    if b is not None:
        second = cnp.PyArray_BYTES(<cnp.ndarray> b)
    with nogil:
        (floor_twice if twice else floor_move)(
            cnp.PyArray_BYTES(out), other, cnp.PyArray_BYTES(a), second, cnp.PyArray_NBYTES(a),
            how, threads)
