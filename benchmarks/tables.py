"""Write the tables of README.md and docs/cost-model.md, and the plot, from the measurements in
results/ (`make measure`).

    python benchmarks/tables.py          # and print what the prose beside them tells
    python benchmarks/tables.py --check  # only see whether they are those of the measurements

A table lies between <!-- table NAME --> and <!-- end -->. Figures are geometric means over the
memory floor of all cells but the tiny ones, of x of 8 MB or more / smaller."""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

from fastnorm.bench.cells import cells
from fastnorm.bench.plot import save_plot
from fastnorm.bench.run import BOUND, LARGE, best_peer, mean_ratio

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# The tables are the first one's; the second has no AVX-512, the third no last level worth the name.
MACHINE, AVX2, DISTANT = MACHINES = ("epyc-zen4", "epyc-zen3", "xeon")
NUMBA = "fastnorm numba"
NAMES = {"fastnorm": "fastnorm, large / in cache", NUMBA: "its Numba backend"}
CONTENDERS = (
    "fastnorm", NUMBA, "PyTorch", "torch.compile", "oneDNN", "ONNX Runtime", "JAX", "NumPy",
)
IMAGES = ((" NCHW", "channels first"), (" NHWC", "channels last"))

# Title: families, as Cell.family has them.
MAIN = {"batch norm (N, C)": ["batch"]}
MAIN |= {f"batch norm, training {layout}": [f"batch {layout}"] for layout in ("NCHW", "NHWC")}
MAIN |= {"batch norm (N, C) backward": ["batch backward"]}
MAIN |= {f"batch norm backward {at}": [f"batch backward {at}"] for at in ("NCHW", "NHWC")}
MAIN |= {f"batch norm, inference {at}": [f"batch_eval {at}"] for at in ("NCHW", "NHWC")}
MAIN |= {
    f"{op} norm{back} {at}": [f"{op}{back} {at}"]
    for op in ("group", "instance") for back in ("", " backward") for at in ("NCHW", "NHWC")
}
MAIN |= {
    "layer norm": ["layer"], "layer norm backward": ["layer backward"],
    "layer norm over channels, NCHW": ["layer NCHW"],
    "layer norm over channels backward, NCHW": ["layer backward NCHW"],
    "RMS norm": ["rms"], "RMS norm backward": ["rms backward"],
}
FUSED = {
    title: [family + at for at in (" NCHW", " NHWC")]
    for title, family in {
        "batch norm, inference + residual + ReLU": "batch_eval+residual+relu",
        "batch norm, training + residual + ReLU": "batch+residual+relu",
        "batch norm, training + ReLU": "batch+relu",
        "batch norm + ReLU backward": "batch+relu backward",
        "group norm + SiLU": "group+silu", "group norm + SiLU backward": "group+silu backward",
    }.items()
} | {
    "layer norm of x + residual": ["layer+residual"],
    "RMS norm of x + residual": ["rms+residual"],
}
LEAST = {
    f"{op} norm{back}, {told}": [f"{op}{back}{at}"]
    for op in ("batch", "group", "instance") for back in ("", " backward") for at, told in IMAGES
} | {
    "batch norm, (N, C)": ["batch"], "batch norm backward, (N, C)": ["batch backward"],
    "layer norm": ["layer"], "layer norm backward": ["layer backward"],
    "RMS norm": ["rms"], "RMS norm backward": ["rms backward"],
    "layer norm over channels": ["layer NCHW"],
    "layer norm over channels backward": ["layer backward NCHW"],
}


def load(name, fused=False, machine=MACHINE):
    """{Cell: row}, as bench.run has them: of plain calls, or of those with something beside."""
    text = (RESULTS / f"{machine}-{name}.json").read_text(encoding="utf-8")
    rows = json.loads(text)["cells"]
    return {cell: rows[str(cell)] for cell in cells()
            if str(cell) in rows and bool(cell.after) == fused}


def counted(rows):
    return [row for cell, row in rows.items() if not cell.tiny]


def over(rows, who):
    """The geometric mean of a contender's time over the floor, or of the bound."""
    took = [(row[BOUND] if who == BOUND else row["times"].get(who), row["floor"]) for row in rows]
    return mean_ratio(seconds / floor for seconds, floor in took if seconds is not None)


def figures(ratios):
    """Those of x of 8 MB or more / smaller; - where there is none."""
    told = ["-" if ratio != ratio else f"{ratio:.2f}" for ratio in ratios]
    return "-" if set(told) == {"-"} else " / ".join(told)


def line(*columns):
    return f"| {' | '.join(columns)} |"


def table(rows, first, titles, who, names, total=None):
    """`first` is the first column's title, `total` that of a last row, of all cells."""
    lines = [line(first, *(names.get(n, n) for n in who)), "|---" * (1 + len(who)) + "|"]
    for title, families in titles.items():
        members = {cell: row for cell, row in rows.items()
                   if cell.family in families and not cell.tiny}
        sizes = [[row for cell, row in members.items() if (cell.bytes(4) >= LARGE) == large]
                 for large in (True, False)]
        lines.append(line(title, *(figures([over(some, n) for some in sizes]) for n in who)))
    if total:
        means = [f"{over(counted(rows), n):.2f}" for n in who]
        lines.append(line(f"**{total.format(len(counted(rows)))}**", *means))
    return lines


def contenders_of(rows):
    found = {name for row in rows.values() for name in row["times"]}
    return [BOUND, *(name for name in CONTENDERS if name in found)]


def main_table():
    rows = load("2-threads")
    who = contenders_of(rows)
    return table(rows, "operation", MAIN, who, NAMES, "all {} cells but the tiny ones")


def fused_table():
    rows = load("2-threads", fused=True)
    names = NAMES | {"PyTorch": "PyTorch, calls apart"}
    return table(rows, "in one call", FUSED, contenders_of(rows), names)


def settings_table():
    """The same cells otherwise."""
    lines = [line("the same cells", BOUND, "fastnorm", "PyTorch", "PyTorch is faster in"),
             "|---" * 5 + "|"]
    for title, name, machine in (
        ("one thread", "1-thread", MACHINE),
        ("two threads, float64", "2-threads-float64", MACHINE),
        ("two threads, bfloat16 (its floor is half as large)", "2-threads-bfloat16", MACHINE),
        ("two threads of a Zen 3, without AVX-512", "2-threads", AVX2),
        ("two threads of a Xeon, its last level as far as memory", "2-threads", DISTANT),
        ("two threads of that Xeon, bfloat16", "2-threads-bfloat16", DISTANT),
    ):
        rows = load(name, machine=machine)
        slower = [f"{cell} ({row['times']['fastnorm'] / row['times']['PyTorch']:.2f})"
                  for cell, row in rows.items()
                  if not cell.tiny and row["times"]["fastnorm"] >= row["times"]["PyTorch"]]
        means = (f"{over(counted(rows), who):.2f}" for who in (BOUND, "fastnorm", "PyTorch"))
        title = f"[{title}](benchmarks/results/{machine}-{name}.json)"
        lines.append(line(title, *means, ", ".join(slower) or "no cell"))
    return lines


def least_table():
    rows = load("2-threads-least")
    who = [BOUND, "least kernel", "fastnorm"]
    return table(rows, "float32, two threads; large / in cache", LEAST, who, {}, "all {} cells")


def bound_table():
    """Of sets that no cache holds."""
    lines = [line("batch norm, float32, two threads", "two passes over the floor",
                  "fastnorm over the floor"), "|---" * 3 + "|"]
    rows = {str(cell): row for cell, row in load("2-threads").items()}
    for name, title in (
        ("batch NHWC 32x256x56x56", "training, channels last, 32x256x56x56"),
        ("batch backward NHWC 32x256x56x56", "backward, channels last, 32x256x56x56"),
        ("batch backward NHWC 32x512x28x28", "backward, channels last, 32x512x28x28"),
    ):
        means = (over([rows[name]], who) for who in (BOUND, "fastnorm"))
        lines.append(line(title, *(f"{mean:.2f}" for mean in means)))
    return lines


TABLES = {
    "README.md": {"main": main_table, "settings": settings_table, "fused": fused_table},
    "docs/cost-model.md": {"bound": bound_table, "least": least_table},
}


def compared(title, rows):
    """What the prose tells of a run beside peers."""
    ratios = {cell: row["times"]["fastnorm"] / best_peer(row)[1] for cell, row in rows.items()}
    some = {cell: ratio for cell, ratio in ratios.items() if not cell.tiny}
    behind = {cell: ratio for cell, ratio in some.items() if ratio >= 1}
    yield f"{title}: {1 / mean_ratio(some.values()):.2f} times as fast as the best peer"
    yield f"  behind in {len(behind)} of {len(some)}: " + ", ".join(
        f"{best_peer(rows[cell])[0]} in {cell} {ratio:.2f}" for cell, ratio in behind.items())
    twice = [(cell, row["times"]) for cell, row in rows.items()
             if not cell.tiny and NUMBA in row["times"]]
    against = [times[NUMBA] / times["fastnorm"] for _, times in twice]
    longer = [times[NUMBA] / times["fastnorm"] for _, times in twice if times["fastnorm"] >= 1e-4]
    torch = [times["PyTorch"] / times[NUMBA] for _, times in twice if "PyTorch" in times]
    yield (f"  Numba {mean_ratio(against):.2f} times native ({mean_ratio(longer):.2f} from 0.1 ms),"
           f" {mean_ratio(torch):.2f} times as fast as PyTorch")
    below = [row[BOUND] / row["floor"] for row in counted(rows) if row[BOUND] < row["floor"]]
    yield f"  two passes below the floor in {len(below)}, down to {min(below, default=1):.2f}"
    tiny = {cell: row["times"] for cell, row in rows.items() if cell.tiny}
    torch = [times["fastnorm"] / times["PyTorch"] for times in tiny.values()]
    if torch:
        ahead = Counter(best_peer(rows[cell])[0] for cell in tiny if ratios[cell] > 1)
        worst = max(ratios[cell] for cell in tiny)
        yield (f"  {len(tiny)} tiny cells: {min(torch):.2f} to {max(torch):.2f} of PyTorch's time;"
               f" a peer ahead in {dict(ahead)}, up to {worst:.2f}")


def replaced(text, name, lines):
    pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
    found, count = re.subn(pattern, lambda at: at[1] + "\n".join(lines) + "\n" + at[2], text,
                           flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"<!-- table {name} --> stands {count} times, expected once")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = []
    for name, tables in TABLES.items():
        path = ROOT / name
        text = before = path.read_text(encoding="utf-8")
        for which, build in tables.items():
            text = replaced(text, which, build())
        if text != before and options.check:
            stale.append(name)
        elif text != before:
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.exit(f"not the tables of benchmarks/results: {', '.join(stale)}; make tables")
    if options.check:
        return
    for machine in MACHINES:
        for title, fused in (("plain calls", False), ("with something beside", True)):
            title = f"{machine}, {title}"
            print(*compared(title, load("2-threads", fused, machine)), sep="\n")
    rows = load("2-threads")
    print("saved", *save_plot(rows, contenders_of(rows)[1:], RESULTS / f"{MACHINE}-2-threads"))


if __name__ == "__main__":
    main()
