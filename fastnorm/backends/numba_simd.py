"""Vectors in Numba: one cache line of values as a type of its own, to store it past the caches.

LLVM makes vectors of plain loops, but not streaming stores of them: it cannot know that y is
aligned. A map onto more than the last-level cache holds is 1.5 to 1.9 times faster with them. Nor
does it make vectors of a sum, unless it may choose the order: then two builds of one kernel gave
other bits. Here the lanes of a sum are spelled out.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LINE = 64  # bytes


class Vector(types.Type):
    """One line of values of a floating type."""

    def __init__(self, element):
        self.element = element
        self.lanes = LINE * 8 // element.bitwidth
        super().__init__(f"vector({element} x {self.lanes})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        element = manager.lookup(kind.element).get_value_type()
        super().__init__(manager, kind, ir.VectorType(element, kind.lanes))


def _pointer(context, builder, array_type, array, index, vector):
    """Where the vector at array[index] lies."""
    base = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(base, [index]), ir.PointerType(vector))


@intrinsic
def address(_typing, array):
    """Of array[0]; array.ctypes.data would count a reference."""

    def build(context, builder, _signature, arguments):
        base = cgutils.create_struct_proxy(array)(context, builder, arguments[0]).data
        return builder.ptrtoint(base, context.get_value_type(types.intp))

    return types.intp(array), build


@intrinsic
def splat(_typing, value):
    kind = Vector(value)

    def build(context, builder, _signature, arguments):
        vector = context.get_value_type(kind)
        zero = ir.Constant(ir.IntType(32), 0)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[0], zero)
        order = ir.Constant(ir.VectorType(ir.IntType(32), kind.lanes), [0] * kind.lanes)
        return builder.shuffle_vector(one, one, order)

    return kind(value), build


@intrinsic
def load(_typing, array, index):
    """The line at array[index], at any address."""
    kind = Vector(array.dtype)

    def build(context, builder, _signature, arguments):
        vector = context.get_value_type(kind)
        pointer = _pointer(context, builder, array, *arguments, vector)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return kind(array, types.intp), build


@intrinsic
def store(_typing, array, index, value):
    """A line to array[index], at any address."""

    def build(context, builder, _signature, arguments):
        vector = context.get_value_type(value)
        pointer = _pointer(context, builder, array, *arguments[:2], vector)
        builder.store(arguments[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), build


@intrinsic
def stream(_typing, array, index, value):
    """Store a line at array[index], which is aligned to a line, past the caches."""

    def build(context, builder, _signature, arguments):
        vector = context.get_value_type(value)
        pointer = _pointer(context, builder, array, *arguments[:2], vector)
        store = builder.store(arguments[2], pointer, align=LINE)
        one = ir.Constant(ir.IntType(32), 1)
        store.set_metadata("nontemporal", builder.module.add_metadata([one]))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), build


@intrinsic
def fold(_typing, value):
    """The sum of a line's values in float64, pairwise."""

    def build(_context, builder, _signature, arguments):
        lane, double = ir.IntType(32), ir.DoubleType()
        sums = [
            builder.extract_element(arguments[0], ir.Constant(lane, j)) for j in range(value.lanes)
        ]
        if value.element != types.float64:
            sums = [builder.fpext(one, double) for one in sums]
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [builder.fadd(sums[j], sums[j + half]) for j in range(half)]
        return sums[0]

    return types.float64(value), build


def _arithmetic(operation, instruction):
    @intrinsic
    def apply(_typing, a, b):
        def build(_context, builder, _signature, arguments):
            return getattr(builder, instruction)(*arguments)

        return a(a, b), build

    @overload(operation)
    def for_vectors(a, b):
        if isinstance(a, Vector) and a == b:
            return lambda a, b: apply(a, b)
        return None


for _operation, _instruction in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")
):
    _arithmetic(_operation, _instruction)
