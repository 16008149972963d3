"""More than 2^31 elements: every index is 64 bits wide. Needs 12 GB, so it runs only when named:

    python -m pytest tests/test_big.py -m big
"""

import numpy as np
import pytest

import fastnorm
from fastnorm import backends

PERIOD = 1 << 10


def skip_unless_asked(request):
    if "big" not in (request.config.getoption("-m") or ""):
        pytest.skip("needs 12 GB: asked for by -m big")


@pytest.mark.big
@pytest.mark.skipif(isinstance(backends.load("native"), str), reason="no native library here")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "rows"])
def test_more_elements_than_an_int_counts(layout, request):
    skip_unless_asked(request)
    # A pattern whose statistics are known, and with it those of the whole.
    pattern = np.random.default_rng(0).normal(3, 2, PERIOD).astype(np.float16)
    blocks = (1 << 31) // PERIOD + 3
    x = np.empty((blocks, PERIOD), np.float16)
    x[...] = pattern
    assert x.size > 1 << 31
    exact = pattern.astype(np.float64)
    if layout == "rows":
        y, stats = fastnorm.layer_norm(x, PERIOD, out=x, return_stats=True)
        wanted = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
        np.testing.assert_allclose(stats.mean, exact.mean(), rtol=1e-6)
    elif layout == "NHWC":
        y, stats = fastnorm.batch_norm(x, training=True, layout="NHWC", out=x, return_stats=True)
        np.testing.assert_allclose(stats.mean, exact, rtol=1e-6)
        wanted = np.zeros(PERIOD)
    else:
        image = x.reshape(1, 1, -1)
        y, stats = fastnorm.batch_norm(image, training=True, out=image, return_stats=True)
        np.testing.assert_allclose(stats.mean, exact.mean(), rtol=1e-6)
        np.testing.assert_allclose(stats.var, exact.var(), rtol=1e-6)
        wanted = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
    found = y.reshape(blocks, PERIOD)
    for block in (0, blocks // 2, (1 << 30) // PERIOD, blocks - 1):
        np.testing.assert_allclose(found[block].astype(float), wanted, atol=3e-3)
