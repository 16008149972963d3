"""The native backend: a client of fastnorm.h, like any other."""

cimport numpy as cnp
from libc.stdint cimport int64_t
from libc.string cimport memset

from fastnorm.backends import NOTHING
from fastnorm.dtypes import TABLE

cnp.import_array()


# The level that calls run at: 0 the best, or 2, 3, 4. Tests set it to reach every level.
isa = 0


def isa_name():
    """The level that isa = 0 stands for: "v2", "v3", "v4" or "baseline"."""
    return fastnorm_isa_name().decode()


def version():
    """Version of the library that was loaded, as major*10000 + minor*100 + patch."""
    return fastnorm_version()


def supports(dtype):
    return None if dtype in TABLE else f"no kernels for {dtype}"


cdef inline int code(object array) except -1:
    """fastnorm_dtype of an array of floats; 0 of None."""
    if array is None:
        return 0
    if cnp.PyArray_TYPE(<cnp.ndarray> array) == cnp.NPY_FLOAT32:
        return FASTNORM_FLOAT32
    return TABLE[array.dtype].code


def plain(cnp.ndarray x, out, tuple parameters, tuple beside=()):
    """Whether all arrays are contiguous, aligned and of one type, and `out`, where there is one,
    has x's shape, is writable and shares no memory but with the whole of x or of an array beside
    it, which have x's shape. x's type is one of the table. A quick yes: no means that call.py
    must look closer."""
    cdef int kind = cnp.PyArray_TYPE(x)
    if not simple(x, kind):
        return False
    for array in parameters + beside:
        if array is not None and not simple(array, kind):
            return False
    if out is None:
        return True
    if not is_like(out, x) or not cnp.PyArray_ISWRITEABLE(<cnp.ndarray> out):
        return False
    if data(out) != data(x) and not apart(<cnp.ndarray> out, x):
        return False
    for array in beside:
        if (array is not None and data(out) != data(array)
                and not apart(<cnp.ndarray> out, <cnp.ndarray> array)):
            return False
    for array in parameters:
        if array is not None and not apart(<cnp.ndarray> out, <cnp.ndarray> array):
            return False
    return True


def fits(int64_t size, arrays):
    """Whether each of the arrays is None or an ndarray of `size` floats. A quick yes, as plain."""
    for array in arrays:
        if array is not None and not (
                cnp.PyArray_CheckExact(array) and cnp.PyArray_NDIM(<cnp.ndarray> array) == 1
                and cnp.PyArray_TYPE(<cnp.ndarray> array) in (cnp.NPY_FLOAT32, cnp.NPY_FLOAT64)
                and cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray> array)
                and cnp.PyArray_DIM(<cnp.ndarray> array, 0) == size):
            return False
    return True


def holds(array, tuple shape):
    """Whether it is a contiguous ndarray of float64 of this shape. A quick yes, as plain."""
    cdef int axis
    if not simple(array, cnp.NPY_FLOAT64) or cnp.PyArray_NDIM(<cnp.ndarray> array) != len(shape):
        return False
    for axis in range(cnp.PyArray_NDIM(<cnp.ndarray> array)):
        if cnp.PyArray_DIM(<cnp.ndarray> array, axis) != shape[axis]:
            return False
    return True


cdef void load_geometry(fastnorm_geometry* into, geometry) except *:
    into.b, into.o, into.g, into.k, into.i, into.s = geometry


cdef void start(fastnorm_options* options, int num_threads) except *:
    memset(options, 0, sizeof(fastnorm_options))
    options.struct_size = sizeof(fastnorm_options)
    options.num_threads = num_threads
    options.isa = isa


cdef void finish(int status) except *:
    if status == FASTNORM_OUT_OF_MEMORY:
        raise MemoryError
    if status != FASTNORM_OK:
        raise ValueError(f"libfastnorm: {fastnorm_status_string(status).decode()}")


cdef int run_forward(const fastnorm_geometry* sizes, x, y, weight, bias, double eps, mean, var,
                     rstd, running_mean, running_var, double momentum, int flags, int num_threads,
                     fused) except -1:
    cdef fastnorm_options options
    cdef fastnorm_forward_args args
    cdef int status
    memset(&args, 0, sizeof(args))
    start(&options, num_threads)
    args.struct_size = sizeof(args)
    args.dtype = code(x)
    args.param_dtype = code(weight) or code(bias) or code(running_mean) or code(running_var)
    args.flags = flags
    args.eps = eps
    args.momentum = momentum
    args.x = data(x)
    args.y = data(y)
    args.weight = data(weight)
    args.bias = data(bias)
    args.running_mean = data(running_mean)
    args.running_var = data(running_var)
    args.mean = <double*> data(mean)
    args.var = <double*> data(var)
    args.rstd = <double*> data(rstd)
    if fused is not NOTHING:
        args.activation = fused.activation
        args.negative_slope = fused.slope
        args.residual = data(fused.residual)
        args.sum = data(fused.sum)
        args.mask = <const unsigned char*> data(fused.mask)
    with nogil:
        status = fastnorm_forward(sizes, &args, &options)
    finish(status)
    return 0


cdef int run_backward(const fastnorm_geometry* sizes, dy, x, weight, mean, rstd, dx, dweight, dbias,
                      int flags, int num_threads, fused) except -1:
    cdef fastnorm_options options
    cdef fastnorm_backward_args args
    cdef int status
    memset(&args, 0, sizeof(args))
    start(&options, num_threads)
    args.struct_size = sizeof(args)
    args.dtype = code(x)
    args.param_dtype = code(weight) or code(dweight) or code(dbias)
    args.flags = flags
    args.dy = data(dy)
    args.x = data(x)
    args.weight = data(weight)
    args.mean = <const double*> data(mean)
    args.rstd = <const double*> data(rstd)
    args.dx = data(dx)
    args.dweight = data(dweight)
    args.dbias = data(dbias)
    if fused is not NOTHING:
        args.activation = fused.activation
        args.negative_slope = fused.slope
        args.bias = data(fused.bias)
        args.residual = data(fused.residual)
        args.dresidual = data(fused.dresidual)
        args.dsum = data(fused.dsum)
        args.mask = <const unsigned char*> data(fused.mask)
    with nogil:
        status = fastnorm_backward(sizes, &args, &options)
    finish(status)
    return 0


def forward(geometry, x, y, weight, bias, double eps, mean, var, rstd, running_mean, running_var,
            double momentum, int flags, int num_threads, fused=NOTHING):
    cdef fastnorm_geometry sizes
    load_geometry(&sizes, geometry)
    run_forward(&sizes, x, y, weight, bias, eps, mean, var, rstd, running_mean, running_var,
                momentum, flags, num_threads, fused)


def backward(geometry, dy, x, weight, mean, rstd, dx, dweight, dbias, int flags, int num_threads,
             fused=NOTHING):
    cdef fastnorm_geometry sizes
    load_geometry(&sizes, geometry)
    run_backward(&sizes, dy, x, weight, mean, rstd, dx, dweight, dbias, flags, num_threads, fused)
