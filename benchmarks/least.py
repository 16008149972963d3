"""How near the kernels are to the least that could be written: cells of the benchmark beside the
floor, two passes, and least/, plain loops with nothing of what makes a kernel fit for use.

    python benchmarks/least.py --json benchmarks/results/epyc-zen4-2-threads-least.json

Linux on x86-64 with AVX-512, and a C compiler; float32. All are called from C's side, in turn, as
compare.py does it.
"""

import argparse
import ctypes
import subprocess
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
from compare import call_of, structure, view
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastnorm
from fastnorm.bench import cells, contenders, run

LEAST = "least kernel"
FLAGS = "-Ofast -march=native -mprefer-vector-width=512 -fopenmp -shared -fPIC"

Task = structure("Task", "q:b q:o q:g q:k q:i q:s p:x p:dy p:y p:weight p:bias p:mean p:rstd "
                 "p:dweight p:dbias i:backward i:has_mean i:stream i:threads i:together")


def build(folder):
    library = Path(folder) / "least.so"
    sources = sorted((Path(__file__).parent / "least").glob("*.c"))
    subprocess.run(["cc", *FLAGS.split(), *sources, "-o", library], check=True)
    return ctypes.CDLL(str(library)).least


def statistics(x, at, has_mean):
    """(mean, rstd) of every set, float32."""
    sets = x.reshape(at).astype(np.float64)
    mean = sets.mean((1, 3, 4)) if has_mean else np.zeros((at.b, at.g, at.s))
    centred = sets - np.expand_dims(mean, (1, 3, 4))
    rstd = 1 / np.sqrt((centred * centred).mean((1, 3, 4)) + 1e-5)
    return tuple(np.ascontiguousarray(a, np.float32) for a in (mean, rstd))


def least_call(least, problem, stream, together=4):
    """A call that fills problem.out, or None where least/ has none."""
    p, at = problem, view(problem.cell)
    mean, rstd = statistics(p.x, at, p.cell.op != "rms")
    gradients = [np.zeros_like(p.weight) for _ in range(2)]
    arrays = (p.x, p.dy, p.out, p.weight, p.bias, mean, rstd, *gradients)
    task = Task(*at, *(a.ctypes.data for a in arrays), p.cell.backward, p.cell.op != "rms", stream,
                p.threads, together)

    def call(keep=arrays):
        return least(ctypes.byref(task))

    return call if call() else None


def right(call, wanted, out):
    """Whether it computes the same but for roundings."""
    out.fill(np.nan)
    call()
    return np.max(np.abs(out - wanted)) < 1e-3 * np.max(np.abs(wanted))


def measured(cell, least, library, threads, seconds):
    """A row as bench.run has them; None where least/ has nothing for the shape."""
    problem = contenders.Problem(cell, threads)
    wanted = contenders.native(problem, "reference")().copy()
    calls = {"fastnorm": call_of(library, problem)}
    for stream, together in product((False, True), (1, 4) if problem.rows else (4,)):
        call = least_call(least, problem, stream, together)
        if call is not None:
            if not right(call, wanted, problem.out):
                raise SystemExit(f"{cell}: the least kernel is wrong")
            calls[f"{LEAST} {stream} {together}"] = call
    if len(calls) == 1:
        return None
    times = run.measure(run.floors(problem) | calls, seconds)
    best = {what: min(took for name, took in times.items() if name.startswith(what))
            for what in ("floor", run.BOUND, LEAST)}
    return {"floor": best["floor"], run.BOUND: best[run.BOUND],
            "times": {"fastnorm": times["fastnorm"], LEAST: best[LEAST]}}


def show(console, rows):
    """Geometric means over the floor of every operation."""
    families = {}
    for cell, row in rows.items():
        size = "large" if cell.bytes(4) >= run.LARGE else "in cache"
        families.setdefault((cell.family, size), []).append(row)
        families.setdefault(("all", ""), []).append(row)
    view = Table(title="over the floor, geometric means; large: x of 8 MB or more")
    for column in ("operation", "size", "cells", run.BOUND, LEAST, "fastnorm", "of the least"):
        view.add_column(column, justify="left" if column == "operation" else "right")
    for (family, size), members in sorted(families.items()):
        means = [run.mean_ratio(row[run.BOUND] / row["floor"] for row in members)]
        for name in (LEAST, "fastnorm"):
            means.append(run.mean_ratio(row["times"][name] / row["floor"] for row in members))
        means.append(means[2] / means[1])
        view.add_row(family, size, str(len(members)), *(f"{mean:.2f}" for mean in means))
    console.print(view)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each cell")
    parser.add_argument("--json", help="keep the figures there")
    options = parser.parse_args()
    run.keep_freed_memory()
    library = ctypes.CDLL(fastnorm.get_library())
    console, rows = Console(width=100), {}
    with tempfile.TemporaryDirectory() as folder:
        least = build(folder)
    chosen = [cell for cell in cells.cells() if options.only in str(cell)
              and not (cell.tiny or cell.after or cell.op == "batch_eval")]
    for cell in track(chosen, "measuring", console=console):
        row = measured(cell, least, library, options.threads, options.seconds)
        if row is None:
            continue
        floor, times = row["floor"], row["times"]
        console.print(f"{cell!s:44}" + "".join(
            f"{took / floor:7.2f}" for took in (row[run.BOUND], times[LEAST], times["fastnorm"])))
        rows[cell] = row
    show(console, rows)
    if options.json:
        run.save_json(rows, options.json, options.threads, "float32")


if __name__ == "__main__":
    main()
