"""The Numba backend: the engine where there is no compiler, and the one to read and to change.

Kernels are compiled at their first call and cached on disk. numba_rows, numba_columns and
numba_across hold the loop orders, numba_words what they are made of, numba_jit how they are
compiled and launched.
"""

import os
import platform
from functools import cache
from pathlib import Path

import numba
import numpy as np
from llvmlite.binding import get_host_cpu_features

from fastnorm.backends import BIASED_RUNNING_VAR, GIVEN_STATISTICS, NO_MEAN, NOTHING
from fastnorm.backends import numba_across as across
from fastnorm.backends import numba_columns as columns
from fastnorm.backends import numba_fused as after
from fastnorm.backends import numba_masks as masks
from fastnorm.backends import numba_rows as rows
from fastnorm.backends import numba_slabs as slabs
from fastnorm.backends.numba_jit import KERNELS, launched, threads_of
from fastnorm.dtypes import TABLE
from fastnorm.geometry import Geometry

FEW = 16  # sets, below which large ones are cut into pieces


@cache
def supports(dtype):
    if dtype not in TABLE:
        return f"no kernels for {dtype}"
    features = numba.config.CPU_FEATURES
    features = get_host_cpu_features().flatten() if features is None else features
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    if dtype == np.float16 and on_x86 and "+f16c" not in features:
        return "float16 needs a processor with F16C"
    return None


def kernels():
    """Every kernel, to compile ahead."""
    return KERNELS


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


def _parameter(array, work, size, otherwise):
    if array is None:
        return np.full(size, otherwise, work)
    return _flat(array if array.dtype == work else array.astype(work))


def _of_type(array, size, work):
    """An array of the working type to write: the given one, where it is."""
    if array is not None and array.dtype == work:
        return array.reshape(-1)
    return np.empty(size, work)


def _apart(array, written):
    """An array that is read after `written` is: a copy where it is the same."""
    return array.copy() if array is not None and np.shares_memory(array, written) else array


def _statistic(array, size):
    return np.empty(size) if array is None else array


@cache
def _last_level_bytes():
    """Of the processor's largest cache."""
    said = os.environ.get("FASTNORM_LAST_LEVEL_BYTES", "")
    if said.isdecimal():
        return int(said)
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes[1:] or sizes)


def _streaming(moved, into, *read):
    """1 where outputs pass the caches by: they would not stay there, nor are they read again. From
    how large on was measured for the native kernels."""
    large = moved > _last_level_bytes() // 8 * 5
    return int(large and all(into.ctypes.data != a.ctypes.data for a in read))


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


def _in_columns(geometry):
    return geometry.i == 1 and geometry.o > 1


def forward(
    geometry, x, y, weight, bias, eps, mean, var, rstd, running_mean, running_var, momentum, flags,
    num_threads, fused=NOTHING,
):
    if _turns(geometry, fused):
        rows_of, turned, fused = _turned(geometry, (x,), fused)
        into = np.empty_like(turned[0])
        forward(rows_of, *turned, into, weight, bias, eps, mean, var, rstd, running_mean,
                running_var, momentum, flags, num_threads, fused)
        _turn_back(geometry, into, y)
        return
    if fused.mask is not None and x.size > 0:
        masks.forward(forward, geometry, x, y, weight, bias, eps, (mean, var, rstd),
                      (running_mean, running_var), momentum, flags, num_threads, fused)
        return
    sets, channels = geometry.b * geometry.g * geometry.s, geometry.g * geometry.k
    residual = None
    if fused.sum is not None:
        x = np.add(x, fused.residual, out=fused.sum)
    elif fused.residual is not None:
        residual = _apart(fused.residual, y)
    mean, var, rstd = _statistic(mean, sets), _statistic(var, sets), _statistic(rstd, sets)
    if x.size == 0:
        mean[:] = var[:] = rstd[:] = 0
        return
    given, has_mean = int(bool(flags & GIVEN_STATISTICS)), int(not flags & NO_MEAN)
    if given:
        mean[:], var[:] = running_mean, running_var
    work = TABLE[x.dtype].work
    weight = _parameter(weight, work, channels, 1)
    bias = _parameter(bias, work, channels, 0)
    again = x.itemsize == 2 and (fused.activation or residual is not None)
    flat = (_flat(_apart(x, y) if again else x), _flat(y))
    sizes = geometry[:5]
    streaming = _streaming(2 * x.nbytes, y, x)
    with launched(num_threads, 2 * x.nbytes) as run:
        if geometry.s > 1:
            places, _ = across.cut_strips(geometry, x.itemsize, 2)
            run(across.forward_across, *flat, weight, bias, mean, var, rstd, sizes, eps, geometry.s,
                places, has_mean, streaming)
        elif _in_columns(geometry):
            statistics = (mean, var, rstd)
            _forward_columns(run, geometry, flat, weight, bias, eps, statistics, has_mean, given,
                             streaming, threads_of(num_threads))
        elif slabs.serves(geometry):
            run(slabs.forward_slabs, *flat, weight, bias, mean, var, rstd, sizes, eps, has_mean,
                given, streaming)
        elif not given and geometry.i == geometry.o == 1:
            run(rows.forward_elements, *flat, weight, bias, mean, var, rstd, sizes, eps, has_mean,
                streaming)
        elif given or (sets < FEW and geometry.values > rows.TILE):
            pieces = 0 if given else rows.pieces_in(geometry.k * geometry.i)
            about = np.empty(sets)
            partial = np.empty(2 * geometry.b * geometry.o * geometry.g * pieces)
            run(rows.forward_pieces, *flat, weight, bias, about, partial, mean, var, rstd, sizes,
                eps, has_mean, given, streaming)
        else:
            run(rows.forward_sets, *flat, weight, bias, mean, var, rstd, sizes, eps, has_mean,
                streaming)
        if fused.activation or residual is not None:
            has_residual = int(residual is not None)
            beside = _flat(residual) if has_residual else flat[0]
            last = (fused.activation, fused.slope, has_residual)
            if again:
                run(after.finish_again, flat[0], flat[0], beside, weight, bias, flat[1],
                    after.room_for_z(geometry, work), mean, rstd, sizes, *last, 0)
            else:
                run(after.finish, flat[1], beside, *last)
    if given or (running_mean is None and running_var is None):
        return
    values = geometry.values
    factor = 1.0 if flags & BIASED_RUNNING_VAR else values / max(values - 1, 1)
    for running, found, by in ((running_mean, mean, 1.0), (running_var, var, factor)):
        if running is not None:
            moved = running if running.dtype == work else running.astype(work)
            rows.move_running.serial(moved, found, geometry.b, by, momentum)
            if moved is not running:
                running[:] = moved


def _forward_columns(run, geometry, flat, weight, bias, eps, statistics, has_mean, given,
                     streaming, threads):
    cut, tiles = columns.cut_columns(geometry)
    coefficients = np.empty(geometry.b * 4 * cut[1], weight.dtype)
    partial = np.empty(geometry.b * (1 if given else tiles) * 2 * cut[1])
    last = (weight, bias, coefficients, partial, *statistics, geometry[:5], cut, eps)
    if given or (geometry.b == 1 and tiles > 1):
        run(columns.forward_tiles, *flat, *last, has_mean, given, streaming, threads)
    else:
        run(columns.forward_slices, *flat, *last, has_mean, streaming)


def backward(
    geometry, dy, x, weight, mean, rstd, dx, dweight, dbias, flags, num_threads, fused=NOTHING
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
    if fused.mask is not None and x.size > 0:
        masks.backward(backward, geometry, dy, x, weight, mean, rstd, dx, dweight, dbias, flags,
                       num_threads, fused)
        return
    sets, channels = geometry.b * geometry.g * geometry.s, geometry.g * geometry.k
    if x.size == 0:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient[:] = 0
        return
    given, has_mean = int(bool(flags & GIVEN_STATISTICS)), int(not flags & NO_MEAN)
    mean = _flat(mean) if has_mean else np.zeros(sets)
    rstd = _flat(rstd)
    work = TABLE[x.dtype].work
    weight = _parameter(weight, work, channels, 1)
    dsum = _apart(fused.dsum, dx)
    into = dx
    dy, x, dx = (_flat(array) for array in (dy, x, dx))
    sizes = geometry[:5]
    streaming = _streaming(3 * x.nbytes, dx, x, dy)
    parts = geometry.b
    if geometry.s > 1:
        places, parts = across.cut_strips(geometry, x.itemsize, 3)
    elif geometry.i == geometry.o == 1:
        parts = rows.parts_of(geometry)
    terms = np.empty((2, parts * channels))
    with launched(num_threads, 3 * x.nbytes) as run:
        if fused.activation:
            dz = dx if fused.dresidual is None else _flat(fused.dresidual)
            bias = _parameter(fused.bias, work, channels, 0)
            has_residual = int(fused.residual is not None)
            run(after.finish_again, dy, x, _flat(fused.residual) if has_residual else x, weight,
                bias, dz, after.room_for_z(geometry, work), mean, rstd, sizes, fused.activation,
                fused.slope, has_residual, 1)
            dy = dz
        if geometry.s > 1:
            run(across.backward_across, dy, x, weight, dx, mean, rstd, *terms, sizes, geometry.s,
                places, parts, has_mean, given, streaming)
        elif _in_columns(geometry):
            cut, tiles = columns.cut_columns(geometry)
            coefficients = np.empty(geometry.b * 4 * cut[1], work)
            partial = np.empty(geometry.b * tiles * 2 * cut[1])
            run(columns.backward_tiles, dy, x, weight, dx, coefficients, partial, mean, rstd,
                *terms, sizes, cut, has_mean, given, streaming, threads_of(num_threads))
        elif slabs.serves(geometry):
            run(slabs.backward_slabs, dy, x, weight, dx, mean, rstd, *terms, sizes, has_mean, given,
                streaming)
        elif geometry.i == geometry.o == 1:
            run(rows.backward_elements, dy, x, weight, dx, mean, rstd, *terms, sizes, parts,
                has_mean, given, streaming)
        elif sets < FEW and geometry.values > rows.TILE:
            pieces = rows.pieces_in(geometry.i)
            partial = np.empty(2 * pieces * (x.size // geometry.i))
            hi, scale, shift = np.empty((3, sets), work)
            run(rows.backward_pieces, dy, x, weight, dx, hi, partial, mean, rstd, *terms, scale,
                shift, sizes, has_mean, given, streaming)
        else:
            run(rows.backward_sets, dy, x, weight, dx, mean, rstd, *terms, sizes, has_mean, given,
                streaming)
    if dsum is not None:
        into += dsum.reshape(into.shape)
    into_w, into_b = _of_type(dweight, channels, work), _of_type(dbias, channels, work)
    rows.merge_terms.serial(*terms, into_w, into_b, parts)
    for gradient, found in ((dweight, into_w), (dbias, into_b)):
        if gradient is not None and gradient.dtype != work:
            gradient[...] = found.reshape(gradient.shape)
