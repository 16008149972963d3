"""Compare builds of libfastnorm cell by cell, in turn in one process: how a change is measured.

python benchmarks/compare.py old/libfastnorm.so new/libfastnorm.so --only "layer"

A library may carry settings that it reads when it is loaded: FASTNORM_ISA=v3:libfastnorm.so. Each
is copied, so that one file can be compared with itself under another setting. Calls are C's, with a
workspace; shown is time over the memory floor, then each library's time over the first one's.

A call that follows itself finds its arrays in the caches as it left them. Where a rule on stores
or prefetches gains by that, --between shows what is left of it: it measures as the benchmark does.
--pipeline shows what users have of it: 400 MB of arrays in turn, each call between one that writes
its x (a backward's dy) and one that reads its y, which is timed with it.
"""

import argparse
import ctypes
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from fastnorm import geometry
from fastnorm.bench import cells, contenders
from fastnorm.bench import run as benchmark
from fastnorm.bench.run import floor_of, floors, mean_ratio, time_once

PIPELINE = 400 << 20  # bytes, more than two cores have of any cache
DTYPES = {"float32": 1, "float64": 2, "float16": 3, "bfloat16": 4}
NO_MEAN, GIVEN = 1, 2


def structure(name, fields):
    kinds = {"i": ctypes.c_int32, "q": ctypes.c_int64, "d": ctypes.c_double, "p": ctypes.c_void_p}
    named = [(field[2:], kinds[field[0]]) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": named})


# The structs of fastnorm.h.
Geometry = structure("Geometry", "q:b q:o q:g q:k q:i q:s")
Options = structure("Options", "q:struct_size i:num_threads i:isa p:workspace q:workspace_size "
                    "p:parallel_for p:user")
Forward = structure(
    "Forward", "q:struct_size i:dtype i:param_dtype i:flags i:activation d:slope d:eps d:momentum "
    "p:x p:y p:weight p:bias p:running_mean p:running_var p:mean p:var p:rstd p:residual p:sum "
    "p:mask")
Backward = structure(
    "Backward", "q:struct_size i:dtype i:param_dtype i:flags i:activation d:slope p:dy p:x "
    "p:weight p:mean p:rstd p:dx p:dweight p:dbias p:bias p:residual p:dresidual p:dsum p:mask")


def pointer(array):
    return None if array is None else array.ctypes.data


def view(cell):
    """The geometry of a cell."""
    n, c, *spatial = cell.shape
    if cell.op in ("layer", "rms"):
        return geometry.across(cell.shape, 1, 2) if cell.layout else geometry.rows(cell.shape, 1)
    first = cell.layout != "NHWC"
    shape = cell.shape if first else (n, *spatial, c)
    if cell.op in ("group", "instance"):
        return geometry.group(shape, first, cell.groups or c)
    return geometry.batch(shape, first)


def call_of(library, problem):
    """A call of this library that fills problem.out."""
    p, cell, at = problem, problem.cell, view(problem.cell)
    shape = Geometry(*at)
    stats = [np.ones(at.b * at.g * at.s) for _ in range(3)]
    work = ctypes.c_size_t()
    dtype = DTYPES[p.x.dtype.name]
    library.fastnorm_workspace_size(ctypes.byref(shape), dtype, ctypes.byref(work))
    space = contenders.aligned((work.value,), np.uint8)
    options = Options(ctypes.sizeof(Options), p.threads, 0, pointer(space), work.value)
    activation = {None: 0, "relu": 1, "silu": 3}[p.activation]
    given = cell.op == "batch_eval"
    flags = NO_MEAN if cell.op == "rms" else GIVEN if given else 0
    weight, bias = p.weight, None if cell.op == "rms" else p.bias
    forward = Forward(
        ctypes.sizeof(Forward), dtype, 0, flags, activation, 0, 1e-5, 0.1, pointer(p.x),
        pointer(p.out), pointer(weight), pointer(bias), pointer(p.mean) if given else None,
        pointer(p.var) if given else None, *([None] * 3 if given else map(pointer, stats)),
        pointer(p.residual), pointer(p.sum), None)
    function, args = library.fastnorm_forward, forward
    if cell.backward:
        run(function, shape, args, options)
        gradients = [np.empty_like(p.weight), None if bias is None else np.empty_like(p.bias)]
        function, args = library.fastnorm_backward, Backward(
            ctypes.sizeof(Backward), dtype, 0, flags, activation, 0, pointer(p.dy), pointer(p.x),
            pointer(weight), pointer(stats[0]), pointer(stats[2]), pointer(p.out),
            *map(pointer, gradients), pointer(bias), pointer(p.residual), None, None, None)
        stats.extend(gradients)
    references = (shape, args, options, stats, space)
    arguments = [ctypes.byref(one) for one in references[:3]]

    def call(keep=references):
        return function(*arguments)

    run(function, *references[:3])
    return call


def run(function, *arguments):
    status = function(*map(ctypes.byref, arguments))
    if status:
        raise SystemExit(f"fastnorm status {status}")


def load(name, folder, number):
    """A library under the settings in front of its path."""
    *settings, path = name.split(":")
    copy = shutil.copy(path, Path(folder) / f"{number}.so")
    before = dict(os.environ)
    os.environ.update(setting.split("=") for setting in settings)
    try:
        return ctypes.CDLL(str(copy))
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure(calls, seconds):
    """Median seconds of each call: some of each in turn, without the pauses that threads of other
    contenders need. What the caches hold and how fast the cores run is the same for all then, and
    2 % can be told in cache."""
    repeats = {name: max(5, int(2e-3 / time_once(call, 3))) for name, call in calls.items()}
    times = {name: [] for name in calls}
    spent = 0
    while spent < seconds or min(map(len, times.values())) < 7:
        for name, call in calls.items():
            time_once(call, 3)
            times[name].append(time_once(call, repeats[name]))
            spent += times[name][-1] * repeats[name]
    return {name: statistics.median(values) for name, values in times.items()}


def measure_between(floor_calls, calls, problem, seconds):
    """As the benchmark measures: with pauses, and PyTorch's call before each."""
    (torch,) = contenders.available(["PyTorch"]).values()
    peer, turns = torch(problem), {}
    for name, call in calls.items():
        turns |= {f"PyTorch before {name}": peer, name: call}
    return benchmark.measure(floor_calls | turns, seconds)


def measure_alone(libraries, cell, dtype, options):
    problem = contenders.Problem(cell, options.threads, dtype, options.behind)
    calls = {str(at): call_of(one, problem) for at, one in enumerate(libraries)}
    aligned = contenders.Problem(cell, options.threads, dtype) if options.behind else problem
    if options.between:
        return measure_between(floors(aligned), calls, problem, max(2.0, options.seconds))
    # Whoever follows the floors is up to 1.2 times as slow for some milliseconds, in cache.
    settling = {"settling": calls["0"]}
    return measure(floors(aligned) | settling | calls, options.seconds)


def measure_pipeline(libraries, cell, threads, dtype, with_onednn):
    """Of each call, and of the floors in its place, with the reader of its y. (Of the peers only
    oneDNN has the same threads: those of others, which wait actively, would be in the way.)"""
    from fastnorm.bench._floor import move

    size = cell.bytes(np.dtype(dtype).itemsize)
    steps = max(2, min(256, PIPELINE // (size * (3 + cell.backward))))
    problems = [contenders.Problem(cell, threads, dtype) for _ in range(steps)]
    written = [p.dy if cell.backward else p.x for p in problems]
    read = [contenders.aligned(p.out.shape, dtype) for p in problems]
    source = contenders.aligned(written[0].shape, dtype)
    source[...] = written[0]
    calls = {str(at): [call_of(one, p) for p in problems] for at, one in enumerate(libraries)}
    if with_onednn and not cell.after:
        calls["oneDNN"] = [contenders.onednn.onednn(p) for p in problems]
        if None in calls["oneDNN"]:
            del calls["oneDNN"]
    floor_calls = [floors(p) for p in problems]
    calls |= {name: [each[name] for each in floor_calls] for name in floor_calls[0]}
    times = {name: [] for name in calls}
    for _ in range(5):
        for name, called in calls.items():
            for timed in (False, True):
                for p, x, call, z in zip(problems, written, called, read, strict=True):
                    move(x, None, source, None, 0, threads)
                    started = time.perf_counter()
                    call()
                    move(z, None, p.out, None, 0, threads)
                    if timed:
                        times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("library", nargs="+")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each cell")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--between", action="store_true",
                     help="pauses and calls of PyTorch between, for 2 seconds or more each cell")
    way.add_argument("--pipeline", action="store_true",
                     help="with a reader of y, 400 MB of arrays in turn")
    parser.add_argument("--onednn", action="store_true", help="in a pipeline, oneDNN last")
    parser.add_argument("--behind", type=int, default=0, metavar="BYTES",
                        help="of a cache line, where arrays start: NumPy's own 16")
    options = parser.parse_args()
    if options.onednn and not options.pipeline:
        parser.error("--onednn takes part in a --pipeline alone")
    if options.between or options.pipeline:
        benchmark.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        libraries = [load(name, folder, at) for at, name in enumerate(options.library)]
    if options.dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    else:
        dtype = np.dtype(options.dtype).type
    names = [str(at) for at in range(len(libraries))] + ["oneDNN"] * options.onednn
    against = {name: [] for name in names}
    for cell in cells.cells():
        if options.only not in str(cell):
            continue
        if options.pipeline:
            times = measure_pipeline(libraries, cell, options.threads, dtype, options.onednn)
        else:
            times = measure_alone(libraries, cell, dtype, options)
        floor = floor_of(times)
        seconds = {name: times[name] for name in names if name in times}
        for name, took in seconds.items():
            against[name].append(took / seconds["0"])
        over = " ".join(f"{took / floor:7.2f}" for took in seconds.values())
        change = " ".join(f"{against[name][-1]:6.2f}" for name in seconds if name != "0")
        print(f"{cell!s:38} {floor * 1e6:9.1f} us {over}  | {change}", flush=True)
    means = (f"{mean_ratio(against[name]):.3f}" for name in names[1:])
    print("over the first, geometric mean:", *means)


if __name__ == "__main__":
    main()
