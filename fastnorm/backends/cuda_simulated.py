"""cuda_words.py for Numba's simulator (NUMBA_ENABLE_CUDASIM=1): the same words in plain Python.

Every access is checked: it must fall into an array that was opened, and a vector access must be
aligned to 16 bytes, so that a test sees what a processor would not forgive.
"""

from bisect import bisect_right
from functools import cache

import numpy as np
from numba import cuda, float32, float64

from fastnorm.backends.cuda_words import VECTOR, Words, merging

THREADS = 4  # in a block: the simulator runs each as a thread of the system
WARP = 2

_opened = {}  # address: flat array of bytes


def open_array(array):
    """Let kernels read and write this contiguous NumPy array; its address."""
    address = array.ctypes.data
    _opened[address] = array.reshape(-1).view(np.uint8)
    return address


def close_arrays():
    _opened.clear()


def _memory(address, index, itemsize, count):
    """The bytes of `count` elements, as a writable view."""
    byte = int(address) + int(index) * itemsize
    starts = sorted(_opened)
    at = bisect_right(starts, byte) - 1
    if at < 0 or byte + count * itemsize > starts[at] + _opened[starts[at]].size:
        raise IndexError(f"{count} elements of {itemsize} bytes at {byte}: outside of all arrays")
    if count > 1 and byte % VECTOR:
        raise IndexError(f"a vector access at {byte}, which is not a multiple of {VECTOR}")
    offset = byte - starts[at]
    return _opened[starts[at]][offset : offset + count * itemsize]


def _widen_bfloat(stored):
    return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _narrow_bfloat(values):
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _plain(storage, work):
    return lambda stored: stored.view(storage).astype(work), lambda values: values.astype(storage)


_STORAGE = {
    "float32": (4, float32, *_plain(np.float32, np.float32)),
    "float64": (8, float64, *_plain(np.float64, np.float64)),
    "float16": (2, float32, *_plain(np.float16, np.float32)),
    "bfloat16": (2, float32, _widen_bfloat, _narrow_bfloat),
}


@cache
def words(name, wide=False):
    itemsize, work, widen, narrow = _STORAGE[name]
    lanes = VECTOR // itemsize if wide else 1

    def load(address, index):
        return widen(_memory(address, index, itemsize, 1))[0]

    def store(address, index, value):
        with np.errstate(over="ignore"):
            _memory(address, index, itemsize, 1)[:] = narrow(np.array([value])).view(np.uint8)

    def load_lanes(address, index, into):
        into[:] = widen(_memory(address, index, itemsize, lanes))

    def store_lanes(address, index, values):
        with np.errstate(over="ignore"):
            _memory(address, index, itemsize, lanes)[:] = narrow(values).view(np.uint8)

    return Words(name, itemsize, work, lanes, load, store, load_lanes, store_lanes)


@cache
def block_words(work):
    merge = merging(work)

    @cuda.jit(device=True)
    def block_sums(a, b):
        shared = cuda.shared.array(2 * THREADS, work)
        shared[2 * cuda.threadIdx.x] = a
        shared[2 * cuda.threadIdx.x + 1] = b
        cuda.syncthreads()
        a = shared[0]
        b = shared[1]
        for thread in range(1, THREADS):
            a += shared[2 * thread]
            b += shared[2 * thread + 1]
        cuda.syncthreads()
        return a, b

    @cuda.jit(device=True)
    def block_moments(count, mean, m2):
        shared = cuda.shared.array(3 * THREADS, work)
        at = 3 * cuda.threadIdx.x
        shared[at] = count
        shared[at + 1] = mean
        shared[at + 2] = m2
        cuda.syncthreads()
        count = shared[0]
        mean = shared[1]
        m2 = shared[2]
        for thread in range(1, THREADS):
            count, mean, m2 = merge(count, mean, m2, shared[3 * thread], shared[3 * thread + 1],
                                    shared[3 * thread + 2])
        cuda.syncthreads()
        return count, mean, m2

    return merge, block_sums, block_moments
