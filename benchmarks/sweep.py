"""Time over the memory floor at many sizes: where a rule of the kernels leaves a cliff between the
shapes of the benchmark, a figure stands out among its neighbours.

    python benchmarks/sweep.py layer --backward
    python benchmarks/sweep.py batch --layout NCHW --tail 7x7 --first 4,8,16,32
    python benchmarks/sweep.py group --layout NHWC --tail 16x16 --groups 32

Rows are the first size, columns the second. Calls are C's, as in compare.py."""

import argparse
import ctypes

import numpy as np
from compare import call_of, measure

import fastnorm
from fastnorm.bench import contenders
from fastnorm.bench.cells import Cell
from fastnorm.bench.run import floors

FIRST = "8,16,32,64,128,256,512,1024,2048"
SECOND = "64,96,128,200,256,384,512,768,1000,1024,1536,2048,3072,4096"
MOST = 1 << 25  # values


def sizes(text):
    return [int(word) for word in text.split(",")]


def over_floor(library, cell, threads, seconds, behind):
    problem = contenders.Problem(cell, threads, np.float32, behind)
    aligned = contenders.Problem(cell, threads, np.float32) if behind else problem
    plain = {name: call for name, call in floors(aligned).items() if name.startswith("floor")}
    times = measure(plain | {"fastnorm": call_of(library, problem)}, seconds)
    return times.pop("fastnorm") / min(times.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("op", choices=["batch", "batch_eval", "instance", "group", "layer", "rms"])
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--layout", default="", choices=["", "NCHW", "NHWC"])
    parser.add_argument("--first", type=sizes, default=sizes(FIRST), help="batches, or rows")
    parser.add_argument("--second", type=sizes, default=sizes(SECOND), help="channels, or columns")
    parser.add_argument("--tail", default="", help="the other sizes, as 14x14")
    parser.add_argument("--groups", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.05, help="for each size")
    parser.add_argument("--behind", type=int, default=0, metavar="BYTES",
                        help="of a cache line, where arrays start: NumPy's own 16")
    parser.add_argument("--library", default=fastnorm.get_library(), help="another libfastnorm.so")
    options = parser.parse_args()
    library = ctypes.CDLL(options.library)
    tail = tuple(map(int, options.tail.split("x"))) if options.tail else ()
    print(" " * 8, *(f"{second:6}" for second in options.second))
    for first in options.first:
        row = []
        for second in options.second:
            cell = Cell(options.op, options.backward, options.layout, (first, second, *tail),
                        options.groups)
            small = np.prod(cell.shape) <= MOST
            settings = options.threads, options.seconds, options.behind
            row.append(f"{over_floor(library, cell, *settings):6.2f}" if small else " " * 6)
        print(f"{first:8}", *row, flush=True)


if __name__ == "__main__":
    main()
