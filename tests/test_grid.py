"""Every norm against the oracle: layout, rank, dtype, backend, level, threads, out, strides."""

import numpy as np
import pytest
from cases import DTYPES, Case, large_cases, small_cases

from fastnorm import backends
from fastnorm.dtypes import TABLE

THREADS = (1, 2, 3)


def to_layout(a, layout):
    return np.ascontiguousarray(np.moveaxis(a, 1, -1)) if layout == "NHWC" else a


def from_layout(a, layout):
    return np.moveaxis(a, -1, 1) if layout == "NHWC" else a


def layouts(case):
    return ("NCHW", "NHWC") if case.by_channel else (None,)


def sliced(a):
    wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), np.nan, a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]


def negative(a):
    return np.ascontiguousarray(a[::-1])[::-1]


def moved_memory(a):
    """The same shape, but its memory holds the channel axis at the other end."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)


def read_only(a):
    a = a.copy()
    a.setflags(write=False)
    return a


def transposed(a):
    return np.ascontiguousarray(a.T).T


STRIDES = {
    "contiguous": np.ascontiguousarray,
    "sliced": sliced,
    "negative": negative,
    "transposed": transposed,
    "read_only": read_only,
}


def skip_what_it_does_not_serve(engine, dtype):
    reason = backends.refusal(engine, np.dtype(dtype))
    if reason is not None:
        pytest.skip(f"{engine}: {reason}")


def check(
    case, layout, dtype, engine, threads, use_out, arrange=np.ascontiguousarray, weighted=True
):
    skip_what_it_does_not_serve(engine, dtype)
    x, dy, weight, bias = case.arrays(dtype, weighted=weighted)
    exact = case.exact(x, dy, weight, bias)
    common = {"backend": engine, "num_threads": threads}
    if layout:
        common["layout"] = layout
    lx, ldy = (arrange(to_layout(a, layout)) for a in (x, dy))
    out = np.full(lx.shape, np.nan, dtype) if use_out else None
    y, stats = case.forward(lx, weight, bias, return_stats=True, out=out, **common)
    assert not use_out or y is out
    dout = np.full(lx.shape, np.nan, dtype) if use_out else None
    gradients = case.backward(ldy, lx, stats, weight, out=dout, **common)
    assert not use_out or gradients.dx is dout
    found = {
        "y": from_layout(y, layout),
        "mean": stats.mean,
        "var": stats.var,
        "rstd": stats.rstd,
        "dx": from_layout(gradients.dx, layout),
        "dweight": gradients.dweight,
        "dbias": gradients.dbias,
    }
    tolerance = TABLE[np.dtype(dtype)].tolerance
    if engine == "reference":
        tolerance = max(tolerance, 1e-11)  # NumPy adds along an outer axis one by one
    # What the terms of a gradient weigh before they cancel: sets of one value leave nothing.
    largest = float(np.max(np.abs(dy)))
    terms = {"dx": largest * float(np.max(exact["rstd"])), "dweight": largest, "dbias": largest}
    for name, value in found.items():
        if value is None:
            assert case.norm == "rms"
            continue
        wanted = exact[name]
        assert value.shape == wanted.shape, name
        scale = max(terms.get(name, 1e-300), float(np.max(np.abs(wanted))))
        worst = float(np.max(np.abs(value.astype(np.longdouble) - wanted))) / scale
        # Statistics are as good as in float32, but that values on a coarse grid round alike.
        limit = min(tolerance, 3e-6) if name in ("mean", "var", "rstd") else tolerance
        assert worst < limit, f"{name} is off by {worst:.2e} of its largest value"
    for a, b in ((lx, x), (ldy, dy)):
        assert np.array_equal(from_layout(a, layout), b), "an input was written"


@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_small(case, dtype, engine, weighted):
    for layout in layouts(case):
        for threads in THREADS:
            for use_out in (False, True):
                check(case, layout, dtype, engine, threads, use_out, weighted=weighted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", large_cases(), ids=str)
def test_large(case, dtype, engine):
    for layout in layouts(case):
        check(case, layout, dtype, engine, 3, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_strides(case, stride, dtype, engine):
    for layout in layouts(case):
        for use_out in (False, True):
            check(case, layout, dtype, engine, 2, use_out, STRIDES[stride])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [c for c in small_cases() if len(c.shape) > 2 and c.by_channel], ids=str
)
def test_memory_order_is_kept(case, dtype, engine):
    """A transposed view is computed as it lies: same values, same memory order as x."""
    skip_what_it_does_not_serve(engine, dtype)
    x, dy, weight, bias = case.arrays(dtype)
    straight, stats = case.forward(x, weight, bias, return_stats=True, backend=engine)
    other, other_stats = case.forward(
        moved_memory(x), weight, bias, return_stats=True, backend=engine
    )
    assert other.strides == moved_memory(x).strides
    np.testing.assert_allclose(other, straight, rtol=0, atol=1e-5)
    np.testing.assert_allclose(other_stats.var, stats.var, rtol=1e-6)
    wanted = case.backward(dy, x, stats, weight, backend=engine)
    for grad in (dy, moved_memory(dy)):
        found = case.backward(grad, moved_memory(x), stats, weight, backend=engine)
        assert found.dx.strides == moved_memory(x).strides
        np.testing.assert_allclose(found.dx, wanted.dx, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.dweight, wanted.dweight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_in_place(case, engine):
    """out may be x, dx may be dy or x, in any memory order."""
    arrangements = [np.ascontiguousarray, sliced]
    if case.by_channel and len(case.shape) > 2:
        arrangements.append(moved_memory)
    for arrange in arrangements:
        x, dy, weight, bias = case.arrays(np.float32)
        y, stats = case.forward(x, weight, bias, return_stats=True, backend=engine)
        dx = case.backward(dy, x, stats, weight, backend=engine).dx
        own = arrange(x.copy())
        assert case.forward(own, weight, bias, out=own, backend=engine) is own
        np.testing.assert_allclose(own, y, rtol=0, atol=2e-5)
        for which in ("dy", "x"):
            both = {"dy": arrange(dy.copy()), "x": arrange(x.copy())}
            found = case.backward(
                both["dy"], both["x"], stats, weight, out=both[which], backend=engine
            )
            assert found.dx is both[which]
            np.testing.assert_allclose(found.dx, dx, rtol=0, atol=2e-5)


GIVEN = [c for c in small_cases() if c.norm == "batch"] + [Case("batch", (9, 40, 7, 7))]


@pytest.mark.parametrize("case", GIVEN, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_statistics(case, dtype, engine):
    """Evaluation uses the running statistics, and its backward takes them as constants."""
    import oracle

    import fastnorm

    skip_what_it_does_not_serve(engine, dtype)
    x, dy, weight, bias = case.arrays(dtype)
    rng = np.random.default_rng(1)
    running = rng.normal(size=case.shape[1]), rng.uniform(0.5, 2, case.shape[1])
    wide = (a.astype(np.longdouble) for a in (weight, bias))
    exact = oracle.channel_norm(x, dy, "batch", 0, *wide, 1e-5, running)
    for layout in layouts(case):
        for threads in THREADS:
            y, stats = fastnorm.batch_norm(
                to_layout(x, layout),
                *running,
                weight,
                bias,
                layout=layout,
                return_stats=True,
                backend=engine,
                num_threads=threads,
            )
            assert stats.given
            gradients = fastnorm.batch_norm_backward(
                to_layout(dy, layout),
                to_layout(x, layout),
                stats,
                weight,
                layout=layout,
                backend=engine,
            )
            pairs = (
                (from_layout(y, layout), exact["y"]),
                (stats.rstd, exact["rstd"]),
                (from_layout(gradients.dx, layout), exact["dx"]),
                (gradients.dweight, exact["dweight"]),
            )
            for found, wanted in pairs:
                tolerance = TABLE[np.dtype(dtype)].tolerance * np.max(np.abs(wanted))
                assert np.max(np.abs(found.astype(np.longdouble) - wanted)) < tolerance
