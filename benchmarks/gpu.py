"""Measure the CUDA backend beside PyTorch on the GPU of this machine: python benchmarks/gpu.py

Kernel time is that of a CUDA graph of several calls, replayed and timed by events; call time is
what the host spends in a call. The unit is the time to copy: the bytes that an operation must move
(forward 2 tensors, backward 3) at the bandwidth that a device-to-device copy of the same size
reaches in the same run. PyTorch is run in eager mode, for images also in channels_last memory, and
compiled; who comes first changes from round to round. Everything is checked against PyTorch in
float64 before it is timed.

With --toy, the same code runs at small sizes in Numba's simulator, without PyTorch:
NUMBA_ENABLE_CUDASIM=1 python benchmarks/gpu.py --toy
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from math import prod

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastnorm

ROUNDS = 5


@dataclass(frozen=True)
class Cell:
    op: str
    backward: bool
    layout: str
    shape: tuple
    groups: int = 0

    def __str__(self):
        return " ".join(
            filter(None, (self.op, "backward" * self.backward, self.layout,
                          "x".join(map(str, self.shape))))
        )


def cells(toy):
    """The shapes of ResNet-50, of diffusion UNets, and of transformers, at batches of 64 to 256."""
    images = [(256, 64, 112, 112), (256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14),
              (256, 2048, 7, 7), (64, 256, 56, 56)]
    unets = [(64, 320, 64, 64), (64, 640, 32, 32), (64, 1280, 16, 16), (64, 128, 128, 128)]
    rows = [(131072, 768), (65536, 1024), (32768, 4096), (16384, 8192), (1 << 20, 96)]
    if toy:
        images, unets, rows = [(2, 4, 3, 4)], [(2, 8, 3, 4)], [(4, 16)]
    table = []
    for backward in (False, True):
        for layout in ("NCHW", "NHWC"):
            table += [Cell("batch", backward, layout, shape) for shape in images]
            table += [Cell("group", backward, layout, s, 4 if toy else 32) for s in unets]
            table += [Cell("instance", backward, layout, unets[0])]
        table += [Cell(op, backward, "", shape) for op in ("layer", "rms") for shape in rows]
    return table


def ours(cell, x, dy, weight, bias):
    """The call of fastnorm with out= given, and that of its forward with a new result."""
    common = {"layout": cell.layout} if cell.layout else {}
    channels = cell.shape[1]
    before = {"group": (cell.groups,), "layer": (channels,), "rms": (channels,)}.get(cell.op, ())
    after = {
        "batch": (None, None, weight, bias, True), "instance": (None, None, weight, bias),
        "group": (weight, bias), "layer": (weight, bias), "rms": (weight, 1e-5),
    }[cell.op]
    forward = getattr(fastnorm, f"{cell.op}_norm")
    y, stats = forward(x, *before, *after, return_stats=True, **common)
    if not cell.backward:
        return lambda: forward(x, *before, *after, out=y, **common)
    backward = getattr(fastnorm, f"{cell.op}_norm_backward")
    return lambda: backward(dy, x, stats, *before, weight, out=y, **common).dx


def theirs(torch, cell, x, dy, weight, bias, compiled=False):
    """PyTorch's, on tensors whose axes are (N, C, ...) or rows."""
    f, channels = torch.nn.functional, (cell.shape[1],)
    forward = {
        "batch": lambda x, w, b: f.batch_norm(x, None, None, w, b, True),
        "group": lambda x, w, b: f.group_norm(x, cell.groups, w, b),
        "instance": lambda x, w, b: f.instance_norm(x, weight=w, bias=b),
        "layer": lambda x, w, b: f.layer_norm(x, channels, w, b),
        "rms": lambda x, w, b: f.rms_norm(x, channels, w, 1e-5),
    }[cell.op]
    if compiled:
        forward = torch.compile(forward, dynamic=False)
    if not cell.backward:
        return lambda: forward(x, weight, bias)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = forward(*leaves)
    wanted = leaves[:2] if cell.op == "rms" else leaves
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)[0]


def graph_of(torch, call, count):
    """`count` calls as one CUDA graph, after some outside of it that compile and load."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(count):
            call()
    return graph


def seconds_of(torch, graph, count):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def host_seconds(call, synchronize, count=20):
    synchronize()
    started = time.perf_counter()
    for _ in range(count):
        call()
    took = (time.perf_counter() - started) / count
    synchronize()
    return took


def tensors(torch, cell, dtype):
    """x, dy, weight, bias; x and dy with axes (N, C, ...), in the memory of the cell's layout."""
    torch.manual_seed(0)
    shape = cell.shape
    if cell.layout == "NHWC":
        shape = (shape[0], *shape[2:], shape[1])
    x, dy = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    if cell.layout == "NHWC":
        x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
    weight, bias = (torch.randn(cell.shape[1], device="cuda") for _ in range(2))
    return x * 2 + 0.5, dy, weight, bias


def measure(torch, cell, dtype):
    x, dy, weight, bias = tensors(torch, cell, dtype)
    # PyTorch wants the parameters of rows in the type of x.
    w, b = (weight.to(dtype), bias.to(dtype)) if cell.op in ("layer", "rms") else (weight, bias)
    channels_first = cell.layout != "NHWC"
    mine = (x, dy) if channels_first else (x.movedim(1, -1), dy.movedim(1, -1))
    calls = {
        "fastnorm": ours(cell, *mine, w, b),
        "PyTorch": theirs(torch, cell, x, dy, w, b),
    }
    if not cell.backward:
        torch.compiler.reset()
        calls["torch.compile"] = theirs(torch, cell, x, dy, w, b, compiled=True)
    exact = theirs(torch, cell, *(t.double() for t in (x, dy, w, b)))()
    wrong = []
    for name, call in calls.items():
        found = call()
        if name == "fastnorm" and not channels_first:
            found = found.movedim(-1, 1)
        error = float((found.double() - exact).abs().max() / exact.abs().max())
        if not error < (2e-5 if dtype == torch.float32 else 2e-2):
            wrong.append((name, error))
    del exact
    source, target = torch.empty_like(x), torch.empty_like(x)
    calls["copy"] = lambda: target.copy_(source)
    nbytes = prod(cell.shape) * x.element_size()
    count = max(1, min(50, int(2e-3 / (nbytes / 1e12))))
    row = {"bytes": nbytes, "wrong": wrong, "kernel": {}, "call": {}}
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = graph_of(torch, call, count)
        except RuntimeError as error:  # what cannot be captured is left out, and said
            row["wrong"].append((name, f"not measured: {error}"))
            torch.cuda.synchronize()
            continue
        row["call"][name] = host_seconds(call, torch.cuda.synchronize)
    times = {name: [] for name in graphs}
    for turn in range(ROUNDS):
        names = list(graphs)
        for name in names[turn % len(names):] + names[: turn % len(names)]:
            seconds_of(torch, graphs[name], count)
            times[name].append(seconds_of(torch, graphs[name], count))
    row["kernel"] = {name: statistics.median(values) for name, values in times.items()}
    return row


def measure_toy(cell):
    from numba import cuda

    rng = np.random.default_rng(0)
    shape = cell.shape
    if cell.layout == "NHWC":
        shape = (shape[0], *shape[2:], shape[1])
    x, dy = (cuda.to_device(rng.normal(size=shape).astype(np.float32)) for _ in range(2))
    weight, bias = (cuda.to_device(np.ones(cell.shape[1], np.float32)) for _ in range(2))
    call = ours(cell, x, dy, weight, bias)
    seconds = host_seconds(call, lambda: None, 1)
    assert np.all(np.isfinite(call().copy_to_host()))
    return {
        "bytes": prod(shape) * 4, "wrong": [], "call": {"fastnorm": seconds, "copy": seconds},
        "kernel": {"fastnorm": seconds, "copy": seconds},
    }


def show(console, rows, title):
    names = list(dict.fromkeys(name for row in rows.values() for name in row["kernel"]))
    names.remove("copy")
    view = Table(title=f"{title}: share of the copy bandwidth (call time in us)")
    view.add_column("cell", no_wrap=True)
    view.add_column("copy GB/s", justify="right")
    for name in names:
        view.add_column(name, justify="right")
    view.add_column("faster than PyTorch", justify="right")
    for cell, row in rows.items():
        copy, kernel = row["kernel"]["copy"], row["kernel"]
        floor = copy * (1.5 if cell.backward else 1)
        shown = [
            f"{floor / kernel[n]:.2f} ({row['call'][n] * 1e6:.0f})" if n in kernel else "-"
            for n in names
        ]
        peer = kernel.get("PyTorch", float("nan"))
        view.add_row(str(cell), f"{2 * row['bytes'] / copy / 1e9:.0f}", *shown,
                     f"{peer / kernel.get('fastnorm', float('nan')):.2f}")
        for name, why in row["wrong"]:
            view.add_row(f"  {name}: {why}")
    console.width = max(console.width, 60 + 16 * len(names))
    console.print(view)


def main():
    parser = argparse.ArgumentParser(description="The CUDA backend beside PyTorch.")
    parser.add_argument("--toy", action="store_true", help="small sizes, in Numba's simulator")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose name holds TEXT")
    parser.add_argument("--json", metavar="FILE", help="save the measurements")
    options = parser.parse_args()
    console = Console()
    chosen = [cell for cell in cells(options.toy) if options.only in str(cell)]
    saved = {}
    if options.toy:
        rows = {cell: measure_toy(cell) for cell in track(chosen, "simulating")}
        show(console, rows, "toy")
        saved["toy"] = rows
        machine = "simulator"
    else:
        import torch

        if not torch.cuda.is_available():
            sys.exit("benchmarks/gpu.py: no GPU here; --toy runs in the simulator")
        machine = torch.cuda.get_device_name()
        for dtype in ("float32", "bfloat16"):
            rows = {}
            for cell in track(chosen, dtype):
                rows[cell] = measure(torch, cell, getattr(torch, dtype))
                torch.cuda.empty_cache()
            show(console, rows, f"{machine}, {dtype}")
            saved[dtype] = rows
    if options.json:
        content = {
            dtype: [asdict(cell) | row for cell, row in rows.items()]
            for dtype, rows in saved.items()
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "rounds": ROUNDS} | content, file, indent=1)


if __name__ == "__main__":
    main()
