"""Vectors in Numba: one cache line of values as a type of its own, to store it past the caches.

LLVM makes vectors of plain loops, but not streaming stores of them: it cannot know that y is
aligned. A map onto more than the last-level cache holds is 1.5 to 1.9 times faster with them. Nor
does it make vectors of a sum, unless it may choose the order: then two builds of one kernel gave
other bits. Here the lanes of a sum are spelled out.
"""

import operator
from platform import machine

import numba
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

ON_X86 = machine() in ("x86_64", "AMD64")
LINE = 64  # bytes
# Lines of the vectors that maps along runs are made of. With one, an exponential waits for itself
# (SiLU took 1.1 to 1.7 times as long); with two, maps in the second-level cache took up to 1.2
# times as long.
TOGETHER = 4


class Vector(types.Type):
    """A line of values of a floating type, or several lines one behind the other."""

    def __init__(self, element, lines=1):
        self.element = element
        self.lanes = lines * LINE * 8 // element.bitwidth
        super().__init__(f"vector({element} x {self.lanes})")


class Mask(types.Type):
    """What comparing two vectors gives."""

    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(f"mask({lanes})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        element = manager.lookup(kind.element).get_value_type()
        super().__init__(manager, kind, ir.VectorType(element, kind.lanes))


@register_model(Mask)
class MaskModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), kind.lanes))


def _pointer(context, builder, array_type, array, index, vector):
    """Where the vector at array[index] lies."""
    base = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    place = builder.gep(base, [index], inbounds=True)
    return builder.bitcast(place, ir.PointerType(vector))


@intrinsic
def address(_typing, array):
    """Of array[0]; array.ctypes.data would count a reference."""

    def build(context, builder, _signature, arguments):
        base = cgutils.create_struct_proxy(array)(context, builder, arguments[0]).data
        return builder.ptrtoint(base, context.get_value_type(types.intp))

    return types.intp(array), build


def _splat(builder, value, lanes):
    zero = ir.Constant(ir.IntType(32), 0)
    vector = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(vector, value, zero)
    order = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(one, one, order)


@intrinsic
def splat(_typing, value):
    kind = Vector(value)

    def build(_context, builder, _signature, arguments):
        return _splat(builder, arguments[0], kind.lanes)

    return kind(value), build


def _common(a, b):
    """The type of both, where one may be a number beside a vector; or None."""
    if isinstance(a, Vector) and b in (a, a.element):
        return a
    if isinstance(b, Vector) and a == b.element:
        return b
    return None


def _alike(builder, kind, values):
    return [
        value if isinstance(value.type, ir.VectorType) else _splat(builder, value, kind.lanes)
        for value in values
    ]


# ---- elements of 16 bits: uint16 are the bits of float16, int16 those of bfloat16 ----------------
#
# They are float32 in registers, and rounded to nearest even where they are stored.

SHORT = (types.uint16, types.int16)


def work_of(element):
    return types.float32 if element in SHORT else element


def _shaped(scalar, like):
    """The IR type of scalars, or of as many in a vector as `like` has."""
    return ir.VectorType(scalar, like.count) if isinstance(like, ir.VectorType) else scalar


def _all(kind, value):
    is_vector = isinstance(kind, ir.VectorType)
    return ir.Constant(kind, [value] * kind.count if is_vector else value)


def _widen(builder, element, bits):
    """float32 of the bits of elements, one or a vector of them."""
    if element == types.uint16:
        half = builder.bitcast(bits, _shaped(ir.HalfType(), bits.type))
        return builder.fpext(half, _shaped(ir.FloatType(), bits.type))
    whole = _shaped(ir.IntType(32), bits.type)
    upper = builder.shl(builder.zext(bits, whole), _all(whole, 16))
    return builder.bitcast(upper, _shaped(ir.FloatType(), bits.type))


def _narrow(builder, element, value):
    """The bits of elements from float32; a NaN stays one, made quiet."""
    short = _shaped(ir.IntType(16), value.type)
    if element == types.uint16:
        half = builder.fptrunc(value, _shaped(ir.HalfType(), value.type))
        return builder.bitcast(half, short)
    whole = _shaped(ir.IntType(32), value.type)
    bits = builder.bitcast(value, whole)
    upper = builder.lshr(bits, _all(whole, 16))
    odd = builder.and_(upper, _all(whole, 1))
    rounded = builder.add(builder.add(bits, _all(whole, 0x7FFF)), odd)
    size = builder.and_(bits, _all(whole, 0x7FFFFFFF))
    nan = builder.icmp_unsigned(">", size, _all(whole, 0x7F800000))
    quiet = builder.or_(upper, _all(whole, 0x40))
    chosen = builder.select(nan, quiet, builder.lshr(rounded, _all(whole, 16)))
    return builder.trunc(chosen, short)


def _read(builder, element, pointer):
    value = builder.load(pointer, align=element.bitwidth // 8)
    return _widen(builder, element, value) if element in SHORT else value


@intrinsic
def lanes(_typing, array):
    """How many values a vector of the array's has: a constant of the compiled code, which
    array.itemsize would not be."""

    def build(context, _builder, _signature, _arguments):
        return context.get_constant(types.intp, LINE * 8 // work_of(array.dtype).bitwidth)

    return types.intp(array), build


@intrinsic
def bytes_of(_typing, array):
    """Of an element, as lanes."""

    def build(context, _builder, _signature, _arguments):
        return context.get_constant(types.intp, array.dtype.bitwidth // 8)

    return types.intp(array), build


def _same(_context, _builder, _signature, arguments):
    return arguments[0]


@intrinsic
def splat_part(_typing, value, count):
    """splat in the first `count` lanes; the others are 0."""
    kind = Vector(value)

    def build(_context, builder, _signature, arguments):
        vector = _splat(builder, arguments[0], kind.lanes)
        mask = _first(builder, arguments[1], kind.lanes)
        return builder.select(mask, vector, ir.Constant(vector.type, None))

    return kind(value, count), build


# Of a number instead of an array, these are the number.


def _loading(lines):
    @intrinsic
    def load(_typing, array, index):
        if isinstance(array, types.Float):
            return array(array, index), _same
        kind = Vector(work_of(array.dtype), lines)

        def build(context, builder, _signature, arguments):
            stored = ir.VectorType(context.get_value_type(array.dtype), kind.lanes)
            pointer = _pointer(context, builder, array, *arguments, stored)
            return _read(builder, array.dtype, pointer)

        return kind(array, types.intp), build

    return load


# The values at array[index], at any address: a vector of one line, or of TOGETHER.
load, load_together = _loading(1), _loading(TOGETHER)


_LETTERS = {"float": "f32", "double": "f64", "i16": "i16"}  # of LLVM's types, in names of functions


def _name(vector):
    return f"v{vector.count}{_LETTERS[str(vector.element)]}"


def _call(builder, name, result, operands):
    """Of a function that LLVM has."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def _masked(builder, operation, vector, result, operands):
    """LLVM's masked load or store of a vector: it touches no lane that is left out. (Loops over the
    last values one by one took 1.0 to 1.2 times as long: rows of 300, images of 7x7 and 14x14.)"""
    name = _name(vector)
    return _call(builder, f"llvm.masked.{operation}.{name}.p0{name}", result, operands)


def _first(builder, count, lanes):
    """A mask of the first `count` lanes."""
    lane = ir.IntType(32)
    places = ir.Constant(ir.VectorType(lane, lanes), list(range(lanes)))
    return builder.icmp_signed("<", places, _splat(builder, builder.trunc(count, lane), lanes))


@intrinsic
def load_part(_typing, array, place):
    """load at place[0] of place[1] values, at most a vector; the other lanes are 0."""
    if isinstance(array, types.Float):
        return array(array, place), _same
    kind = Vector(work_of(array.dtype))

    def build(context, builder, _signature, arguments):
        index, count = cgutils.unpack_tuple(builder, arguments[1])
        stored = ir.VectorType(context.get_value_type(array.dtype), kind.lanes)
        pointer = _pointer(context, builder, array, arguments[0], index, stored)
        align = ir.Constant(ir.IntType(32), array.dtype.bitwidth // 8)
        mask = _first(builder, count, kind.lanes)
        value = _masked(
            builder, "load", stored, stored, [pointer, align, mask, ir.Constant(stored, None)]
        )
        return _widen(builder, array.dtype, value) if array.dtype in SHORT else value

    return kind(array, place), build


@intrinsic
def at(_typing, array, index):
    """The value of array[index]."""

    def build(context, builder, _signature, arguments):
        stored = context.get_value_type(array.dtype)
        return _read(
            builder, array.dtype, _pointer(context, builder, array, *arguments, stored)
        )

    return work_of(array.dtype)(array, types.intp), build


@intrinsic
def rounded(_typing, array, value):
    """A value in the working type of an array like x."""

    def build(_context, _builder, _signature, arguments):
        return arguments[1]

    work = work_of(array.dtype)
    return work(array, work), build


@intrinsic
def choose(_typing, condition, a, b):
    """a if condition else b, lane by lane."""
    kind = _common(a, b)

    def build(_context, builder, _signature, arguments):
        return builder.select(arguments[0], *_alike(builder, kind, arguments[1:]))

    return kind(condition, a, b), build


@intrinsic
def power_of_two(_typing, value):
    """The lowest bits of numbers as the exponents of others."""
    size = value.element.bitwidth
    mantissa = 23 if size == 32 else 52

    def build(_context, builder, _signature, arguments):
        whole = _shaped(ir.IntType(size), arguments[0].type)
        bits = builder.shl(builder.bitcast(arguments[0], whole), _all(whole, mantissa))
        return builder.bitcast(bits, arguments[0].type)

    return value(value), build


def lanewise(function):
    """A function of a vector that has this of each number."""

    @intrinsic
    def apply(_typing, vector):
        def build(context, builder, _signature, arguments):
            results = arguments[0]
            for lane in range(vector.lanes):
                place = ir.Constant(ir.IntType(32), lane)
                number = builder.extract_element(arguments[0], place)
                found = context.compile_internal(
                    builder, function, vector.element(vector.element), [number])
                results = builder.insert_element(results, found, place)
            return results

        return vector(vector), build

    return apply


def compiled_for(feature):
    """Whether kernels are compiled for a processor that has it."""
    features = numba.config.CPU_FEATURES
    features = get_host_cpu_features().flatten() if features is None else features
    return f"+{feature}" in features.split(",")


# Where the processor has fused multiply-adds, they are spelled out: LLVM, which may not change a
# rounding, makes none by itself.
FUSES = (ON_X86 and compiled_for("fma")) or machine() in ("aarch64", "arm64")


def _multiply_add(builder, a, b, c):
    if not FUSES:
        return builder.fadd(builder.fmul(a, b), c)
    return _call(builder, f"llvm.fma.{_name(a.type)}", a.type, [a, b, c])


@intrinsic
def multiply_add(_typing, a, b, c):
    """a*b + c, rounded once where the processor does."""
    kind = a if isinstance(a, Vector) else b

    def build(_context, builder, _signature, arguments):
        return _multiply_add(builder, *_alike(builder, kind, arguments))

    return kind(a, b, c), build


def polynomial(powers):
    """A function of a vector, by Horner's scheme; the highest power's constant first."""

    @intrinsic
    def value(_typing, x):
        def build(_context, builder, _signature, arguments):
            total, *constants = (_all(arguments[0].type, power) for power in powers)
            for constant in constants:
                total = _multiply_add(builder, total, arguments[0], constant)
            return total

        return x(x), build

    return value


@intrinsic
def on_grid(_typing, array, value):
    """rounded, to one that the array can hold: differences from another value would all have the
    same lowest bits, and every addition would round them the same way."""
    work = work_of(array.dtype)

    def build(_context, builder, _signature, arguments):
        if array.dtype not in SHORT:
            return arguments[1]
        return _widen(builder, array.dtype, _narrow(builder, array.dtype, arguments[1]))

    return work(array, work), build


@intrinsic
def store_part(_typing, array, place, value):
    """store at place[0] of the first place[1] lanes."""

    def build(context, builder, _signature, arguments):
        index, count = cgutils.unpack_tuple(builder, arguments[1])
        bits = arguments[2]
        if array.dtype in SHORT:
            bits = _narrow(builder, array.dtype, bits)
        pointer = _pointer(context, builder, array, arguments[0], index, bits.type)
        align = ir.Constant(ir.IntType(32), array.dtype.bitwidth // 8)
        mask = _first(builder, count, value.lanes)
        _masked(builder, "store", bits.type, ir.VoidType(), [bits, pointer, align, mask])
        return context.get_dummy_value()

    return types.void(array, place, value), build


def _storing(aligned, past_the_caches):
    @intrinsic
    def store(_typing, array, index, value):
        def build(context, builder, _signature, arguments):
            bits = arguments[2]
            if array.dtype in SHORT:
                bits = _narrow(builder, array.dtype, bits)
            pointer = _pointer(context, builder, array, *arguments[:2], bits.type)
            size = array.dtype.bitwidth // 8
            place = min(LINE, size * value.lanes) if aligned else size
            store = builder.store(bits, pointer, align=place)
            if past_the_caches:
                one = ir.Constant(ir.IntType(32), 1)
                store.set_metadata("nontemporal", builder.module.add_metadata([one]))
            return context.get_dummy_value()

        return types.void(array, types.intp, value), build

    return store


# A vector to array[index], rounded: at any address; and to where it is aligned to its
# size, past the caches.
store = _storing(aligned=False, past_the_caches=False)
stream = _storing(aligned=True, past_the_caches=True)


@intrinsic
def fold(_typing, value):
    """The sum of a line's values in float64, pairwise."""

    def build(_context, builder, _signature, arguments):
        lane, sums, lanes = ir.IntType(32), arguments[0], value.lanes
        if value.element != types.float64:
            sums = builder.fpext(sums, ir.VectorType(ir.DoubleType(), lanes))
        while lanes > 1:
            lanes //= 2
            halves = []
            for first in (0, lanes):
                order = ir.Constant(ir.VectorType(lane, lanes), list(range(first, first + lanes)))
                halves.append(builder.shuffle_vector(sums, sums, order))
            sums = builder.fadd(*halves)
        return builder.extract_element(sums, ir.Constant(lane, 0))

    return types.float64(value), build


def _operator(operation, instruction, *condition):
    @intrinsic
    def apply(_typing, a, b):
        kind = _common(a, b)

        def build(_context, builder, _signature, arguments):
            values = _alike(builder, kind, arguments)
            return getattr(builder, instruction)(*condition, *values)

        return (Mask(kind.lanes) if condition else kind)(a, b), build

    @overload(operation)
    def for_vectors(a, b):
        return None if _common(a, b) is None else lambda a, b: apply(a, b)


for _operation, *_instruction in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"),
    (operator.truediv, "fdiv"), (operator.lt, "fcmp_ordered", "<"),
    (operator.le, "fcmp_ordered", "<="), (operator.gt, "fcmp_ordered", ">"),
):
    _operator(_operation, *_instruction)
