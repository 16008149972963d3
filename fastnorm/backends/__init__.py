"""The backends, in the order in which they are tried.

A backend is a module with three functions:

    supports(dtype) -> None, or the reason why it cannot serve arrays of this type here

    forward(geometry, x, y, weight, bias, eps, mean, var, rstd, running_mean, running_var,
            momentum, flags, num_threads, fused)
    backward(geometry, dy, x, weight, mean, rstd, dx, dweight, dbias, flags, num_threads, fused)

x, y, dy and dx are C-contiguous arrays of one type, y may be x. weight, bias, dweight, dbias
and the running statistics are C-contiguous arrays of one type, or None. mean, var and rstd are
contiguous float64 arrays of b*g elements: outputs of a forward, each may be None, and inputs
of a backward. flags are those of fastnorm.h, and num_threads = 0 means all. With b > 1, running
statistics move only where mean and var are given. fused says what else is computed in the same
call; its arrays lie like x. The arguments have been checked.
"""

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

NO_MEAN = 1
GIVEN_STATISTICS = 2
BIASED_RUNNING_VAR = 4

# What the sets of a norm are: see geometry.py. Instance norm is a group norm of groups of one.
BATCH, GROUP, ROWS = range(3)

# fastnorm_activation of fastnorm.h, which has the formulas.
RELU, LEAKY_RELU, SILU, GELU, GELU_TANH = range(1, 6)
ACTIVATIONS = {None: 0, "relu": RELU, "leaky_relu": LEAKY_RELU, "silu": SILU, "gelu": GELU}


class Fused(NamedTuple):
    """What a call computes beside the normalization, as fastnorm.h has it."""

    activation: int = 0
    slope: float = 0.0
    residual: object = None
    sum: object = None  # forward: receives x + residual, which is then what is normalized
    bias: object = None  # backward: the forward's, of an activation
    dresidual: object = None  # backward: receives the residual's gradient, of an activation
    dsum: object = None  # backward: added to dx
    mask: object = None  # bool [b][o][i][s]: which values count; all outputs are 0 elsewhere


NOTHING = Fused()

MODULES = {"native": "native", "numba": "numba_cpu", "reference": "reference"}
NAMES = tuple(MODULES)
MODULES["cuda"] = "numba_cuda"  # never for NumPy arrays, and the only one for those on a GPU

_loaded = {}


def load(name):
    """The backend's module, or the reason why it cannot be imported."""
    if name not in _loaded:
        try:
            _loaded[name] = import_module(f"fastnorm.backends.{MODULES[name]}")
        except ImportError as error:
            _loaded[name] = f"cannot be imported: {error}{_why_not_built(name)}"
    return _loaded[name]


def _why_not_built(name):
    """What the build of the native library said, where it failed."""
    said = Path(__file__).parents[1] / "lib" / "not-built.txt"
    if name != "native" or not said.exists():
        return ""
    return f" (not built: {said.read_text(encoding='utf-8').strip()})"


def refusal(name, dtype):
    """None where the backend serves this type, else the reason why not."""
    backend = load(name)
    return backend if isinstance(backend, str) else backend.supports(dtype)
