"""oneDNN as a contender, through the C interface of libdnnl 3 (`pip install onednn-cpu-gomp`).

Plain layouts, as the arrays of the other contenders; primitives are created before the measuring,
so that a call is one execution. The handles live as long as the process: some 100 kB in all.
"""

import ctypes
import ctypes.util
import sys
from ctypes import byref, c_float, c_int, c_int64, c_uint, c_void_p
from functools import cache
from pathlib import Path

import numpy as np

# Values of the enumerations of oneapi/dnnl/dnnl_types.h, version 3.
CPU, IN_ORDER, F32 = 1, 1, 3
TRAINING, INFERENCE, BACKWARD = 64, 96, 128
GLOBAL_STATS, SCALE, SHIFT = 1, 2, 4
ARGUMENTS = {
    "src": 1, "dst": 17, "mean": 49, "variance": 50, "scale": 51, "shift": 52,
    "diff_src": 129, "diff_dst": 145, "diff_scale": 255, "diff_shift": 256,
}
OPERATIONS = {"batch": "batch", "batch_eval": "batch", "layer": "layer",
              "group": "group", "instance": "group"}


class Argument(ctypes.Structure):
    _fields_ = [("which", c_int), ("memory", c_void_p)]


@cache
def library():
    """libdnnl of version 3, from the environment of this Python or of the system; None without."""
    for place in Path(sys.prefix, "lib", "libdnnl.so.3"), ctypes.util.find_library("dnnl"):
        try:
            found = ctypes.CDLL(str(place or ""))
        except OSError:
            continue
        if hasattr(found, "dnnl_batch_normalization_forward_primitive_desc_create"):
            return found
    return None


def made(function, *arguments):
    """The handle that a creating function of oneDNN fills in."""
    handle = c_void_p()
    status = getattr(library(), "dnnl_" + function)(byref(handle), *arguments)
    if status:
        raise RuntimeError(f"oneDNN: dnnl_{function} returned status {status}")
    return handle


@cache
def engine_and_stream():
    engine = made("engine_create", c_int(CPU), ctypes.c_size_t(0))
    return engine, made("stream_create", engine, c_uint(IN_ORDER))


def described(array):
    """A memory descriptor of the array's own shape and strides."""
    sizes = (c_int64 * 12)(*array.shape)
    strides = (c_int64 * 12)(*(stride // array.itemsize for stride in array.strides))
    return made("memory_desc_create_with_strides", c_int(array.ndim), sizes, c_int(F32), strides)


def runner(descriptor, arrays):
    """execute(), for a primitive of that descriptor on those arrays; which it keeps."""
    engine, stream = engine_and_stream()
    primitive = made("primitive_create", descriptor)
    memories = [
        Argument(ARGUMENTS[name], made("memory_create", described(a), engine,
                                       c_void_p(a.ctypes.data)).value)
        for name, a in arrays.items()
    ]
    arguments = (Argument * len(memories))(*memories)
    execute, wait = library().dnnl_primitive_execute, library().dnnl_stream_wait
    count = c_int(len(memories))

    def call():
        status = execute(primitive, stream, count, arguments) or wait(stream)
        if status:
            raise RuntimeError(f"oneDNN: dnnl_primitive_execute returned status {status}")

    call.arrays = arrays
    return call


def onednn(problem):
    """Direct primitives: batch and layer norm, and from version 3.3 group and instance norm."""
    p, cell = problem, problem.cell
    kind = OPERATIONS.get(cell.op)
    create = f"{kind}_normalization_forward_primitive_desc_create"
    if kind is None or p.across or p.x.dtype != np.float32:
        return None
    if not hasattr(library(), f"dnnl_{create}"):
        return None
    with_threads = ctypes.CDLL("libgomp.so.1").omp_set_num_threads
    with_threads(p.threads)
    x, dy, y = (a if p.rows else p.first(a) for a in (p.x, p.dy, p.out))
    engine, _ = engine_and_stream()
    evaluating = cell.op == "batch_eval"
    flags = c_uint(SCALE | SHIFT | (GLOBAL_STATS if evaluating else 0))
    # Descriptors of the statistics of layer norm, and the number of groups of group norm.
    groups = {"group": cell.groups, "instance": cell.shape[1]}.get(cell.op)
    shape = {"batch": cell.shape[1:2], "layer": cell.shape[:1], "group": (cell.shape[0], groups)}
    if evaluating:
        mean, var = p.mean, p.var
    else:
        mean, var = np.empty((2, *shape[kind]), np.float32)
    extra = {"batch": (), "layer": (described(mean),), "group": (c_int64(groups or 0),)}[kind]

    def descriptor(direction, prop, *last):
        tensors = [described(x)] * (2 if direction == "forward" else 3)
        return made(f"{kind}_normalization_{direction}_primitive_desc_create", engine, c_int(prop),
                    *tensors, *extra, c_float(1e-5), flags, *last)

    forward = descriptor("forward", INFERENCE if evaluating else TRAINING, None)
    common = {"src": x, "mean": mean, "variance": var, "scale": p.weight}
    call = runner(forward, common | {"dst": y, "shift": p.bias})
    if cell.backward:
        call()
        dweight, dbias = np.empty((2, cell.shape[1]), np.float32)
        if cell.op == "layer":
            common["shift"] = p.bias  # required there, and refused in a batch norm's backward
        call = runner(descriptor("backward", BACKWARD, forward, None), common | {
            "diff_dst": dy, "diff_src": y, "diff_scale": dweight, "diff_shift": dbias,
        })

    def run():
        call()
        return p.out

    return run
