"""The command line: python -m fastnorm, or fastnorm."""

import argparse
import sys


def main(arguments=None):
    """Run one command; returns the exit status."""
    import fastnorm

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
    commands.add_parser("explain", help="say which backend runs and why").set_defaults(run=_explain)
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


def _explain(chosen):
    import fastnorm

    fastnorm.explain()
    return 0


if __name__ == "__main__":
    sys.exit(main())
