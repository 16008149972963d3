"""Whole calls: what functional.py, checks.py and call.py do, for calls in which there is nothing to
look at closely: arrays of one type, contiguous and apart, and arguments of the usual types. Any
doubt is answered with None: they then look themselves, and it is they who refuse."""

cimport numpy as cnp
from cpython.float cimport PyFloat_CheckExact
from cpython.long cimport PyLong_CheckExact
from cpython.tuple cimport PyTuple_CheckExact
from cpython.unicode cimport PyUnicode_CheckExact
from libc.math cimport isfinite
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from fastnorm.backends.native cimport *

from fastnorm import backends, config
from fastnorm.backends import ACTIVATIONS, NOTHING, Fused
from fastnorm.dtypes import TABLE
from fastnorm.geometry import ALIGNED, CHANNELS_FIRST, LINE, batch, group, rows
from fastnorm.results import Gradients, GradientsWithResidual, Statistics

cnp.import_array()

cdef size_t line = LINE
cdef cnp.npy_intp aligned = ALIGNED
# Numbers of C's, which are no objects somewhere else in memory.
cdef int BATCH = backends.BATCH, ROWS = backends.ROWS, NO_MEAN = backends.NO_MEAN
cdef int GIVEN_STATISTICS = backends.GIVEN_STATISTICS, LEAKY_RELU = backends.LEAKY_RELU
cdef int GELU = backends.GELU, GELU_TANH = backends.GELU_TANH
cdef dict channels_first = CHANNELS_FIRST

cdef enum:
    MOST_THREADS = 1 << 16
    KNOWN = 64  # 6 bits
    KNOWN_AXES = 8


cdef object geometry_of(int norm, object shape, bint first, int64_t groups):
    if norm == ROWS:
        return rows(shape, 1)
    return batch(shape, first) if norm == BATCH else group(shape, first, groups)


cdef struct known:
    # A geometry, and what it is of.
    int norm, first, ndim
    int64_t groups
    cnp.npy_intp shape[KNOWN_AXES]
    fastnorm_geometry sizes


# The last ones that geometry.py gave: a large call leaves nothing of Python in the caches, where to
# ask it again took 2 to 6 us.
cdef known[KNOWN] geometries


cdef bint sizes_of(int norm, object x, object layout, object groups,
                   known* found) except -1:
    """Whether there is no doubt about the geometry of a call, which is found then."""
    cdef cnp.npy_intp* shape = cnp.PyArray_DIMS(<cnp.ndarray> x)
    cdef int ndim = cnp.PyArray_NDIM(<cnp.ndarray> x), axis
    cdef int64_t channels
    cdef uint64_t place
    cdef known* old
    if not 0 < ndim <= KNOWN_AXES:
        return False
    memset(found, 0, sizeof(known))
    found.norm, found.ndim = norm, ndim
    memcpy(found.shape, shape, ndim * sizeof(cnp.npy_intp))
    if norm == ROWS:
        if PyTuple_CheckExact(groups) and len(<tuple> groups) == 1:
            groups = (<tuple> groups)[0]
        if not PyLong_CheckExact(groups) or groups != shape[ndim - 1]:
            return False
    else:
        first = channels_first.get(layout) if PyUnicode_CheckExact(layout) else None
        if first is None or ndim < 2:
            return False
        found.first = first
        channels = shape[1 if found.first else ndim - 1]
        if norm != BATCH and groups is None:  # instance norm
            found.groups = channels
        elif norm != BATCH:
            if not PyLong_CheckExact(groups) or not 0 < groups <= channels:
                return False
            found.groups = groups
            if channels % found.groups != 0:
                return False
    place = 0
    for axis in range(ndim):  # Fibonacci hashing: sizes are often multiples of powers of two
        place = (place ^ <uint64_t> shape[axis]) * <uint64_t> 11400714819323198485
    old = &geometries[place >> 58]
    if memcmp(old, found, sizeof(known) - sizeof(fastnorm_geometry)) != 0:
        load_geometry(&found.sizes, geometry_of(norm, x.shape, found.first, found.groups))
        old[0] = found[0]
    found.sizes = old.sizes
    return True


cdef object engine_of(object backend, object dtype):
    """The module that serves, "native" for this one; None where there is a doubt."""
    if backend is None:
        backend = config._default_backend
    if backend is None:
        backend = config._chosen.get(dtype)
    if not PyUnicode_CheckExact(backend):
        return None
    if backend == "native":
        return backend
    if backend not in backends.NAMES or backends.refusal(backend, dtype) is not None:
        return None
    return backends.load(backend)


cdef int threads_of(object num_threads) except -2:
    """How many threads were asked for; -1 where there is a doubt."""
    if num_threads is None:
        return config._num_threads
    if not PyLong_CheckExact(num_threads) or not 0 <= num_threads <= MOST_THREADS:
        return -1
    return num_threads


cdef int kind_of(object array) except -1:
    """NumPy's number of the type of an ndarray that kernels read; 0, which no such type has, where
    it is in doubt."""
    cdef int kind
    if not cnp.PyArray_CheckExact(array):
        return 0
    kind = cnp.PyArray_TYPE(<cnp.ndarray> array)
    if kind != cnp.NPY_FLOAT32 and array.dtype not in TABLE:
        return 0
    return kind if simple(array, kind) else 0


cdef int kind_of_first(tuple arrays, int otherwise) except -1:
    for array in arrays:
        if array is not None:
            return kind_of(array)
    return otherwise


cdef inline bint one_for_each(object array, int kind, int64_t size) noexcept:
    """Of the channels, or None."""
    return array is None or (simple(array, kind) and cnp.PyArray_NDIM(<cnp.ndarray> array) == 1
                             and cnp.PyArray_DIM(<cnp.ndarray> array, 0) == size)


cdef inline bint apart_from(cnp.ndarray a, object b) noexcept:
    return b is None or apart(a, <cnp.ndarray> b)


cdef inline bint may_receive(object out, cnp.ndarray x, object other) noexcept:
    """out is None, or like x, writable, and x or other or apart from them."""
    if out is None:
        return True
    return (is_like(out, x) and cnp.PyArray_ISWRITEABLE(<cnp.ndarray> out) and may_be(out, x)
            and may_be(out, other))


cdef int activation_of(object activation, object slope, object approximate) except -2:
    """The fastnorm_activation of the arguments; -1 where there is a doubt."""
    if activation is None:
        kind = 0
    else:
        kind = ACTIVATIONS.get(activation, -1) if PyUnicode_CheckExact(activation) else -1
    if kind == LEAKY_RELU and not (PyFloat_CheckExact(slope) and isfinite(<double> slope)):
        return -1
    if approximate == "none":
        return kind
    if approximate == "tanh":
        return GELU_TANH if kind == GELU else kind
    return -1


cdef inline bint may_be(object out, object other) noexcept:
    """out is None, or the same memory, or apart."""
    return (out is None or other is None or data(out) == data(other)
            or apart(<cnp.ndarray> out, <cnp.ndarray> other))


cdef inline bint may_move(object running, cnp.ndarray x, object out, object weight, object bias,
                          object other, object residual) noexcept:
    return running is None or (
        cnp.PyArray_ISWRITEABLE(<cnp.ndarray> running) and apart(<cnp.ndarray> running, x)
        and apart_from(<cnp.ndarray> running, out) and apart_from(<cnp.ndarray> running, weight)
        and apart_from(<cnp.ndarray> running, bias) and apart_from(<cnp.ndarray> running, other)
        and apart_from(<cnp.ndarray> running, residual))


cdef bint may_hand_out(int kind_after, object dy, cnp.ndarray x, object weight, object bias,
                       object out, object residual, object out_residual, object dsum) except -1:
    """Whether a backward may write where it is to, beside what may_receive says of out."""
    if not ((dsum is None or is_like(dsum, x)) and may_be(out, dsum)
            and (out is None or apart_from(<cnp.ndarray> out, bias))):
        return False
    if residual is None:  # dz is written where dx will be, before x and dsum are read
        return out_residual is None and (kind_after == 0 or out is None or (
            apart(<cnp.ndarray> out, x) and apart_from(<cnp.ndarray> out, dsum)))
    if kind_after == 0 or not is_like(residual, x) or not may_be(out, residual):
        return False
    return out_residual is None or (
        may_receive(out_residual, x, dy) and may_be(out_residual, residual)
        and apart(<cnp.ndarray> out_residual, x) and apart_from(<cnp.ndarray> out_residual, out)
        and apart_from(<cnp.ndarray> out_residual, weight)
        and apart_from(<cnp.ndarray> out_residual, bias))


cdef inline object room_like(object x):
    """geometry.empty, sooner."""
    cdef int ndim = cnp.PyArray_NDIM(<cnp.ndarray> x), kind = cnp.PyArray_TYPE(<cnp.ndarray> x)
    cdef cnp.npy_intp* shape = cnp.PyArray_DIMS(<cnp.ndarray> x)
    cdef cnp.npy_intp size = cnp.PyArray_NBYTES(<cnp.ndarray> x) + line - 1
    cdef object memory, room
    cdef char* first
    if size < aligned:
        return cnp.PyArray_EMPTY(ndim, shape, kind, 0)
    memory = cnp.PyArray_EMPTY(1, &size, cnp.NPY_UINT8, 0)
    first = cnp.PyArray_BYTES(<cnp.ndarray> memory)
    room = cnp.PyArray_SimpleNewFromData(ndim, shape, kind, first + -<size_t> first % line)
    cnp.set_array_base(<cnp.ndarray> room, memory)
    return room


cdef inline int statistics_axes(int norm, cnp.ndarray x, fastnorm_geometry* sizes,
                                cnp.npy_intp* shape) noexcept:
    """Their number, and into shape their lengths."""
    cdef int axis
    if norm == ROWS:
        for axis in range(cnp.PyArray_NDIM(x) - 1):
            shape[axis] = cnp.PyArray_DIM(x, axis)
        return cnp.PyArray_NDIM(x) - 1
    shape[0] = sizes.g if norm == BATCH else sizes.b
    shape[1] = sizes.g
    return 1 if norm == BATCH else 2


def whole_forward(int norm, x, out, layout, groups, weight, bias, eps, running_mean, running_var,
                  momentum, int flags, return_stats, backend, num_threads, activation=None,
                  slope=None, approximate="none", residual=None, out_sum=None):
    """y, or (y, sum of rows with a residual, Statistics); None where something must be looked at.
    groups: None of instance norm, and normalized_shape of rows."""
    cdef known asked
    cdef fastnorm_geometry* sizes = &asked.sizes
    cdef cnp.npy_intp shape[64]
    cdef int kind, param_kind, kind_after, threads, axes
    cdef bint given = flags & GIVEN_STATISTICS
    kind = kind_of(x)
    param_kind = kind_of_first((weight, bias, running_mean, running_var), kind)
    if kind == 0 or param_kind == 0:
        return None
    if eps is None and flags & NO_MEAN:
        eps = float(TABLE[x.dtype].eps)  # RMS norm's default
    if not PyFloat_CheckExact(eps) or not isfinite(<double> eps):
        return None
    if not PyFloat_CheckExact(momentum) or not isfinite(<double> momentum):
        return None
    engine = engine_of(backend, x.dtype)
    threads = threads_of(num_threads)
    if (
            engine is None or threads < 0 or not sizes_of(norm, x, layout, groups, &asked)
            or cnp.PyArray_SIZE(<cnp.ndarray> x) == 0):
        return None
    if not (one_for_each(weight, param_kind, sizes.g * sizes.k)
            and one_for_each(bias, param_kind, sizes.g * sizes.k)
            and one_for_each(running_mean, param_kind, sizes.g)
            and one_for_each(running_var, param_kind, sizes.g)):
        return None
    kind_after = activation_of(activation, slope, approximate)
    if (kind_after < 0 or not (residual is None or is_like(residual, <cnp.ndarray> x))
            or not may_receive(out, <cnp.ndarray> x, residual)):
        return None
    if out_sum is not None and not (
            residual is not None and may_receive(out_sum, <cnp.ndarray> x, residual)
            and apart_from(<cnp.ndarray> out_sum, weight)
            and apart_from(<cnp.ndarray> out_sum, bias) and apart_from(<cnp.ndarray> out_sum, out)):
        return None
    if out is not None and not (apart_from(<cnp.ndarray> out, weight)
                                and apart_from(<cnp.ndarray> out, bias)
                                and apart_from(<cnp.ndarray> out, running_mean)
                                and apart_from(<cnp.ndarray> out, running_var)):
        return None
    if given:
        if running_mean is None or running_var is None:
            return None
    elif norm == BATCH or groups is None:
        if <double> eps <= 0 or sizes.o * sizes.k * sizes.i < 2:
            return None
        if running_mean is not None or running_var is not None:
            if sizes.b > 1 or not (
                    may_move(running_mean, x, out, weight, bias, running_var, residual)
                    and may_move(running_var, x, out, weight, bias, running_mean, residual)):
                return None
    y = room_like(x) if out is None else out
    fused, total = NOTHING, None
    if residual is not None and norm == ROWS:
        total = room_like(x) if out_sum is None else out_sum
    if kind_after or residual is not None:
        fused = Fused(kind_after, slope if kind_after == LEAKY_RELU else 0.0, residual, total)
    mean = var = rstd = None
    if return_stats:
        axes = statistics_axes(norm, <cnp.ndarray> x, sizes, shape)
        mean = cnp.PyArray_EMPTY(axes, shape, cnp.NPY_FLOAT64, 0)
        var = cnp.PyArray_EMPTY(axes, shape, cnp.NPY_FLOAT64, 0)
        rstd = cnp.PyArray_EMPTY(axes, shape, cnp.NPY_FLOAT64, 0)
    if engine == "native":
        run_forward(sizes, x, y, weight, bias, eps, mean, var, rstd, running_mean, running_var,
                    momentum, flags, threads, fused)
    else:
        found = geometry_of(norm, x.shape, asked.first, asked.groups)
        flat = None, None, None
        if return_stats:
            flat = mean.reshape(-1), var.reshape(-1), rstd.reshape(-1)
        engine.forward(found, x, y, weight, bias, eps, *flat, running_mean, running_var, momentum,
                       flags, threads, fused)
    if total is None:
        return (y, Statistics(mean, var, rstd, given)) if return_stats else y
    return (y, total, Statistics(mean, var, rstd, given)) if return_stats else (y, total)


def whole_backward(int norm, dy, x, stats, layout, groups, weight, bias, out, int flags, backend,
                   num_threads, activation=None, slope=None, approximate="none", residual=None,
                   out_residual=None, dsum=None):
    """Gradients, with a residual GradientsWithResidual; None where something must be looked at.
    bias matters to activations alone, but one that does not fit is a slip."""
    cdef known asked
    cdef fastnorm_geometry* sizes = &asked.sizes
    cdef cnp.npy_intp shape[64]
    cdef cnp.npy_intp channels
    cdef int kind, param_kind, kind_after, threads, axes, axis
    kind = kind_of(x)
    param_kind = kind_of_first((weight,), kind)
    if kind == 0 or param_kind == 0 or type(stats) is not Statistics:
        return None
    engine = engine_of(backend, x.dtype)
    threads = threads_of(num_threads)
    if (
            engine is None or threads < 0 or not sizes_of(norm, x, layout, groups, &asked)
            or cnp.PyArray_SIZE(<cnp.ndarray> x) == 0):
        return None
    channels = sizes.g * sizes.k
    if not (is_like(dy, <cnp.ndarray> x) and one_for_each(weight, param_kind, channels)
            and one_for_each(bias, param_kind, channels)
            and may_receive(out, <cnp.ndarray> x, dy)
            and (out is None or apart_from(<cnp.ndarray> out, weight))):
        return None
    kind_after = activation_of(activation, slope, approximate)
    if kind_after < 0 or not may_hand_out(
            kind_after, dy, <cnp.ndarray> x, weight, bias, out, residual, out_residual, dsum):
        return None
    mean, rstd = stats.mean, stats.rstd
    axes = statistics_axes(norm, <cnp.ndarray> x, sizes, shape)
    for array in (mean, rstd):
        if not simple(array, cnp.NPY_FLOAT64) or cnp.PyArray_NDIM(<cnp.ndarray> array) != axes:
            return None
        for axis in range(axes):
            if cnp.PyArray_DIM(<cnp.ndarray> array, axis) != shape[axis]:
                return None
        for into in (out, out_residual):
            if into is not None and not apart(<cnp.ndarray> into, <cnp.ndarray> array):
                return None
    if stats.given:
        flags |= GIVEN_STATISTICS
    dx = room_like(x) if out is None else out
    fused, dresidual = NOTHING, None
    if residual is not None:
        dresidual = room_like(x) if out_residual is None else out_residual
    if kind_after or dsum is not None:
        fused = Fused(kind_after, slope if kind_after == LEAKY_RELU else 0.0, residual, None, bias,
                      dresidual, dsum)
    dweight = cnp.PyArray_EMPTY(1, &channels, param_kind, 0)
    dbias = None if flags & NO_MEAN else cnp.PyArray_EMPTY(1, &channels, param_kind, 0)
    if engine == "native":
        run_backward(sizes, dy, x, weight, mean, rstd, dx, dweight, dbias, flags, threads, fused)
    else:
        found = geometry_of(norm, x.shape, asked.first, asked.groups)
        engine.backward(found, dy, x, weight, mean, rstd, dx, dweight, dbias, flags, threads, fused)
    if residual is None:
        return Gradients(dx, dweight, dbias)
    return GradientsWithResidual(dx, dweight, dbias, dresidual)
