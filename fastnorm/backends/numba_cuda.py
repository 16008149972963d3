"""The CUDA backend: launches of cuda_kernels.py on arrays on a GPU.

refusal() says why it cannot serve here. forward and backward take views of device arrays
(device.py) that have been checked, and queue their kernels on the current stream of x's library;
scratch memory comes from that library too. How an array is cut depends on the geometry alone.
"""

import os
from functools import cache
from importlib.util import find_spec

import numpy as np
from numba import config, cuda

from fastnorm.backends import BIASED_RUNNING_VAR, GIVEN_STATISTICS, NO_MEAN
from fastnorm.backends.cuda_kernels import ACROSS, COEFFICIENTS, DOWN, THREADS, kernels, words_of
from fastnorm.backends.cuda_words import VECTOR
from fastnorm.dtypes import DEVICE_TABLE

BLOCKS = 2048  # in a launch where the array is large enough: many for each multiprocessor
STEPS = 4  # vectors that a thread reads at least
INSTALL = "install fastnorm[cuda13] or fastnorm[cuda12], as your driver has it"

_process = os.getpid()


@cache
def _reason():
    if config.ENABLE_CUDASIM:
        return None
    if find_spec("numba_cuda") is None:
        return f"needs numba-cuda: {INSTALL}"
    if not cuda.is_available():
        why = " ".join(str(cuda.cuda_error() or "no device").split())
        return f"finds no GPU that it can use ({why}): {INSTALL}"
    return None


def refusal():
    """None, or the reason why nothing can be computed on a GPU here."""
    if os.getpid() != _process:
        return (
            "cannot be used in a process forked from one that has loaded it: a CUDA context does"
            " not survive a fork; start the process with 'spawn' or 'forkserver'"
        )
    return _reason()


def _ceil_div(a, b):
    return -(-a // b)


def _address(array):
    if array is None:
        return 0
    if config.ENABLE_CUDASIM:
        return words_of.open_array(array.owner._ary)
    return array.address


class _Call:
    """Launches of one call: its kernels, its stream, and its scratch memory."""

    def __init__(self, x, parameter, run, *others):
        """`run` elements lie one behind the other; vector accesses need whole vectors of them."""
        self.x = x
        lanes = VECTOR // DEVICE_TABLE[x.dtype].itemsize
        wide = run % lanes == 0 and all(a.address % VECTOR == 0 for a in (x, *others))
        self.kernels = kernels(x.dtype, parameter, wide)
        self.lanes = self.kernels.lanes
        self.accumulator = DEVICE_TABLE[x.dtype].accumulator
        self.number = np.dtype(self.accumulator).type
        self.stream = None if config.ENABLE_CUDASIM else x.stream()
        self.kept = []

    def scratch(self, count):
        array = self.x.empty((count,), self.accumulator)
        self.kept.append(array)
        return _address(array)

    def launch(self, kernel, blocks, *arguments):
        if blocks == 0:
            return
        if self.stream is None:
            kernel[blocks, THREADS](*arguments)
        else:
            kernel[blocks, THREADS, cuda.external_stream(self.stream)](*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if config.ENABLE_CUDASIM:
            words_of.close_arrays()


class _Cut:
    """A geometry cut into parts: every channel of a sample, by runs or down columns."""

    def __init__(self, sizes, lanes):
        self.b, self.o, self.g, self.k, self.i = sizes[:5]
        self.channels = self.g * self.k
        self.in_columns = self.i == 1
        if self.in_columns:
            self.chunks = _ceil_div(self.channels, ACROSS * lanes)
            most = _ceil_div(self.o, DOWN * STEPS)
            tiles = max(1, min(most, BLOCKS // max(1, self.b * self.chunks)))
            self.length = _ceil_div(self.o, tiles)
            self.tiles = _ceil_div(self.o, self.length)
            self.parts = self.tiles * DOWN
            self.blocks = self.b * self.chunks * self.tiles
        else:
            vectors = self.o * self.i // lanes
            most = _ceil_div(vectors, THREADS * STEPS)
            parts = max(1, min(most, BLOCKS // max(1, self.b * self.channels)))
            self.length = _ceil_div(vectors, parts)
            self.parts = _ceil_div(vectors, self.length)
            self.blocks = self.b * self.channels * self.parts

    def where(self):
        """The arguments that a kernel of either order wants last."""
        if self.in_columns:
            return self.o, self.channels, self.chunks, self.tiles, self.length
        return self.o, self.channels, self.i, self.parts, self.length


def _in_elements(sizes, given):
    return sizes.i == sizes.o == 1 and not given


def _vector_run(sizes, given):
    if sizes.i > 1:
        return sizes.i
    return sizes.k if _in_elements(sizes, given) else sizes.g * sizes.k


def forward(
    sizes, x, y, mean, var, rstd, eps, momentum, flags, weight, bias, running_mean, running_var
):
    if x.size == 0:
        return
    given, has_mean = bool(flags & GIVEN_STATISTICS), not flags & NO_MEAN
    parameters = [a for a in (weight, bias, running_mean, running_var) if a is not None]
    parameter = parameters[0].dtype if parameters else x.dtype
    with _Call(x, parameter, _vector_run(sizes, given), y) as call:
        k, at = call.kernels, _address
        statistics = (at(mean), at(var), at(rstd))
        if _in_elements(sizes, given):
            call.launch(
                k.element_forward, sizes.b * sizes.g, at(x), at(y), at(weight), at(bias),
                *statistics, sizes.g, sizes.k, int(has_mean), call.number(eps),
            )
        else:
            _forward_in_parts(
                call, sizes, x, y, weight, bias, running_mean, running_var, statistics, eps,
                has_mean, given,
            )
        if not given:
            count = sizes.values
            unbiased = 1 if flags & BIASED_RUNNING_VAR else count / max(count - 1, 1)
            for running, found, scale in ((running_mean, mean, 1), (running_var, var, unbiased)):
                if running is not None:
                    call.launch(
                        k.move_running, _ceil_div(sizes.g, THREADS), at(running), at(found),
                        sizes.b, sizes.g, call.number(scale), call.number(momentum),
                    )


def _forward_in_parts(
    call, sizes, x, y, weight, bias, running_mean, running_var, statistics, eps, has_mean, given
):
    k, at = call.kernels, _address
    cut = _Cut(sizes, call.lanes)
    partial = 0
    if not given:
        partial = call.scratch(3 * cut.b * cut.channels * cut.parts)
        if cut.in_columns:
            call.launch(
                k.column_moments, cut.blocks, at(x), partial, cut.o, cut.channels, cut.g,
                cut.chunks, cut.parts, cut.length,
            )
        else:
            call.launch(
                k.row_moments, cut.blocks, at(x), partial, cut.o, cut.channels, cut.g, cut.i,
                cut.parts, cut.length,
            )
    coefficients = call.scratch(COEFFICIENTS * cut.b * cut.channels)
    call.launch(
        k.finish_forward, cut.b * cut.g, at(x), partial, at(weight), at(bias), at(running_mean),
        at(running_var), coefficients, *statistics, cut.o, cut.g, cut.k, cut.i, cut.parts,
        int(has_mean), int(given), call.number(eps),
    )
    kernel = k.map_columns if cut.in_columns else k.map_rows
    call.launch(kernel, cut.blocks, at(x), 0, at(y), coefficients, *cut.where())


def backward(sizes, dy, x, weight, mean, rstd, dx, dweight, dbias, flags):
    if x.size == 0:
        return
    given, has_mean = bool(flags & GIVEN_STATISTICS), not flags & NO_MEAN
    with _Call(x, dweight.dtype, _vector_run(sizes, given), dy, dx) as call:
        k, at = call.kernels, _address
        if _in_elements(sizes, given):
            # Every row is a set; dweight is summed down the rows of the whole array.
            cut = _Cut((1, sizes.b, sizes.g, sizes.k, 1), call.lanes)
        else:
            cut = _Cut(sizes, call.lanes)
        by_row = at(rstd) if _in_elements(sizes, given) else 0
        partial = call.scratch(2 * cut.b * cut.channels * cut.parts)
        if cut.in_columns:
            call.launch(
                k.column_products, cut.blocks, at(x), at(dy), partial, at(mean), by_row, cut.o,
                cut.channels, cut.g, cut.chunks, cut.parts, cut.length,
            )
        else:
            call.launch(
                k.row_products, cut.blocks, at(x), at(dy), partial, at(mean), cut.o, cut.channels,
                cut.g, cut.i, cut.parts, cut.length,
            )
        call.launch(
            k.finish_parameters, cut.channels, partial, 0 if by_row else at(rstd), at(dweight),
            at(dbias), cut.b, cut.g, cut.k, cut.parts,
        )
        if by_row:
            call.launch(
                k.element_backward, sizes.b * sizes.g, at(dy), at(x), at(dx), at(weight), at(mean),
                at(rstd), sizes.g, sizes.k, int(has_mean),
            )
            return
        coefficients = call.scratch(COEFFICIENTS * cut.b * cut.channels)
        call.launch(
            k.finish_backward, cut.b * cut.g, partial, at(weight), coefficients, at(mean), at(rstd),
            cut.g, cut.k, cut.parts, int(has_mean), int(given), call.number(sizes.values),
        )
        kernel = k.map_columns if cut.in_columns else k.map_rows
        call.launch(kernel, cut.blocks, at(x), at(dy), at(dx), coefficients, *cut.where())
