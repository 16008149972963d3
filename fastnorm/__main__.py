"""The command line: python -m fastnorm, or fastnorm."""

import argparse
import sys


def main(arguments=None):
    """Run one command; returns the exit status."""
    import fastnorm
    from fastnorm.dtypes import TABLE

    parser = argparse.ArgumentParser(prog="fastnorm", description=fastnorm.__doc__)
    parser.add_argument("--version", action="version", version=f"fastnorm {fastnorm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train LeNet-5 with and without batch norm on real images",
        description="Train LeNet-5 with and without batch norm and compare the test accuracies.",
    )
    demo.add_argument("--data", metavar="DIR", help="CIFAR-10 python batches (default: digits)")
    demo.add_argument("--epochs", type=_positive, default=10)
    demo.add_argument("--batch", type=_positive, default=64, help="images in a batch")
    demo.add_argument("--rate", type=float, default=0.01, help="Adam's learning rate")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--plot", default="lenet5.png", help="PNG to save, or '' for none")
    demo.set_defaults(run=_demo)
    bench = commands.add_parser(
        "bench",
        help="measure against PyTorch and others, in units of the memory floor",
        description="Time over the memory floor for fastnorm and every peer that is installed.",
    )
    bench.add_argument("--quick", action="store_true", help="a few cells, under a minute")
    bench.add_argument("--threads", type=_positive, default=2)
    bench.add_argument(
        "--dtype", choices=("float32", "float64", "float16", "bfloat16"), default="float32"
    )
    bench.add_argument("--only", default="", metavar="TEXT", help="cells whose name holds TEXT")
    bench.add_argument("--contenders", metavar="A,B", help="instead of all that are installed")
    bench.add_argument("--seconds", type=float, help="for each cell")
    bench.add_argument("--json", metavar="FILE", help="save the measurements")
    bench.add_argument("--plot", metavar="FILE", help="save bars as PNG and SVG")
    bench.set_defaults(run=_bench)
    config = commands.add_parser(
        "config",
        help="say where a C compiler finds the header and the library",
        description="cc $(fastnorm config --cflags) program.c $(fastnorm config --libs)",
    )
    for flag in ("cflags", "libs", "cmakedir", "pkgconfigdir", "version"):
        config.add_argument(f"--{flag}", dest="flags", action="append_const", const=flag)
    config.set_defaults(run=_config)
    commands.add_parser("explain", help="say which backend runs and why").set_defaults(run=_explain)
    warmup = commands.add_parser(
        "warmup",
        help="compile the Numba backend's kernels into its cache on disk",
        description="Compile every kernel of the Numba backend, so that no later call does.",
    )
    warmup.add_argument(
        "--dtype", choices=[str(dtype) for dtype in TABLE], help="default: float32 and float64"
    )
    warmup.set_defaults(run=_warmup)
    chosen = parser.parse_args(arguments)
    return chosen.run(chosen)


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def _demo(chosen):
    from fastnorm.demo import data, lenet

    try:
        images = data.cifar10(chosen.data) if chosen.data else data.digits(chosen.seed)
        lenet.run(images, chosen.epochs, chosen.rate, chosen.batch, chosen.seed, chosen.plot)
    except FileNotFoundError as error:
        print(f"fastnorm demo: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        hint = "python -m pip install 'fastnorm[demo]'"
        print(f"fastnorm demo: {error}; install what it needs with: {hint}", file=sys.stderr)
        return 1
    return 0


def _bench(chosen):
    from fastnorm.bench import run

    names = chosen.contenders.split(",") if chosen.contenders else None
    try:
        run.run(
            chosen.quick, chosen.threads, names, chosen.only, chosen.seconds, chosen.dtype,
            chosen.json, chosen.plot,
        )
    except ModuleNotFoundError as error:
        hint = "python -m pip install 'fastnorm[bench]'"
        print(f"fastnorm bench: {error}; install what it needs with: {hint}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"fastnorm {error}", file=sys.stderr)
        return 2
    return 0


def _warmup(chosen):
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    from fastnorm import backends, get_num_threads

    numba_cpu = backends.load("numba")
    if isinstance(numba_cpu, str):
        print(f"fastnorm warmup: the numba backend {numba_cpu}", file=sys.stderr)
        return 1
    try:
        from rich.progress import track
    except ModuleNotFoundError as error:
        hint = "python -m pip install 'fastnorm[bench]'"
        print(f"fastnorm warmup: {error}; for a progress bar: {hint}", file=sys.stderr)

        def track(work, description, total):
            return work

    # From the last kernel, as those that take longest should not be left for the end.
    work = [
        (number, dtype)
        for number in reversed(range(len(numba_cpu.kernels())))
        for dtype in ([chosen.dtype] if chosen.dtype else ["float32", "float64"])
    ]
    with ProcessPoolExecutor(get_num_threads(), get_context("spawn")) as pool:
        compiling = [pool.submit(numba_cpu.compile_kernel, *each) for each in work]
        for done in track(as_completed(compiling), "compiling", len(work)):
            done.result()
    return 0


def _config(chosen):
    from fastnorm import install

    try:
        print(*install.flags(*(chosen.flags or ("cflags", "libs"))))
    except FileNotFoundError as error:
        print(f"fastnorm config: {error}", file=sys.stderr)
        return 1
    return 0


def _explain(chosen):
    import fastnorm

    fastnorm.explain()
    return 0


if __name__ == "__main__":
    sys.exit(main())
