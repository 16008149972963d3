"""How the Numba kernels are compiled and launched: the one place for options, types, the cache
and threads."""

import hashlib
import os
import threading
from pathlib import Path
from types import FunctionType

import numba
import numpy as np
from numba import njit, types
from numba.core.cpu import ParallelOptions

from fastnorm.backends import scalar
from fastnorm.dtypes import TABLE

# No freedom of fastmath: nnan and ninf would hide a NaN, and with reassoc and contract the two
# builds of a kernel gave other bits. numba_simd spells out the vectors they are for.
FASTMATH = False
SERIAL_BYTES = 192 << 10  # moved: below, a parallel region costs more than it saves

# A division by 0 gives what C gives: a check of each would keep loops from becoming vectors.
OPTIONS = {"fastmath": FASTMATH, "nogil": True, "error_model": "numpy"}
INLINING = OPTIONS | {"forceinline": True}  # of an overload
# Numba would also make one loop of two, and loops of its own of assignments to slices. (prange
# needs "numpy" too.)
PARALLEL = ParallelOptions(False)
PARALLEL.enabled = PARALLEL.prange = PARALLEL.numpy = True
# Without Numba's counting of references, which each slice of an array would pay with two atomic
# operations (1.3 to 1.4 times faster at rows of 96). What allocates an array needs it.
UNCOUNTED = {"_nrt": False}
# Never called from Python: compiling takes less without.
INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

# LLVM would leave some of them calls, with seven arguments for each array (1.4 to 1.7 times as long
# at rows of 96, 1.5 times at sets of 49).
inlined = njit(forceinline=True, **INNER, **OPTIONS, **UNCOUNTED)
# What is called once for many values, and would be compiled again at every place. It is compiled
# for each type of an argument: a constant has a type of its own, and prange's index two, one of
# them unsigned, so calls say int64(0) and int64(index) (first calls 0.7 to 0.85 of the time).
called = njit(**INNER, **OPTIONS, **UNCOUNTED)
allocating = njit(**INNER, **OPTIONS)

KERNELS = []


def sources():
    """The files that kernels are compiled from: all but those that only launch them."""
    folder = Path(__file__).parent
    launching = {folder / f"numba_{name}.py" for name in ("cpu", "cuda", "masks")}
    return [*sorted(set(folder.glob("numba_*.py")) - launching), Path(scalar.__file__)]


def _digest():
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources())).hexdigest()[:12]


_DIGEST = _digest()


def _named(function, build):
    """The function under a name of its own: Numba's cache tells builds apart by it, and would not
    see a change in another file than the kernel's."""
    name = f"{function.__name__}_{build}_{_DIGEST}"
    named = FunctionType(function.__code__, function.__globals__, name)
    named.__qualname__ = name
    named.__module__ = function.__module__
    return named


# (x, y, weight, bias, mean, var, rstd, sizes, eps, has_mean, streaming); where y is empty only the
# statistics are wanted
FORWARD = "xxaa ddd t fnn"
FUSED = FORWARD + "b"  # and `beside`
# (dy, x, weight, bias, dx, mean, rstd, terms, dweight, dbias, sizes, has_mean, given, streaming);
# bias is () but for a gate (see numba_gate), terms room for each part's dweight and dbias
BACKWARD = "xxa-x dd d aa t nnn"
GATED = "xxagx dd d aa t nnn"
# And where the gradient in front of the activation goes, or dy, and `beside`.
FUSED_BACKWARD = GATED + "xb"


class Kernel:
    """A function of arrays, built twice where it has a prange: for Numba's threads, and for the
    calling thread alone.

    `letters` are its argument types: x an array like x, a one of the working type, d of float64,
    n an int64, f a float64, t a tuple of as many int64 as it has `sizes`, - the empty tuple, g that
    or a tuple of one a, and b that or what is beside (see numba_activations)."""

    def __init__(self, function, letters, sizes, parallel, allocates):
        self.letters = letters.replace(" ", "")
        self.may_be_gated = "g" in letters
        self.may_be_fused = "b" in letters
        self.sizes = sizes
        options = OPTIONS | {"cache": True} | ({} if allocates else UNCOUNTED)
        self.serial = njit(**options)(_named(function, "serial"))
        self.parallel = self.serial
        if parallel:
            self.parallel = njit(parallel=PARALLEL, **options)(_named(function, "parallel"))
        KERNELS.append(self)

    def signatures(self, dtype):
        """The argument types of all calls with arrays of `dtype`."""
        kinds = {
            "x": numba.from_dtype(TABLE[np.dtype(dtype)].bits)[::1],
            "a": numba.from_dtype(TABLE[np.dtype(dtype)].work)[::1],
            "d": types.float64[::1],
            "n": types.int64,
            "f": types.float64,
            "t": types.UniTuple(types.int64, self.sizes),
            "-": types.Tuple(()),
        }
        nothing = types.Tuple(())
        gate = types.UniTuple(kinds["a"], 1)
        beside = types.Tuple((kinds["x"], types.int64, types.float64, types.int64))
        ways = [(nothing, nothing)]
        if self.may_be_gated:
            ways.append((gate, nothing))
        if self.may_be_fused:
            ways.append((gate if self.may_be_gated else nothing, beside))
        return [
            tuple((kinds | {"g": gate, "b": beside})[letter] for letter in self.letters)
            for gate, beside in ways
        ]

    def compile(self, dtype):
        """Both builds for arrays of `dtype`, or from the cache on disk."""
        for signature in self.signatures(dtype):
            for build in {self.parallel, self.serial}:
                build.compile(signature)


def kernel(letters, sizes=5, parallel=True, allocates=False):
    return lambda function: Kernel(function, letters, sizes, parallel, allocates)


# ---- threads ---------------------------------------------------------------------------------
#
# Numba's layers differ: workqueue ends the process when two threads enter it, GNU OpenMP when a
# forked child does. So one call at a time has the threads, others meanwhile and all calls of a
# forked child compute in their own thread.

_threads = threading.Lock()
_forked = False


def _after_fork():
    global _forked, _threads
    _forked = True
    _threads = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads_of(num_threads, size):
    """How many threads a call has that moves so many bytes."""
    most = numba.config.NUMBA_NUM_THREADS
    return min(num_threads or most, most) if size >= SERIAL_BYTES else 1


def shared_evenly(units):
    """About as many units of work, as many for each of 2 threads, or, where they are many, of 4
    or 8."""
    if units > 8:
        return units - units % (8 if units > 16 else 4)
    return units + units % 2 if units > 1 else units


def launch(kernel, threads, *arguments):
    """The kernel on so many threads, where they are free."""
    if threads == 1 or _forked or not _threads.acquire(blocking=False):
        kernel.serial(*arguments)
        return
    try:
        before = numba.get_num_threads()
        if before == threads:  # to set them looks itself, and takes longer
            kernel.parallel(*arguments)
            return
        numba.set_num_threads(threads)
        try:
            kernel.parallel(*arguments)
        finally:
            numba.set_num_threads(before)
    finally:
        _threads.release()
