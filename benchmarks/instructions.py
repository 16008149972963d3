"""Which instructions of the library a call runs, and how often: where there are no performance
counters, as in most virtual machines, it shows what no profile does (a store of a struct for every
row, a microcoded `rep stos` for a few bytes). Linux on x86-64, with gcc and binutils.

    python benchmarks/instructions.py forward 392 1 1 128 1 1
    python benchmarks/instructions.py backward 1 8 64 1 49 1 --least 0.1

The sizes are those of a geometry, b o g k i s (see fastnorm.h); one thread. Figures are
instructions for each 16 values, one vector of x86-64-v4 in float32."""

import argparse
import collections
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fastnorm

HERE = Path(__file__).parent
REFUSED = 77  # as in instructions.c


def run(*command, **options):
    return subprocess.run(
        [str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True, **options
    ).stdout


def counted(library, folder, *words):
    """How often each address of the library was executed."""
    program = Path(folder) / "instructions"
    run("cc", "-O1", HERE / "instructions.c", "-I", fastnorm.get_include(), library, "-o", program,
        f"-Wl,-rpath,{library.parent}")
    try:
        lines = run(program, *words).splitlines()
    except subprocess.CalledProcessError as error:
        sys.exit("no process may be traced here" if error.returncode == REFUSED else str(error))
    return {int(at, 16): int(times) for at, times in (line.split() for line in lines)}


def disassembled(library):
    """(function, address, instruction) of every line."""
    function = ""
    for line in run("objdump", "-d", "--no-show-raw-insn", library).splitlines():
        at, _, text = line.partition(":")
        if line.endswith(">:"):
            function = line.split("<")[1][:-2]
        elif line.startswith(" ") and text:
            yield function, int(at, 16), text.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("direction", choices=["forward", "backward"])
    parser.add_argument("size", nargs=6, type=int, help="b o g k i s, as in fastnorm_geometry")
    parser.add_argument("--dtype", default="float32",
                        choices=["float32", "float64", "float16", "bfloat16"])
    parser.add_argument("--library", type=Path, help="another build of libfastnorm.so")
    parser.add_argument("--least", type=float, help="list what runs so often for each 16 values")
    options = parser.parse_args()
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        parser.error("it takes Linux on x86-64")
    library = (options.library or Path(fastnorm.get_library())).resolve()
    with tempfile.TemporaryDirectory() as folder:
        times = counted(library, folder, options.direction, options.dtype, *options.size)
    vectors = math.prod(options.size) / 16
    functions, slow, listed = collections.Counter(), [], []
    for function, at, text in disassembled(library):
        if at not in times:
            continue
        each = times[at] / vectors
        functions[function] += each
        line = f"{each:8.2f}  {at:8x}  {text}"
        if text.startswith("rep "):
            slow.append(line)
        if options.least is not None and each >= options.least:
            listed.append(line)
    print(f"{sum(functions.values()):8.2f}  in all")
    for function, each in functions.most_common(8):
        print(f"{each:8.2f}  {function}")
    if slow:
        print("\nmicrocoded (a step for every word):", *slow, sep="\n")
    if listed:
        print("\nas they lie:", *listed, sep="\n")


if __name__ == "__main__":
    main()
