"""How the time of a call grows with N, C, S and threads: measure, print a table, save a plot.

Run as: python benchmarks/cost_model.py docs/cost-model.png
"""

import ctypes
import sys

import numpy as np
from compare import DTYPES, Geometry, view

import fastnorm
from fastnorm.bench import contenders, run
from fastnorm.bench.cells import Cell

BASE = {"N": 32, "C": 128, "S": 28, "threads": 2}
VARIED = {
    "N": (1, 2, 4, 8, 16, 32, 64, 128),
    "C": (8, 16, 32, 64, 128, 256, 512, 1024),
    "S": (4, 7, 14, 28, 56, 112),
    "threads": (1, 2),
}
CALLS = (("batch", False, "NCHW"), ("batch", False, "NHWC"), ("batch", True, "NCHW"),
         ("batch", True, "NHWC"))


def workspace(cell):
    """Bytes that the library allocates for a call."""
    size = ctypes.c_size_t()
    library = ctypes.CDLL(fastnorm.get_library())
    status = library.fastnorm_workspace_size(
        ctypes.byref(Geometry(*view(cell))), DTYPES["float32"], ctypes.byref(size)
    )
    if status:
        raise SystemExit(f"fastnorm status {status}")
    return size.value


def measure(op, backward, layout, n, c, s, threads):
    """(seconds of a call, seconds of its memory floor, bytes of its workspace)."""
    cell = Cell(op, backward, layout, (n, c, s, s))
    problem = contenders.Problem(cell, threads)
    times = run.measure(run.floors(problem) | {"call": contenders.native(problem)}, 0.3)
    return times["call"], run.floor_of(times), workspace(cell)


def main(path):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    run.keep_freed_memory()
    figure, axes = plt.subplots(1, len(VARIED), figsize=(13, 3.6), layout="constrained")
    for axis, (name, values) in zip(axes, VARIED.items(), strict=True):
        for index, (op, backward, layout) in enumerate(CALLS):
            found = []
            for value in values:
                sizes = BASE | {name: value}
                found.append(measure(
                    op, backward, layout, sizes["N"], sizes["C"], sizes["S"], sizes["threads"]
                ))
            label = f"{op}{' backward' * backward} {layout}"
            line = axis.plot(values, [f[0] * 1e3 for f in found], "o-", ms=3, label=label)[0]
            axis.plot(values, [f[1] * 1e3 for f in found], ":", color=line.get_color())
            print(label, name, *(
                f"{value}: {t * 1e6:.0f} us ({t / floor:.2f} floors, {size >> 10} KiB)"
                for value, (t, floor, size) in zip(values, found, strict=True)
            ), sep="  ")
            if index == 0:
                axis.set_xlabel({"S": "S: rows and columns of an image"}.get(name, name))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    axes[0].set_ylabel("milliseconds (dotted: the memory floor)")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    np.seterr(all="raise")
    main(*sys.argv[1:])
