"""The Numba backend: the engine where there is no compiler, and the one to read and to change.

Kernels are compiled at their first call and cached on disk. numba_rows, numba_columns and
numba_across hold the loop orders, numba_words and numba_maps what they are made of, numba_jit how
they are compiled and launched.
"""

import os
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastnorm.backends import BIASED_RUNNING_VAR, GIVEN_STATISTICS, NO_MEAN, NOTHING, RELU
from fastnorm.backends import numba_across as across
from fastnorm.backends import numba_columns as columns
from fastnorm.backends import numba_fused as apart
from fastnorm.backends import numba_masks as masks
from fastnorm.backends import numba_rows as rows
from fastnorm.backends import numba_slabs as slabs
from fastnorm.backends.numba_jit import KERNELS, Kernel, launch, threads_of
from fastnorm.backends.numba_simd import ON_X86, compiled_for
from fastnorm.backends.numba_words import IN_ORDER, STEP
from fastnorm.config import available_threads
from fastnorm.dtypes import TABLE
from fastnorm.geometry import Geometry

FEW = 16  # sets, below which large ones are cut into pieces


@cache
def supports(dtype):
    if dtype not in TABLE:
        return f"no kernels for {dtype}"
    if dtype == np.float16 and ON_X86 and not compiled_for("f16c"):
        return "float16 needs a processor with F16C"
    return None


def kernels():
    """Every kernel, to compile ahead."""
    return KERNELS


def compile_kernel(number, dtype):
    """One of them, in a process of its own."""
    KERNELS[number].compile(dtype)


class _Alias:
    """A writable alias of a read-only array, for which kernels would be compiled again. What it
    stands for is only read."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}


def _flat(array):
    """As a kernel takes it."""
    flat = array if array.ndim == 1 else array.reshape(-1)
    if array.itemsize == 2:  # before the alias: the interface cannot name bfloat16
        flat = flat.view(TABLE[array.dtype].bits)
    return flat if flat.flags.writeable else np.asarray(_Alias(flat))


@lru_cache(maxsize=32)
def _filled(size, work, value):
    return np.full(size, value, work)


def _parameter(array, work, size, otherwise):
    if array is None:
        return _filled(size, work, otherwise)
    return _flat(array if array.dtype == work else array.astype(work))


def _of_type(array, size, work):
    """An array of the working type to write: the given one, where it is."""
    if array is not None and array.dtype == work:
        return array if array.ndim == 1 else array.reshape(-1)
    return np.empty(size, work)


def _with_room(mean, var, rstd, sets):
    """The arrays, and one of its own for each that is not wanted."""
    if mean is None or var is None or rstd is None:
        room = np.empty((3, sets))
        mean = room[0] if mean is None else mean
        var = room[1] if var is None else var
        rstd = room[2] if rstd is None else rstd
    return mean, var, rstd


def _apart(array, written):
    """An array that is read after `written` is: a copy where it is the same."""
    return array.copy() if array is not None and np.shares_memory(array, written) else array


def _bytes_to_count_on(caches, processors):
    """Of the largest of the caches, or what cpu.c counts on where it is that of a large server."""
    *_, second, largest = sorted(caches)
    return largest if largest <= 96 << 20 else min(largest, processors * 2 * second)


@cache
def _last_level_bytes():
    said = os.environ.get("FASTNORM_LAST_LEVEL_BYTES", "")
    if said.isdecimal():
        return int(said)
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return _bytes_to_count_on(sizes, available_threads()) if len(sizes) > 1 else 32 << 20


def _large(moved):
    """Whether so many bytes pass the caches by: they would not stay there. From how large on was
    measured for the native kernels."""
    return moved > _last_level_bytes() // 2


# ---- what is the same for all calls of a geometry ------------------------------------------------


class Plan(NamedTuple):
    kernel: Kernel
    sizes: tuple  # its own integers
    moved: int  # bytes
    threads: int
    large: bool  # outputs pass the caches by, where they are not read again
    work: np.dtype
    channels: int
    sets: int
    has_mean: int
    given: int
    parts: int = 1  # backward: that sum dweight and dbias each for themselves


def _in_columns(geometry):
    one_row = geometry.b == geometry.k == 1 < geometry.g  # of channels that are a set each
    return geometry.i == 1 and (geometry.o > 1 or one_row)


def _as_runs(geometry):
    """A single column is a run."""
    if _in_columns(geometry) and geometry.g * geometry.k == 1:
        return geometry._replace(o=1, i=geometry.o)
    return geometry


def _step(read, cut):
    """See numba_words. What belongs to the columns must stay in the first cache, in order."""
    narrow = cut[1] <= columns.STRIP
    return IN_ORDER if narrow and read > _last_level_bytes() // 4 else STEP


def _planned(geometry, dtype, flags, num_threads, arrays):
    """What forward_plan and backward_plan share; `arrays` are read and written."""
    sets, channels = geometry.b * geometry.g * geometry.s, geometry.g * geometry.k
    moved = arrays * sets * geometry.values * dtype.itemsize
    return {
        "moved": moved,
        "threads": threads_of(num_threads, moved),
        "large": _large(moved),
        "work": TABLE[dtype].work,
        "channels": channels,
        "sets": sets,
        "has_mean": int(not flags & NO_MEAN),
        "given": int(bool(flags & GIVEN_STATISTICS)),
    }


@lru_cache(maxsize=1024)
def forward_plan(geometry, dtype, flags, num_threads):
    geometry = _as_runs(geometry)
    common = _planned(geometry, dtype, flags, num_threads, 2)
    sets, given = common["sets"], common["given"]
    sizes = geometry[:5]
    if geometry.s > 1:
        kernel = across.forward_across
        places, _ = across.cut_strips(geometry, dtype.itemsize, 2)
        sizes = (geometry.b, geometry.k, geometry.s, places)
    elif _in_columns(geometry) or (given and geometry.i == 1):
        cut, tiles = columns.cut_columns(geometry)
        whole = given or (geometry.b == 1 and tiles > 1)
        kernel = columns.forward_tiles if whole else columns.forward_slices
        sizes = (*sizes, *cut, given, common["threads"], _step(common["moved"] // 2, cut))
    elif slabs.serves(geometry, given):
        kernel = slabs.forward_slabs
        sizes = (*sizes, given)
    elif given:
        kernel = rows.forward_given
    elif geometry.i == geometry.o == 1:
        kernel = rows.forward_elements
    elif sets < FEW and geometry.values > rows.TILE:
        kernel = rows.forward_pieces
    else:
        kernel = rows.forward_sets
    return Plan(kernel, sizes, **common)


@lru_cache(maxsize=1024)
def backward_plan(geometry, dtype, flags, num_threads):
    geometry = _as_runs(geometry)
    common = _planned(geometry, dtype, flags, num_threads, 3)
    sizes = geometry[:5]
    parts = geometry.b
    if geometry.s > 1:
        kernel = across.backward_across
        places, parts = across.cut_strips(geometry, dtype.itemsize, 3)
        sizes = (geometry.b, geometry.k, geometry.s, places, parts)
    elif _in_columns(geometry):
        kernel = columns.backward_tiles
        cut, _ = columns.cut_columns(geometry)
        step = _step(common["moved"] // 3 * 2, cut)
        sizes = (*sizes, *cut, common["given"], common["threads"], step)
    elif slabs.serves(geometry):
        kernel = slabs.backward_slabs
    elif geometry.i == geometry.o == 1:
        kernel = rows.backward_elements
        parts = rows.parts_of(geometry)
        sizes = (*sizes, parts)
    elif common["sets"] < FEW and geometry.values > rows.TILE:
        kernel = rows.backward_pieces
    else:
        kernel = rows.backward_sets
    return Plan(kernel, sizes, **common, parts=parts)


# ---- calls -----------------------------------------------------------------------------------


def forward(
    geometry, x, y, weight, bias, eps, mean, var, rstd, running_mean, running_var, momentum, flags,
    num_threads, fused=NOTHING,
):
    if x.size == 0:
        for statistic in (mean, var, rstd):
            if statistic is not None:
                statistic[:] = 0
        return
    if fused is not NOTHING:
        _forward_beside(geometry, x, y, weight, bias, eps, mean, var, rstd, running_mean,
                        running_var, momentum, flags, num_threads, fused)
        return
    _normalize(geometry, x, y, weight, bias, eps, mean, var, rstd, running_mean, running_var,
               momentum, flags, num_threads)


def _normalize(
    geometry, x, y, weight, bias, eps, mean, var, rstd, running_mean, running_var, momentum, flags,
    num_threads, terms=(), beside=(),
):
    """A forward with nothing beside it, or what its kernel may have; of rows also one of x = the
    sum of two terms. Where y is empty only the statistics are found."""
    plan = forward_plan(geometry, x.dtype, flags, num_threads)
    mean, var, rstd = _with_room(mean, var, rstd, plan.sets)
    if plan.given:
        mean[:], var[:] = running_mean, running_var
    kernel = rows.forward_sums if terms else plan.kernel
    large = plan.large or (bool(beside) and _large(plan.moved // 2 * 3))
    shared = large and any(np.may_share_memory(y, array) for array in (x, *terms, *beside[:1]))
    launch(
        kernel, plan.threads, *map(_flat, (*terms, x, y)),
        _parameter(weight, plan.work, plan.channels, 1),
        _parameter(bias, plan.work, plan.channels, 0), mean, var, rstd, plan.sizes, eps,
        plan.has_mean, int(large and not shared), *((beside,) if kernel.may_be_fused else ()),
    )
    if plan.given or (running_mean is None and running_var is None):
        return
    values = geometry.values
    factor = 1.0 if flags & BIASED_RUNNING_VAR else values / max(values - 1, 1)
    for running, found, by in ((running_mean, mean, 1.0), (running_var, var, factor)):
        if running is not None:
            moved = running if running.dtype == plan.work else running.astype(plan.work)
            rows.move_running.serial(moved, found, geometry.b, by, momentum)
            if moved is not running:
                running[:] = moved


def backward(
    geometry, dy, x, weight, mean, rstd, dx, dweight, dbias, flags, num_threads, fused=NOTHING
):
    if x.size == 0:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient[:] = 0
        return
    if fused is not NOTHING:
        _backward_beside(geometry, dy, x, weight, mean, rstd, dx, dweight, dbias, flags,
                         num_threads, fused)
        return
    _differentiate(geometry, dy, x, weight, None, mean, rstd, dx, dweight, dbias, flags,
                   num_threads)


def _differentiate(
    geometry, dy, x, weight, found_bias, mean, rstd, dx, dweight, dbias, flags, num_threads,
    gated=False, before=None, beside=(),
):
    """A backward with nothing beside, through ReLU alone, `gated`, or with what its kernel may
    have beside it; the gradient in front of the activation goes to `before` then."""
    plan = backward_plan(geometry, x.dtype, flags, num_threads)
    bias = ()
    if gated or (beside and plan.kernel.may_be_gated):
        bias = (_parameter(found_bias, plan.work, plan.channels, 0),)
    into_w = _of_type(dweight, plan.channels, plan.work)
    into_b = _of_type(dbias, plan.channels, plan.work)
    before = dy if before is None else before
    read = (x, dy, before, *beside[:1])
    shared = plan.large and any(np.may_share_memory(dx, array) for array in read)
    more = (_flat(before), beside) if plan.kernel.may_be_fused else ()
    launch(
        plan.kernel, plan.threads, _flat(dy), _flat(x),
        _parameter(weight, plan.work, plan.channels, 1), bias, _flat(dx),
        _flat(mean) if plan.has_mean else np.zeros(plan.sets), _flat(rstd),
        np.empty(2 * plan.parts * plan.channels), into_w, into_b, plan.sizes, plan.has_mean,
        plan.given, int(plan.large and not shared), *more,
    )
    for gradient, found in ((dweight, into_w), (dbias, into_b)):
        if gradient is not None and gradient.dtype != plan.work:
            gradient[...] = found.reshape(gradient.shape)


# ---- calls with something beside -------------------------------------------------------------
#
# Sets across with anything beside are computed as rows of a transposed copy: two more passes over
# memory each way.


def _turns(geometry, fused):
    beside = fused.activation or fused.residual is not None or fused.mask is not None
    return geometry.s > 1 and beside


def _turn(geometry, array):
    if array is None:
        return None
    return np.ascontiguousarray(array.reshape(geometry.b, geometry.k, geometry.s).swapaxes(1, 2))


def _turned(geometry, arrays, fused):
    """The geometry, arrays and Fused of rows."""
    rows_of = Geometry(geometry.b * geometry.s, 1, 1, geometry.k, 1)
    fused = fused._replace(
        residual=_turn(geometry, fused.residual), dresidual=_turn(geometry, fused.dresidual)
    )
    return rows_of, [_turn(geometry, array) for array in arrays], fused


def _turn_back(geometry, turned, into):
    shape = geometry.b, geometry.s, geometry.k
    into.reshape(geometry.b, geometry.k, geometry.s)[...] = turned.reshape(shape).swapaxes(1, 2)


def _beside(x, residual, fused):
    """See numba_activations."""
    return (_flat(x if residual is None else residual), fused.activation, fused.slope,
            int(residual is not None))


def _forward_beside(
    geometry, x, y, weight, bias, eps, mean, var, rstd, running_mean, running_var, momentum, flags,
    num_threads, fused,
):
    last = (running_mean, running_var, momentum, flags, num_threads)
    if _turns(geometry, fused):
        rows_of, turned, fused = _turned(geometry, (x,), fused)
        into = np.empty_like(turned[0])
        forward(rows_of, *turned, into, weight, bias, eps, mean, var, rstd, *last, fused)
        _turn_back(geometry, into, y)
        return
    if fused.mask is not None:
        masks.forward(forward, geometry, x, y, weight, bias, eps, (mean, var, rstd),
                      (running_mean, running_var), momentum, flags, num_threads, fused)
        return
    terms, residual = (), fused.residual
    if fused.sum is not None:
        terms, x, residual = (x, residual), fused.sum, None
    mapped = bool(fused.activation or residual is not None)
    if mapped and forward_plan(geometry, x.dtype, flags, num_threads).kernel.may_be_fused:
        beside = _beside(x, residual, fused)
        _normalize(geometry, x, y, weight, bias, eps, mean, var, rstd, *last, beside=beside)
        return
    mean, var, rstd = _with_room(mean, var, rstd, geometry.b * geometry.g * geometry.s)
    _normalize(geometry, x, x.reshape(-1)[:0] if mapped else y, weight, bias, eps, mean, var, rstd,
               *last, terms)
    if mapped:
        _map_fused(geometry, None, x, residual, weight, bias, y, mean, rstd, fused, num_threads)


def _map_fused(geometry, dy, x, residual, weight, bias, into, mean, rstd, fused, num_threads):
    """The map of a forward; of a backward with dy."""
    geometry = _as_runs(geometry)
    work, channels = TABLE[x.dtype].work, geometry.g * geometry.k
    arrays = [array for array in (dy, x, residual, into) if array is not None]
    moved = len(arrays) * x.nbytes
    streaming = dy is None and _large(moved) and not any(
        np.may_share_memory(into, array) for array in arrays[:-1])
    threads = threads_of(num_threads, moved)
    launch(
        apart.kernel_of(geometry), threads, _flat(x if dy is None else dy),
        _flat(x), _flat(x if residual is None else residual), _parameter(weight, work, channels, 1),
        _parameter(bias, work, channels, 0), _flat(into), _flat(mean), _flat(rstd),
        geometry[:5], fused.activation, fused.slope, int(residual is not None),
        int(dy is not None), int(streaming), threads,
    )


def _backward_beside(
    geometry, dy, x, weight, mean, rstd, dx, dweight, dbias, flags, num_threads, fused
):
    if _turns(geometry, fused):
        given = fused
        rows_of, turned, fused = _turned(geometry, (dy, x), fused)
        into = np.empty_like(turned[0])
        backward(rows_of, *turned, weight, mean, rstd, into, dweight, dbias, flags, num_threads,
                 fused)
        _turn_back(geometry, into, dx)
        if fused.dresidual is not None:
            _turn_back(geometry, fused.dresidual, given.dresidual)
        return
    if fused.mask is not None:
        masks.backward(backward, geometry, dy, x, weight, mean, rstd, dx, dweight, dbias, flags,
                       num_threads, fused)
        return
    dsum = _apart(fused.dsum, dx)
    kernel = backward_plan(geometry, x.dtype, flags, num_threads).kernel
    gated = fused.activation == RELU and fused.residual is None and kernel.may_be_gated
    beside = ()
    dz = dx if fused.dresidual is None else fused.dresidual
    if fused.activation and kernel.may_be_fused and not gated:
        beside = _beside(x, fused.residual, fused)
    elif fused.activation and not gated:
        found = np.zeros(rstd.size) if flags & NO_MEAN else mean
        _map_fused(geometry, dy, x, fused.residual, weight, fused.bias, dz, found, rstd, fused,
                   num_threads)
        dy = dz
    _differentiate(geometry, dy, x, weight, fused.bias, mean, rstd, dx, dweight, dbias, flags,
                   num_threads, gated, dz if beside else None, beside)
    if dsum is not None:
        dx += dsum.reshape(dx.shape)
