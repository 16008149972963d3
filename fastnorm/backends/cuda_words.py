"""The primitives of the CUDA kernels: casts, 16-byte accesses, sums over a block.

All that depends on numba-cuda's compiler is here, and its twin for the simulator is in
cuda_simulated.py; a successor of numba-cuda replaces this module alone. Memory is addressed by
integers: they cost a launch less than arrays. Statistics and sums are in the working type,
float32 but for float64 storage.
"""

from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir
from numba import cuda, float32, float64, types

try:
    from numba.cuda.extending import intrinsic
except ImportError:  # before numba-cuda had an extension interface of its own
    from numba.core.extending import intrinsic

THREADS = 256  # in a block
WARP = 32
WARPS = THREADS // WARP
ALL_LANES = 0xFFFFFFFF
VECTOR = 16  # bytes of a vector access
SUMS = 2 * WARPS  # sizes of shared arrays: the compiler wants them by name
MOMENTS = 3 * WARPS


class Words(NamedTuple):
    """Accesses to one storage type. Addresses and indices are integers, indices in elements."""

    name: str
    itemsize: int
    work: Any  # the Numba type of the arithmetic
    lanes: int  # elements that load_lanes reads into, and store_lanes writes from, a local array
    load: Any  # (address, index) -> value
    store: Any  # (address, index, value)
    load_lanes: Any  # (address, index, into)
    store_lanes: Any  # (address, index, values)


class _Storage(NamedTuple):
    itemsize: int
    work: Any
    element: Any  # IR type in memory
    widen: Any  # (builder, element) -> working value
    narrow: Any  # (builder, working value) -> element


_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))


def _same(_, value):
    return value


def _widen_half(builder, value):
    return builder.fpext(value, ir.FloatType())


def _narrow_half(builder, value):
    return builder.fptrunc(value, ir.HalfType())


def _widen_bfloat(builder, value):
    """bfloat16 is the upper half of a float32."""
    bits = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16))
    return builder.bitcast(bits, ir.FloatType())


def _narrow_bfloat(builder, value):
    """To the nearest, ties to even; any NaN becomes the quiet one."""
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
    rounded = builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), odd)
    upper = builder.lshr(rounded, ir.Constant(_I32, 16))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, ir.Constant(_I32, 0x7FC0), upper), _I16)


_STORAGE = {
    "float32": _Storage(4, float32, ir.FloatType(), _same, _same),
    "float64": _Storage(8, float64, ir.DoubleType(), _same, _same),
    "float16": _Storage(2, float32, ir.HalfType(), _widen_half, _narrow_half),
    "bfloat16": _Storage(2, float32, _I16, _widen_bfloat, _narrow_bfloat),
}


def _pointer(builder, address, index, itemsize, element):
    """To global memory."""
    byte = builder.add(address, builder.mul(index, ir.Constant(_I64, itemsize)))
    return builder.inttoptr(byte, ir.PointerType(element, 1))


def _scalar_words(storage):
    def emit_load(context, builder, signature, args):
        at = _pointer(builder, args[0], args[1], storage.itemsize, storage.element)
        return storage.widen(builder, builder.load(at, align=storage.itemsize))

    def emit_store(context, builder, signature, args):
        at = _pointer(builder, args[0], args[1], storage.itemsize, storage.element)
        builder.store(storage.narrow(builder, args[2]), at, align=storage.itemsize)
        return context.get_dummy_value()

    @intrinsic
    def load(typingctx, address, index):
        return storage.work(types.int64, types.int64), emit_load

    @intrinsic
    def store(typingctx, address, index, value):
        return types.void(types.int64, types.int64, storage.work), emit_store

    return load, store


def _lane_words(storage, lanes):
    """Vector accesses: one instruction of 16 bytes each.

    Elements of 16 bits travel as words of 32 bits: the compiler splits vectors of shorter ones."""
    packed = ir.VectorType(storage.element, lanes)
    moved = ir.VectorType(_I32, VECTOR // 4) if storage.itemsize == 2 else packed

    def lane(k):
        return ir.Constant(_I32, k)

    def data(context, builder, signature, args):
        return context.make_array(signature.args[2])(context, builder, args[2]).data

    def emit_load(context, builder, signature, args):
        at = _pointer(builder, args[0], args[1], storage.itemsize, moved)
        vector = builder.bitcast(builder.load(at, align=VECTOR), packed)
        into = data(context, builder, signature, args)
        for k in range(lanes):
            value = storage.widen(builder, builder.extract_element(vector, lane(k)))
            builder.store(value, builder.gep(into, [lane(k)]))
        return context.get_dummy_value()

    def emit_store(context, builder, signature, args):
        at = _pointer(builder, args[0], args[1], storage.itemsize, moved)
        values = data(context, builder, signature, args)
        vector = ir.Constant(packed, ir.Undefined)
        for k in range(lanes):
            value = storage.narrow(builder, builder.load(builder.gep(values, [lane(k)])))
            vector = builder.insert_element(vector, value, lane(k))
        builder.store(builder.bitcast(vector, moved), at, align=VECTOR)
        return context.get_dummy_value()

    @intrinsic
    def load_lanes(typingctx, address, index, into):
        return types.void(types.int64, types.int64, into), emit_load

    @intrinsic
    def store_lanes(typingctx, address, index, values):
        return types.void(types.int64, types.int64, values), emit_store

    return load_lanes, store_lanes


@cache
def words(name, wide=False):
    """The Words of a storage type; lanes is 1 unless they are wide."""
    storage = _STORAGE[name]
    load, store = _scalar_words(storage)
    lanes = VECTOR // storage.itemsize if wide else 1
    if wide:
        load_lanes, store_lanes = _lane_words(storage, lanes)
    else:

        @cuda.jit(device=True)
        def load_lanes(address, index, into):
            into[0] = load(address, index)

        @cuda.jit(device=True)
        def store_lanes(address, index, values):
            store(address, index, values[0])

    return Words(name, storage.itemsize, storage.work, lanes, load, store, load_lanes, store_lanes)


def merging(work):
    """Chan's merge of (count, mean, sum of squares about it) of two parts."""

    @cuda.jit(device=True)
    def merge(count, mean, m2, other_count, other_mean, other_m2):
        total = count + other_count
        if total == work(0):
            return count, mean, m2
        d = other_mean - mean
        share = other_count / total
        return total, mean + d * share, m2 + other_m2 + d * d * (count * share)

    return merge


@cache
def block_words(work):
    """(merge, block_sums, block_moments): the sums of two values, and the merge of the moments,
    over the threads of a block, in a fixed order and the same for every thread."""
    merge = merging(work)

    @cuda.jit(device=True)
    def block_sums(a, b):
        shared = cuda.shared.array(SUMS, work)
        offset = WARP // 2
        while offset > 0:
            a += cuda.shfl_down_sync(ALL_LANES, a, offset)
            b += cuda.shfl_down_sync(ALL_LANES, b, offset)
            offset //= 2
        warp = cuda.threadIdx.x // WARP
        if cuda.threadIdx.x % WARP == 0:
            shared[2 * warp] = a
            shared[2 * warp + 1] = b
        cuda.syncthreads()
        a = shared[0]
        b = shared[1]
        for warp in range(1, WARPS):
            a += shared[2 * warp]
            b += shared[2 * warp + 1]
        cuda.syncthreads()
        return a, b

    @cuda.jit(device=True)
    def block_moments(count, mean, m2):
        shared = cuda.shared.array(MOMENTS, work)
        offset = WARP // 2
        while offset > 0:
            other_count = cuda.shfl_down_sync(ALL_LANES, count, offset)
            other_mean = cuda.shfl_down_sync(ALL_LANES, mean, offset)
            other_m2 = cuda.shfl_down_sync(ALL_LANES, m2, offset)
            count, mean, m2 = merge(count, mean, m2, other_count, other_mean, other_m2)
            offset //= 2
        warp = cuda.threadIdx.x // WARP
        if cuda.threadIdx.x % WARP == 0:
            shared[3 * warp] = count
            shared[3 * warp + 1] = mean
            shared[3 * warp + 2] = m2
        cuda.syncthreads()
        count = shared[0]
        mean = shared[1]
        m2 = shared[2]
        for warp in range(1, WARPS):
            count, mean, m2 = merge(count, mean, m2, shared[3 * warp], shared[3 * warp + 1],
                                    shared[3 * warp + 2])
        cuda.syncthreads()
        return count, mean, m2

    return merge, block_sums, block_moments
