"""Measure every cell: contenders in turn, each warmed just before it is timed, medians.

The unit is the memory floor of the same run: the time to read the inputs once and write the
output once, in the best of the ways of KINDS, on the same threads and buffers.
Memory freed by a contender stays with the process (mallopt), so that nobody pays for page
faults of fresh outputs.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import platform
import statistics
import time
from math import exp, log

import numpy as np

from fastnorm.bench import cells as table
from fastnorm.bench import contenders
from fastnorm.dtypes import TABLE

IDLE = 0.01  # seconds after which the waiting threads of the last contender have left the cores
LARGE = 8 << 20  # bytes of x from which a cell counts as larger than the caches


def keep_freed_memory():
    """glibc: never give memory back, so that outputs come from pages that are there."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def time_once(call, repeats):
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def measure(calls, seconds):
    """Median seconds of each call, all in turn, within about `seconds` in all."""
    repeats = {}
    once = 0.0
    for name, call in calls.items():
        call()
        took = time_once(call, 1)
        repeats[name] = max(1, int(2e-4 / max(took, 1e-9)))
        once += IDLE + took * (repeats[name] + 2)
    rounds = max(5, min(200, int(seconds / max(once, 1e-9))))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(IDLE)
            call()
            call()
            times[name].append(time_once(call, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


BOUND = "two passes"  # what a statistic over more than the caches hold cannot go below


# How the floor's bytes are moved; the best counts.
KINDS = ("plain", "streaming", "streaming, asked ahead")


def floors(problem):
    """The floor calls of a problem, and those of a floor with the inputs read twice."""
    from fastnorm.bench import _floor

    second = problem.dy if problem.cell.backward else problem.residual
    return {
        f"{what} {kind}": lambda how=how, twice=twice: _floor.move(
            problem.out, problem.sum, problem.x, second, how, problem.threads, twice
        )
        for what, twice in (("floor", False), (BOUND, True))
        for how, kind in enumerate(KINDS)
    }


def floor_of(times, what="floor"):
    """The best of floors() in measured times."""
    return min(times[f"{what} {kind}"] for kind in KINDS)


def run_cell(cell, who, threads, seconds, dtype):
    """One row: seconds of each contender, the floor, and the contenders that were wrong."""
    problem = contenders.Problem(cell, threads, dtype)
    wanted = contenders.native(problem, "reference")().astype(np.float64)
    # Of the largest value: several roundings of y.
    tolerance = max(1e-4, 4 * TABLE[problem.x.dtype].eps)
    scale = np.max(np.abs(wanted))
    near_kink = _near_kink(problem)
    calls, wrong = {}, []
    for name, contender in who.items():
        call = None
        if not cell.after or name in contenders.FUSING:
            call = contender(problem)
        if call is None:
            continue
        problem.out.fill(np.nan)
        error = np.max(np.abs(call().astype(np.float64) - wanted) * (~near_kink)) / scale
        if not error < tolerance:
            wrong.append(name)
        calls[name] = call
    times = measure(floors(problem) | calls, seconds)
    found = {"floor": floor_of(times), BOUND: floor_of(times, BOUND)}
    return found | {"times": {name: times[name] for name in calls}, "wrong": wrong}


def _near_kink(problem):
    """Where a gradient through ReLU may go either way: its input is 0 but for roundings."""
    if not (problem.cell.backward and problem.activation == "relu"):
        return np.False_
    forward = dataclasses.replace(problem.cell, backward=False, after=())
    z = contenders.native(contenders.Problem(forward, problem.threads, problem.dtype))()
    return np.abs(z.astype(np.float64)) < 1e-3


def mean_ratio(ratios):
    ratios = list(ratios)
    return exp(sum(map(log, ratios)) / len(ratios)) if ratios else float("nan")


def run(quick=False, threads=2, names=None, only="", seconds=None, dtype="float32", json_path=None,
        plot=None):
    """Measure and print; returns the rows as {cell name: row}."""
    from rich.console import Console
    from rich.progress import Progress

    if importlib.util.find_spec("fastnorm.bench._floor") is None:
        raise ValueError("bench: the memory floor was not built, which takes OpenMP")
    keep_freed_memory()
    who = contenders.available(names, quick)
    chosen = [cell for cell in table.cells(quick) if only in str(cell)]
    seconds = seconds or (0.25 if quick else 1.0)
    console, rows = Console(), {}
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(chosen))
        for cell in chosen:
            progress.update(task, description=str(cell))
            rows[cell] = run_cell(cell, who, threads, seconds, np.dtype(dtype).type)
            progress.advance(task)
    print_cells(console, rows, who)
    print_summary(console, rows, who, np.dtype(dtype).itemsize)
    if json_path:
        save_json(rows, json_path, threads, dtype)
        console.print(f"saved {json_path}")
    if plot:
        from fastnorm.bench.plot import save_plot

        for path in save_plot(rows, who, plot):
            console.print(f"saved {path}")
    return rows


def best_peer(row):
    """(name, seconds) of the fastest right contender that is not fastnorm's."""
    peers = {
        name: seconds for name, seconds in row["times"].items()
        if not name.startswith("fastnorm") and name not in row["wrong"]
    }
    return min(peers.items(), key=lambda item: item[1]) if peers else (None, float("nan"))


def print_cells(console, rows, who):
    from rich.table import Table

    view = Table(title="time over the memory floor (wrong results in brackets)")
    view.add_column("cell", no_wrap=True)
    view.add_column("floor us", justify="right")
    view.add_column(BOUND, justify="right")
    for name in who:
        view.add_column(name, justify="right")
    view.add_column("times faster", justify="right")
    for cell, row in rows.items():
        shown = []
        for name in who:
            ratio = row["times"].get(name)
            text = "-" if ratio is None else f"{ratio / row['floor']:.2f}"
            shown.append(f"({text})" if name in row["wrong"] else text)
        faster = best_peer(row)[1] / row["times"].get("fastnorm", float("nan"))
        floor, bound = f"{row['floor'] * 1e6:.1f}", f"{row[BOUND] / row['floor']:.2f}"
        view.add_row(str(cell), floor, bound, *shown, f"{faster:.2f}")
    # Wide enough for every column, also where the output is a file.
    console.width = max(console.width, 60 + 15 * len(who))
    console.print(view)


def print_summary(console, rows, who, itemsize):
    from rich.table import Table

    view = Table(title="geometric means over the floor; large: x of 8 MB or more; tiny cells apart")
    faster_than = "times faster than the best peer"
    for column in ("operation", "size", "cells", BOUND, *who, faster_than):
        view.add_column(column, justify="left" if column == "operation" else "right")
    groups = {}
    for cell, row in rows.items():
        size = "tiny" if cell.tiny else "large" if cell.bytes(itemsize) >= LARGE else "small"
        groups.setdefault((cell.family, size), []).append(row)
        if size != "tiny":
            every = "all fused" if cell.after else "all but tiny"
            groups.setdefault((every, ""), []).append(row)
    for (family, size), members in sorted(groups.items()):
        ratios = [
            mean_ratio(r["times"][n] / r["floor"] for r in members if n in r["times"]) for n in who
        ]
        faster = mean_ratio(
            best_peer(r)[1] / r["times"]["fastnorm"]
            for r in members if best_peer(r)[0] and "fastnorm" in r["times"]
        )
        ratios.insert(0, mean_ratio(r[BOUND] / r["floor"] for r in members))
        shown = ("-" if ratio != ratio else f"{ratio:.2f}" for ratio in ratios)
        view.add_row(family, size, str(len(members)), *shown, f"{faster:.2f}")
    console.print(view)


def save_json(rows, path, threads, dtype):
    """Seconds of every contender in every cell, with what they were measured on."""
    content = {
        "machine": _processor(), "threads": threads, "dtype": dtype,
        "cells": {str(cell): row for cell, row in rows.items()},
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def _processor():
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
