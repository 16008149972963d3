"""Which backend serves a call, on how many threads.

Environment: FASTNORM_BACKEND names the backend of every call that names none, and
FASTNORM_NUM_THREADS (then OMP_NUM_THREADS) the number of threads. FASTNORM_ISA, FASTNORM_L2_BYTES
and FASTNORM_LAST_LEVEL_BYTES are read by libfastnorm itself.
"""

import os

from fastnorm import backends, device
from fastnorm.checks import check_int
from fastnorm.dtypes import NAMES as DTYPE_NAMES
from fastnorm.dtypes import TABLE


def _threads_from_environment():
    for variable in ("FASTNORM_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(variable, "").split(",")[0]
        if text.isdecimal() and int(text) > 0:
            return int(text)
    return 0


_num_threads = _threads_from_environment()
_default_backend = os.environ.get("FASTNORM_BACKEND") or None
_chosen = {}  # what automatic choices came to, by dtype


def set_num_threads(num_threads):
    """Use at most `num_threads` threads in calls that do not say; 0 means all processors.

    Raises ValueError for a negative number and TypeError for anything but an int.
    """
    global _num_threads
    _num_threads = check_threads("set_num_threads", num_threads)


def get_num_threads():
    """The number of threads that a call on a large array uses."""
    return _num_threads or available_threads()


def available_threads():
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(name, num_threads):
    """num_threads of a call as an int; None is the configured number."""
    if num_threads is None:
        return _num_threads
    if type(num_threads) is int and 0 <= num_threads <= 1 << 16:
        return num_threads
    num_threads = check_int(name, "num_threads", num_threads, "an int or None")
    if not 0 <= num_threads <= 1 << 16:
        raise ValueError(
            f"{name}: num_threads is {num_threads}, expected 0 (all processors) or more"
        )
    return num_threads


def choose(name, backend, dtype):
    """The backend module that serves this call.

    Raises ValueError where `backend` is unknown or, asked for by name, cannot serve.
    """
    if backend is None:
        backend = _default_backend
    if backend is None:
        if dtype not in _chosen:
            _chosen[dtype] = next(n for n in backends.NAMES if backends.refusal(n, dtype) is None)
        return backends.load(_chosen[dtype])
    if backend == "cuda":
        raise ValueError(
            f"{name}: x is a numpy.ndarray and backend is 'cuda', expected an array on the GPU;"
            " nothing is moved unasked, did you mean torch.from_numpy(x).cuda() or"
            " cupy.asarray(x)?"
        )
    if backend not in backends.NAMES:
        raise ValueError(
            f"{name}: unknown backend {backend!r}, expected one of {', '.join(backends.NAMES)}"
        )
    reason = backends.refusal(backend, dtype)
    if reason is not None:
        raise ValueError(f"{name}: backend {backend!r} {reason}")
    return backends.load(backend)


def explain(x=None, *, backend=None):
    """Print which backend serves a call on x (default: on float32), and why the others do not.

    Args:
        x: an array, also one on a GPU, or a dtype.
        backend: as in the call.

    Examples:
        >>> fastnorm.explain()
        fastnorm 0.1.0, float32, up to 2 threads
          native     chosen: libfastnorm 0.1.0 at x86-64-v4
          numba      not asked: an earlier one serves
          reference  not asked: an earlier one serves
          cuda       serves arrays on a GPU
    """
    import numpy as np

    import fastnorm

    on_gpu = None if x is None else device.view_of(x)
    if on_gpu is not None:
        print(f"fastnorm {fastnorm.__version__}, {on_gpu.dtype}, {on_gpu.kind.name}")
        print(f"  {_about_cuda()}")
        return
    dtype = np.dtype(np.float32) if x is None else np.dtype(getattr(x, "dtype", x))
    print(f"fastnorm {fastnorm.__version__}, {dtype}, up to {get_num_threads()} threads")
    if dtype not in TABLE:
        print(f"  no backend: arrays of {dtype} are not normalized, expected {DTYPE_NAMES}")
        return
    wanted = backend or _default_backend
    served = False
    for name in backends.NAMES:
        reason = backends.refusal(name, dtype)
        if wanted not in (None, name):
            answer = f"not asked: backend={wanted!r}"
        elif reason is not None:
            answer = f"cannot: {reason}"
        elif served:
            answer = "not asked: an earlier one serves"
        else:
            served = True
            answer = "chosen" + _version_of(name)
        print(f"  {name:<10} {answer}")
    print(f"  {_about_cuda()}")


def _about_cuda():
    engine = backends.load("cuda")
    reason = engine if isinstance(engine, str) else engine.refusal()
    return f"{'cuda':<10} " + ("serves arrays on a GPU" if reason is None else f"cannot: {reason}")


def _version_of(name):
    if name == "numba":
        import numba

        return f": Numba {numba.__version__}, kernels compiled at their first call"
    if name != "native":
        return ""
    native = backends.load(name)
    number = native.version()
    return (
        f": libfastnorm {number // 10000}.{number // 100 % 100}.{number % 100}"
        f" at {native.isa_name().replace('v', 'x86-64-v')}"
    )
