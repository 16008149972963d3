"""fastnorm.h for Cython, and what native.pyx and whole.pyx share: how arrays lie, and the calls."""

cimport numpy as cnp
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t


cdef extern from "fastnorm.h" nogil:
    ctypedef int fastnorm_status
    ctypedef int fastnorm_dtype
    int FASTNORM_OK
    int FASTNORM_FLOAT32
    int FASTNORM_OUT_OF_MEMORY

    ctypedef struct fastnorm_geometry:
        int64_t b, o, g, k, i, s

    ctypedef struct fastnorm_options:
        size_t struct_size
        int32_t num_threads
        int32_t isa

    ctypedef struct fastnorm_forward_args:
        size_t struct_size
        int32_t dtype, param_dtype, flags, activation
        double negative_slope, eps, momentum
        const void* x
        void* y
        const void* weight
        const void* bias
        void* running_mean
        void* running_var
        double* mean
        double* var
        double* rstd
        const void* residual
        void* sum
        const unsigned char* mask

    ctypedef struct fastnorm_backward_args:
        size_t struct_size
        int32_t dtype, param_dtype, flags, activation
        double negative_slope
        const void* dy
        const void* x
        const void* weight
        const double* mean
        const double* rstd
        void* dx
        void* dweight
        void* dbias
        const void* bias
        const void* residual
        void* dresidual
        const void* dsum
        const unsigned char* mask

    fastnorm_status fastnorm_forward(
        const fastnorm_geometry*, const fastnorm_forward_args*, const fastnorm_options*)
    fastnorm_status fastnorm_backward(
        const fastnorm_geometry*, const fastnorm_backward_args*, const fastnorm_options*)
    const char* fastnorm_status_string(fastnorm_status)
    const char* fastnorm_isa_name()
    int32_t fastnorm_version()


cdef inline void* data(object array) noexcept:
    return NULL if array is None else cnp.PyArray_DATA(<cnp.ndarray> array)


cdef inline bint simple(object array, int kind) noexcept:
    """An ndarray of this type that a kernel reads as it is."""
    return (cnp.PyArray_CheckExact(array) and cnp.PyArray_TYPE(<cnp.ndarray> array) == kind
            and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> array))


cdef inline bint apart(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Contiguous arrays without a common byte."""
    cdef char* first = cnp.PyArray_BYTES(a)
    cdef char* second = cnp.PyArray_BYTES(b)
    return first + cnp.PyArray_NBYTES(a) <= second or second + cnp.PyArray_NBYTES(b) <= first


cdef inline bint is_like(object array, cnp.ndarray x) noexcept:
    """Of x's type and shape, and simple."""
    cdef int axis
    if (not simple(array, cnp.PyArray_TYPE(x))
            or cnp.PyArray_NDIM(<cnp.ndarray> array) != cnp.PyArray_NDIM(x)):
        return False
    for axis in range(cnp.PyArray_NDIM(x)):
        if cnp.PyArray_DIM(<cnp.ndarray> array, axis) != cnp.PyArray_DIM(x, axis):
            return False
    return True


cdef void load_geometry(fastnorm_geometry* into, geometry) except *
cdef int run_forward(
    const fastnorm_geometry* sizes, x, y, weight, bias, double eps, mean, var, rstd, running_mean,
    running_var, double momentum, int flags, int num_threads, fused) except -1
cdef int run_backward(
    const fastnorm_geometry* sizes, dy, x, weight, mean, rstd, dx, dweight, dbias, int flags,
    int num_threads, fused) except -1
