"""Who is measured. A contender is a function problem -> call, or None where it has no such
operation; call() computes once and returns y (or dx) as a NumPy array of the problem's shape.

Each gets its best setting: outputs reused where its interface allows, channels_last memory for
NHWC in PyTorch, buffers donated by jit, and the number of threads of the run.
"""

import sys
from dataclasses import dataclass
from functools import partial

import numpy as np

import fastnorm
from fastnorm import backends
from fastnorm.bench import onednn
from fastnorm.bench.cells import Cell


def aligned(shape, dtype, behind=0):
    """An uninitialised array that starts so many bytes behind a 64-byte boundary."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 128, np.uint8)
    start = -memory.ctypes.data % 64 + behind
    return memory[start : start + size].view(dtype).reshape(shape)


@dataclass
class Problem:
    """The arrays of a cell, in the cell's layout, and the number of threads."""

    cell: Cell
    threads: int
    dtype: type = np.float32
    behind: int = 0  # bytes of a cache line that the arrays start behind; NumPy's 16

    def __post_init__(self):
        cell, rng = self.cell, np.random.default_rng(0)
        room = partial(aligned, dtype=self.dtype, behind=self.behind)
        shape = cell.shape
        if cell.layout == "NHWC":
            shape = (shape[0], *shape[2:], shape[1])
        self.x, self.dy = room(shape), room(shape)
        self.x[...] = rng.normal(0.5, 2, shape)
        self.dy[...] = rng.normal(0, 1, shape)
        channels = cell.shape[1]
        self.weight, self.bias, self.mean = (
            np.ascontiguousarray(a) for a in rng.normal(1, 0.5, (3, channels)).astype(self.dtype)
        )
        self.var = rng.uniform(0.5, 2, channels).astype(self.dtype)
        self.out = room(shape)
        self.layout = cell.layout or "NCHW"
        self.axis = -1 if self.layout == "NHWC" else 1
        self.rows = cell.op in ("layer", "rms") and not cell.layout
        self.across = cell.op == "layer" and not self.rows
        self.residual = self.sum = None
        if "residual" in cell.after:
            self.residual = room(shape)
            self.residual[...] = rng.normal(0, 1, shape)
            self.sum = room(shape) if self.rows else None
        self.activation = next((what for what in cell.after if what != "residual"), None)

    def first(self, array):
        """A view with the channels at axis 1."""
        return np.moveaxis(array, self.axis, 1)


def native(problem, backend=None):
    """fastnorm, with out= and statistics kept."""
    p, cell = problem, problem.cell
    common = {"out": p.out, "num_threads": p.threads, "backend": backend}
    if p.across:
        common["axis"] = 1
    elif not p.rows:
        common["layout"] = p.layout
    channels = cell.shape[1]
    fused = {"activation": p.activation}
    if p.residual is not None:
        fused["residual"] = p.residual
    if p.sum is not None:
        fused["out_sum"] = p.sum
    arguments = {
        "batch": (None, None, p.weight, p.bias, True),
        "batch_eval": (p.mean, p.var, p.weight, p.bias),
        "group": (cell.groups, p.weight, p.bias),
        "instance": (None, None, p.weight, p.bias),
        "layer": (channels, p.weight, p.bias),
        "rms": (channels, p.weight, 1e-5),
    }[cell.op]
    name = "batch_norm" if cell.op == "batch_eval" else f"{cell.op}_norm"
    forward = getattr(fastnorm, name)
    if not cell.backward:
        call = partial(forward, p.x, *arguments, **common, **fused)
        return call if p.sum is None else lambda: call()[0]
    _, stats = forward(p.x, *arguments, **(common | {"out": None}), return_stats=True)
    if p.activation:
        common |= {"activation": p.activation, "bias": p.bias}
    backward = getattr(fastnorm, f"{name}_backward")
    extra = {"group": (cell.groups,), "layer": (channels,), "rms": (channels,)}.get(cell.op, ())
    call = partial(backward, p.dy, p.x, stats, *extra, p.weight, **common)
    return lambda: call().dx


def numba_(problem):
    """fastnorm's own Numba backend."""
    if backends.refusal("numba", problem.x.dtype) is not None:
        return None
    return native(problem, "numba")


def _torch_forward(problem, torch):
    """y = f(x, weight, bias) of torch.nn.functional."""
    f, cell = torch.nn.functional, problem.cell
    mean, var = _to_torch(problem.mean, torch), _to_torch(problem.var, torch)
    channels = (cell.shape[1],)
    layer_norm = _over_channels(f.layer_norm) if problem.across else f.layer_norm
    forward = {
        "batch": lambda x, w, b: f.batch_norm(x, None, None, w, b, True),
        "batch_eval": lambda x, w, b: f.batch_norm(x, mean, var, w, b),
        "group": lambda x, w, b: f.group_norm(x, cell.groups, w, b),
        "instance": lambda x, w, b: f.instance_norm(x, weight=w, bias=b),
        "layer": lambda x, w, b: layer_norm(x, channels, w, b),
        "rms": lambda x, w, b: f.rms_norm(x, channels, w, 1e-5),
    }[cell.op]
    if not cell.after:
        return forward
    residual = problem.residual
    if residual is not None:
        residual = _to_torch(residual if problem.rows else problem.first(residual), torch)
    activation = getattr(f, problem.activation or "", None)

    def fused(x, w, b):
        if problem.rows:
            total = x + residual
            return forward(total, w, b), total
        y = forward(x, w, b)
        if residual is not None:
            y += residual
        return activation(y, inplace=True)

    return fused


def _over_channels(layer_norm):
    """ConvNeXt's LayerNorm2d; y lies as x does."""
    return lambda x, *args: (
        layer_norm(x.permute(0, 2, 3, 1), *args).permute(0, 3, 1, 2).contiguous()
    )


def _to_torch(array, torch):
    """A tensor on the array's memory; torch.from_numpy knows no bfloat16."""
    if str(array.dtype) == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch_arrays(problem, torch):
    x, dy = (
        _to_torch(a if problem.rows else problem.first(a), torch) for a in (problem.x, problem.dy)
    )
    return x, dy, _to_torch(problem.weight, torch), _to_torch(problem.bias, torch)


def _from_torch(problem, tensor):
    tensor = (tensor[0] if isinstance(tensor, tuple) else tensor).detach()
    if str(problem.x.dtype) == "bfloat16":
        array = tensor.view(sys.modules["torch"].int16).numpy().view(problem.x.dtype)
    else:
        array = tensor.numpy()
    return array if problem.rows else np.moveaxis(array, 1, problem.axis)


def pytorch(problem):
    """Eager; a backward is the autograd node alone, on a graph that is kept."""
    import torch

    torch.set_num_threads(problem.threads)
    forward = _torch_forward(problem, torch)
    x, dy, weight, bias = _torch_arrays(problem, torch)
    if not problem.cell.backward:

        def call():
            with torch.no_grad():
                return _from_torch(problem, forward(x, weight, bias))

        return call
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = forward(*leaves)
    if problem.cell.op == "rms":
        leaves = leaves[:2]

    def call_backward():
        return _from_torch(problem, torch.autograd.grad(y, leaves, dy, retain_graph=True)[0])

    return call_backward


def torch_compile(problem):
    """Forwards only: a compiled backward cannot be called apart from its forward."""
    if problem.cell.backward:
        return None
    import torch

    torch.set_num_threads(problem.threads)
    torch.compiler.reset()
    forward = torch.compile(_torch_forward(problem, torch), dynamic=False)
    x, _, weight, bias = _torch_arrays(problem, torch)

    def call():
        with torch.no_grad():
            return _from_torch(problem, forward(x, weight, bias))

    return call


def _formula(problem, np_like):
    """The forward as array expressions, for NumPy and JAX."""
    p, cell = problem, problem.cell
    ndim = p.x.ndim
    axis = p.axis % ndim
    along = [1] * ndim
    along[axis] = -1

    def standard(x, axes):
        mean = x.mean(axes, keepdims=True)
        centred = x - mean
        var = (centred * centred).mean(axes, keepdims=True)
        return centred / np_like.sqrt(var + 1e-5)

    def spatial():
        return tuple(a for a in range(1, ndim) if a != axis)

    def forward(x, weight, bias):
        if cell.op == "layer":
            return standard(x, axis) * weight.reshape(along) + bias.reshape(along)
        if cell.op == "rms":
            return x / np_like.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight
        weight, bias = weight.reshape(along), bias.reshape(along)
        if cell.op == "batch_eval":
            scale = weight / np_like.sqrt(p.var.reshape(along) + 1e-5)
            return (x - p.mean.reshape(along)) * scale + bias
        if cell.op == "batch":
            return standard(x, (0, *spatial())) * weight + bias
        if cell.op == "instance":
            return standard(x, spatial()) * weight + bias
        split = [*x.shape[:axis], cell.groups, -1, *x.shape[axis + 1 :]]
        axes = tuple(a for a in range(1, ndim + 1) if a != axis)
        return standard(x.reshape(split), axes).reshape(x.shape) * weight + bias

    return forward


def numpy_(problem):
    """The formula as NumPy passes; forwards only."""
    if problem.cell.backward:
        return None
    forward = _formula(problem, np)
    return lambda: forward(problem.x, problem.weight, problem.bias)


def jax_(problem):
    """Jitted; the threads are those of the process's affinity."""
    import jax

    forward = _formula(problem, jax.numpy)
    arrays = (problem.x, problem.weight, problem.bias, problem.dy)
    x, weight, bias, dy = map(jax.numpy.asarray, arrays)
    if problem.cell.backward:
        function = jax.jit(lambda x, w, b, dy: jax.vjp(forward, x, w, b)[1](dy))
        return lambda: np.asarray(jax.block_until_ready(function(x, weight, bias, dy))[0])
    function = jax.jit(forward)
    return lambda: np.asarray(jax.block_until_ready(function(x, weight, bias)))


# The operators that ONNX Runtime has a CPU kernel for, all with the channels at axis 1.
_ONNX_OPERATORS = {
    "batch_eval": ("BatchNormalization", {}),
    "group": ("GroupNormalization", {}),
    "instance": ("InstanceNormalization", {}),
    "layer": ("LayerNormalization", {"axis": -1}),
    "rms": ("RMSNormalization", {"axis": -1}),
}


def onnx_runtime(problem):
    """A model of one node, its output bound to the problem's; forwards of NCHW and rows only."""
    p, op = problem, problem.cell.op
    if problem.cell.backward or p.layout == "NHWC" or p.across or op not in _ONNX_OPERATORS:
        return None
    if p.x.dtype.name == "bfloat16":  # which it does not bind
        return None
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    operator, attributes = _ONNX_OPERATORS[op]
    if op == "group":
        attributes = {"num_groups": p.cell.groups}
    parameters = {"weight": p.weight, "bias": p.bias, "mean": p.mean, "var": p.var}
    count = {"batch_eval": 4, "rms": 1}.get(op, 2)
    node = helper.make_node(
        operator, ["x", *list(parameters)[:count]], ["y"], epsilon=1e-5, **attributes
    )
    kind = helper.np_dtype_to_tensor_dtype(p.x.dtype)
    graph = helper.make_graph(
        [node], op, *([helper.make_tensor_value_info(name, kind, p.x.shape)] for name in "xy"),
        [numpy_helper.from_array(a, name) for name, a in list(parameters.items())[:count]],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = p.threads
    options.log_severity_level = 4
    # Its threads spin during a run, but not into the turn of the next contender.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        return None
    binding = session.io_binding()
    for bind, name, array in (
        (binding.bind_input, "x", p.x), (binding.bind_output, "y", p.out)
    ):
        bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def call():
        session.run_with_iobinding(binding)
        return p.out

    return call


# Who takes part in the cells of fused calls: fastnorm, and who has the same operations apart.
FUSING = ("fastnorm", "fastnorm numba", "PyTorch", "torch.compile")


def available(names=None, quick=False):
    """{name: contender} of those that are installed, fastnorm first."""
    from importlib.util import find_spec

    def installed(module):
        return onednn.library() is not None if module == "onednn" else find_spec(module)

    known = {
        "fastnorm": (native, "fastnorm"),
        "fastnorm numba": (numba_, "numba"),
        "PyTorch": (pytorch, "torch"),
        "torch.compile": (torch_compile, "torch"),
        "oneDNN": (onednn.onednn, "onednn"),
        "ONNX Runtime": (onnx_runtime, "onnxruntime"),
        "JAX": (jax_, "jax"),
        "NumPy": (numpy_, "numpy"),
    }
    if names is None:
        names = ("fastnorm", "PyTorch") if quick else known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"bench: unknown contenders {unknown}, expected some of {list(known)}")
    return {name: known[name][0] for name in names if installed(known[name][1])}
